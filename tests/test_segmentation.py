"What the page on segmentation need not carry: second implementations of every Dice and of the loss, published sizes, real lists and real lungs."
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cmcgns.data.covid_cxr import load_covid_cxr
from cmcgns.data.rsna import load_rsna
from cmcgns.data.studies import Box, Split, Study, check_disjoint, read_rows, split_studies
from cmcgns.data.synthetic import synthesize
from cmcgns.encoders import ImageEncoder, image_config
from cmcgns.evaluation.classification import draw_weights, paired_bootstrap, rows_of, score_key
from cmcgns.evaluation.segmentation import (
    DICE, PROTOCOL, PUPDecoder, UNetDecoder, baselines, compare_segmenters, count_packed, count_pixels, describe_dice, dice_all, dice_each, dice_pooled, dice_positives,
    dice_published, dice_table, evaluate_segmentation, focal_loss, has_truth, log_dice, look_for, make_segmenter, pack_masks, predict_masks, read_truth, segmentation_loss, unpack_masks,
)
from cmcgns.evaluation.transfer import FrozenFeatures, TaskData, own_chance, pyramid_widths, train_head
from cmcgns.image import centre_crop, fit_square, read_image
from cmcgns.reporting.results import statistic_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchmetrics.classification import BinaryF1Score
from torchmetrics.functional.segmentation import dice_score

# Dice against other implementations


def make_masks(rng, n, h, w):
    "Random masks; a third of the truth and of the predictions is empty, some are full, some are one pixel."
    masks = rng.random((n, h, w)) < rng.random((n, 1, 1))
    kind = rng.integers(0, 6, n)
    masks[kind < 2] = False
    masks[kind == 2] = True
    masks[kind == 3] = np.arange(h * w).reshape(h, w) == rng.integers(h * w)
    return masks


def slow_dice(predicted, truth):
    "One image, as sets of pixels."
    a, b = ({(y, x) for y in range(m.shape[0]) for x in range(m.shape[1]) if m[y, x]} for m in (predicted, truth))
    return 2 * len(a & b) / (len(a) + len(b)) if a or b else 1.


def slow_averages(predicted, truth, batch_size):
    each = [slow_dice(p, t) for p, t in zip(predicted, truth)]
    batches = [each[i:i + batch_size] for i in range(0, len(each), batch_size)]
    positives = [d for d, t in zip(each, truth) if any(v for row in t for v in row)]
    stack = lambda m: m.reshape(1, -1)
    return dict(published=sum(sum(b) / len(b) for b in batches) / len(batches), all=sum(each) / len(each), positives=sum(positives) / len(positives) if positives else np.nan,
                pooled=slow_dice(stack(predicted), stack(truth)) if predicted.any() or truth.any() else np.nan)


@pytest.mark.parametrize("seed", range(12))
def test_every_dice_against_a_slow_loop(seed):
    rng = np.random.default_rng(seed)
    n, h, w, batch = rng.integers(1, 40), rng.integers(1, 9), rng.integers(1, 9), int(rng.integers(1, 20))
    predicted, truth = make_masks(rng, n, h, w), make_masks(rng, n, h, w)
    counts, want = count_pixels(predicted, truth), slow_averages(predicted, truth, batch)
    got = {k: f(counts) for k, f in DICE.items()} | dict(published=dice_published(counts, batch_size=batch))
    assert np.allclose([got[k] for k in want], [*want.values()], atol=1e-14, equal_nan=True)
    assert {k: v["value"] for k, v in describe_dice(counts, batch_size=batch, n_bootstrap=3).items()} == pytest.approx(got, nan_ok=True)


