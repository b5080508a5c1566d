"Published lists on the real files: what they cover and what they leak; lists that do not fit."
import gzip
import logging
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from conftest import one_sentence
from cmcgns.data.chexpert import load_chexpert, read_path, replay_published_split
from cmcgns.data.published_splits import (
    KNOWN, choose_train, find_split, leak, match_ids, match_split, read_list, read_lists, read_published_split, split_by_image_leaky,
)
from cmcgns.data.rsna import load_rsna
from cmcgns.data.siim import load_siim
from cmcgns.data.studies import Split, Study, check_disjoint, select, shared_patients, split_studies

# the real lists


@pytest.fixture(scope="module")
def rsna(shared_data):
    return load_rsna(shared_data / "labels/rsna", need_images=False)


@pytest.fixture(scope="module")
def siim(shared_data):
    return load_siim(shared_data / "labels/siim", need_images=False)


@pytest.fixture(scope="module")
def chexpert(shared_data):
    "All films of train.csv, and the 234 of valid.csv by the names that MRM's test list gives."
    test = [read_path(line.split()[0]) for line in (shared_data / "splits/mrm/chexpert/test_list.txt").read_text().splitlines()]
    return load_chexpert(shared_data / "labels/chexpert", views="all", need_images=False) + [Study(f.id, Path("x"), f.patient, view=f.view) for f in test]


def test_lovts_rsna_lists_cover_everything(rsna, shared_data):
    split = read_published_split("lovt/rsna", rsna, shared_data)
    assert split.counts() == {"train": 16_010, "validation": 5_337, "test": 5_337} and split.by == "published" and split.hash == "e911f9114c8972b0"
    got = match_split(read_lists(find_split("lovt/rsna", shared_data)), rsna)
    assert sum(map(len, got.lacking.values())) == 0 and got.unlisted == () and got.leak.films == 0
    assert sum(len(select(rsna, split, part)) for part in split.parts) == 26_684 == len(rsna)
    assert {k: sum(bool(s.boxes) for s in select(rsna, split, k)) for k in split.parts} == {"train": 3584, "validation": 1210, "test": 1218}


def test_lovts_rsna_leak_cannot_be_seen_in_the_table(rsna, shared_data):
    "The table of stage 2 names no patients, so that zero shared patients would be an empty statement; it says so."
    told = leak(rsna, read_published_split("lovt/rsna", rsna, shared_data))
    assert told.patients == 0 and told.blind and str(told).endswith("(every film counts as a patient of its own: shared patients would not be seen)")
    people = [replace(s, patient=f"nih{i // 2}") for i, s in enumerate(rsna)]
    told = leak(people, read_published_split("lovt/rsna", people, shared_data))
    assert told.patients > 1000 and not told.blind


def test_lovts_boxes_are_the_publishers(rsna, shared_data):
    ours, n = {s.id: sorted(b[1:] for b in s.boxes) for s in rsna}, 0
    for part in "train", "validation", "test":
        table = pd.read_csv(shared_data / f"splits/lovt/rsna/{part}.csv", dtype=str)
        for name, text in zip(table.ID, table.boxes):
            boxes = sorted(tuple(map(float, b.split(";"))) for b in text.split("|")) if isinstance(text, str) else []
            assert boxes == ours[name]
            n += len(boxes)
    assert n == 9_555


def test_lovts_siim_lists_cover_everything(siim, shared_data):
    split = read_published_split("lovt/siim", siim, shared_data)
    assert split.counts() == {"train": 7_229, "validation": 2_409, "test": 2_409} and split.hash == "12740004d134eca0" and len(siim) == 12_047
    table = pd.read_csv(shared_data / "labels/siim/train-rle.csv.gz", skipinitialspace=True).astype(str)
    positive = {i for i, mask in zip(table.ImageId, table.EncodedPixels) if mask.strip() != "-1"}
    assert {k: len(positive & {*ids}) for k, ids in split.parts.items()} == {"train": 1584, "validation": 570, "test": 515}
    assert {s.id for s in siim if s.labels["Pneumothorax"]} == positive


