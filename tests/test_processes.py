"Two processes with half of each batch are one process with the whole of it: the same losses, weights and clusters."
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.nn.parallel import DistributedDataParallel

from cmcgns.alignment import global_contrast
from cmcgns.clustering import NegativeSampler, ReportContrast
from cmcgns.evaluation.cluster_audit import Sentences, name_batches
from cmcgns.objectives import ImageEmbedding, ReportEmbedding, gather_pairs
from cmcgns.processes import alone, share_norms
from cmcgns.reconstruction import mask_regions

TRAIN = """
import os, sys
import torch
from pathlib import Path
from transformers import BertConfig, BertModel, TrainerCallback
from test_pretraining import corpus
from cmcgns.pretraining import make_settings, pretrain
from cmcgns.reporting.runs import run_once
from cmcgns.text import train_tokenizer

torch.set_num_threads(1)
root, precise, dies = Path(sys.argv[1]), sys.argv[2] == 'float64', len(sys.argv) > 3
if precise: torch.set_default_dtype(torch.float64)
train, validation = corpus(43), corpus(13, 1) # three pairs sit out; the last validation batch is short

class DiesOnce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if dies and state.global_step == 13: os._exit(1)

def no_dropout(folder):
    "A text encoder without dropout, the one thing that processes draw for themselves."
    if int(os.environ.get('RANK', 0)) or folder.exists(): return str(folder)
    tokenizer = train_tokenizer([s for r in train.reports for s in r], 300)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                         hidden_dropout_prob=0., attention_probs_dropout_prob=0.), add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)

for image, more in ('resnet-tiny', {}), ('vit-tiny', dict(objective='gloria')):
    settings = make_settings('tiny', image_encoder=image, text_encoder=no_dropout(root/'text'), batch_size=8, stage1_epochs=4, stage2_epochs=4, clusters=4,
                             cluster_start=1.1, cluster_rate=.05, cluster_update='sum', margin_weight=1., keep='last', **more)
    run_once(root/image, 'pretrain', {}, lambda folder: pretrain(settings, train, validation, folder, [DiesOnce()])[1], together=True)
"""


def start(n, root, dtype, *more):
    "Train in `n` processes."
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}"] if n > 1 else []
    root.mkdir(exist_ok=True)
    (root / "train.py").write_text(TRAIN)
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, *launch, str(root / "train.py"), str(root), dtype, *more], cwd=here, capture_output=True, text=True, timeout=300,
                          env=os.environ | dict(PYTHONPATH=f"{here}:{os.environ.get('PYTHONPATH', here.parent)}", CUDA_VISIBLE_DEVICES=""))
    assert (done.returncode == 0) == (not more), done.stderr[-3000:]


def what_it_came_to(root, image, stage):
    "Loss by step with its terms, validation losses, and all weights and buffers."
    folder = next((root / image).glob("pretrain-*[0-9a-f]")) / stage / "model"
    log = json.loads((folder / "log.json").read_text())
    rows = [{k: v for k, v in row.items() if k.endswith("loss")} for row in log if "loss" in row or "eval_loss" in row]
    return rows, load_file(folder / "model.safetensors")


def differences(one, two):
    "Largest differences between two trainings, of losses, weights and centroids."
    (rows, a), (other_rows, b) = one, two
    assert [r.keys() for r in rows] == [r.keys() for r in other_rows] and a.keys() == b.keys()
    assert sum("loss" in r for r in rows) == 20 and sum("eval_loss" in r for r in rows) == 4
    state = {k: (a[k].double() - b[k].double()).abs().max().item() for k in a}
    return dict(losses=max(abs(r[k] - s[k]) for r, s in zip(rows, other_rows) for k in r),
                weights=max(v for k, v in state.items() if "sampler" not in k),
                centroids=max((v for k, v in state.items() if "sampler" in k), default=0.))


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    start(1, tmp_path / "one", "float64")
    start(2, tmp_path / "two", "float64", "dies") # in the middle of stage 1
    start(2, tmp_path / "two", "float64")
    for image in "resnet-tiny", "vit-tiny":
        for stage in "stage1", "stage2":
            one, two = (what_it_came_to(tmp_path / n, image, stage) for n in ("one", "two"))
            found = differences(one, two)
            print(image, stage, {k: f"{v:.1e}" for k, v in found.items()})
            assert max(found.values()) < 1e-8, (image, stage, found)
            first, last = ([r["loss"] for r in one[0] if "loss" in r][i] for i in (0, -1))
            assert abs(first - last) > 1e-2, "nothing was learned, so nothing was compared"
    assert what_it_came_to(tmp_path / "two", "resnet-tiny", "stage2")[1]["contrast.sampler.counts"].sum() > 500