@pytest.mark.parametrize("seed", range(12))
def test_every_dice_against_torchmetrics(seed):
    "torchmetrics leaves an image undefined where nothing is true and nothing predicted; the convention for it is added here."
    rng = np.random.default_rng(100 + seed)
    n, h, w = rng.integers(2, 50), rng.integers(1, 30), rng.integers(1, 30)
    predicted, truth = make_masks(rng, n, h, w), make_masks(rng, n, h, w)
    a, b, counts = torch.from_numpy(predicted).long(), torch.from_numpy(truth).long(), count_pixels(predicted, truth)
    theirs = partial(dice_score, num_classes=2, include_background=False, average="none", input_format="index")
    each = theirs(a, b)[:, 0].double()
    assert np.allclose(dice_each(counts), each.nan_to_num(1.), atol=1e-6)
    assert np.isclose(dice_all(counts), each.nan_to_num(1.).mean(), atol=1e-6)
    positive = b.flatten(1).any(1)
    assert np.isclose(dice_positives(counts), each[positive].mean(), atol=1e-6, equal_nan=True)
    assert np.isclose(dice_published(counts, batch_size=7), torch.stack([v.nan_to_num(1.).mean() for v in each.split(7)]).mean(), atol=1e-6)
    assert np.isclose(dice_pooled(counts), theirs(a, b, aggregation_level="global").item(), atol=1e-6)
    if (predicted | truth).any():
        assert np.isclose(dice_pooled(counts), BinaryF1Score()(a.flatten(), b.flatten()), atol=1e-6)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30), st.integers(1, 8))
def test_a_draw_is_the_same_as_repeating_images(rows, batch):
    both, false, missed, weights = np.array(rows).T
    counts = np.stack([both, both + false, both + missed], 1)
    again = np.repeat(counts, weights, axis=0)
    for f in dice_all, dice_positives, dice_pooled:
        assert np.isclose(f(counts, weights[None])[0], f(again), equal_nan=True)
    each = dice_each(counts)
    batches = [np.average(each[i:i + batch], weights=weights[i:i + batch]) for i in range(0, len(each), batch) if weights[i:i + batch].any()]
    assert np.isclose(dice_published(counts, weights, batch), np.mean(batches) if batches else np.nan, equal_nan=True)


def test_degenerate_images():
    nothing, everything = np.zeros((5, 4, 4), bool), np.ones((5, 4, 4), bool)
    value = lambda p, t: {k: float(f(count_pixels(p, t))) for k, f in DICE.items()}
    assert value(nothing, nothing) == pytest.approx(dict(published=1, all=1, positives=np.nan, pooled=np.nan), nan_ok=True)
    assert value(everything, nothing) == pytest.approx(dict(published=0, all=0, positives=np.nan, pooled=0), nan_ok=True)
    assert value(nothing, everything) == dict.fromkeys(DICE, 0) and value(everything, everything) == dict.fromkeys(DICE, 1)
    kinds = baselines(np.full(5, 16), 16)
    assert np.array_equal(kinds["empty"], count_pixels(nothing, everything)) and np.array_equal(kinds["full"], count_pixels(everything, everything))


def test_the_published_average_depends_on_the_batch_size_and_the_others_do_not():
    counts = np.array([[0, 0, 0]] * 16 + [[0, 0, 5]])
    assert dice_published(counts) == .5 and dice_all(counts) == 16 / 17 and dice_published(counts, batch_size=1) == dice_all(counts)


def test_intervals_are_of_groups():
    rng = np.random.default_rng(0)
    counts = count_pixels(make_masks(rng, 60, 8, 8), make_masks(rng, 60, 8, 8))
    groups = np.arange(60) // 3
    by_patient, by_image = describe_dice(counts, groups), describe_dice(counts)
    w = draw_weights(groups, 1000, np.random.default_rng(0))
    assert np.allclose([by_patient["all"][k] for k in ("low", "high")], np.quantile([np.average(dice_each(counts), weights=v) for v in w], [.025, .975]))
    assert by_patient["all"]["value"] == by_image["all"]["value"] and by_patient["all"]["low"] != by_image["all"]["low"]


# the loss


