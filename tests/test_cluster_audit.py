"The cluster audit against slow references, against training itself, and on the real reports."
import copy
import json
import math
from functools import partial
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from cmcgns.clustering import NegativeSampler, ReportContrast
from cmcgns.data.covid_cxr import scan_covid_cxr
from cmcgns.data.openi import read_reports
from cmcgns.data.report_statistics import count_repeats
from cmcgns.data.studies import Meaning, Study
from cmcgns.data.synthetic import make_study
from cmcgns.evaluation.cluster_audit import (METRICS, RELATIONS, ROW, EpochAudit, Known, Named, Sentences, Tally, agreement, alike, audit_batches,
                                             audit_table, audit_training, classes_of, collect_sentences, compare_clusterings, count_agreement, count_cosines,
                                             count_false, count_hard, count_named, draw_batches, evaluate_clusters, know_sentences, majorities,
                                             name_batches, push_shares, relate, relate_to, rows_of, saved_weights, series, summarise_ratio, tally_names)
from cmcgns.image import build_cache
from cmcgns.model import Method, build_model, load_model
from cmcgns.pretraining import Bar, Corpus, KeepWhole, Pairs, PairTrainer, arguments, collate, make_settings, pretrain, train_stage
from cmcgns.text import encode_reports, load_tokenizer, report_sentences, train_tokenizer
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score
from sklearn.metrics.cluster import contingency_matrix
from test_clustering import SlowSampler
from transformers import PrinterCallback, ProgressCallback

FINDINGS = "effusion", "nodule", "effusion+nodule", "lungs"


def slow_same(a, b):
    return a[:2] == b[:2] and all(not p or not q or p == q for p, q in zip(a[2:], b[2:]))


def slow_relation(a, b):
    shared = set(a.finding.split("+")) & set(b.finding.split("+"))
    if slow_same(a, b): return "same"
    if a[:2] == b[:2]: return "elsewhere"
    if shared and a.polarity == b.polarity: return "overlapping"
    if shared and {a.polarity, b.polarity} == {0, 1}: return "negated"
    return "other"


