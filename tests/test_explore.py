"The explore pages: widgets driven in this process, and the pages themselves in JupyterLab, in a headless browser where there is one."
import csv
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from urllib.request import urlopen

import numpy as np
import pytest
from conftest import ROOT, one_sentence
from PIL import Image

from cmcgns.clustering import NegativeSampler, ReportContrast
from cmcgns.reporting.explore import (LIVELY, ROLES, TOLD, AttentionExplorer, ClusterExplorer, ReconstructionExplorer, bars, changes_for, describe_negatives, look, make_spots,
                                      map_sentences, nearest_in, open_run, open_table, others_of, read_table, rebuild, relations_of, richest, roles_of, spoken_of, tell_rules,
                                      with_reports)

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("explore")] # one worker: they share a run, and a JupyterLab
PAGES = sorted((ROOT / "nbs" / "explore").glob("*.ipynb"))
WIDGETS = {"explore_attention": "AttentionExplorer", "explore_clusters": "ClusterExplorer", "explore_reconstruction": "ReconstructionExplorer"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MISSING = [name for name, there in [("a Chromium (Debian: apt install chromium)", CHROMIUM), ("playwright (pip install playwright)", find_spec("playwright")),
                                    ("jupyterlab", find_spec("jupyterlab"))] if not there]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("explore")
    return place / "runs", place / "cache"


@pytest.fixture(scope="module")
def opened(folders):
    return open_run(*folders, **LIVELY)


@pytest.fixture(scope="module")
def chart(opened):
    return map_sentences(opened, n=12, method="pca")


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), float)


def changes(widget, value, *shown):
    "Whether setting a widget's value changes all that is shown."
    before = [w.value for w in shown]
    widget.value = value
    return all(w.value != b for w, b in zip(shown, before))


# What is looked up

def test_a_run_is_found_by_its_settings_and_by_its_name(opened, folders):
    assert open_run(*folders, **LIVELY).run == opened.run and open_run(*folders, name=opened.run.folder.name).run == opened.run
    assert changes_for("tiny") == LIVELY and changes_for("laptop") == {} and changes_for("tiny", '{"lr": 1}') == {"lr": 1}
    with pytest.raises(ValueError, match="unknown preset 'large'"):
        open_run(*folders, preset="large")
    with pytest.raises(ValueError, match="unknown field 'lrr'"):
        open_run(*folders, lrr=1)


def test_a_run_of_another_kind_is_refused(opened, folders):
    from cmcgns.pretraining import Settings
    from cmcgns.reporting.experiments import Question, evaluate_run
    settings = Settings(**opened.run.config["settings"])
    run = evaluate_run(opened.problem, settings, opened.run, folders[0], Question("retrieval"))
    with pytest.raises(ValueError, match="is a run of retrieval: name a pretrain run"):
        open_run(*folders, name=run.folder.name)


def test_what_cannot_be_explored_is_said_in_a_sentence(opened, folders, tmp_path):
    with pytest.raises(ValueError, match="the run pretrain-1 is wanted, and its folder of runs is not there: name the folder, too"):
        open_run(tmp_path / "none", folders[1], name="pretrain-1")
    silent = opened.problem._replace(studies=[replace(s, sentences=(), meanings=()) for s in opened.problem.studies])
    with pytest.raises(ValueError, match="no test study of synthetic has a report"): with_reports(opened._replace(problem=silent))


def test_data_that_are_not_there_are_asked_for_by_the_parameters_of_a_page(tmp_path):
    for home, said in [("synthetic table", ", a table of its owner's own: read it with"), ("covid_cxr", ": give the folder of covid_cxr \\(`data_root`\\), or")]:
        folder = tmp_path / f"pretrain-{home[:5]}"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(dict(task="pretrain", data=dict(dataset=home))))
        with pytest.raises(ValueError, match=f"{folder.name} was trained on {home}{said}"):
            open_run(tmp_path, tmp_path, name=folder.name)


