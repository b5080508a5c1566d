"RSNA pneumonia: exact counts on the real table, broken trees, and 200 synthetic studies there and back."
import csv
import gzip
import json
import logging
import os
import shutil
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from conftest import one_sentence
from cmcgns.data.rsna import (CLASSES, IMAGES, PEOPLE, SIZE, TABLE, box_runs, boxes_mask, common_size, find_rsna, list_images, load_rsna, native_size, read_views,
                              scan_rsna, unite_runs, write_dicom, write_rsna)
from cmcgns.data.studies import Box, Study, check_disjoint, fingerprint, load_studies, read_mask, save_studies, split_studies
from cmcgns.data.synthetic import synthesize
from cmcgns.image import read_image
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

HEADER = "patientId,x,y,width,height,Target\n"
ROW = "a,10.0,20.0,30.0,40.0,1\n"


@pytest.fixture(scope="module")
def labels(shared_data):
    return shared_data / "labels" / "rsna"


@pytest.fixture(scope="module")
def real(labels):
    return scan_rsna(labels, need_images=False, on_missing="raise", masks=True)


# the real table

def test_known_counts(real, labels):
    with zipfile.ZipFile(labels / f"{TABLE}.zip") as z:
        assert len(z.read(TABLE).splitlines()) == 30_227 + 1
    assert len(real.studies) == 26_684 and real.skipped == [] and str(real) == "rsna: 26684 studies; rows skipped: none"
    assert len({s.id for s in real.studies}) == len({s.patient for s in real.studies}) == 26_684 and all(s.id == s.patient for s in real.studies)
    assert Counter(s.labels["Pneumonia"] for s in real.studies) == {1.: 6_012, 0.: 20_672}
    assert sum(len(s.boxes) for s in real.studies) == 9_555
    assert Counter(len(s.boxes) for s in real.studies) == {0: 20_672, 1: 2_614, 2: 3_266, 3: 119, 4: 13}
    assert all(bool(s.boxes) == bool(s.labels["Pneumonia"]) and s.dataset == "rsna" for s in real.studies)


def test_boxes_are_whole_pixels_inside_of_the_image(real):
    b = np.array([b[1:] for s in real.studies for b in s.boxes])
    assert (b % 1 == 0).all() and b[:, :2].min() == 2 and (b[:, :2] + b[:, 2:]).max(0).tolist() == [1024, 1024] and b[:, 2:].min(0).tolist() == [40, 45]


def test_every_real_box_is_in_its_mask_and_nothing_else(real):
    positive = [s for s in real.studies if s.boxes]
    for s in positive[::40] + [s for s in positive if len(s.boxes) > 3]:
        painted = np.zeros(SIZE, bool)
        for b in s.boxes:
            painted[int(b.y):int(b.y + b.h), int(b.x):int(b.x + b.w)] = True
        assert np.array_equal(read_mask(s.masks["Pneumonia"]), painted)
    for s in positive:
        if len(s.boxes) < 3: # the area of one or two boxes, less what both cover
            a, b = s.boxes[0], s.boxes[-1]
            both = max(0, min(a.x + a.w, b.x + b.w) - max(a.x, b.x)) * max(0, min(a.y + a.h, b.y + b.h) - max(a.y, b.y)) if len(s.boxes) == 2 else 0
            assert sum(s.masks["Pneumonia"].lengths) == sum(c.w * c.h for c in s.boxes) - both
    assert all(s.masks["Pneumonia"].starts == () for s in real.studies if not s.boxes)


def test_the_real_table_is_read_in_seconds(labels):
    start = time.process_time()
    scan_rsna(labels, need_images=False)
    assert time.process_time() - start < 20 # takes about 1.3


