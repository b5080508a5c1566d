"COVIDx: exact counts on the real lists 9A, what they leak, and broken lists."
import csv
import gzip
import io
import logging
import zipfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import one_sentence
from cmcgns.data.covid_cxr import SAME_PATIENT
from cmcgns.data.covidx import (
    SLIPS, THREE, choose_lists, count_slips, find_covidx, find_lists, give_class, load_covidx, published_covidx, read_line, read_list, read_lists, scan_covidx, write_covidx,
)
from cmcgns.data.studies import Box, Meaning, check_disjoint, label_array, load_studies, save_studies, select, shared_patients, split_studies
from cmcgns.data.synthetic import synthesize
from PIL import Image

# the real lists


@pytest.fixture(scope="module")
def lists(shared_data):
    return shared_data / "labels" / "covidx"


@pytest.fixture(scope="module")
def real(lists):
    return scan_covidx(lists, need_images=False)


@pytest.fixture(scope="module")
def raw(lists):
    "The lists, read by other means: part and four fields."
    return [(p, *line.rstrip("\n").split(" ")) for p in ("train", "test") for line in gzip.open(lists / f"{p}_COVIDx9A.txt.gz", "rt")]


@pytest.fixture(scope="module")
def published(lists):
    return published_covidx(lists, need_images=False)


def test_classes_of_the_real_lists(real, published):
    assert str(real) == "covidx: 30530 studies; rows skipped: none" and len({s.id for s in real.studies}) == 30530
    assert published.counts() == {"train": 30130, "test": 400} and published.hash == "515581fb87ea5e97"
    count = {part: Counter(k for s in select(real.studies, published, part) for k, v in s.labels.items() if v) for part in published.parts}
    assert count == {"train": {"normal": 8085, "pneumonia": 5555, "COVID-19": 16490}, "test": {"normal": 100, "pneumonia": 100, "COVID-19": 200}}
    assert (label_array(real.studies, THREE).sum(1) == 1).all()


def test_every_spelling_of_the_real_lists(raw, lists):
    assert Counter((p, label) for p, _, _, label, _ in raw) == {("train", "normal"): 8085, ("train", "pneumonia"): 5555, ("train", "COVID-19"): 16490,
                                                                ("test", "normal"): 100, ("test", "pneumonia"): 100, ("test", "COVID-19"): 200}
    assert Counter((label, source) for p, _, _, label, source in raw if p == "train") == {
        ("COVID-19", "stonybrook"): 14132, ("normal", "rsna"): 7966, ("normal", "rnsa"): 119, ("pneumonia", "rsna"): 5423, ("pneumonia", "rnsa"): 80, ("COVID-19", "sirm"): 943,
        ("COVID-19", "ricord"): 896, ("COVID-19", "cohen"): 270, ("pneumonia", "cohen"): 52, ("COVID-19", "bimcv"): 200, ("COVID-19", "actmed"): 25, ("COVID-19", "fig1"): 24}
    assert {len(r) for r in raw} == {5} and not any(" " in v or not v for r in raw for v in r)
    assert count_slips(lists) == {"source 'rnsa' read as 'rsna'": 199}


def test_loader_agrees_with_the_lists_row_by_row(real, raw):
    assert [s.id for s in real.studies] == [r[2] for r in raw]
    for s, (part, patient, file, label, source) in zip(real.studies, raw):
        assert s.labels[label] == 1 and s.image.parts[-2:] == (part, file)
        name, number = s.patient.split(":", 1)
        assert name == {"rnsa": "rsna"}.get(source, source) and number == (SAME_PATIENT.get(patient, patient) if source == "cohen" else patient)


