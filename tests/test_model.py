"The published configurations, built and run at full size."
import pytest
import torch

from cmcgns.model import Method, as_published, build_model, next_stage
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
