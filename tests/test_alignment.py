"The alignment losses against slow independent references, under padding and precision."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from cmcgns.alignment import (CrossAttention, Predictor, cosines, global_contrast, retrieval_accuracy,
                              sentence_contrast, simsiam_loss)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
both_precisions = pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])


def cos(a, b):
    return float(np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b)))


def slow_cross_entropy(logits):
    "Mean over rows of minus the log of the share of the diagonal; lists of lists of floats."
    total = 0.
    for n, row in enumerate(logits):
        top = max(row)
        total += top + math.log(sum(math.exp(v - top) for v in row)) - row[n]
    return total / len(logits)


def slow_contrast(x, y, temperature):
    return slow_cross_entropy([[cos(a, b) / temperature for b in y] for a in x])


def slow_attention(attend, sentences, patches, lengths):
    "Every pair of a sentence and a patch by itself, in float64 numpy."
    d = patches.shape[-1]
    weight = {k: v.detach().double().numpy() for k, v in attend.state_dict().items()}
    project = lambda side, v: weight[f'{side}_qkv.weight'] @ v + weight[f'{side}_qkv.bias']
    by_image, by_report = np.zeros_like(sentences), np.zeros_like(patches)
    for i, length in enumerate(lengths):
        for m in range(length):
            s = project('sentence', sentences[i, m])
            for p in range(patches.shape[1]):
                r = project('patch', patches[i, p])
                by_image[i, m] += r[2*d:] / (1 + math.exp(-np.dot(s[:d], r[d:2*d]) / math.sqrt(d)))
                by_report[i, p] += s[2*d:] / (1 + math.exp(-np.dot(r[:d], s[d:2*d]) / math.sqrt(d)))
    return by_image, by_report


def slow_simsiam(local, told, predictor):
    "Predictor without normalisation; every patch by itself."
    w = {k: v.detach().double().numpy() for k, v in predictor.state_dict().items()}
    h = lambda v: w['3.weight'] @ np.maximum(w['0.weight'] @ v + w['0.bias'], 0) + w['3.bias']
    terms = [cos(h(f), t) + cos(h(t), f) for f, t in zip(local.reshape(-1, local.shape[-1]), told.reshape(-1, told.shape[-1]))]
    return -sum(terms) / len(terms) / 2


def differences(seed, dtype):
    "Largest difference of each loss to its reference, at sizes drawn by the seed."
    g = np.random.default_rng(seed)
    b, p, d = (int(g.integers(1, top)) for top in (7, 10, 24))
    d += d % 2
    d = max(d, 2)
    lengths = [int(n) for n in g.integers(1, 7, b)]
    sentences, patches, x, y = g.normal(size=(b, max(lengths), d)), g.normal(size=(b, p, d)), *g.normal(size=(2, b, d))
    temperature = float(g.choice([.1, 1.]))
    to, back = lambda a: torch.tensor(a, dtype=dtype), lambda t: t.detach().double().numpy()
    sentences, patches, x, y = (back(to(a)) for a in (sentences, patches, x, y)) # both sides see the same rounded numbers
    out = {'sentence_contrast': abs(sentence_contrast(to(x), to(y), temperature).item() - slow_contrast(x, y, temperature))}
    want = (slow_contrast(x, y, temperature) + slow_contrast(y, x, temperature)) / 2
    out['global_contrast'] = abs(global_contrast(to(x), to(y), to(-math.log(temperature))).item() - want)
    torch.manual_seed(seed)
    attend, predictor = CrossAttention(d).to(dtype), Predictor(d, norm=False).to(dtype)
    exists = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    got = attend(to(sentences), to(patches), exists)
    want = slow_attention(attend, sentences, patches, lengths)
    out['cross_attention'] = max(np.abs(back(a) - b).max() for a, b in zip(got, want))
    told = back(to(g.normal(size=(b, p, d))))
    out['simsiam'] = abs(simsiam_loss(to(patches), to(told), predictor).item() - slow_simsiam(patches, told, predictor))
    return out


@both_precisions
def test_losses_equal_slow_references(dtype):
    for seed in range(25):
        for name, value in differences(seed, dtype).items():
            assert value < TOLERANCE[dtype], (name, seed, value)


@pytest.mark.parametrize('n,temperature', [(1, .1), (2, 1.), (33, .1)])
def test_contrasts_are_cross_entropy(n, temperature):
    torch.manual_seed(n)
    x, y = torch.randn(2, n, 7, dtype=torch.double)
    logits = F.normalize(x) @ F.normalize(y).T / temperature
    one = F.cross_entropy(logits, torch.arange(n))
    torch.testing.assert_close(sentence_contrast(x, y, temperature), one)
    two = F.cross_entropy(logits.T, torch.arange(n))
    torch.testing.assert_close(global_contrast(x, y, torch.tensor(-math.log(temperature))), (one + two) / 2)