def draw_known(rng, n, kind):
    "Sentences, studies and what is known: random, all equal, all different, or without meanings."
    if kind == "different": meanings = [Meaning(f"f{i}", 0) for i in range(n)]
    elif kind == "equal": meanings = [Meaning("effusion", 1)] * n
    else: meanings = [Meaning(str(rng.choice(FINDINGS)), int(rng.integers(-1, 2)), str(rng.choice(["", "left", "right"])), str(rng.choice(["", "upper"]))) for _ in range(n)]
    report = np.sort(rng.integers(0, max(1, n // 3), n))
    report = np.unique(report, return_inverse=True)[1]
    words = [f"{m.finding} {'xyz'[m.polarity]} {rng.integers(0, 3) if kind != 'different' else i}" for i, m in enumerate(meanings)]
    studies, place = [], np.zeros(n, int)
    for r in range(report.max() + 1):
        mine = np.flatnonzero(report == r)
        place[mine] = range(len(mine))
        studies.append(Study(f"s{r}", Path(), f"p{r // 2}", tuple(words[i] for i in mine), meanings=() if kind == "unknown" else tuple(meanings[i] for i in mine), dataset="toy"))
    truth = dict(words=lambda i, j: words[i] == words[j], report=lambda i, j: report[i] == report[j])
    if kind != "unknown": truth["meaning"] = lambda i, j: slow_same(meanings[i], meanings[j])
    return know_sentences(studies, report, place), truth, meanings, words


KINDS = "random", "equal", "different", "unknown"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(8))
def test_pairs_by_brute_force(kind, seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 25))
    known, truth, meanings, words = draw_known(rng, n, kind)
    own = [np.zeros(n, int), np.arange(n), rng.integers(0, 4, n)][seed % 3]
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
    named = [p for p in pairs if own[p[0]] == own[p[1]]]
    assert set(truth) == set(known.truths)
    false, found = count_false(known), count_named(own, known)
    for name, holds in truth.items():
        true = [p for p in pairs if holds(*p)]
        hits = [p for p in named if holds(*p)]
        assert alike(known, name).tolist() == [[i != j and bool(holds(i, j)) for j in range(n)] for i in range(n)]
        assert found["precision", name][:2] == (len(hits), len(named)) and found["recall", name][:2] == (len(hits), len(true))
        assert found["recall", name].chance == pytest.approx(len(named) * len(true) / len(pairs))
        if name != "report": assert false["false_share", name][:2] == (len(true), len(pairs)) and false["with_false", name][:2] == (len({i for i, _ in true}), n)
    assert len(set(classes_of(known, "words"))) == len(set(words))
    if kind != "unknown": assert len(set(classes_of(known, "meaning"))) == len({m[:2] for m in meanings})


def test_chance_is_the_mean_over_all_ways_to_deal_out_sentences():
    for seed in range(4):
        known = draw_known(np.random.default_rng(seed), 6, "random")[0]
        own = np.array([0, 0, 0, 1, 1, 2])
        dealt = [count_named(np.array(p), known) for p in permutations(own)]
        for key, tally in dealt[0].items():
            assert tally.chance == pytest.approx(np.mean([d[key].of for d in dealt]), abs=1e-9)
        level = np.mean([agreement(np.array(p), classes_of(known, "meaning"))["nmi"] for p in permutations(own)])
        assert count_agreement(own, known, np.random.default_rng(0), 3000)["nmi", "meaning"].chance == pytest.approx(level, abs=.01)


def test_agreement_against_scikit_learn():
    rng, worst = np.random.default_rng(0), 0.
    ends = [(np.zeros(9, int), np.zeros(9, int)), (np.zeros(9, int), np.arange(9)), (np.arange(9), np.arange(9)[::-1]), (np.zeros(1, int), np.zeros(1, int)), (np.arange(2), np.zeros(2, int))]
    drawn = [tuple(rng.integers(0, rng.integers(1, 30), n) for _ in range(2)) for n in rng.integers(1, 400, 300)]
    for a, b in ends + drawn:
        got = agreement(a, b)
        want = dict(nmi=normalized_mutual_info_score(a, b), ari=adjusted_rand_score(a, b), purity=contingency_matrix(a, b).max(1).sum() / len(a))
        worst = max(worst, *(abs(got[k] - v) for k, v in want.items()))
    print(f"largest difference of purity, NMI, adjusted Rand: {worst:.1e}")
    assert worst < 1e-9


def test_relations_by_hand_and_by_brute_force():
    rng = np.random.default_rng(0)
    said = tuple({Meaning(str(rng.choice(FINDINGS)), int(rng.integers(-1, 2)), str(rng.choice(["", "left", "right"])), str(rng.choice(["", "upper", "lower"]))) for _ in range(150)})
    codes = relate(said)
    assert [[RELATIONS[c] for c in row] for row in codes] == [[slow_relation(a, b) for b in said] for a in said]
    assert set(codes.ravel()) == set(range(5)) and (codes == codes.T).all() # all kinds occur; 'empty' is for clusters


@pytest.mark.parametrize("kind", KINDS)
def test_majorities_by_counting(kind):
    rng = np.random.default_rng(1)
    known, _, meanings, words = draw_known(rng, 60, kind)
    members = rng.integers(0, 5, 60)
    members[members == 3] = 2
    found, share = majorities(members, known, 6)
    assert (found[[3, 5]] == -1).all() and (share[[3, 5]] == 0).all()
    for j in (0, 1, 2, 4):
        mine = np.flatnonzero(members == j)
        if kind == "unknown":
            times = {w: sum(words[i] == w for i in mine) for w in words}
            assert times[words[int(np.flatnonzero(known.words == found[j])[0])]] == max(times.values()) and share[j] == pytest.approx(max(times.values()) / len(mine))
            continue
        says = [meanings[i] for i in mine]
        classes = {c: sum(m[:2] == c for m in says) for c in {m[:2] for m in says}}
        top = known.said[found[j]]
        assert classes[top[:2]] == max(classes.values()) and share[j] == pytest.approx(max(classes.values()) / len(mine))
        assert says.count(top) == max(says.count(m) for m in says if m[:2] == top[:2])
    codes = relate_to(known, found)
    assert (codes[:, [3, 5]] == 5).all() and codes.shape == (60, 6)


def slow_hard(own, second, similar, meanings, words, texts, majority, share, plain, told, clustered):
    "Sentence by sentence, in plain Python."
    cos = lambda a, b: sum(p * q for p, q in zip(a, b)) / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))
    n, k = len(own), len(majority)
    alike = lambda i, j: slow_same(meanings[i], meanings[j]) if meanings else words[i] == words[j]
    out = {name: [0., 0., 0.] for name in METRICS if name.startswith("hard_") or name in ("centroid_similarity", "positive_similarity")}
    relation = lambda i, c: "empty" if majority[c] is None else slow_relation(meanings[i], majority[c]) if meanings else "same" if words[i] == majority[c] else "other"
    add = lambda name, *v: out.__setitem__(name, [p + q for p, q in zip(out[name], v)])
    for i in range(n):
        h, negatives, rest = similar[i][second[i]], [j for j in range(n) if j != i and not alike(i, j)], [c for c in range(k) if c != own[i]]
        if negatives:
            add("hard_similarity", h, 1, sum(cos(plain[i], clustered[j]) for j in negatives) / len(negatives))
            columns = [cos(plain[i], told[j]) for j in negatives]
            add("hard_rank", sum((c < h) + .5 * (c == h) for c in columns) / len(columns), 1, .5)
        add("centroid_similarity", sum(similar[i][c] for c in rest) / len(rest), 1, math.nan)
        add("positive_similarity", cos(plain[i], told[i]), 1, math.nan)
        add("hard_columns_same", sum(relation(i, second[j]) == "same" for j in range(n)), n, n * sum(relation(i, c) == "same" for c in range(k)) / k)
        if majority[second[i]] is not None:
            full = [share[c] for c in rest if majority[c] is not None]
            add("hard_majority", share[second[i]], 1, sum(full) / len(full))
        for r in RELATIONS: add(f"hard_{r}", relation(i, second[i]) == r, 1, sum(relation(i, c) == r for c in rest) / len(rest))
    return out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
