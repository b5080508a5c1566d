"What the synthetic page does not carry: many studies, several processes, kills."
import hashlib
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from cmcgns.data.studies import Meaning, check_disjoint, read_mask, split_studies
from cmcgns.data.synthetic import (ABSENT, ANATOMY, BOILERPLATE, BOTH, DEVICES, EXPOSURE, FINDINGS, FOREIGN, HOW, NEGATIVE, OUTLINES, POSITIVE, SIDES, TOLD,
                                   VERSION, ZONES, Fact, Thing, deny, draw_image, draw_scene, draw_thing, draw_within, grid, make_study, patient_of, place, render,
                                   same_meaning, shape_chest, synthesize, tell, tell_thing, window, write_report)
from cmcgns.text import report_sentences

ROOT = Path(__file__).resolve().parents[1]
FIT = dict(side="left", zone="lung base", mm=12, cm=4, mark="XXXX", like="suggestive of", seen="is seen")


# --- reports

def test_every_template_is_one_sentence():
    for about, templates in [*POSITIVE.items(), *BOTH.items(), *NEGATIVE.items(), *TOLD.items(), *ABSENT.items(), *BOILERPLATE.items()]:
        assert len(templates) == len(set(templates)) >= 2
        for t in templates:
            text = t.format(how=HOW.get(about, [""])[0], **FIT)
            assert len(report_sentences(text, "")) == 1 or len(text.split()) < 3, t
            assert len(report_sentences(text, "Three more words.")) == 2, t
            assert len(report_sentences(text.replace("XXXX", "___"), "Three more words.")) == 2, t
    assert set(POSITIVE) == set(HOW) == set(FINDINGS) == {k for k in NEGATIVE if "+" not in k} - {"lungs", "chest", "bones", "mediastinum"}
    assert set(TOLD) == set(DEVICES) and set(ABSENT) <= {*DEVICES, "devices"}
    assert all(k == "+".join(sorted(k.split("+"))) for k in NEGATIVE)


WORDS = dict(cardiomegaly="heart|cardiac s|cardiomed|cardiac c|cardiomegaly|cardiac and|cardiothoracic", effusion="effusion|pleural fluid|costophrenic", pneumothorax="pneumothorax",
             consolidation="consolidat|lobar|confluent|homogeneous", atelectasis="atelecta|volume", edema="edema|vascul|fluid overload|pulmonary vessels|interstitial",
             nodule="nodul|round opac|mass", pneumonia="pneumoni|infect|patchy|infiltrate|ill defined", mediastinum=r"mediastin|\btrachea", bones="bone|bony|osseous")
NOT = r"^(no|there is no|there are no|negative|neither)\b|\b(normal|unremarkable|sharp|clear|not|preserved|removed|removal|extubation|midline|bones are intact)\b"


def test_meanings_are_what_a_second_reader_finds():
    "Key words and signs of negation, written down without looking at how the sentences are made."
    for i in range(1500):
        s = draw_scene(2, i)
        for text, m in zip(report_sentences(s.impression, s.findings), s.meanings):
            if m.polarity < 0 or m.finding in ("lungs", "chest"):
                continue
            parts = set(m.finding.split("+"))
            read = {k for k, words in WORDS.items() if re.search(words, text)}
            assert read == parts or parts <= {*DEVICES, "devices"} and not read or parts == {"consolidation", "pneumonia"} and "airspace" in text, (text, m)
            assert bool(re.search(NOT, text)) == (m.polarity == 0), (text, m)
            for side in ("left", "right"):
                assert (re.search(rf"\b{side}\b", text) is not None) == (m.side == side) or "middle lobe" in text or m.finding == "pacemaker", (text, m)
            assert (re.search(r"bilateral|both|multifocal", text) is not None) == (m.side == "both") or m.polarity == 0, (text, m)
            zone = "upper" if re.search("upper l", text) else "mid" if re.search("mid lung|middle lobe|perihilar region", text) else "lower" if re.search("lower l|lung base", text) else ""
            assert zone == m.zone, (text, m)


def test_a_text_has_one_meaning():
    seen = defaultdict(set)
    for i in range(1500):
        s = draw_scene(0, i)
        for text, m in zip(report_sentences(s.impression, s.findings), s.meanings):
            seen[text].add(m)
    assert [k for k, v in seen.items() if len(v) > 1] == [] and len(seen) > 900