def slow_loss(logits, truth, weight=10., gamma=2., smooth=1.):
    "In double precision, pixel by pixel."
    focal, above, below = 0., smooth, smooth
    for x, y in zip(logits.double().flatten().tolist(), truth.flatten().tolist()):
        p = 1 / (1 + np.exp(-x))
        q = p if y else 1 - p
        focal -= (1 - q) ** gamma * np.log(q)
        above += 2 * p * y
        below += p + y
    return weight * focal / logits.numel() - np.log(above / below)


@pytest.mark.parametrize("seed", range(8))
def test_the_loss_against_a_slow_loop(seed):
    g = torch.Generator().manual_seed(seed)
    b, s = int(torch.randint(1, 5, (), generator=g)), int(torch.randint(1, 20, (), generator=g))
    logits, truth = 3 * torch.randn(b, s, s, generator=g), torch.rand(b, s, s, generator=g) < torch.rand(b, 1, 1, generator=g) - .3
    assert torch.isclose(segmentation_loss(logits, truth), torch.tensor(slow_loss(logits, truth), dtype=torch.float32), rtol=1e-5)
    how = dict(weight=3., gamma=.5, smooth=.1)
    assert torch.isclose(segmentation_loss(logits, truth, **how), torch.tensor(slow_loss(logits, truth, **how), dtype=torch.float32), rtol=1e-5)


def test_the_gradient_of_the_loss_is_the_slope():
    g = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(2, 3, 3, generator=g, dtype=torch.double, requires_grad=True), (torch.rand(2, 3, 3, generator=g) > .5).double()
    assert torch.autograd.gradcheck(lambda x: 10 * focal_loss(x, truth) - log_dice(x, truth), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0., .01, 1.])
def test_the_loss_is_finite_at_published_size_however_sure(dtype, share):
    g = torch.Generator().manual_seed(0)
    truth = torch.rand(16, 224, 224, generator=g) < share
    for scale in 0., 1e-4, 1., 1e4:
        logits = (scale * torch.randn(16, 224, 224, generator=g)).to(dtype).requires_grad_()
        loss = segmentation_loss(logits, truth)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and logits.grad.isfinite().all()
    assert segmentation_loss(torch.where(truth, 30., -30.), truth) < 1e-5 < 1 < segmentation_loss(torch.where(truth, -30., 30.), truth)


# decoders


