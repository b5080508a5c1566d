"What the page on classification need not carry: more sizes, more degenerate inputs, real encoders, files."
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from cmcgns.data.studies import Split, Study, label_array, split_studies
from cmcgns.evaluation.classification import (SOLVERS, STRENGTHS, accuracy, auroc, bootstrap_difference, bootstrap_interval, compare_encoders, draw_values, draw_weights,
                                              evaluate_fractions, extract_features, fit_adamw, fit_probe, fit_probes, fit_together, hold_still, mean_auroc, score_key)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, roc_auc_score


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0., 1., np.nan]), st.integers(-3, 3), st.integers(0, 3)), min_size=1, max_size=40))
def test_auroc_is_the_share_of_ordered_pairs(rows):
    y, s, w = (np.array(c, float) for c in zip(*rows))
    pairs = [(s[i] > s[j], s[i] == s[j], w[i] * w[j]) for i in np.flatnonzero(y == 1) for j in np.flatnonzero(y == 0)]
    total = sum(p[2] for p in pairs)
    got = auroc(y, s, w)
    assert np.isnan(got) if total == 0 else np.isclose(got, sum((a + b / 2) * c for a, b, c in pairs) / total)


@pytest.mark.parametrize("n", [2, 3, 10, 1000, 20_000])
def test_metrics_against_scikit_learn(n):
    rng = np.random.default_rng(n)
    y, s, w = np.r_[0, 1, rng.integers(0, 2, n - 2)], rng.normal(size=n).astype(np.float32).round(2), rng.random((3, n))
    assert np.allclose(auroc(y, s, w), [roc_auc_score(y, s, sample_weight=v) for v in w], atol=1e-12)
    kind, logits = rng.integers(0, 4, n), rng.normal(size=(n, 4))
    assert np.allclose(accuracy(np.eye(4)[kind], logits, w), [accuracy_score(kind, logits.argmax(1), sample_weight=v) for v in w], atol=1e-12)


def test_auroc_forgets_scale_and_knows_its_mirror():
    rng = np.random.default_rng(0)
    y, s = rng.integers(0, 2, 300), rng.normal(size=300)
    assert auroc(y, s) == auroc(y, np.exp(3 * s)) and np.isclose(auroc(y, s) + auroc(y, -s), 1)
    assert auroc(y, np.zeros(300)) == .5 and auroc(y, np.where(y, np.inf, -np.inf)) == 1


def test_mean_auroc_leaves_out_undefined_findings_draw_by_draw():
    rng = np.random.default_rng(0)
    y = np.c_[rng.integers(0, 2, 12), np.eye(12)[0], np.full(12, np.nan)]
    s, weights = rng.normal(size=(12, 3)), draw_weights(12, 200, rng)
    got = mean_auroc(y, s, weights)
    for w, value in zip(weights, got):
        rows = np.repeat(np.arange(12), w)
        each = [roc_auc_score(y[rows, j], s[rows, j]) for j in range(2) if len(set(y[rows, j])) == 2]
        assert np.isclose(value, np.mean(each)) if each else np.isnan(value)
    assert any((weights[:, 0] == 0) & ~np.isnan(got))


def test_draws_are_of_groups_and_of_the_right_number():
    groups = np.array(["b", "a", "b", "c", "a"])
    w = draw_weights(groups, 500, np.random.default_rng(0))
    assert (w[:, 0] == w[:, 2]).all() and (w[:, 1] == w[:, 4]).all() and (w[:, [0, 1, 3]].sum(1) == 3).all()


def test_portions_do_not_change_a_bootstrap():
    value = lambda w: (w * np.arange(7)).sum(1)
    assert np.array_equal(draw_values(value, 7, 100, 0), draw_values(value, 7, 100, 0, room=21))