def test_no_report_contradicts_its_labels():
    parts_seen, opaque = set(), {"consolidation", "atelectasis", "edema", "nodule", "pneumonia", "pneumothorax"}
    for i in range(1500):
        p = draw_scene(4, i)
        facts, devices = {f.finding: f for f in p.facts}, {t.label: t for t in p.things if t.label in DEVICES}
        for m in p.meanings:
            if m.polarity == 1:
                thing = facts.get(m.finding) or devices[m.finding]
                assert m.side in ("", thing.side) and m.zone in ("", getattr(thing, "zone", ""))
            if m.polarity == 0:
                parts = set(m.finding.split("+"))
                parts_seen.add(m.finding)
                assert not parts & {*facts, *devices}, (m, facts, devices)
                assert not ("devices" in parts and devices or "chest" in parts and facts or "lungs" in parts and opaque & set(facts))
        assert {m.finding for m in p.meanings if m.polarity == 1 and m.finding in FINDINGS} == set(facts)
        assert FOREIGN not in {m.finding for m in p.meanings}
        fine = [part for m in p.meanings if m.polarity == 0 for part in m.finding.split("+")]
        assert len(fine) == len(set(fine))
    assert parts_seen == {*NEGATIVE, *ABSENT}


def test_reports_agree_with_the_splitter_whatever_is_there():
    rng = np.random.default_rng(0)
    for n in range(9):
        for _ in range(120):
            facts = [Fact(k, rng.random(), *((str(rng.choice(SIDES.get(k, ("left", "right")))), str(rng.choice(ZONES.get(k, ("",))))))) for k in rng.permutation(FINDINGS)[:n].tolist()]
            things = [Thing(k, k, str(rng.choice(["left", "right"]))) for k in DEVICES if rng.random() < .5]
            impression, findings, meanings = write_report(facts, "AP", rng, things)
            assert len(report_sentences(impression, findings)) == len(meanings)
            assert 3 <= len(meanings) <= 8 and {m.finding for m in meanings if m.polarity == 1} & set(FINDINGS) == {f.finding for f in facts}


def test_the_report_on_disk_is_the_text_as_written(tmp_path):
    studies = synthesize(40, tmp_path, size=32)
    for i, s in enumerate(studies):
        scene = draw_scene(0, i)
        assert s.report == {"impression": scene.impression, "findings": scene.findings}
        assert s.sentences == tuple(report_sentences(**s.report))
    texts = ["\n".join(s.report.values()) for s in studies]
    assert any(re.search(r"^1\. ", t) for t in texts) and any("XXXX" in t or "___" in t for t in texts) and any("\n" in s.report["findings"] for s in studies)


# --- false negatives

def test_same_meaning_by_brute_force():
    rng = np.random.default_rng(0)
    some = [Meaning(str(rng.choice(["effusion", "nodule", "effusion+pneumothorax"])), int(rng.integers(-1, 2)), str(rng.choice(["", "left", "right", "both"])),
                    str(rng.choice(["", "upper", "lower"]))) for _ in range(90)]
    got = same_meaning(some)
    assert got.dtype == bool and got.shape == (90, 90)
    for i, a in enumerate(some):
        for j, b in enumerate(some):
            place_fits = not (a.side and b.side and a.side != b.side) and not (a.zone and b.zone and a.zone != b.zone)
            assert got[i, j] == (a.finding == b.finding and a.polarity == b.polarity and place_fits)
    assert same_meaning([]).shape == (0, 0) and (got == got.T).all() and got.diagonal().all()


def test_sentences_of_one_fact_mean_the_same():
    rng = np.random.default_rng(1)
    for f in (Fact("pneumonia", .4, "left", "lower"), Fact("effusion", .4, "both"), Fact("nodule", .9, "right", "mid"), Fact("cardiomegaly", .1)):
        assert same_meaning([tell(f, rng)[1] for _ in range(60)]).all()
    assert same_meaning([deny("effusion+pneumothorax", rng)[1] for _ in range(20)]).all()
    assert same_meaning([tell_thing(Thing("pacemaker", "pacemaker", "left"), rng)[1] for _ in range(20)]).all()
    assert not same_meaning([tell(Fact("consolidation", .4, "left", "lower"), rng)[1], tell(Fact("pneumonia", .4, "left", "lower"), rng)[1]])[0, 1]


# --- the world

def test_a_world_of_another_seed_is_another_world():
    a, b = make_study(0, 5, 64), make_study(1, 5, 64)
    assert not np.array_equal(a.image, b.image) and a.study.id != b.study.id and a.study.patient != b.study.patient


