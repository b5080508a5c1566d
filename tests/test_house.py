"The house is in order: exports in step, pages clean, README in step, lint, light imports, data flowing one way."
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from readme import readme

BIN = Path(sys.executable).parent
PAGES = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "A copy of the tree after nbdev_export and nbdev_clean."
    copy = tmp_path_factory.mktemp("copy")
    for name in "nbs", "cmcgns":
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints"))
    shutil.copy(ROOT / "settings.ini", copy)
    for command in "nbdev_export", "nbdev_clean":
        done = subprocess.run([BIN / command], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    return copy


@pytest.mark.parametrize("folder", ["nbs", "cmcgns"])
def test_pages_and_modules_are_in_step(exported, folder):
    kind = "*.ipynb" if folder == "nbs" else "*.py"
    ours = {p.relative_to(ROOT): p.read_text() for p in (ROOT / folder).rglob(kind) if ".ipynb_checkpoints" not in p.parts}
    theirs = {p.relative_to(exported): p.read_text() for p in (exported / folder).rglob(kind)}
    assert sorted(ours) == sorted(theirs)
    assert [str(p) for p in ours if ours[p] != theirs[p]] == [], "run `make export`"


def test_readme_is_in_step():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run `make export`"


def test_readme_names_every_page():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [str(p.relative_to(ROOT)) for p in PAGES if p.stem != "index" and f"({p.relative_to(ROOT).as_posix()})" not in text] == []


def test_readme_links_lead_somewhere():
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    lost = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert len(links) > 20 and not lost


def test_ruff():
    done = subprocess.run([BIN / "ruff", "check", "--no-cache", "nbs", "tests", "docs", "setup.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_modules_import_what_they_use():
    "A page may use a name in its examples alone; then its module need not load it."
    done = subprocess.run([BIN / "ruff", "check", "--no-cache", "--isolated", "--select", "F401", "cmcgns"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_is_fit_to_read(page):
    "Small, no paths of a machine, no warnings or progress bars in outputs; exported cells short."
    assert page.stat().st_size < 400_000
    for i, cell in enumerate(json.loads(page.read_text())["cells"]):
        outputs, source = json.dumps(cell.get("outputs", [])), "".join(cell["source"])
        found = re.search(r"/(work|tmp|root|home|Users)/|Warning|it/s\]|%\|[ █▏]", outputs)
        assert not found, f"cell {i} keeps {found[0]!r} in its output"
        lines = [x for x in source.splitlines() if x.strip() and not x.lstrip().startswith("#")]
        assert not (source.startswith("#| export") and len(lines) > 50), f"cell {i} exports {len(lines)} lines; where is the seam?"


def test_core_knows_no_data_sets():
    "Data flows one way: core imports neither data, evaluation nor reporting; data imports no model."
    core = [p for p in (ROOT / "cmcgns").glob("*.py") if p.name != "_modidx.py"]
    for path in core:
        assert not re.search(r"from \.(data|evaluation|reporting)|from cmcgns\.(data|evaluation|reporting)", path.read_text()), path
    for path in (ROOT / "cmcgns" / "data").glob("*.py"):
        assert not re.search(r"\.(model|encoders|pretraining|evaluation|reporting)[ .]", path.read_text()), path


def test_import_is_light():
    code = ("import sys, torch, time; t = time.perf_counter(); import cmcgns; s = time.perf_counter() - t; "
            "heavy = {'transformers', 'sklearn', 'matplotlib', 'umap', 'pandas', 'fastcore', 'nbdev'} & set(sys.modules); print(s, sorted(heavy))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = done.stdout.split(maxsplit=1)
    assert heavy.strip() == "[]" and float(seconds) < 1


def test_exported_code_imports_no_notebook_tools():
    for path in (ROOT / "cmcgns").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (fastcore|nbdev|execnb|IPython)", path.read_text(), re.M), path


@pytest.mark.xdist_group("house")
def test_groups_of_tests_stay_on_one_worker(request):
    "pytest 9.2 with pytest-xdist 3.8 forgets groups: each worker then makes the whole reproduction for itself."
    if "PYTEST_XDIST_WORKER" not in os.environ:
        pytest.skip("one process runs everything")
    assert request.node.nodeid.endswith("@house")
