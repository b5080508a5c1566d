"The seam between encoders and what is learned: CM-CGNS is what it was before there was one, and anybody's own objective fits in."
import json
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_pretraining import corpus

from cmcgns.alignment import CrossAttention, Predictor, global_contrast, simsiam_loss
from cmcgns.encoders import ImageEncoder, SentencePool, TextEncoder, quiet_transformers
from cmcgns.model import CMCGNS, CMCGNSConfig, Method, as_published, build_model, load_model, make_config, make_contrast, make_reconstruction, next_stage, replace_fields
from cmcgns.objectives import OBJECTIVES, find_objective, objective_code
from cmcgns.pretraining import PRESETS, Settings, make_settings, pretrain, settings_record
from cmcgns.reconstruction import reconstruction_loss
from cmcgns.reporting.runs import run_name
from cmcgns.text import pool_tokens
from transformers import AutoConfig

SMALL = dict(width=32, clusters=4, cluster_start=1.1)


def batch(seed=0, size=64, vocab=50):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, vocab, (6, 12), generator=g)
    sentence = torch.tensor([[0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 0], [0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0, 0]] * 2)
    return dict(pixel_values=torch.rand(6, 1, size, size, generator=g) * 2 - 1, input_ids=ids,
                attention_mask=(torch.arange(12) < torch.tensor([12, 6, 9] * 2)[:, None]).long(), sentence_ids=sentence)


class Before(torch.nn.Module):
    "The model as it stood before objectives: its parts in the order in which they were drawn, and its forward pass in one piece."
    def __init__(self, c):
        super().__init__()
        self.config, d = c, c.width
        self.image_encoder = ImageEncoder(AutoConfig.for_model(**c.image), c.image_size, pool=c.image_pool, scramble_local=c.scramble_local)
        self.text_encoder = TextEncoder(AutoConfig.for_model(**c.text))
        self.image_whole, self.image_local = (torch.nn.Linear(self.image_encoder.width, d) for _ in range(2))
        self.token = torch.nn.Linear(self.text_encoder.width, d)
        self.sentence_pool = SentencePool(d)
        self.report_whole, self.report_local = (torch.nn.Linear(d, d) for _ in range(2))
        self.log_scale = torch.nn.Parameter(torch.tensor(np.log(1 / c.global_temperature), dtype=torch.float32))
        self.attention, self.predictor = CrossAttention(d), Predictor(d, norm=c.predictor_norm)
        self.contrast = make_contrast(c.method)
        self.reconstruction = make_reconstruction(c, self.image_encoder.grid) if c.stage == 2 else None

    def forward(self, pixel_values, input_ids, attention_mask, sentence_ids):
        c, x = self.config, self.image_encoder(pixel_values)
        image, patches = F.normalize(self.image_whole(x.pooled), dim=-1), F.normalize(self.image_local(x.local), dim=-1)
        f, exists = pool_tokens(F.normalize(self.token(self.text_encoder(input_ids, attention_mask)), dim=-1), sentence_ids)
        sentences = F.normalize(self.report_local(f), dim=-1) * exists[..., None]
        report = F.normalize(self.report_whole(self.sentence_pool(f, exists)), dim=-1)
        by_image, by_report = self.attention(sentences, patches, exists)
        local = self.contrast(sentences[exists], by_image[exists])
        out = dict(global_loss=global_contrast(image, report, self.log_scale), image_loss=simsiam_loss(patches, by_report, self.predictor),
                   report_loss=local["contrast"], margin_loss=local["margin"])
        loss = c.global_weight * out["global_loss"] + c.image_weight * out["image_loss"] + c.report_weight * (out["report_loss"] + c.margin_weight * out["margin_loss"])
        if self.reconstruction is not None:
            out["rebuilt"], mask = self.reconstruction(patches, by_report)
            out["rebuild_loss"] = reconstruction_loss(out["rebuilt"], pixel_values[:, :1], mask, self.image_encoder.grid, over="all" if mask is None else c.rebuild_over)
            loss = loss + c.rebuild_weight * out["rebuild_loss"]
        return out | dict(loss=loss)


def drawn(kind, config, seed):
    torch.manual_seed(seed)
    return kind(config).train()


@pytest.mark.parametrize("image", ["resnet-tiny", "vit-tiny"])
@pytest.mark.parametrize("method", [Method(), as_published(Method()), Method(cluster="single-modal", report_weight=2., image_weight=.3, margin_weight=.5, rebuild_over="masked")],
                         ids=["default", "published", "weights"])
def test_cm_cgns_is_bit_for_bit_what_it_was(image, method):
    "Same parameters from the same seed, same losses and gradients while the clusters start, same weights after training, in both stages."
    for stage in 1, 2:
        config = make_config(image, "bert-tiny", 50, 64, replace_fields(method, **SMALL), stage)
        before, now = (drawn(kind, config, 3) for kind in (Before, CMCGNS))
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (before, now)]
        for step in range(4):
            outs = []
            for m, optimizer in zip((before, now), optimizers):
                torch.manual_seed(step)
                outs.append(m(**batch(step)))
                optimizer.zero_grad()
                outs[-1]["loss"].backward()
                optimizer.step()
            assert outs[0].keys() == outs[1].keys() and all(torch.equal(outs[0][k], outs[1][k]) for k in outs[0])
        a, b = before.state_dict(), now.state_dict()
        assert list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)
        assert bool(now.contrast.sampler.started)


