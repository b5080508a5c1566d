"What the page on detection need not carry: slow references of metric, matching and loss, degenerate inputs, overfitting, real lungs."
import math
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cmcgns.data.covid_cxr import load_covid_cxr
from cmcgns.data.studies import Box, Study, split_studies
from cmcgns.data.synthetic import synthesize
from cmcgns.encoders import ImageEncoder, image_config
from cmcgns.evaluation.classification import score_key
from cmcgns.evaluation.detection import (ALARMS, ANCHORS, THRESHOLDS, Boxes, Cells, DetectionSettings, Detector, box_iou, choose_anchors, coco_map, decode,
                                         detect, evaluate_detection, find_alarms, find_right, fit_detector, froc, interval, lay_cells, look_for_boxes, measure,
                                         name_classes, pack, pad_boxes, published_images, published_map, rank, shape_iou, suppress, teach, true_boxes, unpack,
                                         weighted_map, who_stays, yolo_loss)
from cmcgns.evaluation.transfer import FrozenFeatures, TaskData, own_chance, weights_hash
from cmcgns.image import fit_square, read_image
from cmcgns.reporting.results import statistic_of
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def boxes_of(*rows, scores=None, labels=None):
    return Boxes(np.array(rows, np.float32).reshape(-1, 4), np.array(labels if labels is not None else [0] * len(rows), int), None if scores is None else np.array(scores, np.float32))