def test_a_study_is_the_same_whatever_came_before():
    a = make_study(0, 17, 96)
    np.random.seed(5)
    make_study(9, 3, 64)
    b = make_study(0, 17, 96)
    assert np.array_equal(a.image, b.image) and a.study == b.study and a.masks.keys() == b.masks.keys() and all((a.masks[k] == b.masks[k]).all() for k in a.masks)


def test_patients_share_anatomy_and_never_cross_a_block():
    owners = [patient_of(3, i) for i in range(600)]
    assert all(i // 6 * 6 <= p <= i for i, p in enumerate(owners)) and owners == sorted(owners)
    studies = [make_study(3, i, 32).study for i in range(150)]
    check_disjoint(studies, split_studies(studies, stratify=FINDINGS[:2]))
    kept = defaultdict(set)
    for i in range(600):
        s = draw_scene(3, i)
        kept[patient_of(3, i)].add((any(f.finding == "cardiomegaly" for f in s.facts), *(any(t.kind == k for t in s.things) for k in ("pacemaker", "sternal wires"))))
    assert all(len(v) == 1 for v in kept.values()) and len(set.union(*kept.values())) > 4


def test_things_go_with_the_view_and_not_with_the_findings():
    scenes = [draw_scene(0, i) for i in range(4000)]
    ap = np.array([s.exposure.view == "AP" for s in scenes])
    there = {k: np.array([any(t.kind == k for t in s.things) for s in scenes]) for k in OUTLINES}
    assert all(.02 < v.mean() < .3 for v in there.values())
    assert all(there[k][ap].mean() > 4 * there[k][~ap].mean() for k in ("ET tube", "central line", "ECG wires"))
    for f in FINDINGS:
        sick = np.array([any(x.finding == f for x in s.facts) for s in scenes])
        for k, v in there.items():
            assert abs(np.corrcoef(sick, v)[0, 1]) < .06, (f, k)


@pytest.mark.parametrize("size", [32, 64, 97, 160, 224, 520])
def test_sizes(size):
    index = next(i for i in range(99) if len(draw_scene(0, i).facts) > 2 and len(draw_scene(0, i).things) > 1)
    p = make_study(0, index, size)
    assert p.image.shape == (size, size) and p.image.dtype == np.uint8 and all(m.shape == (size, size) and m.dtype == bool and m.any() for m in p.masks.values())
    assert 40 < p.image.mean() < 200 and p.image.std() > 30


def test_place_is_where_the_grid_looks():
    rng = np.random.default_rng(0)
    for _ in range(20):
        e, (row, column) = draw_within(EXPOSURE, rng), rng.integers(0, 50, 2)
        x, y = grid(e, 50)
        assert np.allclose(place(e, 50, [(x[row, column], y[row, column])]), [(column + .5, row + .5)], atol=1e-3)
        c = shape_chest(draw_within(ANATOMY, rng), upright(e), {}, 50)
        at = window(c, 5., 5., .1, .1)  # far outside: still one pixel, and none too many
        assert all(0 <= s.start < s.stop <= 50 for s in at)


def upright(e):
    e.view = "PA"
    return e


def test_a_box_is_at_the_same_place_at_any_size():
    off = []
    for i in range(60):
        small, large = make_study(0, i, 80).study.boxes, make_study(0, i, 160).study.boxes
        assert [b.label for b in small] == [b.label for b in large]
        off += [np.abs(2 * np.array(a[1:]) - np.array(b[1:])).max() for a, b in zip(small, large)]
    assert np.median(off) <= 3 and np.mean(np.array(off) > 10) < 0.03  # a film of fluid along the dome may be thinner than a pixel


def test_boxes_hold_their_masks_tightly_and_masks_lie_in_the_body():
    for i in range(200):
        p, s = make_study(7, i, 96), draw_scene(7, i)
        body = shape_chest(s.anatomy, s.exposure, {f.finding: f for f in s.facts}, 96).body > 0
        assert all((m <= body).all() and m.any() for m in p.masks.values()), i
        sides = {f.finding: f.side for f in p.facts}
        assert all((p.masks[k] <= p.masks["lungs"]).all() for k in sides if k != "cardiomegaly")
        expected = []
        for name in [*sides, *(k for k in p.masks if k in DEVICES or k.startswith(FOREIGN))]:
            halves = [slice(0, 48), slice(48, 96)] if sides.get(name) == "both" else [slice(0, 96)]
            for half in halves:
                rows, columns = np.nonzero(p.masks[name][:, half])
                if len(rows):
                    expected.append((re.sub(r" \d+$", "", name), columns.min() + half.start, rows.min(), columns.max() - columns.min() + 1, rows.max() - rows.min() + 1))
        assert [tuple(b) for b in p.study.boxes] == expected
        assert {b.label for b in p.study.boxes} == {f.finding for f in p.facts} | {t.label for t in p.things}
        assert p.study.labels == {**{k: float(k in sides) for k in FINDINGS}, "devices": float(any(t.label in DEVICES for t in p.things)), FOREIGN: float(any(t.label == FOREIGN for t in p.things))}
        assert len([b for b in p.study.boxes if b.label == FOREIGN]) == len([k for k in p.masks if k.startswith(FOREIGN)]) == len([t for t in p.things if t.label == FOREIGN])


# --- what is drawn

def drawn(facts, things=(), size=160, person=0, study=1):
    e = draw_within(EXPOSURE, np.random.default_rng(study))
    return render(draw_within(ANATOMY, np.random.default_rng(person)), upright(e), facts, size, np.random.default_rng(2), things)


def of(finding, severity, side="left"):
    sides = SIDES.get(finding, ("left", "right"))
    return Fact(finding, severity, side if side in sides else sides[0], ZONES.get(finding, ("",))[0])


@pytest.mark.parametrize("finding", FINDINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_finding_changes_the_picture_where_its_mask_says(finding, side):
    plain, _ = drawn([])
    fact = of(finding, 0.9, side)
    image, masks = drawn([fact])
    change = np.abs(image.astype(float) - plain)
    mask = masks[finding]
    assert mask.any() and change[mask].mean() > 3 * change[~mask].mean() and change[mask].mean() > 4
    if fact.side in ("left", "right"):  # the patient's left is on the right of the picture
        assert (np.nonzero(mask)[1].mean() > 80) == (side == "left")
    assert (image[mask].mean() < plain[mask].mean()) == (finding == "pneumothorax")


@pytest.mark.parametrize("finding", FINDINGS)
def test_more_severe_is_more_visible(finding):
    plain, _ = drawn([])
    change = [np.abs(drawn([of(finding, s)])[0].astype(float) - plain).sum() for s in (0.0, 0.5, 1.0)]
    assert 0 < change[0] < change[1] < change[2]


def test_pneumonia_is_patchy_and_consolidation_is_not():
    from scipy.ndimage import label
    rng, patches = np.random.default_rng(0), defaultdict(list)
    for _ in range(30):
        spot = tuple(rng.random(2))
        for k in ("consolidation", "pneumonia"):
            patches[k].append(label(drawn([Fact(k, .6, "right", "mid", spot)], person=3)[1][k])[1])
    both = drawn([Fact("pneumonia", .8, "both", "", (.3, .3))])[1]["pneumonia"]
    assert np.mean(patches["consolidation"]) < 1.5 < 2 < np.mean(patches["pneumonia"]) and both[:, :80].any() and both[:, 80:].any()


@pytest.mark.parametrize("kind", OUTLINES)
def test_a_thing_is_seen_where_its_mask_says_and_stays_in_the_body(kind):
    rng = np.random.default_rng(3)
    thing = Thing(kind if kind in DEVICES else FOREIGN, kind, "left", (.2, .6, .4))
    plain, _ = drawn([])
    image, masks = drawn([], [thing])
    mask = masks[kind if kind in DEVICES else f"{FOREIGN} 1"]
    change = image.astype(float) - plain
    assert change[mask].mean() > 8 and np.abs(change[~mask]).mean() < .5
    for j in range(40):
        e = upright(draw_within(EXPOSURE, rng))
        c = shape_chest(draw_within(ANATOMY, rng), e, {}, (32, 64, 128)[j % 3])
        t = thing._replace(side=str(rng.choice(["left", "right"])), chance=tuple(rng.random(3)))
        at, more, mask = draw_thing(c, t)
        assert mask.any() and more.max() <= 1 and (c.body[at][mask] > 0).all()
        rows, columns = np.nonzero(mask)
        inside = kind in ("pacemaker", "sternal wires", "button", "coin", "hair-pin", "zipper")
        if inside:  # whole, whatever the exposure
            assert at[0].start + rows.min() > 0 and at[1].start + columns.min() > 0 and at[0].start + rows.max() < c.size - 1 and at[1].start + columns.max() < c.size - 1


def test_side_of_a_thing():
    for side in ("left", "right"):
        _, masks = drawn([], [Thing("pacemaker", "pacemaker", side)])
        box = masks["pacemaker"][30:60]
        assert (np.nonzero(box)[1].mean() > 80) == (side == "left")


# --- sets on disk

def fingerprints(folder):
    return {p.relative_to(folder): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).rglob("*")) if p.is_file()}


