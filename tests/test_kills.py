"""Killed, crowded, full, read-only, old: a run ends right, or says in one sentence why not.

CMCGNS_KILLS=20 kills the job of tests/kills.py twenty times instead of five. Killed reproductions are in tests/test_cli.py, killed
trainings between two checkpoints in tests/test_pretraining.py, killed builds of a cache in tests/test_image.py."""
import json
import os
import resource
import shutil
import subprocess
import sys
import time

import pytest
from conftest import cmcgns

import kills
from cmcgns.files import seal
from cmcgns.model import load_model
from cmcgns.pretraining import last_checkpoint, pretrain
from cmcgns.reporting.experiments import settings_of
from cmcgns.reporting.runs import Run, find_run, run_once
from test_pretraining import corpus, make_settings

pytestmark = pytest.mark.xdist_group("kills")


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
    n = int(os.environ.get("CMCGNS_KILLS", 5))
    done = subprocess.run([sys.executable, kills.__file__, str(tmp_path / "jobs"), str(n)], capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0 and f"{n} kills" in done.stdout, done.stderr[-3000:]
    print(done.stdout)


SMALL = make_settings("tiny", stage1_epochs=2, stage2_epochs=1, batch_size=8, clusters=4, cluster_start=1.1)


def small(folder, prepare=lambda: None):
    "A training of seconds as a run."
    prepare()
    return run_once(folder / "runs", "pretrain", dict(a=1), lambda part: dict(logs=pretrain(SMALL, corpus(32), corpus(8, 1), part)[1]))


def in_a_fork(folder, *args):
    "The exit status of the training (3: it said why not), and what it said."
    folder.mkdir(exist_ok=True)
    status = kills.wait(kills.start(small, folder, *args))
    said = (folder / "said-2.txt").read_text() if (folder / "said-2.txt").exists() else ""
    return status, [line for line in said.splitlines() if line.startswith("cmcgns: ")], said


def weights(folder): return {p.relative_to(folder / "runs").as_posix(): p.read_bytes() for p in sorted((folder / "runs").rglob("model.safetensors"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert in_a_fork(folder)[0] == 0
    return folder


@pytest.mark.parametrize("most", [20_000, 400_000, 3_000_000])
def test_a_full_disk_is_said_and_the_same_command_goes_on(whole, tmp_path, most):
    "No file may grow beyond so many bytes: the tokenizer, the weights or the optimizer's state does not fit."
    status, said, everything = in_a_fork(tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)))
    if status == 0: pytest.skip(f"everything fits into files of {most} bytes")
    assert status == 3 and len(said) == 1 and ("room" in said[0] or "File too large" in said[0]), everything[-2000:]
    assert not list((tmp_path / "runs").glob("pretrain-*[0-9a-f]/metrics.json")), "a run that could not be written looks finished"
    assert in_a_fork(tmp_path)[0] == 0 and weights(tmp_path) == weights(whole)


@pytest.fixture
def read_only(tmp_path):
    "A folder that not even root can write to."
    (tmp_path / "there").mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path / "there")], capture_output=True, text=True) if os.getuid() == 0 and shutil.which("mount") else None
    if mounted is None and os.getuid(): (tmp_path / "there").chmod(0o555)
    elif mounted is None or mounted.returncode: pytest.skip("root may write everywhere, and nothing can be mounted here")
    yield tmp_path / "there"
    if mounted is not None: subprocess.run(["umount", str(tmp_path / "there")], check=True)


def test_a_read_only_folder_is_named(read_only):
    done = cmcgns("pretrain", "--preset", "tiny", "--cache", read_only / "cache", "--runs", read_only / "runs", cwd=read_only.parent)
    said = [x for x in done.stderr.splitlines() if x.startswith("cmcgns: ")]
    assert done.returncode == 2 and len(said) == 1 and str(read_only) in said[0] and "Traceback" not in done.stderr, done.stderr


