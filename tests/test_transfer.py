"What the page on transfer need not carry: geometry against plain loops, a killed evaluation, what training leaves untouched."
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from cmcgns.data.covid_cxr import load_covid_cxr
from cmcgns.data.studies import Box, Runs, Study, split_studies
from cmcgns.encoders import ImageEncoder, image_config
from cmcgns.evaluation.classification import score_key
from cmcgns.evaluation.transfer import (EncoderHead, FrozenFeatures, HeadSettings, LinearHead, TaskData, arrays_hash, boxes_on_square, centre_boxes,
                                        evaluate_finetuned_classification, feature_pyramid, fill_boxes, load_cell, mask_on_square, over_fractions,
                                        own_chance, pooled_feature, predict, save_cell, train_head, weights_hash)
from cmcgns.image import ImageError, centre_crop, fit_square, image_shape, normalise, read_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image


def save_image(path, h, w, box=None):
    image = np.zeros((h, w), np.uint8)
    if box: image[box[1]:box[1] + box[3], box[0]:box[0] + box[2]] = 255
    Image.fromarray(image).save(path)
    return Path(path)


@settings(max_examples=60, deadline=None)
@given(st.integers(20, 300), st.integers(20, 300), st.integers(16, 200), st.data())
def test_boxes_are_where_the_image_shows_them(tmp_path_factory, h, w, size, data):
    bw, bh = data.draw(st.integers(w // 4, w)), data.draw(st.integers(h // 4, h))
    x, y = data.draw(st.integers(0, w - bw)), data.draw(st.integers(0, h - bh))
    study = Study("a", save_image(tmp_path_factory.mktemp("i") / "i.png", h, w, (x, y, bw, bh)), "p", boxes=(Box("b", x, y, bw, bh),))
    (box,), _ = boxes_on_square(study, size)
    painted = fit_square(read_image(study.image), size)
    seen = painted > painted.max() / 2 # a box thinner than a pixel is grey
    if not seen.any(): return
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    assert np.abs(box - [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).max() <= 1


def test_boxes_that_leave_the_image_are_cut_and_those_outside_dropped(tmp_path):
    image = save_image(tmp_path / "i.png", 100, 100)
    study = Study("a", image, "p", boxes=(Box("in", 10, 10, 20, 20), Box("out", 120, 10, 20, 20), Box("half", 90, -10, 30, 30), Box("flat", 5, 5, 0, 9)))
    boxes, labels = boxes_on_square(study, 50)
    assert labels == ["in", "half"] and boxes.tolist() == [[5, 5, 15, 15], [45, 0, 50, 10]]
    assert boxes_on_square(replace(study, boxes=()), 50)[0].shape == (0, 4)
    with pytest.raises(ImageError, match="there is no such file"): boxes_on_square(replace(study, image=tmp_path / "no.png"), 50)


def mask_slowly(mask, size):
    h, w = mask.shape
    scale, square = size / max(h, w), np.zeros((size, size), bool)
    height, width = max(1, round(h * scale)), max(1, round(w * scale))
    top, left = (size - height) // 2, (size - width) // 2
    for i in range(height):
        for j in range(width): square[top + i, left + j] = mask[int((i + .5) * h / height), int((j + .5) * w / width)]
    return square


@pytest.mark.parametrize("h, w, size", [(40, 40, 40), (37, 91, 64), (91, 37, 20), (5, 200, 33), (64, 48, 100)])
def test_masks_against_a_loop_over_pixels(tmp_path, h, w, size):
    rng = np.random.default_rng(h)
    masks = rng.random((2, h, w)) < .3
    for k, m in enumerate(masks): Image.fromarray(m.astype(np.uint8) * 255).save(tmp_path / f"{k}.png")
    flat = masks[1].T.ravel()
    starts = np.flatnonzero(flat)
    study = Study("a", save_image(tmp_path / "i.png", h, w), "p", masks={"a": tmp_path / "0.png", "b": tmp_path / "1.png", "c": Runs(h, w, tuple(starts), (1,) * len(starts))})
    assert (mask_on_square(study, ["a"], size) == mask_slowly(masks[0], size)).all()
    assert (mask_on_square(study, ["c"], size) == mask_on_square(study, ["b"], size)).all()
    assert (mask_on_square(study, ["a", "c"], size) == mask_slowly(masks.any(0), size)).all()
    with pytest.raises(ValueError, match=rf"study 'a': a mask of \({h}, {w}\) pixels for an image of \({h + 1}, {w}\), expected the same"):
        mask_on_square(replace(study, image=save_image(tmp_path / "other.png", h + 1, w)), ["a"], size)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-5, 40)] * 4), max_size=5), st.integers(1, 32))
