"Exports against plain torch: torchvision's ResNet and timm's ViT written anew here, loaded strictly, giving our features."
import json
import re
import sys
import types
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from cmcgns.baselines.convirt import ConVIRT
from cmcgns.encoders import AttentionPool, ImageEncoder, image_config, quiet_transformers
from cmcgns.model import Method, build_model, load_model
from cmcgns.pretraining import make_settings
from cmcgns.reporting import export
from cmcgns.reporting.experiments import Question, evaluate_run, load_run, pretrain_run
from cmcgns.reporting.export import VIT_NAMES, evaluations_of, export_run, fuse_qkv, rename, resnet_shapes, result_rows, to_timm, to_torchvision, vit_shapes
from cmcgns.reporting.problems import open_problem
from cmcgns.reporting.runs import find_run, list_runs, run_once
from cmcgns.text import train_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoBackbone, ResNetBackbone, ViTConfig


# The two architectures, from their papers and their documented names

class PlainBlock(nn.Module):
    "A residual block of two 3x3 convolutions, or of 1x1, 3x3, 1x1; the 3x3 (of two: the first) has the stride."
    def __init__(self, before, width, stride, bottleneck):
        super().__init__()
        after = 4*width if bottleneck else width
        plan = [(before, width, 1, 1), (width, width, 3, stride), (width, after, 1, 1)] if bottleneck else [(before, width, 3, stride), (width, after, 3, 1)]
        self.n = len(plan)
        for i, (a, b, k, s) in enumerate(plan, 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, k, s, k//2, bias=False))
            setattr(self, f"bn{i}", nn.BatchNorm2d(b))
        self.downsample = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after)) if stride != 1 or before != after else None

    def forward(self, x):
        y = x
        for i in range(1, self.n + 1):
            y = getattr(self, f"bn{i}")(getattr(self, f"conv{i}")(y))
            if i < self.n:
                y = F.relu(y)
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class PlainResNet(nn.Module):
    "He et al. 2016, with torchvision's names and its place of the stride."
    def __init__(self, depths, bottleneck, classes=1000):
        super().__init__()
        self.conv1, self.bn1, self.relu, self.maxpool = nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        before = 64
        for i, depth in enumerate(depths):
            blocks = []
            for j in range(depth):
                blocks.append(PlainBlock(before, 64 * 2**i, 2 if i and not j else 1, bottleneck))
                before = 64 * 2**i * (4 if bottleneck else 1)
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(before, classes) if classes else nn.Identity()

    def forward_features(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, x):
        return self.fc(self.avgpool(self.forward_features(x)).flatten(1))


class PlainAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(d, 3*d), nn.Linear(d, d)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        share = (q @ k.transpose(-1, -2) / q.shape[-1]**.5).softmax(-1)
        return self.proj((share @ v).transpose(1, 2).flatten(2))


class PlainViT(nn.Module):
    "Dosovitskiy et al. 2021, with timm's names."
    def __init__(self, img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, mlp_ratio=4., num_classes=1000, norm_layer=partial(nn.LayerNorm, eps=1e-6)):
        super().__init__()
        d, inside = embed_dim, int(embed_dim * mlp_ratio)
        self.img_size, self.cls_token = img_size, nn.Parameter(torch.zeros(1, 1, d))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (img_size//patch_size)**2, d))
        self.patch_embed = nn.ModuleDict(dict(proj=nn.Conv2d(3, d, patch_size, patch_size)))
        self.blocks = nn.Sequential(*(nn.ModuleDict(dict(
            norm1=norm_layer(d), attn=PlainAttention(d, num_heads), norm2=norm_layer(d),
            mlp=nn.ModuleDict(dict(fc1=nn.Linear(d, inside), fc2=nn.Linear(inside, d))))) for _ in range(depth)))
        self.norm, self.head = norm_layer(d), nn.Linear(d, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x):
        assert x.shape[2:] == (self.img_size, self.img_size)
        patches = self.patch_embed["proj"](x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), patches], 1) + self.pos_embed
        for b in self.blocks:
            x = x + b["attn"](b["norm1"](x))
            x = x + b["mlp"]["fc2"](F.gelu(b["mlp"]["fc1"](b["norm2"](x))))
        return self.norm(x)

    def forward(self, x):
        return self.head(self.forward_features(x)[:, 0])