def test_published_lists_name_all_studies_and_have_our_boxes(real, shared_data):
    known = {s.id: s for s in real.studies}
    listed = []
    for part in "train", "validation", "test":
        with open(shared_data / "splits" / "lovt" / "rsna" / f"{part}.csv", newline="") as file:
            listed += list(csv.DictReader(file))
    assert len(listed) == len({r["ID"] for r in listed}) == 26_684 and {r["ID"] for r in listed} == set(known)
    for r in listed:
        assert [tuple(map(float, b.split(";"))) for b in r["boxes"].split("|") if b] == [b[1:] for b in known[r["ID"]].boxes]


def test_splits_of_the_real_set(real):
    split = split_studies(real.studies, stratify="Pneumonia")
    check_disjoint(real.studies, split)
    assert abs(split.counts()["test"] / 26_684 - .2) < .001


# there and back

@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return synthesize(200, tmp_path_factory.mktemp("synthetic"), size=128, seed=3)


@pytest.fixture(scope="module")
def tree(synthetic, tmp_path_factory):
    return write_rsna(synthetic, tmp_path_factory.mktemp("rsna") / "rsna")


def opacities(s):
    return [b for b in s.boxes if b.label in ("pneumonia", "consolidation")]


def test_200_studies_there_and_back(synthetic, tree):
    found = scan_rsna(tree, on_missing="raise", masks=True)
    assert len(found.studies) == 200 and found.skipped == [] and find_rsna(tree.parent) == tree
    assert 20 < sum(bool(opacities(s)) for s in synthetic) < 180
    for there, back in zip(synthetic, found.studies):
        boxes = opacities(there)
        assert back.id == there.id and back.patient == there.patient
        assert back.labels["Pneumonia"] == float(bool(boxes)) == max(there.labels.get(k, 0) for k in ("pneumonia", "consolidation"))
        assert back.labels["Normal"] == float(not any(there.labels.values())) and sum(back.labels.values()) == 1
        assert {b[1:] for b in back.boxes} == {b[1:] for b in boxes}
        painted = np.zeros((128, 128), bool)
        for b in boxes:
            painted[b.y:b.y + b.h, b.x:b.x + b.w] = True
        assert np.array_equal(read_mask(back.masks["Pneumonia"]), painted) and np.array_equal(boxes_mask(back, 128, 128), painted)
        assert np.array_equal(read_image(back.image), read_image(there.image))
    assert [s.view for s in read_views(found.studies)] == [s.view for s in synthetic]
    assert 1 < len({s.patient for s in found.studies}) < 200


def test_what_was_loaded_can_be_written_again(tree, tmp_path):
    first = read_views(load_rsna(tree)[:30])
    again = read_views(load_rsna(write_rsna(first, tmp_path / "again")))
    assert [(s.id, s.patient, s.labels, s.boxes, s.view) for s in again] == [(s.id, s.patient, s.labels, s.boxes, s.view) for s in first]
    assert (tmp_path / "again" / IMAGES / f"{first[0].id}.dcm").read_bytes() == first[0].image.read_bytes(), "the same study must give the same file"


def test_studies_of_the_tree_can_be_kept(tree, tmp_path):
    studies = load_rsna(tree, masks=True)
    save_studies(studies, tmp_path / "studies.jsonl")
    assert load_studies(tmp_path / "studies.jsonl") == studies and fingerprint(load_studies(tmp_path / "studies.jsonl")) == fingerprint(studies)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_other_kinds_of_dicom(synthetic, tmp_path, photometric, bits):
    study, = load_rsna(write_rsna(synthetic[:1], tmp_path / "tree", photometric=photometric, bits=bits))
    d = pydicom.dcmread(study.image)
    assert (d.PhotometricInterpretation, d.BitsStored, d.HighBit, d.BitsAllocated) == (photometric, bits, bits - 1, 8 if bits == 8 else 16)
    assert d.PatientID == study.id and d.file_meta.TransferSyntaxUID == "1.2.840.10008.1.2.1" and not d.file_meta.TransferSyntaxUID.is_compressed
    grey = np.asarray(Image.open(synthetic[0].image))
    assert np.array_equal(read_image(study.image), grey)
    assert np.array_equal(np.round((d.pixel_array if photometric == "MONOCHROME2" else 2**bits - 1 - d.pixel_array.astype(int)) * (255 / (2**bits - 1))), grey)


