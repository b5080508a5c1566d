"Every page runs from top to bottom, each in a process of its own, in an empty folder."
import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

PAGES = sorted(p.relative_to(ROOT) for p in (ROOT / "nbs").rglob("*.ipynb")
               if ".ipynb_checkpoints" not in p.parts and "reproduce" not in p.parts)
REPRODUCE = sorted(p.relative_to(ROOT) for p in (ROOT / "nbs" / "reproduce").glob("*.ipynb"))


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_page_runs(page, tmp_path):
    done = subprocess.run([sys.executable, str(Path(__file__).with_name("run_page.py")), str(ROOT / page)],
                          cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(tmp_path.iterdir()), f"{page} left files behind: {list(tmp_path.iterdir())}"


@pytest.mark.parametrize("page", REPRODUCE, ids=str)
def test_reproduction_page_has_one_tagged_cell(page):
    cells = json.loads((ROOT / page).read_text())["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1


def test_there_are_pages():
    assert len(PAGES) > 10 and REPRODUCE
