"Benchmarks at sizes of no interest: what they count, compare and write down; never how long anything took."
import json

import pytest
import torch
import torch.nn.functional as F
from cmcgns.reporting.bench import bench_head, count, describe, head_step, measure, measure_apart, ratios
from cmcgns.reporting.benchmarks import SHAPES, CutStep, bench, bench_data, bench_features, bench_main, bench_methods, bench_probe, bench_step, trained_step
from cmcgns.reporting.cli import app
from typer.testing import CliRunner

BEST = dict(fp32=1e11, bf16=1e11, copy=1e10)
SMALL = dict(d=32, m=3, p=9, clusters=8)
ROW = {"side", "what", "seconds", "low", "high", "repeats"}


def whole(result, name, rows, measured=ROW | {"cpu", "gb", "threads", "items"}):
    "The schema of a result, and that it survives JSON and can be read."
    assert set(result) == {"bench", "machine", "ceilings", "rows", "ratios"} and result["bench"] == name
    assert json.loads(json.dumps(result)) == result
    assert [(r["side"], r["what"]) for r in result["rows"]] == rows
    for r in result["rows"]:
        assert measured <= set(r) and 0 < r["low"] <= r["seconds"] <= r["high"]
    table = describe(result)
    for _, what in rows:
        assert what in table
    return result


@pytest.fixture
def here(monkeypatch):
    "No process for each step: that takes seconds of imports."
    for module in "bench", "benchmarks":
        monkeypatch.setattr(f"cmcgns.reporting.{module}.measure_apart", measure)


def test_head_against_its_reference(here):
    found = whole(bench_head((3, 5), 2, best=BEST, **SMALL), "head", [("ours", "head, B = 3"), ("ours", "head, B = 5"), ("reference", "head, B = 3")])
    (ratio,) = found["ratios"]
    fast, _, slow = found["rows"]
    assert ratio["b"] == 3 and ratio["seconds"] == slow["seconds"] / fast["seconds"]
    assert slow["bytes"] > fast["bytes"]


def test_memory_of_head_in_two_processes():
    "The slow side spreads N×N×D cosines, several at a time."
    sizes = dict(b=40, d=128, m=7, p=9, clusters=8)
    ours, slow = (measure_apart(head_step, dict(sizes, side=side), repeats=1, warmup=0, counted=False)["gb"] for side in ("ours", "reference"))
    spread = 4 * (40 * 7)**2 * 128 / 1e9
    assert ours < 2 * spread < 4 * spread < slow


@pytest.mark.parametrize("b,m,p,d,clusters", [(2, 1, 4, 16, 2), (6, 5, 3, 24, 12), (9, 2, 25, 8, 4)])
def test_slow_head_is_the_head(b, m, p, d, clusters):
    ours, slow = (head_step(b, m, p, d, clusters, side, norm=False) for side in ("ours", "reference"))
    for _ in range(3):
        torch.testing.assert_close(ours(), slow())
    torch.testing.assert_close(ours.patches.grad, slow.patches.grad, rtol=1e-4, atol=1e-5)


def test_slow_head_spreads_all_pairs_and_ours_does_not():
    sizes = dict(b=40, m=7, p=4, d=256, clusters=8)
    spread = 4 * (40 * 7)**2 * 256
    ours, slow = (count(head_step(side=side, **sizes))["bytes"] for side in ("ours", "reference"))
    assert ours < 3 * spread < 20 * spread < slow


def test_operations_of_attention_are_counted_backward_too():
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    product = 2 * 2 * 3 * 5 * 5 * 8
    assert count(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward())["flop"] == 7 * product # backward takes the first of the two again


def test_ratios_are_of_equal_settings_only():
    row = dict(side="ours", n=1, seconds=1., cpu=1., gb=1.)
    other = dict(row, side="slow", seconds=3., cpu=4., gb=0.)
    assert ratios([row, other]) == [dict(n=1, side="slow", seconds=3., cpu=4.)]
    assert ratios([row, dict(other, n=2)]) == []