def test_lovts_object_cxr_lists(shared_data):
    lists = read_lists(find_split("lovt/object_cxr", shared_data))
    assert {k: len(v) for k, v in lists.items()} == {"train": 6_400, "validation": 1_600, "test": 1_000}
    assert sorted(lists["train"] + lists["validation"]) == [f"{i:05}" for i in range(1, 8001)] and lists["test"] == tuple(f"{i:05}" for i in range(8001, 9001))
    for ending in "", ".jpg":
        studies = [Study(f"{i:05}{ending}", Path("x"), str(i)) for i in range(1, 9001)]
        assert read_published_split("lovt/object_cxr", studies, shared_data).counts() == {"train": 6_400, "validation": 1_600, "test": 1_000}


def test_mrms_chexpert_lists(chexpert, shared_data):
    split = read_published_split("mrm/chexpert", chexpert, shared_data)
    assert split.counts() == {"train": 218_414, "validation": 5_000, "test": 234} and split.hash == "299cc5fe62b26537"
    first, test, last = leak(chexpert, split).pairs
    assert (first.films, first.of_films, first.patients, first.of_patients, first.theirs) == (0, 5_000, 4_057, 4_560, 4_485) and test.patients == last.patients == 0
    assert str(first) == "validation shares with train 0 of 5,000 films and 4,057 of 4,560 patients, who have 4,485 of its films"
    assert len(shared_patients(chexpert, split)) == 4_057
    with pytest.raises(ValueError, match="patients are in more than one part"):
        check_disjoint(chexpert, split)


@pytest.mark.parametrize("train, n, unlisted, patients, films", [("train_10", 21_841, 196_573, 1_837, 2_149), ("train_1", 2_184, 216_230, 315, 380)])
def test_mrms_fractions(chexpert, shared_data, train, n, unlisted, patients, films):
    with pytest.raises(ValueError, match=f"mrm/chexpert: {unlisted:,} studies are in no list .*; load the whole data set, or take what fits with missing='skip'"):
        read_published_split("mrm/chexpert", chexpert, shared_data, train)
    split = read_published_split("mrm/chexpert", chexpert, shared_data, train, missing="skip")
    assert split.counts() == {"train": n, "validation": 5_000, "test": 234}
    assert leak(chexpert, split).pairs[0][2:] == (0, 5_000, patients, 4_560, films)


def test_mrms_fractions_are_not_nested_and_not_frontal(chexpert, shared_data):
    lists = read_lists(find_split("mrm/chexpert", shared_data))
    assert list(lists) == ["train_1", "train_10", "validation", "test"] and len({*lists["train_1"]} & {*lists["train_10"]}) == 213
    assert {k: sum("frontal" in i for i in v) for k, v in lists.items()} == {"train_1": 1_865, "train_10": 18_729, "validation": 4_273, "test": 202}
    frontal = [s for s in chexpert if "frontal" in s.id]
    with pytest.raises(ValueError, match=r"mrm/chexpert: 759 films of the lists are not among the studies \('CheXpert-v1.0-small/train/.*_lateral.jpg' is one\); load"):
        read_published_split("mrm/chexpert", frontal, shared_data)
    assert read_published_split("mrm/chexpert", frontal, shared_data, missing="skip").counts() == {"train": 191_027 - 4_273, "validation": 4_273, "test": 202}


def test_the_published_chexpert_split_in_one_line(chexpert, shared_data):
    parts = replay_published_split(shared_data / "labels/chexpert")
    told = leak(chexpert, {k: parts[k] for k in ("train", "validation")})
    assert str(told) == "validation shares with train 4,907 of 5,000 films and 4,566 of 4,576 patients, who have 4,990 of its films"
    with pytest.raises(ValueError, match="a study has one part"):
        Split({k: parts[k] for k in ("train", "validation")})


