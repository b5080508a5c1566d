"The command line as a user meets it: the main job at the smallest preset, and one sentence for each mistake."
import json
import shutil

import pytest


def refused(done, *words):
    "One line on stderr, no traceback, status 2."
    lines = [x for x in done.stderr.splitlines() if x.startswith("cmcgns: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.mark.parametrize("arguments,words", [
    (["reproduce", "--data-root", "nowhere"], ["nowhere: there is no such folder"]),
    (["pretrain", "--preset", "tiny", "--data-root", "."], ["none of covid_cxr, openi", "data/README.md"]),
    (["pretrain", "--preset", "tiny", "--data-root", ".", "--dataset", "rnsa"], ["unknown data set 'rnsa'", "rsna"]),
    (["data", "check", "nowhere"], ["nowhere: there is no such folder"]),
    (["data", "check", "."], ["none of covid_cxr, openi"]),
    (["data", "synthesize", "x", "--layout", "nih"], ["unknown layout 'nih'", "chexpert"]),
    (["pretrain", "--preset", "labtop"], ["unknown preset 'labtop'", "tiny, laptop"]),
    (["pretrain", "--set", "learning_rate=1"], ["unknown field 'learning_rate'", "lr"]),
    (["pretrain", "--set", "lr=fast"], ["lr=fast: expected float"]),
    (["pretrain", "--preset", "tiny", "--set", "image_encoder=resnet-51"], ["unknown image encoder 'resnet-51'", "resnet-18"]),
    (["evaluate", "pretrain-000"], ["0 runs in", "cmcgns runs"]),
    (["pretrain", "--preset", "tiny", "--set", "mask_by=regoin"], ["mask_by=regoin: known are region, channel"]),
    (["pretrain", "--preset", "tiny", "--set", "image_size=72"], ["cannot double to 72 pixels"]),
    (["bench", "tail"], ["unknown benchmark 'tail'", "head"]),
])
def test_mistakes_get_one_sentence(run_cmcgns, arguments, words):
    refused(run_cmcgns(*arguments), *words)


@pytest.mark.slow
def test_main_job_and_again(run_cmcgns, tmp_path):
    first = run_cmcgns("reproduce", "--preset", "tiny")
    assert first.returncode == 0, first.stderr[-3000:]
    place = tmp_path / "results" / "synthetic-tiny-seed42"
    made = {p.name for p in place.iterdir()}
    assert {"end_to_end.ipynb", "table.md", "table.csv", "result.json"} <= made
    assert {"losses.png", "clusters.png", "reconstructions.png"} <= made
    assert "synthetic" in (place / "table.md").read_text()
    result = json.loads((place / "result.json").read_text())
    assert result["dataset"] == "synthetic" and len(result["rows"]) == 3
    runs = sorted(p.name for p in (tmp_path / "runs").iterdir() if p.suffix != ".lock")
    assert len(runs) == 3
    times = [p.stat().st_mtime for p in sorted((tmp_path / "runs").glob("*/metrics.json"))]
    second = run_cmcgns("reproduce", "--preset", "tiny")
    assert second.returncode == 0 and times == [p.stat().st_mtime for p in sorted((tmp_path / "runs").glob("*/metrics.json"))]
    listed = run_cmcgns("runs")
    assert all(name in listed.stdout for name in runs)
    probed = run_cmcgns("evaluate", next(n for n in runs if n.startswith("pretrain")))
    assert probed.returncode == 0 and "AUROC" in probed.stdout and "| 29 |" in probed.stdout, "the test part of the run's own problem"
    refused(run_cmcgns("evaluate", "pretrain", "--preset", "laptop"), "a run has its settings")
    refused(run_cmcgns("evaluate", "pretrain", "--data-root", tmp_path), "none of covid_cxr")
    made = run_cmcgns("data", "synthesize", "films", "--layout", "rsna", "--studies", "60", "--size", "96")
    assert made.returncode == 0, made.stderr[-3000:]
    other = run_cmcgns("evaluate", "pretrain", "--data-root", "films")
    assert other.returncode == 0 and "synthetic rsna" in other.stdout and "| 12 |" in other.stdout, "a run is evaluated on another data set"


@pytest.mark.slow
def test_main_job_on_real_data(run_cmcgns, shared_data, tmp_path):
    done = run_cmcgns("reproduce", "--preset", "tiny", "--data-root", shared_data)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "covid_cxr" in done.stdout and "COVID-19" in (tmp_path / "results" / "covid_cxr-tiny-seed42" / "table.md").read_text()


@pytest.mark.slow
def test_a_broken_image_is_named_and_left_out(run_cmcgns, shared_data, tmp_path):
    clone = tmp_path / "covid-chestxray-dataset"
    shutil.copytree(shared_data / "covid-chestxray-dataset", clone)
    (clone / "images" / "auntminnie-a-2020_01_28_23_51_6665_2020_01_28_Vietnam_coronavirus.jpeg").write_bytes(b"\xff\xd8 not a picture")
    done = run_cmcgns("pretrain", "--preset", "tiny", "--data-root", clone)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left out 1 images that cannot be read" in done.stderr and "auntminnie-a" in done.stderr
