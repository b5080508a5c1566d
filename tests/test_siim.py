"SIIM-ACR pneumothorax: all real masks decoded, broken masks, and 200 synthetic studies there and back."
import csv
import gzip
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
from cmcgns.data.rsna import write_dicom
from cmcgns.data.siim import (TABLES, decode_rle, encode_rle, find_runs, find_siim, load_siim, read_headers, scan_siim, split_rows_as_published, torn_images,
                              write_siim)
from cmcgns.data.studies import Runs, Study, check_disjoint, fingerprint, load_studies, read_mask, read_rows, save_studies, split_studies
from cmcgns.data.synthetic import synthesize
from cmcgns.image import read_image
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

HEADER = "ImageId, EncodedPixels\n"
REAL_FILM = "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819"


@pytest.fixture(scope="module")
def labels(shared_data):
    return shared_data / "labels" / "siim"


@pytest.fixture(scope="module")
def table(labels):
    return read_rows(labels / "train-rle.csv.gz", ("ImageId", "EncodedPixels"), "")


@pytest.fixture(scope="module")
def real(labels):
    return scan_siim(labels, need_images=False, on_missing="raise")


def area(study):
    return sum(study.masks["Pneumothorax"].lengths)


# the real table

def test_known_counts(real, table):
    assert len(table) == 12_954 and len({r["ImageId"] for r in table.values()}) == len(real.studies) == 12_047 and real.skipped == []
    assert Counter(s.labels["Pneumothorax"] for s in real.studies) == {0.: 9_378, 1.: 2_669}
    rows = Counter(r["ImageId"] for r in table.values() if r["EncodedPixels"] != "-1")
    assert sum(rows.values()) == 3_576 and Counter(rows.values()) == {1: 2_045, 2: 447, 3: 112, 4: 40, 5: 18, 6: 3, 7: 1, 8: 2, 10: 1}
    assert all(s.patient == s.id and set(s.masks) == {"Pneumothorax"} and s.masks["Pneumothorax"][:2] == (1024, 1024) for s in real.studies)
    assert all(bool(area(s)) == bool(s.labels["Pneumothorax"]) for s in real.studies)


def test_the_header_of_the_real_table_has_its_space(labels):
    with gzip.open(labels / "train-rle.csv.gz", "rt") as file:
        assert file.readline() == HEADER


def test_all_real_masks_are_decoded(real, table):
    areas = {s.id: area(s) for s in real.studies if area(s)}
    assert len(areas) == 2_669 and sum(areas.values()) == 38_250_469
    assert (max(areas.values()), min(areas.values()), np.median(list(areas.values()))) == (161_421, 55, 8_630)
    assert max(areas, key=areas.get) == "1.2.276.0.7230010.3.1.4.8323329.5498.1517875188.505805"
    drawn = Counter()
    for r in table.values():
        drawn[r["ImageId"]] += sum(decode_rle(r["EncodedPixels"]).lengths)
    assert sum(drawn[i] > a for i, a in areas.items()) == 183 and not any(drawn[i] < a for i, a in areas.items()) # regions that overlap


def slow(text, h=1024, w=1024):
    "A decoder that follows the description word by word."
    mask, at, numbers = np.zeros(h * w, bool), 0, list(map(int, text.split()))
    for gap, length in zip(numbers[::2], numbers[1::2]):
        at += gap
        mask[at:at + length] = True
        at += length
    return mask.reshape(w, h).T


def test_real_masks_against_a_slow_decoder(real, table):
    rows = {}
    for r in table.values():
        rows.setdefault(r["ImageId"], []).append(r["EncodedPixels"])
    several = [s for s in real.studies if len(rows[s.id]) > 1]
    for s in several[::4] + [s for s in real.studies if area(s)][::25]:
        assert np.array_equal(read_mask(s.masks["Pneumothorax"]), np.any([slow(text) for text in rows[s.id]], axis=0))


def test_every_real_row_is_encoded_as_it_was(table):
    assert all(encode_rle(decode_rle(r["EncodedPixels"])) == r["EncodedPixels"] for r in table.values())


def test_the_real_table_is_read_in_seconds(labels):
    start = time.process_time()
    scan_siim(labels, need_images=False)
    assert time.process_time() - start < 20 # takes about 1