def test_boxes_are_filled_by_the_middles_of_pixels(rows, size):
    boxes = np.array(rows, np.float32).reshape(-1, 4)
    slow = [[any(x0 <= j + .5 < x1 and y0 <= i + .5 < y1 for x0, y0, x1, y1 in boxes.tolist()) for j in range(size)] for i in range(size)]
    assert fill_boxes(boxes, size).tolist() == slow


@pytest.mark.parametrize("store, size", [(144, 128), (145, 128), (72, 72), (256, 224), (33, 10)])
def test_boxes_in_the_crop(store, size):
    rng = np.random.default_rng(store)
    corner = rng.integers(0, store, (50, 2))
    boxes = np.concatenate([corner, np.minimum(corner + rng.integers(1, store, (50, 2)), store)], 1)
    seen, which = centre_boxes(boxes, store, size)
    for i, b in enumerate(boxes):
        crop = centre_crop(fill_boxes(b[None].astype(np.float32), store), size)
        assert (i in which) == crop.any()
        if i in which: assert (fill_boxes(seen[[which.tolist().index(i)]], size) == crop).all()


def test_a_vit_gives_its_tokens_after_each_quarter():
    config = image_config("vit-small", 32)
    encoder = ImageEncoder(config, 32).eval()
    after = []
    for layer in encoder.backbone.layers: layer.register_forward_hook(lambda m, i, o: after.append(o[0] if isinstance(o, tuple) else o))
    x = torch.rand(2, 1, 32, 32) * 2 - 1
    with torch.no_grad(): maps = feature_pyramid(encoder, x)
    assert len(after) == 12 and len(maps) == 4
    for m, k in zip(maps, (3, 6, 9)): assert torch.equal(m.flatten(2).transpose(1, 2), after[k - 1][:, 1:])
    with torch.no_grad(): larger = feature_pyramid(encoder, torch.zeros(1, 1, 64, 64))
    assert [tuple(m.shape) for m in larger] == [(1, 384, 4, 4)] * 4


@pytest.fixture(scope="module")
def encoder():
    with own_chance(0): return ImageEncoder(image_config("resnet-tiny", 64), 64).train()


def bright_or_dark(n):
    y = np.arange(n) % 2
    images = (np.random.default_rng(0).integers(0, 200, (n, 72, 72)) + 40 * y[:, None, None]).astype(np.uint8)
    return images, torch.tensor(y, dtype=torch.float32)[:, None]


