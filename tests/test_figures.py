"The figure pages at preset tiny, before and after clustering has started: files, words, and numbers against second computations."
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from cmcgns.evaluation.cluster_audit import know_sentences
from cmcgns.image import centre_crop, normalise
from cmcgns.reconstruction import mask_regions
from cmcgns.reporting.experiments import load_run
from cmcgns.reporting.pages import run_page
from cmcgns.reporting.plan import OURS, Reproduction, job_of, run_jobs

pytestmark = pytest.mark.slow
STARTED = dict(cluster_start=1.) # clusters from the first batch on
OWN = dict(figure_audit=dict(batch_size=16, batches=4, warm_up=6), figure_clusters=dict(n=20), figure_reconstruction=dict(n=2, films=12, draws=2))
PICTURES = dict(
    figure_training=['figure_training'], figure_attention=['figure_attention_regions', 'figure_attention_sentences'], figure_audit=['figure_audit'],
    figure_reconstruction=['figure_reconstruction', 'figure_reconstruction_by'],
    figure_clusters=['figure_clusters_plain_tsne', 'figure_clusters_plain_umap', 'figure_clusters_told_tsne', 'figure_clusters_told_umap'])


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    "Runs and cache of all pages."
    return tmp_path_factory.mktemp("figures")


@pytest.fixture(scope="session")
def show(folder):
    "Run a page once; what it left."
    done = {}

    def run(name, **changes):
        key = name, json.dumps(changes)
        if key not in done:
            place = folder / f"{name}-{len(done)}"
            page = run_page(name, place, preset="tiny", runs=str(folder / "runs"), cache=str(folder / "cache"), changes=json.dumps(changes), **OWN.get(name, {}))
            outputs = [o for c in json.loads(page.read_text())["cells"] for o in c.get("outputs", [])]
            done[key] = SimpleNamespace(
                place=place, result=json.loads((place / "result.json").read_text()), pictures=sum("image/png" in o.get("data", {}) for o in outputs),
                words="\n".join("".join(o["data"]["text/markdown"]) for o in outputs if "text/markdown" in o.get("data", {})))
        return done[key]
    return run


@pytest.fixture(scope="session")
def opened(folder):
    "The reproduction, its model and its run, as the pages see them."
    def load(**changes):
        r = Reproduction("tiny", None, folder / "runs", folder / "cache", changes=changes)
        job = job_of(r, OURS, 42)
        run = run_jobs(r, [job], progress=False)[job.name]
        return r.problem("corpus"), *load_run(run), run
    return load


def check_pictures(page, names):
    "A PNG and a PDF of each, and no other; what is shown is what is saved."
    assert sorted(p.name for p in page.place.glob("*.p[nd][gf]")) == sorted(f"{n}.{end}" for n in names for end in ("pdf", "png"))
    assert page.pictures == len(names)
    for name in names:
        with Image.open(page.place / f"{name}.png") as image:
            assert min(image.size) > 300 and len(np.unique(np.asarray(image.convert("L")))) > 20
        pdf = (page.place / f"{name}.pdf").read_bytes()
        assert pdf.startswith(b"%PDF") and b"CreationDate" not in pdf


@pytest.mark.parametrize("name", PICTURES)
def test_page_leaves_its_pictures_and_says_that_they_are_synthetic(show, name):
    page = show(name, **STARTED)
    check_pictures(page, PICTURES[name] + (["figure_clusters_sentence"] if name == "figure_clusters" else []))
    assert page.result["page"] == name and page.result["data"]["corpus"]["name"] == "synthetic"
    assert any(run["task"] == "pretrain" for run in page.result["runs"].values())
    assert page.result["note"].startswith("Synthetic data, no patients") and page.result["note"] in page.words
    for table in page.place.glob("*.md"):
        assert "Synthetic data, no patients" in table.read_text()


