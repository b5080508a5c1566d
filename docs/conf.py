"How the documentation is made from the pages: Sphinx, MyST-NB and Furo, nothing executed, nothing fetched."
import inspect
import re
from dataclasses import MISSING, fields, is_dataclass
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

from docutils import nodes
from fastcore.docments import docments

house = ConfigParser(delimiters=["="])
house.read(Path(__file__).parents[1] / "settings.ini", encoding="utf-8")
house = house["DEFAULT"]

project, author, release = house["title"], house["author"], house["version"]
project_copyright = house["copyright"]
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.mathjax"]
default_role = "py:obj"
highlight_language = "none"
smartquotes = False

nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_ipywidgets_js = {}
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables that a cell shows as Markdown are tables
myst_enable_extensions = ["amsmath", "attrs_block", "dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["config.cache"]

html_theme = "furo"
html_title = f"{project} {release}"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_copy_source = html_show_sourcelink = html_show_sphinx = html_domain_indices = False

# One file that holds its own glyphs: formulas need neither fonts nor a server, and read well from a disk.
html_static_path.append(str(Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax" / "tex-svg.js"))
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}

autodoc_inherit_docstrings = False  # what torch says of its own methods is not ours to show
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False


def as_rst(text):
    "Prose of our sources, where `a name` is code, as reStructuredText; names that are documented become links."
    def convert(piece):
        if not piece.startswith("`"):
            return re.sub(r"([\\*|_])", r"\\\1", piece)
        name = re.fullmatch(r"`([A-Za-z_][\w.]*)`", piece)
        return rf"\ :py:obj:`{name[1]}`\ " if name else rf"\ `{piece}`\ "
    return "".join(map(convert, re.split(r"(`[^`]+`)", text)))


def comments_of(obj):
    "What the source says beside each argument or field of `obj`, those of its base classes included, and of what is returned."
    family = [obj]
    if inspect.isclass(obj):
        family = [c for c in reversed(obj.__mro__) if c.__module__.startswith("cmcgns") and vars(c).keys() & {"__init__", "__annotations__"}]
    return {name: " ".join(said.split()) for c in family for name, said in docments(c, returns=not inspect.isclass(obj)).items() if said}


def is_settings(what, obj):
    "A dataclass with so many fields that its signature says nothing: the defaults go to the fields."
    return what == "class" and is_dataclass(obj) and len(fields(obj)) > 12


def describe(app, what, name, obj, options, lines):
    "Docstring, then what stands beside the arguments."
    lines[:] = [as_rst(line) for line in lines]
    if what not in ("function", "method", "class", "exception"):
        return
    said = comments_of(obj)
    if is_settings(what, obj):
        said = {f.name: said.get(f.name, "") + (f" (default `{f.default!r}`)" if f.default is not MISSING else "") for f in fields(obj)}
    lines += ["", *(f":{'returns' if arg == 'return' else f'param {arg}'}: {as_rst(text)}" for arg, text in said.items()), ""]


def shorten(app, what, name, obj, options, signature, returned):
    "The signature of settings, without their defaults."
    return ("(...)", None) if is_settings(what, obj) else None


def leave_out(app, what, name, obj, skip, options):
    "Constants are read on their page, fields stand with the arguments of their class, and what others wrote is theirs."
    wanted = inspect.isroutine(obj) and obj.__module__.startswith("cmcgns") or isinstance(obj, property) or (what == "module" and inspect.isclass(obj))
    return True if not wanted else skip


def set_dashes(app, doctree):
    "Sphinx puts two hyphens between an argument and its meaning; elsewhere two hyphens begin an option."
    for text in [t for t in doctree.findall(nodes.Text) if t == " -- "]:
        text.parent.replace(text, nodes.Text(": "))


def setup(app):
    app.connect("autodoc-process-signature", shorten)
    app.connect("doctree-read", set_dashes)
    app.connect("autodoc-process-docstring", describe)
    app.connect("autodoc-skip-member", leave_out)
