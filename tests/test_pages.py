"Every page runs from top to bottom, each in a process of its own, in an empty folder."
import json
import multiprocessing

import pytest
from conftest import ROOT
from run_page import main_in

PAGES = sorted(p.relative_to(ROOT) for p in (ROOT / "nbs").rglob("*.ipynb")
               if ".ipynb_checkpoints" not in p.parts and "reproduce" not in p.parts)
REPRODUCE = sorted(p.relative_to(ROOT) for p in (ROOT / "nbs" / "reproduce").glob("*.ipynb"))


# Each page is a fork of one process that has imported these and run nothing: a third of a page's time was imports.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "transformers.trainer", "transformers.models.bert.modeling_bert", "transformers.models.resnet.modeling_resnet",
                              "transformers.models.vit.modeling_vit", "sklearn.linear_model", "sklearn.metrics", "matplotlib.pyplot", "execnb.shell"])


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_page_runs(page, tmp_path, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "stderr"
    process = FORKS.Process(target=main_in, args=(str(tmp_path), str(ROOT / page), str(log)))
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    assert not list(tmp_path.iterdir()), f"{page} left files behind: {list(tmp_path.iterdir())}"


@pytest.mark.parametrize("page", REPRODUCE, ids=str)
def test_reproduction_page_has_one_tagged_cell(page):
    cells = json.loads((ROOT / page).read_text())["cells"]
    assert sum("parameters" in c["metadata"].get("tags", []) for c in cells) == 1


@pytest.mark.parametrize("page", [p for p in REPRODUCE if p.stem != "report_statistics"], ids=str)
def test_parameters_are_read_in_one_place(page):
    "papermill -p seeds 42 gives 42, not '42'."
    cells = ["".join(c["source"]) for c in json.loads((ROOT / page).read_text())["cells"]]
    assert sum("read_reproduction(preset, data_root, runs, cache, seed" in s for s in cells) == 1


@pytest.mark.parametrize("page", [p for p in REPRODUCE + PAGES if p.parent.name in ("reproduce", "explore") and "runs: str" in (ROOT / p).read_text()], ids=str)
def test_page_says_where_the_runs_of_make_reproduce_lie(page):
    "A kernel of JupyterLab starts in the page's own folder."
    line = next(x for c in json.loads((ROOT / page).read_text())["cells"] if "parameters" in c["metadata"].get("tags", []) for x in c["source"] if x.startswith("runs: "))
    assert "from JupyterLab, those of make reproduce lie in '../../runs'" in line and (ROOT / page).parent.parent.parent == ROOT


def test_there_are_pages():
    assert len(PAGES) > 10 and REPRODUCE
