"The command line as a user meets it: the main job at the smallest preset, and one sentence for each mistake."
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, cmcgns

from cmcgns.data.check import write_layout
from cmcgns.data.synthetic import synthesize
from cmcgns.pretraining import make_settings
from cmcgns.reporting.cli import main
from cmcgns.reporting.experiments import pretrain_config
from cmcgns.reporting.plan import FIGURES, OURS, PAGES, TABLES, Reproduction, all_jobs, job_of
from cmcgns.reporting.problems import open_problem
from cmcgns.reporting.runs import run_once


def refused(done, *words):
    "One line on stderr, no traceback, status 2."
    lines = [x for x in done.stderr.splitlines() if x.startswith("cmcgns: ")]
    assert done.returncode == 2 and len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


@pytest.fixture
def refuses(monkeypatch, capfd):
    "That the command line refuses its arguments, in this process: a new one takes seconds to begin."
    def check(*arguments, words, cwd):
        monkeypatch.chdir(cwd)
        monkeypatch.setattr(sys, "argv", ["cmcgns", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        refused(subprocess.CompletedProcess(arguments, stopped.value.code, *capfd.readouterr()), *words)
    return check


@pytest.mark.parametrize("arguments,words", [
    (["reproduce", "--data-root", "nowhere"], ["nowhere: there is no such folder"]),
    (["pretrain", "--preset", "tiny", "--data-root", "."], ["none of covid_cxr, openi", "data/README.md"]),
    (["pretrain", "--preset", "tiny", "--data-root", ".", "--dataset", "rnsa"], ["unknown data set 'rnsa'", "rsna"]),
    (["pretrain", "--dataset", "covid_cxr"], ["covid_cxr is a data set of real films: give its folder with --data-root"]),
    (["reproduce", "--dataset", "openi"], ["openi is a data set of real films: give its folder with --data-root"]),
    (["data", "check", "nowhere"], ["nowhere: there is no such folder"]),
    (["data", "check", "."], ["none of covid_cxr, openi"]),
    (["data", "synthesize", "x", "--layout", "nih"], ["unknown layout 'nih'", "chexpert"]),
    (["pretrain", "--preset", "labtop"], ["unknown preset 'labtop'", "tiny, laptop"]),
    (["pretrain", "--set", "learning_rate=1"], ["unknown field 'learning_rate'", "lr"]),
    (["pretrain", "--set", "lr=fast"], ["lr=fast: expected float"]),
    (["pretrain", "--preset", "tiny", "--set", "image_encoder=resnet-51"], ["unknown image encoder 'resnet-51'", "resnet-18"]),
    (["pretrain", "--split", "5folds"], ["5folds are several splits, which reproduce goes through; here name one, like fold1of5"]),
    (["evaluate", "random", "--split", "fodl1of5"], ["unknown split 'fodl1of5' for synthetic films: known are ours, fold1of5 and the like, image-level"]),
    (["reproduce", "--split", "lovt/rsna"], ["unknown split 'lovt/rsna' for synthetic films"]),
    (["evaluate", "pretrain-000"], ["no run in runs begins with 'pretrain-000': `cmcgns runs --runs runs` lists them"]),
    *((["evaluate", "random", "--task", task, "--target", "effusion"], [f"{task} asks for no targets, so 'effusion' would change nothing", "classification, detection, segmentation, zero-shot"])
      for task in ("retrieval", "grounding", "clusters")),
    (["pretrain", "--preset", "tiny", "--set", "mask_by=regoin"], ["mask_by=regoin: known are region, channel"]),
    (["pretrain", "--preset", "tiny", "--set", "image_size=72"], ["cannot double to 72 pixels"]),
    (["reproduce", "--preset", "tiny", "--only-real"], ["none of mimic_cxr, covid_cxr, openi is there", "--only-real forbids"]),
    (["reproduce", "--tables", "table_9"], ["0 pages begin with 'table_9'", "table_1_classification"]),
    (["reproduce", "--tables", "report_statistics"], ["report_statistics needs no runs", "run papermill"]),
    (["reproduce", "--seeds", "one"], ["'one': expected numbers separated by commas"]),
    (["export", "pretrain", "--to", "x"], ["no run in runs begins with 'pretrain'"]),
    (["reproduce", "--preset", "tiny", "--seeds", "42,42"], ["seed 42 is named twice"]),
    (["reproduce", "--preset", "tiny", "--split", "0folds"], ["split '0folds'", "at least two"]),
    (["bench", "tail"], ["unknown benchmark 'tail'", "head"]),
    (["bench", "head", "--repeats", "0"], ["repeats=0: expected 1 or more"]),
    (["bench", "head", "--device", "gpu"], ["device 'gpu': known are cpu and cuda"]),
])
def test_mistakes_get_one_sentence(arguments, words, tmp_path, refuses):
    refuses(*arguments, words=words, cwd=tmp_path)


def test_a_run_that_is_no_pretraining_is_refused(tmp_path, refuses):
    probe = run_once(tmp_path / "runs", "classification", dict(encoder="random"), lambda folder: {})
    for command in ["evaluate"], ["export", "--to", "x"]:
        refuses(*command, probe.folder.name, words=[f"{probe.folder.name} is a run of classification: name a pretrain run"], cwd=tmp_path)


def test_a_run_is_not_asked_on_another_split(tmp_path, refuses):
    problem = open_problem(None, tmp_path / "cache", 72, synthetic_studies=30, split="fold1of5")
    run = run_once(tmp_path / "runs", "pretrain", pretrain_config(problem, make_settings("tiny")), lambda folder: {})
    refuses("evaluate", run.folder.name, "--split", "fold2of5", words=["keeps the split it was trained on, fold1of5: leave out the split fold2of5"], cwd=tmp_path)


def test_only_real_data_and_some_are_missing(tmp_path, refuses):
    write_layout("covid_cxr", synthesize(12, tmp_path / "cache", size=48, masks=True), tmp_path / "data" / "covid")
    refuses("reproduce", "--preset", "tiny", "--data-root", "data", "--only-real", cwd=tmp_path, words=[
        "chexpert, rsna, covidx, object_cxr, siim are not in data, and --only-real forbids stand-ins",
        "put them there as data/README.md shows, or name pages that need no other data (--tables end_to_end,table_4,", "or leave out --only-real"])
    assert not (tmp_path / "runs").exists()


def test_a_mistake_ends_a_process_the_same_way(run_cmcgns):
    refused(run_cmcgns("pretrain", "--preset", "labtop"), "unknown preset 'labtop'")


@pytest.fixture(scope="module")
def reproduced(tmp_path_factory):
    "Everything there is, at the smallest preset: the folder, and what was said."
    folder = tmp_path_factory.mktemp("reproduced")
    done = cmcgns("reproduce", "--preset", "tiny", "--tables", "all", cwd=folder, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done


def finished(folder):
    return {p.parent.name: p.stat().st_mtime for p in (folder / "runs").glob("*/metrics.json") if p.parent.suffix != ".partial"}


@pytest.mark.slow
@pytest.mark.xdist_group("reproduced")
def test_every_table_and_figure(reproduced):
    folder, done = reproduced
    place = folder / "results" / "synthetic-tiny-seed42"
    assert str(place.relative_to(folder) / "report.html") in done.stdout
    assert sorted(p.name for p in place.iterdir() if p.is_dir()) == sorted(PAGES)
    for page, table in PAGES.items():
        made = {p.name for p in (place / page).iterdir()}
        assert {f"{page}.ipynb", "result.json"} <= made
        assert json.loads((place / page / "result.json").read_text())["data"]["corpus"]["name"] == "synthetic"
        if page in FIGURES:
            assert any(m.endswith(".png") for m in made) and any(m.endswith(".pdf") for m in made)
        elif page in (*TABLES, "end_to_end"):
            assert {f"{page}.md", f"{page}.csv", f"{page}.tex"} <= made
            text = (place / page / f"{page}.md").read_text()
            assert "Synthetic data, no patients" in text and (page not in TABLES or all(a.name in text for a in table.arms))
    report = (place / "report.html").read_text()
    assert all(page in report for page in PAGES) and "synthetic" in report and str(folder) not in report
    assert not list(folder.rglob("*.partial")) and set(finished(folder)) >= {j.name for j in all_jobs(Reproduction("tiny", None, folder / "runs", folder / "cache"), PAGES.values())}


@pytest.mark.slow
@pytest.mark.xdist_group("reproduced")
def test_again_computes_nothing(reproduced):
    folder, _ = reproduced
    before = finished(folder)
    said = cmcgns("reproduce", "--preset", "tiny", "--tables", "all", "--dry-run", cwd=folder)
    n = len(all_jobs(Reproduction("tiny", None, folder / "runs", folder / "cache"), PAGES.values()))
    assert f"{n} runs, {n} of them there, 0 to do" in said.stdout
    executed = lambda: {p.stem: p.stat().st_mtime_ns for p in (folder / "results").rglob("*.ipynb")}
    then = executed()
    again = cmcgns("reproduce", "--preset", "tiny", "--tables", "all", cwd=folder)
    assert again.returncode == 0 and finished(folder) == before and executed() == then, again.stderr[-3000:]
    picture = next((folder / "results").rglob("figure_training/*.png"))
    picture.unlink()
    again = cmcgns("reproduce", "--preset", "tiny", "--tables", "figure_training", cwd=folder)
    assert again.returncode == 0 and finished(folder) == before and picture.exists(), again.stderr[-3000:]
    assert {k for k, t in executed().items() if t != then[k]} == {"figure_training"}, "the page that lost its picture, and no other"


@pytest.mark.slow
@pytest.mark.xdist_group("reproduced")
def test_evaluate_and_export_a_run(reproduced, tmp_path, refuses):
    folder, _ = reproduced
    job = job_of(Reproduction("tiny", None, folder / "runs", folder / "cache"), OURS, 42)
    listed = cmcgns("runs", cwd=folder)
    assert all(name in listed.stdout for name in finished(folder))
    probed = cmcgns("evaluate", job.name, cwd=folder)
    held = cmcgns("verify", job.name, cwd=folder)
    assert held.returncode == 0 and f"{job.name}: holds" in held.stdout, held.stdout + held.stderr
    assert probed.returncode == 0 and "AUROC" in probed.stdout and "| 29 |" in probed.stdout, "the test part of the run's own problem"
    refuses("evaluate", job.name, "--preset", "laptop", words=["a run has its settings"], cwd=folder)
    refuses("evaluate", job.name, "--data-root", tmp_path, words=["none of covid_cxr"], cwd=folder)
    refuses("evaluate", job.name, "--task", "sleep", words=["unknown task 'sleep': known are classification, "], cwd=folder)
    made = cmcgns("data", "synthesize", "films", "--layout", "rsna", "--studies", "60", "--size", "96", cwd=folder)
    assert made.returncode == 0, made.stderr[-3000:]
    other = cmcgns("evaluate", job.name, "--data-root", "films", cwd=folder)
    n = len(open_problem(folder / "films", folder / "cache", 72).split.parts["test"])
    assert other.returncode == 0 and "synthetic rsna" in other.stdout and f"| {n} |" in other.stdout, "a run is evaluated on another data set"
    out = cmcgns("export", job.name, "--to", tmp_path / "encoder", "--format", "transformers", cwd=folder)
    assert out.returncode == 0 and "auroc" in (tmp_path / "encoder" / "README.md").read_text()
    refuses("export", job.name, "--to", tmp_path / "encoder", words=["is there and not empty"], cwd=folder)


@pytest.mark.slow
@pytest.mark.xdist_group("reproduced")
def test_a_reproduction_killed_at_any_moment_goes_on(reproduced, tmp_path):
    "Killed five times, at moments that a seed chooses: the tables are those of the undisturbed one, and what had finished is not computed again."
    folder, _ = reproduced
    asked = ["reproduce", "--preset", "tiny", "--tables", "end_to_end,table_4"]
    chance, kept = random.Random(0), {}
    for _ in range(5):
        started = subprocess.Popen([sys.executable, "-m", "cmcgns.reporting.cli", *asked], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
        started.stderr.read(1)  # it has begun to say what it does
        time.sleep(chance.uniform(0, 8))
        os.killpg(started.pid, signal.SIGKILL)
        started.wait()
        now = finished(tmp_path)
        assert kept.items() <= now.items()
        kept = now
    done = cmcgns(*asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert kept.items() <= finished(tmp_path).items() and not list(tmp_path.rglob("*.partial"))
    for page in "end_to_end/end_to_end", "table_4_components/table_4_components":
        for end in "md", "csv":
            ours, theirs = (root / "results" / "synthetic-tiny-seed42" / f"{page}.{end}" for root in (tmp_path, folder))
            assert ours.read_text() == theirs.read_text()


@pytest.mark.slow
@pytest.mark.xdist_group("reproduced")
def test_a_page_by_hand(reproduced, tmp_path):
    "papermill in a folder of its own, with runs that are there; one seed comes as a number."
    folder, _ = reproduced
    done = subprocess.run([sys.executable, "-m", "papermill", str(ROOT / "nbs" / "reproduce" / "table_5_negatives.ipynb"), "out.ipynb", "-p", "preset", "tiny", "-p", "runs", str(folder / "runs"),
                           "-p", "cache", str(folder / "cache"), "-p", "seeds", "42"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "table_5_negatives.md").exists() and (tmp_path / "out.ipynb").exists()


@pytest.mark.slow
def test_main_job_on_real_data_with_a_broken_image(run_cmcgns, shared_data, tmp_path):
    clone = tmp_path / "data" / "covid-chestxray-dataset"
    shutil.copytree(shared_data / "covid-chestxray-dataset", clone)
    (clone / "images" / "auntminnie-a-2020_01_28_23_51_6665_2020_01_28_Vietnam_coronavirus.jpeg").write_bytes(b"\xff\xd8 not a picture")
    done = run_cmcgns("reproduce", "--preset", "tiny", "--tables", "end_to_end,figure_attention", "--data-root", "data")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left out 1 images that cannot be read" in done.stderr and "auntminnie-a" in done.stderr
    assert "covid_cxr" in done.stdout and "COVID-19" in (tmp_path / "results" / "covid_cxr-tiny-seed42" / "end_to_end" / "end_to_end.md").read_text()
