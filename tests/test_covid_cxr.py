"The COVID-19 image data collection: exact counts on the real files, and broken clones."
import csv
import json
import logging
import re
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from cmcgns.data.covid_cxr import BOXES, MASKS, SAME_PATIENT, join_patients, load_covid_cxr, read_lung_boxes, read_table, scan_covid_cxr, split_findings
from cmcgns.data.studies import check_disjoint, fingerprint, load_studies, save_studies, split_studies
from PIL import Image

HEADER = "patientid,finding,view,modality,folder,filename,clinical_notes\n"
VIRUS = re.compile("covid|sars-cov|ncov|coronavirus", re.I)


@pytest.fixture(scope="module")
def clone(shared_data):
    return shared_data / "covid-chestxray-dataset"


@pytest.fixture(scope="module")
def found(clone):
    return scan_covid_cxr(clone)


@pytest.fixture(scope="module")
def table(clone):
    with open(clone / "metadata.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_every_row_is_accounted_for(found, clone):
    assert Counter(s.reason for s in found.skipped) == {"modality CT": 84, "view L": 58, "view not given": 35, "view ?": 4, "no such image": 11, "listed before": 4}
    assert len(found.studies) == 555 and len(found.studies) + len(found.skipped) == len(read_table(clone)) == 751
    assert len({s.id for s in found.studies}) == 555 and all(s.image.is_file() and s.dataset == "covid_cxr" for s in found.studies)
    assert {n: v for n, v in Counter(s.view for s in found.studies).items()} == {"PA": 305, "AP Supine": 135, "AP": 115}


def test_known_counts_of_the_table(clone):
    rows = [r for r in read_table(clone).values() if r["modality"] == "X-ray"]
    assert len(rows) == 667 and len({r["patientid"] for r in rows}) == 357
    frontal = [r for r in rows if r["view"] in ("PA", "AP", "AP Supine", "AP Erect") and (clone / r["folder"] / r["filename"]).is_file()]
    assert len(frontal) == 559 and len({r["patientid"] for r in frontal}) == 329


def test_labels(found, table):
    assert Counter(s.labels["COVID-19"] for s in found.studies) == {1.: 427, 0.: 100, None: 28}
    finding = {r["filename"]: r["finding"] for r in table}
    assert sum(s.labels["COVID-19"] == s.labels["ARDS"] == 1 for s in found.studies) == 12
    for s in found.studies:
        named = {k for k, v in s.labels.items() if v}
        assert (finding[s.id] == "todo") == (set(s.labels.values()) == {None})
        assert finding[s.id] == "todo" or named == set(finding[s.id].split(", "))
    assert len({frozenset(s.labels) for s in found.studies}) == 1 and len(found.studies[0].labels) == 16


def test_films_without_a_finding_are_no_negatives(found, table):
    unknown = {s.id for s in found.studies if s.labels["COVID-19"] is None}
    of_covid = [r for r in table if r["filename"] in unknown and "covid" in r["url"]]
    assert len(unknown) == 28 and len(of_covid) == 11 and len({r["patientid"] for r in of_covid}) == 6
    assert sum(bool(re.search("PCR test|tested positive for", r["clinical_notes"])) for r in of_covid) == 4


def test_nine_patients_have_both_classes(found):
    classes = defaultdict(set)
    for s in found.studies:
        classes[s.patient].add(s.labels["COVID-19"])
    assert len(classes) == 323 and sum({0, 1} <= c for c in classes.values()) == 9


def test_notes(found, table):
    notes = {r["filename"]: r["clinical_notes"] for r in table}
    assert [s.id for s in found.studies if not s.sentences] == [s.id for s in found.studies if not notes[s.id].strip()]
    assert sum(not s.sentences for s in found.studies) == 111
    assert Counter(s.labels["COVID-19"] for s in found.studies if VIRUS.search(notes[s.id])) == {1.: 125, 0.: 5, None: 4}
    assert Counter(s.labels["COVID-19"] for s in found.studies if s.sentences) == {1.: 324, 0.: 92, None: 28}


def test_boxes_lie_within_the_image_and_null_ones_are_left_out(found, clone):
    coco = json.loads((clone / BOXES).read_text())
    null = [i["file_name"] for i in coco["images"] if i["id"] == 159]
    boxed = {s.id: s for s in found.studies if s.boxes}
    assert len(boxed) == 155 and len(coco["images"]) == 156 and null[0] not in boxed and null[0] in {s.id for s in found.studies}
    swapped = []
    for s in boxed.values():
        left, right = sorted(s.boxes)
        assert (left.label, right.label) == ("left lung", "right lung")
        with Image.open(s.image) as image:
            w, h = image.size
        assert all(b.x >= 0 and b.y >= 0 and b.x + b.w <= w + .5 and b.y + b.h <= h + .5 and b.w > 0 and b.h > 0 for b in s.boxes)
        if right.x > left.x: # the right lung is on the left of the image
            swapped.append(s.id)
    assert swapped == []


def test_masks_fit_their_images(found, clone):
    masked = [s for s in found.studies if s.masks]
    assert len(masked) == len(list((clone / MASKS).iterdir())) == 192
    for s in masked:
        with Image.open(s.image) as image, Image.open(s.masks["lungs"]) as mask:
            assert image.size == mask.size


def thumbnail(path, side=48):
    "Fine structure, so that the common outline of all chests does not count."
    with Image.open(path) as image:
        small = image.convert("L").resize((side, side))
    a = np.asarray(small, float) - np.asarray(small.resize((6, 6)).resize((side, side), Image.Resampling.BICUBIC), float)
    return ((a - a.mean()) / a.std()).ravel()


def test_one_film_is_never_two_patients(found):
    a = np.stack([thumbnail(s.image) for s in found.studies])
    alike = np.argwhere(np.triu(a @ a.T / a.shape[1], 1) > .88)
    pairs = {(found.studies[i].patient, found.studies[j].patient) for i, j in alike}
    assert len(pairs) >= 4 and all(p == q for p, q in pairs)


def test_patients_joined_by_hand_do_share_a_film(clone):
    films = defaultdict(list)
    for r in read_table(clone).values():
        path = clone / r["folder"] / r["filename"]
        if r["patientid"] in {*SAME_PATIENT, *SAME_PATIENT.values()} and path.is_file():
            films[r["patientid"]].append(thumbnail(path))
    for p, q in SAME_PATIENT.items():
        assert (np.array(films[p]) @ np.array(films[q]).T / 48**2).max() > .88, (p, q)


def test_patients_joined_by_the_table(clone):
    people = join_patients(read_table(clone), same={})
    assert {p: q for p, q in people.items() if p != q} == {"339": "285", "340": "287"}


def test_splits_and_tables_of_the_real_set(found, tmp_path):
    split = split_studies(found.studies, dict(train=.6, validation=.1, test=.3), stratify="COVID-19")
    check_disjoint(found.studies, split)
    assert all(sum(1 for s in found.studies if s.id in set(ids) and s.labels["COVID-19"] == 0) >= 5 for ids in split.parts.values())
    save_studies(found.studies, tmp_path / "studies.jsonl")
    again = load_studies(tmp_path / "studies.jsonl")
    assert [s.id for s in again] == [s.id for s in found.studies] and fingerprint(again) == fingerprint(found.studies)


def test_lateral_films_too(clone):
    assert len(scan_covid_cxr(clone, views=["L"]).studies) == 54 # 55 rows with an image, one of them listed twice


def test_a_missing_film_is_refused_when_asked(clone):
    with pytest.raises(FileNotFoundError, match=r"metadata.csv, row 56: no such image; expected a patient number and an image at .*covid-19-pneumonia-14-PA.png"):
        load_covid_cxr(clone, on_missing="raise")


# broken clones

def make_clone(root, rows, header=HEADER, images=("a.png", "b.png")):
    (root / "images").mkdir(parents=True)
    (root / "metadata.csv").write_bytes((header + rows).encode())
    for name in images:
        Image.new("L", (8, 8)).save(root / "images" / name)
    return root


ROW = "1,COVID-19,PA,X-ray,images,a.png,Clear lungs.\n"


def one_sentence(error):
    text = str(error.value)
    assert "\n" not in text and text.count(". ") == 0, text
    return text


def test_no_folder_no_table_no_column(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_covid_cxr(tmp_path / "none")
    assert "none: there is no such folder; expected a clone" in one_sentence(error) and "git clone" in one_sentence(error)
    with pytest.raises(FileNotFoundError) as error:
        load_covid_cxr(tmp_path)
    assert "no metadata.csv in this folder" in one_sentence(error)
    for i, column in enumerate(HEADER.strip().split(",")):
        with pytest.raises(ValueError, match=f"column '{column}' is missing") as error:
            load_covid_cxr(make_clone(tmp_path / str(i), ROW, HEADER.replace(column, "other")))
        one_sentence(error)


@pytest.mark.parametrize("content, says", [(b"", "column 'patientid' is missing, the columns are none"), (b"\x00\x01\x02", "is missing|not CSV"),
                                           (b"<!DOCTYPE html><html>Not Found</html>", "column 'patientid' is missing"),
                                           (HEADER.encode() + b'1,COVID-19,PA,X-ray,images,a.png,"' + b"x" * 200_000, "after line 1: not CSV .field larger than field limit"),
                                           (HEADER.encode(), "none of 0 rows became a study .rows skipped: none")])
def test_a_table_that_is_none(tmp_path, content, says):
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        load_covid_cxr(tmp_path)
    one_sentence(error)


def test_a_table_that_was_cut(tmp_path):
    with pytest.raises(ValueError, match="row 3: it ends before 'modality', 7 fields were expected"):
        load_covid_cxr(make_clone(tmp_path / "a", ROW + "2,COVID-19,PA\n"))


def test_odd_encodings_and_line_ends(tmp_path):
    root = make_clone(tmp_path / "a", "")
    note = "Fever of 39\xb0C \u2013 pneumonia".encode("cp1252")
    (root / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + HEADER.replace("\n", "\r\n").encode() + b"1, COVID-19 ,PA ,X-ray,images,a.png,\"" + note + b"\r\non both sides\"\r\n")
    study, = load_covid_cxr(root)
    assert study.labels == {"COVID-19": 1.} and study.view == "PA" and study.patient == "1"
    assert " ".join(study.sentences) == "fever of 39 c pneumonia on both sides"


def test_a_row_without_patient_is_skipped_or_refused(tmp_path):
    root = make_clone(tmp_path / "a", ROW + ROW.replace("1,", ",", 1).replace("a.png", "b.png"))
    assert [(s.row, s.reason) for s in scan_covid_cxr(root).skipped] == [(3, "no patient")]
    with pytest.raises(FileNotFoundError, match="row 3: no patient") as error:
        load_covid_cxr(root, on_missing="raise")
    one_sentence(error)
    with pytest.raises(ValueError, match="on_missing is 'ignore': known are 'skip' and 'raise'"):
        load_covid_cxr(root, on_missing="ignore")


def test_a_row_without_file_name_is_not_the_folder(tmp_path):
    root = make_clone(tmp_path / "a", ROW + "2,SARS,PA,X-ray,images,,No name.\n")
    assert [s.reason for s in scan_covid_cxr(root).skipped] == ["no such image"]


def test_no_images_at_all(tmp_path):
    root = make_clone(tmp_path / "a", ROW)
    shutil.rmtree(root / "images")
    with pytest.raises(ValueError, match="none of 1 rows became a study .rows skipped: 1 no such image.; check that images/ is there") as error:
        load_covid_cxr(root)
    one_sentence(error)


def test_annotations_are_extras_but_never_garbage(tmp_path):
    root = make_clone(tmp_path / "a", ROW)
    study, = load_covid_cxr(root)
    assert study.boxes == () and study.masks == {} and read_lung_boxes(root) == {}
    (root / BOXES).parent.mkdir()
    for garbage in "", "[]", "{}", '{"images": [], "categories": [], "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 3, 4]}]}', '{"images": 3, "categories": [], "annotations": []}':
        (root / BOXES).write_text(garbage)
        with pytest.raises(ValueError, match="not COCO annotations .*; restore it with `git checkout annotations`") as error:
            load_covid_cxr(root)
        assert "\n" not in str(error.value)


def test_later_states_write_a_path_of_findings():
    assert split_findings("Pneumonia/Viral/COVID-19") == {"Pneumonia", "Viral", "COVID-19"}
    assert split_findings("COVID-19, ARDS") == {"COVID-19", "ARDS"} and split_findings("No Finding") == {"No Finding"}
    assert split_findings("todo") is split_findings("Unknown") is split_findings("") is None


def test_what_was_skipped_is_one_line_of_the_log(tmp_path, caplog):
    root = make_clone(tmp_path / "a", ROW + ROW.replace("PA", "L") + ROW.replace("a.png", "lost.png"))
    with caplog.at_level(logging.INFO, "cmcgns"):
        studies = load_covid_cxr(root)
    assert [r.getMessage() for r in caplog.records] == ["covid_cxr: 1 studies; rows skipped: 1 view L, 1 no such image"] and len(studies) == 1


def test_a_relative_root_works(tmp_path, monkeypatch):
    make_clone(tmp_path / "a", ROW)
    monkeypatch.chdir(tmp_path)
    assert load_covid_cxr("a")[0].image == Path("a/images/a.png")