def test_a_sampler_is_described_as_it_is():
    def rules(**options):
        return tell_rules(ReportContrast(NegativeSampler(8, clusters=2), **options))
    assert rules() == "clustered are sentences as the image tells them; each asks as it stands; hard and false negatives were on in training"
    assert rules(cluster="single-modal", asks="clustered", hard=False) == "clustered are sentences as they stand; each asks as it is clustered; hard negatives are shown, but were off in training"
    assert rules(hard=False, false=False).endswith("hard negatives and false negatives are shown, but were off in training") and rules(cluster="none").startswith("this run clusters nothing")


def test_sentences_beyond_the_tokens_are_counted_and_boxes_known_by_name_are_called_so(opened):
    from cmcgns.text import encode_reports, load_tokenizer
    tokenizer, at = load_tokenizer(opened.run.folder / "tokenizer"), richest(opened)
    short = opened._replace(tokenize=lambda reports: encode_reports(tokenizer, reports, 16))
    seen, study = look(short, at), opened.problem.studies[at]
    assert 0 < len(seen.sentences) < len(study.sentences) == len(seen.sentences) + seen.beyond and look(opened, at).beyond == 0
    assert f"{seen.beyond} more sentences of this report are beyond" in AttentionExplorer(short, at).caption.value
    assert short.n_read(at) == len(seen.sentences) < opened.n_read(at) == len(study.sentences)
    assert max(sum(map(bool, look(short, i).outlines)) for i in opened.test) == sum(map(bool, look(short, richest(short)).outlines)) > 0
    chart = map_sentences(short, n=12, method="pca")
    assert chart.beyond == sum(look(short, i).beyond for i in opened.test[:12]) > 0 and f"{chart.beyond} more sentences of these reports are beyond" in ClusterExplorer(chart, "synthetic").legend.value
    named = [replace(s, meanings=()) if i == at else s for i, s in enumerate(opened.problem.studies)]
    for problem, said in (opened.problem, "where its finding is"), (opened.problem._replace(studies=named), "be it denied or not"):
        assert said in AttentionExplorer(opened._replace(problem=problem), at).caption.value


def test_differences_keep_their_colours(opened):
    explorer = ReconstructionExplorer(opened, 2)
    worst = explorer.worst
    explorer.share.value = 1.
    assert explorer.worst == worst > 0 and (rebuild(opened, opened.test[:2]).hidden == rebuild(opened, opened.test[:2], opened.run.config["settings"]["mask_share"]).hidden).all()


def test_reconstruction_hides_as_the_run_did(opened, monkeypatch):
    monkeypatch.setattr(opened.model.reconstruction, "by", "channel")
    done, ui = rebuild(opened, opened.test[:2]), ReconstructionExplorer(opened, films=2)
    assert done.hidden is None and done.error == pytest.approx(np.abs(done.rebuilt - done.films).mean(), abs=1e-6)
    assert "50% of the channels hidden" in ui.words.value and "L1 of all pixels" in ui.words.value and changes(ui.share, .75, ui.picture, ui.words)


def test_attention_is_that_of_the_model(opened):
    import torch
    at = richest(opened)
    seen, study = look(opened, at), opened.problem.studies[at]
    assert sum(map(bool, seen.outlines)) == sum(bool(spoken_of(study, k)) for k in range(len(study.sentences))) > 0
    with torch.no_grad():
        report, regions = opened.model.encode_reports(**opened.reports([at])), opened.model.encode_images(opened.films([at])).local
        q = opened.model.attention.sentence_qkv(report.local[0]).split(report.local.shape[-1], -1)[0]
        k = opened.model.attention.patch_qkv(regions[0]).split(regions.shape[-1], -1)[1]
    assert np.allclose(seen.to_regions, torch.sigmoid(q @ k.T / q.shape[-1]**.5).numpy(), atol=1e-5)


