"""Write docs/dependencies.csv: every pinned package with its version, its licence, and who needs it. python docs/dependencies.py

Versions are those of constraints.txt; licences are what the installed package says of itself. A package that is pinned and not installed
here (some are for the documentation alone) keeps its row, if there is one of the same version."""
import csv
import io
import re
import sys
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "dependencies.csv"
SAID_ELSEWHERE = {"torch": "BSD-3-Clause", "faster-coco-eval": "Apache-2.0"} # by the licence files that they ship
COLUMNS = "package", "version", "licence", "needed by"


def plain(name): return re.sub(r"[-_.]+", "-", name).lower()


def pinned(): return {plain(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)}


def asked():
    "Which of our extras name a package; '' is the library itself."
    text = (ROOT / "settings.ini").read_text()
    found = {}
    for extra in "", "notebooks", "dev", "docs":
        line = re.search(rf"^{extra}_?requirements = (.*)$" if extra else r"^requirements = (.*)$", text, re.M)[1]
        for name in line.split(): found.setdefault(plain(re.match(r"[\w.-]+", name)[0]), "cmcgns" + (f"[{extra}]" if extra else ""))
    return found


def licence(name):
    "What a package says its licence is: an expression, a short word, or a classifier."
    m = metadata(name)
    said = m.get("License-Expression") or (m.get("License") or "").strip()
    classified = [c.split(" :: ")[-1] for c in m.get_all("Classifier") or () if c.startswith("License ::") and not c.endswith("OSI Approved")]
    if not said or len(said.splitlines()) > 1 or len(said) > 60 or said.upper() == "UNKNOWN": said = "; ".join(classified)
    return said or SAID_ELSEWHERE.get(name, "not said")


def rows():
    versions, ours, before = pinned(), asked(), {}
    if TABLE.exists(): before = {r["package"]: r for r in csv.DictReader(TABLE.read_text().splitlines())}
    needs, licences = {name: set() for name in versions}, {}
    for name in versions:
        try: licences[name] = licence(name)
        except PackageNotFoundError: continue
        for line in requires(name) or ():
            other = plain(re.match(r"[\w.-]+", line)[0])
            if other in needs and "extra ==" not in line: needs[other].add(name)
    for name, version in sorted(versions.items()):
        old = before.get(name, {})
        if name not in licences:
            yield dict(old) if old.get("version") == version else dict(zip(COLUMNS, (name, version, "not installed here", "")))
            continue
        yield dict(zip(COLUMNS, (name, version, licences[name], ours.get(name) or ", ".join(sorted(needs[name])[:3]) or old.get("needed by") or "an extra of another package")))


def table():
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader(); writer.writerows(rows())
    return out.getvalue()


if __name__ == "__main__":
    TABLE.write_text(table())
    print(f"{TABLE.relative_to(ROOT)}: {len(TABLE.read_text().splitlines()) - 1} packages", file=sys.stderr)
