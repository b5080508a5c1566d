"Build the documentation: python docs/build.py [FOLDER], by default _docs. Needs the extra `docs`, and no network."
import json
import re
import shutil
import subprocess
import sys
import tempfile
from itertools import takewhile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {  # folders of nbs/ in the order of the site; one that is not named here comes after them
    "explore": ("Tutorials", "To be played with in JupyterLab (`make lab`), and to be read here."),
    "core": ("The method", "Page by page: why, the equation, the smallest definition, an example, a check."),
    "data": ("Data", "One record for every data set, read as its publisher ships it."),
    "evaluation": ("Evaluation", "What a trained encoder can do, and how sure we can be of the number."),
    "baselines": ("Baselines", "The methods that the paper compares with."),
    "reproduce": ("Reproduction", "Pages with parameters, which make the tables and figures out of runs."),
    "reporting": ("Runs and reports", "What keeps, draws and tabulates what was computed, and the command line."),
}
WIDGET = dict(cell_type="markdown", id="page-widget", metadata={}, source="{.page-note}\nHere stands a widget when the page runs in JupyterLab (`make lab`). What follows is the same, standing still.")
PROJECT = {"README": "Results", "docs/measured": "All rows that were measured", "CONTRIBUTING": "Contributing", "CHANGELOG": "Changes"}


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def toctree(entries, caption=None):
    options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["", "```{toctree}", *options, "", *entries, "```", ""])


def read_cells(page):
    return json.loads(page.read_text(encoding="utf-8"))["cells"]


def module_of(page):
    "The module that a page exports, if it does."
    found = [re.match(r"#\| default_exp (\S+)", "".join(c["source"])) for c in read_cells(page) if c["cell_type"] == "code"]
    return next((f"cmcgns.{f[1]}" for f in found if f), None)


def title_of(page):
    "Title and subtitle of a page."
    head = "".join(read_cells(page)[0]["source"])
    found = re.match(r"# (.+?)\s*(?:\n+> (.+(?:\n> .+)*)|$)", head)
    if not found:
        raise ValueError(f"{page}: begins with {head[:60]!r}, expected '# Title' and below it '> subtitle' in a first Markdown cell")
    return found[1], (found[2] or "").replace("\n> ", " ")


def still(output):
    "An output without its widgets, which need a running kernel; None if nothing else was shown."
    data = output.get("data", {})
    if not any("widget" in kind for kind in data):
        return output
    kept = {kind: shown for kind, shown in data.items() if kind == "text/html" or kind.startswith("image/")}
    return output | dict(data=kept) if kept else None


def fit_cell(cell):
    "A cell without nbdev's directives and without widgets, or None if nothing is left to read; exported ones are tagged."
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return cell
    if re.match(r"#\| *(default_exp|hide)\b", source):
        return None
    tags = ["exported"] if re.match(r"#\| *export", source) else []
    source = re.sub(r"^(#\|.*|%matplotlib.*)\n?", "", source, flags=re.M)
    outputs = [o for o in map(still, cell.get("outputs", [])) if o]
    return cell | dict(source=source, metadata=dict(tags=tags), outputs=outputs) if source.strip() else None


def fit_page(page, root):
    "A notebook as the site shows it: outputs kept, directives gone, and a line that says what it makes."
    name, module = page.relative_to(root), module_of(page)
    up = "../" * (len(name.parts) - 1)
    makes = f"Makes [`{module}`]({up}api/{module}.rst): cells with a coloured bar are the library, the others show and check it. " if module else ""
    cells = [fit for cell in read_cells(page) for fit in (fit_cell(cell), WIDGET if "widget" in cell["metadata"].get("tags", []) else None) if fit]
    empty = name.parts[-2] == "reproduce" and not any(c.get("outputs") for c in cells)
    kept = ". It is kept without results, which depend on the data: `cmcgns reproduce` fills it in." if empty else ""
    note = dict(cell_type="markdown", id="page-note", metadata={}, source=f"{{.page-note}}\n{makes}Notebook: `{name}`{kept}")
    for cell in takewhile(lambda c: c["cell_type"] == "code", cells[1:]):  # imports come first on our pages, and are read last
        if cell["source"].startswith(("import ", "from ")):
            cell["metadata"] = dict(tags=[*cell["metadata"]["tags"], "hide-input"], mystnb=dict(code_prompt_show="Imports", code_prompt_hide="Imports"))
    info = dict(language_info=dict(name="python", pygments_lexer="ipython3"), kernelspec=dict(name="python3", display_name="Python 3"))
    return json.dumps(dict(cells=[cells[0], note, *cells[1:]], metadata=info, nbformat=4, nbformat_minor=5), ensure_ascii=False)