def test_numbers_are_gaps(table):
    "Read relatively, a run is the neighbour, one column on, of the run before it; read absolutely, it is anywhere."
    beside, total = Counter(), 0
    for r in table.values():
        if r["EncodedPixels"] == "-1":
            continue
        numbers = np.array(r["EncodedPixels"].split(), int)
        ends = numbers.cumsum()[1::2]
        for how, starts in dict(relative=ends - numbers[1::2], absolute=numbers[::2]).items():
            stops = starts + numbers[1::2]
            beside[how] += int(((starts[1:] - 1024 < stops[:-1]) & (stops[1:] - 1024 > starts[:-1])).sum())
        total += len(ends) - 1
    assert total == 679_496 and round(beside["relative"] / total, 2) == .94 and beside["absolute"] / total < .0002


def test_columns_come_first(real):
    "The masks stand upright: air at the top, in two lungs with a gap between them."
    edges = np.zeros(1024 * 1024 + 1, int)
    for s in real.studies:
        runs = s.masks["Pneumothorax"]
        starts = np.array(runs.starts, int)
        np.add.at(edges, starts, 1)
        np.add.at(edges, starts + np.array(runs.lengths, int), -1)
    total = edges[:-1].cumsum().reshape(1024, 1024).T # how many masks have each pixel
    assert total.sum() == 38_250_469
    down, across = (total.sum(k) / total.sum() for k in (1, 0))
    bands = across.reshape(16, 64).sum(1)
    assert round(down[:256].sum(), 1) == .5 and across[:256].sum() < .2
    assert [round(bands[i], 2) for i in (5, 8, 10)] == [.14, .03, .08] and bands[8] == bands[4:12].min()


def test_what_the_split_of_rows_costs(table, real):
    torn = [len(torn_images(table, split_rows_as_published(table, seed))) for seed in range(100)]
    assert torn[0] == 311 and round(np.mean(torn)) == 333 and (min(torn), max(torn)) == (296, 369)
    parts = split_rows_as_published(table)
    assert {k: len(v) for k, v in parts.items()} == dict(train=9_067, validation=1_944, test=1_943)
    images = {k: {table[n]["ImageId"] for n in v} for k, v in parts.items()}
    tested = {table[n]["ImageId"] for n in parts["test"] if table[n]["EncodedPixels"] != "-1"}
    assert len(tested) == 476 and len(tested & torn_images(table, parts)) == 183 and len(tested & images["train"]) == 154
    whole = {s.id: area(s) for s in real.studies}
    rows = Counter(r["ImageId"] for r in table.values())

    def dice(numbers):
        "Of the whole mask, for the one region that a row has for its truth."
        pairs = [(sum(decode_rle(table[n]["EncodedPixels"]).lengths), whole[table[n]["ImageId"]]) for n in numbers]
        return len(pairs), round(float(np.mean([2 * a / (a + b) for a, b in pairs])), 2)

    assert dice([n for n, r in table.items() if rows[r["ImageId"]] > 1]) == (1_531, .58)
    assert dice([n for n in parts["test"] if table[n]["EncodedPixels"] != "-1"]) == (516, .80)


def test_ours_tears_no_image(real, table):
    split = split_studies(real.studies, dict(train=.7, validation=.15, test=.15), stratify="Pneumothorax")
    check_disjoint(real.studies, split)
    part = {i: k for k, ids in split.parts.items() for i in ids}
    numbers = {k: [n for n, r in table.items() if part[r["ImageId"]] == k] for k in split.parts}
    assert sum(map(len, numbers.values())) == 12_954 and torn_images(table, numbers) == set()


def test_what_the_published_comparisons_do_to_the_real_table(labels):
    "One of the two finds no negative, whichever copy one has."
    with gzip.open(labels / "train-rle.csv.gz", "rt") as file:
        fields = [r[" EncodedPixels"] for r in csv.DictReader(file)]
    assert fields.count("-1") == 9_378 and fields.count(" -1") == 0


def test_published_lists_name_all_studies(real, shared_data):
    listed = []
    for part in "train", "validation", "test":
        with open(shared_data / "splits" / "lovt" / "siim" / f"{part}.csv", newline="") as file:
            listed += [r["ID"] for r in csv.DictReader(file)]
    assert len(listed) == len(set(listed)) == 12_047 and set(listed) == {s.id for s in real.studies}