TOGETHER = """
import os, sys, time
from pathlib import Path
from cmcgns.reporting.runs import run_once

def compute(folder):
    (Path(sys.argv[1])/f'computes-{os.environ["RANK"]}').touch()
    while len([*Path(sys.argv[1]).glob('computes-*')]) < 2: time.sleep(.01) # as processes that train together do
    return {}

(Path(sys.argv[1])/f'here-{os.environ["RANK"]}').touch()
print(run_once(Path(sys.argv[1])/'runs', 'pretrain', {}, compute, together=True).folder.name)
"""


@pytest.mark.parametrize("found", [True, False])
def test_processes_wait_for_another_jobs_run_together(tmp_path, found):
    "While another job has the run, none computes; then all find it, or all compute."
    from cmcgns.reporting.runs import CALLS, run_name
    from filelock import FileLock
    folder = tmp_path / "runs" / run_name("pretrain", {})
    part = folder.with_name(folder.name + ".partial")
    part.mkdir(parents=True)
    (part / CALLS).write_text(json.dumps(dict(calls=1, before=0, began=0, job="another")))
    env = os.environ | dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="29500", PYTHONPATH=os.environ.get("PYTHONPATH", str(Path(__file__).parents[1])))
    with FileLock(folder.with_name(folder.name + ".lock")):
        started = [subprocess.Popen([sys.executable, "-c", TOGETHER, str(tmp_path)], env=env | dict(RANK=str(rank)), stdout=subprocess.PIPE, text=True) for rank in range(2)]
        while len([*tmp_path.glob("here-*")]) < 2 and all(p.poll() is None for p in started): time.sleep(.1)
        time.sleep(1) # both have come to the run
        assert all(p.poll() is None for p in started) and not list(tmp_path.glob("computes-*"))
        if found: os.replace(part, folder)
    assert [p.communicate(timeout=60)[0].strip() for p in started] == [folder.name] * 2 and [p.returncode for p in started] == [0, 0]
    assert len(list(tmp_path.glob("computes-*"))) == (0 if found else 2)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def mean_of_processes(t):
    t = t.detach().clone()
    dist.all_reduce(t)
    return t / dist.get_world_size()


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def check_global_contrast(mine):
    def run(x, y):
        x, y, scale = (t.clone().requires_grad_() for t in (x, y, torch.tensor(1., dtype=torch.double)))
        loss = global_contrast(x, y, scale)
        loss.backward()
        return loss, scale.grad, x.grad, y.grad

    x, y = draw(2, 6, 5)
    with alone():
        loss, scale, *gradients = run(x, y)
    own_loss, own_scale, *own = run(x[mine], y[mine])
    close(mean_of_processes(own_loss), loss.detach())
    close(mean_of_processes(own_scale), scale)
    for g, h in zip(own, gradients):  # distributed training averages over processes
        close(g / 2, h[mine])


RAGGED = (5, 3), (1, 9), (0, 4), (20, 30), (7, 2), (0, 6), (11, 11)  # sentences of each process, step by step


def check_sampler(mine, start_on, update):
    make = lambda: NegativeSampler(6, clusters=16, momentum=.05, update=update).double()
    shared, one = make(), make()
    for step, sizes in enumerate(RAGGED):
        batches = [draw(2, n, 6, seed=7 * step + i) + (1.5 if step < 2 and start_on == "clustered" else 0) for i, n in enumerate(sizes)]
        points, others = batches[dist.get_rank()]
        shared.observe(points, others if start_on == "pairs" else None)
        with alone():
            points, others = torch.cat(batches, 1)
            one.observe(points, others if start_on == "pairs" else None)
        for k, v in one.state_dict().items():
            close(shared.state_dict()[k], v)
    assert one.has_started() and one.counts.sum() > 30


class Head(torch.nn.Module):
    def __init__(self, **settings):
        super().__init__()
        torch.manual_seed(0)
        self.told = torch.nn.Linear(6, 6)
        self.local = ReportContrast(NegativeSampler(6, clusters=4, momentum=.05), margin_weight=1., **settings)
        self.double()

    def forward(self, x):
        return self.local(x, self.told(x))