def command_line():
    "The help of every command, as typer tells it."
    done = subprocess.run([sys.executable, "-m", "typer", "cmcgns.reporting.cli", "utils", "docs", "--name", "cmcgns"],
                          capture_output=True, text=True, check=True)
    text = re.sub(r"\*\*Commands\*\*:\n\n(\* .*\n)+\n", "", done.stdout)  # cut short by typer; the commands follow in full
    return re.sub(r"^# .*", "# Command line", text, count=1).replace("```console", "```")


def api_page(module, page):
    title = f"``{module}``"
    return f"{title}\n{'=' * len(title)}\n\nExplained in :doc:`/{page}`.\n\n.. automodule:: {module}\n   :members:\n   :undoc-members:\n"


def write_section(source, root, folder, pages):
    "Pages of a folder and the page that lists them; returns name, title and a sentence about the section."
    title, intro = SECTIONS.get(folder, (folder.replace("_", " ").capitalize(), ""))
    lines, entries = [f"# {title}\n\n{intro}\n"], []
    if folder == "data":
        lines.append("- [How to get the data](/data/README.md): where it is had, and what its folders look like")
        entries.append("How to get the data </data/README>")
    for page in pages:
        name, (heading, subtitle) = page.relative_to(root), title_of(page)
        lines.append(f"- [{heading}](/{name}): {subtitle}" if subtitle else f"- [{heading}](/{name})")
        entries.append(f"/{name.with_suffix('')}")
        write(source / name, fit_page(page, root))
    write(source / "nbs" / folder / "index.md", "\n".join(lines) + "\n" + toctree(entries))
    return f"nbs/{folder}/index", title, intro


def write_api(source, root, pages):
    "One page a module, and the page that lists them."
    modules = {module_of(page): page for page in pages if module_of(page)}
    for module, page in modules.items():
        write(source / "api" / f"{module}.rst", api_page(module, page.relative_to(root).with_suffix("")))
    intro = "# API\n\nEvery module, in the order of the pages that explain them. {ref}`All names by alphabet <genindex>`.\n\n"
    names = "\n".join(f"- [`{module}`]({module}.rst): {title_of(page)[1]}" for module, page in modules.items())
    write(source / "api" / "index.md", intro + names + "\n" + toctree(f"{m.removeprefix('cmcgns.')} <{m}>" for m in modules))
    return "api/index", "API", "Every module, function and class, with its arguments."


def assemble(root, source):
    "Write what Sphinx reads: the pages, the documents beside them, section pages, command line and API."
    pages = sorted((p for p in (root / "nbs").glob("[!.]*/*.ipynb")), key=lambda p: (p.stem != "quickstart", p.stem))
    folders = {folder: [p for p in pages if p.parent.name == folder] for folder in [*SECTIONS, *sorted({p.parent.name for p in pages} - set(SECTIONS))]}
    sections = [write_section(source, root, folder, here) for folder, here in folders.items() if here]
    write(source / "command_line.md", command_line())
    sections += [("command_line", "Command line", "Every command with its options."), write_api(source, root, [p for here in folders.values() for p in here])]
    beside = [root / f"{name}.md" for name in PROJECT] + [root / "LICENSE", root / "data" / "README.md"]
    for path in beside + [p for kind in ("png", "jpg", "svg") for p in (root / "nbs").rglob(f"*.{kind}")]:
        (source / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, source / path.relative_to(root))
    listed = "\n".join(f"- [{title}]({name}.md): {intro}" for name, title, intro in sections)
    text = (root / "docs" / "index.md").read_text(encoding="utf-8").replace("SECTIONS", listed)
    write(source / "index.md", text + toctree(name for name, _, _ in sections) + toctree((f"{title} <{name}>" for name, title in PROJECT.items()), "Project"))


def build(out, root=ROOT):
    "Build the site into `out`, which is replaced; returns Sphinx's exit status, and any warning is an error."
    from sphinx.cmd.build import build_main
    if out.exists() and any(out.iterdir()) and not (out / ".buildinfo").exists():
        raise ValueError(f"{out} holds something else than documentation: name an empty folder or a new one")
    with tempfile.TemporaryDirectory() as folder:
        source, html = Path(folder) / "source", Path(folder) / "html"
        assemble(root, source)
        status = build_main(["-q", "-W", "-c", str(root / "docs"), "-d", str(Path(folder) / "doctrees"), str(source), str(html)])
        if not status:
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(html, out)
    return status


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs")
    sys.exit(build(place) or print(f"{place / 'index.html'}"))