PLAIN_RESNETS = dict(resnet18=((2, 2, 2, 2), False), resnet34=((3, 4, 6, 3), False), resnet50=((3, 4, 6, 3), True), resnet101=((3, 4, 23, 3), True), resnet152=((3, 8, 36, 3), True))
PLAIN_VITS = dict(vit_small_patch16_224=(384, 12, 6), vit_base_patch16_224=(768, 12, 12))
DOCUMENTED = dict(resnet18=11_689_512, resnet34=21_797_672, resnet50=25_557_032, resnet101=44_549_160, resnet152=60_192_808, vit_base_patch16_224=86_567_656)


def plain(name, **kwargs):
    if name in PLAIN_RESNETS:
        return PlainResNet(*PLAIN_RESNETS[name], **kwargs)
    d, depth, heads = PLAIN_VITS[name]
    return PlainViT(**dict(embed_dim=d, depth=depth, num_heads=heads) | kwargs)


def shapes(state):
    return {k: tuple(v.shape) for k, v in state.items()}


def shake(model, seed=0):
    "Nothing may stay at a value that another place could have too: ones, zeros, or statistics of no data."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for k, v in model.state_dict().items():
            if not v.is_floating_point():
                v.fill_(int(torch.randint(1, 1000, (), generator=g)))
            elif "running_var" in k or (v.ndim == 1 and k.endswith("weight")):
                v.copy_(torch.rand(v.shape, generator=g) + .5)
            elif v.ndim == 1:
                v.copy_(torch.randn(v.shape, generator=g) * .1)
    return model.eval()


def encoder(name, size=64, pool="attention", **changes):
    torch.manual_seed(0)
    config = image_config(name, size)
    for k, v in changes.items():
        setattr(config, k, v)
    return shake(ImageEncoder(config, size, pool))


def noise(n=2, channels=1, size=64):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(1))*2 - 1


