"The sampler and its losses against slow independent references, and what the sampler's state must survive."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cmcgns.clustering import (NegativeSampler, ReportContrast, cluster_sums, false_negative_margin, false_negatives,
                               first_centroids, hard_negative_contrast, mean_cosine)
from test_alignment import TOLERANCE, Watch, both_precisions, cos, slow_contrast, slow_cross_entropy


class SlowSampler:
    "The method as one would do it with pencil and paper: lists of float64 vectors, one at a time."
    def __init__(self, k, start, momentum, init, update, seed):
        self.k, self.start, self.momentum, self.init, self.update, self.seed = k, start, momentum, init, update, seed
        self.centroids, self.counts, self.recent = None, [0] * k, []

    def observe(self, points):
        points = [p / math.sqrt(np.dot(p, p)) for p in points]
        if self.centroids is not None: return self.move(points)
        if len(points) < self.k: points = (self.recent + points)[-self.k:]
        self.recent = points[-self.k:]
        if len(points) < self.k: return
        pairs = [cos(p, q) for p in points for q in points]
        if sum(pairs) / len(pairs) <= self.start: self.centroids = self.choose(points)

    def choose(self, points):
        chosen = [int(torch.randint(len(points), (1,), generator=torch.Generator().manual_seed(self.seed)))]
        while len(chosen) < self.k:
            against = chosen if self.init == 'farthest' else chosen[-1:]
            worst = {n: max(cos(p, points[j]) for j in against) for n, p in enumerate(points) if n not in chosen}
            chosen.append(min(worst, key=worst.get))
        return [points[n] for n in chosen]

    def ranked(self, point):
        return sorted(range(self.k), key=lambda j: -cos(point, self.centroids[j]))

    def move(self, points):
        own = [self.ranked(p)[0] for p in points]
        for j in range(self.k):
            members = [p for p, o in zip(points, own) if o == j]
            self.counts[j] += len(members)
            if members:
                target = sum(members) / (len(members) if self.update == 'mean' else 1)
                self.centroids[j] = (1 - self.momentum) * self.centroids[j] + self.momentum * target


def slow_hard(x, y, hard, weight, temperature, weighting, spare=lambda n, m: False):
    rows = []
    for n, a in enumerate(x):
        further = [cos(a, h) / temperature for h in hard]
        if weighting == 'multiplicative': further = [weight * v if m == n else 0. for m, v in enumerate(further)]
        else: further[n] += math.log(weight)
        further = [v for m, v in enumerate(further) if not spare(n, m)]
        rows.append([cos(a, b) / temperature for b in y] + further)
    return slow_cross_entropy(rows)


def slow_margin(x, y, labels, alpha, beta, over):
    terms = []
    for n in range(len(x)):
        for m in range(len(x)):
            false = m != n and labels[m] == labels[n]
            if false or over == 'all_pairs':
                delta = cos(x[n], y[m]) - cos(x[n], y[n]) if false else 0.
                terms.append(max(0., delta + alpha) + max(0., -delta - beta))
    return sum(terms) / max(1, len(terms))


def draw(seed, dtype):
    "A size, settings, and a stream of batches, of the same rounded numbers for both sides."
    g = np.random.default_rng(seed)
    settings = dict(clusters=int(g.integers(2, 12)), start=float(g.choice([.4, .8])), momentum=float(g.choice([1e-3, .1])),
                    init=str(g.choice(['farthest', 'published'])), update=str(g.choice(['sum', 'mean'])), seed=int(g.integers(99)))
    d, pull = int(g.integers(3, 20)), g.choice([.3, 2.])
    batches = [torch.tensor(g.normal(size=(int(g.integers(1, 30)), d)) + pull / (1 + step), dtype=dtype) for step in range(8)]
    return g, d, settings, batches