def make_world(seed, n=10, n_classes=2, most=12):
    rng, truth, found = np.random.default_rng(seed), [], []
    for _ in range(n):
        k, m = rng.integers(0, 5), rng.integers(0, most + 1)
        corner = rng.uniform(0, 60, (k + m, 2))
        boxes = np.concatenate([corner, corner + rng.uniform(12, 40, (k + m, 2))], 1)
        if k: boxes[k + m // 2:] = boxes[rng.integers(0, k, m - m // 2)] + rng.uniform(-5, 5, (m - m // 2, 4))
        labels = rng.integers(0, n_classes, k + m)
        truth.append(Boxes(boxes[:k].astype(np.float32), labels[:k]))
        found.append(Boxes(boxes[k:].astype(np.float32), labels[k:], rng.random(m).astype(np.float32)))
    return truth, found


def iou_slowly(a, b):
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    both = max(w, 0) * max(h, 0)
    return both / max((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both, 1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(*[st.integers(-20, 20)] * 4), min_size=1, max_size=6), st.lists(st.tuples(*[st.integers(-20, 20)] * 4), min_size=1, max_size=6))
def test_iou_against_plain_numbers(a, b):
    a, b = ([(min(r[0], r[2]), min(r[1], r[3]), max(r[0], r[2]), max(r[1], r[3])) for r in rows] for rows in (a, b))
    got = box_iou(torch.tensor(a, dtype=torch.double), torch.tensor(b, dtype=torch.double))
    assert np.allclose(got, [[iou_slowly(x, y) for y in b] for x in a], atol=1e-12)


def ap_slowly(truth, found, label, threshold):
    "Average precision by its definition: one detection after the other, one recall after the other."
    total = sum(int((t.labels == label).sum()) for t in truth)
    if not total: return None
    every = sorted(((s, i, b.tolist()) for i, f in enumerate(found) for s, b, k in zip(f.scores.tolist(), f.boxes, f.labels) if k == label), key=lambda d: -d[0])
    free = {(i, j) for i, t in enumerate(truth) for j, k in enumerate(t.labels) if k == label}
    points, right = [], 0
    for n, (_, i, b) in enumerate(every, 1):
        near = [(iou_slowly(b, truth[i].boxes[j].tolist()), j) for j in range(len(truth[i].labels)) if (i, j) in free]
        iou, j = max(near, default=(0, 0))
        if near and iou >= threshold: free.remove((i, j)); right += 1
        points.append((right / total, right / n))
    return sum(max((p for r, p in points if r >= recall), default=0) for recall in np.linspace(0, 1, 101)) / 101


@pytest.mark.parametrize("seed", range(12))
def test_map_against_its_definition(seed):
    n_classes = 1 + seed % 3
    truth, found = make_world(seed, n_classes=n_classes)
    aps = [[ap_slowly(truth, found, k, t) for t in THRESHOLDS] for k in range(n_classes)]
    slow = np.mean([v for v in aps if v[0] is not None])
    value, each = coco_map(truth, found, n_classes)
    assert abs(value - slow) < 1e-12 and abs(weighted_map(rank(truth, found, n_classes), np.ones((1, len(truth)), int))[0] - slow) < 1e-12
    assert np.allclose([np.nan if v[0] is None else np.mean(v) for v in aps], each, equal_nan=True)


@pytest.mark.parametrize("seed", range(30))
def test_weights_are_copies(seed):
    truth, found = make_world(seed, 8, 1 + seed % 3)
    weights = np.random.default_rng(seed).multinomial(8, np.full(8, 1 / 8), 4)
    ours = weighted_map(rank(truth, found, 3), weights)
    for w, value in zip(weights, ours):
        rows = np.repeat(np.arange(8), w)
        assert np.isclose(value, coco_map([truth[i] for i in rows], [found[i] for i in rows], 3)[0], atol=1e-12, equal_nan=True)


def test_the_first_hundred_detections_count():
    truth, found = make_world(0, 3, 1, most=300)
    assert max(len(f.labels) for f in found) > 150
    assert abs(weighted_map(rank(truth, found), np.ones((1, 3), int))[0] - coco_map(truth, found)[0]) < 1e-12


def test_degenerate_inputs_of_the_metrics():
    one, none, no_hit = boxes_of([0, 0, 9, 9]), boxes_of(), boxes_of(scores=[])
    exact = boxes_of([0, 0, 9, 9], scores=[.6])
    for truth, found, value in [([], [], np.nan), ([none], [exact], np.nan), ([one], [no_hit], 0), ([one], [exact], 1), ([one, none], [no_hit, exact], 0)]:
        assert np.isclose(coco_map(truth, found)[0], value, equal_nan=True)
        if truth: assert np.isclose(weighted_map(rank(truth, found), np.ones((1, len(truth)), int))[0], value, equal_nan=True)
    assert np.isnan(weighted_map(rank([one, none], [exact, no_hit]), np.array([[0, 2]]))).all()
    value, each = coco_map([one], [exact], 3)
    assert value == 1 and each[0] == 1 and np.isnan(each[1:]).all()
    flat = boxes_of([3, 3, 3, 9], scores=[.9]) # a detection without an area is a false alarm
    assert coco_map([one], [flat])[0] == 0 == weighted_map(rank([one], [flat]), np.ones((1, 1), int))[0]
    assert np.isnan(interval(None, [])).all()
    assert find_right(np.zeros((0, 4)), np.zeros((2, 4))).tolist() == [[False] * 2] * 8


def test_the_published_map_forgets_what_it_does_not_like():
    box, far = [10, 10, 50, 50], [70, 70, 90, 90]
    truth = [boxes_of(box), boxes_of(box), boxes_of()]
    found = [boxes_of(box, far, scores=[.9, .2]), boxes_of(box, scores=[.49]), boxes_of(box, scores=[.95])]
    value, _, n = published_map(truth, found)
    assert (value, n) == (1, 1) and published_images(truth, found)[0] == [0] and coco_map(truth, found)[0] < .7
    assert published_map(truth, found, least=.1)[2] == 2
    truth, found = make_world(1)
    both = [i for i in range(len(truth)) if len(truth[i].labels) and len(found[i].labels)]
    assert published_map(truth, found, 2, least=0)[0] == coco_map([truth[i] for i in both], [found[i] for i in both], 2)[0]


def test_ten_films_of_one_patient_are_one_witness():
    truth, found = make_world(3, 12, 1)
    once = interval(partial(weighted_map, rank(truth, found)), range(12), 200)
    again = [i for i in range(12) for _ in range(5)]
    value = partial(weighted_map, rank([truth[i] for i in again], [found[i] for i in again]))
    by_patient, by_image = interval(value, again, 200), interval(value, range(60), 200)
    assert np.allclose(once, by_patient) and by_image[1] - by_image[0] < .8 * (once[1] - once[0])


def froc_slowly(truth, found, rates):
    events = []
    for i, (t, f) in enumerate(zip(truth, found)):
        for b, k, s in zip(f.boxes.tolist(), f.labels, f.scores.tolist()):
            x, y = (b[0] + b[2]) / 2, (b[1] + b[3]) / 2
            events.append((s, [(i, j) for j, (o, l) in enumerate(zip(t.boxes.tolist(), t.labels)) if l == k and o[0] <= x <= o[2] and o[1] <= y <= o[3]]))
    total, answer = sum(len(t.labels) for t in truth), []
    for rate in rates:
        best = 0.
        for least in [*{s for s, _ in events}, math.inf]:
            shown = [hits for s, hits in events if s >= least]
            if sum(not hits for hits in shown) <= rate * len(truth): best = max(best, len({h for hits in shown for h in hits}) / total)
        answer.append(best)
    return answer


@pytest.mark.parametrize("seed", range(20))
def test_froc_against_every_threshold(seed):
    truth, found = make_world(seed, 6, 1 + seed % 2, most=60 if seed % 3 == 0 else 12)
    if seed % 2: found = [Boxes(f.boxes, f.labels, f.scores.round(1)) for f in found] # with ties
    weights = np.stack([np.ones(6, int), np.random.default_rng(seed).integers(0, 3, 6)])
    for w, got in zip(weights, froc(find_alarms(truth, found), weights)):
        rows = np.repeat(np.arange(6), w)
        if sum(len(truth[i].labels) for i in rows): assert np.allclose(got, froc_slowly([truth[i] for i in rows], [found[i] for i in rows], ALARMS), atol=1e-12)
        else: assert np.isnan(got).all()


def test_froc_of_degenerate_inputs():
    one, none, no_hit = boxes_of([0, 0, 9, 9]), boxes_of(), boxes_of(scores=[])
    ones = np.ones((1, 1), int)
    assert np.isnan(froc(find_alarms([none], [boxes_of([0, 0, 1, 1], scores=[.5])]), ones)).all()
    assert (froc(find_alarms([one], [no_hit]), ones) == 0).all() and (froc(find_alarms([one], [boxes_of([1, 1, 5, 5], scores=[.1])]), ones) == 1).all()
    nested = boxes_of([0, 0, 9, 9], [2, 2, 6, 6])
    assert (froc(find_alarms([nested], [boxes_of([3, 3, 5, 5], scores=[.1])]), ones) == 1).all() # one middle in two objects finds both
    other = boxes_of([0, 0, 9, 9], labels=[1])
    assert (froc(find_alarms([other], [boxes_of([0, 0, 9, 9], scores=[.1])]), ones) == 0).all()


def test_a_row_holds_both_numbers_and_their_intervals():
    truth, found = make_world(5, 30)
    row = measure(truth, found, ["a", "b"], np.arange(30) // 2, n=100)
    assert row["low"] <= row["value"] <= row["high"] and row["published_low"] <= row["published"] <= row["published_high"] and row["froc_low"] <= row["froc"] <= row["froc_high"]
    assert row["value"] == coco_map(truth, found, 2)[0] and row["published"] == published_map(truth, found, 2)[0] and row["n_published"] == published_map(truth, found, 2)[2]
    assert set(row["findings"]) == {"a", "b"} and list(row["sensitivity"]) == ["0.125", "0.25", "0.5", "1", "2", "4", "8"] and row["n_boxes"] == sum(len(t.labels) for t in truth)
    assert row["froc"] == np.mean(list(row["sensitivity"].values())) and 0 <= row["image_auroc"] <= 1
    assert all(np.array_equal(getattr(a, k), getattr(b, k)) for a, b in zip(unpack({f"truth {k}": v for k, v in pack(found).items()} | dict(ids=range(30))), found) for k in a._fields)
    empty = measure([boxes_of()] * 3, [boxes_of(scores=[])] * 3, ["a"], range(3), n=10)
    assert np.isnan([empty["value"], empty["low"], empty["published"], empty["froc"], empty["image_auroc"]]).all() and empty["n_published"] == 0


# the network

GRIDS, SIZE = [(12, 12), (6, 6), (3, 3)], 96


def random_targets(seed, b=4, m=5):
    g = torch.Generator().manual_seed(seed)
    corner = torch.rand(b, m, 2, generator=g, dtype=torch.double) * 60
    boxes = torch.cat([corner, corner + 2 + torch.rand(b, m, 2, generator=g, dtype=torch.double) * 34], -1)
    return boxes, torch.randint(-1, 2, (b, m), generator=g)


def all_cells():
    "Every anchor of every cell in the order of the raw predictions: grid, anchor, row, column."
    return [(i, a, r, c) for i, (h, w) in enumerate(GRIDS) for a in range(3) for r in range(h) for c in range(w)]


def teach_slowly(boxes, labels, matching):
    order, taught, fits = {cell: n for n, cell in enumerate(all_cells())}, {}, {}
    for image, (some, names) in enumerate(zip(boxes.tolist(), labels.tolist())):
        for j, ((x0, y0, x1, y1), name) in enumerate(zip(some, names)):
            if name < 0: continue
            each = []
            for i, (h, _) in enumerate(GRIDS):
                for a in range(3):
                    s, (aw, ah), p = SIZE / h, ANCHORS[i, a] * SIZE, 0
                    w, hh = x1 - x0, y1 - y0
                    if matching == "published": aw, ah, w, hh, p = aw / s, ah / s, w / s, hh / s, 1
                    both = (min(w, aw) + p) * (min(hh, ah) + p)
                    each.append((both / ((w + p) * (hh + p) + (aw + p) * (ah + p) - both), i, a))
            chosen = [max(each)] if matching == "best" else [max(e for e in each if e[1] == i) for i in range(3)]
            for fit, i, a in chosen:
                s = SIZE / GRIDS[i][0]
                key = image, order[i, a, int((y0 + y1) / 2 / s), int((x0 + x1) / 2 / s)]
                if fit > fits.get(key, -1): fits[key], taught[key] = fit, j
    return taught


@pytest.mark.parametrize("matching", ["best", "published"])
@pytest.mark.parametrize("seed", range(5))
def test_who_is_taught_what(seed, matching):
    boxes, labels = random_targets(seed)
    taught = teach(boxes, labels, GRIDS, SIZE, matching=matching)
    assert dict(zip(zip(taught.image.tolist(), taught.cell.tolist()), taught.of.tolist())) == teach_slowly(boxes, labels, matching)


def bce(x, y): return max(x, 0) - x * y + math.log1p(math.exp(-abs(x)))


def loss_slowly(raw, boxes, labels, matching, ignore):
    taught, parts = teach_slowly(boxes, labels, matching), dict(box=0., object=0., label=0.)
    for image in range(len(raw)):
        for n, (i, a, r, c) in enumerate(all_cells()):
            t, s, (aw, ah) = raw[image, n].tolist(), SIZE / GRIDS[i][0], (ANCHORS[i, a] * SIZE).tolist()
            x, y, w, h = (c + 1 / (1 + math.exp(-t[0]))) * s, (r + 1 / (1 + math.exp(-t[1]))) * s, aw * math.exp(t[2]), ah * math.exp(t[3])
            own = taught.get((image, n))
            overlap = max((iou_slowly((x - w / 2, y - h / 2, x + w / 2, y + h / 2), b) for b, k in zip(boxes[image].tolist(), labels[image].tolist()) if k >= 0), default=0)
            if own is not None or overlap <= ignore: parts["object"] += bce(t[4], float(own is not None))
            if own is None: continue
            x0, y0, x1, y1 = boxes[image, own].tolist()
            off = bce(t[0], (x0 + x1) / 2 / s - c) + bce(t[1], (y0 + y1) / 2 / s - r) + (t[2] - math.log((x1 - x0) / aw))**2 / 2 + (t[3] - math.log((y1 - y0) / ah))**2 / 2
            parts["box"] += (2 - (x1 - x0) * (y1 - y0) / SIZE**2) * off
            parts["label"] += sum(bce(v, float(k == labels[image, own])) for k, v in enumerate(t[5:]))
    return {k: v / len(raw) for k, v in parts.items()}


@pytest.mark.parametrize("matching", ["best", "published"])
@pytest.mark.parametrize("seed, ignore", [(0, .5), (1, .2), (2, .9)])
def test_the_loss_against_plain_loops(seed, matching, ignore):
    (boxes, labels), cells = random_targets(seed), Cells(*(v.double() for v in lay_cells(GRIDS, SIZE)))
    raw = torch.randn(4, len(cells.stride), 7, generator=torch.Generator().manual_seed(seed), dtype=torch.double).requires_grad_()
    loss = yolo_loss(raw, boxes, labels, cells, teach(boxes, labels, GRIDS, SIZE, matching=matching), SIZE, ignore)
    slow = loss_slowly(raw.detach(), boxes, labels, matching, ignore)
    for k, v in slow.items(): assert math.isclose(loss[k].item(), v, rel_tol=1e-6), k
    assert math.isclose(loss["loss"].item(), sum(slow.values()), rel_tol=1e-6)
    loss["loss"].backward()
    assert raw.grad.isfinite().all()


def test_the_gradient_is_finite_at_the_ends():
    boxes = torch.tensor([[[0., 0, 96, 96], [95.9, 95.9, 96, 96], [10, 10, 10.001, 40], [0, 0, 0, 0]]])
    labels, cells = torch.tensor([[0, 0, 0, -1]]), lay_cells(GRIDS, SIZE)
    for scale in (0., 80., -80.):
        raw = torch.full((1, len(cells.stride), 6), scale, requires_grad=True)
        yolo_loss(raw, boxes, labels, cells, teach(boxes, labels, GRIDS, SIZE), SIZE)["loss"].backward()
        assert raw.grad.isfinite().all() and decode(raw, cells).isfinite().all()


def test_what_was_taught_decodes_to_the_box():
    boxes, labels = random_targets(3)
    labels, cells = labels.abs(), Cells(*(v.double() for v in lay_cells(GRIDS, SIZE)))
    taught, raw = teach(boxes, labels, GRIDS, SIZE), torch.zeros(4, len(cells.stride), 7, dtype=torch.double)
    box, at = boxes[taught.image, taught.of], (taught.image, taught.cell)
    place = ((box[:, :2] + box[:, 2:]) / 2 / cells.stride[taught.cell, None] - cells.corner[taught.cell]).clamp(1e-9, 1 - 1e-9)
    raw[at] = torch.cat([place.logit(), ((box[:, 2:] - box[:, :2]) / cells.shape[taught.cell]).log(), torch.zeros(len(box), 3)], 1)
    assert torch.allclose(decode(raw, cells)[at], box, atol=1e-5)


def test_published_matching_is_by_the_odd_rule():
    shapes, anchors, strides = torch.tensor([[20., 30.]]), torch.tensor(ANCHORS * 224), torch.tensor([8., 16., 32.])
    where, fit = choose_anchors(shapes, anchors, strides, "published")
    assert where.shape == (1, 3, 2) and where[0, :, 0].tolist() == [0, 1, 2]
    grid = anchors[2] / 32
    assert torch.allclose(fit[0, 2], shape_iou(shapes / 32, grid, 1.).max()) and fit[0, 2] > shape_iou(shapes, anchors[2]).max() + .1
    with pytest.raises(ValueError, match="unknown matching 'x'"): Detector(ImageEncoder(image_config("resnet-tiny", 64), 64), 1, 64, "x")


def suppress_slowly(boxes, scores, overlap, least):
    kept = []
    for k in range(scores.shape[1]):
        left = sorted((s, i) for i, s in enumerate(scores[:, k].tolist()) if s >= least)
        while left:
            s, i = left.pop()
            kept.append((s, k, boxes[i].tolist()))
            left = [(t, j) for t, j in left if iou_slowly(boxes[i].tolist(), boxes[j].tolist()) <= overlap]
    return sorted(kept, reverse=True)


@pytest.mark.parametrize("overlap, least", [(.1, 0.), (.5, .01), (.5, .6), (.9, .3)])
def test_suppression_against_one_after_the_other(overlap, least):
    g = torch.Generator().manual_seed(int(overlap * 10))
    boxes, scores = torch.rand(5, 80, 4, generator=g) * 40, torch.rand(5, 80, 3, generator=g)
    boxes[..., 2:] += boxes[..., :2] + 4
    for found, b, s in zip(suppress(boxes, scores, overlap, least, most=1000), boxes, scores):
        assert list(zip(found.scores.tolist(), found.labels.tolist(), found.boxes.tolist())) == suppress_slowly(b, s, overlap, least)
    few = suppress(boxes, scores, overlap, least, most=7)
    assert all(len(f.labels) <= 7 and (np.diff(f.scores) <= 0).all() for f in few)


def test_a_long_chain_of_suppression():
    n = 57
    clash = torch.zeros(1, n, n, dtype=torch.bool)
    clash[0, torch.arange(n - 1), torch.arange(1, n)] = True
    assert who_stays(clash)[0].tolist() == [i % 2 == 0 for i in range(n)]
    assert suppress(torch.zeros(2, 5, 4), torch.zeros(2, 5, 1))[1].scores.tolist() == []


@pytest.mark.parametrize("name, size", [("resnet-tiny", 64), ("resnet-tiny", 72), ("resnet-tiny", 100), ("resnet-18", 96), ("vit-tiny", 64), ("vit-tiny", 48)])
def test_any_size_any_encoder(name, size):
    with own_chance(0):
        encoder = ImageEncoder(image_config(name, size), size).eval()
        head = Detector(encoder, 2, size)
    maps = look_for_boxes(encoder, torch.rand(3, 1, size, size) * 2 - 1)
    head(maps, **pad_boxes([boxes_of([1, 1, 30, 40]), boxes_of(), boxes_of([0, 0, size, size], [4, 4, 9, 9], labels=[1, 0])]))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    head.eval()
    with torch.no_grad():
        boxes, scores = head(maps)
        alone = head(tuple(m[[1]] for m in maps))
    assert boxes.min() >= 0 and boxes.max() <= size and torch.allclose(alone[0], boxes[[1]], atol=1e-4) and torch.allclose(alone[1], scores[[1]], atol=1e-5)
    assert 0 < scores.mean() < .03 # objectness starts low


def test_a_resnet_of_two_stages_is_refused():
    from transformers import ResNetConfig
    encoder = ImageEncoder(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"), 64)
    with pytest.raises(ValueError, match="gives 2 feature maps and 3 are wanted"): look_for_boxes(encoder, torch.zeros(1, 1, 64, 64))


# training and evaluation

def bright_things(n, folder, size=72, seed=0):
    rng, studies = np.random.default_rng(seed), []
    for i in range(n):
        image, boxes = rng.normal(60, 15, (size, size)), []
        if i % 4 != 3:
            w, h = rng.integers(12, 24, 2)
            x, y = rng.integers(4, size - w - 4), rng.integers(4, size - h - 4)
            image[y:y + h, x:x + w] += 110
            boxes = [Box("thing", int(x), int(y), int(w), int(h))]
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.png")
        studies.append(Study(f"s{i:03}", folder / f"{i}.png", f"p{i // 2}", boxes=tuple(boxes)))
    return studies, np.stack([read_image(s.image) for s in studies])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with own_chance(0): encoder = ImageEncoder(image_config("resnet-tiny", 64), 64).train()
    return encoder, *bright_things(60, tmp_path_factory.mktemp("things"))


@pytest.mark.parametrize("kw", [dict(), dict(matching="published"), dict(finetune=True)], ids=str)
def test_an_evaluation_repeats_itself_and_leaves_the_encoder_alone(world, kw):
    encoder, studies, images = world
    states = lambda: (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist())
    before, weights = states(), weights_hash(encoder)
    run = partial(evaluate_detection, encoder, images, 64, studies, split_studies(studies), fractions=(.05, 1.), seeds=(0,), settings=DetectionSettings(epochs=2, **kw), n_bootstrap=20, progress=False)
    (rows, kept), (again, kept_again) = run(), run()
    assert rows == again or np.isnan(rows[0]["value"])
    assert all(np.array_equal(kept[k], kept_again[k]) for k in kept)
    assert states() == before and weights_hash(encoder) == weights and encoder.training
    for r in rows:
        assert statistic_of(kept, r)(np.ones((1, r["n_test"]), int))[0] == pytest.approx(r["value"], nan_ok=True), "COCO's own mAP"
    assert rows[0]["n_train"] == 2 and all(len(unpack(kept, score_key(f, 0))) == rows[0]["n_test"] for f in (.05, 1.))


def test_other_pixels_or_boxes_are_another_evaluation(world, tmp_path):
    encoder, studies, images = world
    others = [replace(s, boxes=tuple(b._replace(x=b.x + 1) for b in s.boxes)) for s in studies]
    for n, (pixels, them) in enumerate([(images, studies), (images, studies), (255 - images, studies), (images, others)]):
        evaluate_detection(encoder, pixels, 64, them, split_studies(studies), fractions=(1.,), seeds=(0,), settings=DetectionSettings(epochs=1), folder=tmp_path, n_bootstrap=20, progress=False)
        assert len(list(tmp_path.glob("*.npz"))) == [1, 1, 2, 3][n]


def test_a_subset_of_few_has_a_box_and_an_image_without(world):
    encoder, studies, images = world
    seen = []
    def targets(rows): seen.append(list(rows))
    truth = true_boxes(studies, dict(thing=0), 72, 64)
    from cmcgns.evaluation.transfer import over_fractions
    def fit(train, *_): seen.append(sorted(len(truth[i].labels) for i in train)); return {}, {}
    over_fractions(fit, studies, split_studies(studies), (.01,), range(5), np.array([len(t.labels) > 0 for t in truth]), progress=False)
    assert seen == [[0, 1]] * 5


def test_labels_may_be_chosen_and_joined(tmp_path):
    image = tmp_path / "i.png"
    Image.fromarray(np.zeros((72, 72), np.uint8)).save(image)
    study = Study("a", image, "p", boxes=(Box("coin", 5, 5, 9, 9), Box("pin", 30, 30, 9, 9), Box("lung", 40, 8, 20, 20), Box("coin", 0, 0, 3, 3)))
    names, classes = name_classes([study], dict(coin="thing", pin="thing"))
    (truth,) = true_boxes([study], classes, 72, 64)
    assert names == ["thing"] and truth.labels.tolist() == [0, 0] and truth.boxes.tolist() == [[1, 1, 10, 10], [26, 26, 35, 35]] # the second coin is not in the crop
    assert true_boxes([study], name_classes([study])[1], 72, 64)[0].labels.tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match="no study has a box for 'anything': known are none"): name_classes([replace(study, boxes=())])
    with pytest.raises(ValueError, match="1 images for 2 studies: give one each"): evaluate_detection(None, np.zeros((1, 9, 9), np.uint8), 8, [study] * 2, None)
    padded = pad_boxes([truth, boxes_of()])
    assert padded["boxes"].shape == (2, 2, 4) and padded["labels"].tolist() == [[0, 0], [-1, -1]] and pad_boxes([boxes_of()])["boxes"].shape == (1, 0, 4)


@pytest.mark.slow
def test_sixteen_synthetic_chests_are_learned(tmp_path):
    studies = [s for s in synthesize(40, tmp_path, size=144, seed=1) if s.boxes][:16]
    images = np.stack([read_image(s.image) for s in studies])
    names, classes = name_classes(studies, {b.label: "finding" for s in studies for b in s.boxes})
    truth = true_boxes(studies, classes, 144, 128)
    with own_chance(0): encoder = ImageEncoder(image_config("resnet-tiny", 128), 128)
    data = TaskData(images, 128, lambda rows: pad_boxes([truth[i] for i in rows]))
    chosen = DetectionSettings(lr=2e-3, encoder_lr=2e-3, finetune=True, batch_size=8, epochs=60, patience=60)
    model, log = fit_detector(encoder, data, len(names), chosen, range(16), range(16))
    assert coco_map(truth, detect(model, data, chosen, range(16)), len(names))[0] >= .95


@pytest.mark.slow
def test_real_lungs_are_found_by_a_random_encoder_and_its_head(shared_data):
    folder = Path(shared_data / "covid-chestxray-dataset")
    if not folder.is_dir(): pytest.skip(f"{folder} is not there")
    studies = [s for s in load_covid_cxr(folder) if s.boxes]
    images = np.stack([fit_square(read_image(s.image, at_least=144), 72) for s in studies])
    with own_chance(0): encoder = ImageEncoder(image_config("resnet-tiny", 64), 64)
    rows, kept = evaluate_detection(encoder, images, 64, studies, split_studies(studies), fractions=(1.,), seeds=(0,), settings=DetectionSettings(epochs=12, lr=2e-3), n_bootstrap=100, progress=False)
    assert rows[0]["n_boxes"] == 62 and rows[0]["n_test"] == 31 and list(rows[0]["findings"]) == ["left lung", "right lung"]
    assert .3 < rows[0]["low"] <= rows[0]["value"] <= rows[0]["high"] < 1 and rows[0]["froc"] > .9


def test_frozen_features_are_asked_of_three_stages(world):
    encoder, studies, images = world
    maps = FrozenFeatures(encoder, images, 64, look_for_boxes).batch([0, 1])
    assert [tuple(m.shape) for m in maps] == [(2, 32, 16, 16), (2, 64, 8, 8), (2, 128, 4, 4)]