def furthest(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_plain_architectures_have_the_documented_size(name):
    with torch.device("meta"):
        model = plain(name)
    assert sum(p.numel() for p in model.parameters()) == DOCUMENTED[name]


# Names and shapes

@pytest.mark.parametrize("name", PLAIN_RESNETS)
def test_resnet_names_and_shapes_are_torchvisions(name):
    depths, bottleneck = PLAIN_RESNETS[name]
    with torch.device("meta"):
        theirs = shapes(PlainResNet(depths, bottleneck, classes=0).state_dict())
    assert resnet_shapes("bottleneck" if bottleneck else "basic", depths) == theirs
    assert len(theirs) == {"resnet18": 120, "resnet34": 216, "resnet50": 318, "resnet101": 624, "resnet152": 930}[name]


def test_some_names_of_torchvision_by_hand():
    fifty, eighteen = (to_torchvision(encoder(n)).state for n in ("resnet-50", "resnet-18"))
    by_hand = {"conv1.weight": (64, 3, 7, 7), "bn1.running_var": (64,), "layer1.0.conv1.weight": (64, 64, 1, 1), "layer1.0.conv3.weight": (256, 64, 1, 1),
               "layer1.0.downsample.0.weight": (256, 64, 1, 1), "layer1.0.downsample.1.num_batches_tracked": (), "layer3.5.conv2.weight": (256, 256, 3, 3),
               "layer4.0.downsample.0.weight": (2048, 1024, 1, 1), "layer4.2.bn3.bias": (2048,)}
    assert {k: tuple(fifty[k].shape) for k in by_hand} == by_hand
    assert eighteen["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1) and eighteen["layer4.1.bn2.weight"].shape == (512,)
    assert not [k for k in eighteen if "conv3" in k or k.startswith(("fc", "layer1.0.downsample"))]


def test_vit_names_and_shapes_are_timms():
    with torch.device("meta"):
        theirs = shapes(PlainViT(num_classes=0).state_dict())
    assert vit_shapes(768, 12, 3072, 16, 197) == theirs and len(theirs) == 150
    by_hand = {"cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,), "blocks.0.norm1.weight": (768,),
               "blocks.0.attn.qkv.weight": (2304, 768), "blocks.0.attn.qkv.bias": (2304,), "blocks.0.attn.proj.weight": (768, 768), "blocks.11.norm2.bias": (768,),
               "blocks.11.mlp.fc1.weight": (3072, 768), "blocks.11.mlp.fc2.weight": (768, 3072), "norm.weight": (768,)}
    assert {k: theirs[k] for k in by_hand} == by_hand


# Features: ours against the plain architectures, loaded strictly

@pytest.mark.parametrize("name, theirs, size", [("resnet-18", "resnet18", 64), ("resnet-18", "resnet18", 97), ("resnet-50", "resnet50", 224), ("resnet-50", "resnet50", 96)])
def test_a_plain_resnet_gives_our_features(name, theirs, size):
    ours = encoder(name, size)
    for convert in (to_torchvision, to_timm):
        found, model = convert(ours), plain(theirs, classes=0)
        assert found.name == theirs and shapes(found.state) == shapes(model.state_dict())
        model.load_state_dict(found.state)
        assert all(v.dtype == found.state[k].dtype for k, v in model.state_dict().items())
    with torch.no_grad():
        x = noise(2, 1, size)
        features, mine = model.eval().forward_features(x.expand(-1, 3, -1, -1)), ours(x)
        pooled = ours.attention_pool(features)
    assert furthest(features.flatten(2).transpose(1, 2), mine.local) < 1e-4 * float(mine.local.abs().max())
    assert furthest(pooled, mine.pooled) < 1e-4 * float(mine.pooled.abs().max())
    mean = encoder(name, size, pool="mean")
    with torch.no_grad():
        assert furthest(model(x.expand(-1, 3, -1, -1)), mean(x).pooled) < 1e-4 * float(mine.local.abs().max()) # torchvision's own output without fc


@pytest.mark.parametrize("name, theirs, size", [("vit-b16", "vit_base_patch16_224", 224), ("vit-small", "vit_small_patch16_224", 64)])
def test_a_plain_vit_gives_our_features(name, theirs, size):
    ours = encoder(name, size)
    found, model = to_timm(ours), plain(theirs, img_size=size, num_classes=0, norm_layer=partial(nn.LayerNorm, eps=1e-12))
    assert found.name == theirs and shapes(found.state) == shapes(model.state_dict())
    assert found.make == f"timm.create_model('{theirs}', img_size={size}, num_classes=0, norm_layer=partial(torch.nn.LayerNorm, eps=1e-12))"
    model.load_state_dict(found.state)
    with torch.no_grad():
        tokens, mine = model.eval().forward_features(noise(2, 3, size)), ours(noise(2, 3, size))
    assert furthest(tokens[:, 1:], mine.local) < 1e-4 and furthest(tokens[:, 0], mine.pooled) < 1e-4 and float(mine.local.abs().max()) > 1


@pytest.mark.parametrize("learned_at, seen_at", [(64, 96), (96, 64), (64, 64)])
def test_positions_are_those_of_the_size_that_was_trained(learned_at, seen_at):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=80, patch_size=16, image_size=learned_at)
    ours = shake(ImageEncoder(config, seen_at))
    found = to_timm(ours)
    with torch.no_grad():
        ours.backbone.embeddings.position_embeddings.mul_(20) # so that they matter
        model = eval(found.make, dict(timm=fake_timm(), partial=partial, torch=torch))
        model.load_state_dict(to_timm(ours).state)
        assert furthest(model.forward_features(noise(1, 3, seen_at))[:, 1:], ours(noise(1, 3, seen_at)).local) < 1e-4


def test_a_misplaced_stride_would_load_and_is_refused():
    right, wrong = encoder("resnet-50"), encoder("resnet-50", downsample_in_bottleneck=True)
    model = plain("resnet50", classes=0)
    model.load_state_dict(rename(wrong.backbone.state_dict(), export.RESNET_NAMES)) # strict, and no word
    with torch.no_grad():
        x = noise(1, 3)
        assert furthest(model.eval().forward_features(x).flatten(2).mT, wrong(x).local) > .01 * float(right(x).local.abs().max())
    for convert, library in (to_torchvision, "torchvision"), (to_timm, "timm"):
        with pytest.raises(ValueError, match=f"this encoder is not {library}'s resnet50: downsample_in_bottleneck is True here and False there; export it to transformers"):
            convert(wrong)
    to_torchvision(encoder("resnet-18", downsample_in_bottleneck=True)) # a basic block has no bottleneck


@pytest.mark.parametrize("changes, message", [
    (dict(downsample_in_first_stage=True), "downsample_in_first_stage is True here and False there"), (dict(hidden_act="gelu"), "hidden_act is 'gelu' here and 'relu' there"),
    (dict(num_channels=1), r"conv1.weight is \(64, 1, 7, 7\) here and \(64, 3, 7, 7\) there"), (dict(depths=[1, 2, 2, 2]), r"no ResNet of \[1, 2, 2, 2\] basic blocks: known are resnet18"),
    (dict(hidden_sizes=[64, 128, 256, 384]), r"layer4.0.conv1.weight is \(384, 256, 3, 3\) here and \(512, 256, 3, 3\) there")])
def test_a_resnet_that_does_not_fit_is_told_why(changes, message):
    with pytest.raises(ValueError, match=message):
        to_torchvision(encoder("resnet-18", **changes))


def test_names_that_nobody_knows_are_named():
    ours = encoder("resnet-18")
    ours.backbone.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="unknown there: extra.bias, extra.weight"):
        to_torchvision(ours)
    del ours.backbone.extra, ours.backbone.embedder.embedder.normalization
    with pytest.raises(ValueError, match="missing here: bn1.bias"):
        to_torchvision(ours)


