"The COVID-19 image data collection: exact counts on the real files, clones that are written, and broken ones."
import csv
import json
import logging
import re
import shutil
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import one_sentence
from cmcgns.data.covid_cxr import (
    BOXES, MASKS, SAME_PATIENT, SEVERITY, box_lungs, find_covid_cxr, join_patients, load_covid_cxr, make_header, read_lung_boxes, read_severity, read_table, scan_covid_cxr, split_findings, write_covid_cxr,
)
from cmcgns.data.studies import Box, Runs, Study, check_disjoint, fingerprint, load_studies, read_mask, save_studies, split_studies
from cmcgns.data.synthetic import synthesize
from cmcgns.image import read_image
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


def test_without_images_nothing_is_missing(clone, found, tmp_path):
    table = scan_covid_cxr(clone, need_images=False)
    assert len(table.studies) == 566 and Counter(s.reason for s in table.skipped) == {"modality CT": 84, "view L": 58, "view not given": 35, "view ?": 4, "listed before": 4}
    shutil.copy(clone / "metadata.csv", tmp_path)
    alone = scan_covid_cxr(tmp_path, need_images=False)
    assert [(s.id, s.labels, s.sentences) for s in alone.studies] == [(s.id, s.labels, s.sentences) for s in table.studies]


def test_where_it_is(clone, tmp_path):
    assert find_covid_cxr(clone) == find_covid_cxr(str(clone.parent)) == clone and find_covid_cxr(clone / "images") is None
    assert find_covid_cxr(tmp_path) is find_covid_cxr(tmp_path / "nothing") is find_covid_cxr(clone / "metadata.csv") is None
    for i, other in enumerate(["subject_id,study_id,dicom_id\n", "", "\0\1\2", "\n\n", "x" * 100_000]):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "metadata.csv").write_text(other)
    assert find_covid_cxr(tmp_path) is None
    (tmp_path / "z").mkdir()
    (tmp_path / "z" / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + b'"patientid","offset","finding","clinical_notes"\r\n')
    assert find_covid_cxr(tmp_path) == tmp_path / "z"


# a header

def test_headers_of_the_real_films(clone, found):
    told = scan_covid_cxr(clone, header=True)
    assert [s.id for s in told.studies] == [s.id for s in found.studies]
    for s, plain in zip(told.studies, found.studies):
        ours = s.sentences[:len(s.sentences) - len(plain.sentences)]
        assert len(ours) in (1, 2) and s.sentences == (*ours, *plain.sentences) and s.report["notes"] == plain.report["notes"]
        assert ". ".join(ours) + "." == s.report["header"] and "header" not in plain.report
        assert ours[0] == f"{s.view.lower()} chest radiograph" and replace(s, sentences=plain.sentences, report=plain.report) == plain
    first = Counter(s.sentences[0] for s in told.studies)
    assert first == {"pa chest radiograph": 305, "ap supine chest radiograph": 135, "ap chest radiograph": 115}
    people = Counter(s.sentences[1] for s in told.studies if len(s.report["header"].split(". ")) > 1)
    assert sum(people.values()) == 517 and sum(n for p, n in people.items() if "year old" in p) == 414
    assert sum(n for p, n in people.items() if p in ("a male patient", "a female patient")) == 103
    assert sum(s.sentences in [("pa chest radiograph",), ("ap chest radiograph",), ("ap supine chest radiograph",)] for s in told.studies) == 6


def test_the_view_is_no_innocent_word(found):
    known = Counter((s.view, s.labels["COVID-19"]) for s in found.studies if s.labels["COVID-19"] is not None)
    assert (known["AP Supine", 1], known["AP Supine", 0]) == (120, 12) and (known["PA", 1], known["PA", 0]) == (216, 77)


def test_a_table_without_sex_and_age(tmp_path):
    study, = load_covid_cxr(make_clone(tmp_path / "a", ROW), header=True)
    assert study.sentences == ("pa chest radiograph", "clear lungs") and study.report == {"header": "pa chest radiograph.", "notes": "Clear lungs."}


@pytest.mark.parametrize("sex, age, says", [("M", "65", "a 65 year old man"), ("f", "65.0", "a 65 year old woman"), ("", "8", "an 8 year old patient"), ("M", "11", "an 11 year old boy"), ("F", "17", "a 17 year old girl"),
                                            ("M", "18", "an 18 year old man"), ("F", "89", "an 89 year old woman"), ("M", "110", "a 110 year old man"), ("M", "60s", "a man in his 60s"), ("", "70's", "a patient in their 70s"),
                                            ("M", "", "a male patient"), ("F", "nan", "a female patient"), ("?", "?", ""), ("X", "1e3", ""), ("", "-5", ""), ("", "0", ""), ("", "400", ""), ("M", "20-30", "a male patient")])