def check_report_contrast(mine, **settings):
    one, head = Head(**settings), Head(**settings)
    ddp, steps = DistributedDataParallel(head), []
    for model in one, ddp:
        optimiser, losses = torch.optim.SGD(model.parameters(), .1), []
        for step, sizes in enumerate(((6, 7), (12, 1), (3, 9), (8, 8))):
            batches = [draw(n, 6, seed=7 * step + i) for i, n in enumerate(sizes)]
            optimiser.zero_grad()
            with alone(model is one):
                out = model(torch.cat(batches) if model is one else batches[dist.get_rank()])
                out["loss"].backward()
            losses.append(torch.stack([out["loss"], out["contrast"], out["margin"]]))
            optimiser.step()
        steps.append(torch.stack(losses))
    close(mean_of_processes(steps[1]), steps[0].detach())
    assert (steps[0][1:, 2] > 0).all(), "the margin was not at work"
    for k, v in one.state_dict().items():
        close(head.state_dict()[k], v)


def check_norms(mine, norm, *shape):
    def run(layer, x, wanted):
        layer.weight.data.uniform_(generator=torch.Generator().manual_seed(0))
        x = x.clone().requires_grad_()
        y = layer(x)
        (y * wanted).mean().backward()
        return y.detach(), x.grad, layer.weight.grad, layer.bias.grad, [v.detach() for k, v in layer.state_dict().items() if "running" in k or "tracked" in k]

    x, wanted = draw(2, *shape)
    y, dx, dw, db, state = run(norm(shape[1]).double(), x, wanted)
    own_y, own_dx, own_dw, own_db, own_state = run(share_norms(norm(shape[1]).double()), x[mine], wanted[mine])
    for a, b in (own_y, y[mine]), (own_dx / 2, dx[mine]), (mean_of_processes(own_dw), dw), (mean_of_processes(own_db), db), *zip(own_state, state):
        close(a, b)


def check_pairs(mine):
    exists = torch.arange(5) < torch.tensor([2, 3, 1, 5, 4, 2])[:, None]
    image = ImageEmbedding(draw(6, 3), draw(6, 4, 3), draw(6, 7), None)
    report = ReportEmbedding(draw(6, 3), draw(6, 5, 3) * exists[..., None], exists, draw(6, 8, 3), torch.ones(6, 8, dtype=torch.long))
    longest = int(exists[mine].sum(1).max())
    own = report._replace(**{k: getattr(report, k)[mine][:, :longest] for k in ("local", "exists")}, whole=report.whole[mine],
                          tokens=report.tokens[mine], word_ids=report.word_ids[mine], rows=torch.tensor([0]))
    for whole, parts in zip((image, report), gather_pairs(ImageEmbedding(*(None if t is None else t[mine] for t in image)), own)):
        assert all((a is None and b is None) or torch.equal(a, b) for a, b in zip(whole, parts))


def check_masks(mine):
    seeded = lambda: torch.Generator().manual_seed(5)
    x = torch.ones(6, 16, 2)
    with alone():
        _, whole = mask_regions(x, generator=seeded())
    assert torch.equal(mask_regions(x[mine], generator=seeded())[1], whole[mine])


def check_audit():
    "Each process has all the sentences, and must not count the other's copies."
    x = F.normalize(draw(200, 6), dim=1)
    sentences, rows = Sentences(x, x.flip(0), np.arange(200), np.zeros(200, int)), list(np.arange(200).reshape(10, 20))
    contrast = ReportContrast(NegativeSampler(6, clusters=8, momentum=.1)).double()
    mine = name_batches(contrast, sentences, rows, learn=True, skip=2)
    with alone():
        for a, b in zip(mine, name_batches(contrast, sentences, rows, learn=True, skip=2), strict=True):
            assert np.array_equal(a.own, b.own) and np.array_equal(a.similar, b.similar)


def two_processes(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mine = slice(3 * rank, 3 * rank + 3)
    check_global_contrast(mine)
    check_sampler(mine, "clustered", "sum")
    check_sampler(mine, "pairs", "mean")
    check_report_contrast(mine)
    check_report_contrast(mine, weighting="multiplicative", over="all_pairs")
    check_report_contrast(mine, weighting="spared")
    check_norms(mine, torch.nn.BatchNorm2d, 6, 3, 2, 2)
    check_norms(mine, torch.nn.BatchNorm1d, 6, 4)
    check_pairs(mine)
    check_masks(mine)
    check_audit()
    dist.barrier()  # a process that leaves early takes the other's connection with it
    dist.destroy_process_group()


def test_what_two_processes_fetch_from_each_other(tmp_path):
    mp.spawn(two_processes, (str(tmp_path),), nprocs=2)