def sampler_difference(seed, dtype):
    "Largest difference of the centroids over a stream; labels, hard negatives, start and counts must agree exactly."
    _, d, settings, batches = draw(seed, dtype)
    fast = NegativeSampler(d, **settings).to(dtype)
    slow = SlowSampler(settings['clusters'], *(settings[k] for k in ('start', 'momentum', 'init', 'update', 'seed')))
    worst = 0.
    for batch in batches:
        fast.observe(batch)
        slow.observe(list(batch.double().numpy()))
        assert bool(fast.started) == (slow.centroids is not None)
        if slow.centroids is None:
            assert int(fast.n_recent) == len(slow.recent)
            worst = max([worst, *(np.abs(a - b).max() for a, b in zip(fast.recent.double().numpy(), slow.recent))])
            continue
        worst = max(worst, np.abs(fast.centroids.double().numpy() - np.stack(slow.centroids)).max())
        ranked = [slow.ranked(p)[:2] for p in batch.double().numpy()]
        assert fast.two_nearest(batch).tolist() == ranked and fast.counts.tolist() == slow.counts
        hard = np.stack([slow.centroids[second] for _, second in ranked])
        worst = max(worst, np.abs(fast.hard_negatives(batch).double().numpy() - hard).max())
    return worst


def loss_differences(seed, dtype):
    "Largest difference of each loss to its reference, at sizes drawn by the seed."
    g = np.random.default_rng(seed)
    n, d, k = int(g.integers(1, 25)), int(g.integers(2, 20)), int(g.integers(1, 6))
    x, y, hard = (torch.tensor(a, dtype=dtype) for a in g.normal(size=(3, n, d)))
    labels, t, weight = torch.tensor(g.integers(0, k, n)), float(g.choice([.1, 1.])), float(g.choice([.5, 1., 3.]))
    a, b, h = (v.double().numpy() for v in (x, y, hard))
    out = {}
    for w in ('additive', 'multiplicative'):
        out[f'hard_negative_contrast, {w}'] = abs(hard_negative_contrast(x, y, hard, weight, t, w).item() - slow_hard(a, b, h, weight, t, w))
    for over in ('false_negatives', 'all_pairs'):
        out[f'false_negative_margin, {over}'] = abs(false_negative_margin(x, y, false_negatives(labels), .2, .5, over).item()
                                                    - slow_margin(a, b, labels.tolist(), .2, .5, over))
    pairs = [cos(p, q) for p in a for q in b]
    out['mean_cosine'] = abs(mean_cosine(x, y).item() - sum(pairs) / len(pairs))
    return out


@both_precisions
def test_sampler_equals_slow_reference(dtype):
    for seed in range(15):
        assert (worst := sampler_difference(seed, dtype)) < TOLERANCE[dtype], (seed, worst)


@both_precisions
def test_losses_equal_slow_references(dtype):
    for seed in range(30):
        for name, value in loss_differences(seed, dtype).items():
            assert value < TOLERANCE[dtype], (name, seed, value)


@pytest.mark.parametrize('weighting', ['additive', 'spared', 'multiplicative'])
@pytest.mark.parametrize('asks', ['sentence', 'clustered'])
@pytest.mark.parametrize('cluster', ['cross-modal', 'single-modal'])
def test_report_contrast_is_its_parts_with_the_state_before_the_step(cluster, asks, weighting):
    g, d, settings, _ = draw(3, torch.float64)
    settings |= dict(clusters=5, start=.9)
    choices = dict(temperature=1., weighting=weighting, over='all_pairs') if weighting == 'multiplicative' else \
              dict(temperature=.1, weighting=weighting, over='false_negatives')
    module = ReportContrast(NegativeSampler(d, **settings), cluster=cluster, asks=asks, margin_weight=.5, **choices).double()
    slow = SlowSampler(settings['clusters'], *(settings[k] for k in ('start', 'momentum', 'init', 'update', 'seed')))
    spared = 0
    for step in range(6):
        x, y = g.normal(size=(2, int(g.integers(2, 15)), d))
        losses = module(torch.tensor(x), torch.tensor(y))
        points = y if cluster == 'cross-modal' else x
        if slow.centroids is None: want = slow_contrast(x, y, choices['temperature']), 0.
        else:
            ranked = [slow.ranked(p)[:2] for p in (x if asks == 'sentence' else points)]
            hard = [slow.centroids[second] for _, second in ranked]
            spare = lambda n, m, ranked=ranked: weighting == 'spared' and ranked[n][0] == ranked[m][1]
            spared += sum(spare(n, m) for n in range(len(x)) for m in range(len(x)))
            want = (slow_hard(x, y, hard, 3., choices['temperature'], weighting, spare),
                    slow_margin(x, y, [own for own, _ in ranked], .2, .5, choices['over']))
        slow.observe(list(points))
        for name, value in zip(('contrast', 'margin', 'loss'), (*want, want[0] + .5 * want[1])):
            assert math.isclose(losses[name].item(), value, rel_tol=1e-9, abs_tol=1e-12), (step, name)
    assert slow.centroids is not None and (spared > 0) == (weighting == 'spared')