def test_its_weights_have_the_names_they_had():
    names = {k.split(".")[0] for k in build_model("resnet-tiny", "bert-tiny", 50, 64, Method(**SMALL)).state_dict()}
    assert names == {"image_encoder", "text_encoder", "image_whole", "image_local", "token", "sentence_pool", "report_whole", "report_local",
                     "log_scale", "attention", "predictor", "contrast"}


def test_a_model_saved_before_objectives_loads(tmp_path):
    model = build_model("resnet-tiny", "bert-tiny", 50, 64, Method(**SMALL))
    with quiet_transformers():
        model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("objective") == "cm-cgns" and config.pop("objective_options") == ""
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load_model(tmp_path)
    assert again.objective is again and all(torch.equal(again.state_dict()[k], v) for k, v in model.state_dict().items())


def test_runs_keep_their_names():
    "The names that runs of the presets had before objectives; a field added later goes into `LATER`."
    names = {p: run_name("pretrain", dict(settings=settings_record(make_settings(p)))) for p in PRESETS}
    assert names == {"tiny": "pretrain-b019a454acf1", "laptop": "pretrain-442af52adf15", "paper-resnet50": "pretrain-bf104f42ba70", "paper-vit": "pretrain-90e5639ee3d9"}
    other = make_settings("tiny", objective="mgca", objective_options="prototypes=50")
    assert Settings(**settings_record(other)) == other and run_name("pretrain", settings_record(other)) != run_name("pretrain", settings_record(make_settings("tiny")))


def test_every_name_of_the_library_is_an_objective():
    for name in OBJECTIVES:
        assert objective_code(name) == {} and find_objective(name).__name__


OWN = """
import torch
from cmcgns.objectives import Objective

class Toy(Objective):
    reads = 'image.whole', 'report.whole'

    def __init__(self, config, grid, push=1.):
        super().__init__(config, grid)
        self.shift = torch.nn.Parameter(torch.zeros(config.width))
        self.register_buffer('steps', torch.tensor(0))
        self.weights = dict(push=push)

    def losses(self, image, report):
        if self.training: self.steps += 1
        similar = (image.whole + self.shift) @ report.whole.T
        return dict(pull=-similar.diagonal().mean(), push=similar.logsumexp(1).mean())
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "my_method.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    yield "my_method.Toy"
    sys.modules.pop("my_method", None)


def test_an_objective_in_a_module_is_trained_saved_found_and_missed(own, tmp_path, monkeypatch):
    settings = make_settings("tiny", stage1_epochs=1, stage2_epochs=1, objective=own, objective_options="push=0.5")
    model, logs = pretrain(settings, corpus(32), corpus(8, 1), tmp_path / "run")
    row = next(r for r in logs["stage2"] if "eval_loss" in r)
    assert row["eval_loss"] == pytest.approx(row["eval_pull_loss"] + .5 * row["eval_push_loss"], abs=1e-5)
    assert model.objective.steps == 4 and model.objective.shift.any() and model.config.stage == 2 # 2 steps an epoch, counted through both stages
    first = objective_code(own)
    module = tmp_path / "modules" / "my_method.py"
    module.write_text(OWN.replace("-similar.diagonal", "-2 * similar.diagonal"))
    sys.modules.pop("my_method")
    assert objective_code(own) != first
    sys.modules.pop("my_method")
    module.unlink()
    with pytest.raises(ValueError, match="the objective 'my_method.Toy' cannot be found .No module named 'my_method'.: define it in this notebook, or put its module's folder on PYTHONPATH"):
        load_model(tmp_path / "run" / "stage2" / "model")


def test_what_is_wrong_with_an_objective_is_said_before_training(own, tmp_path):
    for change, said in [(dict(objective="my_method.Tyo"), "'my_method.Tyo' cannot be found"), (dict(objective=own, objective_options="pull=2"), "unknown option 'pull' of Toy: known are push"),
                         (dict(objective=own, objective_options="push=hard"), "push=hard: expected float"), (dict(objective="torch.nn.Linear"), "is no objective")]:
        with pytest.raises(ValueError, match=said):
            pretrain(make_settings("tiny", **change), corpus(32), corpus(8, 1), tmp_path)
    assert not list(tmp_path.glob("stage*"))
    with pytest.raises(ValueError, match="'my_method.Tyo' cannot be found"):
        CMCGNS(CMCGNSConfig.from_dict(make_config("resnet-tiny", "bert-tiny", 50, 64, Method(**SMALL)).to_dict() | dict(objective="my_method.Tyo")))


def test_stage_2_refuses_a_stage_1_of_another_objective():
    model = build_model("resnet-tiny", "bert-tiny", 50, 64, replace_fields(Method(**SMALL), objective="gloria"))
    model.config.objective = "mgca"
    with pytest.raises(ValueError, match="stage 1 does not fit stage 2: other."):
        next_stage(model)