def test_features_are_computed_once(encoder, tmp_path):
    images, _ = bright_or_dark(9)
    seen = []
    def look(e, x):
        seen.append(len(x))
        return feature_pyramid(e, x, last=2)
    held, filed, loose = (FrozenFeatures(encoder, images, 64, look, batch_size=4, **kw) for kw in (dict(), dict(folder=tmp_path / "maps"), dict(room=10)))
    for features in held, filed:
        seen.clear()
        for rows in ([3], [8, 0], range(9)): features.batch(rows)
        assert sum(seen) == 10 # one to learn the shapes
    assert sorted(p.name for p in tmp_path.glob("maps/*/*")) == ["0.f32", "1.f32"]
    other = FrozenFeatures(encoder, 255 - images, 64, look, folder=tmp_path / "maps")
    before = filed.batch([3])
    other.hold() # of other films in the same folder
    assert all(torch.equal(a, b) for a, b in zip(before, filed.batch([3]))) and not torch.equal(before[0], other.batch([3])[0])
    seen.clear()
    for rows in ([3], [8, 0], [1]): loose.batch(rows)
    assert sum(seen) == 5 # the shapes are asked for once, also where there is no room
    for rows in ([3], [8, 0]):
        one, two, three = (f.batch(rows) for f in (held, filed, loose))
        for a, b, c in zip(one, two, three): assert torch.equal(a, b) and torch.allclose(a, c, atol=1e-5) and not c.is_inference()
    with torch.no_grad(): direct = feature_pyramid(encoder.eval(), normalise(torch.from_numpy(images[[8, 0], 4:68, 4:68])), last=2)
    encoder.train()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(direct, held.batch([8, 0])))


def fit(encoder, settings, seed=0, n=40, head=None):
    images, y = bright_or_dark(n)
    data = TaskData(images, 64, lambda rows: dict(y=y[list(rows)]), None if settings.finetune else FrozenFeatures(encoder, images, 64, pooled_feature))
    with own_chance(seed): head = head or LinearHead(encoder.width, 1)
    model, log = train_head(head, encoder, data, settings, range(24), range(24, 32), seed, pooled_feature)
    return model, log, data, y