def test_both_generations_of_names_in_transformers(tmp_path):
    ours = encoder("vit-tiny")
    with quiet_transformers():
        ours.backbone.save_pretrained(tmp_path)
    old = load_file(tmp_path/"model.safetensors")
    assert "encoder.layer.0.attention.attention.query.weight" in old and "layers.0.attention.q_proj.weight" in ours.backbone.state_dict()
    a, b = (fuse_qkv(rename(s, VIT_NAMES)) for s in (old, ours.backbone.state_dict()))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Folders

def fake_torchvision():
    models = types.SimpleNamespace(**{n: lambda weights, n=n: plain(n) for n in PLAIN_RESNETS})
    module = types.ModuleType("torchvision")
    module.models = models
    return module


def fake_timm():
    def create_model(name, num_classes=1000, **kwargs):
        return plain(name, classes=num_classes, **kwargs) if name in PLAIN_RESNETS else plain(name, num_classes=num_classes, **kwargs)
    module = types.ModuleType("timm")
    module.create_model, module.models = create_model, types.SimpleNamespace(vision_transformer=types.SimpleNamespace(VisionTransformer=PlainViT))
    return module


def make_run(root, image_encoder="resnet-18", size=64, dataset="synthetic", stages=1, **changes):
    "A run as pre-training leaves it, though nothing was learned."
    settings = make_settings("tiny", image_encoder=str(image_encoder), image_size=size, store_size=size + 8, **changes)
    data = dict(dataset=dataset, fingerprint="f1", split="s1", how="ours", counts=dict(train=6, validation=2, test=4))

    def compute(folder):
        tokenizer = train_tokenizer(["no pneumothorax is seen", "the heart is enlarged"], 120)
        for stage in range(1, stages + 1):
            method = Method(**{k: v for k, v in asdict(settings).items() if k in Method.__dataclass_fields__})
            model = build_model(str(image_encoder), settings.text_encoder, len(tokenizer), size, method, seed=stage)
            shake(model.image_encoder, stage)
            with quiet_transformers():
                model.save_pretrained(folder/f"stage{stage}"/"model")
        with quiet_transformers():
            tokenizer.save_pretrained(folder/"tokenizer")
        return dict(model=f"stage{stages}/model", pairs=dict(train=6, validation=2))
    return run_once(root, "pretrain", dict(settings=asdict(settings), data=data), compute)


def make_evaluation(run, encoder=None, task="classification", rows=None, **config):
    rows = rows or [dict(fraction=f, seed=s, metric="auroc", value=v, low=v - .1, high=v + .1, n_test=4) for f, v in ((.1, .6), (1., .7)) for s in (0, 1)]
    config = dict(encoder=encoder or run.folder.name, settings=run.config["settings"], data=run.config["data"], question=asdict(Question(targets=("Edema",)))) | config
    return run_once(run.folder.parent, task, config, lambda folder: dict(rows=rows))


def blocks(folder):
    "The Python of a card by section."
    sections = re.split(r"(?m)^## ", (folder/"README.md").read_text(encoding="utf-8"))[1:]
    return {s.partition("\n")[0]: re.findall(r"```python\n(.*?)```", s, re.S) for s in sections}


@pytest.fixture
def try_card(monkeypatch):
    "Run all code of a card as it stands, in the export's folder, with plain torch in the place of torchvision and timm."
    monkeypatch.setitem(sys.modules, "torchvision", fake_torchvision())
    monkeypatch.setitem(sys.modules, "timm", fake_timm())

    def run(folder, only=None):
        monkeypatch.chdir(folder)
        ran = []
        with quiet_transformers():
            for section, codes in blocks(folder).items():
                for code in codes:
                    if section != "Input" and only in (None, section):
                        exec(compile(code, section, "exec"), {})
                        ran.append(section)
        return ran
    return run