def test_an_odd_number_of_pixels(tmp_path):
    write_dicom(np.arange(35, dtype=np.uint8).reshape(5, 7), tmp_path / "odd.dcm", "p")
    assert np.array_equal(pydicom.dcmread(tmp_path / "odd.dcm").pixel_array.ravel(), range(35)) and native_size(tmp_path / "odd.dcm") == (5, 7)


# masks of boxes

@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29), st.integers(1, 30), st.integers(1, 30)), max_size=6))
def test_boxes_are_painted(h, w, corners):
    boxes = [Box("Pneumonia", x, y, min(bw, w - x), min(bh, h - y)) for x, y, bw, bh in corners if x < w and y < h]
    painted = np.zeros((h, w), bool)
    for b in boxes:
        painted[b.y:b.y + b.h, b.x:b.x + b.w] = True
    runs = box_runs(boxes, h, w)
    assert np.array_equal(read_mask(runs), painted) and sum(runs.lengths) == painted.sum()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 90), st.integers(1, 10)), max_size=20))
def test_runs_are_united(pairs):
    starts, lengths = (np.array([p[k] for p in pairs], np.int64) for k in (0, 1))
    runs = unite_runs(10, 10, starts, lengths)
    assert {i for s, n in zip(runs.starts, runs.lengths) for i in range(s, s + n)} == {i for s, n in pairs for i in range(s, s + n)}
    assert all(a + n < b for a, n, b in zip(runs.starts, runs.lengths, runs.starts[1:])), "runs must not touch"


def test_boxes_between_pixels_are_rounded_and_slivers_vanish():
    assert box_runs([Box("Pneumonia", 1.4, .6, 2.2, 2)], 5, 5) == box_runs([Box("Pneumonia", 1, 1, 3, 2)], 5, 5)
    assert box_runs([Box("Pneumonia", 1.1, 1, .2, 2)], 5, 5).starts == box_runs([Box("Pneumonia", 1, 1.1, 2, .2)], 5, 5).starts == ()
    assert not boxes_mask(Study("s", Path("s.dcm"), "p")).any()


# broken trees

def make_tree(root, rows, header=HEADER, images="ab", ending=".dcm"):
    (root / IMAGES).mkdir(parents=True)
    (root / TABLE).write_bytes((header + rows).encode())
    for name in images:
        image = np.full(SIZE, 90, np.uint8)
        write_dicom(image, root / IMAGES / f"{name}.dcm", name) if ending == ".dcm" else Image.fromarray(image).save(root / IMAGES / f"{name}{ending}")
    return root


def test_no_folder_no_table_no_column(tmp_path):
    for folder in tmp_path / "none", tmp_path:
        with pytest.raises(FileNotFoundError, match=r"there is no stage_2_train_labels.csv \(or .zip, .gz\) in this folder; get it from https://www.kaggle.com") as error:
            scan_rsna(folder)
        one_sentence(error)
    for i, column in enumerate(HEADER.strip().split(",")):
        with pytest.raises(ValueError, match=f"{TABLE}: column '{column}' is missing, the columns are .*; get it from") as error:
            load_rsna(make_tree(tmp_path / str(i), ROW, HEADER.replace(column, "other"), images=""))
        one_sentence(error)


@pytest.mark.parametrize("content, says", [(b"", "column 'patientId' is missing, the columns are none"), (b"<!DOCTYPE html><html>Not Found</html>", "column 'patientId' is missing"),
                                           (HEADER.encode() + b"a,10.0,20.0\n", "row 2: it ends before 'width', 6 fields were expected"),
                                           (HEADER.encode(), "none of 0 images became a study .rows skipped: none.; check that stage_2_train_images.zip is unpacked")])