def test_a_real_film_in_the_real_tree(shared_data, labels, tmp_path):
    film = shared_data / "dicom-samples" / f"{REAL_FILM}.dcm"
    header = pydicom.dcmread(film, stop_before_pixels=True)
    place = tmp_path / "siim" / "dicom-images-train" / header.StudyInstanceUID / header.SeriesInstanceUID
    place.mkdir(parents=True)
    shutil.copy(film, place)
    shutil.copy(labels / "train-rle.csv.gz", tmp_path / "siim")
    found = scan_siim(find_siim(tmp_path))
    assert [(s.id, s.labels) for s in found.studies] == [(REAL_FILM, {"Pneumothorax": 0.})]
    assert Counter(s.reason for s in found.skipped) == {"no such image": 12_046}
    study, = read_headers(found.studies)
    assert read_image(study.image).shape == (1024, 1024)
    assert study.view == "PA" and study.patient == "16d7f894-55d7-4d95-8957-d18987f0e981" and study.masks["Pneumothorax"][:2] == (1024, 1024)


# the code of a mask

@settings(max_examples=300, deadline=None)
@given(st.tuples(st.integers(1, 40), st.integers(1, 40)).flatmap(lambda size: arrays(bool, size)))
def test_any_mask_there_and_back(mask):
    text = encode_rle(mask)
    runs = decode_rle(text, *mask.shape)
    assert np.array_equal(read_mask(runs), mask) and runs == find_runs(mask) and encode_rle(runs) == text and sum(runs.lengths) == mask.sum()
    assert (text == "-1") == (not mask.any())
    if mask.any():
        assert np.array_equal(slow(text, *mask.shape), mask)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_any_pairs_are_decoded_or_refused(pairs):
    text = " ".join(f"{g} {n}" for g, n in pairs)
    if sum(map(sum, pairs)) > 60:
        with pytest.raises(ValueError, match="leaves the 6 × 10 pixels"):
            decode_rle(text, 6, 10)
    else:
        assert np.array_equal(read_mask(decode_rle(text, 6, 10)), slow(text, 6, 10))


@settings(max_examples=500, deadline=None)
@given(st.text(st.sampled_from("0123456789 -.,\tabc+_٣²\n\x00"), max_size=30) | st.text(max_size=20))
def test_any_text_is_decoded_or_refused_in_a_few_words(text):
    try:
        runs = decode_rle(text, 50, 60)
    except ValueError as e:
        assert str(e).startswith("a mask ") and len(str(e)) < 60
    else:
        assert read_mask(runs).shape == (50, 60) and set(text) <= set("0123456789- \t\n\x1c\x1d\x1e\x1f\x0b\x0c\r\x85\xa0")


def test_runs_that_overlap_are_encoded_as_their_union():
    assert encode_rle(Runs(5, 5, (7, 2, 3), (3, 4, 2))) == "2 4 1 3" and encode_rle(Runs(5, 5, (), ())) == "-1"


# there and back

@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return synthesize(200, tmp_path_factory.mktemp("synthetic"), size=128, seed=3, masks=True)


@pytest.fixture(scope="module")
def tree(synthetic, tmp_path_factory):
    return write_siim(synthetic, tmp_path_factory.mktemp("siim") / "siim")


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.mark.parametrize("stage, rows", [(1, 1), (1, 3), (2, 2)])
def test_200_studies_there_and_back(synthetic, tmp_path, stage, rows):
    tree = write_siim(synthetic, tmp_path / "siim", stage=stage, rows=rows)
    found = scan_siim(tree, on_missing="raise")
    assert len(found.studies) == 200 and found.skipped == [] and find_siim(tmp_path) == tree
    positive = 0
    for there, back in zip(synthetic, found.studies):
        assert back.id == there.id and back.labels == {"Pneumothorax": there.labels["pneumothorax"]}
        mask = read_mask(back.masks["Pneumothorax"])
        if there.labels["pneumothorax"]:
            positive += 1
            assert iou(mask, read_mask(there.masks["pneumothorax"])) == 1
        else:
            assert not mask.any() and mask.shape == (128, 128)
        assert np.array_equal(read_image(back.image), read_image(there.image))
        assert len(back.image.relative_to(tree / "dicom-images-train").parts) == 3
    assert 15 < positive < 120
    assert [(s.patient, s.view) for s in read_headers(found.studies)] == [(s.patient, s.view) for s in synthetic]
    lines = (tree / TABLES[stage - 1]).read_text().splitlines()
    assert lines[0] == ("ImageId, EncodedPixels", "ImageId,EncodedPixels")[stage - 1] and len(lines) == 1 + 200 + positive * (rows - 1)