def test_intervals_of_degenerate_inputs():
    assert np.isnan(bootstrap_interval(auroc, [], [])).all()
    assert np.isnan(bootstrap_interval(auroc, [np.nan, 1], [0., 1.])).all()
    assert bootstrap_interval(auroc, [0, 1], [0., 1.]) == (1, 1)
    rare = np.r_[1, np.zeros(99)] # the only positive is missing from a third of the draws
    low, high = bootstrap_interval(auroc, rare, np.r_[.5, np.linspace(0, 1, 99)])
    assert 0 < low < .5 < high < 1
    assert bootstrap_interval(accuracy, np.eye(3)[[0, 1]], np.eye(3)[[0, 1]]) == (1, 1)
    assert bootstrap_interval(auroc, rare, np.arange(100.), seed=1) == bootstrap_interval(auroc, rare, np.arange(100.), seed=1)


def test_difference_is_antisymmetric_and_groups_widen_it():
    rng = np.random.default_rng(0)
    y, a, b = np.repeat(rng.integers(0, 2, 40), 5), rng.normal(size=200), np.repeat(rng.normal(size=40), 5)
    d, low, high = bootstrap_difference(auroc, y, [a], [b])
    e, low2, high2 = bootstrap_difference(auroc, y, [b], [a])
    assert np.isclose(d, -e) and np.isclose(low, -high2) and np.isclose(high, -low2)
    _, low3, high3 = bootstrap_difference(auroc, y, [a], [b], groups=np.repeat(np.arange(40), 5))
    assert high3 - low3 > 1.3 * (high - low)
    with pytest.raises(ValueError, match="3 groups for 200 studies"):
        bootstrap_difference(auroc, y, [a], [b], groups=[0, 1, 2])


class Odd(nn.Module):
    "A model whose encoder is in another mode than itself."
    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(64), nn.Dropout(.5)
        self.norm.eval()

    def encode(self, x): return self.drop(self.norm(x.flatten(1)))


def test_hold_still_gives_every_part_its_own_mode_back_even_after_an_error():
    model = Odd()
    with pytest.raises(RuntimeError, match="stop"), hold_still(model):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        raise RuntimeError("stop")
    assert model.training and model.drop.training and not model.norm.training and torch.is_grad_enabled()


def test_features_do_not_depend_on_the_batch_nor_change_the_encoder():
    torch.manual_seed(0)
    model, images = Odd().train(), np.random.default_rng(0).integers(0, 256, (9, 8, 8), np.uint8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    f = extract_features(model.encode, images, 8)
    assert np.array_equal(f, np.concatenate([extract_features(model.encode, images[[i]], 8) for i in range(9)]))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and model.norm.training
    with pytest.raises(ValueError, match="no images"):
        extract_features(model.encode, images[:0], 8)
    with pytest.raises(ValueError, match="a crop of 9 does not fit"):
        extract_features(model.encode, images, 9)


def test_real_encoder_in_training_mode_stays_as_it_is(tmp_path):
    from cmcgns.encoders import ImageEncoder, image_config
    torch.manual_seed(0)
    encoder = ImageEncoder(image_config("resnet-tiny", 64), 64).train()
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    images = np.memmap(tmp_path / "images.u8", np.uint8, "w+", shape=(5, 72, 72))
    images[:] = np.random.default_rng(0).integers(0, 256, images.shape)
    images.flush()
    f = extract_features(lambda x: encoder(x).pooled, np.memmap(tmp_path / "images.u8", np.uint8, "r", shape=(5, 72, 72)), 64, module=encoder)
    assert f.shape == (5, encoder.width) and all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    with pytest.raises(ValueError, match="encode gave ImageFeatures for 5 images"):
        extract_features(encoder, images, 64)


def make_up(n, c, k=1, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, c))
    return x, (x[:, :k] + .5 * rng.normal(size=(n, k)) > 0).astype(float)