def test_the_first_9a_is_mended_to_the_same(raw, lists, tmp_path):
    "The 9A of 2021 had the class positive in the 943 rows of sirm, as its issue 209 tells."
    for part in "train", "test":
        (tmp_path / f"{part}_COVIDx9A.txt").write_text("".join(f"{p} {f} {'positive' if s == 'sirm' else k} {s}\n" for q, p, f, k, s in raw if q == part))
    assert published_covidx(tmp_path, need_images=False).hash == published_covidx(lists, need_images=False).hash
    assert count_slips(tmp_path)["class 'positive' read as 'COVID-19'"] == 943
    assert Counter(k for s in scan_covidx(tmp_path, need_images=False).studies for k, v in s.labels.items() if v) == {"normal": 8185, "pneumonia": 5655, "COVID-19": 16690}


def test_patients_and_leaks(real, published, raw):
    check_disjoint(real.studies, published)
    patients = {part: {s.patient for s in select(real.studies, published, part)} for part in published.parts}
    assert {k: len(v) for k, v in patients.items()} == {"train": 16423, "test": 378}
    files = {part: [r[2] for r in raw if r[0] == part] for part in published.parts}
    assert not set(files["train"]) & set(files["test"]) and all(len(set(f)) == len(f) for f in files.values())
    assert len({f.lower() for v in files.values() for f in v}) == 30530
    sources = defaultdict(set)
    for _, patient, _, _, source in raw:
        sources[patient].add(source.replace("rnsa", "rsna"))
    assert all(len(v) == 1 for v in sources.values()) # in 9A; no reason to rely on it
    films = Counter(s.patient for s in select(real.studies, published, "train"))
    assert sum(n > 1 for n in films.values()) == 1649 and sum(n for n in films.values() if n > 1) == 15356
    for source, n in ("sirm", 943), ("rsna", 13788):
        assert len({r[1] for r in raw if r[4].replace("rnsa", "rsna") == source}) == sum(r[4].replace("rnsa", "rsna") == source for r in raw) == n


def test_validation_by_image_is_half_training_patients(real, published):
    "What the code that the published one grew from does: a fifth of the images, patients dropped."
    from sklearn.model_selection import train_test_split
    studies = select(real.studies, published, "train")
    train, validation = train_test_split(studies, train_size=.8, random_state=0)
    shared = {s.patient for s in train} & {s.patient for s in validation}
    assert (len(train), len(validation), len(shared), sum(s.patient in shared for s in validation)) == (24104, 6026, 865, 3036)
    assert not shared_patients(studies, split_studies(studies, {"train": .8, "val": .2}))


def test_the_source_tells_the_class(real, published):
    seen, right, virus = defaultdict(Counter), 0, 0
    for s in select(real.studies, published, "train"):
        seen[s.patient.split(":")[0]][max(s.labels, key=s.labels.get)] += 1
    assert {k for k, v in seen.items() if len(v) > 1 and "COVID-19" in v} == {"cohen"}
    for s in select(real.studies, published, "test"):
        guess = seen[s.patient.split(":")[0]].most_common(1)[0][0]
        right += s.labels[guess] == 1
        virus += (guess == "COVID-19") == s.labels["COVID-19"]
    assert (right, virus) == (300, 400)


def test_rsna_agrees(real, shared_data):
    with zipfile.ZipFile(shared_data / "labels" / "rsna" / "stage_2_train_labels.csv.zip") as z, z.open(z.namelist()[0]) as file:
        target = {r["patientId"]: r["Target"] for r in csv.DictReader(io.TextIOWrapper(file))}
    films = [s for s in real.studies if s.patient.startswith("rsna:")]
    assert len(films) == 13788 and all(target[s.patient[5:]] == "01"[s.labels["pneumonia"] == 1] for s in films)


def test_films_of_the_abdomen(real):
    assert Counter(max(s.labels, key=s.labels.get) for s in real.studies if "ABDOMEN" in s.id.upper()) == {"COVID-19": 430}


