"CheXpert: exact counts on the real table, the published split replayed, writer then loader, and broken downloads."
import gzip
import logging
import os
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import one_sentence
from cmcgns.data.chexpert import (
    FINDINGS, FIVE, MISSING, PUBLISHED, UNCERTAIN, find_chexpert, find_patients, find_tables, list_films, load_chexpert, name_films, published_chexpert, read_path, replay_published_split,
    scan_chexpert, split_chexpert, write_chexpert,
)
from cmcgns.data.mimic_cxr import UNCERTAIN as MIMIC
from cmcgns.data.studies import Study, check_disjoint, label_array, load_studies, save_studies, shared_patients
from cmcgns.data.synthetic import synthesize
from PIL import Image

# the real table


@pytest.fixture(scope="module")
def folder(shared_data):
    return shared_data / "labels" / "chexpert"


@pytest.fixture(scope="module")
def table(folder):
    "The table, read by other means."
    return pd.read_csv(folder / "train.csv.gz")


@pytest.fixture(scope="module")
def films(folder):
    "All rows, all findings."
    return scan_chexpert(folder, FINDINGS, "all", need_images=False)


@pytest.fixture(scope="module")
def frontal(folder):
    return scan_chexpert(folder, need_images=False)


def test_known_counts(films, frontal, folder):
    assert find_chexpert(folder) == find_chexpert(folder.parent) == folder
    assert len(films.studies) == len({s.id for s in films.studies}) == 223_414 and films.skipped == []
    assert len(frontal.studies) == 191_027 and len(frontal.skipped) == 32_387
    assert len({s.patient for s in films.studies}) == 64_540 and len({s.patient for s in frontal.studies}) == 64_534
    assert str(frontal) == "chexpert: 191027 studies; rows skipped: 32387 lateral view" and not any(s.broken for s in frontal.skipped)
    assert Counter(s.view for s in films.studies) == {"AP": 161_590, "PA": 29_420, "Lateral": 32_387, "LL": 16, "RL": 1}
    assert sorted({s.patient for s in films.studies})[-1] == "patient64540" and len({s.id.rsplit("/", 1)[0] for s in films.studies}) == 187_641


def test_every_field_of_every_row(films, table):
    assert [s.id for s in films.studies] == [p.split("/", 1)[1] for p in table.Path]
    ours, theirs = label_array(films.studies, FINDINGS), table[list(FINDINGS)].fillna(0).replace(-1, np.nan).to_numpy(np.float32)
    assert np.array_equal(ours, theirs, equal_nan=True)
    assert np.array_equal(label_array(films.studies[:3], ["Edema"]), [[0], [np.nan], [0]], equal_nan=True)
    shown = table["Frontal/Lateral"].str.lower()
    assert (table.Path.str.extract(r"view\d+_(\w+)\.jpg")[0] == shown).all()


# finding: yes, no, uncertain, blank of the frontal films
ANSWERS = {"Atelectasis": (29_720, 1_025, 29_863, 130_419), "Cardiomegaly": (23_385, 7_869, 6_707, 153_066), "Consolidation": (12_983, 19_608, 24_381, 134_055),
           "Edema": (49_675, 15_915, 11_818, 113_619), "Pleural Effusion": (76_899, 25_299, 9_578, 79_251)}


def count(studies, finding):
    labels = Counter(s.labels[finding] for s in studies)
    return labels[1.], labels[0.], labels[None]


def test_what_the_mapping_of_uncertain_labels_does(folder, frontal):
    for finding, (yes, no, perhaps, blank) in ANSWERS.items():
        assert yes + no + perhaps + blank == 191_027
        assert count(frontal.studies, finding) == (yes, no + blank, perhaps)
    assert sum(None in s.labels.values() for s in frontal.studies) == 55_533
    for how in "published", "positive", "negative":
        studies = load_chexpert(folder, uncertain=how, need_images=False)
        for finding, (yes, no, perhaps, blank) in ANSWERS.items():
            up = perhaps * {"positive": 1, "negative": 0, "published": PUBLISHED[finding]}[how]
            assert count(studies, finding) == (yes + up, no + blank + perhaps - up, 0), (how, finding)
    studies = load_chexpert(folder, blank="unknown", need_images=False)
    for finding, (yes, no, perhaps, blank) in ANSWERS.items():
        assert count(studies, finding) == (yes, no, perhaps + blank)
    assert count(studies, "Atelectasis")[0] / sum(count(studies, "Atelectasis")[:2]) > .96 # blanks are the negatives


