"""Kill a whole job at random moments and see that it ends as if nothing had happened: python tests/kills.py FOLDER [KILLS] [SEED]

The job makes its images, pre-trains in both stages, and evaluates twice. It is killed (SIGKILL) while it makes images, in stage 1, in
stage 2, and in either evaluation, each time at a random moment; then the same command goes on. In the end every weight, table
and pixel has to be that of a job that nobody disturbed, bit for bit. Each job is a fork of this process: one import serves all."""
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from cmcgns.files import SEAL, broken_seal
from cmcgns.pretraining import make_settings
from cmcgns.reporting.experiments import Question, evaluate_run, pretrain_run
from cmcgns.reporting.problems import open_problem

SETTINGS = make_settings("tiny", stage1_epochs=3, stage2_epochs=2, cluster_start=1.1, clusters=4, zoom=.2, jitter=.2)
QUESTIONS = dict(classification=Question(fractions=(.1, 1.), seeds=(0, 1)), segmentation=Question("segmentation", fractions=(.5, 1.), seeds=(0,), epochs=3))
PHASES = dict(images="cache", stage1="runs/pretrain-*.partial/stage1", stage2="runs/pretrain-*.partial/stage2", classification="runs/classification-*.partial", segmentation="runs/segmentation-*.partial")


def job(folder):
    "Everything, from nothing to two tables."
    torch.set_num_threads(1)
    problem = open_problem(None, folder / "cache", SETTINGS.store_size, 120)
    run = pretrain_run(problem, SETTINGS, folder / "runs")
    for question in QUESTIONS.values(): evaluate_run(problem, SETTINGS, run, folder / "runs", question)


def start(work, *args):
    "Do it in a fork; its exit status is 0 if it ends well, 3 if it says why not."
    if pid := os.fork(): return pid
    os.setsid()
    for stream in 1, 2: os.dup2(os.open(Path(args[0]) / f"said-{stream}.txt" if Path(args[0]).is_dir() else os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
    status = 1
    try: work(*args); status = 0
    except (ValueError, OSError) as error: print(f"cmcgns: {error}", file=sys.stderr); status = 3
    except BaseException: import traceback; traceback.print_exc()
    finally: sys.stderr.flush(); os._exit(status)


def ended(pid):
    "The exit status, or nothing while it runs."
    done, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def wait(pid, seconds=600):
    until = time.time() + seconds
    while (status := ended(pid)) is None:
        if time.time() > until: os.killpg(pid, signal.SIGKILL); raise AssertionError("it does not end")
        time.sleep(.01)
    return status


def watch(pid, folder):
    "Let a job run; when each phase began, and the end."
    began = {}
    while (status := ended(pid)) is None:
        for phase, sign in PHASES.items():
            if phase not in began and next(folder.glob(sign), None): began[phase] = time.time()
        time.sleep(.002)
    assert status == 0, (folder / "said-2.txt").read_text()[-2000:]
    times = [*began.values(), time.time()]
    return {phase: end - begin for phase, begin, end in zip(began, times, times[1:])}


def kill_in(phase, folder, longest, chance):
    "Start, wait for the phase, then for a random moment, and kill; whether it was still at work."
    pid = start(job, folder)
    while (status := ended(pid)) is None and not next(folder.glob(PHASES[phase]), None): time.sleep(.002)
    until = time.time() + chance.uniform(0, longest)
    while status is None and time.time() < until: time.sleep(.002); status = ended(pid)
    if status is not None: assert status == 0, (folder / "said-2.txt").read_text()[-2000:]; return False
    os.killpg(pid, signal.SIGKILL); os.waitpid(pid, 0)
    return True


def results(folder):
    "Everything that has to be equal: bytes by file, and what the runs say without their seconds."
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("said-") and p.suffix != ".lock"):
        name = path.relative_to(folder).as_posix()
        if path.name in ("environment.json", SEAL, "log.json"): continue
        if path.name == "index.json": continue # paths of this folder
        if path.parent.parent.name == "pixels": name = f"cache/pixels/{path.name}" # its folder is a hash of paths
        if path.name == "metrics.json": found[name] = json.dumps(strip(json.loads(path.read_text())), sort_keys=True)
        elif path.suffix == ".npz": found |= {f"{name}/{k}": v.tobytes() for k, v in np.load(path).items()}
        elif path.name != "training_args.bin" and "cells" not in path.parts: found[name] = path.read_bytes()
    return found


def strip(x):
    "Without what may differ: seconds, speeds, the machine."
    if isinstance(x, list): return [strip(v) for v in x]
    return {k: strip(v) for k, v in x.items() if k not in ("environment",) and not any(w in k for w in ("second", "runtime", "time"))} if isinstance(x, dict) else x


def main(place, kills=5, seed=0):
    place, chance, n, killed = Path(place), random.Random(seed), 0, []
    (place / "whole").mkdir(parents=True)
    lasts = watch(start(job, place / "whole"), place / "whole")
    whole = results(place / "whole")
    assert list(lasts) == list(PHASES) and any(k.endswith("stage2/model/model.safetensors") for k in whole)
    while len(killed) < kills:
        folder = place / f"killed{n}"; folder.mkdir(); n += 1
        for phase in PHASES:
            if len(killed) < kills and kill_in(phase, folder, lasts[phase], chance): killed.append(phase)
        watch(start(job, folder), folder)
        again = results(folder)
        assert again.keys() == whole.keys(), f"files differ: {sorted(again.keys() ^ whole.keys())}"
        assert not (other := [k for k in whole if whole[k] != again[k]]), f"after kills in {killed}: {other} differ"
        assert not list(folder.rglob("*.partial*")), "something half-made is left"
        for run in (folder / "runs").iterdir(): assert not run.is_dir() or not broken_seal(run), run
    print(f"{len(killed)} kills ({', '.join(f'{killed.count(p)} in {p}' for p in PHASES)}), {len(whole)} files and arrays equal, {n} jobs finished")
    return killed


if __name__ == "__main__": main(sys.argv[1], *map(int, sys.argv[2:]))