def test_people_in_words(sex, age, says):
    assert make_header(dict(view="", sex=sex, age=age)) == (says and f"{says}.")


# severity

def test_real_severity_scores(clone, found):
    scores = read_severity(clone)
    films = {s.id for s in found.studies}
    assert len(scores) == 94 and set(scores) - films == {"covid-19-pneumonia-14-PA.png"} # of a film that is not in the folder
    assert scores["01E392EE-69F9-4E33-BFCE-E5C968654078.jpeg"] == (6., 4.) and max(s.extent for s in scores.values()) <= 8 and max(s.opacity for s in scores.values()) <= 6
    assert min(scores.values()) == (0, 0)


@pytest.mark.parametrize("content, says", [
    ("", None), ("## only comments,,\n", None), ("name,extent\na,1\n", "row 1: expected the columns filename, geographic_mean, opacity_mean"),
    ("## c\nfilename,geographic_mean,opacity_mean\na.png,1\n", "row 3: expected a file name and two numbers"),
    ("filename,geographic_mean,opacity_mean\na.png,1,two\n", "row 2: expected a file name and two numbers .could not convert string to float: 'two'"),
    ("filename,geographic_mean,opacity_mean\na.png,nan,1\n", "row 2: nan, 1.0 is no extent of 0 to 8 and opacity of 0 to 6"),
    ("filename,geographic_mean,opacity_mean\na.png,1,6.5\n", "row 2: 1.0, 6.5 is no extent")])
def test_severity_scores_that_are_none(tmp_path, content, says):
    (tmp_path / SEVERITY).parent.mkdir()
    with pytest.raises(FileNotFoundError, match="covid-severity-scores.csv: there is no such file; restore it with"):
        read_severity(tmp_path)
    (tmp_path / SEVERITY).write_text(content)
    with pytest.raises(ValueError, match=says or "no row with scores") as error:
        read_severity(tmp_path)
    one_sentence(error)


# written clones

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return synthesize(200, tmp_path_factory.mktemp("world"), size=128, masks=True)


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_two_hundred_synthetic_studies_come_back(world, tmp_path):
    root = write_covid_cxr(world, tmp_path / "covid")
    back = scan_covid_cxr(root, on_missing="raise")
    assert back.skipped == [] and len(back.studies) == 200 and find_covid_cxr(tmp_path) == root
    findings = {k for s in world for k, v in s.labels.items() if v} - {"devices", "foreign object"}
    assert len(findings) >= 7
    for s, r in zip(world, back.studies):
        expected = {k.capitalize(): s.labels[k] for k in findings}
        assert r.labels == expected | {"No Finding": float(not any(expected.values()))}
        assert (r.id, r.patient, r.view, r.sentences) == (f"{s.id}.png", s.patient, s.view, s.sentences)
        assert (read_image(r.image) == read_image(s.image)).all()
        mask, again = read_mask(s.masks["lungs"]), read_mask(r.masks["lungs"])
        assert overlap(mask, again) >= .99
        assert [b.label for b in r.boxes] == ["right lung", "left lung"]
        right, left = r.boxes
        for box in r.boxes: # tight, so within a pixel of whatever is in it
            inside = again[int(box.y):int(box.y + box.h), int(box.x):int(box.x + box.w)]
            assert inside.any(0).all() and inside[[0, -1]].any(1).all()
        covered = np.zeros_like(again)
        for b in r.boxes: covered[int(b.y):int(b.y + b.h), int(b.x):int(b.x + b.w)] = True
        assert right.x + right.w <= left.x and (covered | ~again).all()
    coco = json.loads((root / BOXES).read_text())
    assert len(coco["images"]) == 200 and [a["id"] for a in coco["annotations"]] == list(range(1, 401))
    check_disjoint(back.studies, split_studies(back.studies, stratify="Pneumonia" if "pneumonia" in findings else "Effusion"))


def test_boxes_that_are_given_come_back_as_they_are(world, tmp_path):
    given = Box("left lung", 60.25, 20, 41.5, 70), Box("right lung", 10, 20.75, 41, 70)
    studies = [replace(world[0], boxes=(*given, Box("effusion", 1, 2, 3, 4))), replace(world[1], masks={}), replace(world[2], masks={"lungs": Runs(128, 128, (), ())})]
    back = load_covid_cxr(write_covid_cxr(studies, tmp_path / "a"))
    assert [s.boxes for s in back] == [given, (), ()] and [list(s.masks) for s in back] == [["lungs"], [], ["lungs"]]
    assert not read_mask(back[2].masks["lungs"]).any()


