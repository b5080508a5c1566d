"What the studies page does not carry: random data sets, damaged files, other processes."
import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cmcgns.data.studies import (Box, Fraction, Meaning, Runs, Split, Study, check_disjoint, draw_fraction, fingerprint, label_array, load_studies, save_studies, select,
                                 shared_patients, split_studies)


def invent(patients, seed=0, prevalence=0.3):
    rng = np.random.default_rng(seed)
    return [Study(f"s{i}", Path(f"s{i}.png"), f"p{p}", labels={"y": [0.0, 1.0, None][int(rng.choice(3, p=[0.9 - prevalence, prevalence, 0.1]))]})
            for i, p in enumerate(patients)]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=60, max_size=300), st.integers(0, 1000), st.booleans())
def test_any_data_set_is_split_without_a_shared_patient(patients, seed, stratify):
    studies = invent(patients, seed)
    try:
        split = split_studies(studies, stratify="y" if stratify else None, seed=seed)
    except ValueError as e:
        assert "would be empty" in str(e)
        return
    check_disjoint(studies, split)
    assert sorted(i for ids in split.parts.values() for i in ids) == sorted(s.id for s in studies)


def test_shares_are_met_and_positives_spread_over_seeds():
    studies = invent(np.random.default_rng(0).integers(0, 700, 2000))
    positive = {s.patient for s in studies if s.labels["y"]}
    overall = np.mean([s.patient in positive for s in studies])
    for seed in range(10):
        split = split_studies(studies, stratify="y", seed=seed)
        for part, share in dict(train=0.7, validation=0.1, test=0.2).items():
            here = select(studies, split, part)
            assert abs(len(here) / 2000 - share) < 0.01
            assert abs(np.mean([s.patient in positive for s in here]) - overall) < 0.03
            assert abs(np.nanmean(label_array(here, ["y"])) - 1 / 3) < 0.09


def test_a_large_patient_is_tested_on_as_often_as_a_small_one():
    studies = invent([0] * 30 + list(range(1, 171)))
    where = Counter(next(k for k, ids in split_studies(studies, seed=s).parts.items() if "s0" in ids) for s in range(400))
    assert abs(where["test"] / 400 - 0.2) < 0.08 and abs(where["train"] / 400 - 0.7) < 0.09


def test_one_study_less_moves_few_others():
    studies = invent(range(500))
    before, after = split_studies(studies), split_studies(studies[1:])
    part = {i: k for k, ids in before.parts.items() for i in ids}
    assert sum(part[i] != k for k, ids in after.parts.items() for i in ids) <= 3


def test_repeated_ids_are_refused():
    with pytest.raises(ValueError, match="study 's0' is there twice"):
        split_studies(invent([1, 2]) + invent([3]))


def test_select_names_what_does_not_belong():
    studies = invent(range(100))
    split = split_studies(studies)
    with pytest.raises(ValueError, match="unknown part 'dev': known are train, validation, test"):
        select(studies, split, "dev")
    with pytest.raises(ValueError, match="split and data set do not belong together"):
        select(studies[:50], split, "train")
    with pytest.raises(ValueError, match="'s1' is in the parts 'a' and 'b'"):
        Split({"a": ("s1",), "b": ("s1",)})


def test_image_level_splits_leak_and_say_so():
    studies = invent(np.repeat(range(100), 4))
    assert len(shared_patients(studies, split_studies(studies, by="image"))) > 50
    with pytest.raises(ValueError, match="unknown way to split 'study'"):
        split_studies(studies, by="study")


def test_splits_are_equal_in_another_process():
    code = ("from cmcgns.data.studies import Study, split_studies, draw_fraction; from pathlib import Path;"
            "s = [Study(f's{i}', Path('x'), f'p{i//3}') for i in range(99)]; print(split_studies(s).hash, draw_fraction(s, .1).hash)")
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": h, "PYTHONPATH": str(Path(__file__).parents[1])}).stdout
            for h in ("1", "2")}
    studies = [Study(f"s{i}", Path("x"), f"p{i // 3}") for i in range(99)]
    assert runs == {f"{split_studies(studies).hash} {draw_fraction(studies, 0.1).hash}\n"}


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 500), st.sampled_from([0.01, 0.05, 0.1, 0.5, 1.0]), st.integers(30, 400))
def test_fractions_nest_and_have_both_classes(seed, fraction, n):
    studies = invent(range(n), seed)
    small, all_ = draw_fraction(studies, fraction, seed, "y"), draw_fraction(studies, 1.0, seed, "y")
    by = {s.id: s.labels["y"] for s in studies}
    assert small.ids == all_.ids[:len(small.ids)] and None not in map(by.get, all_.ids)
    assert {by[i] for i in small.ids} == {0.0, 1.0}
    assert len(small.ids) == max(2, round(fraction * sum(v is not None for v in by.values())))