def test_a_table_that_is_none(tmp_path, content, says):
    (tmp_path / TABLE).write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        load_rsna(tmp_path)
    one_sentence(error)


def test_packed_tables_whole_and_broken(tmp_path):
    root = make_tree(tmp_path / "plain", ROW)
    expected = [(s.id, s.boxes) for s in load_rsna(root)]
    text = (root / TABLE).read_bytes()
    (root / TABLE).unlink()
    (root / f"{TABLE}.gz").write_bytes(gzip.compress(text))
    assert [(s.id, s.boxes) for s in load_rsna(root)] == expected and find_rsna(tmp_path) == root
    (root / f"{TABLE}.gz").write_bytes(gzip.compress(text)[:-12])
    with pytest.raises(ValueError, match=r"stage_2_train_labels.csv.gz: it cannot be read as a table \(.*\); get it from") as error:
        load_rsna(root)
    one_sentence(error)
    (root / f"{TABLE}.gz").unlink()
    with zipfile.ZipFile(root / f"{TABLE}.zip", "w") as z:
        z.writestr(TABLE, text)
    assert [(s.id, s.boxes) for s in load_rsna(root)] == expected and find_rsna(tmp_path) == root
    with zipfile.ZipFile(root / f"{TABLE}.zip", "a") as z:
        z.writestr("other.csv", text)
    with pytest.raises(ValueError, match="stage_2_train_labels.csv.zip: it holds 2 files, one was expected"):
        load_rsna(root)
    (root / f"{TABLE}.zip").write_bytes(b"PK half a download")
    with pytest.raises(ValueError, match="stage_2_train_labels.csv.zip: it cannot be read as a table") as error:
        load_rsna(root)
    one_sentence(error)


def test_marks_and_line_ends_of_windows(tmp_path):
    root = make_tree(tmp_path / "a", "")
    (root / TABLE).write_bytes(b"\xef\xbb\xbf" + (HEADER + ROW).replace("\n", "\r\n").replace(",", " , ").encode())
    study, = load_rsna(root)
    assert study.id == "a" and study.boxes == (Box("Pneumonia", 10, 20, 30, 40),)


@pytest.mark.parametrize("rows, row, reason", [("a,,,,,2\n", 2, "Target is neither 0 nor 1"), ("a,,,,,\n", 2, "Target is neither 0 nor 1"), ("a,1,2,3,4,0\n", 2, "Target 0 with a box"),
                                               ("a,,,,,1\n", 2, "Target 1 without a box"), ("a,1,2,,4,1\n", 2, "a box that is not four numbers"), ("a,1,2,x,4,1\n", 2, "a box that is not four numbers"),
                                               ("a,1,2,nan,4,1\n", 2, "a box that is not four numbers"), ("a,1,2,inf,4,1\n", 2, "a box that is not four numbers"),
                                               ("a,1,2,-3,4,1\n", 2, "a box without size"), ("a,1,2,3,0,1\n", 2, "a box without size"), ("a,-1,2,3,4,1\n", 2, "a box that leaves the 1024 × 1024 pixels"),
                                               ("a,1000,2,25,4,1\n", 2, "a box that leaves the 1024 × 1024 pixels"), ("a,1,1000,3,25,1\n", 2, "a box that leaves the 1024 × 1024 pixels"),
                                               (ROW + "a,,,,,0\n", 3, "Target 0 and Target 1"), ("a,,,,,0\n" + ROW, 3, "Target 0 and Target 1"), (",,,,,0\n", 2, "no patient"),
                                               (ROW + "a,1,2,-3,4,1\n", 3, "a box without size")])