def test_roles_are_what_a_plain_loop_says(chart):
    n = chart.named
    for i in range(len(chart.texts)):
        for j, role in enumerate(roles_of(chart, i)):
            false, near = n.own[j] == n.own[i], n.member[j] == n.second[i]
            assert role == ("itself" if i == j else "both" if false and near else "false negative" if false else "around the hard negative" if near else "other")
    rows = describe_negatives(chart, 0, most=2)
    assert rows[0]["role"] == "itself" and len(rows) <= 7 and {r["role"] for r in rows} <= set(ROLES)
    near = [float(r["cosine"]) for r in rows if r["role"] == "false negative"]
    assert near == sorted(near, reverse=True) and len(nearest_in(chart, 0, "other", 3)) <= 3
    assert (relations_of(chart, 0) == "same").sum() >= 1


def test_hidden_regions_nest_and_the_report_matters(opened):
    at = opened.test[:2]
    done = [rebuild(opened, at, share) for share in (0, .25, .5, 1)]
    assert [d.hidden.mean() for d in done] == [0, .25, .5, 1] and all((b.hidden >= a.hidden).all() for a, b in zip(done, done[1:]))
    assert len({rebuild(opened, at, .5, told).rebuilt.tobytes() for told in TOLD}) == 3 and len({rebuild(opened, at, draw=d).hidden.tobytes() for d in range(3)}) == 3
    error = np.abs(done[3].rebuilt - done[3].films).mean()
    assert done[3].error == pytest.approx(error, abs=1e-6) and np.isnan(done[0].error)
    assert all(opened.problem.studies[i].patient != opened.problem.studies[j].patient for i, j in zip(at, others_of(opened, at)))


def test_a_model_of_another_objective_is_refused(folders):
    other = open_run(*folders, objective="convirt", stage1_epochs=1, stage2_epochs=0)
    for call, said in [(lambda: look(other, other.test[0]), "objective convirt: only cm-cgns has this attention"), (lambda: map_sentences(other), "only cm-cgns has a sampler"),
                       (lambda: rebuild(other, other.test[:1]), "objective convirt: only the decoder of cm-cgns is asked"), (lambda: ReconstructionExplorer(other), "only the decoder of cm-cgns is asked")]:
        with pytest.raises(ValueError, match=said):
            call()


# Widgets

def test_attention_answers(opened):
    ui = AttentionExplorer(opened)
    other = next(k for _, k in ui.sentence.options if k != ui.sentence.value)
    assert changes(ui.sentence, other, ui.film, ui.caption)
    film = ui.film.value
    ui.spots[7].click()
    assert ui.region.value == 7 and ui.film.value != film and np.abs(pixels(ui.film.value) - pixels(film)).max() > 50
    assert changes(ui.region, 3, ui.told, ui.film)
    assert changes(ui.study, next(i for _, i in ui.study.options if i != ui.study.value), ui.film, ui.told, ui.caption)
    assert "synthetic data, no patients" in ui.caption.value and pixels(ui.film.value).shape == (288, 288, 3)


def test_spots_lie_on_their_regions(opened):
    ui = AttentionExplorer(opened)
    rows, columns = ui.seen.grid
    places = [tuple(float(getattr(s.layout, k).rstrip("%")) / 100 for k in ("left", "top", "width", "height")) for s in ui.spots]
    assert len(places) == rows * columns and places[columns + 1] == (1 / columns, 1 / rows, 1 / columns, 1 / rows)
    for region in 0, columns + 1, rows * columns - 1: # the frame of a region is drawn where its button is
        ui.region.value = (region + 1) % len(places)
        before = pixels(ui.film.value)
        ui.region.value = region
        left, top, width, height = (round(288 * v) for v in places[region])
        changed = np.abs(pixels(ui.film.value) - before).max(-1) > 40
        assert changed[max(0, top - 3):top + height + 3, max(0, left - 3):left + width + 3].any()


def test_clusters_answer(chart):
    ui = ClusterExplorer(chart, "synthetic")
    start = ui.sentence.value
    other = next(j for j in range(len(chart.texts)) if chart.named.own[j] != chart.named.own[start])
    colours = [s.style.button_color for s in ui.spots]
    words, films = ui.words.value, ui.films.value
    ui.spots[other].click()
    assert ui.sentence.value == other and ui.words.value != words and ui.films.value != films and [s.style.button_color for s in ui.spots] != colours
    assert [s.style.button_color for s in ui.spots] == [ROLES[r] for r in roles_of(chart, other)] and ui.spots[other].layout.width == "15px"
    assert changes(ui.by, "meaning", ui.legend) and changes(ui.by, "cluster it falls into", ui.legend)
    assert "synthetic data, no patients" in ui.legend.value and [s.tooltip for s in ui.spots] == chart.texts
    assert chart.rules in ui.legend.value and "of variance) × component 2" in ui.legend.value and "without a meaning" not in ui.legend.value and "beyond" not in ui.legend.value
    ui.by.value = "role"
    ui.sentence.value = start
    assert ui.words.value == words and ui.films.value == films