def test_hard_negatives_by_brute_force(kind, seed):
    rng = np.random.default_rng(seed)
    n, k, d = int(rng.integers(3, 20)), int(rng.integers(2, 7)), 5
    known, _, meanings, words = draw_known(rng, n, kind)
    plain, told, centroids = (torch.from_numpy(rng.normal(size=(m, d))) for m in (n, n, k))
    clustered = told if seed % 2 else plain
    similar = (torch.nn.functional.normalize(plain) @ torch.nn.functional.normalize(centroids).T).numpy()
    own, second = np.argsort(-similar, 1)[:, :2].T
    members = rng.integers(0, max(1, k - 1), n) # the last cluster is empty
    majority, share = majorities(members, known, k)
    got = count_hard(Named(own, members, second, similar), known, relate_to(known, majority), share, plain, told, clustered)
    text = {int(c): w for c, w in zip(known.words, words)}
    says = [None if m == -1 else text[int(m)] if kind == "unknown" else known.said[m] for m in majority]
    want = slow_hard(own, second, similar.tolist(), None if kind == "unknown" else meanings, words, None, says, share.tolist(), plain.tolist(), told.tolist(), clustered.tolist())
    assert set(m for m, _ in got) <= set(want)
    if kind != "unknown": assert len(got) == len(want)
    for (metric, truth), tally in got.items():
        assert truth == ("words" if kind == "unknown" else "meaning")
        assert np.allclose(tally, want[metric], atol=1e-9, equal_nan=True), (metric, tally, want[metric])
    assert set(got) - set(count_hard(Named(own, members, second, similar), known, relate_to(known, majority), share, plain, None, clustered)) == {("hard_rank", truth), ("positive_similarity", truth)}
    if kind == "equal": assert got["hard_rank", "meaning"].among == 0 and summarise_ratio([got["hard_rank", "meaning"]])["value"] is None