@pytest.mark.parametrize("name", ["figure_training", "figure_audit"])
def test_a_model_without_clusters_is_told_in_words(show, name):
    page = show(name)
    check_pictures(page, PICTURES[name])
    assert "not started" in page.words and "nan" not in page.words
    if name == "figure_audit":
        assert all(d["precision meaning"] == "not both started" for d in page.result["differences"])


def test_a_model_without_a_decoder_is_told_in_words(show):
    page = show("figure_reconstruction", stage2_epochs=0)
    check_pictures(page, [])
    assert "it has no decoder" in page.words and page.result["rows"] == []


def test_names_that_are_not_there_are_refused(folder, tmp_path):
    common = dict(preset="tiny", runs=str(folder / "runs"), cache=str(folder / "cache"))
    with pytest.raises(Exception, match="no test study with a report is called 'nobody'"):
        run_page("figure_attention", tmp_path, study="nobody", **common)
    with pytest.raises(ValueError, match="figure_attention.ipynb has no parameter 'sentence': known are"):
        run_page("figure_attention", tmp_path, sentence="effusion", **common)


def test_training_tells_when_the_sampler_started(show, opened):
    log = opened(**STARTED)[3].metrics["logs"]["stage1"]
    first = next(row["step"] for row in log if row.get("margin_loss"))
    assert first < 8 and show("figure_training", **STARTED).result["rows"][0]["sampler"] in (f"first used at step {first}", f"first used in steps 1 to {first}")
    assert show("figure_training").result["rows"][0]["sampler"].startswith("not started in 12 steps")


def test_clusters_name_what_a_plain_loop_names(show, opened):
    page, (problem, model, tokenize, _) = show("figure_clusters", **STARTED), opened(**STARTED)
    studies = [problem.studies[i] for i in problem.rows("test", lambda s: bool(s.sentences))[:20]]
    centroids, plain, texts, place = model.contrast.sampler.centroids, [], [], []
    with torch.no_grad():
        for i, s in enumerate(studies): # one report at a time
            report = model.encode_reports(**tokenize([list(s.sentences)]))
            plain += list(report.local[0][:len(s.sentences)])
            texts += s.sentences
            place += [(i, k) for k in range(len(s.sentences))]
    order = [[float(F.cosine_similarity(x, c, dim=0)) for c in centroids] for x in plain]
    own = [int(np.argmax(o)) for o in order]
    known = know_sentences(studies, *np.array(place).T)
    chosen = next(i for i in range(len(own)) if own.count(own[i]) > 1 and known.said[known.meaning[i]].polarity == 1)
    assert page.result["sentence"] == texts[chosen]
    named = {(i, j) for i in range(len(own)) for j in range(len(own)) if i != j and own[i] == own[j]}
    same = {(i, j) for i, j in named if studies[place[i][0]] is studies[place[j][0]]}
    row = next(a for a in page.result["agreement"] if (a["measure"], a["truth"]) == ("precision", "same report"))
    assert row["value"] == f"{len(same) / len(named):.3f}" and row["pairs"] == f"{len(named):g}"
    false = [j for i, j in named if i == chosen]
    listed = [r["text"] for r in page.result["rows"] if r["role"].startswith("false negative")]
    assert f"Of its {len(false)} false negatives" in page.result["words"] and set(listed) <= {texts[j] for j in false} and len(listed) >= min(12, len(false))


def test_attention_is_a_sigmoid_of_products(show, opened):
    page, (problem, model, tokenize, _) = show("figure_attention", **STARTED), opened(**STARTED)
    at = next(i for i, s in enumerate(problem.studies) if s.id == page.result["study"])
    with torch.no_grad():
        report = model.encode_reports(**tokenize([list(problem.studies[at].sentences)])).local[0]
        regions = model.encode_images(normalise(centre_crop(torch.from_numpy(problem.images[[at]]), model.config.image_size))).local[0]
        d = report.shape[-1]
        q, k = model.attention.sentence_qkv(report)[:, :d], model.attention.patch_qkv(regions)[:, d:2 * d]
    for x, row in zip(q.numpy(), page.result["rows"], strict=True):
        weights = [1 / (1 + np.exp(-float(x @ y) / d**.5)) for y in k.numpy()]
        assert row["least weight"] == f"{min(weights):.3f}" and row["greatest"] == f"{max(weights):.3f}"
    assert sum(row["regions that weigh it most"] for row in page.result["rows"]) == len(k)
    asked = {row["outlined"] for row in page.result["rows"]} - {"–"}
    assert asked and {x for a in asked for x in a.split(", ")} <= {b.label for b in problem.studies[at].boxes}