def test_the_published_mapping_is_the_one_of_mrms_lists(folder, shared_data):
    "Somebody else's lists carry labels: the published mapping, without an exception."
    ours = {s.id: [int(s.labels[f]) for f in FIVE] for s in load_chexpert(folder, views="all", uncertain="published", need_images=False)}
    seen = {}
    for name in "train_1", "train_10", "val_list":
        for line in (shared_data / "splits/mrm/chexpert" / f"{name}.txt").read_text().splitlines():
            path, *labels = line.split()
            seen[read_path(path).id] = list(map(int, labels))
    assert len(seen) == 28_812 and all(ours[i] == labels for i, labels in seen.items())
    assert PUBLISHED == MIMIC["published"] == dict(zip(FIVE, (1, 0, 0, 1, 1)))


# the published split


def pandas_replay(table, seed, five_seed):
    "The published steps in the library that they were written in."
    rng = np.random.RandomState(seed)
    known = table.fillna({f: 0 for f in FINDINGS})
    others, drawn = [f for f in FINDINGS if f != "No Finding"], []
    for finding in FIVE:
        alone = known[(known["Frontal/Lateral"] == "Frontal") & (known[finding] == 1) & (known[[f for f in others if f != finding]] == 0).all(axis=1)]
        drawn.append(alone.sample(n=200, random_state=rng if five_seed is None else five_seed))
    five = pd.concat(drawn)
    left = table[~table.Path.isin(five.Path)]
    numbers = rng.choice(len(left), size=5000, replace=False)
    return {"train": left.drop(numbers, errors="ignore"), "validation": left.iloc[numbers], "5x200": five}


def overlap(parts, keep=lambda i: True):
    train, validation = ([i for i in parts[k] if keep(i)] for k in ("train", "validation"))
    rows, people = set(train), {read_path(i).patient for i in train}
    return len(validation), sum(i in rows for i in validation), sum(read_path(i).patient in people for i in validation)


@pytest.mark.parametrize("seed, five_seed, leaks, of_patients, neither", [(0, 0, 4907, 4990, 4888), (0, None, 4880, 4982, 4852), (1, None, 4869, 4992, 4843), (2, None, 4879, 4989, 4860),
                                                                         pytest.param(3, None, 4874, 4983, 4853, marks=pytest.mark.slow), pytest.param(4, None, 4870, 4992, 4839, marks=pytest.mark.slow)])
def test_the_published_split_leaks(folder, table, seed, five_seed, leaks, of_patients, neither):
    parts = replay_published_split(folder, seed, five_seed)
    assert overlap(parts) == (5000, leaks, of_patients)
    assert 223_414 - 1000 - len({*parts["train"], *parts["validation"]}) == neither
    theirs = pandas_replay(table, seed, five_seed)
    assert {k: [p.split("/", 1)[1] for p in v.Path] for k, v in theirs.items()} == {k: list(v) for k, v in parts.items()}
    assert theirs["validation"].index.isin(theirs["train"].index).sum() == leaks


def test_what_of_it_is_read(folder, table):
    "Frontal films, and the 1 % and 10 % that the published code trains on."
    parts = replay_published_split(folder)
    view = dict(zip(table.Path.str.split("/", n=1).str[1], table["Frontal/Lateral"]))
    assert overlap(parts, lambda i: view[i] == "Frontal") == (4284, 4203, 4272)
    train, validation = (pd.Series([i for i in parts[k] if view[i] == "Frontal"]) for k in ("train", "validation"))
    for fraction, n, rows, people in (.01, 1858, 36, 338), (.1, 18_577, 404, 1958):
        some = train.sample(frac=fraction, random_state=42)
        assert (len(some), *overlap(dict(train=some, validation=validation))[1:]) == (n, rows, people)
    people = {read_path(i).patient for i in parts["train"]}
    assert sum(read_path(i).patient in people for i in parts["5x200"]) == 828
    meant = {*(read_path(p).id for p in table.Path)} - {*parts["validation"], *parts["5x200"]}
    assert overlap(parts | {"train": meant}) == (5000, 0, 4490)