@pytest.mark.parametrize("weighting, hard", [("additive", True), ("additive", False), ("spared", True), ("multiplicative", True)])
@pytest.mark.parametrize("seed", range(3))
def test_what_pushes_a_sentence_away_by_brute_force(weighting, hard, seed):
    rng = np.random.default_rng(seed)
    n, k, tau, mu = int(rng.integers(2, 12)), int(rng.integers(2, 6)), .3, 2.5
    contrast = ReportContrast(NegativeSampler(4, clusters=k), hard=hard, weighting=weighting, weight=mu, temperature=tau)
    similar, near = (rng.uniform(-1, 1, shape) for shape in ((n, n), (n, k)))
    own, second = np.argsort(-near, 1)[:, :2].T
    got = push_shares(contrast, *map(torch.tensor, (similar, near, own, second)))
    for i in range(n):
        columns = [("told", j, math.exp(similar[i, j] / tau), 1.) for j in range(n)] # what it is, its weight in the softmax, what its cosine is multiplied by
        for j in range(n):
            if hard and (weighting == "additive" or weighting == "spared" and second[j] != own[i]): columns.append(("centroid", second[j], math.exp(near[i, second[j]] / tau) * (mu if j == i else 1), 1.))
            if hard and weighting == "multiplicative": columns.append(("centroid", second[i], math.exp(mu * near[i, second[i]] / tau) if j == i else 1., mu if j == i else 0.))
        push = [(what, j, e * by) for what, j, e, by in columns if (what, j) != ("told", i)]
        everything = sum(p for *_, p in push)
        assert got["hard"][i] * everything == pytest.approx(sum(p for what, j, p in push if what == "centroid" and j == second[i]))
        assert got["own"][i] * everything == pytest.approx(sum(p for what, j, p in push if what == "centroid" and j == own[i]))
        assert got["false"][i] * everything == pytest.approx(sum(p for what, j, p in push if what == "told" and own[j] == own[i]))


@pytest.mark.parametrize("kind", KINDS)
def test_cosines_by_brute_force(kind):
    rng = np.random.default_rng(3)
    known, truth, _, _ = draw_known(rng, 15, kind)
    x = torch.from_numpy(rng.normal(size=(15, 4)))
    u = (x / x.norm(dim=1, keepdim=True)).numpy()
    name, cos = known.truths[0], lambda p: [float(u[i] @ u[j]) for i, j in p]
    pairs = [(i, j) for i in range(15) for j in range(15) if i != j]
    one, report = truth[name], truth["report"]
    kinds = {name: [p for p in pairs if one(*p) and not report(*p)], "report": [p for p in pairs if report(*p) and not one(*p)]}
    neither = cos([p for p in pairs if not one(*p) and not report(*p)])
    got = count_cosines(x, known, "plain")
    for what, some in kinds.items():
        assert np.allclose(got["plain_cosine", what][:2], (sum(cos(some)), len(some)))
        assert np.allclose(got["plain_cosine", what].chance, len(some) * (np.mean(neither) if neither else np.nan), equal_nan=True)
    assert got["plain_cosine", "all"].of == pytest.approx((u @ u.T).mean())


def test_interval_by_repeating_batches_and_its_cover():
    rng = np.random.default_rng(0)
    t = np.c_[rng.integers(0, 10, 12), rng.integers(10, 20, 12), np.ones(12)].astype(float)
    t[3] = np.nan # a batch that was not counted
    found = summarise_ratio(t, 4000, seed=1)
    left = t[~np.isnan(t[:, 0])]
    draws = [left[rng.integers(0, 11, 11)].sum(0) for _ in range(4000)]
    slow = np.quantile([d[0] / d[1] for d in draws], [.025, .975])
    assert found["value"] == pytest.approx(left[:, 0].sum() / left[:, 1].sum()) and found["n_batches"] == 11
    assert np.allclose([found["low"], found["high"]], slow, atol=.02)
    assert found["gain"] == pytest.approx((left[:, 0] - 1).sum() / left[:, 1].sum()) and found["gain_low"] < found["gain"] < found["gain_high"]
    hits = 0
    for _ in range(300): # a share of pairs in batches of 20 sentences with 6 meanings; each pair depends on two sentences
        batches = [np.bincount(rng.integers(0, 6, 20), minlength=6) for _ in range(20)]
        t = [((c * (c - 1)).sum(), 20 * 19, 0) for c in batches]
        found = summarise_ratio(t, 300)
        hits += found["low"] <= 1 / 6 <= found["high"]
    print(f"cover of the 95 % interval with 20 batches: {hits / 300:.3f}")
    assert .88 <= hits / 300 <= .98


def test_nothing_counted_has_no_number():
    assert audit_batches([{}, {}]) == ([], {})
    found = summarise_ratio(np.full((3, 3), np.nan))
    assert found["value"] is None and found["low"] is None and found["n_batches"] == 0
    rows, _ = audit_batches([{("precision", "meaning"): Tally(1, 2, 1)}, {}])
    assert rows[0]["value"] == .5 and rows[0]["low"] is None and rows[0]["n_batches"] == 1