@pytest.mark.parametrize("name, size", [("resnet-18", 224), ("resnet-50", 64), ("resnet-tiny", 100), ("vit-tiny", 224), ("vit-small", 64)])
def test_decoders_at_the_size_of_the_input(name, size):
    encoder = ImageEncoder(image_config(name, size), size).eval()
    x, look = torch.rand(2, 1, size, size) * 2 - 1, look_for(encoder)
    with torch.no_grad():
        maps = look(encoder, x)
    with own_chance(0):
        head = make_segmenter(encoder, size)
    with own_chance(0):
        again = make_segmenter(encoder, size)
    assert torch.equal(head.eval()(maps), again.eval()(maps)) and head(maps).shape == (2, size, size)
    assert len(maps) == (1 if encoder.is_vit else len(pyramid_widths(encoder)))
    head.train()(maps, truth=torch.rand(2, size, size) > .8)["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in head.parameters())


def test_the_published_widths():
    unet, pup = UNetDecoder([256, 512, 1024, 2048], 224), PUPDecoder(768, 224)
    shapes = [tuple(m.weight.shape[:2]) for m in unet.modules() if isinstance(m, torch.nn.Conv2d)]
    assert shapes == [(256, 3072), (256, 256), (128, 768), (128, 128), (64, 384), (64, 64), (32, 64), (32, 32), (16, 32), (16, 16), (1, 16)]
    assert [tuple(m.weight.shape[:2]) for m in pup.modules() if isinstance(m, torch.nn.Conv2d)] == [(256, 768), (256, 256), (256, 256), (256, 256), (1, 256)]
    assert pup([torch.zeros(2, 768, 14, 14)]).shape == (2, 224, 224) and PUPDecoder(8, 70, patch=14, width=8)([torch.zeros(2, 8, 5, 5)]).shape == (2, 70, 70)


def test_a_unet_sees_where_things_are():
    "One bright position of a skip map changes the mask there, and not at the other end."
    unet = UNetDecoder([4, 4], 64, (8, 8, 8)).eval()
    maps = [torch.zeros(1, 4, 16, 16), torch.zeros(1, 4, 8, 8)]
    before = unet(maps)
    maps[0][:, :, 2, 3] = 5.
    changed = (unet(maps) - before).abs()[0] > 1e-6
    ys, xs = np.nonzero(changed.detach().numpy())
    assert 4 * 2 in ys and 4 * 3 in xs and ys.max() < 32 and xs.max() < 32


# masks


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 6), st.integers(1, 20), st.integers(0, 1000))
def test_packing_loses_nothing(n, size, seed):
    a, b = np.random.default_rng(seed).random((2, n, size, size)) > .5
    assert np.array_equal(unpack_masks(pack_masks(a), size), a) and pack_masks(a).nbytes == n * -(-size ** 2 // 8)
    if n:
        assert np.array_equal(count_packed(pack_masks(a), pack_masks(b), size, portion=2), count_pixels(a, b))


def test_the_truth_is_the_middle_of_the_square(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (90, 120)).astype(np.uint8)
    mask = np.zeros((90, 120), bool)
    mask[20:60, 10:50] = True
    Image.fromarray(image).save(tmp_path / "i.png")
    Image.fromarray(mask).save(tmp_path / "m.png")
    study = Study("a", tmp_path / "i.png", "p", masks=dict(thing=tmp_path / "m.png"), boxes=(Box("thing", 10, 20, 40, 40),))
    other = Study("b", tmp_path / "i.png", "q", labels=dict(thing=0.))
    for boxes in False, True:
        packed = read_truth([study, other, study], [0, 1], ["thing"], 48, 40, boxes)
        seen = unpack_masks(packed, 40)
        want = centre_crop(fit_square(mask.astype(np.uint8) * 255, 48), 40) > 127
        assert (seen[0] != want).mean() < .02 and seen[0].any() and not seen[1:].any()
    with pytest.raises(ValueError, match=r"1 of 2 studies have neither a mask for thing nor a label 0, 'c' is the first: leave them out before the split"):
        read_truth([study, replace(other, id="c", labels={})], [0, 1], ["thing"], 48, 40)


# RSNA as published


@pytest.fixture(scope="module")
def rsna_test(shared_data):
    "The studies of LoVT's RSNA test list, in its order, with the union of the boxes as masks."
    studies = {s.id: s for s in load_rsna(shared_data / "labels/rsna", need_images=False, masks=True)}
    return [studies[r["ID"]] for r in read_rows(shared_data / "splits/lovt/rsna/test.csv", ["ID"], "").values()]


def test_an_empty_mask_on_rsna_scores_77_18_per_cent(rsna_test):
    true = np.array([sum(s.masks["Pneumonia"].lengths) for s in rsna_test])
    kinds = baselines(true, 1024 ** 2)
    assert (len(true), (true > 0).sum()) == (5337, 1218)
    assert round(100 * float(dice_all(kinds["empty"])), 2) == 77.18 == round(100 * float(dice_published(kinds["empty"], batch_size=1)), 2)
    assert round(100 * float(dice_published(kinds["empty"], batch_size=16)), 2) == 77.16 # 333 batches of 16 and one of 9
    assert dice_positives(kinds["empty"]) == dice_pooled(kinds["empty"]) == 0
    found = describe_dice(kinds["empty"], [s.patient for s in rsna_test], n_bootstrap=200)
    assert .75 < found["all"]["low"] < .7718 < found["all"]["high"] < .79


def test_a_full_mask_on_rsna_scores_what_the_boxes_of_the_list_cover(rsna_test, shared_data):
    table = read_rows(shared_data / "splits/lovt/rsna/test.csv", ["ID", "boxes"], "").values()
    true = []
    for text in (r["boxes"] for r in table):
        film = np.zeros((1024, 1024), bool)
        for x, y, w, h in (map(float, b.split(";")) for b in text.split("|") if b):
            film[int(y):int(y + h), int(x):int(x + w)] = True
        true.append(film.sum() if text else 0)
    ours, true = np.array([sum(s.masks["Pneumonia"].lengths) for s in rsna_test]), np.array(true)
    assert np.array_equal(ours, true)
    full = baselines(ours, 1024 ** 2)["full"]
    assert np.isclose(dice_all(full), np.mean(2 * true / (true + 1024 ** 2))) and round(100 * float(dice_positives(full)), 1) == 20.2


@pytest.mark.slow
def test_rsna_boxes_become_the_same_masks(rsna_test, tmp_path):
    "Through the whole path, at 224 of 256 pixels: no box is lost by the crop, and boxes and runs agree but at the edges."
    Image.fromarray(np.zeros((1024, 1024), np.uint8)).save(tmp_path / "film.png")
    studies = [replace(s, image=tmp_path / "film.png") for s in rsna_test if s.boxes][:300]
    studies += [replace(s, image=tmp_path / "film.png") for s in rsna_test if not s.boxes][:100]
    rows = range(len(studies))
    runs, boxes = (read_truth(studies, rows, ["Pneumonia"], 256, 224, boxes=b) for b in (False, True))
    assert runs.any(1).sum() == boxes.any(1).sum() == 300
    assert dice_positives(count_packed(runs, boxes, 224)) > .98


# it learns


def overfit(studies, names, name, size, epochs, **widths):
    "Dice on the very images that were trained on, with the published optimiser on a frozen random encoder."
    images = np.stack([fit_square(read_image(s.image), size) for s in studies])
    truth, rows = read_truth(studies, range(len(studies)), names, size, size), range(len(studies))
    with own_chance(0):
        encoder = ImageEncoder(image_config(name, size), size)
    data = TaskData(images, size, lambda r: dict(truth=torch.from_numpy(unpack_masks(truth[list(r)], size))), FrozenFeatures(encoder, images, size, look_for(encoder)))
    with own_chance(0):
        head = make_segmenter(encoder, size, **widths)
    model, _ = train_head(head, encoder, data, replace(PROTOCOL, epochs=epochs, patience=epochs), rows, rows, 0, look_for(encoder))
    counts = count_packed(predict_masks(model, data, rows), truth, size)
    return {k: float(f(counts)) for k, f in DICE.items()}


FEWER = dict(widths=(64, 64, 32, 32, 16)) # a decoder of a sixth of the published work, so that a minute is enough


@pytest.mark.slow
def test_sixteen_phantoms_can_be_learned_by_heart(tmp_path):
    studies = synthesize(120, tmp_path, size=64, masks=True)
    assert min(overfit(studies[:16], ["lungs"], "resnet-18", 64, 60, **FEWER).values()) > .95
    there = [s for s in studies if "pneumothorax" in s.masks][:8]
    free = [s for s in studies if "pneumothorax" not in s.masks][:8]
    assert min(overfit(there + free, ["pneumothorax"], "resnet-18", 64, 140, **FEWER).values()) > .95


@pytest.mark.slow
@pytest.mark.parametrize("name, widths", [("resnet-18", {}), ("vit-tiny", dict(width=64))])
def test_sixteen_real_lungs_can_be_learned_by_heart(shared_data, name, widths):
    studies = [s for s in load_covid_cxr(shared_data / "covid-chestxray-dataset") if s.masks][:16]
    assert min(overfit(studies, ["lungs"], name, 64, 100, **widths).values()) > .95


# the evaluation


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    studies = synthesize(80, tmp_path_factory.mktemp("phantoms"), size=64, masks=True)
    return studies, np.stack([fit_square(read_image(s.image), 64) for s in studies])


@pytest.fixture
def encoder():
    with own_chance(0):
        return ImageEncoder(image_config("resnet-tiny", 48), 48)


QUICK = replace(PROTOCOL, lr=3e-3, epochs=2)
NARROW = dict(widths=(8, 8, 8, 8))


def run(encoder, phantoms, names=("heart",), fractions=(1.,), seeds=(0,), settings=QUICK, split=None, **kwargs):
    studies, images = phantoms
    split = split or split_studies(studies, stratify="effusion")
    return evaluate_segmentation(encoder, images, 48, studies, split, names, fractions, seeds, settings, widths=NARROW, progress=False, **kwargs)


def test_a_killed_evaluation_goes_on_and_settings_have_their_own_cells(encoder, phantoms, tmp_path, monkeypatch):
    import cmcgns.evaluation.segmentation as page
    calls = []
    def counted(*args):
        calls.append(args[6])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return train_head(*args)
    monkeypatch.setattr(page, "train_head", counted)
    with pytest.raises(KeyboardInterrupt):
        run(encoder, phantoms, seeds=(0, 1), folder=tmp_path)
    rows, kept = run(encoder, phantoms, seeds=(0, 1), folder=tmp_path)
    assert calls == [0, 1, 1] and [r["seed"] for r in rows] == [0, 1]
    again, same = run(encoder, phantoms, seeds=(0, 1), folder=tmp_path)
    assert len(calls) == 3 and again == rows and all(np.array_equal(same[k], v) for k, v in kept.items())
    for other in dict(settings=replace(QUICK, lr=1e-3)), dict(names=["lungs"]), dict(n_bootstrap=10):
        run(encoder, phantoms, **(dict(folder=tmp_path) | other))
    assert len(calls) == 6


def test_it_repeats_itself_and_leaves_the_encoder_alone(encoder, phantoms):
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    for how in QUICK, replace(QUICK, finetune=True):
        (a, kept), (b, same) = (run(encoder, phantoms, settings=how) for _ in range(2))
        assert a == b and all(np.array_equal(kept[k], same[k]) for k in kept)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items()) and encoder.training