def test_ours_leaks_nothing(frontal):
    official = [Study(f"valid/patient{n}/study1/view1_frontal.jpg", Path("x"), f"patient{n}", labels=dict.fromkeys(FIVE, 0.)) for n in range(64_541, 64_741)]
    studies = frontal.studies + official
    split = split_chexpert(studies)
    assert split.counts() == {"train": 186_025, "validation": 5_002, "test": 200} and split.hash == split_chexpert(studies[::-1]).hash
    check_disjoint(studies, split)
    assert overlap(split.parts) == (5002, 0, 0)
    assert split_chexpert(studies, seed=1).parts["validation"] != split.parts["validation"]


# writer, then loader


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return synthesize(200, tmp_path_factory.mktemp("synthetic"), size=128, seed=5)


NAMES = {"cardiomegaly": "Cardiomegaly", "effusion": "Pleural Effusion", "pneumothorax": "Pneumothorax", "consolidation": "Consolidation", "atelectasis": "Atelectasis", "edema": "Edema",
         "nodule": "Lung Lesion", "pneumonia": "Pneumonia"}


@pytest.fixture(scope="module")
def written(drawn, tmp_path_factory):
    "Some labels made unknown, a few films lateral."
    studies = [replace(s, labels={**s.labels, "edema": None if i % 10 == 3 else s.labels["edema"]}, view="Lateral" if i % 25 == 7 else s.view) for i, s in enumerate(drawn)]
    return studies, write_chexpert(studies, tmp_path_factory.mktemp("tree") / "renamed", valid=.2)


def test_writer_then_loader(written):
    studies, tree = written
    found, names = scan_chexpert(tree, FINDINGS, "all", on_missing="raise"), name_films(studies, .2)
    back = {s.id: s for s in found.studies}
    assert len(back) == 200 and found.skipped == [] and {p: len(v) for p, v in published_chexpert(tree, "all").parts.items()}.keys() == {"train", "valid"}
    for s in studies:
        b = back[names[s.id]]
        assert {NAMES[k]: v for k, v in s.labels.items() if k in NAMES} == {k: b.labels[k] for k in map(NAMES.get, s.labels) if k}
        assert b.view == s.view and (b.labels["No Finding"] == 1) == (not any(v in (1, None) for k, v in s.labels.items() if k in NAMES)) and b.labels["Fracture"] == 0
        with Image.open(s.image) as a, Image.open(b.image) as c:
            assert a.size == c.size and c.format == "JPEG" and np.abs(np.asarray(a.convert("L"), int) - np.asarray(c.convert("L"), int)).mean() < 4
    assert len({(s.patient, back[names[s.id]].patient) for s in studies}) == len({s.patient for s in studies}) == len({s.patient for s in back.values()})
    assert not shared_patients(found.studies, published_chexpert(tree, "all"))
    assert sum(s.view == "Lateral" for s in studies) == 8 == 200 - len(scan_chexpert(tree).studies)


def test_what_the_loader_reads_the_writer_keeps(written, tmp_path):
    one = load_chexpert(written[1], FINDINGS, "all")
    two = load_chexpert(write_chexpert(one, tmp_path / "again"), FINDINGS, "all")
    assert [(s.id, s.patient, s.view, s.labels) for s in one] == [(s.id, s.patient, s.view, s.labels) for s in two]
    assert [s.image.read_bytes() for s in one] == [s.image.read_bytes() for s in two] # a JPEG is copied
    save_studies(two, tmp_path / "studies.jsonl")
    assert load_studies(tmp_path / "studies.jsonl") == two


def test_split_of_a_written_tree(written):
    studies = load_chexpert(written[1])
    split = split_chexpert(studies, validation=20)
    check_disjoint(studies, split)
    assert set(split.parts["test"]) == {s.id for s in studies if s.id.startswith("valid/")} and 10 <= len(split.parts["validation"]) <= 30


def test_what_the_writer_refuses(drawn, tmp_path):
    with pytest.raises(ValueError, match="no studies to write"):
        write_chexpert([], tmp_path / "a")
    with pytest.raises(ValueError, match="is there twice: ids must be unique"):
        write_chexpert([drawn[0], drawn[0]], tmp_path / "a")
    write_chexpert(drawn[:2], tmp_path / "a")
    with pytest.raises(FileExistsError, match="train.csv: it is there already; give an empty folder"):
        write_chexpert(drawn[:2], tmp_path / "a")


# the trees people have