def test_the_real_collection_comes_back(clone, found, tmp_path):
    back = load_covid_cxr(write_covid_cxr(found.studies, tmp_path / "again"))
    assert len(back) == 555
    unnamed = set(found.studies[0].labels) - set(back[0].labels)
    assert unnamed == {"Chlamydophila"} and not any(s.labels["Chlamydophila"] for s in found.studies) # only other views have it
    for s, r in zip(found.studies, back):
        labels = {k: v for k, v in s.labels.items() if k not in unnamed}
        assert replace(r, image=s.image, masks=s.masks, boxes=s.boxes, report=s.report) == replace(s, labels=labels)
        assert r.report["notes"] == s.report["notes"] and list(r.masks) == list(s.masks)
        assert sorted(r.boxes) == sorted(s.boxes or (box_lungs(read_mask(s.masks["lungs"])) if s.masks else ()))
        if s.masks: assert (read_mask(r.masks["lungs"]) == read_mask(s.masks["lungs"])).all()


def test_names_of_findings(world, tmp_path):
    names = {"consolidation": "COVID-19", "pneumonia": "COVID-19", **{k: "" for k in world[0].labels if k not in ("consolidation", "pneumonia")}}
    back = load_covid_cxr(write_covid_cxr(world[:60], tmp_path / "a", names))
    assert [s.labels["COVID-19"] for s in back] == [float(bool(s.labels["consolidation"] or s.labels.get("pneumonia"))) for s in world[:60]]
    assert set(back[0].labels) == {"COVID-19", "No Finding"}


def test_views_notes_and_kinds_of_images(tmp_path):
    image = np.arange(6400, dtype=np.uint8).reshape(80, 80)
    for name in "a.png", "b.JPEG", "c.bmp": Image.fromarray(image).save(tmp_path / name)
    studies = [Study("p1/s1", tmp_path / "a.png", "1", ("no effusion", "fever of 38 5 c and no 3 in e g dr lee"), view="LL"),
               Study("b.JPEG", tmp_path / "b.JPEG", "2", ("a b",), {"edema": None}, "AP Supine", report={"findings": "Clear. No change.", "impression": "1. Well."}),
               Study("c", tmp_path / "c.bmp", "3", labels={"edema": 1.}, view="PA")]
    found = scan_covid_cxr(write_covid_cxr(studies, tmp_path / "clone"), views=["L", "PA", "AP Supine"])
    one, two, three = found.studies
    assert [s.id for s in found.studies] == ["p1_s1.png", "b.JPEG", "c.png"] and [s.view for s in found.studies] == ["L", "AP Supine", "PA"]
    assert one.sentences == studies[0].sentences and two.report["notes"] == "1. Well.\n\nClear. No change." and three.sentences == ()
    assert two.labels == {"Edema": None} and one.labels == {"Edema": None} and three.labels == {"Edema": 1.}
    assert two.image.read_bytes() == (tmp_path / "b.JPEG").read_bytes() and (read_image(three.image) == image).all()


@pytest.mark.parametrize("change, says", [
    (dict(id="s1"), "study 's1': there is another one of the name s1, and both would have the same mask; give it another id"),
    (dict(labels={"edema": None, "nodule": 1.}), r"study 's2': 'edema' is unknown and others are known, the table can only leave all of them open; leave it out with names={'edema': ''}"),
    (dict(labels={"Todo": 1.}), "study 's2': a finding 'Todo' would be read as something else; give it another name with names"),
    (dict(labels={"Lung/Opacity": 1.}), "a finding 'Lung/Opacity' would be read as something else")])
def test_studies_that_the_layout_cannot_hold(tmp_path, change, says):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    study = Study("s2", tmp_path / "a.png", "1")
    with pytest.raises(ValueError) as error:
        write_covid_cxr([replace(study, id="s1"), replace(study, **change)], tmp_path / "clone")
    assert says in one_sentence(error) and find_covid_cxr(tmp_path) is None # half a clone is none


def test_masks_of_odd_shapes():
    one = np.zeros((9, 9), bool)
    one[4, 4] = True
    assert box_lungs(one) == (Box("left lung", 4, 4, 1, 1),)
    assert {b.label for b in box_lungs(np.ones((4, 7), bool))} == {"right lung", "left lung"} and sum(b.w for b in box_lungs(np.ones((4, 7), bool))) == 7


# broken clones

def make_clone(root, rows, header=HEADER, images=("a.png", "b.png")):
    (root / "images").mkdir(parents=True)
    (root / "metadata.csv").write_bytes((header + rows).encode())
    for name in images:
        Image.new("L", (8, 8)).save(root / "images" / name)
    return root


ROW = "1,COVID-19,PA,X-ray,images,a.png,Clear lungs.\n"


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
                                           (HEADER.encode() + b'1,COVID-19,PA,X-ray,images,a.png,"' + b"x" * 200_000, "after row 1: not CSV .field larger than field limit"),
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