def test_reconstruction_answers(opened):
    ui = ReconstructionExplorer(opened, films=2)
    for widget, value in (ui.share, .75), (ui.draw_number, 3), (ui.first, 4), (ui.told, TOLD[2]):
        assert changes(widget, value, ui.picture), widget
    ui.share.value = 1
    assert "16 of 16 regions hidden" in ui.words.value
    ui.share.value = 0
    assert "nothing is hidden" in ui.words.value


def test_text_is_text():
    assert "<script>" not in bars(["<script>"], [.5]) and [s.tooltip for s in make_spots([("0", "0", "1px", "1px")], ["<b>"], print)] == ["<b>"]


# A table of one's own

def test_a_table_with_other_columns_quotes_and_no_patients(tmp_path):
    for i in range(12):
        Image.fromarray(np.full((20, 20), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
    with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8-sig") as f:
        csv.writer(f).writerows([("age", "report", "image", "high"), *((30, 'Lungs: "clear", no effusion.\nHeart is normal.', f"{i}.png", "" if i == 3 else i % 2) for i in range(12))])
    found = read_table(tmp_path / "t.csv", tmp_path, ["high"])
    assert len(found.studies) == 12 and not found.skipped and found.studies[3].labels == {"high": None} and found.studies[0].patient == "0.png"
    assert found.studies[0].sentences == ("lungs clear no effusion", "heart is normal")
    problem = open_table(found, tmp_path / "cache", 32)
    assert problem.images.shape == (12, 32, 32) and problem.name == "own table" and sum(problem.split.counts().values()) == 12


@pytest.mark.parametrize("wrong,said", [
    ("semicolons", "column 'image' is missing, the columns are image;report;patient; the table needs a header with the columns image and report, separated by commas"),
    ("other folder", "0 studies; rows skipped: 12 image file is missing: there is no study to learn from; give the folder that the names in the column image start from"),
    ("no endings", "write them with their endings, like film.png"),
    ("broken films", "none of 12 images can be read, the first is"),
    ("latin-1", ""),
], ids=lambda x: x if len(x) < 15 else "said")
def test_the_page_says_in_a_sentence_what_is_wrong_with_a_table(wrong, said, tmp_path):
    "Its cells down to the studies made ready, on tables as spreadsheets write them."
    films = tmp_path / "films"
    films.mkdir()
    for i in range(12):
        Image.fromarray(np.full((20, 20), 20 * i, np.uint8)).save(films / f"{i}.png")
        if wrong == "broken films":
            (films / f"{i}.png").write_bytes(b"no image")
    with open(tmp_path / "t.csv", "w", newline="", encoding="latin-1") as f:
        ending = "" if wrong == "no endings" else ".png"
        csv.writer(f, delimiter=";" if wrong == "semicolons" else ",").writerows([("image", "report", "patient"), *((f"{i}{ending}", "Kein Erguß, no effusion.", i) for i in range(12))])
    space = {}

    def run():
        for kind, tags, source, _ in sources(ROOT / "nbs" / "explore" / "bring_your_own_data.ipynb"):
            if kind == "code":
                exec(source, space)
            if "parameters" in tags:
                space.update(table=str(tmp_path / "t.csv"), images=str(tmp_path if wrong == "other folder" else films))
            if "problem" in space:
                break
    if said:
        with pytest.raises(ValueError) as error:
            run()
        assert said in one_sentence(error)
    else:
        run()
        assert len(space["problem"].studies) == 12


# The pages

def sources(page):
    return [(c["cell_type"], c["metadata"].get("tags", []), "".join(c["source"]), c.get("outputs", [])) for c in json.loads(page.read_text(encoding="utf-8"))["cells"]]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_page_can_be_read_without_a_kernel(page):
    "Figures of modest size, no widgets, no progress; what is shown as a widget also stands still."
    cells = sources(page)
    outputs = [o for _, _, _, out in cells for o in out]
    pictures = [d for o in outputs for k, d in o.get("data", {}).items() if k.startswith("image/")]
    assert pictures and max(map(len, pictures)) < 140_000 and not any("widget" in k for o in outputs for k in o.get("data", {}))
    assert not any(o.get("name") == "stderr" for o in outputs) and not any("#| export" in s for _, _, s, _ in cells)


@pytest.mark.parametrize("page", [p for p in PAGES if p.stem != "synthetic_gallery"], ids=lambda p: p.stem)
def test_page_has_typed_parameters(page):
    tagged = [s for _, tags, s, _ in sources(page) if "parameters" in tags]
    assert len(tagged) == 1 and all(re.fullmatch(r"\w+: \w+ = .+ # .+", line) for line in tagged[0].splitlines())
    if page.stem in WIDGETS:
        assert f"{WIDGETS[page.stem]}(" in "".join(s for _, _, s, _ in sources(page))


# JupyterLab in a headless browser

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def keep_settings(home, name, settings):
    "The settings of JupyterLab's plugin `name`, as its settings editor keeps them."
    path = home / "jupyter_config_dir" / "lab" / "user-settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings))


def set_parameters(page, **values):
    "Write values into the cell at the top of a page, as a reader does; a page without such a parameter is left as it is."
    text = page.read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"{name}: str = '' #", json.dumps(f"{name}: str = {str(value)!r} #", ensure_ascii=False)[1:-1])
    page.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def lab(tmp_path_factory, opened, folders):
    "The address of a JupyterLab on a copy of the explore pages, which find the run of these tests; what else they train, they train briefly."
    if MISSING:
        pytest.skip(f"the pages are not opened in a browser: {' and '.join(MISSING)} not found")
    home = tmp_path_factory.mktemp("lab")
    shutil.copytree(ROOT / "nbs" / "explore", home / "pages", ignore=shutil.ignore_patterns(".*"))
    brief = LIVELY | dict(stage1_epochs=2, stage2_epochs=1)
    for page in (home / "pages").glob("*.ipynb"):
        shared = page.stem in ("quickstart", *WIDGETS)
        set_parameters(page, runs=folders[0], cache=folders[1], changes=json.dumps(LIVELY if shared else brief))
    keep_settings(home, "notebook-extension/tracker", dict(windowingMode="none")) # all cells are there to be looked at
    keep_settings(home, "apputils-extension/notification", dict(fetchNews="false", checkForUpdates=False))
    port, own = free_port(), {k: str(home / k.lower()) for k in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}", "--ServerApp.ip=127.0.0.1", f"--ServerApp.root_dir={home / 'pages'}",
               "--IdentityProvider.token=", "--ServerApp.password="]
    with open(home / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own) as server:
        try:
            for _ in range(240):
                try:
                    urlopen(f"http://127.0.0.1:{port}/api", timeout=2)
                    break
                except OSError:
                    assert server.poll() is None, (home / "log").read_text()[-2000:]
                    time.sleep(.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def browser(lab):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"])
        yield chromium
        chromium.close()


PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(p => p.textContent)"
FAILED = "[data-mime-type='application/vnd.jupyter.error']"
END_KERNELS = """async () => {
  const headers = {'X-XSRFToken': (document.cookie.match(/_xsrf=([^;]+)/) || [])[1]};
  for (const s of await (await fetch('/api/sessions')).json()) await fetch('/api/sessions/' + s.id, {method: 'DELETE', headers});
}"""


@contextmanager
def open_page(browser, lab, name):
    "A page in JupyterLab with all of its cells run, none of them in vain."
    tab = browser.new_page(viewport=dict(width=1300, height=1500))
    tab.goto(f"{lab}/doc/tree/{name}.ipynb?reset", timeout=120_000)
    tab.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=120_000)
    for _ in range(20): # what is asked before the kernel is connected is lost
        tab.wait_for_timeout(2000)
        tab.get_by_role("menuitem", name="Run", exact=True).click()
        tab.get_by_text("Run All Cells", exact=True).click()
        tab.wait_for_timeout(1000)
        if tab.evaluate(f"() => {PROMPTS}.some(t => /[*]|[0-9]/.test(t))"):
            break
    tab.wait_for_function(f"() => {PROMPTS}.some(t => /[0-9]/.test(t)) && !{PROMPTS}.some(t => t.includes('*'))", timeout=400_000)
    tab.wait_for_timeout(500)
    assert not tab.locator(FAILED).count(), tab.locator(FAILED).first.text_content()[-2000:]
    cells = sum(kind == "code" and bool(source.strip()) for kind, _, source, _ in sources(ROOT / "nbs" / "explore" / f"{name}.ipynb"))
    assert [int(t.strip(" []:")) for t in tab.evaluate(f"() => {PROMPTS}") if re.search("[0-9]", t)] == list(range(1, cells + 1))
    yield tab
    tab.evaluate(END_KERNELS)
    tab.close()