def test_a_fraction_keeps_prevalence():
    studies = invent(range(3000))
    by = {s.id: s.labels["y"] for s in studies}
    for seed in range(5):
        assert abs(np.mean([by[i] for i in draw_fraction(studies, 0.1, seed, "y").ids]) - 1 / 3) < 0.02


def test_fraction_files_are_checked(tmp_path):
    part = draw_fraction(invent(range(50)), 0.2, 3)
    part.save(tmp_path / "a/fraction.json")
    assert Fraction.load(tmp_path / "a/fraction.json") == part
    d = json.loads((tmp_path / "a/fraction.json").read_text())
    d["ids"][0] = "s999"
    (tmp_path / "b.json").write_text(json.dumps(d))
    with pytest.raises(ValueError, match="it was edited"):
        Fraction.load(tmp_path / "b.json")
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["fraction.json"]


def test_a_table_can_be_moved(tmp_path):
    study = Study("ä", tmp_path / "one/images/ä.png", "p", ("größe normal",), {"y": None}, "PA", (Box("y", 1.5, 2, 3, 4),), {"lungs": Path("/elsewhere/m.png")},
                  (Meaning("y", 0),), "synthetic")
    save_studies([study], tmp_path / "one/studies.jsonl")
    (tmp_path / "one").rename(tmp_path / "two")
    (moved,) = load_studies(tmp_path / "two/studies.jsonl")
    assert moved.image == tmp_path / "two/images/ä.png" and moved.masks["lungs"] == Path("/elsewhere/m.png")
    assert moved.boxes == study.boxes and moved.meanings == study.meanings and moved.labels == {"y": None}


@pytest.mark.parametrize("line", ["not json", "[]", '{"id": "a"}', "3"])
def test_a_bad_line_is_named(tmp_path, line):
    save_studies(invent([1]), tmp_path / "t.jsonl")
    with open(tmp_path / "t.jsonl", "a") as f:
        f.write(line + "\n")
    with pytest.raises(ValueError, match="t.jsonl, line 2: not a study"):
        load_studies(tmp_path / "t.jsonl")


def test_fingerprint_sees_content_and_not_place(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for i in range(3):
            (tmp_path / folder / f"s{i}.png").write_bytes(bytes([i]) * 50_000)
    at = lambda folder, **kw: [Study(f"s{i}", tmp_path / folder / f"s{i}.png", f"p{i}", **kw) for i in range(3)]
    assert fingerprint(at("a")) == fingerprint(at("b")) != fingerprint(at("a", labels={"y": 1.0}))
    assert fingerprint(at("a")) != fingerprint(at("a", sentences=("no effusion",)))
    (tmp_path / "b/s1.png").write_bytes(bytes([1]) * 49_999 + b"x")
    assert fingerprint(at("a")) != fingerprint(at("b"))


@pytest.mark.parametrize("change", [dict(patient="q"), dict(view="AP"), dict(dataset="other"), dict(labels={"nodule": 1.0}), dict(boxes=(Box("nodule", 1, 2, 3, 4),)),
                                    dict(meanings=(Meaning("nodule", 1),)), dict(masks={"nodule": Runs(8, 8, (3,), (2,))})], ids=lambda c: next(iter(c)))
def test_fingerprint_sees_every_field(tmp_path, change):
    (tmp_path / "a.png").write_bytes(bytes(10))
    study = Study("s", tmp_path / "a.png", "p", ("a nodule",))
    assert fingerprint([study]) != fingerprint([replace(study, **change)])


def test_fingerprint_sees_the_beginning_of_a_large_file(tmp_path):
    at = [Study("s", tmp_path / "a.png", "p")]
    (tmp_path / "a.png").write_bytes(bytes(50_000))
    before = fingerprint(at)
    (tmp_path / "a.png").write_bytes(b"x" + bytes(49_999))
    assert fingerprint(at) != before


def test_small_draws_keep_the_share_of_a_label():
    "Over many seeds: in strata that are smaller than one draw of the fraction, nobody is favoured."
    rng = np.random.default_rng(0)
    names = [f"f{i}" for i in range(5)]
    studies = [Study(f"s{i}", None, f"p{i}", labels={n: float(rng.random() < .15) for n in names}) for i in range(400)]
    share = lambda some: np.mean([[s.labels[n] for n in names] for s in some])
    by_id = {s.id: s for s in studies}
    drawn = [share([by_id[i] for i in draw_fraction(studies, .1, seed, names).ids]) for seed in range(60)]
    assert abs(np.mean(drawn) - share(studies)) < .02
