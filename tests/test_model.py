"The published configurations, built and run at full size; and a head that a GPU need not be waited for."
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmcgns.model import Method, as_published, build_model, next_stage, replace_fields
from cmcgns.objectives import ImageEmbedding, ReportEmbedding
from cmcgns.pretraining import PRESETS, make_settings


def batch(b=4, size=224, tokens=256, sentences=6, vocab=30522):
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab, (b, tokens), generator=g)
    sentence = torch.arange(tokens).mul(sentences).div(tokens, rounding_mode="floor").add(1).repeat(b, 1)
    sentence[:, 0] = sentence[:, -1] = 0
    return dict(pixel_values=torch.rand(b, 1, size, size, generator=g) * 2 - 1, input_ids=ids,
                attention_mask=torch.ones_like(ids), sentence_ids=sentence)


@pytest.mark.slow
@pytest.mark.parametrize("image,published", [("resnet-50", False), ("vit-b16", False), ("resnet-50", True)])
def test_paper_models_step_in_both_stages(image, published):
    method = as_published(Method()) if published else Method()
    first = build_model(image, "bert-base", 30522, 224, method).train()
    for stage, model in (1, first), (2, next_stage(first).train()):
        out = model(**batch())
        out.loss.backward()
        assert all(v.isfinite().all() for v in out.values())
        idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.isfinite().all())]
        assert not idle, (image, stage, idle)
        model.zero_grad(set_to_none=True)


def test_presets_are_plain_data_over_known_fields():
    for name in PRESETS:
        make_settings(name)
    s = make_settings("paper-resnet50")
    assert (s.lr, s.weight_decay, s.batch_size, s.stage1_epochs, s.stage2_epochs, s.seed, s.store_size, s.image_size, s.max_tokens) == \
        (1e-5, 1e-6, 64, 10, 20, 42, 256, 224, 256)


class NeverAsk(TorchDispatchMode):
    "Refuses whatever would make a GPU be waited for: numbers read from tensors, and shapes that depend on them."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2", "bincount", "repeat_interleave"), name
        if name.startswith("index"):
            assert not any(t is not None and t.dtype == torch.bool for t in args[1] if isinstance(args[1], (list, tuple))), f"{name} by a mask"
        return func(*args, **(kwargs or {}))


def embedded(b=6, m=3, p=4, d=32):
    g = torch.Generator().manual_seed(0)
    unit = lambda *shape: torch.nn.functional.normalize(torch.randn(*shape, d, generator=g), dim=-1).requires_grad_()
    exists = torch.arange(m) < torch.tensor([1, 2, 3, 1, 3, 2])[:, None]
    return ImageEmbedding(unit(b), unit(b, p), None), ReportEmbedding(unit(b), unit(b, m), exists, rows=exists.flatten().nonzero()[:, 0])


def test_the_head_never_waits_for_the_device():
    model = build_model("resnet-tiny", "bert-tiny", 50, 64, replace_fields(Method(), width=32, clusters=4, cluster_start=2.))
    image, report = embedded()
    before = model.losses(image, report)
    assert model.contrast.sampler.has_started() and before["margin"] == 0
    for table in None, 40:
        with NeverAsk():
            losses = model.losses(image, report)
            x = report.pick(report.local)
            by_rows = model.contrast.losses(x, x, *model.contrast.sampler.two_nearest(x).unbind(1), table=table)["loss"]
            (model.total(losses) + by_rows).backward()
        assert losses["margin"] > 0
    with NeverAsk(), pytest.raises(AssertionError, match="by a mask"):
        model.losses(image, report._replace(rows=None))


def test_a_loaded_sampler_is_asked_again():
    model = build_model("resnet-tiny", "bert-tiny", 50, 64, replace_fields(Method(), width=32, clusters=4, cluster_start=2.))
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    model.losses(*embedded())
    assert model.contrast.sampler.has_started()
    model.load_state_dict(fresh)
    assert not model.contrast.sampler.has_started()