@pytest.mark.parametrize("finetune", [False, True])
def test_training_leaves_the_world_as_it_was(encoder, finetune, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv("TMPDIR", str(tmp_path))
    states = lambda: (random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist(), torch.is_grad_enabled())
    before, weights, flags = states(), weights_hash(encoder), [p.requires_grad for p in encoder.parameters()]
    model, log, data, y = fit(encoder, HeadSettings(epochs=3, finetune=finetune, lr=1e-2, encoder_lr=1e-3))
    assert states() == before and weights_hash(encoder) == weights and [p.requires_grad for p in encoder.parameters()] == flags
    assert encoder.training and all(p.grad is None for p in encoder.parameters()) and not list(tmp_path.iterdir())
    assert (model.encoder is None) != finetune and not model.training
    assert capfd.readouterr() == ("", "")
    again = fit(encoder, HeadSettings(epochs=3, finetune=finetune, lr=1e-2, encoder_lr=1e-3))[0]
    assert weights_hash(model) == weights_hash(again)
    assert weights_hash(model) != weights_hash(fit(encoder, HeadSettings(epochs=3, finetune=finetune, lr=1e-2, encoder_lr=1e-3), seed=1)[0])


def test_the_best_epoch_is_kept_and_training_stops_after_it(encoder):
    model, log, data, y = fit(encoder, HeadSettings(lr=3., epochs=40, patience=3)) # far too large a step
    assert log["epochs"] == min(40, log["epoch"] + 3)
    scores = torch.cat(predict(model, data, range(24, 32), batch_size=3))
    assert np.isclose(nn.functional.binary_cross_entropy_with_logits(scores, y[24:32]).item(), log["val_loss"], rtol=1e-5)


def test_schedules_and_precisions(encoder):
    runs = {kw: fit(encoder, HeadSettings(epochs=2, **dict(kw)))[1]["val_loss"] for kw in [(), (("schedule", "cosine"),), (("precision", "bf16"),)]}
    assert len(set(runs.values())) == 3 and np.ptp(list(runs.values())) < .5


class Broken(nn.Module):
    def __init__(self): super().__init__(); self.w = nn.Parameter(torch.zeros(1))
    def forward(self, maps, y=None): return dict(loss=self.w.sum() * torch.nan)


def test_a_loss_that_is_never_finite_is_an_error(encoder):
    with pytest.raises(ValueError, match="the validation loss was not finite in any of 2 epochs: lower the learning rate"):
        fit(encoder, HeadSettings(epochs=2), head=Broken())


def test_a_frozen_encoder_is_not_part_of_the_model(encoder):
    assert not any("encoder" in name for name, _ in fit(encoder, HeadSettings(epochs=1))[0].named_parameters())
    assert EncoderHead(nn.Identity())(maps=(1,)) == (1,)


def make_studies(n=120): return [Study(f"s{i:03}", Path("none"), f"p{i // 2}", labels=dict(a=float(i % 3 == 0))) for i in range(n)]


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_transfer import count_cells
count_cells(sys.argv[2], sys.argv[3], stop=lambda: time.sleep(600))
"""


def count_cells(folder, log, stop=lambda: None):
    studies = make_studies()
    def fit(train, validation, test, seed):
        with open(log, "a") as f: f.write(f"{len(train)} {seed}\n")
        if seed == 1: stop()
        return dict(value=float(train.sum() + seed)), dict(x=train * 2.)
    return over_fractions(fit, studies, split_studies(studies), (.1, 1.), (0, 1), folder=folder, progress=False)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_at_the_next_cell(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, Path(__file__).parent, tmp_path / "cells", tmp_path / "first"])
    until = time.monotonic() + 120
    while not (tmp_path / "first").exists() or (tmp_path / "first").read_text().count("\n") < 2:
        assert time.monotonic() < until and process.poll() is None, "it never came to its second cell"
        time.sleep(.05)
    process.send_signal(signal.SIGKILL); process.wait()
    assert len(list(tmp_path.glob("cells/*.npz"))) == 1
    resumed, whole = count_cells(tmp_path / "cells", tmp_path / "second"), count_cells(tmp_path / "other", tmp_path / "third")
    assert resumed[0] == whole[0] and all(np.array_equal(resumed[1][k], v) for k, v in whole[1].items())
    assert (tmp_path / "second").read_text() == "8 1\n84 0\n84 1\n" and not list(tmp_path.glob("cells/*.partial"))


def test_a_cell_is_of_what_it_depends_on(tmp_path):
    studies, calls, images = make_studies(), [], np.zeros((120, 4, 4), np.uint8)
    def fit(*parts): calls.append(parts); return dict(value=len(calls)), {}
    run = lambda **kw: over_fractions(fit, **{**dict(studies=studies, split=split_studies(studies), fractions=(.5,), seeds=(0,), folder=tmp_path, progress=False), **kw})[0][0]["value"]
    assert run() == run() == 1
    others = [dict(split=split_studies(studies, seed=1)), dict(seeds=(1,)), dict(fractions=(.4,)), dict(identity=dict(lr=1)), dict(identity=dict(lr=2)), dict(stratify="a"),
              dict(stratify=np.arange(120) % 10 == 0), dict(data=[images]), dict(data=[images + 1]), dict(data=[images, images]), dict(studies=[replace(s, patient=s.id) for s in studies])]
    assert [run(**kw) for kw in others] == list(range(2, 13)) == [run(**kw) for kw in others]


def test_arrays_have_names():
    a = np.arange(600 * 4, dtype=np.uint8).reshape(600, 2, 2)
    other = a.copy()
    other[599, 1, 1] += 1
    names = [arrays_hash(x) for x in (a, other, a.reshape(600, 4), a.astype(np.int16), a[:0], a[::-1])]
    assert len({*names, arrays_hash(a, a), arrays_hash()}) == 8 and arrays_hash(a.copy()) == arrays_hash(a.transpose(0, 2, 1).transpose(0, 2, 1)) == names[0]


def test_rows_are_json_and_arrays_come_back(tmp_path):
    studies = make_studies()
    fit = lambda train, validation, test, seed: (dict(value=np.float64(1) / 3, n=np.int64(4), none=np.nan, nested=dict(a=np.float32(.5))), dict(x=np.arange(3, dtype=np.int16), s=np.array(["ä"])))
    a = over_fractions(fit, studies, split_studies(studies), (1.,), (0,), folder=tmp_path, progress=False)
    b = over_fractions(None, studies, split_studies(studies), (1.,), (0,), folder=tmp_path, progress=False)
    assert json.dumps(a[0]) == json.dumps(b[0]) and a[0][0]["value"] == 1 / 3 and a[0][0]["nested"] == dict(a=.5)
    assert all(np.array_equal(b[1][k], v) and b[1][k].dtype == v.dtype for k, v in a[1].items()) and f"{score_key(1., 0)} s" in b[1]


def test_a_cell_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"): save_cell(tmp_path / "c.npz", {}, {})
    monkeypatch.undo()
    assert not list(tmp_path.iterdir())
    save_cell(tmp_path / "c.npz", dict(a=1), dict(b=np.ones(2)))
    row, arrays = load_cell(tmp_path / "c.npz")
    assert row == dict(a=1) and arrays["b"].tolist() == [1, 1]


def test_weights_have_names(encoder):
    other = ImageEncoder(image_config("resnet-tiny", 64), 64)
    assert weights_hash(encoder) == weights_hash(encoder) != weights_hash(other)
    other.load_state_dict(encoder.state_dict())
    assert weights_hash(encoder) == weights_hash(other)
    next(b for n, b in other.named_buffers() if n.endswith("running_mean")).add_(1e-3)
    assert weights_hash(encoder) != weights_hash(other)


def test_an_empty_part_is_named():
    studies = make_studies()
    split = split_studies(studies)
    with pytest.raises(ValueError, match="the part 'test' has no study: make another split"):
        over_fractions(None, studies, replace(split, parts=dict(split.parts, test=())), progress=False)


def test_finetuned_classification_rows_fit_the_frozen_ones(encoder):
    images, y = bright_or_dark(90)
    kind = np.eye(3)[np.arange(90) % 3]
    studies = [Study(f"s{i:02}", Path("none"), f"p{i}", labels=dict(zip("abc", k.tolist()))) for i, k in enumerate(kind)]
    run = partial(evaluate_finetuned_classification, encoder, images, 64, kind, studies, split_studies(studies), list("abc"), (.5,), (0,), progress=False, n_bootstrap=20)
    rows, kept = run(settings=HeadSettings(epochs=1, finetune=True), exclusive=True)
    assert rows[0]["metric"] == "accuracy" and kept[score_key(.5, 0)].shape == kept["y"].shape == (len(kept["ids"]), 3)
    rows, kept = run(settings=HeadSettings(epochs=1, finetune=True))
    assert rows[0]["metric"] == "auroc" and {"fraction", "seed", "n_train", "n_test", "value", "low", "high", "split", "draw", "findings"} <= set(rows[0])
    with pytest.raises(ValueError, match="90 images, 89 labels and 90 studies"):
        evaluate_finetuned_classification(encoder, images, 64, kind[1:], studies, split_studies(studies), list("abc"))


def test_real_boxes_and_masks(shared_data):
    folder = shared_data / "covid-chestxray-dataset"
    if not folder.is_dir(): pytest.skip(f"{folder} is not there")
    studies = load_covid_cxr(folder)
    boxed, masked = [s for s in studies if s.boxes], [s for s in studies if s.masks]
    assert (len(boxed), sum(len(s.boxes) for s in boxed), len(masked)) == (155, 310, 192)
    for s in boxed:
        boxes, labels = boxes_on_square(s, 144)
        assert sorted(labels) == ["left lung", "right lung"] and (boxes[:, 2:] - boxes[:, :2]).min() > 20
    for s in boxed[::10]: assert image_shape(s.image) == read_image(s.image).shape
    share = [mask_on_square(s, ["lungs"], 64).mean() for s in masked]
    assert .05 < min(share) and max(share) < .6