@pytest.mark.parametrize("own,precision,recall", [("one", "share", 1), ("each", None, 0), ("truth", 1, 1)])
def test_clusterings_whose_numbers_are_known(own, precision, recall):
    rng = np.random.default_rng(0)
    meanings = [Meaning(f"f{k}", 1) for k in rng.integers(0, 4, 30)]
    known = Known(np.repeat(range(10), 3), np.arange(30), *np.unique([m.finding for m in meanings], return_inverse=True)[1:], tuple(sorted(set(meanings))))
    s = Sentences(torch.zeros(30, 2), None, known.report, np.tile(range(3), 10))
    labels = dict(one=np.zeros(30, int), each=np.arange(30), truth=known.meaning)[own]
    rows, _ = audit_batches(tally_names(s, known, [np.arange(15), np.arange(15, 30)], [Named(labels[:15]), Named(labels[15:])]), 50)
    at = {(r["metric"], r["truth"]): r for r in rows}
    share = sum(count_false(known.at(r))["false_share", "meaning"].of for r in (np.arange(15), np.arange(15, 30))) / (2 * 15 * 14)
    assert at["precision", "meaning"]["value"] == (pytest.approx(share) if precision == "share" else precision)
    assert at["recall", "meaning"]["value"] == recall
    if own == "one": assert at["precision", "meaning"]["gain"] == pytest.approx(0) == at["nmi", "meaning"]["value"]
    if own == "truth": assert at["nmi", "meaning"]["value"] == at["purity", "meaning"]["value"] == at["ari", "meaning"]["value"] == pytest.approx(1)


# ---- against training itself

def corpus(n=40, size=72):
    phantoms = [make_study(0, i, size=size) for i in range(n)]
    return [p.study for p in phantoms], np.stack([p.image for p in phantoms])


@pytest.fixture(scope="module")
def tiny():
    studies, images = corpus()
    settings = make_settings("tiny", batch_size=8, cluster_start=1.1, stage1_epochs=2, stage2_epochs=1)
    tokenizer = train_tokenizer([t for s in studies for t in s.sentences], 300)
    model = build_model("resnet-tiny", "bert-tiny", len(tokenizer), 64, Method(width=32, clusters=8, cluster_start=1.1), seed=0)
    return studies, images, settings, tokenizer, model