@pytest.mark.parametrize('n', [1, 2, 17])
def test_degenerate_cases_are_plain_cross_entropy(n):
    torch.manual_seed(n)
    x, y, h = torch.randn(3, n, 6, dtype=torch.double)
    u, v, w = (F.normalize(t) for t in (x, y, h))
    plain, rows = F.cross_entropy(u @ v.T / .1, torch.arange(n)), torch.arange(n)
    close = torch.testing.assert_close
    close(hard_negative_contrast(x, y, h[:0]), plain)
    close(hard_negative_contrast(x, y, h, weight=1.), F.cross_entropy(torch.cat([u @ v.T, u @ w.T], 1) / .1, rows))
    others = (u @ w.T / .1).masked_fill(torch.eye(n).bool(), -math.inf)
    close(hard_negative_contrast(x, y, h, weight=0.), F.cross_entropy(torch.cat([u @ v.T / .1, others], 1), rows))
    close(hard_negative_contrast(x, y, h, weight=0., weighting='multiplicative'),
          F.cross_entropy(F.pad(u @ v.T / .1, (0, n)), rows))
    if n == 1: close(hard_negative_contrast(x, y, h, weight=0.), plain)
    for switch in (dict(cluster='none'), dict(hard=False, false=False), dict(hard=False, margin_weight=0.)):
        module = ReportContrast(NegativeSampler(6, clusters=2, start=1.), **switch).double()
        for _ in range(4): close(module(x, y)['loss'], plain)


def test_one_cluster_makes_every_other_sentence_a_false_negative():
    torch.manual_seed(0)
    x, y, labels = *torch.randn(2, 9, 5, dtype=torch.double), torch.zeros(9)
    similar = F.normalize(x) @ F.normalize(y).T
    delta = (similar - similar.diag()[:, None])[~torch.eye(9).bool()]
    torch.testing.assert_close(false_negative_margin(x, y, false_negatives(labels)), (F.relu(delta + .2) + F.relu(-delta - .5)).mean())
    assert false_negative_margin(x, y, false_negatives(torch.arange(9))) == 0


def test_two_clusters_make_each_other_hard():
    sampler = NegativeSampler(3, clusters=2, start=1.)
    sampler.observe(torch.randn(8, 3, generator=torch.Generator().manual_seed(0)))
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sampler.hard_negatives(points), sampler.centroids[1 - sampler.assign(points)])


def test_more_clusters_than_sentences_waits_and_never_stops_a_run():
    sampler, g = NegativeSampler(4, clusters=50), torch.Generator().manual_seed(0)
    module = ReportContrast(sampler)
    seen = 0
    for n in (1, 7, 0, 20, 3, 18):
        x = torch.randn(n, 4, generator=g)
        (module(x, x) if n else sampler.observe(x))
        seen += n
        assert int(sampler.n_recent) == seen and not sampler.started
    assert int(sampler.steps) == 6
    module(torch.randn(1, 4, generator=g), torch.randn(1, 4, generator=g))
    assert sampler.started and int(sampler.n_recent) == 0 and not sampler.recent.any()
    module(torch.randn(2, 4, generator=g), torch.randn(2, 4, generator=g))
    assert sampler.counts.sum() == 2


