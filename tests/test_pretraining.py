"Training that is killed and started again ends with the same weights, bit for bit."
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel, TrainerState

from cmcgns.encoders import TextEncoder
from cmcgns import pretraining
from cmcgns.pretraining import BestSinceStart, Corpus, Pairs, PairTrainer, arguments, collate, compile_encoders, last_checkpoint, make_settings, pretrain, start_stage, train_stage
from cmcgns.text import load_tokenizer, train_tokenizer

TRAIN = """
import sys
import torch
from test_pretraining import corpus, SETTINGS
from cmcgns.pretraining import pretrain
torch.set_num_threads(1)
pretrain(SETTINGS, corpus(96), corpus(16, 1), sys.argv[1])
"""
SETTINGS = make_settings("tiny", batch_size=8, stage1_epochs=4, stage2_epochs=4, clusters=4, cluster_start=1.1, zoom=.2, jitter=.2)


def corpus(n, seed=0):
    rng = np.random.default_rng(seed)
    words = "heart lung opacity effusion normal left right small large clear".split()
    reports = [[" ".join(rng.choice(words, 4)) for _ in range(rng.integers(2, 5))] for _ in range(n)]
    return Corpus(rng.integers(0, 255, (n, 72, 72), dtype=np.uint8), reports)


def start(folder):
    return subprocess.Popen([sys.executable, "-c", TRAIN, str(folder)], cwd=os.path.dirname(__file__),
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def kill_in(folder, stage, checkpoint):
    "Start, wait for a checkpoint of a stage, kill at once."
    process, deadline = start(folder), time.time() + 180
    while not (folder / stage / f"checkpoint-{checkpoint}").exists():
        assert process.poll() is None and time.time() < deadline, "the run ended before it could be killed"
        time.sleep(.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (folder / stage / "model").exists()


@pytest.mark.slow
def test_killed_in_each_stage_ends_bit_for_bit_the_same(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(300) == 0
    kill_in(killed, "stage1", 24)
    kill_in(killed, "stage2", 36)
    assert start(killed).wait(300) == 0
    for stage in "stage1", "stage2":
        a, b = (load_file(f / stage / "model" / "model.safetensors") for f in (whole, killed))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    assert bool(a["contrast.sampler.started"]), "clusters were not at work when the run was killed"


@pytest.mark.parametrize("keep,pick", [("best", min), ("last", lambda losses: losses[-1])])
def test_stage_2_starts_from_what_stage_1_keeps(tmp_path, keep, pick):
    settings = make_settings("tiny", stage1_epochs=5, stage2_epochs=0, lr=1e-2, keep=keep, cluster="none")
    model, logs = pretrain(settings, corpus(48), corpus(16, 1), tmp_path)
    losses = [row["eval_loss"] for row in logs["stage1"] if "eval_loss" in row]
    pairs = Pairs(corpus(16, 1), load_tokenizer(tmp_path / "tokenizer"), settings)
    with torch.no_grad():
        assert model(**pairs.batch(list(range(16)))).loss.item() == pytest.approx(pick(losses), abs=1e-4)
    second = start_stage(2, settings, 0, tmp_path)
    assert all(torch.equal(second.state_dict()[k], v) for k, v in model.state_dict().items())
    assert last_checkpoint(tmp_path / "stage1") is None


def test_the_search_for_the_best_starts_anew_with_the_clusters(tmp_path):
    "The loss rises where hard negatives join: without a new start the epoch before them would stay the best."
    data, validation = corpus(48), corpus(16, 1)
    n = sum(map(len, data.reports))
    settings = make_settings("tiny", stage1_epochs=1, stage2_epochs=0, cluster_start=1.1, clusters=n + 8, lr=1e-6)
    assert not pretrain(settings, data, validation, tmp_path / "one")[0].contrast.sampler.started # the buffer fills in the second epoch
    model, logs = pretrain(replace(settings, stage1_epochs=3), data, validation, tmp_path / "three")
    losses = [row["eval_loss"] for row in logs["stage1"] if "eval_loss" in row]
    assert min(losses) == losses[0] and model.contrast.sampler.started


def test_a_half_deleted_checkpoint_does_not_count(tmp_path):
    for step in 10, 20:
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "optimizer.pt").touch()
    (tmp_path / "checkpoint-10" / "complete").touch()
    assert last_checkpoint(tmp_path).name == "checkpoint-10" and not (tmp_path / "checkpoint-20").exists()


def test_a_best_checkpoint_is_found_where_the_folder_was_moved_to_or_given_up(tmp_path, capsys):
    watch, model = BestSinceStart(), SimpleNamespace(objective=SimpleNamespace(phase=lambda: 0))
    args = SimpleNamespace(output_dir=str(tmp_path), load_best_model_at_end=True)
    resumed = lambda: TrainerState(global_step=4, best_global_step=2, best_metric=1., log_history=[dict(step=2, eval_loss=1.), dict(step=4, eval_loss=1.5)])
    best = lambda state: (state.best_metric, state.best_global_step, state.best_model_checkpoint)
    (tmp_path / "checkpoint-2").mkdir()
    watch.on_train_begin(args, moved := resumed(), None, model=model)
    (tmp_path / "checkpoint-2").rmdir()
    assert not capsys.readouterr().err
    watch.on_train_begin(args, lost := resumed(), None, model=model)
    assert best(moved) == (1., 2, str(tmp_path / "checkpoint-2")) and best(lost) == (1.5, 4, str(tmp_path / "checkpoint-4"))
    assert "checkpoint-2: the best epoch so far is lost" in capsys.readouterr().err


def test_a_kill_while_a_stage_is_put_away_costs_nothing(tmp_path, monkeypatch):
    "Between the model's appearance and the end of its checkpoints; and in the middle of the copy of somebody's stage 1."
    settings, data = make_settings("tiny", stage1_epochs=1, stage2_epochs=0), (corpus(32), corpus(8, 1))
    done, other = tmp_path / "done", tmp_path / "other"
    model, _ = pretrain(settings, *data, done)
    for left in "checkpoint-4", "features-train": (done / "stage1" / left).mkdir()
    (other / "stage1" / "model.partial").mkdir(parents=True)
    monkeypatch.setattr(pretraining, "train_stage", lambda *_: pytest.fail("trained again"))
    pretrain(settings, *data, done)
    assert [p.name for p in (done / "stage1").iterdir()] == ["model"]
    again, _ = pretrain(settings, *data, other, start=done)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU knows fp16")
def test_fp16_is_not_computed_in_32_bits_without_a_word(tmp_path):
    with pytest.raises(ValueError, match="precision=fp16 needs a GPU"): pretrain(make_settings("tiny", precision="fp16"), corpus(32), corpus(8, 1), tmp_path)


def test_every_epoch_has_its_training_loss_in_the_log_however_many_batches_make_a_step(tmp_path):
    settings = make_settings("tiny", batch_size=8, accumulate=8, stage1_epochs=2, stage2_epochs=0)
    _, logs = pretrain(settings, corpus(96), corpus(8, 1), tmp_path)
    assert {row["epoch"] for row in logs["stage1"] if "loss" in row} >= {1., 2.}
    assert logs["stage1"][-1]["kept_step"] in {row["step"] for row in logs["stage1"] if "eval_loss" in row}


def test_what_is_hidden_in_evaluation_is_the_same_each_time(tmp_path):
    settings = make_settings("tiny", mask_in_eval=True, stage1_epochs=1, stage2_epochs=1)
    model, _ = pretrain(settings, corpus(32), corpus(8, 1), tmp_path)
    pairs = Pairs(corpus(24, 1), load_tokenizer(tmp_path / "tokenizer"), settings)
    trainer = PairTrainer(model, arguments(settings, 1, tmp_path, 1), collate, pairs, pairs)
    one, two = (trainer.evaluate()["eval_rebuild_loss"] for _ in range(2))
    assert one == two
    seen = [model(**pairs.batch([0, 1])).rebuild_loss.item() for _ in range(2)]
    assert seen[0] != seen[1], "else nothing was hidden"


def test_nan_stops_and_says_where(tmp_path):
    settings = make_settings("tiny", lr=1e30, max_grad_norm=1e30, warmup_epochs=0)
    with pytest.raises(FloatingPointError, match="the loss is (nan|inf) at step"):
        pretrain(settings, corpus(48), corpus(16, 1), tmp_path)


def test_more_clusters_than_sentences_trains_on(tmp_path):
    settings = make_settings("tiny", stage1_epochs=1, stage2_epochs=0, clusters=100_000)
    model, _ = pretrain(settings, corpus(32), corpus(8, 1), tmp_path)
    assert not model.contrast.sampler.started


def local_bert(folder, reports):
    tokenizer = train_tokenizer([s for r in reports for s in r], 300)
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64),
              add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_frozen_text_encoder_reads_once_and_stays(tmp_path, monkeypatch):
    pairs = corpus(32)
    bert = local_bert(tmp_path / "bert", pairs.reports)
    settings = make_settings("tiny", text_encoder=bert, freeze_text=True, stage1_epochs=2, stage2_epochs=1, lr=1e-2)
    asked, forward = [], TextEncoder.forward
    monkeypatch.setattr(TextEncoder, "forward", lambda self, ids, mask: (asked.append(len(ids)), forward(self, ids, mask))[1])
    model, logs = pretrain(settings, pairs, corpus(8, 1), tmp_path / "run")
    assert sum(asked) == 2 * (32 + 8)  # once a stage
    as_loaded = load_file(tmp_path / "bert" / "model.safetensors")
    assert all(torch.equal(v, as_loaded[k]) for k, v in model.text_encoder.backbone.state_dict().items())
    assert logs["stage1"][-2]["eval_loss"] < 10 and not list((tmp_path / "run").glob("*/features-*"))


def test_a_batch_embedded_in_parts_trains_like_a_whole_one(tmp_path):
    settings = make_settings("tiny", image_encoder="vit-tiny", batch_size=16, stage1_epochs=2, stage2_epochs=0, predictor_norm=False, cluster="none")
    losses = []
    for n in 0, 5:
        model = start_stage(1, settings, 300)
        for m in model.modules():
            if isinstance(m, torch.nn.Dropout): m.p = 0.
        tokenizer = train_tokenizer([s for r in corpus(48).reports for s in r], 300)
        train, validation = (Pairs(c, tokenizer, settings) for c in (corpus(48), corpus(16, 1)))
        _, log = train_stage(model, train, validation, replace(settings, embed_at_once=n), 2, tmp_path / str(n), "")
        losses.append([row["loss"] for row in log if "loss" in row] + [row["eval_loss"] for row in log if "eval_loss" in row])
    assert len(losses[0]) == 8 and losses[0][0] != losses[0][5]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)


