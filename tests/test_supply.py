"What the package is made of and what it may reach: pins, lowest versions, licences; no pickles, no network."
import ast
import csv
import importlib.util
import pickle
import re
import socket
from importlib.metadata import PackageNotFoundError, requires, version

import pytest
import torch
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version

from cmcgns.pretraining import make_settings
from cmcgns.reporting.experiments import end_to_end
from cmcgns.reporting.problems import open_problem
from cmcgns.reporting.runs import list_runs
from cmcgns.reporting.verify import verify_run
from test_kills import SMALL
from test_pretraining import corpus

spec = importlib.util.spec_from_file_location("dependencies", ROOT / "docs" / "dependencies.py")
dependencies = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dependencies)


def required(): return [Requirement(r) for r in re.search(r"^requirements = (.*)$", (ROOT / "settings.ini").read_text(), re.M)[1].split()]


def test_everything_that_is_asked_for_is_pinned():
    pins = dependencies.pinned()
    for name in dependencies.asked(): assert name in pins, f"{name} is in settings.ini and not in constraints.txt"
    for r in required(): assert Version(pins[dependencies.plain(r.name)]) in r.specifier, r


def needed(name, extras=(), seen=None):
    "Every installed distribution that one needs, through all steps."
    seen = set() if seen is None else seen
    if (name, *extras) in seen: return seen
    seen.add((name, *extras))
    for r in map(Requirement, requires(name) or []):
        if r.marker and not any(r.marker.evaluate({"extra": e}) for e in (*extras, "")): continue
        try: version(r.name)
        except PackageNotFoundError: continue # of an extra that is not installed here
        needed(dependencies.plain(r.name), tuple(sorted(r.extras)), seen)
    return seen


def test_what_these_need_in_turn_is_pinned():
    names = {name for name, *_ in needed("cmcgns", ("dev", "docs", "notebooks"))} - {"cmcgns"}
    assert len(names) > 100 and not names - dependencies.pinned().keys()


def test_lowest_versions_are_those_of_settings_ini():
    lowest = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints-lowest.txt").read_text(), re.M))
    for r in required():
        floor = next((s.version for s in r.specifier if s.operator in (">=", "==")), None)
        assert r.name in lowest, f"{r.name} has no lowest version"
        assert floor is None or Version(lowest[r.name]) == Version(floor) or (Version(lowest[r.name]) in r.specifier and Version(lowest[r.name]).release[:2] == Version(floor).release[:2]), f"{r} and {lowest[r.name]}"
        assert Version(lowest[r.name]) <= Version(dependencies.pinned()[dependencies.plain(r.name)])


def test_the_list_of_licences_is_in_step():
    listed = {r["package"]: r for r in csv.DictReader((ROOT / "docs" / "dependencies.csv").read_text().splitlines())}
    assert {n: r["version"] for n, r in listed.items()} == dependencies.pinned(), "run `python docs/dependencies.py`"
    checked = 0
    for name, row in listed.items():
        assert row["licence"] and row["licence"] not in ("not said", "not installed here") and row["needed by"], row
        try: here = version(name)
        except PackageNotFoundError: continue
        if here.partition("+")[0] == row["version"]:
            assert dependencies.licence(name) == row["licence"], f"{name}: run `python docs/dependencies.py`"
            checked += 1
    assert checked > 50 or version("torch").partition("+")[0] != listed["torch"]["version"]


def calls(path):
    "Dotted names that a module calls, with their keywords, and what it imports."
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call): yield ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in node.names: yield "import " + (f"{node.module}." if isinstance(node, ast.ImportFrom) else "") + name.name, {}


@pytest.mark.parametrize("path", sorted((ROOT / "cmcgns").rglob("*.py")), ids=lambda p: p.stem)
def test_nothing_is_unpickled_or_executed(path):
    for name, options in calls(path):
        assert name not in ("import pickle", "import dill", "import joblib", "import shelve", "import marshal", "import cloudpickle", "eval", "exec", "os.system", "pandas.read_pickle", "pd.read_pickle", "yaml.load"), f"{path.name}: {name}"
        if name.startswith("import pickle."): assert name == "import pickle.UnpicklingError"
        if name == "torch.load": assert options.get("weights_only") == "True", f"{path.name}: torch.load without weights_only"
        if name in ("np.load", "numpy.load"): assert options.get("allow_pickle", "False") == "False", path.name
        assert options.get("shell", "False") == "False" and options.get("trust_remote_code", "False") == "False", f"{path.name}: {name}"
        assert not name.startswith(("import requests", "import urllib", "import socket", "import http", "import httpx")), f"{path.name}: {name}"


class Interrupt(Exception): pass


@pytest.fixture
def sealed_off(monkeypatch):
    "Any connection, and any unpickling of more than weights, is written down and refused."
    tried = []
    def refuse(*args, **kwargs): tried.append(("network", args)); raise OSError("no network in this test")
    for name in "connect", "connect_ex", "sendto": monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse); monkeypatch.setattr(socket, "create_connection", refuse)
    load = torch.load
    def watched(*args, **kwargs):
        if kwargs.get("weights_only") is not True: tried.append(("torch.load", args))
        return load(*args, **kwargs)
    monkeypatch.setattr(torch, "load", watched)
    for name in "load", "loads", "Unpickler":
        monkeypatch.setattr(pickle, name, lambda *args, name=name, **kwargs: tried.append((f"pickle.{name}", args)) or (_ for _ in ()).throw(pickle.UnpicklingError("no pickles in this test")))
    return tried


@pytest.mark.slow
def test_the_main_path_needs_no_network_and_no_pickle(sealed_off, tmp_path):
    "Draw, pre-train, probe, and verify; no hub id is named."
    problem = open_problem(None, tmp_path / "cache", 72, synthetic_studies=60)
    end_to_end(problem, make_settings("tiny", stage1_epochs=1, stage2_epochs=1), tmp_path / "runs")
    runs = list_runs(tmp_path / "runs")
    assert len(runs) == 3 and all(verify_run(r, None, tmp_path / "cache").holds for r in runs)
    assert sealed_off == []


def test_resuming_unpickles_weights_alone(sealed_off, tmp_path):
    from transformers import TrainerCallback

    from cmcgns.pretraining import last_checkpoint, pretrain
    class Stop(TrainerCallback):
        def on_epoch_begin(self, args, state, control, **kwargs):
            if state.epoch and state.epoch >= 1: raise Interrupt
    with pytest.raises(Interrupt): pretrain(SMALL, corpus(32), corpus(8, 1), tmp_path, [Stop()])
    assert last_checkpoint(tmp_path / "stage1").name == "checkpoint-4"
    pretrain(SMALL, corpus(32), corpus(8, 1), tmp_path)
    assert sealed_off == []


def test_a_hub_id_is_what_allows_the_network(sealed_off, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None) # the hub's client tries again and again
    from cmcgns.encoders import image_config
    with pytest.raises(ValueError, match="nobody/nothing"): image_config("nobody/nothing", 64)
    assert {kind for kind, _ in sealed_off} <= {"network"}