@pytest.mark.parametrize("solver", ["solved", "adamw"])
@pytest.mark.parametrize("n, c", [(2, 5), (6, 512), (50, 1), (50, 50), (51, 50)])
def test_probe_of_any_shape_is_finite_and_repeats_itself(solver, n, c):
    x, y = make_up(n + 30, c)
    y[:2] = [[0], [1]]
    fit = lambda: fit_probe(x[:n], y[:n], x[n:], y[n:], solver, seed=1)
    probe = fit()
    assert probe.weight.shape == (c, 1) and np.isfinite(probe.scores(x)).all() and np.array_equal(probe.weight, fit().weight)


@pytest.mark.parametrize("exclusive", [False, True])
def test_solved_layer_is_the_average_over_strengths(exclusive):
    "Each strength weighs what it says of the validation labels; three classes weigh together."
    rng = np.random.default_rng(4)
    x, k = rng.normal(size=(160, 6)), 3 if exclusive else 1
    kind = (x[:, :3] + rng.normal(size=(160, 3))).argmax(1) if exclusive else (x[:, 0] + rng.normal(size=160) > 0).astype(int)
    y = np.eye(3)[kind] if exclusive else kind[:, None].astype(float)
    mean, scale = x[:80].mean(0), x[:80].std(0)
    z, layers, likely = (x - mean) / scale, [], []
    for s in STRENGTHS:
        fit = LogisticRegression(C=1 / (s * 80), tol=1e-8, max_iter=10_000).fit(z[:80], kind[:80])
        likely.append(np.exp(np.log(fit.predict_proba(z[80:100])[np.arange(20), kind[80:100]]).sum()))
        layers.append(fit.decision_function(z).reshape(160, k))
    probe, share = fit_probe(x[:80], y[:80], x[80:100], y[80:100], exclusive=exclusive), np.array(likely) / sum(likely)
    assert share.max() < .9 and np.abs(np.tensordot(share, layers, 1) - probe.scores(x)).max() < 1e-2
    many = fit_probe(x[:80], y[:80], np.tile(x[80:100], (2000, 1)), np.tile(y[80:100], (2000, 1)), exclusive=exclusive)
    assert np.abs(layers[int(np.argmax(likely))] - many.scores(x)).max() < 1e-2 # with many labels it is the likeliest alone


def test_each_finding_is_a_problem_of_its_own():
    x, y = make_up(300, 20, 3)
    y[::3, 1] = np.nan
    together = fit_probe(x[:200], y[:200], x[200:], y[200:])
    for j in range(3):
        alone = fit_probe(x[:200], y[:200, [j]], x[200:], y[200:, [j]])
        assert np.allclose(alone.weight, together.weight[:, [j]]) and alone.chosen == together.chosen[j:j + 1]


def test_constant_and_copied_features_do_no_harm():
    x, y = make_up(200, 10)
    plain = fit_probe(x[:100], y[:100], x[100:], y[100:])
    odd = np.c_[x, np.full(200, 7.), np.full(200, 1e6), np.zeros(200)]
    odd[100:, -1] = 5 # constant in training, not in validation
    probe = fit_probe(odd[:100], y[:100], odd[100:], y[100:])
    assert np.allclose(probe.weight[:10], plain.weight, atol=1e-3) and (probe.weight[10:] == 0).all()


def test_scale_of_features_does_not_matter_to_the_solution():
    x, y = make_up(200, 10)
    a = fit_probe(x[:100], y[:100], x[100:], y[100:]).scores(x)
    x2 = x * np.logspace(-3, 3, 10) + 100
    assert np.allclose(a, fit_probe(x2[:100], y[:100], x2[100:], y[100:]).scores(x2), atol=1e-2)