@pytest.mark.parametrize("name, size, pool, loads", [
    ("resnet-18", 64, "attention", ["transformers"]*3 + ["torchvision", "timm", "cmcgns"]), ("resnet-18", 64, "mean", ["transformers"]*3 + ["torchvision", "timm", "cmcgns"]),
    ("resnet-tiny", 64, "attention", ["transformers"]*3 + ["cmcgns"]), ("vit-tiny", 64, "attention", ["transformers"]*2 + ["timm", "cmcgns"]),
    ("vit-small", 32, "mean", ["transformers"]*2 + ["timm", "cmcgns"])])
def test_all_code_of_a_card_runs(tmp_path, try_card, name, size, pool, loads):
    out = export_run(make_run(tmp_path/"runs", name, size, image_pool=pool), tmp_path/"out")
    assert try_card(out) == [f"Load with {k}" for k in loads] + ["Pooling and projections"]
    assert json.loads((out/"export.json").read_text())["formats"] == list(dict.fromkeys(loads))


@pytest.mark.parametrize("file, section", [("torchvision_resnet18", "Load with torchvision"), ("timm_resnet18", "Load with timm"), ("image_encoder/model", "Load with transformers"),
                                           ("model/model", "Load with cmcgns"), ("heads", "Pooling and projections")])
def test_a_card_notices_wrong_weights(tmp_path, try_card, file, section):
    out = export_run(make_run(tmp_path/"runs"), tmp_path/"out")
    path = out/f"{file}.safetensors"
    state = {k: v * 1.1 if v.ndim == 4 or "whole" in k else v for k, v in load_file(path).items()}
    state = {k: v + .1 if k == "image_whole.bias" else v for k, v in state.items()}
    save_file(state, path, metadata=dict(format="pt"))
    with pytest.raises(AssertionError):
        try_card(out, section)


def test_the_code_for_pictures_gives_what_our_model_is_given(tmp_path, monkeypatch):
    from PIL import Image
    from cmcgns.image import build_cache, centre_crop, normalise
    out = export_run(make_run(tmp_path/"runs"), tmp_path/"out", ["transformers"])
    Image.fromarray((noise(1, 1, 90)[0, 0]*127 + 128).to(torch.uint8).numpy()[:70]).save(tmp_path/"film.png")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(blocks(out)["Input"][0], names)
    pixels = build_cache([tmp_path/"film.png"], 72, tmp_path/"cache", progress=False).images
    assert torch.equal(names["x"][:, :1], normalise(centre_crop(torch.from_numpy(pixels[[0]]), 64))) and names["x"].shape == (1, 3, 64, 64)


def test_backbones_of_transformers(tmp_path, monkeypatch):
    run = make_run(tmp_path/"runs")
    out, ours = export_run(run, tmp_path/"out", "transformers"), load_model(run.folder/"stage1"/"model").image_encoder
    x = noise(2, 3)
    with quiet_transformers(), torch.no_grad():
        maps = ResNetBackbone.from_pretrained(out/"image_encoder", out_features=["stage1", "stage4"]).eval()(x).feature_maps
        monkeypatch.setattr("transformers.models.auto.auto_factory.hf_api", lambda: types.SimpleNamespace(repo_exists=lambda name: True)) # as for a hub id
        auto = AutoBackbone.from_pretrained(out/"image_encoder", out_features=["stage1", "stage4"]).eval()(x).feature_maps
        whole = ours.backbone(x, output_hidden_states=True)
    assert torch.equal(maps[1], whole.last_hidden_state) and torch.equal(maps[0], whole.hidden_states[1])
    assert all(torch.equal(a, b) for a, b in zip(maps, auto))


def test_an_export_starts_another_training(tmp_path):
    run = make_run(tmp_path/"runs", "vit-tiny")
    out = export_run(run, tmp_path/"out", ["transformers"])
    old, tokenizer = load_model(run.folder/"stage1"/"model"), export.load_tokenizer(out/"text_encoder")
    new = build_model(str(out/"image_encoder"), str(out/"text_encoder"), len(tokenizer), 64)
    for part in ("image_encoder", "text_encoder"):
        a, b = (getattr(m, part).backbone.state_dict() for m in (old, new))
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert tokenizer("the heart is enlarged").input_ids == export.load_tokenizer(run.folder/"tokenizer")("the heart is enlarged").input_ids
    again = export_run(out.parent/"runs"/run.folder.name/"stage1"/"model", tmp_path/"again", ["cmcgns"])
    assert export.open_source(again/"model").tokenizer is not None # a model out of an export brings its tokenizer