def test_a_broken_row_takes_its_image_with_it(tmp_path, rows, row, reason):
    root = make_tree(tmp_path / "a", rows + "b,,,,,0\n")
    found = scan_rsna(root)
    assert [s.id for s in found.studies] == ["b"] and [(s.row, s.reason, s.broken) for s in found.skipped] == [(row, reason, True)]
    with pytest.raises(ValueError, match=f"{TABLE}, row {row}: {reason}.*; expected a patientId, Target 0 or a box within the 1024 × 1024 pixels, and an image at .*; restore it, or load with on_missing='skip'") as error:
        load_rsna(root, on_missing="raise")
    one_sentence(error)


def test_a_row_that_is_there_twice_counts_once(tmp_path):
    root = make_tree(tmp_path / "a", ROW + ROW + "b,,,,,0\n")
    found = scan_rsna(root)
    assert [len(s.boxes) for s in found.studies] == [1, 0] and [(s.row, s.reason, s.broken) for s in found.skipped] == [(3, "listed before", True)]
    with pytest.raises(ValueError, match="row 3: listed before .a."):
        load_rsna(root, on_missing="raise")


def test_a_missing_image(tmp_path):
    root = make_tree(tmp_path / "a", ROW + "../b,,,,,0\nb,,,,,0\n")
    (root / "b.dcm").write_bytes((root / IMAGES / "b.dcm").read_bytes())
    (root / IMAGES / "b.dcm").unlink()
    found = scan_rsna(root)
    assert [s.id for s in found.studies] == ["a"] and [(s.row, s.name, s.reason) for s in found.skipped] == [(3, "../b", "no such image"), (4, "b", "no such image")]
    with pytest.raises(FileNotFoundError, match=rf"{TABLE}, row 3: no such image \(\.\./b\); expected") as error:
        load_rsna(root, on_missing="raise")
    one_sentence(error)
    shutil.rmtree(root / IMAGES)
    with pytest.raises(ValueError, match=r"none of 3 images became a study \(rows skipped: 3 no such image\); check that stage_2_train_images.zip is unpacked as stage_2_train_images/") as error:
        load_rsna(root)
    one_sentence(error)
    assert len(load_rsna(root, need_images=False, on_missing="raise")) == 3
    with pytest.raises(ValueError, match="on_missing is 'ignore': known are 'skip' and 'raise'"):
        load_rsna(root, on_missing="ignore")


@pytest.mark.parametrize("ending", [".png", ".jpg", ".jpeg", ".PNG"])
def test_converted_images_are_read_at_full_size(tmp_path, ending):
    root = make_tree(tmp_path / "a", ROW + "b,,,,,0\n", ending=ending)
    studies = load_rsna(root, on_missing="raise")
    assert [s.image.suffix for s in studies] == [ending] * 2 and read_image(studies[0].image).shape == SIZE and read_views(studies) == studies
    Image.new("L", (512, 512)).save(root / IMAGES / f"a{ending}")
    with pytest.raises(ValueError, match=f"a{ending}: 512 × 512 pixels, the boxes are in pixels of the published 1024 × 1024; convert the images without resizing them") as error:
        load_rsna(root)
    one_sentence(error)


def test_dicom_is_preferred_to_a_conversion(tmp_path):
    root = make_tree(tmp_path / "a", ROW)
    Image.new("L", (64, 64)).save(root / IMAGES / "a.png")
    assert load_rsna(root)[0].image.name == "a.dcm" and list(list_images(root / IMAGES)) == ["a", "b"]