def test_a_batch_is_the_same_from_a_worker():
    settings, pairs = make_settings("tiny", zoom=.2, jitter=.2), corpus(16)
    pairs = Pairs(pairs, train_tokenizer([s for r in pairs.reports for s in r], 300), settings)
    keys = [[(3, i) for i in range(k, k + 4)] for k in (0, 4)]
    for ahead, batch in zip(DataLoader(pairs, batch_sampler=keys, collate_fn=collate, num_workers=2), keys):
        here = collate([pairs[k] for k in batch])
        assert ahead.keys() == here.keys() and all(torch.equal(ahead[k], here[k]) for k in here)


@pytest.mark.skipif(torch.__version__.startswith("2.6."), reason="torch 2.6 cannot translate these encoders, and the settings say so")
def test_compiled_encoders_give_the_same_loss_for_reports_of_any_length():
    pairs = corpus(16)
    tokenizer = train_tokenizer([s for r in pairs.reports for s in r], 300)
    settings = make_settings("tiny", image_encoder="vit-tiny")
    plain, compiled = (start_stage(1, settings, len(tokenizer)).eval() for _ in range(2))
    compile_encoders(compiled, backend="eager") # translated, not made faster: that takes a minute
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    for batch in (range(4), range(4, 8)):
        losses = [m(**Pairs(pairs, tokenizer, settings).batch(list(batch))).loss for m in (plain, compiled)]
        torch.testing.assert_close(*losses)
        losses[1].backward()
    assert all(p.grad is not None for p in compiled.parameters())