def test_heads_hold_everything_between_the_backbones_and_the_common_space(tmp_path):
    run = make_run(tmp_path/"runs")
    heads, model = load_file(export_run(run, tmp_path/"out", ["torchvision"])/"heads.safetensors"), load_model(run.folder/"stage1"/"model")
    kept = {k.removeprefix("image_encoder.") for k in model.state_dict() if not re.match("(image_encoder.backbone|text_encoder|attention|predictor|contrast)[.]", k)}
    assert heads.keys() == kept and torch.equal(heads["log_scale"], model.log_scale.detach())
    pool = AttentionPool(512, (2, 2))
    pool.load_state_dict({k.removeprefix("attention_pool."): v for k, v in heads.items() if k.startswith("attention_pool.")})


# Whole or not at all

def test_a_folder_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    run, out = make_run(tmp_path/"runs"), tmp_path/"deep"/"out"

    def lost_power(*args):
        assert (out.with_name("out.partial")/"heads.safetensors").exists() and not out.exists()
        raise RuntimeError("lost power")
    with monkeypatch.context() as m:
        m.setattr(export, "card", lost_power)
        with pytest.raises(RuntimeError, match="lost power"):
            export_run(run, out, ["torchvision"])
    assert list(out.parent.iterdir()) == []
    out.mkdir() # empty is as good as new
    assert export_run(run, out, ["torchvision"]) == out
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "check.safetensors", "export.json", "heads.safetensors", "sums.json", "torchvision_resnet18.safetensors"]


def test_what_is_there_is_not_touched(tmp_path):
    run, out = make_run(tmp_path/"runs"), tmp_path/"out"
    out.mkdir()
    (out/"thesis.tex").write_text("mine")
    for place in (out, out/"thesis.tex"):
        with pytest.raises(ValueError, match="is there and not empty: give a new folder"):
            export_run(run, place)
    assert (out/"thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("formats, message", [(["onnx"], "unknown format 'onnx': known are transformers, torchvision, timm, cmcgns"), ([], "no format was given"),
                                              (["transformers", "torchvision"], "this encoder is a ViT: export it to timm or transformers")])
def test_formats_that_cannot_be_written(tmp_path, formats, message):
    run = make_run(tmp_path/"runs", "vit-tiny")
    with pytest.raises(ValueError, match=message):
        export_run(run, tmp_path/"out", formats)
    assert not (tmp_path/"out").exists()


def test_what_does_not_fit_is_named_in_the_card(tmp_path):
    out = export_run(make_run(tmp_path/"runs", "resnet-tiny"), tmp_path/"out")
    text, facts = (out/"README.md").read_text(), json.loads((out/"export.json").read_text())
    for library in ("torchvision", "timm"):
        assert f"- {library}: {library} has no ResNet of [1, 1, 1] basic blocks" in text and library in facts["left_out"]
    assert not list(out.glob("t*_resnet*")) and "Load with timm" not in text


# Sources

def test_a_run_by_its_folder_and_one_of_its_stages(tmp_path):
    run = make_run(tmp_path/"runs", stages=2)
    by_name = export_run(str(run.folder), tmp_path/"a", ["torchvision"])
    last, first = (export_run(run.folder/f"stage{i}"/"model", tmp_path/f"stage{i}", ["torchvision"]) for i in (2, 1))
    states = [load_file(p/"torchvision_resnet18.safetensors") for p in (by_name, last, first)]
    assert torch.equal(states[0]["conv1.weight"], states[1]["conv1.weight"]) and not torch.equal(states[0]["bn1.weight"], states[2]["bn1.weight"])
    evaluation = make_evaluation(run)
    export_run(run.folder/"stage2"/"model", tmp_path/"b", ["torchvision"], [evaluation])
    with pytest.raises(ValueError, match=f"is about the encoder '{run.folder.name}', expected '{run.folder.name} stage1' or what it started from"):
        export_run(run.folder/"stage1"/"model", tmp_path/"c", ["torchvision"], [evaluation])


def test_a_model_without_a_run_says_what_is_not_known(tmp_path, try_card):
    model = build_model("resnet-18", "bert-tiny", 60, 64, Method(width=32, clusters=8)).eval()
    with quiet_transformers():
        model.save_pretrained(tmp_path/"mine")
    out = export_run(tmp_path/"mine", tmp_path/"out")
    text = (out/"README.md").read_text()
    assert "Not recorded: this was exported from a model without its run." in text and "license: other" in text and "trained on unknown data" in text
    assert try_card(out).count("Load with transformers") == 2 and not (out/"tokenizer").exists() # no tokenizer, no code for one
    with pytest.raises(ValueError, match="expected 'mine' or what it started from"):
        export_run(tmp_path/"mine", tmp_path/"b", None, [make_evaluation(make_run(tmp_path/"runs"))])


