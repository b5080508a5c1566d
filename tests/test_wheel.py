"""The built wheel in an environment that holds what it asks for and nothing else.

The environment is made without a download: the packages that the wheel requires, and what these require, are linked from the
environment of the tests. So an import that is not declared fails here, and a notebook tool would be seen.
"""
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("setuptools") is None, reason="setuptools is not installed here, and a wheel is not built without it")]
SOURCES = "cmcgns", "nbs", "settings.ini", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "data/README.md", "data/published_results.csv"
NOTEBOOK_TOOLS = {"nbdev", "fastcore", "execnb", "ghapi", "jupyterlab", "ipykernel", "ipython", "ipywidgets", "nbconvert", "nbformat", "papermill", "sphinx", "pytest"}


def run(*command, **kwargs):
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CMCGNS_TRACEBACK")} | {"PYTHONNOUSERSITE": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=env, **kwargs)


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def required(lines):
    "Names of the packages that requirements ask for here, without extras."
    from packaging.requirements import Requirement
    found = map(Requirement, lines or [])
    return {normal(r.name) for r in found if r.marker is None or r.marker.evaluate({"extra": ""})}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "The sources alone, as in a fresh clone."
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
        else:
            (tree / name).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    return tree


def build_wheel(tree, out):
    done = run(sys.executable, "-m", "pip", "wheel", tree, "--no-deps", "--no-build-isolation", "--no-index", "-q", "-w", out)
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    return build_wheel(tree, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def contents(wheel):
    return zipfile.ZipFile(wheel).namelist()


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    "The interpreter of an environment with the wheel and all it requires."
    from email.parser import Parser
    venv = tmp_path_factory.mktemp("clean") / "venv"
    assert run(sys.executable, "-m", "venv", "--without-pip", venv).returncode == 0
    place = next(venv.glob("lib/python3*/site-packages"))
    metadata = next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith(".dist-info/METADATA"))
    there = {normal(d.name): d for d in distributions()}
    todo, wanted = required(Parser().parsestr(zipfile.ZipFile(wheel).read(metadata).decode()).get_all("Requires-Dist")), set()
    while todo - wanted:
        wanted.add(name := (todo - wanted).pop())
        todo |= required(there[name].requires) if name in there else set()  # what is not there `pip check` will tell
    files = {name: [Path(line.split(",")[0]) for line in (d.read_text("RECORD") or "").splitlines()] for name, d in there.items()}
    owners = defaultdict(set)
    for name, paths in files.items():
        for path in paths:
            owners[path.parts[0]].add(name)
    for name in wanted & set(there):
        for path in files[name]:
            shared = len(owners[path.parts[0]]) > 1  # a folder of several packages is linked file by file, any other as a whole
            linked = path if shared else Path(path.parts[0])
            if ".." not in path.parts and not (place / linked).exists():
                (place / linked).parent.mkdir(parents=True, exist_ok=True)
                (place / linked).symlink_to(there[name].locate_file(linked))
    python = venv / "bin" / "python"
    installed = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel)
    assert installed.returncode == 0, installed.stderr
    return python


def test_wheel_holds_the_library_and_its_pages(tree, wheel, contents):
    ours = {p.relative_to(tree).as_posix() for p in (tree / "cmcgns").rglob("*.py")} | {f"cmcgns/pages/{p.name}" for p in (tree / "nbs" / "reproduce").glob("*.ipynb")}
    assert {n for n in contents if ".dist-info/" not in n} == ours | {"cmcgns/published/published_results.csv"} and len(ours) > 30
    assert any(n.endswith("LICENSE") for n in contents)
    assert wheel.stat().st_size < 1_000_000


def test_wheel_from_the_source_archive_is_the_same(tree, contents, tmp_path):
    done = run(sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})", cwd=tree)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path / "unpacked")
    again = build_wheel(next((tmp_path / "unpacked").iterdir()), tmp_path)
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(contents)


def test_nothing_is_missing_and_no_notebook_tool_is_there(python, tmp_path):
    checked = run(sys.executable, "-m", "pip", "--python", python, "check", cwd=tmp_path)
    assert checked.returncode == 0, checked.stdout
    listed = run(python, "-c", "from importlib.metadata import distributions; print(*{d.name for d in distributions()})", cwd=tmp_path).stdout.split()
    assert not NOTEBOOK_TOOLS & set(map(normal, listed)) and {"cmcgns", "torch", "transformers"} <= set(listed)


def test_extras_are_declared(python, tmp_path):
    told = run(python, "-c", "from importlib.metadata import metadata; print(*metadata('cmcgns').get_all('Provides-Extra'))", cwd=tmp_path).stdout.split()
    assert {"notebooks", "docs", "dev"} <= set(told)


def test_import_is_light(python, tmp_path):
    code = "import sys, time, torch; had = set(sys.modules); t = time.perf_counter(); import cmcgns; print(time.perf_counter() - t, len(set(sys.modules) - had), cmcgns.__file__)"
    seconds, new, place = run(python, "-c", code, cwd=tmp_path).stdout.split(maxsplit=2)
    assert float(seconds) < 0.5 and int(new) < 5
    assert "site-packages" in place


def test_every_module_imports(python, tmp_path):
    "So each package that a module needs is declared."
    code = ("import importlib, pkgutil, cmcgns\n"
            "names = [m.name for m in pkgutil.walk_packages(cmcgns.__path__, 'cmcgns.')]\n"
            "[importlib.import_module(n) for n in names]; print(len(names))")
    done = run(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 25


def test_command_helps(python, tmp_path):
    helped = run(python.with_name("cmcgns"), "--help", cwd=tmp_path)
    assert helped.returncode == 0, helped.stderr
    for command in "pretrain", "evaluate", "reproduce", "runs", "data", "bench":
        assert re.search(rf"^\s+{command}\s", helped.stdout, re.M)
    assert not list(tmp_path.iterdir())


def test_example_of_the_readme(python, tmp_path):
    "The first example under 'As a library', with the answer that stands below it."
    part = (ROOT / "README.md").read_text(encoding="utf-8").split("## As a library", 1)[1]
    code, answer = re.search(r"```\w*\n(.*?)```\n\n    (.*?)\n", part, re.S).groups()
    *lines, last = code.strip().splitlines()
    done = run(python, "-c", "\n".join([*lines, f"print(({last}))"]), cwd=tmp_path)
    assert done.stdout.strip() == answer.strip(), done.stderr


def test_reproduction_pages_are_found(python, tmp_path):
    pages = sorted(p.stem for p in (ROOT / "nbs" / "reproduce").glob("*.ipynb"))
    code = f"from cmcgns.reporting.pages import page_path\nfor name in {pages!r}: print(page_path(name))"
    done = run(python, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [Path(line) for line in done.stdout.split()]
    assert [p.stem for p in found] == pages and all(p.parent.name == "pages" and "site-packages" in p.parts for p in found)


def test_published_numbers_are_found(python, tmp_path):
    done = run(python, "-c", "from cmcgns.reporting.results import published_rows; print(len(published_rows('classification')))", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 5


def test_what_needs_notebook_tools_says_so(python, tmp_path):
    done = run(python.with_name("cmcgns"), "reproduce", cwd=tmp_path)
    assert done.returncode == 2 and "pip install 'cmcgns[notebooks]'" in done.stderr
    assert not list(tmp_path.iterdir())