def make_trainer(tiny, folder, model, *callbacks):
    studies, images, settings, tokenizer, _ = tiny
    pairs = Pairs(Corpus(images, [s.sentences for s in studies]), tokenizer, settings)
    trainer = PairTrainer(model, arguments(settings, 2, folder, len(pairs) // 8), collate, pairs, pairs, callbacks=[Bar("test"), KeepWhole(), *callbacks])
    for c in PrinterCallback, ProgressCallback: trainer.remove_callback(c)
    return trainer


def test_batches_are_those_of_training(tiny, tmp_path):
    seen = []
    class Watch(Pairs):
        def batch(self, keys):
            if isinstance(keys[0], tuple): seen.append([i for _, i in keys])
            return super().batch(keys)
    studies, images, settings, tokenizer, model = tiny
    pairs = Watch(Corpus(images[:37], [s.sentences for s in studies[:37]]), tokenizer, settings)
    train_stage(copy.deepcopy(model), pairs, pairs, settings, 2, tmp_path, "test")
    assert len(seen) == 8 and seen == [b.tolist() for b in draw_batches(37, 8, 8, settings.seed)] # 4 whole batches an epoch


def test_sentences_are_those_of_the_loss(tiny):
    studies, images, settings, tokenizer, model = tiny
    pairs = Pairs(Corpus(images, [s.sentences for s in studies]), tokenizer, settings)
    tokenize = lambda reports: encode_reports(tokenizer, reports, settings.max_tokens)
    s, batch, seen = collect_sentences(model, tokenize, images, 64, studies), np.array([7, 3, 39, 12]), []
    still = copy.deepcopy(model).eval()
    still.contrast.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad(): still(**pairs.batch(batch.tolist()))
    rows = rows_of(s.report, batch)
    worst = max(float((a - b[rows]).abs().max() / b[rows].abs().max()) for a, b in zip(seen[0], (s.plain, s.told)))
    print(f"largest relative difference to the vectors of the loss: {worst:.1e}")
    assert worst < 1e-4 and s.report[rows].tolist() == [r for r in batch for _ in studies[r].sentences]
    known = know_sentences(studies, s.report, s.place)
    assert [known.said[m] for m in known.meaning[rows]] == [m for r in batch for m in studies[r].meanings]


@pytest.mark.parametrize("settings", [dict(), dict(asks="clustered"), dict(cluster="single-modal"), dict(start_on="pairs")], ids=str)
def test_names_are_those_of_the_loss_step_by_step(settings):
    "A replay goes the same way as the module that trains: same start, same names, same loss, same centroids."
    g = torch.Generator().manual_seed(0)
    plain, told = torch.randn(400, 6, generator=g), torch.randn(400, 6, generator=g) + .3
    batches = list(np.arange(400).reshape(20, 20))
    fresh = lambda: ReportContrast(NegativeSampler(6, clusters=5, start=.15, momentum=.05), **settings)
    contrast, audited = fresh(), fresh()
    named, starts = name_batches(audited, Sentences(plain, told, np.arange(400), np.zeros(400, int)), batches, learn=True), []
    for rows, n in zip(batches, named):
        assert bool(contrast.sampler.started) == (n is not None)
        starts.append(n is None)
        pair = plain[rows], told[rows]
        want = contrast.losses(*pair, *((None, None) if n is None else (torch.from_numpy(n.own), torch.from_numpy(n.second))))["loss"]
        if n is not None: assert n.member.tolist() == contrast.sampler.assign(pair[settings.get("cluster") != "single-modal"]).tolist()
        assert torch.equal(contrast(*pair)["loss"], want)
    assert starts[0] and not starts[-1] and not audited.sampler.started # the one that was given is left alone
    frozen = name_batches(contrast, Sentences(plain, told, np.arange(400), np.zeros(400, int)), batches, learn=False)
    own = contrast.sampler.two_nearest(pair[0] if settings.get("asks") != "clustered" else pair[1])
    assert np.stack([frozen[-1].own, frozen[-1].second], 1).tolist() == own.tolist()


def test_names_by_pencil_and_paper():
    g = np.random.default_rng(4)
    x = g.normal(size=(120, 5))
    slow = SlowSampler(6, .4, 1e-2, "farthest", "sum", 0)
    contrast = ReportContrast(NegativeSampler(5, clusters=6, momentum=1e-2).double(), cluster="single-modal")
    batches = list(np.arange(120).reshape(8, 15))
    named = name_batches(contrast, Sentences(torch.from_numpy(x), None, np.arange(120), np.zeros(120, int)), batches, learn=True)
    for rows, n in zip(batches, named):
        if slow.centroids is None: assert n is None
        else: assert [slow.ranked(p)[:2] for p in x[rows]] == np.stack([n.own, n.second], 1).tolist()
        slow.observe(list(x[rows]))
    assert named[-1] is not None


def test_an_audit_leaves_training_bit_for_bit_alone(tiny, tmp_path):
    studies, images, settings, tokenizer, model = tiny
    tokenize = lambda reports: encode_reports(tokenizer, reports, settings.max_tokens)
    watch = EpochAudit(partial(evaluate_clusters, tokenize=tokenize, images=images, image_size=64, studies=studies, batch_size=8, batches=4, warm_up=2, n_bootstrap=20), before=100)
    states = []
    for name, callbacks in ("alone", ()), ("watched", (watch,)):
        trainer = make_trainer(tiny, tmp_path / name, copy.deepcopy(model), *callbacks) # seeds when it is made
        trainer.train()
        states.append(trainer.model.state_dict())
    a, b = states
    assert all(torch.equal(a[k], b[k]) for k in a) and a["contrast.sampler.started"]
    curve = series(watch.rows, "recall", "meaning", source="trained", asks="sentence")
    assert curve["weights"] == ["stage1 epoch 1", "stage1 epoch 2"] and curve["order"] == [105, 110] and not np.isnan(curve["value"]).any()


@pytest.mark.slow
def test_a_run_is_audited_from_its_start_to_its_end(tiny, tmp_path):
    studies, images, settings, _, _ = tiny
    pairs = Corpus(images, [s.sentences for s in studies])
    pretrain(settings, pairs, pairs, tmp_path / "run")
    tokenizer = load_tokenizer(tmp_path / "run" / "tokenizer")
    weights = saved_weights(tmp_path / "run", settings, len(tokenizer))
    assert [name for name, _ in weights] == ["start", "stage1", "stage2"]
    tokenize = lambda reports: encode_reports(tokenizer, reports, settings.max_tokens)
    audit = partial(evaluate_clusters, tokenize=tokenize, images=images, image_size=64, studies=studies, batch_size=8, batches=5, warm_up=5, n_bootstrap=50)
    rows, kept = audit_training(weights, audit, tmp_path / "audit")
    trained = dict(source="trained", cluster="cross-modal", asks="sentence")
    started = series(rows, "started", "", **trained)
    assert started["value"] == [0, 1, 1] and np.isnan(series(rows, "recall", "meaning", **trained)["value"]).tolist() == [True, False, False]
    assert len(audit_table(rows)) == 3 * (2 + 2 + 2 + 1 + 1) and {r["data"] for r in rows} == {"synthetic"}
    difference = compare_clusterings(kept, "stage2: replayed cross-modal sentence", "stage2: replayed single-modal sentence", "recall meaning")
    assert difference["low"] <= difference["difference"] <= difference["high"]
    (tmp_path / "audit" / "stage2.json").unlink() # killed before the last one was finished
    assert audit_training(weights, audit, tmp_path / "audit")[0] == rows == json.loads(json.dumps(rows))
    # as if stage 2 were under way: a checkpoint that counts, one that does not
    for step, whole in (5, True), (10, False):
        place = tmp_path / "run" / "stage2" / f"checkpoint-{step}"
        load_model(tmp_path / "run" / "stage1" / "model").save_pretrained(place)
        if whole: (place / "complete").touch()
    weights = saved_weights(tmp_path / "run", settings, len(tokenizer))
    assert [name for name, _ in weights] == ["start", "stage1", "stage2 step 5", "stage2"]
    assert all(torch.equal(v, weights[1][1]().state_dict()[k]) for k, v in weights[2][1]().state_dict().items())


def test_what_a_model_cannot_be_asked(tiny):
    studies, images, settings, tokenizer, model = tiny
    tokenize = lambda reports: encode_reports(tokenizer, reports, settings.max_tokens)
    broken = copy.deepcopy(model)
    with torch.no_grad(): broken.report_local.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="the sentences of study 'synthetic-0-000000' are not finite"): collect_sentences(broken, tokenize, images, 64, studies)
    with pytest.raises(ValueError, match="unknown field 'cluster_count'"): evaluate_clusters(model, tokenize, images, 64, studies, 8, changes=dict(cluster_count=3))
    with pytest.raises(ValueError, match="batch_size is 64 and there are 40 studies: give 2 up to that many"): evaluate_clusters(model, tokenize, images, 64, studies)
    silent = [*studies[:3], Study("x", Path(), "p")]
    with pytest.raises(ValueError, match=r"study 'x' has no sentence \(1 such\)"): evaluate_clusters(model, tokenize, images[:4], 64, silent, 2)


def test_a_model_without_clusters_and_one_that_never_starts(tiny):
    studies, images, settings, tokenizer, _ = tiny
    tokenize = lambda reports: encode_reports(tokenizer, reports, settings.max_tokens)
    for changes, status in (dict(cluster="none"), "no clusters"), (dict(cluster_start=-1.), "not started: mean cosine "):
        model = build_model("resnet-tiny", "bert-tiny", len(tokenizer), 64, Method(width=32, clusters=8, **changes))
        rows, kept = evaluate_clusters(model, tokenize, images, 64, studies, 8, batches=3, warm_up=2, clusterings=("trained", "none"), n_bootstrap=20)
        mine = [r for r in rows if r["source"] in ("trained", "replayed")]
        assert mine and {(r["metric"], r["value"]) for r in mine} == {("started", 0.)} and any(r["status"].startswith(status) for r in mine)
        assert any(r["metric"] == "false_share" and r["value"] > 0 for r in rows) and all(set(r) == set(ROW) for r in rows)
        assert all((kept[k] == -1).all() for k in kept if k.endswith((" own", " second", " member")))


def test_words_by_batches_and_by_formula():
    "What is drawn comes near what is exact."
    studies = [make_study(0, i, size=32).study for i in range(150)]
    report, place = np.concatenate([[i] * len(s.sentences) for i, s in enumerate(studies)]), np.concatenate([range(len(s.sentences)) for s in studies])
    known = know_sentences(studies, report, place)
    counts = [count_false(known.at(rows_of(report, b))) for b in draw_batches(150, 16, 900)]
    rows, _ = audit_batches(counts, 200)
    exact, at = count_repeats([s.sentences for s in studies], 16), {(r["metric"], r["truth"]): r for r in rows}
    print({" ".join(k): round(r["value"], 4) for k, r in at.items()}, round(exact.pairs, 4), round(exact.twins, 4))
    assert at["false_share", "words"]["value"] == pytest.approx(exact.pairs, rel=.03) and at["with_false", "words"]["value"] == pytest.approx(exact.twins, rel=.03)
    assert at["false_share", "meaning"]["low"] > 2 * exact.pairs # equal words are a lower bound, and a low one


# ---- real reports

def text_model(reports, method):
    tokenizer = train_tokenizer([s for r in reports for s in r], 2000)
    return build_model("resnet-tiny", "bert-tiny", len(tokenizer), 64, method), lambda some: encode_reports(tokenizer, some, 128)


@pytest.mark.slow
def test_openi_reports_without_images(shared_data):
    reports = [(r.id, report_sentences(r.sections.get("impression", ""), r.sections.get("findings", ""))) for r in read_reports(shared_data / "openi")[0]]
    studies = [Study(i, Path(), i, tuple(s), dataset="openi") for i, s in reports if s]
    assert len(reports) == 3955 and 3800 < len(studies) < 3955
    model, tokenize = text_model([s.sentences for s in studies], Method(width=64, clusters=128))
    audit = partial(evaluate_clusters, model, tokenize, None, 64, studies, batch_size=64, clusterings=("single-modal", "none"))
    rows, _ = audit(batches=2, warm_up=2) # untrained sentences look all alike
    assert {r["value"] for r in rows if r["source"] == "replayed"} == {0.} and any(r["status"].startswith("not started: mean cosine 0.9") for r in rows)
    rows, _ = audit(batches=20, warm_up=39, changes=dict(cluster_start=1.)) # an epoch
    at = {(r["source"], r["metric"], r["truth"]): r for r in rows if r["cluster"] != "none"}
    for r in rows: print({k: r[k] for k in ("source", "cluster", "status", "metric", "truth", "value", "low", "high", "chance", "n", "n_batches")})
    assert all(r["n_studies"] == (len(studies) if r["source"] == "all batches" else 20 * 64) and r["data"] == "openi" for r in rows)
    exact, drawn = at["all batches", "false_share", "words"], at["batches", "false_share", "words"]
    assert exact["value"] == count_repeats([s.sentences for s in studies], 64).pairs and drawn["low"] < exact["value"] < drawn["high"]
    assert at["replayed", "recall", "words"]["gain_low"] > 0 # equal words have nearly equal vectors, whatever the weights
    assert not {("replayed", "hard_negated", "words"), ("replayed", "hard_rank", "words"), ("replayed", "positive_similarity", "words")} & set(at) and not any(r["source"] == "oracle" for r in rows)


@pytest.mark.slow
def test_covid_cxr_with_images(shared_data, tmp_path):
    studies = [s for s in scan_covid_cxr(shared_data / "covid-chestxray-dataset").studies if s.sentences][:160]
    pixels = build_cache([s.image for s in studies], 72, tmp_path, on_error="skip")
    broken = {path for path, _ in pixels.broken}
    studies = [s for s in studies if str(s.image.absolute()) not in broken]
    images = pixels.images[pixels.rows(s.image for s in studies)]
    model, tokenize = text_model([s.sentences for s in studies], Method(width=32, clusters=16))
    rows, _ = evaluate_clusters(model, tokenize, images, 64, studies, batch_size=32, batches=8, warm_up=16, changes=dict(cluster_start=1.), n_bootstrap=200)
    at = {(r["source"], r["cluster"], r["asks"], r["metric"], r["truth"]): r for r in rows}
    for r in rows: print({k: r[k] for k in ("source", "cluster", "asks", "status", "metric", "truth", "value", "low", "high", "chance")})
    assert {r["data"] for r in rows} == {"covid_cxr"} and all(r["n_patients"] <= r["n_studies"] for r in rows)
    # an untrained image tells itself: what is clustered across modalities groups by image, plain sentences do not
    told, plain = (at["replayed", c, a, "nmi", "report"] for c, a in (("cross-modal", "clustered"), ("single-modal", "sentence")))
    assert told["gain_low"] > plain["gain_high"]