def test_what_is_no_pre_training_is_refused(tmp_path):
    run = make_run(tmp_path/"runs")
    with pytest.raises(ValueError, match="holds a run of 'classification': expected a finished pre-training"):
        export_run(make_evaluation(run), tmp_path/"out")
    half = tmp_path/"runs"/"pretrain-1.partial"
    (half/"stage1").mkdir(parents=True)
    for place in (half, tmp_path/"nowhere"):
        with pytest.raises(ValueError, match="holds neither a run nor a model"):
            export_run(place, tmp_path/"out")


def test_a_broken_model_is_refused(tmp_path):
    run = make_run(tmp_path/"runs")
    path = run.folder/"stage1"/"model"/"model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k != "image_whole.bias"}, path, metadata=dict(format="pt"))
    with pytest.raises(ValueError, match="the weights do not fit the configuration beside them: missing image_whole.bias"):
        export_run(run, tmp_path/"out")


# The card

def test_a_card_says_what_it_is(tmp_path):
    run = make_run(tmp_path/"runs", "vit-tiny", weighting="multiplicative", seed=9)
    make_evaluation(run), make_evaluation(run, "random"), make_evaluation(run, "pretrain-another")
    other = make_evaluation(run, "random", settings=run.config["settings"] | dict(seed=10)) # what another one started from
    with pytest.raises(ValueError, match="is about the encoder 'random', expected 'pretrain-"):
        export_run(run, tmp_path/"other", ["timm"], [other])
    rows = [dict(metric="share", cluster=f"c{i}", value=i, low=None, high=None, n=3.) for i in range(20)] + [dict(metric="none", value=None)]
    clusters = make_evaluation(run, task="clusters", rows=rows)
    found = evaluations_of(run)
    assert len(found) == 3 and clusters in found
    text = (export_run(run, tmp_path/"out", None, found)/"README.md").read_text()
    for part in ("license: apache-2.0", "- synthetic", "trained on synthetic data", "**For research. Not for clinical use.**", "**synthetic: drawn phantoms and drawn words, no patients**", "hash `s1`", "`f1`",
                 "6 train, 2 validation, 4 test", "`seed=9`", "Behaviours of the published code that are on: weighting.", "| classification | synthetic | ours | this | Edema | 10 % | frozen, solved | auroc | 0.600 ± 0.000 [0.500, 0.700] | 4 | 2 |",
                 "| random, before training |", "| c11 |", f"`evaluations/{clusters.folder.name}.json` has 8 further lines.", f"torch {version('torch')}"):
        assert part in text, part
    assert "| c12 |" not in text
    kept = json.loads((tmp_path/"out"/"evaluations"/f"{clusters.folder.name}.json").read_text())
    assert kept["config"]["data"]["split"] == "s1" and len(kept["metrics"]["rows"]) == 21 and "torch" in kept["environment"]


def test_unlike_evaluations_do_not_look_alike(tmp_path):
    run = make_run(tmp_path/"runs")
    for question in Question(), Question(solver="adamw"), Question(finetune=True), Question(finetune=True, epochs=3):
        make_evaluation(run, question=asdict(replace(question, targets=("Edema",))))
    for how in "covid-cxr-2", str(tmp_path/"lists"):
        make_evaluation(run, data=run.config["data"] | dict(how=how))
    make_evaluation(run, task="zero-shot", rows=[dict(finding="Edema", metric="auroc", value=.5, n_test=4)])
    lines = [line for e in evaluations_of(run) for line in result_rows(e, "this")[0] if line["labels"] != "10 %"]
    assert [(line["split"], line["learned"]) for line in lines] == [("ours", "frozen, solved"), ("ours", "frozen, adamw"), ("ours", "fine-tuned"), ("ours", "fine-tuned, 3 epochs at most"),
                                                                   ("covid-cxr-2", "frozen, solved"), ("lists", "frozen, solved"), ("ours", "")]


def test_ways_of_asking_a_cluster_are_no_seeds(tmp_path):
    run = make_run(tmp_path/"runs")
    rows = [dict(source="trained", cluster="cross-modal", asks=asks, metric="started", truth="", value=v, n=3) for asks, v in (("sentence", .1), ("clustered", .3))]
    lines, _ = result_rows(make_evaluation(run, task="clusters", rows=rows), "this")
    assert [(line["asked"], line["label seeds"]) for line in lines] == [("trained, cross-modal, sentence", 1), ("trained, cross-modal, clustered", 1)]


class Mine(ConVIRT):
    "An objective of one's own."