def test_gradients_are_those_of_finite_differences():
    torch.manual_seed(0)
    x, y = torch.randn(2, 4, 3, dtype=torch.double, requires_grad=True)
    scale = torch.tensor(1., dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(global_contrast, (x, y, scale))
    assert torch.autograd.gradcheck(sentence_contrast, (x, y))
    attend, exists = CrossAttention(4).double(), torch.tensor([[True, True], [True, False]])
    s, p = torch.randn(2, 2, 4, dtype=torch.double, requires_grad=True), torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, p: attend(s, p, exists), (s, p))


def test_attention_does_not_depend_on_the_rest_of_the_batch():
    torch.manual_seed(0)
    attend = CrossAttention(8).double()
    sentences, patches = torch.randn(5, 6, 8, dtype=torch.double), torch.randn(5, 7, 8, dtype=torch.double)
    lengths = torch.tensor([6, 1, 3, 2, 5])
    exists = torch.arange(6) < lengths[:, None]
    whole = attend(sentences, patches, exists)
    for i, n in enumerate(lengths):
        alone = attend(sentences[i:i+1, :n], patches[i:i+1], exists[i:i+1, :n])
        torch.testing.assert_close(whole[0][i, :n], alone[0][0])
        torch.testing.assert_close(whole[1][i], alone[1][0])


@pytest.mark.parametrize('rubbish', [math.nan, math.inf, 1e30])
def test_padding_neither_leaks_nor_gets_gradients(rubbish):
    torch.manual_seed(0)
    attend, exists = CrossAttention(4), torch.tensor([[True, True], [True, False]])
    clean, patches = torch.randn(2, 2, 4), torch.randn(2, 3, 4)
    dirty = clean.clone()
    dirty[1, 1] = rubbish
    dirty.requires_grad_()
    for a, b in zip(attend(clean, patches, exists) + attend.weights(clean, patches, exists),
                    attend(dirty, patches, exists) + attend.weights(dirty, patches, exists)):
        assert torch.equal(a, b)
    sum(t.square().sum() for t in attend(dirty, patches, exists)).backward()
    assert (dirty.grad[1, 1] == 0).all() and all(p.grad.isfinite().all() and (p.grad != 0).any() for p in attend.parameters())


def test_stop_gradient_on_both_sides():
    torch.manual_seed(0)
    predictor, f, told = Predictor(6), torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    predictor.eval()
    for x, y in ((f, told), (told, f)):
        (g,) = torch.autograd.grad(simsiam_loss(f, told, predictor), x)
        (want,) = torch.autograd.grad(-F.cosine_similarity(predictor(x), y, dim=-1).mean() / 2, x)
        torch.testing.assert_close(g, want)


def test_retrieval_accuracy_counts_each_way():
    eye = torch.eye(4)
    assert retrieval_accuracy(eye, eye) == {'image_to_report': 1., 'report_to_image': 1.}
    assert retrieval_accuracy(eye, eye.roll(1, 0)) == {'image_to_report': 0., 'report_to_image': 0.}


def test_cosines_keep_precision_under_autocast():
    torch.manual_seed(0)
    x, y = torch.randn(20, 30), torch.randn(20, 30)
    with torch.autocast('cpu', torch.bfloat16):
        assert torch.equal(cosines(x, y), cosines(x, y).float())
        inside, small = sentence_contrast(x, y), cosines(x.bfloat16(), y.bfloat16())
    assert torch.equal(inside, sentence_contrast(x, y)) and small.dtype == torch.float32


class Watch(TorchDispatchMode):
    "Counts operations and remembers the largest tensor that one of them made."
    ops, largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.ops += 1
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, torch.Tensor): self.largest = max(self.largest, t.numel())
        return out


def local_step(b, m, p, d):
    torch.manual_seed(0)
    attend, predictor = CrossAttention(d), Predictor(d)
    sentences, patches, exists = torch.randn(b, m, d), torch.randn(b, p, d), torch.ones(b, m, dtype=torch.bool)
    with Watch() as seen:
        by_image, by_report = attend(sentences, patches, exists)
        (sentence_contrast(sentences[exists], by_image[exists]) + simsiam_loss(patches, by_report, predictor)).backward()
    return seen


def test_no_loop_over_the_batch_and_no_table_of_pairs():
    small, large = local_step(2, 3, 4, 16), local_step(40, 7, 9, 16)
    assert small.ops == large.ops
    n = 40 * 7
    assert large.largest <= max(n * n, 3 * 40 * 9 * 16)