def test_studies_of_the_tree_can_be_kept_and_written_again(tree, tmp_path):
    studies = read_headers(load_siim(tree))
    save_studies(studies, tmp_path / "studies.jsonl")
    assert load_studies(tmp_path / "studies.jsonl") == studies and fingerprint(load_studies(tmp_path / "studies.jsonl")) == fingerprint(studies)
    again = read_headers(load_siim(write_siim(studies[:30], tmp_path / "again")))
    assert [(s.id, s.patient, s.labels, s.masks, s.view) for s in again] == [(s.id, s.patient, s.labels, s.masks, s.view) for s in studies[:30]]
    assert again[0].image.read_bytes() == studies[0].image.read_bytes()


# broken trees

def make_tree(root, rows, header=HEADER, images=("a", "b"), table="train-rle.csv", folder="dicom-images-train"):
    for name in images:
        place = root / folder / f"study {name}" / f"series {name}"
        place.mkdir(parents=True)
        write_dicom(np.full((1024, 1024), 90, np.uint8), place / f"{name}.dcm", f"patient of {name}", "PA")
    root.mkdir(exist_ok=True)
    (root / table).write_bytes((header + rows).encode())
    return root


MASK = "a,1049 100 924 100\n"


def test_no_folder_no_table_no_column(tmp_path):
    for folder in tmp_path / "none", tmp_path:
        with pytest.raises(FileNotFoundError, match=r"there is no train-rle.csv or stage_2_train.csv \(or .zip, .gz\) in this folder; get it from") as error:
            scan_siim(folder)
        one_sentence(error)
    for i, column in enumerate(("ImageId", "EncodedPixels")):
        with pytest.raises(ValueError, match=f"train-rle.csv: column '{column}' is missing, the columns are .*; get it from") as error:
            load_siim(make_tree(tmp_path / str(i), MASK, HEADER.replace(column, "other"), images=()))
        one_sentence(error)


@pytest.mark.parametrize("content, says", [(b"", "column 'ImageId' is missing, the columns are none"), (b"<!DOCTYPE html><html>Not Found</html>", "column 'ImageId' is missing"),
                                           (HEADER.encode() + b"a\n", "row 2: it ends before 'EncodedPixels', 2 fields were expected"),
                                           (HEADER.encode(), "none of 0 images became a study .rows skipped: none.; check that dicom-images-train/ is there")])
def test_a_table_that_is_none(tmp_path, content, says):
    (tmp_path / "train-rle.csv").write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        load_siim(tmp_path)
    one_sentence(error)


@pytest.mark.parametrize("rows, row, reason", [("a,1049 100 924\n", 2, "a mask of an odd number of numbers"), ("a,1049 100 x 3\n", 2, "a mask that is neither -1 nor whole numbers"),
                                               ("a,\n", 2, "a mask that is neither -1 nor whole numbers"), ("a,1049 -100\n", 2, "a mask that is neither -1 nor whole numbers"),
                                               ("a,-1 -1\n", 2, "a mask that is neither -1 nor whole numbers"), ("a,nan\n", 2, "a mask that is neither -1 nor whole numbers"),
                                               ("a,1049 1.5\n", 2, "a mask that is neither -1 nor whole numbers"), ("a,1049 0\n", 2, "a mask with a run of no pixels"),
                                               ("a,1048000 577\n", 2, "a mask that leaves the 1024 × 1024 pixels"), ("a,99999999999999999999 1\n", 2, "a mask that leaves the 1024 × 1024 pixels"),
                                               ("a,-1\n" + MASK, 3, "both -1 and a mask"), (MASK + "a,-1\n", 3, "both -1 and a mask"), (MASK + "a,7\n", 3, "a mask of an odd number of numbers"),
                                               (",-1\n", 2, "no ImageId")])
def test_a_broken_row_takes_its_image_with_it(tmp_path, rows, row, reason):
    root = make_tree(tmp_path / "a", rows + "b,-1\n")
    found = scan_siim(root)
    assert [s.id for s in found.studies] == ["b"] and [(s.row, s.reason, s.broken) for s in found.skipped] == [(row, reason, True)]
    with pytest.raises(ValueError, match=f"train-rle.csv, row {row}: {reason}.*; expected an ImageId, -1 or pairs of gap and length within the 1024 × 1024 pixels, and an image .*; restore it, or load with on_missing='skip'") as error:
        load_siim(root, on_missing="raise")
    one_sentence(error)


def test_the_last_pixel_is_within(tmp_path):
    study, = load_siim(make_tree(tmp_path / "a", "a,1048000 576\n"))
    assert read_mask(study.masks["Pneumothorax"])[-1, -1] and area(study) == 576