def shot(tab, name, at=None):
    "Keep a screenshot where a person may look at it, from the cell of the widget on."
    if folder := os.environ.get("CMCGNS_SCREENSHOTS"):
        if at:
            tab.locator(at).first.evaluate("e => e.closest('.jp-Cell').scrollIntoView()")
            tab.wait_for_timeout(300)
        tab.screenshot(path=f"{folder}/{name}.png")


def source_of(tab, selector):
    return tab.locator(selector).first.get_attribute("src", timeout=240_000)


def until_other(tab, selector, before):
    "Wait until a picture is another one."
    tab.wait_for_function("([s, b]) => { const i = document.querySelector(s); return i && i.src != b }", arg=[selector, before], timeout=60_000)


def test_attention_in_the_browser(browser, lab):
    with open_page(browser, lab, "explore_attention") as tab:
        film, words = ".cmcgns-stage img", tab.locator(".widget-html-content").filter(has_text="How much the chosen region weighs")
        tab.wait_for_selector(film, timeout=240_000)
        before, said = source_of(tab, film), words.text_content()
        shot(tab, "attention-1", film)
        tab.locator(".cmcgns-spot").nth(6).click()
        until_other(tab, film, before)
        assert "row 2, column 3" in words.text_content() and words.text_content() != said
        before = source_of(tab, film)
        tab.locator(".widget-select select").last.select_option(index=2)
        until_other(tab, film, before)
        shot(tab, "attention-2", film)