def test_what_is_kept_gives_every_number_again(encoder, phantoms):
    split = split_studies(phantoms[0], stratify="effusion")
    rows, kept = run(encoder, phantoms, ["effusion", "heart"], (.2, 1.), split=split)
    test = rows_of(phantoms[0], split)["test"]
    truth = unpack_masks(kept["truth"], int(kept["size"]))
    masks = np.stack([centre_crop(sum(read_image(m) > 0 for k, m in phantoms[0][i].masks.items() if k in ("effusion", "heart")) > 0, 48) for i in test])
    assert np.array_equal(truth, masks) and kept["ids"].tolist() == [phantoms[0][i].id for i in test]
    for r in rows:
        key = score_key(r["fraction"], r["seed"])
        counts = count_pixels(unpack_masks(kept[f"{key} masks"], 48), truth)
        assert np.array_equal(counts, kept[f"{key} counts"]) and r["value"] == dice_positives(counts) == r["dice"]["positives"]["value"]
        assert r["empty"]["all"] == 1 - r["positives"] / r["n_test"] and r["full"]["pooled"] == dice_pooled(baselines(counts[:, 2], 48 ** 2)["full"])
        assert r["dice"] == describe_dice(counts, kept["groups"])
    lines = dice_table(rows).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["20%", "100%", "empty", "full"] and all(k in lines[0] for k in DICE)
    assert compare_segmenters(kept, kept, 1., seeds=(0,)) == dict(fraction=1., difference=0., low=0., high=0.)
    other = kept | {f"{score_key(1., 0)} counts": kept[f"{score_key(.2, 0)} counts"]}
    few, many = (next(r for r in rows if r["fraction"] == f) for f in (.2, 1.))
    found = paired_bootstrap([statistic_of(kept, many)], [statistic_of(kept, few)], kept["groups"])
    assert found == tuple(compare_segmenters(kept, other, 1., seeds=(0,)).values())[1:] and found[0] == pytest.approx(many["value"] - few["value"])