def test_two_processes_ask_for_one_run(whole, tmp_path):
    "The second waits for the first, and finds its run; if the first is killed, it goes on in its place."
    first, second = (kills.start(small, tmp_path) for _ in range(2))
    assert [kills.wait(p) for p in (first, second)] == [0, 0] and weights(tmp_path) == weights(whole)
    said = (tmp_path / "said-2.txt").read_text()
    assert said.count("stage 1:   0%") == 1, "both of them trained"
    other = tmp_path / "other"; other.mkdir()
    first, second = kills.start(small, other), kills.start(small, other)
    while not list(other.glob("runs/*.partial/stage1/checkpoint-*/complete")): time.sleep(.01)
    for pid in first, second:
        if kills.ended(pid) is None and pid == first: os.killpg(pid, 9); os.waitpid(pid, 0)
    assert kills.wait(second) == 0 and weights(other) == weights(whole)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, capfd):
    for step in 10, 20:
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").write_bytes(bytes(100))
        seal(tmp_path / f"checkpoint-{step}")
        (tmp_path / f"checkpoint-{step}" / "complete").touch()
    (tmp_path / "checkpoint-20" / "optimizer.pt").write_bytes(bytes(99) + b"\1")
    assert last_checkpoint(tmp_path).name == "checkpoint-10" and not (tmp_path / "checkpoint-20").exists()
    assert "optimizer.pt is not as it was written; it is deleted, and the newest whole one goes on" in capfd.readouterr().err


@pytest.mark.parametrize("at", [.02, .3, .6, .99])
def test_one_flipped_bit_of_the_weights_is_refused(whole, tmp_path, at):
    shutil.copytree(next(whole.glob("runs/pretrain-*/stage2/model")), tmp_path / "model")
    load_model(tmp_path / "model")
    data = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    data[int(at * len(data))] ^= 1
    (tmp_path / "model" / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=f"^{tmp_path}/model: model.safetensors is not as it was written; copy it again, or make it again$"): load_model(tmp_path / "model")


def test_a_run_of_another_version_is_said_in_one_sentence(tmp_path):
    run = run_once(tmp_path / "runs", "pretrain", dict(settings=dict(lr=1., learning_rate=1.), data=dict(dataset="synthetic", counts=dict(train=1))), lambda part: dict(logs={}))
    with pytest.raises(ValueError, match="its settings have 'learning_rate', which this version does not know; it was made by cmcgns 0.1.0: use that version, or compute the run again"): settings_of(run)
    done = cmcgns("verify", "pretrain", cwd=tmp_path)
    assert done.returncode == 2 and "which this version does not know" in done.stderr and "Traceback" not in done.stderr
    (run.folder / "metrics.json").write_text('{"logs": ')
    with pytest.raises(ValueError, match="metrics.json: it cannot be read .*; delete this folder, and the run is computed again"): find_run(tmp_path / "runs", "pretrain").metrics
    assert Run(run.folder).config["task"] == "pretrain" and json.loads((run.folder / "sums.json").read_text()).keys() == {"config.json", "metrics.json", "environment.json"}


def test_no_number_for_a_loss_names_the_studies(tmp_path):
    pairs = corpus(48)._replace(ids=[f"patient {i}" for i in range(48)])
    with pytest.raises(FloatingPointError, match=r"at step [1-9]\d*; weights have grown to (nan|inf|[0-9.]+e[+][0-9]+), so take a lower lr; the batch was: (patient \d+, ){15}patient \d+; the last checkpoint is kept"):
        pretrain(make_settings("tiny", lr=1e30, max_grad_norm=1e30, warmup_epochs=0), pairs, corpus(16, 1), tmp_path)


def test_the_last_good_checkpoint_is_kept(tmp_path, monkeypatch):
    "The loss is spoilt in the third epoch: the second's checkpoint is there, and once the cause is gone the training ends as if nothing had been."
    from cmcgns.model import CMCGNS
    settings, total, calls = make_settings("tiny", stage1_epochs=4, stage2_epochs=0, batch_size=8, cluster="none"), CMCGNS.total, []
    def spoilt(self, losses):
        calls.append(self.training)
        return total(self, losses) * (float("nan") if sum(calls) > 9 else 1)
    monkeypatch.setattr(CMCGNS, "total", spoilt)
    with pytest.raises(FloatingPointError, match="no weight is beyond [0-9.]+, so look at these studies: pair "): pretrain(settings, corpus(32), corpus(8, 1), tmp_path / "a")
    assert last_checkpoint(tmp_path / "a" / "stage1").name == "checkpoint-8"
    monkeypatch.setattr(CMCGNS, "total", total)
    a, b = (pretrain(settings, corpus(32), corpus(8, 1), tmp_path / k)[0].state_dict() for k in "ab")
    assert all(v.equal(b[k]) for k, v in a.items())