HEADER = ",".join(("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *FINDINGS)) + "\n"


def row(path, view="Frontal", position="AP", **labels):
    return ",".join((path, "Male", "60", view, position, *(labels.get(f.replace(" ", "_"), "") for f in FINDINGS))) + "\n"


def place(root, path):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save(root / path)


A, B = "train/patient00001/study1/view1_frontal.jpg", "train/patient00002/study1/view1_frontal.jpg"


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "CheXpert-v1.0-small"
    for path in A, B:
        place(root, path)
    (root / "train.csv").write_text(HEADER + row(f"CheXpert-v1.0-small/{A}", Edema="1.0") + row(f"CheXpert-v1.0-small/{B}", Edema="-1.0"))
    return root


def ids(root, **kwargs):
    return [s.id for s in load_chexpert(root, on_missing="raise", **kwargs)]


def test_a_folder_of_any_name(tree, tmp_path):
    other = tree.rename(tmp_path / "stanford (2)")
    assert ids(other) == [A, B] and find_chexpert(tmp_path) == other
    assert all(s.image.is_file() for s in load_chexpert(other))


@pytest.mark.parametrize("prefix", ["", "CheXpert-v1.0/", "/data/me/CheXpert-v1.0-small/", "chexpert\\", "some/train/"])
def test_paths_of_any_beginning(tree, prefix):
    (tree / "train.csv").write_text(HEADER + row(prefix + A) + row(prefix + B.replace("/", "\\")))
    assert ids(tree) == [A, B]


def test_packed_tables_and_odd_line_ends(tree):
    text = (tree / "train.csv").read_bytes()
    (tree / "train.csv").unlink()
    (tree / "train.csv.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n")))
    assert ids(tree) == [A, B] and find_chexpert(tree.parent) == tree


def test_the_full_download_as_it_unpacks(tmp_path):
    first, third, fourth = (tmp_path / f"CheXpert-v1.0 batch {n}" for n in ("1 (validate & csv)", "3 (train 2)", "4 (train 3)"))
    place(third, "patient21514/study1/view1_frontal.jpg")
    place(fourth, "patient43018/study1/view1_frontal.jpg")
    place(first, "valid/patient64541/study1/view1_frontal.jpg")
    (first / "train.csv").write_text(HEADER + "".join(row(f"CheXpert-v1.0/train/patient{n}/study1/view1_frontal.jpg") for n in (21514, 43018)))
    (first / "valid.csv").write_text(HEADER + row("CheXpert-v1.0/valid/patient64541/study1/view1_frontal.jpg"))
    assert find_chexpert(tmp_path) == first and len(ids(first)) == 3
    assert [s.image.parts[-4] for s in load_chexpert(first)] == [third.name, fourth.name, "valid"]


def test_batches_beside_a_small_tree_are_not_its_own(tree):
    place(tree.parent / "CheXpert-v1.0 batch 2 (train 1)", "patient00009/study1/view1_frontal.jpg")
    assert sorted(find_patients(tree, "train")) == ["patient00001", "patient00002"]


@pytest.mark.parametrize("name", ["test.csv", "test_labels.csv", "test.csv.gz"])
def test_a_test_table_with_paths_and_labels_alone(tree, name):
    film = "test/patient64741/study1/view1_frontal.jpg"
    place(tree, film)
    text = f"Path,{','.join(FIVE)}\n{film},0,1,0,1,1\nCheXpert/{film.replace('frontal', 'lateral')},0,1,0,1,1\n"
    (tree / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    studies = load_chexpert(tree, on_missing="raise")
    assert studies[-1].id == film and studies[-1].view == "Frontal" and list(studies[-1].labels.values()) == [0, 1, 0, 1, 1]
    assert published_chexpert(tree).counts() == {"train": 2, "test": 1}


def test_somebody_elses_train_csv(tmp_path):
    (tmp_path / "lovt").mkdir()
    (tmp_path / "lovt" / "train.csv").write_text("ID,boxes,classes\na,,\n")
    (tmp_path / "object").mkdir()
    (tmp_path / "object" / "train.csv").write_text("image_name,annotation\n00001.jpg,\n")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.csv.gz").write_bytes(b"no archive")
    assert find_chexpert(tmp_path) is None


def test_folders_are_listed_once_and_files_are_not_asked_for(tree, monkeypatch):
    rows = ""
    for p in range(50):
        for s in range(3):
            path = f"train/patient{p:05}/study{s}/view1_frontal.jpg"
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).touch()
            rows += row(path)
    (tree / "train.csv").write_text(HEADER + rows)
    listed, real = Counter(), os.listdir
    def listdir(folder="."):
        listed[str(folder)] += 1
        return real(folder)
    def refuse(*args, **kwargs):
        raise AssertionError("a film was asked for by itself")
    monkeypatch.setattr(os, "listdir", listdir)
    with monkeypatch.context() as m:
        m.setattr(os.path, "isfile", refuse)
        m.setattr(os.path, "exists", refuse)
        real_stat = os.stat
        m.setattr(os, "stat", lambda path, *a, **k: refuse() if str(path).endswith(".jpg") else real_stat(path, *a, **k))
        assert len(load_chexpert(tree)) == 150
    below = {k: n for k, n in listed.items() if "/train" in k}
    assert set(below.values()) == {1} and len(below) == 1 + 50 + 150
    listed.clear()
    assert len(load_chexpert(tree, need_images=False)) == 150 and sum("patient" in k for k in listed) == 0


