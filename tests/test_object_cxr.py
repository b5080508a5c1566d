"Object-CXR: shapes against slow references, LoVT's real boxes, synthetic studies written and read, and broken tables."
import csv
import logging
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cmcgns.data.object_cxr import (
    LABEL, BadRow, Shape, draw_runs, find_object_cxr, load_object_cxr, make_box, published_object_cxr, read_annotation, read_shape, read_tables, scan_object_cxr, trace_mask, write_annotation,
    write_object_cxr,
)
from cmcgns.data.studies import Box, Runs, check_disjoint, load_studies, read_mask, save_studies, select
from cmcgns.data.synthetic import synthesize
from cmcgns.image import read_image
from PIL import Image, ImageDraw

# shapes


def inside(shape, x, y):
    "Whether a point is in a shape, asked point by point, polygons along horizontal rays."
    if shape.kind == "rectangle":
        return shape.xs[0] <= x < shape.xs[1] and shape.ys[0] <= y < shape.ys[1]
    if shape.kind == "ellipse":
        (x1, x2), (y1, y2) = shape.xs, shape.ys
        return ((x - (x1 + x2) / 2) / ((x2 - x1) / 2)) ** 2 + ((y - (y1 + y2) / 2) / ((y2 - y1) / 2)) ** 2 < 1
    odd, n = False, len(shape.xs)
    for i in range(n):
        (x1, y1), (x2, y2) = (shape.xs[i], shape.ys[i]), (shape.xs[(i + 1) % n], shape.ys[(i + 1) % n])
        if (y1 > y) != (y2 > y) and x < x1 + (y - y1) * (x2 - x1) / (y2 - y1):
            odd = not odd
    return odd


def on_an_edge(shape, x, y):
    "Whether a point is on an edge of a polygon, where a ray may go either way."
    if shape.kind != "polygon":
        return False
    p = np.stack([shape.xs, shape.ys], 1)
    along = np.roll(p, -1, 0) - p
    at = np.clip((([x, y] - p) * along).sum(1) / np.maximum((along ** 2).sum(1), 1e-12), 0, 1)
    return np.hypot(*([x, y] - p - at[:, None] * along).T).min() < 1e-9


def slow_mask(shapes, h, w):
    return np.array([[any(inside(s, x + .5, y + .5) for s in shapes) for x in range(w)] for y in range(h)])


def drawn(shapes, h, w):
    return read_mask(draw_runs(shapes, h, w))


@pytest.mark.parametrize("seed", range(60))
def test_masks_against_a_slow_reference(seed):
    "Random shapes, partly outside of the image, polygons that cross themselves among them; whole and broken numbers."
    rng = np.random.default_rng(seed)
    h, w = rng.integers(5, 40, 2).tolist()
    shapes = []
    for kind in rng.choice(["rectangle", "ellipse", "polygon"], rng.integers(1, 4)).tolist():
        n = int(rng.integers(3, 9)) if kind == "polygon" else 2
        xs, ys = rng.uniform(-5, w + 5, n), rng.uniform(-5, h + 5, n)
        if kind != "polygon":
            xs, ys = np.sort(xs) + [0, 1], np.sort(ys) + [0, 1]
        if seed % 2:
            xs, ys = xs.round(), ys.round()
        shapes.append(Shape(kind, tuple(xs.tolist()), tuple(ys.tolist())))
    differ = np.argwhere(drawn(shapes, h, w) != slow_mask(shapes, h, w)).tolist()
    assert all(any(on_an_edge(s, x + .5, y + .5) for s in shapes) for y, x in differ) and len(differ) < .1 * h * w and not (differ and seed % 2 == 0)


@pytest.mark.parametrize("a, b", [(3, 5), (20, 8), (151, 60.5), (400, 700)])
def test_area_of_an_ellipse(a, b):
    area = drawn([Shape("ellipse", (10, 10 + 2 * a), (7, 7 + 2 * b))], 1500, 900).sum()
    assert abs(area - math.pi * a * b) < 2 + .3 * (a + b)