def test_bad_requests_and_damaged_sets(tmp_path):
    with pytest.raises(ValueError, match="give at least one study and 32 pixels"):
        synthesize(0, tmp_path)
    with pytest.raises(ValueError, match="workers is -1: give at least one process, or None"):
        synthesize(3, tmp_path, workers=-1)
    synthesize(3, tmp_path, size=32)[1].image.unlink()
    with pytest.raises(ValueError, match="1 images and masks of 3 studies are missing, synthetic-0-000001.png is the first"):
        synthesize(3, tmp_path, size=32)


def test_a_set_does_not_depend_on_the_number_of_processes(tmp_path):
    sets = [synthesize(50, tmp_path / str(w), size=48, masks=True, workers=w) for w in (1, 2, 3)]
    first, *others = [fingerprints(tmp_path / str(w)) for w in (1, 2, 3)]
    assert len(first) > 50 * 4 and all(o == first for o in others)
    assert all([s.meanings for s in x] == [s.meanings for s in sets[0]] for x in sets)
    for i in (0, 6, 49):
        p = make_study(0, i, 48)
        assert np.array_equal(np.array(Image.open(sets[1][i].image)), p.image) and sets[1][i].boxes == p.study.boxes
        assert sets[1][i].masks.keys() == p.masks.keys() and all(np.array_equal(read_mask(v), p.masks[k]) for k, v in sets[1][i].masks.items())