def test_stray_files_do_no_harm(tree):
    (tree / "train" / "patient00001" / ".DS_Store").touch()
    (tree / "train" / ".DS_Store").touch()
    (tree / "train" / "patient_notes.txt").touch()
    assert ids(tree) == [A, B]


def test_a_relative_root(tree, monkeypatch):
    monkeypatch.chdir(tree.parent)
    assert load_chexpert(tree.name)[0].image == Path(tree.name, A)
    monkeypatch.chdir(tree)
    assert ids(".") == [A, B]


def test_the_log_has_one_line(tree, caplog):
    (tree / B).unlink()
    with caplog.at_level(logging.INFO, "cmcgns"):
        load_chexpert(tree)
    assert [r.getMessage() for r in caplog.records] == ["chexpert: 1 studies; rows skipped: 1 no such image"]


# broken trees


def test_a_missing_film(tree):
    for gone in (tree / A).unlink, lambda: shutil.rmtree(tree / B.split("/study")[0]):
        gone()
    place(tree, "train/patient00003/study1/view1_frontal.jpg")
    with open(tree / "train.csv", "a") as f:
        f.write(row("x/train/patient00003/study1/view1_frontal.jpg"))
    found = scan_chexpert(tree)
    assert [s.patient for s in found.studies] == ["patient00003"]
    assert [(s.row, s.name, s.reason, s.broken) for s in found.skipped] == [(2, f"CheXpert-v1.0-small/{A}", MISSING, True), (3, f"CheXpert-v1.0-small/{B}", MISSING, True)]
    with pytest.raises(FileNotFoundError, match=r"train.csv, row 2: no such image \(CheXpert-v1.0-small/train/patient00001/.*\); expected that file below the folder of the table; restore it, or load with on_missing='skip'") as error:
        load_chexpert(tree, on_missing="raise")
    one_sentence(error)


@pytest.mark.parametrize("bad, reason", [
    (row("train/patient00003/view1_frontal.jpg"), "a path that is none of CheXpert"), (row(""), "a path that is none of CheXpert"), (row("train//study1/view1_frontal.jpg"), "a path that is none of CheXpert"),
    (row("x/valid/patient64541/study1/view1_frontal.jpg"), "a path of valid/"), (row(f"again/{A}"), "listed before"), (row(A.replace("study1", "study2"), view="Lateral"), "Frontal/Lateral is not the view of the file name"),
    (row(A.replace("study1", "study2"), Edema="2.0"), "Edema is '2.0'"), (row(A.replace("study1", "study2"), Pleural_Effusion="yes"), "Pleural Effusion is 'yes'"), (row(A.replace("study1", "study2"), Cardiomegaly="nan"), "Cardiomegaly is 'nan'"),
])
def test_a_row_that_cannot_be_read(tree, bad, reason):
    with open(tree / "train.csv", "a") as f:
        f.write(bad)
    found = scan_chexpert(tree)
    assert len(found.studies) == 2 and [(s.row, s.reason, s.broken) for s in found.skipped] == [(4, reason, True)]
    with pytest.raises(ValueError, match=r"train.csv, row 4: .*; expected …/train/patient00001/study1/view1_frontal.jpg, .*; restore it, or load with on_missing='skip'") as error:
        load_chexpert(tree, on_missing="raise")
    assert reason in one_sentence(error)


