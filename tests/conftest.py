"What the tests share: where the real data lie, and a command line that cannot reach anything else."
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data():
    "The folder of real data, or a skip that says what is missing."
    folder = Path(os.environ.get("CMCGNS_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder} (set CMCGNS_TEST_DATA to a folder laid out as data/README.md says)")
    return folder


def cmcgns(*args, cwd, timeout=600, **kwargs):
    "Run the command line in its own process; returns the finished process."
    return subprocess.run([sys.executable, "-m", "cmcgns.reporting.cli", *map(str, args)],
                          cwd=cwd, capture_output=True, text=True, timeout=timeout, **kwargs)


@pytest.fixture
def run_cmcgns(tmp_path):
    "The command line in an empty folder."
    return partial(cmcgns, cwd=tmp_path)


def one_sentence(error):
    "What an error of `pytest.raises` says, which is one sentence."
    text = str(error.value)
    assert "\n" not in text and text.count(". ") == 0 and len(text) < 600, text
    return text
