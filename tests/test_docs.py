"The documentation builds offline and without a warning, nothing in it comes from outside, and it says all that the pages and the sources say."
import importlib
import inspect
import json
import pkgutil
import re
import runpy
import shutil
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow
PAGES = sorted(p.relative_to(ROOT).with_suffix("") for p in (ROOT / "nbs").glob("[!.]*/*.ipynb"))
MISSING = [name for name in ("sphinx", "myst_nb", "furo", "sphinx-mathjax-offline", "fastcore") if find_spec(name) is None]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
OFFLINE = """
import runpy, socket, sys
def refuse(*args, **kwargs): raise OSError(f"the documentation reaches for {args[1:]}")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class Page(HTMLParser):
    "What stands on one page of the site: text, identifiers, links, what is loaded, formulas and pictures."
    LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "embed": "src", "object": "data", "source": "src", "video": "src", "audio": "src"}

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.words, self.counts = set(), [], [], [], defaultdict(int)
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids |= {attrs[k] for k in ("id", "name") if attrs.get(k)}
        self.counts[tag, *(attrs.get("class") or "").split()[:1]] += 1
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        if attrs.get(self.LOADS.get(tag)):
            self.loads.append(attrs[self.LOADS[tag]])

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if MISSING:
        pytest.skip(f"the extra [docs] is not installed ({', '.join(MISSING)}): make docs")
    out = tmp_path_factory.mktemp("docs") / "site"
    done = subprocess.run([sys.executable, "-c", OFFLINE, str(ROOT / "docs" / "build.py"), str(out)], cwd=out.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "warning" not in done.stderr.lower(), done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def read(site):
    "The pages of the site by name."
    return {p.relative_to(site).as_posix(): Page(p) for p in site.rglob("*.html")}


@pytest.fixture(scope="module")
def builder():
    return runpy.run_path(str(ROOT / "docs" / "build.py"))


def follow(name, link):
    "The page and the place on it that a link leads to; None for the world outside."
    if re.match(r"[a-z]+:|//", link):
        return None
    target, _, anchor = link.partition("#")
    path = (Path("/") / Path(name).parent / unquote(target.split("?")[0])).resolve() if target else Path("/") / name
    return path.relative_to("/").as_posix(), unquote(anchor)


def test_every_page_is_reached_from_the_first(read):
    reached, new = set(), {"index.html"}
    while new:
        reached |= new
        new = {f[0] for name in new for f in (follow(name, link) for link in read[name].links) if f} & set(read) - reached
    assert set(read) - reached <= {"search.html"}  # found by its form
    assert {f"{p}.html" for p in PAGES} <= reached and len(PAGES) > 30


def test_links_lead_somewhere(site, read):
    lost = []
    for name, page in read.items():
        for path, anchor in filter(None, (follow(name, link) for link in page.links + page.loads)):
            if not (site / path).is_file() or (anchor and path in read and anchor not in read[path].ids):
                lost.append(f"{name}: {path}#{anchor}")
    assert not lost


def test_nothing_comes_from_outside(site, read):
    outside = [f"{name}: {load}" for name, page in read.items() for load in page.loads if re.match(r"(?!data:)[a-z]+:|//", load)]
    assert not outside
    for css in site.rglob("*.css"):
        assert not re.search(r"url\(\s*['\"]?(https?:)?//|@import", css.read_text(encoding="utf-8")), css
    for path in site.rglob("*.html"):
        assert "jupyter-widgets" not in path.read_text(encoding="utf-8"), f"{path} would fetch widgets"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_page_keeps_what_it_showed(read, page):
    "Title, every formula, every picture; no directive of nbdev."
    cells = json.loads((ROOT / page.with_suffix(".ipynb")).read_text(encoding="utf-8"))["cells"]
    shown = read[f"{page}.html"]
    assert shown.text.startswith("".join(cells[0]["source"]).splitlines()[0].lstrip("# ").replace("`", ""))
    outputs = [o.get("data", {}) for c in cells for o in c.get("outputs", []) if not "".join(c["source"]).startswith("#| hide")]
    pictures = sum(any(k.startswith("image/") for k in data) for data in outputs)
    assert shown.counts["img",] + shown.counts["img", ""] >= pictures
    prose = "\n\n".join(re.sub(r"```.*?```|`[^`]*`", "", "".join(c["source"]), flags=re.S) for c in cells if c["cell_type"] == "markdown")
    assert shown.counts["div", "math"] == len(re.findall(r"\$\$.+?\$\$", prose, re.S))
    assert ("tex-svg.js" in str(shown.loads)) == bool(shown.counts["div", "math"] or shown.counts["span", "math"])
    assert not re.search(r"#\| ?(export|hide|default_exp)", shown.text)
    tables = sum(len(re.findall(r"(?m)^\|( --- \|)+$", "".join(data.get("text/markdown", "")))) for data in outputs)
    assert sum(n for kind, n in shown.counts.items() if kind[0] == "table") >= tables
    assert shown.text.count("Here stands a widget") == sum("widget" in c["metadata"].get("tags", []) for c in cells)


def test_command_line_is_complete(read):
    from typer.main import get_command

    from cmcgns.reporting.cli import app

    def walk(command, name):
        yield name, command
        for child in getattr(command, "commands", {}).values():
            yield from walk(child, f"{name} {child.name}")

    text, found = read["command_line.html"].text, list(walk(get_command(app), "cmcgns"))
    assert len(found) > 7
    for name, command in found:
        assert f"$ {name}" in text and " ".join(command.help.split()) in text
        for option in command.params:
            assert option.opts[0] in text
            assert not getattr(option, "help", "") or " ".join(option.help.replace("`", "").split()) in text


def modules():
    import cmcgns
    return [m.name for m in pkgutil.walk_packages(cmcgns.__path__, "cmcgns.") if not m.ispkg and not m.name.endswith("._modidx")]


@pytest.mark.parametrize("name", modules())
def test_api_says_what_the_source_says(read, name):
    "Each public function and class is there, with its docstring and with what stands beside its arguments."
    from fastcore.docments import docments
    page, module = read[f"api/{name}.html"], importlib.import_module(name)
    plain = page.text.replace("`", "")
    for public in module.__all__:
        obj = getattr(module, public)
        if not (inspect.isroutine(obj) or inspect.isclass(obj)) or obj.__module__ != name:
            continue
        assert f"{name}.{public}" in page.ids
        doc = (obj.__dict__.get("__doc__") or "").strip().split("\n")[0].replace("`", "")
        assert doc.startswith(f"{public}(") or " ".join(doc.split()) in plain  # a dataclass without a docstring gets its signature
        if inspect.isroutine(obj):
            for argument, said in docments(obj, returns=True).items():
                assert not said or " ".join(said.replace("`", "").split()) in plain, f"{public}: {argument}"


def test_api_shows_fields_of_base_classes(read):
    "`Settings` inherits most of its fields; each comes with its meaning and default."
    text = read["api/cmcgns.pretraining.html"].text
    assert "clusters (int): K (default 128)" in text and "lr (float): peak learning rate (default 1e-05)" in text


def test_a_new_folder_appears_by_itself(builder, tmp_path):
    root = tmp_path / "root"
    for name in ("docs", "data"):
        shutil.copytree(ROOT / name, root / name, ignore=lambda folder, names: [n for n in names if not n.endswith((".md", ".py", ".css"))])
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, root / name)
    page = root / "nbs" / "later_ideas" / "50_one.ipynb"
    page.parent.mkdir(parents=True)
    cells = [dict(cell_type="markdown", metadata={}, source=["# One\n", "\n", "> And only"]),
             dict(cell_type="code", metadata={}, outputs=[], source=["#| default_exp later.one"]),
             dict(cell_type="code", metadata={}, outputs=[], source=["#| export\n", "def f(): pass"])]
    page.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    builder["assemble"](root, tmp_path / "source")
    section = (tmp_path / "source" / "nbs" / "later_ideas" / "index.md").read_text()
    assert section.startswith("# Later ideas") and "- [One](/nbs/later_ideas/50_one.ipynb): And only" in section
    assert "nbs/later_ideas/index" in (tmp_path / "source" / "index.md").read_text()
    assert "automodule:: cmcgns.later.one" in (tmp_path / "source" / "api" / "cmcgns.later.one.rst").read_text()
    shown = json.loads((tmp_path / "source" / "nbs" / "later_ideas" / "50_one.ipynb").read_text())["cells"]
    assert [c["source"] for c in shown if c["cell_type"] == "code"] == ["def f(): pass"]
    cells[0]["source"] = ["One"]
    page.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    with pytest.raises(ValueError, match="50_one.ipynb: begins with 'One', expected '# Title'"):
        builder["assemble"](root, tmp_path / "again")


def test_widgets_leave_their_pictures(builder):
    "A widget needs a kernel: what else an output shows is kept, and its text form is not."
    widget = {"application/vnd.jupyter.widget-view+json": dict(model_id="1"), "text/plain": "interactive(children=...)"}
    outputs = [dict(output_type="display_data", metadata={}, data=data) for data in (widget, widget | {"image/png": "iVBO"}, {"text/plain": "7"})]
    left = builder["fit_cell"](dict(cell_type="code", metadata={}, source="interact(f)", outputs=outputs))["outputs"]
    assert [o["data"] for o in left] == [{"image/png": "iVBO"}, {"text/plain": "7"}]


@pytest.mark.skipif(bool(MISSING), reason="the extra [docs] is not installed")
def test_other_folders_are_not_replaced(builder, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="holds something else than documentation"):
        builder["build"](tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.fixture
def browse(tmp_path):
    "What a browser makes of a file, read from the disk and without a network."
    def browse(url, budget=20000):
        done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                               "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={tmp_path / 'profile'}",
                               f"--virtual-time-budget={budget}", "--dump-dom", url], capture_output=True, text=True, timeout=300)
        return done.stdout
    return browse


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here to draw formulas")
def test_formulas_are_drawn(site, browse):
    "All formulas of the site on one page: each is drawn, none with an error."
    formulas = [f for p in sorted(site.rglob("*.html")) for f in re.findall(r'<(?:span|div) class="math notranslate.*?</(?:span|div)>', p.read_text(encoding="utf-8"), re.S)]
    page = site / "formulas.html"
    try:
        page.write_text("<meta charset=utf-8><script defer src=_static/tex-svg.js></script>" + "".join(formulas), encoding="utf-8")
        drawn = browse(page.as_uri())
    finally:
        page.unlink()
    assert len(formulas) > 100 and drawn.count("<mjx-container") == len(formulas)
    assert not re.findall(r'<g data-mml-node="(?:merror|mtext" fill="red)".*?</g>', drawn)  # an error, an unknown command


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here to search with")
def test_search_works_from_the_disk(site, browse):
    found = browse((site / "search.html").as_uri() + "?q=two_nearest")
    assert 'href="api/cmcgns.clustering.html#cmcgns.clustering.two_nearest"' in found
    assert 'href="nbs/core/04_clustering.html' in browse((site / "search.html").as_uri() + "?q=farthest")
