"What a finished run is asked about: its own data, another data set, or the synthetic world, and never one of them by accident."
import pytest

from cmcgns.data.check import write_layout
from cmcgns.data.synthetic import synthesize
from cmcgns.pretraining import make_settings
from cmcgns.reporting.experiments import pretrain_config, problem_of
from cmcgns.reporting.problems import SYNTHETIC_STUDIES, open_problem
from cmcgns.reporting.runs import run_once


def says(root, problem):
    "A pre-training that trained nothing, but says on what."
    return run_once(root, "pretrain", pretrain_config(problem, make_settings("tiny")), lambda folder: {})


@pytest.fixture
def films(tmp_path):
    drawn = synthesize(20, tmp_path / "cache", size=72, masks=True)
    for key in "covid_cxr", "rsna":
        write_layout(key, drawn, tmp_path / "films" / key)
    return tmp_path / "films"


def test_the_synthetic_world_is_asked_only_by_name(films, tmp_path, monkeypatch):
    monkeypatch.setitem(SYNTHETIC_STUDIES, "laptop", 40)
    cache = tmp_path / "cache"
    run = says(tmp_path / "runs", open_problem(films, cache, 72, dataset="covid_cxr"))
    for dataset, wanted in (None, "covid_cxr"), ("covid_cxr", "covid_cxr"), ("rsna", "rsna"):
        with pytest.raises(ValueError, match=f"{run.folder.name} was trained on synthetic covid_cxr: give the folder of {wanted} with --data-root, or ask the synthetic world with --dataset synthetic"):
            problem_of(run, None, cache, dataset)
    world = problem_of(run, None, cache, "synthetic")
    assert world.name == "synthetic" and len(world.studies) == 40 and world.how == "ours"


def test_a_run_finds_its_own_data_among_others(films, tmp_path):
    cache = tmp_path / "cache"
    own = open_problem(films, cache, 72, dataset="rsna", split="fold2of5")
    run = says(tmp_path / "runs", own)
    found = problem_of(run, films, cache)
    assert (found.name, found.how, found.split) == ("synthetic rsna", "fold2of5", own.split)
    assert problem_of(run, films, cache, "covid_cxr").name == "synthetic covid_cxr"


def test_a_run_on_the_synthetic_world(films, tmp_path):
    cache = tmp_path / "cache"
    own = open_problem(None, cache, 72, synthetic_studies=30)
    run = says(tmp_path / "runs", own)
    assert problem_of(run, None, cache).split == problem_of(run, None, cache, "synthetic").split == own.split
    assert problem_of(run, films, cache).name == "synthetic covid_cxr", "the first that is there"
    with pytest.raises(ValueError, match="was trained on synthetic: give the folder of rsna with --data-root"):
        problem_of(run, None, cache, "rsna")


def test_a_run_keeps_its_split(films, tmp_path):
    cache, runs = tmp_path / "cache", tmp_path / "runs"
    own = open_problem(films, cache, 72, dataset="rsna", split="fold1of5")
    run = says(runs, own)
    for dataset, split in (None, "fold2of5"), ("rsna", "ours"):
        with pytest.raises(ValueError, match=f"{run.folder.name} keeps the split it was trained on, fold1of5: leave out the split {split}, or name another data set"):
            problem_of(run, films, cache, dataset, split)
    assert problem_of(run, films, cache, None, "fold1of5").split == problem_of(run, films, cache).split == own.split
    assert problem_of(run, films, cache, "covid_cxr", "fold2of5").how == "fold2of5"
    assert problem_of(run, films, cache, "covid_cxr").how == "ours"