def test_labels_that_cannot_be_learned_are_named():
    x, y = make_up(40, 4, 2)
    bad = y.copy()
    bad[:20, 1] = 0
    with pytest.raises(ValueError, match=r"labels of column 1 are \[0.0\] in 20 studies"):
        fit_probe(x[:20], bad[:20], x[20:], y[20:])
    bad[:20, 1] = np.nan
    with pytest.raises(ValueError, match=r"labels of column 1 are \[\] in 20 studies"):
        fit_probe(x[:20], bad[:20], x[20:], y[20:])
    bad = y.copy()
    bad[20:, 0] = np.nan
    with pytest.raises(ValueError, match="no validation label of column 0 is known in 20 studies"):
        fit_probe(x[:20], y[:20], x[20:], bad[20:])
    with pytest.raises(ValueError, match="2 classes that exclude each other"):
        fit_probe(x, y, x, y, exclusive=True)
    with pytest.raises(ValueError, match="features are not all finite"):
        fit_probe(x * np.inf, y, x, y)
    one_class = y[20:].copy()
    one_class[:, 0] = 1 # a validation part without negatives is still something to choose by
    assert np.isfinite(fit_probe(x[:20], y[:20], x[20:], one_class).weight).all()


def make_world(n=240, k=2, patients=3, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.random((n, k)) < .4
    studies = [Study(f"s{i:03}", Path(f"{i}.png"), f"p{i // patients}", labels={f"f{j}": float(v) for j, v in enumerate(t)}) for i, t in enumerate(truth)]
    return studies, (rng.normal(size=(n, 16)) + 2 * truth @ rng.normal(size=(k, 16))).astype(np.float32)


def test_rows_and_scores_survive_a_file(tmp_path):
    studies, x = make_world()
    split, names = split_studies(studies, stratify="f0"), ["f0", "f1"]
    rows, kept = evaluate_fractions(x, label_array(studies, names), studies, split, names, fractions=(.1, 1.), seeds=(0, 1))
    np.savez(tmp_path / "scores.npz", **kept)
    with np.load(tmp_path / "scores.npz") as file:
        assert compare_encoders(file, kept, .1, seeds=(0, 1)) == dict(fraction=.1, difference=0., low=0., high=0.)
        assert np.array_equal(file[score_key(1., 1)], kept[score_key(1., 0)])
    assert {"fraction", "seed", "n_train", "n_test", "metric", "value", "low", "high", "split", "draw"} <= set(rows[0])
    assert all(r["low"] <= r["value"] <= r["high"] for r in rows) and set(rows[0]["findings"]) == {"f0", "f1"}


def test_order_of_studies_does_not_matter():
    studies, x = make_world()
    split, y, mixed = split_studies(studies), label_array(studies, ["f0", "f1"]), np.random.default_rng(0).permutation(len(studies))
    a, _ = evaluate_fractions(x, y, studies, split, ["f0", "f1"], (.1,), (0,))
    b, _ = evaluate_fractions(x[mixed], y[mixed], [studies[i] for i in mixed], split, ["f0", "f1"], (.1,), (0,))
    assert a[0]["draw"] == b[0]["draw"] and np.isclose(a[0]["value"], b[0]["value"], atol=1e-3)


def test_classes_that_exclude_each_other_go_through_all_of_it():
    rng = np.random.default_rng(0)
    kind = rng.integers(0, 3, 300)
    studies = [Study(f"s{i}", Path("x"), f"p{i}", labels=dict(zip("abc", np.eye(3)[c].tolist()))) for i, c in enumerate(kind)]
    x = rng.normal(size=(300, 8)) + 3 * np.eye(3, 8)[kind]
    rows, _ = evaluate_fractions(x, label_array(studies, "abc"), studies, split_studies(studies), list("abc"), (.1, 1.), (0,), exclusive=True)
    assert [r["metric"] for r in rows] == ["accuracy"] * 2 and rows[1]["value"] > .8


def test_a_patient_in_two_parts_is_refused_unless_asked_for():
    studies, x = make_world(patients=3)
    ids = [s.id for s in studies]
    parts = dict(train=tuple(ids[:100]), validation=tuple(ids[100:150]), test=tuple(ids[150:]))
    y = label_array(studies, ["f0"])
    with pytest.raises(ValueError, match="patients are in more than one part"):
        evaluate_fractions(x, y, studies, Split(parts), ["f0"])
    assert evaluate_fractions(x, y, studies, Split(parts, by="image"), ["f0"], (1.,), (0,))[0][0]["n_test"] == 90
    with pytest.raises(ValueError, match="240 features, 240 labels and 239 studies"):
        evaluate_fractions(x, y, studies[:-1], Split(parts, by="image"), ["f0"])


def test_a_test_part_with_one_class_gives_no_number_and_no_crash():
    studies, x = make_world()
    split, y = split_studies(studies), label_array(studies, ["f0"])
    y[[i for i, s in enumerate(studies) if s.id in set(split.parts["test"])]] = 1
    rows, _ = evaluate_fractions(x, y, studies, split, ["f0"], (1.,), (0,))
    assert np.isnan([rows[0]["value"], rows[0]["low"], rows[0]["high"]]).all() and rows[0]["n_test"] > 0


def test_one_class_in_training_says_so():
    studies, x = make_world()
    studies = [Study(s.id, s.image, s.patient, labels=dict(f0=0.)) for s in studies]
    with pytest.raises(ValueError, match="has f0 = 1: nothing can be learned about it"):
        evaluate_fractions(x, label_array(studies, ["f0"]), studies, split_studies(studies), ["f0"])


@pytest.mark.parametrize("solver", ["solved", "adamw"])
def test_no_global_seed_is_touched(solver):
    x, y = make_up(40, 3)
    states = lambda: (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    before = states()
    fit_probe(x, y, x, y, solver)
    bootstrap_interval(auroc, y[:, 0], x[:, 1])
    assert states() == before


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize("n,c,k", [(120, 6, 3), (61, 30, 4)])
def test_layers_trained_together_are_those_trained_alone(n, c, k, exclusive):
    "Unknown labels, draws of one study up to all, equal draws with other seeds; each stops by itself."
    rng = np.random.default_rng(n)
    x = rng.normal(size=(n, c)) + 1
    y = np.eye(k)[(x[:, :k] + rng.normal(size=(n, k))).argmax(1)]
    y[rng.random(n) < .1] = np.nan
    if not exclusive: y[rng.random((n, k)) < .1] = np.nan
    val = np.arange(n - 20, n)
    draws, seeds = [rng.permutation(n - 20)[:m] for m in (1, 7, 16, 17, n - 20, n - 20)], [0, 1, 2, 3, 4, 5]
    how = dict(lr=.03, batch_size=16, epochs=25, patience=2)
    together = fit_together(x, y, draws, seeds, x[val], y[val], exclusive, **how)
    alone = [fit_adamw(x[d], y[d], x[val], y[val], exclusive, s, **how) for d, s in zip(draws, seeds, strict=True)]
    assert [p.chosen for p in together] == [p.chosen for p in alone] and len({p.chosen for p in alone}) > 1
    for p, q in zip(together, alone, strict=True): np.testing.assert_allclose(p.scores(x), q.scores(x), atol=1e-4)


def test_probes_of_many_draws_are_those_of_each():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(90, 5)).astype(np.float32)
    y = (x[:, :2] + rng.logistic(size=(90, 2)) > 0).astype(float)
    draws, val = [np.arange(40), np.arange(20, 70)], np.arange(70, 90)
    for solver in SOLVERS:
        for seed, d, probe in zip((3, 4), draws, fit_probes(x, y, draws, (3, 4), val, solver), strict=True):
            one = fit_probe(x[d], y[d], x[val], y[val], solver, seed=seed)
            assert probe.chosen == one.chosen and np.abs(probe.weight - one.weight).max() < 1e-5
    broken = np.where(np.arange(90)[:, None] == 80, np.nan, x)
    for solver in SOLVERS:
        with pytest.raises(ValueError, match="not all finite"): fit_probes(broken, y, draws, (3, 4), val, solver)
        with pytest.raises(ValueError, match="needs both 0 and 1"): fit_probes(x, np.ones_like(y), draws, (3, 4), val, solver)
    with pytest.raises(ValueError, match="unknown solver 'sgd'"): fit_probes(x, y, draws, (3, 4), val, 'sgd')