def test_clusters_in_the_browser(browser, lab):
    with open_page(browser, lab, "explore_clusters") as tab:
        films = ".widget-image"
        tab.wait_for_selector(".cmcgns-dot", timeout=240_000)
        before = source_of(tab, films)
        shot(tab, "clusters-1", films)
        tab.locator(".cmcgns-dot").nth(100).click(force=True)
        until_other(tab, films, before)
        shot(tab, "clusters-2", films)


def test_reconstruction_in_the_browser(browser, lab):
    with open_page(browser, lab, "explore_reconstruction") as tab:
        picture = ".widget-image"
        tab.wait_for_selector(picture, timeout=240_000)
        before = source_of(tab, picture)
        shot(tab, "reconstruction-1", picture)
        handle = tab.locator(".widget-slider .noUi-handle").first
        handle.focus()
        for _ in range(4):
            handle.press("ArrowRight")
        until_other(tab, picture, before)
        tab.locator(".widget-html-content").filter(has_text="12 of 16 regions hidden").wait_for(timeout=60_000)
        shot(tab, "reconstruction-2", picture)


@pytest.mark.parametrize("name", [p.stem for p in PAGES if p.stem not in WIDGETS])
def test_page_runs_in_the_browser(browser, lab, name):
    with open_page(browser, lab, name) as tab:
        assert tab.locator(".jp-OutputArea img").count()
        shot(tab, name)