def test_headers_that_cannot_be_read(tmp_path):
    root = make_tree(tmp_path / "a", ROW + "b,,,,,0\n")
    (root / IMAGES / "a.dcm").write_bytes(b"")
    studies = load_rsna(root)
    assert len(studies) == 2, "one broken file is found when it is decoded; the size is known from the others"
    with pytest.raises(ValueError, match="a.dcm: the file is empty") as error:
        read_views(studies)
    one_sentence(error)
    (root / IMAGES / "b.dcm").write_bytes((root / IMAGES / "b.dcm").read_bytes()[:150])
    with pytest.raises(ValueError, match="no image has a header that can be read, the first is .*a.dcm: the file is empty") as error:
        load_rsna(root)
    one_sentence(error)
    with pytest.raises(ValueError, match="none.dcm: there is no such file") as error:
        native_size(tmp_path / "none.dcm")
    one_sentence(error)
    (tmp_path / "text.png").write_text("text")
    with pytest.raises(ValueError, match=r"text.png: this is not an image file \(PNG"):
        native_size(tmp_path / "text.png")
    assert common_size([]) == SIZE


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_truncated_headers_never_raise_anything_else(tmp_path):
    write_dicom(np.zeros((4, 4), np.uint8), tmp_path / "whole.dcm", "p")
    whole = (tmp_path / "whole.dcm").read_bytes()
    for n in range(0, len(whole) - 16, 7):
        (tmp_path / "cut.dcm").write_bytes(whole[:n])
        try:
            assert native_size(tmp_path / "cut.dcm") == (4, 4)
        except ValueError as e:
            assert "cut.dcm: " in str(e) and "\n" not in str(e)


def test_people_of_the_mapping(tmp_path):
    root = make_tree(tmp_path / "a", ROW + "b,,,,,0\n")
    (root / PEOPLE).write_text(json.dumps([dict(subset_img_id="a", img_id="00000013_026.png", SOPInstanceUID="1.2")]))
    found = scan_rsna(root)
    assert [(s.id, s.patient) for s in found.studies] == [("a", "00000013")] and [(s.row, s.name, s.reason) for s in found.skipped] == [(3, "b", "no patient")]
    with pytest.raises(ValueError, match=f"row 3: no patient .b.; expected a patientId that is in {PEOPLE}") as error:
        load_rsna(root, on_missing="raise")
    one_sentence(error)
    for garbage in "", "3", '{"a": 1}', "[1]", '[{"img_id": "x"}]', '[{"subset_img_id": "a", "img_id": 3}]':
        (root / PEOPLE).write_text(garbage)
        with pytest.raises(ValueError, match=f"{PEOPLE}: not a list of objects with 'subset_img_id' and 'img_id' .*; get it again, or delete it") as error:
            load_rsna(root)
        one_sentence(error)


def test_the_second_table(tmp_path):
    root = make_tree(tmp_path / "a", ROW + "b,,,,,0\n")
    assert [set(s.labels) for s in load_rsna(root)] == [{"Pneumonia"}] * 2
    for text, says in {"patientId,class\na,Lung Opacity\nb,Lung Opacity\n": "b is 'Lung Opacity' in .* and has Target 0 in .*; the tables do not belong together",
                       "patientId,class\na,Normal\n": "a is 'Normal' in .* and has Target 1", "patientId,class\nb,Healthy\n": "row 2: b is 'Healthy'; expected one of",
                       "patientId,class\nb,Normal\nb,No Lung Opacity / Not Normal\n": "row 3: b is 'No Lung Opacity / Not Normal' and 'Normal' before",
                       "patientId,kind\nb,Normal\n": "column 'class' is missing, .* or delete it to go without"}.items():
        (root / CLASSES).write_text(text)
        with pytest.raises(ValueError, match=says) as error:
            load_rsna(root)
        one_sentence(error)
    (root / CLASSES).unlink()
    (root / f"{CLASSES}.gz").write_bytes(gzip.compress(b"patientId,class\na,Lung Opacity\n"))
    assert [s.labels for s in load_rsna(root)] == [{"Pneumonia": 1., "Normal": 0., "No Lung Opacity / Not Normal": 0.}, {"Pneumonia": 0., "Normal": None, "No Lung Opacity / Not Normal": None}]


def test_what_was_skipped_is_one_line_of_the_log(tmp_path, caplog):
    root = make_tree(tmp_path / "a", ROW + "b,1,2,3,0,1\nlost,,,,,0\n")
    with caplog.at_level(logging.INFO, "cmcgns"):
        studies = load_rsna(root)
    assert [r.getMessage() for r in caplog.records] == ["rsna: 1 studies; rows skipped: 1 a box without size, 1 no such image"] and len(studies) == 1


