"README.md is nbs/index.ipynb as Markdown: python tests/readme.py writes it, tests/test_house.py checks it."
import re
from pathlib import Path

from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parents[1]


def readme():
    "The text of README.md: the index page, with links as seen from the root."
    text, _ = MarkdownExporter().from_filename(str(ROOT / "nbs" / "index.ipynb"))
    text = re.sub(r"\]\((?!https?:|\.\./)", "](nbs/", text).replace("](../", "](")
    note = "<!-- Made from nbs/index.ipynb by `make export`; edit that page, not this file. -->\n\n"
    return note + re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