@pytest.mark.parametrize("twice", [MASK, "a,-1\n"])
def test_a_row_that_is_there_twice_counts_once(tmp_path, twice):
    root = make_tree(tmp_path / "a", twice + twice + "b,-1\n")
    found = scan_siim(root)
    assert [s.id for s in found.studies] == ["a", "b"] and [(s.row, s.reason, s.broken) for s in found.skipped] == [(3, "listed before", True)]
    with pytest.raises(ValueError, match="row 3: listed before .a."):
        load_siim(root, on_missing="raise")


def test_spaces_and_stages_do_not_matter(tmp_path):
    rows = MASK + "a,1149 10\nb,-1\n"
    one = load_siim(make_tree(tmp_path / "1", rows))
    others = [make_tree(tmp_path / "2", rows.replace(",", ", ")), make_tree(tmp_path / "3", rows.replace(",", " ,  ").replace("\n", "\r\n"), "\ufeffImageId , EncodedPixels\r\n"),
              make_tree(tmp_path / "4", rows, "ImageId,EncodedPixels\n", table="stage_2_train.csv"), make_tree(tmp_path / "5", rows.replace(",", ", "), "ImageId,EncodedPixels\n", table="stage_2_train.csv")]
    for root in others:
        assert find_siim(root) == root and [(s.id, s.labels, s.masks) for s in load_siim(root, on_missing="raise")] == [(s.id, s.labels, s.masks) for s in one]
    assert [s.labels["Pneumothorax"] for s in one] == [1, 0] and area(one[0]) == 210


def test_both_stages_in_a_folder(tmp_path):
    root = make_tree(tmp_path / "a", MASK)
    make_tree(root, "a,-1\nc,-1\n", table="stage_2_train.csv", images=("c",), folder="dicom-images-test")
    assert [(s.id, s.labels["Pneumothorax"]) for s in load_siim(root)] == [("a", 1)]
    assert [(s.id, s.labels["Pneumothorax"], s.image.parts[-4]) for s in load_siim(root, table="stage_2_train.csv")] == [("a", 0, "dicom-images-train"), ("c", 0, "dicom-images-test")]
    with pytest.raises(FileNotFoundError, match="there is no other.csv"):
        load_siim(root, table="other.csv")


def test_packed_tables_whole_and_broken(tmp_path):
    root = make_tree(tmp_path / "plain", MASK)
    expected = [(s.id, s.masks) for s in load_siim(root)]
    text = (root / "train-rle.csv").read_bytes()
    (root / "train-rle.csv").unlink()
    (root / "train-rle.csv.gz").write_bytes(gzip.compress(text))
    assert [(s.id, s.masks) for s in load_siim(root)] == expected and find_siim(tmp_path) == root
    (root / "train-rle.csv.gz").write_bytes(gzip.compress(text)[:-12])
    assert find_siim(tmp_path) == root
    with pytest.raises(ValueError, match="train-rle.csv.gz: it cannot be read as a table") as error:
        load_siim(root)
    one_sentence(error)
    (root / "train-rle.csv.gz").unlink()
    with zipfile.ZipFile(root / "train-rle.csv.zip", "w") as z:
        z.writestr("train-rle.csv", text)
    assert [(s.id, s.masks) for s in load_siim(root)] == expected and find_siim(tmp_path) == root


def test_a_missing_film(tmp_path):
    root = make_tree(tmp_path / "a", MASK + "lost,-1\nlost,-1\n")
    found = scan_siim(root)
    assert [s.id for s in found.studies] == ["a"] and [(s.row, s.name, s.reason) for s in found.skipped] == [(3, "lost", "no such image")]
    with pytest.raises(FileNotFoundError, match=r"train-rle.csv, row 3: no such image \(lost\); expected an ImageId, .*, and an image lost.dcm below .*dicom-images-train; restore it") as error:
        load_siim(root, on_missing="raise")
    one_sentence(error)
    shutil.rmtree(root / "dicom-images-train")
    with pytest.raises(ValueError, match=r"none of 2 images became a study \(rows skipped: 2 no such image\); check that dicom-images-train/ is there, with the films two folders down") as error:
        load_siim(root)
    one_sentence(error)
    assert len(load_siim(root, need_images=False)) == 2
    with pytest.raises(ValueError, match="on_missing is 'ignore': known are 'skip' and 'raise'"):
        load_siim(root, on_missing="ignore")