def test_a_split_by_image_says_what_it_leaks(chexpert, caplog):
    frontal = [s for s in chexpert if s.id.startswith("train/") and s.view != "Lateral"]
    shares = dict(train=.7, validation=.15, test=.15)
    with caplog.at_level(logging.WARNING, "cmcgns"):
        split = split_by_image_leaky(frontal, shares)
    line, = [r.getMessage() for r in caplog.records]
    assert line.startswith("split by image, seed 0: validation shares with train 0 of 28,654 films and 13,869 of 19,660 patients, who have 22,435 of its films; test shares")
    assert split.by == "image" and leak(frontal, split_studies(frontal, shares)).patients == 0


# lists and studies that do not fit


def make_lists(folder, ending=".csv", **parts):
    folder.mkdir(parents=True, exist_ok=True)
    for name, names in parts.items():
        (folder / f"{name}{ending}").write_text(("ID\n" if ending == ".csv" else "") + "".join(f"{i}\n" for i in names))
    return folder


def studies(names, patients=None):
    return [Study(n, Path(n), p) for n, p in zip(names, patients or names)]


def test_names_are_looked_up_below_the_folders_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = [make_lists(tmp_path / p, train=["a"], test=["b"]) for p in ("root/splits/lovt/siim", "root/lovt/rsna", "data/splits/mrm/chexpert", "mine")]
    assert find_split("lovt/siim", "root").resolve() == places[0] and find_split("lovt/rsna", tmp_path / "root") == places[1]
    assert find_split("mrm/chexpert").resolve() == places[2] and find_split("mrm/chexpert", "root").resolve() == places[2] and find_split(places[3]) == places[3]
    for name in "lovt/object_cxr", "lovt/nih":
        with pytest.raises(FileNotFoundError, match=f"{name}: no such lists in .*root.splits.*data.splits.*; .*, or give the path of a folder") as error:
            find_split(name, "root")
        assert KNOWN.get(name, "known names are lovt/rsna") in one_sentence(error)
    assert read_published_split("mine", studies("ab")).counts() == {"train": 1, "test": 1}


@pytest.mark.parametrize("names, says", [(dict(train="a,b,a"), r"train.csv, row 4: 'a' is in row 2 already; a film is in a list once"), (dict(train=""), "train.csv: there is no id in this list"), (dict(train="a,'',b"), "train.csv, row 3: the id is empty")])
def test_lists_that_are_none(tmp_path, names, says):
    make_lists(tmp_path / "l", **{k: v.split(",") if v else [] for k, v in names.items()})
    if "''" in names["train"]:
        (tmp_path / "l" / "train.csv").write_text("ID,boxes\na,\n,1\nb,\n")
    with pytest.raises(ValueError, match=says) as error:
        read_lists(tmp_path / "l")
    one_sentence(error)


def test_a_folder_without_lists_or_with_too_many(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ValueError, match="there are no lists in this folder; expected train.csv, validation.csv and test.csv, or .txt") as error:
        read_lists(tmp_path)
    one_sentence(error)
    make_lists(tmp_path, train=["a"], val=["b"], validation=["c"])
    with pytest.raises(ValueError, match="both val.csv and validation.csv are validation lists; remove one") as error:
        read_lists(tmp_path)
    one_sentence(error)
    with pytest.raises(ValueError, match="there are only training lists, train: a validation or test list is needed") as error:
        choose_train({"train": ("a",)})
    one_sentence(error)


def test_text_lists_packed_lists_and_their_names(tmp_path):
    make_lists(tmp_path / "t", ".txt", train_list=["a 1 0", "", "b 0 0"], valid=["c"], test_list=["d 0 0"])
    assert read_lists(tmp_path / "t") == {"train": ("a", "b"), "validation": ("c",), "test": ("d",)}
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"a 1\r\nb 0\r\n"))
    assert read_list(tmp_path / "train.txt.gz") == ("a", "b")


