"""What a number may depend on, and how much: float32 and bfloat16 against float64 in losses and gradients of the whole model, and
what order, padding and company do to a batch. The losses alone are held against slow references in test_alignment.py, test_clustering.py
and test_reconstruction.py."""
import copy

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cmcgns.image import normalise
from cmcgns.model import Method, build_model, next_stage
from cmcgns.objectives import OBJECTIVES
from cmcgns.text import encode_reports, train_tokenizer

WORDS = "heart lung opacity effusion normal left right small large clear".split()
FLOAT32 = dict(loss=2e-5, gradient=5e-3) # relative to the loss, and to a parameter's largest gradient
BFLOAT16 = dict(loss=.05, gradient=.35)


def reports_of(n, rng): return [[" ".join(rng.choice(WORDS, 4)) for _ in range(rng.integers(1, 5))] for _ in range(n)]


def batch_of(n, seed, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    tokenizer = train_tokenizer([" ".join(WORDS)], 100)
    images = torch.from_numpy(rng.integers(0, 256, (n, 64, 64), np.uint8))
    return dict(pixel_values=normalise(images).to(dtype), **encode_reports(tokenizer, reports_of(n, rng)))


def model_of(objective="cm-cgns", stage=1, started=True, **method):
    "A small model without chance in its forward pass, its clusters at work."
    model = build_model("resnet-tiny", "bert-tiny", 100, 64, Method(width=32, clusters=4, cluster_start=1.1, objective=objective, **method), seed=0)
    if stage == 2:
        with torch.random.fork_rng(): torch.manual_seed(0); model = next_stage(model)
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = 0.
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(m, name, None), float): setattr(m, name, 0.)
    if started and objective == "cm-cgns":
        with torch.no_grad(): [model.train()(**batch_of(8, seed)) for seed in (90, 91)]
        assert model.contrast.sampler.started
    return model.train()


def step(model, batch, autocast=False):
    "Loss terms and gradients of one step; the model stays as it was."
    model = copy.deepcopy(model)
    with torch.random.fork_rng(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        torch.manual_seed(0)
        out = model(**batch)
    out.loss.backward()
    return {k: v.item() for k, v in out.items() if k.endswith("loss")}, {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}


def largest(a, b):
    "The largest difference of the terms, relative to the loss, and of the gradients, relative to the largest gradient of all."
    scale = max(g.abs().max() for g in b[1].values()).item()
    return (max(abs(v - b[0][k]) / max(1, abs(b[0]["loss"])) for k, v in a[0].items()), max((g - b[1][n]).abs().max().item() / scale for n, g in a[1].items()))


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_of_losses_and_gradients(stage, precision, capsys):
    model, worst = model_of(stage=stage), (0., 0.)
    exact, bound = copy.deepcopy(model).double(), FLOAT32 if precision == "float32" else BFLOAT16
    for seed in range(3):
        a, b = step(model, batch_of(8, seed), precision == "bfloat16"), step(exact, batch_of(8, seed, torch.float64))
        assert a[1].keys() == b[1].keys() and all(g.isfinite().all() for g in a[1].values())
        worst = tuple(map(max, worst, largest(a, b)))
    with capsys.disabled(): print(f"\nstage {stage}, {precision} against float64, 3 batches of 8: largest difference of a loss {worst[0]:.1e} of it, of a gradient {worst[1]:.1e} of the largest")
    assert worst[0] < bound["loss"] and worst[1] < bound["gradient"]


@pytest.mark.parametrize("objective", sorted(set(OBJECTIVES) - {"cm-cgns"}))
def test_precision_of_other_objectives(objective, capsys):
    model = model_of(objective)
    worst = largest(step(model, batch_of(8, 0)), step(copy.deepcopy(model).double(), batch_of(8, 0, torch.float64)))
    with capsys.disabled(): print(f"\n{objective}, float32 against float64: largest difference of a loss {worst[0]:.1e} of it, of a gradient {worst[1]:.1e} of the largest")
    assert worst[0] < FLOAT32["loss"] and worst[1] < FLOAT32["gradient"]


@pytest.fixture(scope="module")
def exact(): return model_of(stage=2).double()


few = settings(max_examples=8, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@few
@given(order=st.permutations(range(6)), seed=st.integers(0, 99))
def test_the_order_of_a_batch_is_nothing(exact, order, seed):
    "Loss and gradients, with batch normalisation and clusters at work; the reconstruction's mask is drawn by place, so stage 2 is left out."
    exact = first_stage(exact)
    batch = batch_of(6, seed, torch.float64)
    a, b = step(exact, batch), step(exact, {k: v[list(order)] for k, v in batch.items()})
    assert largest(a, b)[0] < 1e-10 and largest(a, b)[1] < 1e-8


def first_stage(model):
    model = copy.copy(model)
    model._modules = dict(model._modules, reconstruction=None)
    return model


@few
@given(extra=st.integers(1, 40), seed=st.integers(0, 99))
def test_the_length_of_the_padding_is_nothing(exact, extra, seed):
    batch = batch_of(5, seed, torch.float64)
    longer = {k: torch.nn.functional.pad(v, (0, extra)) if v.ndim == 2 else v for k, v in batch.items()}
    a, b = step(exact, batch), step(exact, longer)
    assert largest(a, b)[0] < 1e-10 and largest(a, b)[1] < 1e-8


@few
@given(n=st.integers(1, 7), seed=st.integers(0, 99))
def test_company_is_nothing_to_an_embedding(exact, n, seed):
    "In evaluation an image and a report are embedded alone as among others, in stage 2 as in stage 1."
    model, batch = copy.deepcopy(exact).eval(), batch_of(8, seed, torch.float64)
    text = ("input_ids", "attention_mask", "sentence_ids")
    with torch.no_grad():
        images, reports = model.encode_images(batch["pixel_values"]), model.encode_reports(*(batch[k] for k in text))
        alone, told = model.encode_images(batch["pixel_values"][:n]), model.encode_reports(*(batch[k][:n] for k in text))
    assert torch.allclose(alone.whole, images.whole[:n], atol=1e-10) and torch.allclose(alone.local, images.local[:n], atol=1e-10)
    m = told.local.shape[1]
    assert torch.allclose(told.whole, reports.whole[:n], atol=1e-10) and torch.allclose(told.local, reports.local[:n, :m], atol=1e-10)


@few
@given(seed=st.integers(0, 99), more=st.integers(1, 4))
def test_company_is_something_to_the_contrast_and_nothing_to_the_image_loss(exact, seed, more):
    "Negatives come from the batch, so the contrast has to change; patches of a pair know only this pair, so in evaluation the image loss is a mean over pairs."
    model, batch = copy.deepcopy(first_stage(exact)).eval(), batch_of(4 + more, seed, torch.float64)
    with torch.no_grad():
        whole, first, rest = (model(**{k: v[rows] for k, v in batch.items()}) for rows in (slice(None), slice(4), slice(4, None)))
    assert abs(whole.image_loss - (4 * first.image_loss + more * rest.image_loss) / (4 + more)) < 1e-10
    assert abs(whole.global_loss - first.global_loss) > 1e-6