def test_rebuilding_is_measured_on_hidden_pixels(show, opened):
    page, (problem, model, tokenize, _) = show("figure_reconstruction", **STARTED), opened(**STARTED)
    at, errors = problem.rows("test", lambda s: bool(s.sentences))[:12], {"its own report": [], "nothing": [], "the mean training film": []}
    crop = lambda i: normalise(centre_crop(torch.from_numpy(problem.images[i][None]), model.config.image_size))
    mean = torch.stack([crop(i) for i in problem.rows("train")]).mean(0)
    h, w = model.image_encoder.grid
    with torch.no_grad():
        regions = torch.cat([model.encode_images(crop(i)).local for i in at])
        for draw in range(2):
            masked, hidden = mask_regions(regions, model.config.mask_share, torch.Generator().manual_seed(draw))
            for n, i in enumerate(at):
                report = model.encode_reports(**tokenize([list(problem.studies[i].sentences)]))
                told = model.attention(report.local, regions[[n]], report.exists)[1]
                out = {"its own report": model.reconstruction.decoder(masked[[n]], told), "nothing": model.reconstruction.decoder(masked[[n]], told * 0), "the mean training film": mean}
                film, side = crop(i)[0, 0].numpy(), model.config.image_size
                where = np.array([[bool(hidden[n, y * h // side * w + x * w // side]) for x in range(side)] for y in range(side)])
                for name, v in out.items():
                    errors[name].append(np.abs(v[0, 0].numpy() - film)[where].mean())
    found = {row["name"]: row for row in page.result["rows"] if row["quantity"].startswith("L1 of hidden pixels")}
    for name, values in errors.items():
        assert found[name]["value"] == pytest.approx(np.mean(values), abs=1e-4) and found[name]["low"] <= found[name]["value"] <= found[name]["high"]
        assert (found[name]["n"], found[name]["draws"]) == (12, 2)
    minus = next(row for row in page.result["rows"] if row["quantity"].startswith("the same") and row["name"] == "nothing")
    assert minus["value"] == pytest.approx(found["nothing"]["value"] - found["its own report"]["value"], abs=1e-6)
    assert len(page.result["words"]) == 1 and "12 films" in page.result["words"][0]


def test_audit_is_a_run_and_its_differences_are_those_of_its_values(show, folder):
    page = show("figure_audit", **STARTED)
    kept = [name for name, run in page.result["runs"].items() if run["task"] == "audit"]
    assert len(kept) == 1 and (folder / "runs" / kept[0] / "metrics.json").exists()
    rows = json.loads((folder / "runs" / kept[0] / "metrics.json").read_text())["rows"]
    at = {(r["weights"], r["cluster"], r["metric"]): r["value"] for r in rows if (r["source"], r["asks"], r["truth"]) == ("replayed", "sentence", "meaning")}
    assert {d["weights"] for d in page.result["differences"]} == {"start", "stage 1", "stage 2"}
    for d in page.result["differences"]:
        w = d["weights"].replace("stage ", "stage")
        for metric in "precision", "recall", "hard_rank":
            assert d[f"{metric} meaning"].startswith(f"{at[w, 'cross-modal', metric] - at[w, 'single-modal', metric]:+.3f}")
    share = next(r for r in rows if (r["source"], r["metric"], r["truth"]) == ("batches", "false_share", "meaning"))
    assert page.result["false_share"]["value"] == share["value"] and f"{100 * share['value']:.1f} %" in page.words