def test_step_and_its_parts(here):
    found = whole(bench_step("tiny", [4], 2, best=BEST), "step", [("ours", "step of tiny, B = 4"), ("reference", "step of tiny, B = 4")])
    for row in found["rows"]:
        assert set(row["parts"]) == {"data", "images", "reports", "head", "rest"}
        assert .8 * row["seconds"] < sum(row["parts"].values()) < 1.2 * row["seconds"] or row["seconds"] < .05
    assert found["ratios"][0]["preset"] == "tiny" and found["rows"][0]["seconds_of_trainer"] > 0
    assert "pairs a second" in describe(found) and "a step of Trainer itself" in describe(found)


def test_a_step_of_each_method(here):
    found = whole(bench_methods("tiny", [4], 1, best=BEST), "methods", [("ours", f"{name}, stage {stage}, B = 4") for name, stage in
                                                                       [("cm-cgns", 1), ("cm-cgns", 2), ("convirt", 1), ("gloria", 1), ("mgca", 1), ("prior", 1), ("prior", 2)]])
    assert len({row["flop"] for row in found["rows"]}) == 7 # each computes something else
    assert "gloria, stage 1: data" in describe(found)


def test_second_stage_can_be_measured():
    step = CutStep("tiny", 4, stage=2)
    assert step().isfinite() and step.model.reconstruction is not None


def test_hub_encoders_have_shapes_here():
    from cmcgns.encoders import ENCODERS
    from cmcgns.pretraining import PRESETS
    hub = {p[k] for p in PRESETS.values() for k in ("image_encoder", "text_encoder")} - {n for kind in ENCODERS.values() for n in kind}
    assert hub == set(SHAPES) and set(SHAPES.values()) <= {n for kind in ENCODERS.values() for n in kind}


def test_steps_of_trainer_end_by_themselves():
    step = trained_step("tiny", 4, steps=4)
    step()
    assert step.notes(0)["parts"]["steps of Trainer"] > 0


def test_loading_features_and_probe(here):
    whole(bench_data("tiny", 2, best=BEST, films=3, size=80), "data", [("ours", "a batch from the cache"), ("reference", "decoding 80² PNG each time")])
    whole(bench_features("tiny", 2, best=BEST, n=6), "features", [("ours", "features of 6 images, tiny"), ("reference", "features of 6 images, tiny")])
    found = bench_probe("tiny", 1, best=BEST, n=300, sample=4, k=2)
    whole(found, "probe", [("ours", "15 layers on 300 features"), ("one by one", "15 layers on 300 features"), ("ours", "the whole probe"), ("every epoch again", "the whole probe")],
          ROW | {"cpu", "threads", "items"})
    together, alone, *estimates = found["rows"]
    assert together["epochs"] == alone["epochs"] and [r["estimated"] for r in estimates] == [True, True]
    assert "estimated from it" in describe(found) and [r["side"] for r in found["ratios"]] == ["one by one", "every epoch again"]


def test_main_reads_what_runs_took(tmp_path):
    for name, task, seconds in ("pretrain-0", "pretrain", 9.), ("classification-1", "classification", 2.), ("classification-2", "classification", 3.):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dict(task=task)))
        (folder / "environment.json").write_text(json.dumps(dict(seconds=seconds)))
    found = bench_main(runs=tmp_path, best=BEST)
    assert {r["what"]: r["seconds"] for r in found["rows"]} == {"pretrain, 1 run": 9., "classification, 2 runs": 5.}
    assert describe(found)


def test_command(here, monkeypatch, tmp_path):
    monkeypatch.setattr("cmcgns.reporting.benchmarks.ceilings_apart", lambda device, threads: BEST)
    done = CliRunner().invoke(app, ["bench", "features", "--preset", "tiny", "--repeats", "1", "--no-reference", "--device", "cpu", "--json", str(tmp_path / "b.json")])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["bench"] == "features" and done.stdout.strip() == describe(found).strip()


def test_options_that_a_benchmark_does_not_have_are_refused():
    with pytest.raises(ValueError, match="bench head has no preset"): bench("head", preset="tiny")
    with pytest.raises(ValueError, match="bench data has no runs"): bench("data", runs="x")