def test_films_anywhere_below_the_folder(tmp_path):
    root = make_tree(tmp_path / "a", MASK + "b,-1\n", images=("a",))
    write_dicom(np.zeros((1024, 1024), np.uint8), root / "dicom-images-train" / "b.DCM", "b")
    (root / "elsewhere").mkdir()
    write_dicom(np.zeros((1024, 1024), np.uint8), root / "elsewhere" / "c.dcm", "c")
    assert [s.id for s in load_siim(root, on_missing="raise")] == ["a", "b"]


def test_headers_that_cannot_be_read(tmp_path):
    root = make_tree(tmp_path / "a", MASK + "b,-1\n")
    studies = load_siim(root)
    assert [s.patient for s in read_headers(studies)] == ["patient of a", "patient of b"]
    studies[1].image.write_bytes(b"half a film")
    with pytest.raises(ValueError, match="b.dcm: this is not a DICOM file") as error:
        read_headers(studies)
    one_sentence(error)
    write_dicom(np.zeros((4, 4), np.uint8), studies[1].image, "")
    assert read_headers(studies)[1].patient == "b"


def test_what_is_not_the_folder(tmp_path):
    assert find_siim(tmp_path / "none") is None and find_siim(tmp_path) is None
    (tmp_path / "ct").mkdir()
    (tmp_path / "ct" / "stage_2_train.csv").write_text("ID,Label\nID_12cadc6af_epidural,0\n")
    assert find_siim(tmp_path) is None and find_siim(tmp_path / "ct") is None
    with pytest.raises(ValueError, match="stage_2_train.csv: column 'ImageId' is missing, the columns are ID, Label") as error:
        load_siim(tmp_path / "ct")
    one_sentence(error)
    root = make_tree(tmp_path / "pneumothorax", MASK)
    assert find_siim(tmp_path) == find_siim(root) == root


def test_what_was_skipped_is_one_line_of_the_log(tmp_path, caplog):
    root = make_tree(tmp_path / "a", MASK + "b,7\nlost,-1\n")
    with caplog.at_level(logging.INFO, "cmcgns"):
        load_siim(root)
    assert [r.getMessage() for r in caplog.records] == ["siim: 1 studies; rows skipped: 1 a mask of an odd number of numbers, 1 no such image"]


def test_a_relative_root_works(tmp_path, monkeypatch):
    make_tree(tmp_path / "any name", MASK)
    monkeypatch.chdir(tmp_path)
    assert load_siim("any name")[0].image == Path("any name/dicom-images-train/study a/series a/a.dcm") and find_siim(".") == Path("any name")


# what cannot be written

def test_what_the_layout_cannot_say(synthetic, tmp_path):
    ill = next(s for s in synthetic if s.labels["pneumothorax"])
    well = next(s for s in synthetic if not s.labels["pneumothorax"])

    def refused(*studies, says, **options):
        folder = tmp_path / str(len(os.listdir(tmp_path)))
        with pytest.raises(ValueError, match=says) as error:
            write_siim(studies, folder, **options)
        one_sentence(error)
        assert find_siim(folder) is None, "half a tree must not be taken for one"

    def but(study, **changes):
        return Study(**(vars(study) | changes))

    refused(says="no studies to write")
    refused(but(ill, masks={}), says=f"{ill.id}' is labelled 1 and its mask has 0 pixels: positives need a mask .`synthesize` draws them with masks=True., negatives none")
    refused(well, but(well, id="b", masks={"pneumothorax": Runs(128, 128, (3,), (4,))}), says="'b' is labelled 0 and its mask has 4 pixels")
    refused(but(well, labels={"pneumothorax": None}), says="is not labelled for pneumothorax: the unknown have no place in this layout")
    refused(but(ill, masks={"pneumothorax": Runs(64, 64, (3,), (4,))}), says="has 128 × 128 pixels and its mask 64 × 64: they must be of one size")
    refused(ill, ill, says="an id must be there once and be a file name")
    refused(but(ill, id="a/b"), says="an id must be there once and be a file name of up to 64 letters")
    refused(ill, stage=3, says="stage is 3 and rows is 1: give stage 1 or 2")
    refused(ill, rows=0, says="stage is 1 and rows is 0: give stage 1 or 2, and at least one row")
    folder = write_siim([but(well, labels={})], tmp_path / "there") # a label that is not there is no pneumothorax
    assert load_siim(folder)[0].labels == {"Pneumothorax": 0.}
    with pytest.raises(FileExistsError, match="train-rle.csv: it is there already; give an empty folder") as error:
        write_siim([ill], folder, stage=2)
    one_sentence(error)