def test_cohens_patients_are_those_of_the_collection(raw, shared_data):
    with open(shared_data / "covid-chestxray-dataset" / "metadata.csv", encoding="utf-8", newline="") as file:
        patient = {r["filename"]: r["patientid"] for r in csv.DictReader(file)}
    same = [patient[f] == p for _, p, f, _, source in raw if source == "cohen" and f in patient]
    assert len(same) == 291 and all(same)


# synthetic studies, written and read

@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "200 synthetic studies, some with pneumonia on one side, some on both."
    studies = []
    for i, s in enumerate(synthesize(200, tmp_path_factory.mktemp("world"), size=128)):
        if i % 5 == 0:
            boxes = [b for b in s.boxes if b.label != "pneumonia"] + [Box("pneumonia", 20, 40, 20, 30)] + [Box("pneumonia", 85, 40, 20, 30)] * (i % 10 == 0)
            s = replace(s, boxes=tuple(boxes), labels=dict(s.labels) | {"pneumonia": 1.}, sentences=(), meanings=())
        studies.append(s)
    return studies


@pytest.mark.parametrize("layout", ["9A", "CXR-2"])
def test_roundtrip(world, layout, tmp_path):
    root = write_covidx(world, tmp_path / "covidx", layout)
    assert find_covidx(tmp_path) == root and list(find_lists(root)) == [layout]
    found = scan_covidx(root, on_missing="raise")
    again = {s.id: s for s in found.studies}
    assert found.skipped == [] and set(again) == {f"{s.id}.png" for s in world} and not count_slips(root)
    for s in world:
        other = again[f"{s.id}.png"]
        sick = s.labels.get("pneumonia") or s.labels["consolidation"]
        sides = {b.x + b.w / 2 < 64 for b in s.boxes if b.label == "pneumonia"}
        both = bool(s.labels.get("pneumonia")) and (len(sides) == 2 or any(m.finding == "pneumonia" and m.side == "both" for m in s.meanings))
        truth = {"normal": not sick, "pneumonia": sick and not both, "COVID-19": both}
        assert other.labels == ({k: float(v) for k, v in truth.items()} if layout == "9A" else {"COVID-19": float(both)})
        assert other.image.read_bytes() == s.image.read_bytes() and other.patient == f"synthetic:{s.patient}"
    split = published_covidx(root)
    assert list(split.parts) == (["train", "test"] if layout == "9A" else ["train", "val", "test"]) and sum(split.counts().values()) == 200
    check_disjoint(found.studies, split)
    save_studies(found.studies, tmp_path / "studies.jsonl")
    assert load_studies(tmp_path / "studies.jsonl") == found.studies


def test_the_stand_in(world):
    classes = Counter(give_class(s) for s in world)
    assert set(classes) == set(THREE) and classes["COVID-19"] >= 20
    s = replace(world[1], labels={"consolidation": 0., "pneumonia": 1.}, boxes=(), sentences=("pneumonia on both sides",), meanings=(Meaning("pneumonia", 1, "both"),))
    assert give_class(s) == "COVID-19" and give_class(replace(s, meanings=(Meaning("pneumonia", 1),))) == "pneumonia"
    assert give_class(replace(s, boxes=(Box("pneumonia", 5, 5, 9, 9), Box("pneumonia", 25, 50, 9, 9)), meanings=(), sentences=())) == "pneumonia" # two patches of one lung
    assert give_class(replace(s, labels={"consolidation": None, "pneumonia": None})) == "normal"


def test_what_cannot_be_written(world, tmp_path):
    with pytest.raises(ValueError, match="unknown layout 'A': known are 9A, CXR-2"):
        write_covidx(world, tmp_path, "A")
    with pytest.raises(ValueError, match="'my patient' has a space, which separates the fields of a list; rename it"):
        write_covidx([replace(s, patient="my patient") if s is world[0] else s for s in world], tmp_path)
    with pytest.raises(ValueError, match="is labelled for Edema: 'pneumonia' or 'consolidation' was expected, as synthetic studies have it"):
        write_covidx([replace(s, labels={"Edema": 1.}) for s in world], tmp_path)
    with pytest.raises(ValueError, match="'test' would be empty|'train' would be empty"):
        write_covidx(world[:1], tmp_path)