def test_groups_are_patients_however_films_were_split(encoder, phantoms):
    for by in "patient", "image":
        split = split_studies(phantoms[0], by=by)
        _, kept = run(encoder, phantoms, split=split, settings=replace(QUICK, epochs=1))
        assert kept["groups"].tolist() == [phantoms[0][i].patient for i in rows_of(phantoms[0], split)["test"]]


def test_one_per_cent_has_something_to_find(encoder, phantoms):
    rows, _ = run(encoder, phantoms, ["pneumothorax"], (.01,), (0, 1), settings=replace(QUICK, epochs=1))
    assert [r["n_train"] for r in rows] == [2, 2] # one of each kind


def test_studies_beside_the_split_need_no_masks(encoder, phantoms):
    "All of the split have a heart, others do not: nothing to stratify by, and nothing to refuse."
    studies, images = phantoms
    split = split_studies(studies[:60])
    others = [replace(s, masks={}) for s in studies[60:]]
    rows, _ = evaluate_segmentation(encoder, images, 48, studies[:60] + others, split, ["heart"], (1.,), (0,), replace(QUICK, epochs=1), widths=NARROW, progress=False)
    assert rows[0]["n_train"] == len(split.parts["train"])


def test_what_cannot_be_evaluated_is_refused(encoder, phantoms):
    studies, images = phantoms
    with pytest.raises(ValueError, match="79 images and 80 studies: give one each"):
        evaluate_segmentation(encoder, images[1:], 48, studies, split_studies(studies), ["heart"])
    with pytest.raises(ValueError, match="a crop of 65 does not fit"):
        evaluate_segmentation(encoder, images, 65, studies, split_studies(studies), ["heart"])
    broken = ImageEncoder(image_config("resnet-tiny", 48), 48)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        run(broken, phantoms)
    model = make_segmenter(encoder, 48)
    with torch.no_grad():
        model.decoder.classify.bias.fill_(float("nan"))
    data = TaskData(images, 48, dict, FrozenFeatures(encoder, images, 48))
    with pytest.raises(ValueError, match="a predicted mask is not finite"):
        predict_masks(model, data, [0, 1])


@pytest.mark.slow
def test_lungs_of_the_open_set(shared_data):
    "Real X-rays, patients disjoint: a few quick epochs find lungs far better than a full mask does."
    studies = [s for s in load_covid_cxr(shared_data / "covid-chestxray-dataset") if has_truth(s, ["lungs"])]
    split = split_studies(studies, dict(train=.6, validation=.1, test=.3))
    check_disjoint(studies, split)
    assert len(studies) == 192 and isinstance(split, Split) and all(Path(s.masks["lungs"]).is_file() for s in studies)
    images = np.stack([fit_square(read_image(s.image), 72) for s in studies])
    with own_chance(0):
        encoder = ImageEncoder(image_config("resnet-tiny", 64), 64)
    (row,), kept = evaluate_segmentation(encoder, images, 64, studies, split, ["lungs"], (1.,), (0,), replace(PROTOCOL, lr=3e-3, epochs=10), widths=dict(widths=(32, 32, 16, 16)), progress=False)
    assert row["dice"]["positives"]["low"] > .75 and row["full"]["positives"] < .65 and row["empty"]["positives"] == 0
    assert len(np.unique(kept["groups"])) < row["n_test"] == row["positives"] == len(split.parts["test"])