def test_a_bad_label_of_another_finding_is_no_matter(tree):
    with open(tree / "train.csv", "a") as f:
        f.write(row(B.replace("study1", "study2"), Fracture="?"))
    assert len(scan_chexpert(tree, need_images=False).studies) == 3
    assert [s.reason for s in scan_chexpert(tree, FINDINGS, need_images=False).skipped] == ["Fracture is '?'"]


def test_no_folder_no_table_no_column(tree, tmp_path):
    with pytest.raises(FileNotFoundError, match="none: there is no such folder; get CheXpert-v1.0-small") as error:
        load_chexpert(tmp_path / "none")
    one_sentence(error)
    with pytest.raises(FileNotFoundError, match=r"there is no train.csv, valid.csv or test.csv \(or .gz\) in this folder; get") as error:
        load_chexpert(tmp_path)
    one_sentence(error)
    for column in "Path", "Edema":
        (tree / "train.csv").write_text(HEADER.replace(column, "other") + row(A))
        with pytest.raises(ValueError, match=f"train.csv: column '{column}' is missing, the columns are .*; get CheXpert"):
            load_chexpert(tree)
    assert find_tables(tmp_path) == {} and find_chexpert(tmp_path / "none") is None


@pytest.mark.parametrize("content, says", [(b"", "column 'Path' is missing, the columns are none"), (HEADER.encode(), "none of 0 rows became a study"), (HEADER.encode() + f"{A},Male,60\n".encode(), "row 2: it ends before 'Atelectasis'"),
                                           (b"<html>Request access</html>", "column 'Path' is missing")])
def test_a_table_that_is_none(tree, content, says):
    (tree / "train.csv").write_bytes(content)
    with pytest.raises(ValueError, match=says) as error:
        load_chexpert(tree)
    assert "\n" not in str(error.value)


def test_a_packed_table_that_was_cut(tree):
    whole = gzip.compress((tree / "train.csv").read_bytes())
    (tree / "train.csv").unlink()
    (tree / "train.csv.gz").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="train.csv.gz: it cannot be read as a table .*; get CheXpert"):
        load_chexpert(tree)


def test_no_films_at_all(tree):
    shutil.rmtree(tree / "train")
    with pytest.raises(ValueError, match=r"none of 2 rows became a study \(rows skipped: 2 no such image\); check that train/ and valid/ are unpacked beside their tables") as error:
        load_chexpert(tree)
    one_sentence(error)
    assert len(load_chexpert(tree, need_images=False)) == 2


def test_options_that_are_none(tree):
    for kwargs, says in [(dict(on_missing="ignore"), "on_missing is 'ignore': known are 'skip' and 'raise'"), (dict(views="PA"), "views is 'PA': known are frontal, lateral, all"),
                         (dict(uncertain="u-ones"), "uncertain is 'u-ones': known are unknown, published, positive, negative"), (dict(blank=0), "blank is 0: known are negative, unknown"),
                         (dict(findings=["edema"]), "unknown finding 'edema': known are No Finding"), (dict(findings=[]), "findings is .*: give a list of names"),
                         (dict(findings=FINDINGS, uncertain="published"), "the published mapping says nothing of 'No Finding', only of Atelectasis")]:
        with pytest.raises(ValueError, match=says) as error:
            load_chexpert(tree, **kwargs)
        one_sentence(error)
    assert list(UNCERTAIN) == ["unknown", "published", "positive", "negative"]


def test_a_split_needs_both_tables_and_a_replay_the_whole_one(tree):
    with pytest.raises(ValueError, match="2 studies of train.csv and 0 of valid.csv: both tables are needed") as error:
        split_chexpert(load_chexpert(tree))
    one_sentence(error)
    with pytest.raises(ValueError, match="0 frontal rows have Atelectasis and nothing else, 200 are to be drawn: the replay needs the whole train.csv") as error:
        replay_published_split(tree)
    one_sentence(error)
    (tree / "train.csv").rename(tree / "other.csv")
    with pytest.raises(FileNotFoundError, match="train.csv: there is no such file; get CheXpert"):
        replay_published_split(tree)


def test_films_are_found_below_any_number_of_patients(tmp_path):
    for p in range(1200):
        (tmp_path / f"patient{p:05}" / "study1").mkdir(parents=True)
        (tmp_path / f"patient{p:05}" / "study1" / "view1_frontal.jpg").touch()
    assert len(list_films(f"{tmp_path}/patient{p:05}" for p in range(1200))) == 1200