# lists of other versions, and broken ones

TRAIN, TEST = "1 a.png normal rsna\n2 b.png pneumonia rsna\n", "1 c.png COVID-19 ricord\n"


def make(root, train=TRAIN, test=TEST, version="_COVIDx9A", images="abc"):
    for part, text in ("train", train), ("test", test):
        (root / part).mkdir(parents=True, exist_ok=True)
        if text is not None:
            (root / f"{part}{version}.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    for name in images:
        Image.new("L", (8, 8)).save(root / ("test" if name == "c" else "train") / f"{name}.png")
    return root


def test_versions(tmp_path):
    make(tmp_path)
    for version, classes in ("_COVIDx_CXR-3B", 2), ("_COVIDx9B", 2), ("", 2), ("_COVIDx8A", 3), ("_COVIDx6", 2), ("_COVIDx5", 3):
        root = make(tmp_path / f"v{version}", *((TRAIN, TEST) if classes == 3 else ("1 a.png negative rsna\n2 b.png positive cohen\n", "1 c.png positive ricord\n")), version)
        assert list(find_lists(root)) == [version.removeprefix("_COVIDx").lstrip("_") or "CXR-2"]
        assert [len(s.labels) for s in scan_covidx(root).studies] == [1 if classes == 2 else 3] * 3
    assert [s.labels for s in scan_covidx(tmp_path / "v").studies] == [{"COVID-19": v} for v in (0., 1., 1.)]


def test_three_classes_win_over_two(tmp_path):
    make(tmp_path), make(tmp_path, "1 a.png negative rsna\n", "1 c.png positive ricord\n", "")
    assert choose_lists(tmp_path)[0] == "9A" and choose_lists(tmp_path, "CXR-2")[0] == "CXR-2"
    make(tmp_path, version="_COVIDx8A")
    with pytest.raises(ValueError, match="it holds the lists 8A, 9A; say which with version='9A'") as error:
        scan_covidx(tmp_path)
    one_sentence(error)
    with pytest.raises(ValueError, match="it holds no lists '7A', only CXR-2, 8A, 9A; give one of these as version") as error:
        scan_covidx(tmp_path, "7A")
    one_sentence(error)


def test_test_lists_without_a_source(tmp_path):
    root = make(tmp_path, test="1 c.png COVID-19\n", version="_COVIDx5")
    found = scan_covidx(root)
    assert len(found.studies) == 2 and [(s.name, s.reason, s.broken) for s in found.skipped] == [("test/1 c.png COVID-19", "3 fields instead of 4", True)]
    with pytest.raises(ValueError, match="no row of the test list is a study") as error:
        published_covidx(root)
    one_sentence(error)


def test_packed_lists(tmp_path):
    root = make(tmp_path)
    for file in sorted(root.glob("*.txt")):
        file.with_suffix(".txt.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert len(scan_covidx(root).studies) == 3
    file.with_suffix(".txt.gz").write_bytes(gzip.compress(b"1 a.png normal rsna\n" * 5000)[:-20])
    with pytest.raises(ValueError, match="train_COVIDx9A.txt.gz: it cannot be read as a list .Compressed file ended before"):
        one_sentence_of(root)
    file.with_suffix(".txt.gz").write_bytes(b"no gzip")
    with pytest.raises(ValueError, match="train_COVIDx9A.txt.gz: it cannot be read as a list .Not a gzipped file"):
        one_sentence_of(root)


def one_sentence_of(root, **kwargs):
    "Scan, and check that the error is one sentence."
    try:
        return scan_covidx(root, **kwargs)
    except (ValueError, FileNotFoundError) as e:
        assert "\n" not in str(e) and ". " not in str(e) and len(str(e)) < 700, str(e)
        raise


def test_missing_folders_lists_and_images(tmp_path):
    with pytest.raises(FileNotFoundError, match="none: there is no such folder; expected train_COVIDx9A.txt and test_COVIDx9A.txt"):
        one_sentence_of(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there are no COVIDx lists in this folder; expected train_COVIDx9A.txt"):
        one_sentence_of(tmp_path)
    with pytest.raises(FileNotFoundError, match="of version 9A there is train_COVIDx9A.txt and no test list; expected"):
        one_sentence_of(make(tmp_path / "a", test=None))
    with pytest.raises(FileNotFoundError, match="of version 9A there is test_COVIDx9A.txt and no train list; expected"):
        one_sentence_of(make(tmp_path / "b", train=None))
    root = make(tmp_path / "c", images="ac")
    assert [(s.row, s.name, s.reason, s.broken) for s in scan_covidx(root).skipped] == [(2, "train/b.png", "no such image", True)]
    with pytest.raises(FileNotFoundError, match=r"train_COVIDx9A.txt, row 2: no such image; expected b.png in train/; mend it, or load with on_missing='skip'"):
        one_sentence_of(root, on_missing="raise")
    with pytest.raises(ValueError, match=r"none of 3 rows became a study \(mostly: 3 no such image\); check that train/ and test/ hold the images of train_COVIDx9A.txt, test_COVIDx9A.txt"):
        one_sentence_of(make(tmp_path / "d", images=""))
    with pytest.raises(ValueError, match="on_missing is 'ignore': known are 'skip' and 'raise'"):
        one_sentence_of(root, on_missing="ignore")


@pytest.mark.parametrize("line, reason", [("3 d.png covid rsna", "class 'covid'"), ("3 d.png Normal rsna", "class 'Normal'"), ("3 d.png negative rsna", "class 'negative'"),
                                          ("3 d.png normal", "3 fields instead of 4"), ("d.png  rsna", "2 fields instead of 4"), ("3 d.png  rsna", "3 fields instead of 4"), ("3 my d.png normal rsna", "5 fields instead of 4"),
                                          ("<!DOCTYPE html>", "2 fields instead of 4"), ("\x00\x01\xff", "1 fields instead of 4"), ("3,d.png,normal,rsna", "1 fields instead of 4")])
def test_lines_that_cannot_be_read(tmp_path, line, reason):
    root = make(tmp_path, TRAIN + line + "\n")
    assert [(s.row, s.reason, s.broken) for s in scan_covidx(root).skipped] == [(3, reason, True)]
    with pytest.raises(ValueError, match=f"train_COVIDx9A.txt, row 3: {reason}; expected patient, file, class and source, the class one of normal, pneumonia, COVID-19, and one line a file; mend it, or"):
        one_sentence_of(root, on_missing="raise")


def test_every_slip_is_mended_where_it_belongs():
    lines = {"7 a.png normal rnsa": ("7", "a.png", "normal", "rsna"), "7 a.png positive sirm": ("7", "a.png", "COVID-19", "sirm"), "COVID 12 COVID(12).png COVID-19 sirm": ("COVID_12", "COVID(12).png", "COVID-19", "sirm")}
    for slip, (text, fields) in zip(SLIPS, lines.items()):
        x = read_line(text, 1, THREE)
        assert x[1:5] == fields and x.slips == (slip.name,) and not x.reason
    clean = read_line("positive rnsa.png normal rsna", 1, THREE)
    assert clean[1:5] == ("positive", "rnsa.png", "normal", "rsna") and clean.slips == ()


def test_odd_line_ends_and_marks(tmp_path):
    root = make(tmp_path, b"\xef\xbb\xbf1 a.png normal rsna \r\n\r\n2\tb.png  pneumonia\trsna", TEST)
    assert [s.patient for s in scan_covidx(root, on_missing="raise").studies] == ["rsna:1", "rsna:2", "ricord:1"]
    assert [x.row for x in read_list(root / "train_COVIDx9A.txt", THREE)] == [1, 3]


def test_listed_twice(tmp_path):
    root = make(tmp_path / "a", TRAIN + "1 a.png pneumonia rsna\n")
    assert [(s.row, s.name, s.reason, s.broken) for s in scan_covidx(root).skipped] == [(1, "train/a.png", "listed with two classes", True), (3, "train/a.png", "listed with two classes", True)]
    with pytest.raises(ValueError, match="train_COVIDx9A.txt, row 1: listed with two classes; expected"):
        one_sentence_of(root, on_missing="raise")
    root = make(tmp_path / "b", TRAIN + "2 b.png pneumonia rsna\n9 a.png normal rsna\n")
    assert [(s.row, s.reason, s.broken) for s in scan_covidx(root).skipped] == [(1, "listed with two patients", True), (3, "listed before", False), (4, "listed with two patients", True)]
    root = make(tmp_path / "c", test=TEST + "2 b.png pneumonia rsna\n")
    assert [(s.row, s.name, s.reason, s.broken) for s in scan_covidx(root, on_missing="raise").skipped] == [(2, "train/b.png", "also in test", False)]
    assert published_covidx(root).parts == {"train": ("a.png",), "test": ("b.png", "c.png")}
    root = make(tmp_path / "d", test=TEST + "2 b.png COVID-19 rsna\n") # two classes in two lists
    assert [(s.row, s.name) for s in scan_covidx(root).skipped] == [(2, "train/b.png"), (2, "test/b.png")]


def test_a_class_of_its_own_in_lists_of_two(tmp_path):
    root = make(tmp_path, "1 a.png negative rsna\n2 b.png COVID-19 cohen\n", "1 c.png positive ricord\n", "")
    assert [s.reason for s in scan_covidx(root).skipped] == ["class 'COVID-19'"]


def test_lists_of_somebody_else_are_not_ours(tmp_path):
    for name, text in ("a", "cat dog\n"), ("b", ""), ("c", "images/1.png 0 0 1\n"):
        assert find_covidx(make(tmp_path / name, text, text, "", "")) is None
    assert find_covidx(tmp_path) is None and find_covidx(tmp_path / "none") is None
    (tmp_path / "e" / "train_COVIDx9A.txt").mkdir(parents=True)
    assert find_covidx(tmp_path / "e") is None


def test_empty_lists(tmp_path):
    with pytest.raises(ValueError, match="none of 0 rows became a study .mostly: the lists are empty."):
        one_sentence_of(make(tmp_path, "", ""))


def test_images_of_another_part_or_name(tmp_path, caplog):
    root = make(tmp_path, TRAIN + "COVID_7 COVID(7).png COVID-19 sirm\n3 ../d.png normal rsna\n", images="abc")
    Image.new("L", (8, 8)).save(root / "d.png") # outside of the parts: a name is no path
    (root / "val").mkdir()
    (root / "train" / "b.png").rename(root / "val" / "b.png")
    Image.new("L", (8, 8)).save(root / "train" / "COVID-7.png")
    with caplog.at_level(logging.INFO, "cmcgns"):
        studies = load_covidx(root)
    assert [(s.id, s.image.relative_to(root).as_posix()) for s in studies] == [("a.png", "train/a.png"), ("b.png", "val/b.png"), ("COVID(7).png", "train/COVID-7.png"), ("c.png", "test/c.png")]
    assert [r.getMessage() for r in caplog.records] == ["covidx: 4 studies; rows skipped: 1 no such image; mended: 1 images of another name"]
    assert published_covidx(root).counts() == {"train": 3, "test": 1}


def test_a_relative_root_works(tmp_path, monkeypatch):
    make(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert load_covidx("a")[0].image == Path("a/train/a.png") and find_covidx("a") == Path("a")
    assert [len(v) for v in read_lists("a")[1].values()] == [2, 1]