class Sentences(ConVIRT):
    "One that reads no global feature."
    reads = "image.local", "report.local"


@pytest.mark.parametrize("objective, said", [
    ("cm-cgns", "Cross-Modal Clustering-Guided Negative Sampling (arXiv:2506.11674)"), ("convirt", "ConVIRT (arXiv:2010.00747)"), ("gloria", "GLoRIA (ICCV 2021)"),
    ("mgca", "MGCA (arXiv:2210.06044)"), ("prior", "PRIOR (arXiv:2307.12577)"), (f"{__name__}.Mine", f"an objective of its maker's own, `{__name__}.Mine`"),
    (f"{__name__}.Sentences", f"an objective of its maker's own, `{__name__}.Sentences`")])
def test_a_card_names_the_method(tmp_path, try_card, objective, said):
    run = make_run(tmp_path/"runs", "resnet-tiny", objective=objective)
    for source, name in (run, "run"), (run.folder/"stage1"/"model", "stage"):
        text = (export_run(source, tmp_path/name)/"README.md").read_text()
        assert f"trained together by {said}" in text and (objective == "cm-cgns") == ("arXiv:2506.11674" in text)
    assert try_card(tmp_path/"run")


def test_a_card_for_real_data_says_nothing_of_synthetic_ones(tmp_path):
    text = (export_run(make_run(tmp_path/"runs", dataset="mimic_cxr"), tmp_path/"out", ["torchvision"])/"README.md").read_text()
    assert "synthetic" not in text and "license: other" in text and "made from mimic_cxr, whose terms hold for them too" in text and "No evaluation was given" in text
    text = (export_run(make_run(tmp_path/"runs", dataset="synthetic rsna"), tmp_path/"b", ["torchvision"])/"README.md").read_text()
    assert "**synthetic rsna: drawn phantoms" in text and "- synthetic\n" in text


def test_no_path_of_this_machine_leaves_it(tmp_path):
    first = export_run(make_run(tmp_path/"runs", "vit-tiny"), tmp_path/"first", ["transformers"])
    run = make_run(tmp_path/"runs", first/"image_encoder")
    evaluation = make_evaluation(run, settings=run.config["settings"])
    out = export_run(run, tmp_path/"out", None, [evaluation])
    texts = {p.name: p.read_text() for p in out.rglob("*") if p.suffix in (".md", ".json", ".txt")}
    assert [name for name, text in texts.items() if str(tmp_path) in text or str(Path.home()) in text] == []
    assert "made from synthetic and image_encoder, whose terms" in texts["README.md"] and str(first) in run.config["settings"]["image_encoder"]


def test_the_sums_are_of_the_files(tmp_path):
    import hashlib
    out = export_run(make_run(tmp_path/"runs"), tmp_path/"out")
    sums = json.loads((out/"export.json").read_text())["sha256"]
    assert sums == {str(p.relative_to(out)): hashlib.sha256(p.read_bytes()).hexdigest() for p in out.rglob("*.safetensors")} and len(sums) == 7


# From the beginning to the end

@pytest.mark.slow
def test_pre_train_evaluate_and_take_away(tmp_path, try_card, monkeypatch):
    problem, settings = open_problem(None, tmp_path/"cache", 72, synthetic_studies=60), make_settings("tiny", image_encoder="resnet-18", stage1_epochs=1, stage2_epochs=1)
    with quiet_transformers():
        run = pretrain_run(problem, settings, tmp_path/"runs")
    for trained in (run, None):
        evaluate_run(problem, settings, trained, tmp_path/"runs", Question(fractions=(1.,), seeds=(0,)))
    out = export_run(run, tmp_path/"out", evaluations=evaluations_of(run))
    text = (out/"README.md").read_text()
    assert "| classification | synthetic | ours | this |" in text and "| random, before training |" in text and len(list((out/"evaluations").iterdir())) == 2
    assert len(try_card(out)) == 7
    model = plain("resnet18", classes=0)
    model.load_state_dict(load_file(out/"torchvision_resnet18.safetensors"))
    ours, encode = load_run(find_run(tmp_path/"runs", "pretrain-")) # a run in two lines: this one, and its import
    with torch.no_grad():
        x = noise(4)
        features = model.eval().forward_features(x.expand(-1, 3, -1, -1))
        assert furthest(ours.image_encoder.attention_pool(features), ours.image_encoder(x).pooled) < 1e-4
        assert ours.encode_reports(**encode([["the heart is enlarged"]])).whole.shape == (1, settings.width)
    assert len(list_runs(tmp_path/"runs")) == 3
