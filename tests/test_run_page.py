"Pages in processes of their own: one sentence for what went wrong, an end when it is asked for, and nothing left behind."
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import nbformat
import pytest

from cmcgns.reporting import pages
from cmcgns.reporting.pages import find_page, run_page, show_all

ROOT = Path(__file__).parents[1]
HELPERS = textwrap.dedent('''
    import os, pathlib
    def begin(): pathlib.Path(f"kernel-{os.getpid()}").touch()
''')


@pytest.fixture
def page(tmp_path, monkeypatch):
    "Make a page of one line of code."
    def make(name, code):
        cells = [nbformat.v4.new_code_cell("seed: int = 0", metadata=dict(tags=["parameters"])), nbformat.v4.new_code_cell(HELPERS + code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=dict(name="python3", display_name="", language="python"))), tmp_path / f"{name}.ipynb")
    monkeypatch.setattr(pages, "page_path", lambda name: tmp_path / f"{name}.ipynb")
    return make


def kernels(folder):
    "Kernels of pages that are still there."
    alive = []
    for file in folder.rglob("kernel-*"):
        try:
            os.kill(int(file.name.partition("-")[2]), 0)
            alive.append(file)
        except ProcessLookupError:
            pass
    return alive


def gone(folder, seconds=20):
    "Whether all kernels have ended, which may take a moment."
    end = time.monotonic() + seconds
    while kernels(folder) and time.monotonic() < end:
        time.sleep(.1)
    return not kernels(folder)


@pytest.mark.parametrize("code,said", [
    ("raise ValueError('runs/x: it cannot be read; delete this folder')", "ValueError: runs/x: it cannot be read; delete this folder"),
    ("os._exit(1)", "its kernel died, perhaps for lack of memory"),
])
def test_a_page_that_fails_says_so_in_one_sentence_with_its_name(page, tmp_path, code, said):
    page("broken", code)
    with pytest.raises(ValueError) as error:
        run_page("broken", tmp_path / "out")
    assert str(error.value) == f"broken.ipynb: {said}; as far as it came, it lies in {tmp_path / 'out' / 'broken.ipynb'}"
    assert (tmp_path / "out" / "broken.ipynb").exists() and gone(tmp_path)


def test_parameters_keep_their_types_threads_reach_the_kernel_alone_and_modules_are_found(page, tmp_path, monkeypatch):
    page("told", "import json, of_mine; pathlib.Path('told.json').write_text(json.dumps([seed, os.environ['OMP_NUM_THREADS'], os.getcwd()]))")
    (tmp_path / "of_mine.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([".", os.environ.get("PYTHONPATH", str(ROOT))]))
    before = dict(os.environ)
    run_page("told", tmp_path / "out", threads=3, seed="42")
    assert json.loads((tmp_path / "out" / "told.json").read_text()) == ["42", "3", str(tmp_path / "out")] and dict(os.environ) == before


def test_the_first_error_ends_the_pages_under_way(page, tmp_path):
    page("long", "begin(); import time; time.sleep(300)")
    page("short", "import time; p = pathlib.Path('../long')\nwhile not list(p.glob('kernel-*')): time.sleep(.1)\nraise KeyError('x')")
    page("never", "begin()")
    with pytest.raises(ValueError, match="short.ipynb: KeyError: 'x'"):
        show_all(lambda name, **how: run_page(name, tmp_path / name, **how), ["long", "short", "never"], at_once=2)
    assert gone(tmp_path) and list(tmp_path.glob("long/kernel-*"))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_page_ends_with_whoever_asked_for_it(page, tmp_path, sent):
    page("long", "begin(); import time; time.sleep(300)")
    code = textwrap.dedent(f"""
        import signal
        from pathlib import Path
        from cmcgns.reporting import pages
        signal.signal(signal.SIGINT, signal.default_int_handler) # who started these tests in the background may have told it to ignore Ctrl-C
        pages.page_path = lambda name: Path({str(tmp_path)!r}) / f"{{name}}.ipynb"
        pages.show_all(lambda name, **how: pages.run_page(name, {str(tmp_path / "out")!r}, **how), ["long"])
    """)
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as asking:
        end = time.monotonic() + 120
        while not kernels(tmp_path) and time.monotonic() < end:
            time.sleep(.1)
        assert kernels(tmp_path), "the page has begun"
        asking.send_signal(sent)
        assert asking.wait(30) != 0
    assert gone(tmp_path)


def test_a_page_is_told_to_stop_by_another_thread(page, tmp_path):
    page("long", "begin(); import time; time.sleep(300)")
    stop = threading.Event()
    def wait():
        while not kernels(tmp_path): time.sleep(.1)
        stop.set()
    threading.Thread(target=wait, daemon=True).start()
    with pytest.raises(InterruptedError, match="long.ipynb was ended before it was finished"):
        run_page("long", tmp_path / "out", stop=stop)
    assert gone(tmp_path) and list(tmp_path.glob("out/kernel-*"))


def test_what_is_no_longer_written_does_not_stay(page, tmp_path):
    page("one", "pathlib.Path('first.txt' if seed == 1 else 'second.txt').touch()")
    made = lambda seed: {p.name for p in find_page("one", tmp_path / "out", {}, seed=seed).parent.iterdir() if p.suffix == ".txt"}
    assert made(1) == {"first.txt"} and made(2) == {"second.txt"}
