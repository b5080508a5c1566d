"What the synthetic page does not carry: many studies, several processes, kills."
import multiprocessing
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from cmcgns.data.studies import check_disjoint, split_studies
from cmcgns.data.synthetic import (ANATOMY, BOILERPLATE, BOTH, EXPOSURE, FINDINGS, HOW, NEGATIVE, POSITIVE, ZONES, Fact, draw_within, make_study, patient_of,
                                   render, synthesize, write_report)
from cmcgns.text import report_sentences


def test_every_template_is_one_sentence():
    for about, templates in [*POSITIVE.items(), ("effusion", BOTH), *NEGATIVE.items(), *BOILERPLATE.items()]:
        for t in templates:
            text = t.format(how=HOW.get(about, [""])[0], side="left", zone="lung base", mm=12, view="PA")
            assert len(report_sentences(text, "")) == 1 or len(text.split()) < 3, t
            assert len(report_sentences(text, "Three more words.")) == 2, t
    assert set(POSITIVE) == set(HOW) == set(FINDINGS) <= set(NEGATIVE)


def test_no_sentence_has_two_meanings_of_opposite_kind():
    seen = defaultdict(set)
    for i in range(400):
        p = make_study(0, i, 32).study
        for s, m in zip(p.sentences, p.meanings):
            seen[s].add((m.finding, m.polarity))
    assert all(len(v) == 1 for v in seen.values())


def test_reports_agree_with_the_splitter_whatever_is_there():
    rng = np.random.default_rng(0)
    for n in range(8):
        for _ in range(150):
            facts = [Fact(k, rng.random(), rng.choice(["left", "right"]), str(rng.choice(ZONES[k])) if k in ZONES else "") for k in rng.permutation(FINDINGS)[:n].tolist()]
            impression, findings, meanings = write_report(facts, "AP", rng)
            assert len(report_sentences(impression, findings)) == len(meanings)
            assert 3 <= len(meanings) <= 8 and {m.finding for m in meanings if m.polarity == 1} == {f.finding for f in facts}


def test_a_world_of_another_seed_is_another_world():
    a, b = make_study(0, 5, 64), make_study(1, 5, 64)
    assert not np.array_equal(a.image, b.image) and a.study.id != b.study.id and a.study.patient != b.study.patient


def test_patients_share_anatomy_and_never_cross_a_block():
    owners = [patient_of(3, i) for i in range(600)]
    assert all(i // 6 * 6 <= p <= i for i, p in enumerate(owners)) and owners == sorted(owners)
    studies = [make_study(3, i, 32).study for i in range(150)]
    check_disjoint(studies, split_studies(studies, stratify=FINDINGS[:2]))
    heart = defaultdict(set)
    for s in studies:
        heart[s.patient].add(s.labels["cardiomegaly"])
    assert all(len(v) == 1 for v in heart.values())


@pytest.mark.parametrize("size", [32, 64, 160, 224])
def test_sizes(size):
    p = make_study(0, 4, size)
    assert p.image.shape == (size, size) and p.image.dtype == np.uint8 and all(m.shape == (size, size) and m.dtype == bool for m in p.masks.values())
    assert 40 < p.image.mean() < 200 and p.image.std() > 30


def test_a_box_is_at_the_same_place_at_any_size():
    off = []
    for i in range(40):
        small, large = make_study(0, i, 80).study.boxes, make_study(0, i, 160).study.boxes
        assert [b.label for b in small] == [b.label for b in large]
        off += [np.abs(2 * np.array(a[1:]) - np.array(b[1:])).max() for a, b in zip(small, large)]
    assert np.median(off) <= 3 and np.mean(np.array(off) > 10) < 0.03  # a film of fluid along the dome may be thinner than a pixel


def drawn(facts):
    rng = np.random.default_rng(1)
    e = draw_within(EXPOSURE, rng)
    e.view = "PA"
    return render(draw_within(ANATOMY, np.random.default_rng(0)), e, facts, 160, np.random.default_rng(2))


@pytest.mark.parametrize("finding", FINDINGS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_finding_changes_the_picture_where_its_mask_says(finding, side):
    side = {"cardiomegaly": "", "edema": "both"}.get(finding, side)
    plain, _ = drawn([])
    image, masks = drawn([Fact(finding, 0.9, side, ZONES.get(finding, ("",))[0])])
    change = np.abs(image.astype(float) - plain)
    mask = masks[finding]
    assert mask.any() and change[mask].mean() > 3 * change[~mask].mean() and change[mask].mean() > 4
    if side in ("left", "right"):  # the patient's left is on the right of the picture
        assert (np.nonzero(mask)[1].mean() > 80) == (side == "left")
    if finding == "pneumothorax":
        assert image[mask].mean() < plain[mask].mean()


@pytest.mark.parametrize("finding", FINDINGS)
def test_more_severe_is_more_visible(finding):
    side = {"cardiomegaly": "", "edema": "both"}.get(finding, "left")
    plain, _ = drawn([])
    change = [np.abs(drawn([Fact(finding, s, side, ZONES.get(finding, ("",))[0])])[0].astype(float) - plain).sum() for s in (0.0, 0.5, 1.0)]
    assert 0 < change[0] < change[1] < change[2]


def test_many_studies_have_a_box_for_every_finding():
    for i in range(300):
        p = make_study(7, i, 64)
        assert {b.label for b in p.study.boxes} == {k for k, v in p.study.labels.items() if v}
        assert all(b.w > 0 and b.h > 0 and b.x >= 0 and b.y >= 0 and b.x + b.w <= 64 and b.y + b.h <= 64 for b in p.study.boxes)


def test_bad_requests_and_damaged_sets(tmp_path):
    with pytest.raises(ValueError, match="give at least one study and 32 pixels"):
        synthesize(0, tmp_path)
    synthesize(3, tmp_path, size=32)[1].image.unlink()
    with pytest.raises(ValueError, match="1 of 3 images are missing, synthetic-0-000001.png is the first"):
        synthesize(3, tmp_path, size=32)


def _draw(folder):
    return [s.id for s in synthesize(30, folder, size=32)]


def test_two_processes_may_draw_the_same_set(tmp_path):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        a, b = pool.map(_draw, [tmp_path] * 2)
    assert a == b and len(list(tmp_path.iterdir())) == 1


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_a_killed_set_is_not_taken_for_a_whole_one(tmp_path):
    code = f"from cmcgns.data.synthetic import synthesize; synthesize(100_000, {str(tmp_path)!r}, size=32)"
    p = subprocess.Popen([sys.executable, "-c", code], env={"PYTHONPATH": str(Path(__file__).parents[1])})
    end = time.monotonic() + 60
    while time.monotonic() < end and not list(tmp_path.glob("*.partial/images/*.png")):
        time.sleep(0.05)
    p.kill()
    p.wait()
    left = list(tmp_path.iterdir())
    assert left and all(f.name.endswith(".partial") for f in left)