def test_a_relative_root_works(tmp_path, monkeypatch):
    make_tree(tmp_path / "any name", ROW)
    monkeypatch.chdir(tmp_path)
    assert load_rsna("any name")[0].image == Path("any name") / IMAGES / "a.dcm" and find_rsna(".") == Path("any name")


def test_what_is_not_the_folder(tmp_path):
    assert find_rsna(tmp_path / "none") is None and find_rsna(tmp_path) is None
    (tmp_path / "stage_1_train_labels.csv").write_text(HEADER + ROW)
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "deep" / "deeper" / TABLE).write_text(HEADER + ROW)
    (tmp_path / "other" / TABLE).mkdir(parents=True) # a folder of that name
    assert find_rsna(tmp_path) is None and find_rsna(tmp_path / "deep") == tmp_path / "deep" / "deeper"
    assert find_rsna(tmp_path / "stage_1_train_labels.csv") is None


# what cannot be written

def test_what_the_layout_cannot_say(synthetic, tmp_path):
    ill = next(s for s in synthetic if opacities(s))
    well = next(s for s in synthetic if not any(s.labels.values()))
    small = Study("small", tmp_path / "small.png", "p", labels={"pneumonia": 0.})
    Image.new("L", (64, 64)).save(small.image)

    def refused(*studies, says, **options):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        with pytest.raises(ValueError, match=says) as error:
            write_rsna(studies, folder, **options)
        one_sentence(error)
        assert find_rsna(folder) is None, "half a tree must not be taken for one"

    refused(says="no studies to write")
    refused(Study(**(vars(ill) | dict(boxes=()))), says=f"{ill.id}' is labelled positive for pneumonia or consolidation and has 0 boxes of it")
    refused(Study(**(vars(well) | dict(boxes=(Box("consolidation", 1, 2, 3, 4),)))), says=f"{well.id}' is labelled negative for pneumonia or consolidation and has 1 boxes of it")
    refused(Study(**(vars(well) | dict(labels={"pneumonia": None}))), says="is labelled unknown for")
    refused(Study(**(vars(ill) | dict(boxes=(Box("consolidation", 100, 2, 30, 4),)))), says="a box that leaves the 128 × 128 pixels")
    refused(ill, small, says="study 'small' has 64 × 64 pixels and those before it 128 × 128: the images of a tree have one size")
    refused(ill, ill, says="an id must be there once and be a file name")
    for name in "../up", "", ".", "a/b", "x" * 65:
        refused(Study(**(vars(ill) | dict(id=name))), says="an id must be there once and be a file name of up to 64 letters")
    refused(Study(**(vars(ill) | dict(image=tmp_path / "none.png"))), says="none.png: there is no such file")
    refused(ill, photometric="RGB", says="photometric is 'RGB': known are 'MONOCHROME1' and 'MONOCHROME2'")
    refused(ill, bits=10, says="bits is 10: known are 8, 12 and 16")
    folder = write_rsna([ill], tmp_path / "there")
    with pytest.raises(FileExistsError, match=f"{TABLE}: it is there already; give an empty folder") as error:
        write_rsna([ill], folder)
    one_sentence(error)


def test_what_is_not_known_is_not_written(synthetic, tmp_path):
    "Without the label 'Normal', a real study that lacks pneumonia is not said to be healthy; a patient that is the image needs no mapping."
    plain = Study("a", synthetic[0].image, "a", labels={"Pneumonia": 0.}, dataset="rsna")
    folder = write_rsna([plain], tmp_path / "tree")
    assert sorted(os.listdir(folder)) == [IMAGES, TABLE] and load_rsna(folder)[0].labels == {"Pneumonia": 0.}