def test_start_waits_for_spread_and_keeps_the_latest():
    sampler, g = NegativeSampler(6, clusters=4), torch.Generator().manual_seed(0)
    for _ in range(3):
        batch = 5 + torch.randn(9, 6, generator=g)
        sampler.observe(batch)
    assert not sampler.started
    torch.testing.assert_close(sampler.recent, F.normalize(batch[-4:]))
    with pytest.raises(RuntimeError, match='no clusters before its start'): sampler.hard_negatives(batch)
    sampler.observe(torch.randn(9, 6, generator=g))
    assert sampler.started


@pytest.mark.parametrize('init', ['farthest', 'published'])
def test_first_centroids_are_different_points_even_among_equals(init):
    points = F.normalize(torch.ones(6, 3))
    assert sorted(first_centroids(points, 6, init).tolist()) == list(range(6))
    assert {first_centroids(torch.eye(8), 2, init, seed)[0].item() for seed in range(40)} == set(range(8))


def state_equal(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize('stop', range(0, 9, 2))
def test_saved_loaded_and_resumed_is_equal_bit_for_bit(stop, tmp_path):
    g = torch.Generator().manual_seed(0)
    batches = torch.randn(8, 2, 12, 5, generator=g)
    make = lambda: ReportContrast(NegativeSampler(5, clusters=20))
    straight, stopped, resumed = make(), make(), make()
    wanted = [straight(*b)['loss'] for b in batches]
    for b in batches[:stop]: stopped(*b)
    torch.save(stopped.state_dict(), tmp_path / 'state.pt')
    resumed.load_state_dict(torch.load(tmp_path / 'state.pt', weights_only=True))
    assert [resumed(*b)['loss'] for b in batches[stop:]] == wanted[stop:]
    assert straight.sampler.started and state_equal(straight, resumed)


def test_state_travels_through_safetensors(tmp_path):
    save, load = (pytest.importorskip('safetensors.torch').__dict__[k] for k in ('save_file', 'load_file'))
    sampler = NegativeSampler(5, clusters=3)
    for _ in range(2): sampler.observe(torch.randn(12, 5, generator=torch.Generator().manual_seed(0)))
    save(sampler.state_dict(), tmp_path / 's.safetensors')
    other = NegativeSampler(5, clusters=3)
    other.load_state_dict(load(tmp_path / 's.safetensors'))
    assert sampler.started and state_equal(sampler, other)


@pytest.mark.parametrize('batches', [0, 1, 3], ids=['waiting', 'just started', 'started'])
def test_untouched_in_evaluation(batches):
    torch.manual_seed(0)
    module = ReportContrast(NegativeSampler(5, clusters=4))
    for _ in range(batches): module(*torch.randn(2, 12, 5))
    before = {k: v.clone() for k, v in module.state_dict().items()}
    module.eval()
    x, y = torch.randn(2, 12, 5)
    assert module(x, y)['loss'] == module(x, y)['loss']
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def test_state_does_not_depend_on_the_global_random_state():
    states = []
    for seed in (0, 1):
        sampler = NegativeSampler(5, clusters=4)
        torch.manual_seed(seed)
        sampler.observe(torch.randn(30, 5, generator=torch.Generator().manual_seed(7)))
        states.append(sampler)
    assert states[0].started and state_equal(*states)


def test_what_is_not_finite_or_zero_belongs_to_no_cluster():
    g = torch.Generator().manual_seed(0)
    good, start = torch.randn(10, 4, generator=g), torch.randn(12, 4, generator=g)
    bad = torch.cat([good[:2], good, good[:1]])
    bad[0], bad[1, 2], bad[-1] = math.nan, math.inf, 0.
    clean, dirty = NegativeSampler(4, clusters=3), NegativeSampler(4, clusters=3)
    for sampler, batch in ((clean, good), (dirty, bad)):
        sampler.observe(start)
        sampler.observe(batch)
    assert torch.equal(clean.counts, dirty.counts) and clean.counts.sum() == 10
    torch.testing.assert_close(clean.centroids, dirty.centroids)
    waiting = NegativeSampler(4, clusters=20)
    waiting.observe(bad)
    assert int(waiting.n_recent) == 10 and waiting.recent.isfinite().all()


def test_mixed_precision_leaves_state_and_loss_in_full_precision():
    torch.manual_seed(0)
    batches = torch.randn(4, 2, 12, 6)
    plain, mixed = (ReportContrast(NegativeSampler(6, clusters=4)) for _ in range(2))
    for b in batches:
        want = plain(*b)
        with torch.autocast('cpu', torch.bfloat16): got = mixed(*b)
        assert all(torch.equal(got[k], want[k]) for k in want)
    assert plain.sampler.started and state_equal(plain, mixed)
    with torch.autocast('cpu', torch.bfloat16): low = mixed(*batches[0].bfloat16())
    assert low['loss'].dtype == torch.float32 and mixed.sampler.centroids.dtype == torch.float32


def test_gradients_reach_sentences_and_not_the_sampler():
    torch.manual_seed(0)
    module = ReportContrast(NegativeSampler(4, clusters=3, start=1.), margin_weight=.3).double()
    x, y = torch.randn(2, 7, 4, dtype=torch.double, requires_grad=True)
    module(x, y)
    module.eval()
    assert module.sampler.started and torch.autograd.gradcheck(lambda x, y: module(x, y)['loss'], (x, y))
    assert not list(module.parameters()) and not any(b.requires_grad for b in module.buffers())


def watched(n, d, k):
    torch.manual_seed(0)
    module = ReportContrast(NegativeSampler(d, clusters=k))
    x, y = torch.randn(2, n, d).requires_grad_()
    module(x, y)
    with Watch() as seen: module(x, y)['loss'].backward()
    assert module.sampler.started
    return seen


def test_rows_at_a_time_hold_no_large_table():
    torch.manual_seed(0)
    module = ReportContrast(NegativeSampler(16, clusters=8))
    x, y = torch.randn(2, 300, 16).requires_grad_()
    module(x, y)
    own, second = module.sampler.two_nearest(x).unbind(1)
    for table in 3000, 9000:
        with Watch() as seen: module.losses(x, y, own, second, table=table)['loss'].backward()
        assert seen.largest <= max(2 * 300 * 16, table + table // 300 * 8) # the leaf; a few rows, and their columns of the centroids


def test_no_loop_over_sentences_and_no_table_of_vectors():
    small, large = watched(30, 64, 8), watched(300, 64, 8)
    assert small.ops == large.ops
    assert large.largest <= 300 * 2 * 300 # the logits with the hard columns
    assert watched(300, 64, 100).ops == large.ops


def test_unknown_settings_are_refused():
    for wrong, known in ((dict(init='random'), "'farthest', 'published'"), (dict(update='median'), "'sum', 'mean'")):
        (name, given), = wrong.items()
        with pytest.raises(ValueError, match=f"unknown {name} '{given}': known are {known}"): NegativeSampler(4, **wrong)
    with pytest.raises(ValueError, match='clusters is 1, expected 2 or more'): NegativeSampler(4, clusters=1)
    for wrong in (dict(cluster='both'), dict(asks='image'), dict(start_on='x'), dict(weighting='own'), dict(over='all')):
        with pytest.raises(ValueError, match='known are'): ReportContrast(NegativeSampler(4), **wrong)


def test_a_cluster_without_members_stays():
    sampler = NegativeSampler(2, clusters=2, momentum=.5)
    sampler.observe(torch.tensor([[1., 0.], [-1., 0.]]))
    before = sampler.centroids.clone()
    sampler.observe(torch.tensor([[1., .1], [1., -.2]]))
    right = int(before[:, 0].argmax())
    assert torch.equal(sampler.centroids[1 - right], before[1 - right]) and not torch.equal(sampler.centroids[right], before[right])
    assert cluster_sums(torch.zeros(3, 2), torch.zeros(3), 2).sum() == 0