@pytest.mark.parametrize("seed", range(5))
def test_area_of_a_polygon(seed):
    "A star around (500, 500), by the shoelace formula."
    rng = np.random.default_rng(seed)
    angle, r = np.sort(rng.uniform(0, 2 * np.pi, 12)), rng.uniform(150, 450, 12)
    xs, ys = 500 + r * np.cos(angle), 500 + r * np.sin(angle)
    area = abs(xs @ np.roll(ys, 1) - ys @ np.roll(xs, 1)) / 2
    assert abs(drawn([Shape("polygon", tuple(xs.tolist()), tuple(ys.tolist()))], 1000, 1000).sum() / area - 1) < .005


def test_another_program_draws_the_same_but_for_the_rim():
    "Pillow puts coordinates into the middle of pixels and draws the outline as well."
    shapes = read_annotation("0 40 60 240 220;1 300 40 560 380;2 80 380 300 400 340 560 180 500 60 570")
    image = Image.new("1", (600, 600))
    draw = ImageDraw.Draw(image)
    draw.rectangle([40, 60, 240, 220], fill=1), draw.ellipse([300, 40, 560, 380], fill=1), draw.polygon([80, 380, 300, 400, 340, 560, 180, 500, 60, 570], fill=1)
    ours, theirs = drawn(shapes, 600, 600), np.asarray(image)
    around = np.stack([np.roll(ours, (dy, dx), (0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
    rim = around.any(0) & ~around.all(0)
    assert (ours & theirs).sum() / (ours | theirs).sum() > .98 and not ((ours != theirs) & ~rim).any() and not rim.all()


def test_a_mask_is_as_large_as_its_box():
    for text in "0 3 4 17 9", "1 3 4 17 9", "2 3 4 17 5 9 9", "2 3 4 17 4 17 9 3 9":
        shape = read_shape(text)
        box, mask = make_box(shape, (30, 20)), drawn([shape], 20, 30)
        ys, xs = np.nonzero(mask)
        assert box == (LABEL, 3, 4, 14, 5) and xs.min() >= 3 and xs.max() < 17 and ys.min() >= 4 and ys.max() < 9 and mask.any()


def test_cut_at_the_image():
    shape = read_shape("1 -10 -10 10 10")
    with pytest.raises(BadRow, match=r"its middle \(0, 0\) is outside of the image of 40 × 30 pixels"):
        make_box(shape, (40, 30))
    assert make_box(read_shape("1 -9 -10 11 12"), (40, 30)) == (LABEL, 0, 0, 11, 12)
    assert abs(drawn([shape], 30, 40).sum() - math.pi * 100 / 4) < 5 and drawn([read_shape("0 50 0 60 9")], 30, 40).sum() == 0
    assert draw_runs([], 30, 40) == Runs(30, 40, (), ())


def test_edges_through_the_middle_of_pixels():
    "Rectangles side by side share no pixel and leave none out."
    left, right, below = (drawn([read_shape(f"0 {text}")], 12, 12) for text in ("0.5 0.5 3.5 3.5", "3.5 0.5 7.5 3.5", "0.5 3.5 7.5 6.5"))
    assert (left.sum(), right.sum(), below.sum()) == (9, 12, 21) and (left | right | below).sum() == 42


@pytest.mark.parametrize("seed", range(30))
def test_traced_masks_come_back(seed):
    "Noise has holes, islands and pixels that touch at a corner."
    rng = np.random.default_rng(seed)
    mask = rng.random(rng.integers(1, 14, 2)) < rng.choice([.2, .5, .8])
    mask.flat[0] = True
    corners = trace_mask(mask)
    assert np.array_equal(drawn([Shape("polygon", *zip(*corners))], *mask.shape), mask)
    assert {(float(x), float(y)) for x, y in corners} <= {(x, y) for x in range(mask.shape[1] + 1) for y in range(mask.shape[0] + 1)}


# LoVT's lists: boxes of the real films

@pytest.fixture(scope="module")
def lovt(shared_data):
    "Boxes (x, y, w, h) by list and id."
    lists = {}
    for part in "train", "validation", "test":
        with open(shared_data / "splits" / "lovt" / "object_cxr" / f"{part}.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        lists[part] = {r["ID"]: [tuple(map(float, b.split(";"))) for b in r["boxes"].split("|") if b] for r in rows}
        assert len(lists[part]) == len(rows)
    return lists


def test_counts_of_lovts_lists(lovt):
    assert {k: (len(v), sum(map(bool, v.values())), sum(map(len, v.values()))) for k, v in lovt.items()} == {"train": (6400, 3190, 6506), "validation": (1600, 810, 1717), "test": (1000, 500, 1015)}
    assert set(lovt["train"]) | set(lovt["validation"]) == {f"{i:05d}" for i in range(1, 8001)} and set(lovt["test"]) == {f"{i:05d}" for i in range(8001, 9001)}
    boxes = [b for v in lovt.values() for bs in v.values() for b in bs]
    outside = [-min(b[:2]) for b in boxes if min(b[:2]) < 0]
    assert len(boxes) == 9238 and min(min(b[2:]) for b in boxes) == 13 and (len(outside), min(outside), max(outside)) == (16, 2, 24)
    assert 300 < np.median([math.sqrt(b[2] * b[3]) for b in boxes]) < 400


def test_real_boxes_written_in_the_publishers_layout(lovt, tmp_path):
    "9,000 rows: ids as LoVT's, boxes as they were."
    everything = {i: b for v in lovt.values() for i, b in v.items()}
    for part, ids in ("train", range(1, 8001)), ("dev", range(8001, 9001)):
        rows = [f"{i:05d}.jpg," + ";".join(f"0 {x:g} {y:g} {x + w:g} {y + h:g}" for x, y, w, h in everything[f"{i:05d}"]) for i in ids]
        (tmp_path / f"{part}.csv").write_text("image_name,annotation\n" + "\n".join(rows) + "\n")
    found = scan_object_cxr(tmp_path, on_missing="raise", need_images=False)
    assert str(found) == "object_cxr: 9000 studies; rows skipped: none"
    assert {s.id: [b[1:] for b in s.boxes] for s in found.studies} == everything
    split = published_object_cxr(tmp_path, need_images=False)
    assert split.counts() == {"train": 8000, "dev": 1000} and set(split.parts["dev"]) == set(lovt["test"])
    assert {part: Counter(s.labels[LABEL] for s in select(found.studies, split, part)) for part in split.parts} == {"train": {1.: 4000, 0.: 4000}, "dev": {1.: 500, 0.: 500}}


# synthetic studies, written and read

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "200 synthetic studies with objects: theirs, and where they have none, sometimes one of ours, with its mask or without."
    studies, size = [], 128
    for i, s in enumerate(synthesize(200, tmp_path_factory.mktemp("world"), size=size, masks=True)):
        if not any(b.label == LABEL for b in s.boxes) and i % 2:
            rng = np.random.default_rng(i)
            (x1, x2), (y1, y2) = (np.sort(rng.choice(size + 1, 2, replace=False)).tolist() for _ in range(2))
            mask = drawn([Shape("rectangle", (x1, x2), (y1, y2))], size, size)
            mask[y1 + (y2 - y1) // 3:y1 + (y2 - y1) // 2, x1 + 1:x2 - 1] = False # a hole
            kept = {k: m for k, m in s.masks.items() if not k.startswith(LABEL)}
            edges = np.flatnonzero(np.diff(np.pad(mask.T.ravel().astype(int), 1))) # the mask as runs
            runs = Runs(size, size, tuple(edges[::2].tolist()), tuple((edges[1::2] - edges[::2]).tolist()))
            s = replace(s, boxes=(*s.boxes, Box(LABEL, x1, y1, x2 - x1, y2 - y1)), labels=dict(s.labels) | {LABEL: 1.}, masks=kept | ({LABEL: runs} if i % 4 == 1 else {}))
        studies.append(s)
    return studies


def objects_of(s):
    return [b for b in s.boxes if b.label == LABEL]


def test_roundtrip(world, tmp_path):
    root = write_object_cxr(world, tmp_path / "object_cxr")
    assert find_object_cxr(tmp_path) == root
    found = scan_object_cxr(root, masks=True, on_missing="raise")
    again, masked, several = {s.id: s for s in found.studies}, 0, 0
    assert found.skipped == [] and set(again) == {s.id for s in world}
    for s in world:
        other = again[s.id]
        assert other.labels == {LABEL: float(bool(objects_of(s)))} and len(other.boxes) == len(objects_of(s))
        several += len(other.boxes) > 1
        for a, b in zip(other.boxes, objects_of(s)):
            assert a.label == LABEL and np.abs(np.subtract(a[1:], b[1:])).max() <= 1
        truth = [read_mask(m) for k, m in s.masks.items() if k.startswith(LABEL)]
        if truth:
            a, b = read_mask(other.masks[LABEL]), np.logical_or.reduce(truth)
            assert (a & b).sum() / (a | b).sum() >= .99 and np.array_equal(a, b)
            masked += 1
        elif objects_of(s):
            a, b = read_mask(other.masks[LABEL]), np.zeros((128, 128), bool)
            for box in objects_of(s):
                b[box.y:box.y + box.h, box.x:box.x + box.w] = True
            assert np.array_equal(a, b)
        else:
            assert other.masks == {} and other.boxes == ()
        assert other.image.suffix == ".jpg" and np.abs(read_image(other.image).astype(int) - read_image(s.image)).mean() < 6
    assert masked >= 20 and several >= 5
    check_disjoint([replace(s, patient=p.patient) for s, p in zip(sorted(found.studies, key=lambda s: s.id), sorted(world, key=lambda s: s.id))], published_object_cxr(root))
    save_studies(found.studies, tmp_path / "studies.jsonl")
    assert load_studies(tmp_path / "studies.jsonl") == found.studies


def test_what_cannot_be_written(world, tmp_path):
    s = replace(world[0], boxes=(Box(LABEL, 10, 20, 5, 6),), labels={}, masks={})
    assert write_annotation(s) == "0 10 20 15 26" and write_annotation(replace(s, boxes=())) == "" and write_annotation(replace(s, boxes=(Box("ECG wires", 10, 20, 5, 6),))) == ""
    with pytest.raises(ValueError, match="is labelled 0 for 'foreign object' and has 1 such boxes: a positive study has one an object, a negative none"):
        write_annotation(replace(s, labels={LABEL: 0.}))
    with pytest.raises(ValueError, match=r"has a box at \(10, 20\) without a pixel of the mask in it: box and mask do not belong together"):
        write_annotation(replace(s, masks={LABEL: Runs(128, 128, (0,), (3,))}))
    with pytest.raises(ValueError, match="has 3 pixels of the mask outside of its boxes: each object needs a box"):
        write_annotation(replace(s, masks={LABEL: Runs(128, 128, (0, 12 * 128 + 22), (3, 2))}))
    with pytest.raises(ValueError, match="would be empty"):
        write_object_cxr(world[:1], tmp_path)


# folders in other shapes, and broken ones

HEADER = "image_name,annotation\n"


def make(root, train="00001.jpg,0 2 3 10 12\n00002.jpg,\n", dev="08001.jpg,1 2 2 8 8\n", header=HEADER, lost=(), size=(40, 30), folder=None):
    for part, text in ("train", train), ("dev", dev):
        (root / part).mkdir(parents=True, exist_ok=True)
        if text is None:
            continue
        (root / f"{part}.csv").write_bytes((header + text).encode() if isinstance(text, str) else text)
        for name in {line.split(",")[0] for line in text.splitlines()} - set(lost) if isinstance(text, str) else ():
            if name.endswith(".jpg"):
                (root / (folder or part)).mkdir(exist_ok=True)
                Image.new("L", size, 90).save(root / (folder or part) / Path(name).name)
    return root


def one_sentence_of(root, **kwargs):
    "Scan, and check that the error is one sentence."
    try:
        return scan_object_cxr(root, **kwargs)
    except (ValueError, FileNotFoundError) as e:
        assert "\n" not in str(e) and ". " not in str(e) and len(str(e)) < 700, str(e)
        raise


def test_missing_folders_tables_and_columns(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: there is no such folder; expected train.csv and dev.csv of Object-CXR"):
        one_sentence_of(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="train.csv: there is no such file; expected train.csv and dev.csv"):
        one_sentence_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="dev.csv: there is no such file; expected train.csv and dev.csv"):
        one_sentence_of(make(tmp_path / "a", dev=None))
    with pytest.raises(ValueError, match="train.csv: column 'image_name' is missing, the columns are name, annotation"):
        one_sentence_of(make(tmp_path / "b", header="name,annotation\n"))
    with pytest.raises(ValueError, match="train.csv: column 'annotation' is missing, the columns are image_name, boxes"):
        one_sentence_of(make(tmp_path / "c", header="image_name,boxes\n"))
    with pytest.raises(ValueError, match="train.csv, row 3: it ends before 'annotation', 2 fields were expected"):
        one_sentence_of(make(tmp_path / "d", train="00001.jpg,0 2 3 10 12\n00002.jpg\n"))
    for i, junk in enumerate([b"", b"\x00\x01\x02", b"<!DOCTYPE html><html>Not Found</html>"]):
        with pytest.raises(ValueError, match="column 'image_name' is missing|not CSV"):
            one_sentence_of(make(tmp_path / f"e{i}", train=junk))
    with pytest.raises(ValueError, match=r"none of 0 rows became a study \(mostly: the tables are empty\)"):
        one_sentence_of(make(tmp_path / "f", "", ""))


def test_settings_that_do_not_exist(tmp_path):
    with pytest.raises(ValueError, match="on_missing is 'ignore': known are 'skip' and 'raise'"):
        one_sentence_of(tmp_path, on_missing="ignore")
    with pytest.raises(ValueError, match="masks=True needs the size of the images: leave need_images=True"):
        one_sentence_of(tmp_path, masks=True, need_images=False)


def test_missing_and_unreadable_images(tmp_path):
    root = make(tmp_path / "a", lost=("00001.jpg",))
    assert [(s.row, s.name, s.reason, s.broken) for s in scan_object_cxr(root).skipped] == [(2, "train/00001.jpg", "no such image", True)]
    with pytest.raises(FileNotFoundError, match="train.csv, row 2: no such image; expected 00001.jpg in train/; get it again, or load with on_missing='skip'"):
        one_sentence_of(root, on_missing="raise")
    (root / "train" / "00001.jpg").write_bytes(b"Not Found")
    assert [(s.row, s.reason) for s in scan_object_cxr(root).skipped] == [(2, "not an image")]
    with pytest.raises(ValueError, match="train.csv, row 2, 00001.jpg: not an image; expected one row an image"):
        one_sentence_of(root, on_missing="raise")
    assert [s.id for s in scan_object_cxr(root, need_images=False).studies] == ["00001", "00002", "08001"]
    with pytest.raises(ValueError, match=r"none of 3 rows became a study \(mostly: 3 no such image\); check that train/ and dev/ hold the images of train.csv and dev.csv"):
        one_sentence_of(make(tmp_path / "b", lost=("00001.jpg", "00002.jpg", "08001.jpg")))
    root = make(tmp_path / "c", train=",0 2 3 10 12\n00002.jpg,\n")
    assert [(s.row, s.name, s.reason) for s in scan_object_cxr(root, need_images=False).skipped] == [(2, "train/", "no such image")]


@pytest.mark.parametrize("annotation, reason, whole", [
    ("0 2 3 10", "rectangle with 3 coordinates", "object 1: rectangle with 3 coordinates"),
    ("0 2 3 10 12 14", "rectangle with 5 coordinates", "object 1: rectangle with 5 coordinates"),
    ("0", "rectangle with 0 coordinates", "object 1: rectangle with 0 coordinates"),
    ("1 2 3 10 12 5 6", "ellipse with 6 coordinates", "object 1: ellipse with 6 coordinates"),
    ("0 2 3 10 12;2 1 1 9 9 5", "polygon with 5 coordinates", "object 2: polygon with 5 coordinates"),
    ("2 1 1 9 9", "polygon with 4 coordinates", "object 1: polygon with 4 coordinates"),
    ("2 1 1 9 1 5 1", "polygon without an area", r"object 1: polygon without an area at \(1, 1\)"),
    ("0 2 3 2 12", "rectangle without an area", r"object 1: rectangle without an area at \(2, 3\)"),
    ("0 10 3 2 12", "rectangle with its corners swapped", r"object 1: rectangle with its corners swapped, \(10, 3\) before \(2, 12\)"),
    ("0 two 3 10 12", "'two' among the coordinates", "object 1: 'two' among the coordinates"),
    ("0 2,3 10 12", "'2", ""), ("0 2 3 inf 12", "'inf' among the coordinates", "object 1: 'inf' among the coordinates"),
    ("3 2 3 10 12", "shape code '3'", "object 1: shape code '3'"), ("rect 2 3 10 12", "shape code 'rect'", "object 1: shape code 'rect'"), ("0.0 2 3 10 12", "shape code '0.0'", ""),
    ("0 2 3 10 12;;1 2 3 10 12", "shape code ''", "object 2: shape code ''"), ("nan", "shape code 'nan'", ""), ("none", "shape code 'none'", ""),
    ("0 2 3 10 12;0 60 3 70 12", "object outside of the image", r"object 2: its middle \(65, 7.5\) is outside of the image of 40 × 30 pixels"),
    ("0 -20 -20 5 5", "object outside of the image", r"object 1: its middle \(-7.5, -7.5\) is outside of the image of 40 × 30 pixels"),
])
def test_annotations_that_cannot_be_read(tmp_path, annotation, reason, whole):
    root = make(tmp_path, train=f'00001.jpg,"{annotation}"\n00002.jpg,\n')
    skipped, = scan_object_cxr(root).skipped
    assert (skipped.row, skipped.name, skipped.broken) == (2, "train/00001.jpg", True) and skipped.reason.startswith(reason)
    with pytest.raises(ValueError, match=f"train.csv, row 2, 00001.jpg: {whole}.*; expected one row an image and objects separated by ';', each '0 x1 y1 x2 y2' .rectangle.*load with on_missing='skip'"):
        one_sentence_of(root, on_missing="raise")


def test_a_resized_set_is_noticed_and_counted_in_one_line(tmp_path):
    rows = "".join(f"{i:05d}.jpg,0 {1000 + i} 900 {1100 + i} 1000\n" for i in range(1, 6))
    assert str(scan_object_cxr(make(tmp_path, train=rows + "00009.jpg,\n"))) == "object_cxr: 2 studies; rows skipped: 5 object outside of the image"


def test_harmless_oddities(tmp_path):
    root = make(tmp_path, train="00001.jpg, 0 2 3 10 12 ; 1  4 4 8.5 9;\r\n00002.jpg,  \r\n", header="\ufeffimage_name , annotation\r\n")
    one, two, _ = scan_object_cxr(root, masks=True, on_missing="raise").studies
    assert one.boxes == ((LABEL, 2, 3, 8, 9), (LABEL, 4, 4, 4.5, 5)) and two.boxes == () and two.masks == {} and two.labels == {LABEL: 0.}
    assert (read_mask(one.masks[LABEL]).shape, read_mask(one.masks[LABEL]).sum()) == ((30, 40), 72)


def test_a_little_outside_is_cut(tmp_path):
    root = make(tmp_path, train="00001.jpg,0 30 -3 44 9;1 -4 20 8 34\n")
    s = scan_object_cxr(root, masks=True, on_missing="raise").studies[0]
    assert s.boxes == ((LABEL, 30, 0, 10, 9), (LABEL, 0, 20, 8, 10)) and read_mask(s.masks[LABEL])[:9, 30:].all()
    assert scan_object_cxr(root, need_images=False).studies[0].boxes == ((LABEL, 30, -3, 14, 12), (LABEL, -4, 20, 12, 14))


def test_listed_twice(tmp_path):
    root = make(tmp_path / "a", train="00001.jpg,0 2 3 10 12\n00001.jpg,0 2 3 10 13\n00002.jpg,\n00002.jpg,\n")
    assert [(s.row, s.reason, s.broken) for s in scan_object_cxr(root).skipped] == [(2, "listed with two annotations", True), (3, "listed with two annotations", True), (5, "listed before", False)]
    with pytest.raises(ValueError, match="train.csv, row 2, 00001.jpg: listed with two annotations; expected one row an image"):
        one_sentence_of(root, on_missing="raise")
    root = make(tmp_path / "b", dev="08001.jpg,1 2 2 8 8\n00002.jpg,\n")
    assert [(s.row, s.name, s.reason, s.broken) for s in scan_object_cxr(root, on_missing="raise").skipped] == [(3, "train/00002.jpg", "also in dev", False)]
    assert published_object_cxr(root).parts == {"train": ("00001",), "dev": ("00002", "08001")}


@pytest.mark.parametrize("folder", ["images", ".", "dev"])
def test_all_images_in_one_folder(tmp_path, folder):
    root = make(tmp_path / "train", folder=folder) # a root that is called like a part
    assert [s.image.parent for s in scan_object_cxr(root, on_missing="raise").studies] == [root / folder] * 3


def test_the_header_of_the_description_and_paths(tmp_path):
    root = make(tmp_path, train="/data/train/00001.jpg,0 2 3 10 12\nC:\\films\\00002.jpg,\n", header="image_path,annotation\n")
    Image.new("L", (40, 30)).save(root / "train" / "00002.jpg")
    assert [r.name for r in read_tables(root)] == ["00001.jpg", "00002.jpg", "08001.jpg"]
    assert [s.id for s in scan_object_cxr(root, on_missing="raise").studies] == ["00001", "00002", "08001"]


def test_tables_of_somebody_else_are_not_ours(tmp_path):
    for i, header in enumerate(["Path,Sex,Age,Frontal/Lateral,AP/PA\n", "patientId,x,y,width,height,Target\n", "", "image_name,label\n", "annotation\n"]):
        make(tmp_path / str(i), "", "", header)
    (tmp_path / "9" / "train.csv").mkdir(parents=True)
    assert find_object_cxr(tmp_path) is None and find_object_cxr(tmp_path / "none") is None
    root = make(tmp_path / "a")
    assert find_object_cxr(tmp_path) == find_object_cxr(root) == root


def test_what_was_skipped_is_one_line_of_the_log(tmp_path, caplog, monkeypatch):
    make(tmp_path / "a", lost=("00002.jpg",))
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, "cmcgns"):
        studies = load_object_cxr("a")
    assert [r.getMessage() for r in caplog.records] == ["object_cxr: 2 studies; rows skipped: 1 no such image"]
    assert studies[0].image == Path("a/train/00001.jpg") and studies[0].patient == studies[0].id == "00001" and studies[0].dataset == "object_cxr"