def test_films_that_are_lacking_or_not_listed_are_refused_or_counted(tmp_path, caplog):
    folder = make_lists(tmp_path / "l", train=["a", "b", "x", "y"], validation=["c"], test=["d", "z"])
    have = studies("abcdef")
    with pytest.raises(ValueError, match=r"l: 3 films of the lists are not among the studies \('x' is one\) and 2 studies are in no list \('e' is one\); load the whole data set, or take what fits with missing='skip'") as error:
        read_published_split(folder, have)
    one_sentence(error)
    with caplog.at_level(logging.INFO, "cmcgns"):
        split = read_published_split(folder, have, missing="skip")
    assert split.parts == {"train": ("a", "b"), "validation": ("c",), "test": ("d",)}
    line, = [r.getMessage() for r in caplog.records]
    assert line.startswith(f"{folder}: train 2, validation 1, test 1; listed and not there: 2 of train, 1 of test; there and not listed: 2; validation shares nothing with train;")
    with pytest.raises(ValueError, match="none of the films of 'train' is among the 1 studies; the lists are of another data set") as error:
        read_published_split(folder, studies("c"), missing="skip")
    one_sentence(error)
    with pytest.raises(ValueError, match="missing is 'ignore': known are 'raise' and 'skip'"):
        read_published_split(folder, have, missing="ignore")
    with pytest.raises(ValueError, match="study 'a' is there twice"):
        read_published_split(folder, have + have[:1])


def test_a_film_in_two_lists_is_refused_a_patient_is_counted(tmp_path, caplog):
    folder = make_lists(tmp_path / "l", train=["a", "b"], test=["b", "c"])
    with pytest.raises(ValueError, match="1 films are in the lists 'train' and 'test', 'b' is one: a film has one part") as error:
        read_published_split(folder, studies("abc"), missing="skip")
    one_sentence(error)
    with pytest.raises(ValueError, match="'b.jpg' and 'b' of the lists are both study 'b'"):
        read_published_split(make_lists(tmp_path / "m", train=["a", "b"], test=["b.jpg"]), studies("abc"), missing="skip")
    with caplog.at_level(logging.INFO, "cmcgns"):
        read_published_split(make_lists(tmp_path / "n", train=["a"], test=["b", "c"]), studies("abc", ["Ann", "Ann", "Ben"]))
    assert "test shares with train 0 of 2 films and 1 of 2 patients, who have 1 of its films" in caplog.text and "its own" not in caplog.text


def test_entries_find_their_studies():
    assert match_ids(["root/train/p/a.jpg", "b", "c.PNG", "d.dcm"], ["train/p/a.jpg", "b.jpg", "c", "d.png"]) == {"root/train/p/a.jpg": "train/p/a.jpg", "b": "b.jpg", "c.PNG": "c", "d.dcm": "d.png"}
    assert match_ids(["a", "p/view1.jpg"], ["a.png", "a.jpg", "q/view1.jpg"]) == {"a": None, "p/view1.jpg": None} # two fit; another patient's view
    assert match_ids(["1.2.3.54.1"], ["1.2.3.54.10", "1.2.3.54"]) == {"1.2.3.54.1": None}


def test_the_rest_never_holds_what_the_publisher_holds_out():
    names = ["train/a", "train/b", "train/c", "valid/d", "test/e", "dev/f"]
    got = match_split(choose_train({"train_1": ("train/a",), "validation": ("train/c",), "test": ("valid/d",)}), studies(names))
    assert got.split.parts["train"] == ("train/a", "train/b") and got.unlisted == ("test/e", "dev/f")
    with pytest.raises(ValueError, match="there is no training list 'train_2': known are train_1, rest"):
        choose_train({"train_1": ("a",), "test": ("b",)}, "train_2")


def test_leak_of_parts_that_overlap():
    told = leak(studies("abcdef", ["Ann", "Ann", "Ben", "Ben", "Cleo", "Dan"]), {"train": "abc", "validation": "cd", "test": "ef"})
    assert [tuple(p) for p in told.pairs] == [("train", "validation", 1, 2, 1, 1, 2), ("train", "test", 0, 2, 0, 2, 0), ("validation", "test", 0, 2, 0, 2, 0)]
    assert told.films == 1 and told.patients == 1 and "\n" not in str(told)
    with pytest.raises(ValueError, match="1 films of the split are not in the data set, 'z' is one") as error:
        leak(studies("ab"), {"train": "a", "test": "z"})
    one_sentence(error)