def test_processes_that_draw_need_no_torch():
    code = "import sys; from cmcgns.data.synthetic import draw_image, draw_scene; draw_image(draw_scene(0, 3), 48); print(*{'torch', 'transformers', 'sklearn'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("guarded", [True, False])
def test_a_script_with_or_without_a_guard_gets_its_set(tmp_path, guarded):
    "Processes are spawned, so they run an unguarded script again: its set is drawn all the same, with a warning."
    call = "print(len(synthesize(45, 'out', size=32, workers=2)))"
    script = tmp_path / "script.py"
    script.write_text("from cmcgns.data.synthetic import synthesize\n" + (f"if __name__ == '__main__':\n    {call}\n" if guarded else call + "\n"))
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stdout.strip() == "45", done.stderr
    assert ("drawing goes on in one" in done.stderr) != guarded
    (found,) = (tmp_path / "out").iterdir()
    assert found.name == f"synthetic-v{VERSION}-seed0-32px-45"


def _draw(folder):
    return [s.id for s in synthesize(30, folder, size=32)]


def test_two_processes_may_draw_the_same_set(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        a, b = pool.map(_draw, [tmp_path] * 2)
    assert a == b and len(list(tmp_path.iterdir())) == 1


def _draw_many(folder):
    from cmcgns.data import synthetic
    synthetic.PAYS = 1
    return len(synthesize(41, folder, size=32)), multiprocessing.active_children()


def test_a_process_of_a_pool_draws_alone(tmp_path):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_draw_many, [tmp_path]) == [(41, [])]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_set_is_not_taken_for_a_whole_one(tmp_path, workers):
    code = f"from cmcgns.data.synthetic import synthesize; synthesize(100_000, {str(tmp_path)!r}, size=32, workers={workers})"
    p = subprocess.Popen([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while time.monotonic() < end and not list(tmp_path.glob("*.partial/images/*.png")):
        time.sleep(0.05)
    children = psutil.Process(p.pid).children(recursive=True)
    assert len(children) >= (2 if workers == 2 else 0)
    p.kill()
    p.wait()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive, "processes that draw outlive the one that started them"
    left = list(tmp_path.iterdir())
    assert left and all(f.name.endswith(".partial") for f in left)


def test_scenes_need_no_drawing():
    "What is said and where things are does not depend on the picture."
    s = draw_scene(0, 6)
    a, b = draw_image(s, 64), draw_image(s, 64)
    assert np.array_equal(a[0], b[0]) and a[2] == b[2] and make_study(0, 6, 64).study.boxes == a[2]
