"""Ten thousand bad inputs: each is read, skipped with a counted reason, or refused with an error of ours that names the file.

An error is ours if the line that raised it stands in the package. None may hang, write outside of its folder, open the file
that bad inputs point at, start a program, or unpickle; an audit hook watches while a reader is at work."""
import gzip
import io
import json
import os
import random
import re
import signal
import struct
import sys
import tarfile
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import cmcgns
from cmcgns.data.check import DATASETS, write_layout
from cmcgns.data.covid_cxr import read_lung_boxes, read_severity
from cmcgns.data.mimic_cxr import cut_sections, decode_report, extract_sections, open_reports, section_sentences
from cmcgns.data.object_cxr import BadRow, draw_runs, make_box, read_annotation
from cmcgns.data.openi import parse_report, read_reports, write_archive
from cmcgns.data.published_splits import read_lists
from cmcgns.data.rsna import read_people, write_dicom
from cmcgns.data.siim import decode_rle, encode_rle, read_masks
from cmcgns.data.studies import Fraction, Loading, Split, draw_fraction, load_studies, read_mask, read_rows, save_studies, split_studies
from cmcgns.data.synthetic import synthesize
from cmcgns.image import ImageCache, build_cache, dicom_header, image_shape, read_image
from cmcgns.model import build_model, load_model
from cmcgns.pretraining import check_settings, make_settings, parse_changes
from cmcgns.reporting.runs import find_run, list_runs, run_once
from cmcgns.text import note_sentences, report_sentences, split_report

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("fuzz")]
HOME = str(Path(cmcgns.__file__).parent)
COUNTS, READERS, FAULTS = Counter(), set(), {}
LONGEST = 20 # seconds a case may take before it counts as hanging; they take milliseconds


class Watch:
    "What a reader does to the world while it is at work."
    on, allowed, secret, seen = False, "", "never", []

    def hook(self, event, args):
        if not self.on: return
        if event == "open":
            path, mode, flags = args
            path = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
            if self.secret in path: self.seen.append(f"opened {path}")
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if path and writes and not os.path.realpath(path).startswith(self.allowed) and "__pycache__" not in path and path != os.devnull: self.seen.append(f"wrote {path}")
        elif event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "pickle.find_class"):
            self.seen.append(f"{event} {args}")
        elif event in ("os.rename", "os.link", "os.symlink", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"):
            path = os.fsdecode(args[1] if event in ("os.rename", "os.link", "os.symlink") else args[0])
            if not os.path.realpath(path).startswith(self.allowed) and "__pycache__" not in path: self.seen.append(f"{event} {args}")


WATCH = Watch()


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    "The only folder that may be written to; beside it lies a file that nobody may open."
    if not getattr(sys, "_cmcgns_watched", False): sys.addaudithook(WATCH.hook)
    sys._cmcgns_watched = True
    root = tmp_path_factory.mktemp("fuzz")
    (root / "inside").mkdir()
    (root / "secret-canary").write_text("secret words of the host")
    WATCH.allowed, WATCH.secret = os.path.realpath(root / "inside"), "secret-canary"
    return root / "inside"


@contextmanager
def watched():
    def late(*_): raise AssertionError(f"it hangs: more than {LONGEST} s")
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LONGEST)
    WATCH.seen.clear(); WATCH.on = True
    try: yield
    finally:
        WATCH.on = False
        signal.setitimer(signal.ITIMER_REAL, 0); signal.signal(signal.SIGALRM, before)
    assert not WATCH.seen, WATCH.seen


def fault(reader, error, names, row):
    "What is wrong with an error that refused a case; nothing if it is ours, names the file, and is a sentence."
    frame = error.__traceback__
    while frame.tb_next: frame = frame.tb_next
    file, text = frame.tb_frame.f_code.co_filename, str(error)
    if not isinstance(error, (ValueError, OSError)) or not file.startswith((HOME, "<string>")): return f"{type(error).__name__} raised by {file}, line {frame.tb_lineno}: {text[:200]}"
    if len(text.splitlines()) != 1: return f"not one line: {text[:300]!r}"
    if missing := [n for n in names if str(n) not in text]: return f"{text[:300]!r} does not name {missing[0]}"
    if row and not re.search(row, text): return f"{text[:300]!r} names no row"


def case(reader, call, *names, row=None, never=False):
    "One case; returns what was read, or the error that refused it. What is wrong is collected, and fails the test at its end."
    READERS.add(reader)
    try:
        with watched(): made = call()
    except Exception as error:
        if wrong := "it must not raise" if never else fault(reader, error, names, row): FAULTS.setdefault((reader, wrong[:60]), (wrong, error))
        COUNTS[reader, "refused"] += 1
        return error
    skipped = isinstance(made, Loading) and any(s.broken for s in made.skipped)
    COUNTS[reader, "skipped" if skipped else "read"] += 1
    return made


@pytest.fixture(autouse=True)
def no_faults():
    FAULTS.clear()
    yield
    assert not FAULTS, "\n".join(f"{reader}: {wrong} [{error!r:.300}]" for (reader, _), (wrong, error) in FAULTS.items())


def some(n, **kwargs): return settings(max_examples=n, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), **kwargs)


def mutate(data, rng, most=4):
    "Bytes with some changes: flipped, cut, doubled, dropped, overwritten with what is likely to hurt."
    data = bytearray(data)
    for _ in range(rng.randint(1, most)):
        at, n = rng.randrange(len(data) + 1), rng.choice((1, 1, 2, 4, 16, 200))
        match rng.randrange(7):
            case 0: data[at:at + 1] = bytes([rng.randrange(256)])
            case 1: del data[at:]
            case 2: data[at:at] = data[at:at + n]
            case 3: del data[at:at + n]
            case 4: data[at:at + n] = rng.choice((b"\xff", b"\0", b"\x80", b"-", b"9")) * n
            case 5: data[at:at + 4] = struct.pack("<I", rng.choice((0, 1, 2**31, 2**32 - 1, 2**16, 65535)))
            case 6: data[at:at + n] = rng.randbytes(n)
    return bytes(data)


# Text

PIECES = ["FINDINGS:", "IMPRESSION:", "\n\n", "\n", " ", ".", "1. ", "2)", "1)", "FINAL REPORT", "WET READ", "______", "no effusion", "The heart is 3.5 cm.", "Dr. A.", "?", "\ufffd",
          "COMPARISON", ":", ";", "\r", "\t", "\0", "ADDENDUM", "p.o.", "e.g.", "AP", "PA AND LATERAL VIEWS:", "\u0660", "ﬁ", "𝟙", "İ", "é", "\u202e", "LUNGS:", "-", "*", "(", ")", "/", "%"]
words = st.one_of(st.lists(st.sampled_from(PIECES), max_size=30).map("".join), st.text(max_size=60), st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=20).map("".join))


@some(900)
@given(words)
def test_report_text(text):
    for reader, read in ("split_report", split_report), ("note_sentences", note_sentences), ("report_sentences", lambda t: report_sentences(t, t[::-1])):
        for sentence in case(f"text {reader}", lambda read=read: read(text), never=True):
            assert re.fullmatch("[a-z0-9]+( [a-z0-9]+)+", sentence), sentence


@some(900)
@given(words, st.binary(max_size=4))
def test_mimic_sections(text, tail):
    data = text.encode("utf-8", "surrogatepass") + tail
    def read():
        t = decode_report(data)
        return t, cut_sections(t), section_sentences(extract_sections(t))
    t, sections, sentences = case("MIMIC report", read, never=True)
    assert all(0 <= s.start < s.end <= len(t) for s in sections) and all(a.end <= b.start for a, b in zip(sections, sections[1:]))
    assert all(re.fullmatch("[a-z0-9]+( [a-z0-9]+)+", s) for s in sentences)


@pytest.mark.parametrize("unit", ["1) ", "A", "a. ", " ", "\n", "_", "FINDINGS: ", "AND ", "IMPRESSION", "-\n", "?", "9", "e.g. ", "\t:", "FOR THIS OF "])
def test_long_reports_take_no_longer(unit):
    text = unit * (60_000 // len(unit))
    case("long report", lambda: section_sentences(extract_sections(text)), never=True)
    case("long report", lambda: note_sentences(text), never=True)


# XML and archives

REPORT = (b'<?xml version="1.0" encoding="utf-8"?>\n<eCitation><uId id="CXR17"/><MedlineCitation><Article><Abstract><AbstractText Label="FINDINGS">The heart is normal. No effusion.</AbstractText>'
          b'<AbstractText Label="IMPRESSION">Normal chest.</AbstractText></Abstract></Article></MedlineCitation><MeSH><major>Cardiomegaly/mild</major><automatic>heart</automatic></MeSH>'
          b'<parentImage id="CXR17_IM-1"><caption>PA</caption></parentImage></eCitation>')


def xml_tricks(secret):
    bomb = '<!DOCTYPE x [<!ENTITY a0 "ha">' + "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 12)) + "]>"
    head, _, body = REPORT.partition(b"\n")
    for inner in (bomb, f'<!DOCTYPE x [<!ENTITY a11 SYSTEM "file://{secret}">]>', f'<!DOCTYPE x SYSTEM "file://{secret}">', f'<!DOCTYPE x [<!ENTITY % p SYSTEM "file://{secret}"> %p;]>',
                  '<!DOCTYPE x [<!ENTITY a11 "b">]>', '<!DOCTYPE x [<!ENTITY a11 SYSTEM "http://127.0.0.1:1/x">]>', '<!DOCTYPE x PUBLIC "-//W3C//DTD" "http://127.0.0.1:1/x.dtd">'):
        for text in "&a11;", "a":
            yield head + inner.encode() + body.replace(b"Normal chest.", text.encode())
    yield b"<a>" * 100_000
    yield b"<a>" * 50_000 + b"</a>" * 50_000
    yield REPORT.replace(b"CXR17", b"CXR" + b"9" * 6000)
    yield REPORT.replace(b"utf-8", b"utf-7")
    yield REPORT.decode().replace("utf-8", "utf-16").encode("utf-16")
    yield REPORT.replace(b'id="CXR17"', 'id="CXR\u0661\u0662"'.encode())
    yield b"<eCitation " + b" ".join(b"a%d='x'" % i for i in range(20_000)) + b"/>"
    yield b""
    for name in b"ascii", b"cp037", b"utf-32", b"idna", b"rot13", b"unicode_escape", b"bz2", b"undefined", b"\xff": yield REPORT.replace(b"utf-8", name)


def test_openi_xml(place):
    rng, tricks = random.Random(1), list(xml_tricks(place.parent / "secret-canary"))
    for data in tricks + [mutate(REPORT, rng, rng.choice((1, 1, 1, 4))) for _ in range(900)]:
        got = case("Open-i XML", lambda data=data: parse_report(data))
        assert "secret words" not in str(got) and len(str(got)) < 2**21


def archive(members):
    "A tar of (name, content or type and link)."
    out = io.BytesIO()
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0) as packed, tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in members:
            m = tarfile.TarInfo(name)
            if isinstance(content, bytes): m.size = len(content); tar.addfile(m, io.BytesIO(content))
            else: m.type, m.linkname = content; tar.addfile(m)
    return out.getvalue()


def test_openi_archives(place):
    "Paths that leave the folder, links, devices, damage. Nothing is unpacked, so nothing can land anywhere."
    home, rng, secret = place / "openi-archives", random.Random(2), str(place.parent / "secret-canary")
    home.mkdir()
    file, before = home / "NLMCXR_reports.tgz", sorted(os.listdir(place.parent))
    names = ["ecgen-radiology/1.xml", "/etc/x.xml", "../x.xml", "ecgen-radiology/../../x.xml", secret, "ecgen-radiology//x.xml", "ecgen-radiology/x\ny.xml", "ecgen-radiology/.xml", "a" * 300 + ".xml",
             "ecgen-radiology/" + "a" * 300 + ".xml", "./ecgen-radiology/2.xml", "ecgen-radiology/\udcff.xml", "C:\\x.xml", "ecgen-radiology"]
    kinds = [(tarfile.SYMTYPE, secret), (tarfile.LNKTYPE, secret), (tarfile.SYMTYPE, "../" * 9), (tarfile.CHRTYPE, ""), (tarfile.FIFOTYPE, ""), (tarfile.DIRTYPE, ""), (tarfile.LNKTYPE, "ecgen-radiology/1.xml"), (b"S", ""), (b"x", "")]
    for _ in range(250):
        members = [(rng.choice(names), rng.choice([REPORT, REPORT.replace(b"17", b"%d" % rng.randrange(99)), b"", b"no xml", *kinds])) for _ in range(rng.randint(0, 5))]
        file.write_bytes(archive(members))
        case("Open-i archive", lambda: read_reports(home), file)
    whole = archive([("ecgen-radiology/1.xml", REPORT)])
    plain = gzip.decompress(whole)
    for _ in range(400):
        file.write_bytes(mutate(whole, rng) if rng.random() < .3 else mutate(plain[:rng.choice((3000, 20_000))], rng) if rng.random() < .5 else gzip.compress(mutate(plain, rng), 1, mtime=0))
        case("Open-i archive", lambda: read_reports(home), file)
    write_archive(file, {"ecgen-radiology/1.xml": REPORT + b" " * 2**21})
    case("Open-i archive", lambda: read_reports(home), file)
    assert sorted(os.listdir(place.parent)) == before and sorted(os.listdir(home)) == [file.name]


def test_zip_archives(place):
    "The reports of MIMIC-CXR, and tables."
    rng, file = random.Random(3), place / "mimic-cxr-reports.zip"
    def packed(members, how=zipfile.ZIP_DEFLATED):
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", how) as z:
            for name, data in members: z.writestr(name, data)
        return out.getvalue()
    report, name = b"FINDINGS: The heart is large.\n", "files/p10/p10000032/s50414267.txt"
    whole = packed([(name, report)])
    tricks = [packed([(name, b" " * 2**26)]), packed([("/" + name, report)]), packed([("../../" + name, report)]), packed([(name, report), ("x/" + name, b"b")]), packed([]), b"", b"PK\x05\x06" + bytes(18)]
    for data in tricks + [mutate(whole, rng) for _ in range(300)]:
        file.write_bytes(data)
        def read():
            with open_reports(file) as f: return f("p10/p10000032/s50414267.txt")
        got = case("zip of reports", read, file)
        assert isinstance(got, Exception) or not isinstance(got, bytes) or len(got) <= 2**20 + 1, "a bomb"
    table = place / "table.csv.zip"
    whole = packed([("t.csv", b"a,b\n1,2\n3,4\n")])
    for data in [packed([("t.csv", b"a,b\n1,2\n"), ("u.csv", b"")]), packed([("t.csv/", b"")])] + [mutate(whole, rng) for _ in range(300)]:
        table.write_bytes(data)
        case("zip of a table", lambda: read_rows(table, ["a"], "get it again"), table)


# Tables

VALUES = ["", "nan", "NaN", "inf", "-inf", "1e999", "-1", "0", "1", "1.5", "9" * 400, "9" * 5000, "\0", "a" * 300, "a" * 5000, "../../secret-canary", "/etc/passwd", "..", ".", "/", "x/../..", "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"), "é", "٣", "1,5",
          '"', "'; DROP TABLE", "=1+1", "True", "None", "-", "\u202e", "\ufeff", "1 1 1 1", "0 1 2 3 4;", "2 0 0 1e308 1e308 -1e308 5", "COVID-19", "positive"]


def mutate_table(text, rng, sep=","):
    "A table with a fault that tables have."
    rows = [r.split(sep) for r in text.splitlines()]
    def any_row(): return rng.choice(rows[1:] or rows)
    match rng.randrange(17):
        case 0: i = rng.randrange(len(rows[0])); [r.__delitem__(i) for r in rows if len(r) > i] # a column is missing
        case 1: rows[0][rng.randrange(len(rows[0]))] = rng.choice(VALUES)
        case 2: rows.append(list(any_row())) # twice
        case 3: r = any_row(); r[rng.randrange(len(r))] = rng.choice(VALUES)
        case 4:
            for _ in range(5): r = any_row(); r[rng.randrange(len(r))] = rng.choice(VALUES)
        case 5: any_row().append(rng.choice(VALUES) or "x")
        case 6: r = any_row(); del r[rng.randrange(len(r)):]
        case 7: rows[0].append(rows[0][0]); [r.append(r[0]) for r in rows[1:]] # two columns of one name
        case 8: a, b = any_row(), any_row(); i = min(len(a), len(b)) - 1; a[i], b[i] = b[i], a[i]
        case 9: del rows[1:]
        case 10: r = any_row(); i = rng.randrange(len(r)); r[i] = '"' + r[i]
        case 11: r = any_row(); r[0] = "x" * 200_000
        case 12: rows = [[rng.choice(VALUES) for _ in r] if rng.random() < .3 else r for r in rows]
        case 13: rows = rows[:1] + rows[1:] * 3
        case 14: i = rng.randrange(len(rows[0])); [r.__setitem__(i, rng.choice(VALUES)) for r in rows[1:] if len(r) > i]
        case 15: r = any_row(); other = any_row(); r[:1] = other[:1]
        case 16: pass
    text = "\n".join(sep.join(r) for r in rows) + "\n"
    match rng.randrange(12):
        case 0: return b"\xef\xbb\xbf" + text.encode("utf-8", "replace")
        case 1: return text.encode("utf-16", "replace")
        case 2: return text.replace("\n", "\r").encode("utf-8", "replace")
        case 3: return mutate(text.encode("utf-8", "replace"), rng)
        case 4: return text.encode("utf-8", "replace")[:rng.randrange(len(text))]
        case 5: return text.replace("\n", "\r\n").encode("latin-1", "replace")
    return text.encode("utf-8", "replace")


@pytest.fixture(scope="module")
def drawn(place): return synthesize(12, place / "world", size=32, masks=True)


@pytest.mark.parametrize("key", DATASETS)
def test_tables(place, drawn, key):
    "Every table and list of every data set, each skipping and each raising."
    folder, rng, kind = place / f"{key}", random.Random(key), DATASETS[key]
    write_layout(key, drawn, folder)
    tables = [p for p in sorted(folder.rglob("*")) if re.search(r"\.csv(\.gz)?$|COVIDx.*\.txt$", p.name)]
    assert tables
    films = [p for p in sorted(folder.rglob("*")) if p.suffix in (".png", ".jpg", ".dcm")]
    for n in range(240):
        file = rng.choice(films) if n % 8 == 0 else tables[n % len(tables)]
        before = file.read_bytes()
        if n % 8 == 0:
            file.write_bytes(rng.choice((png(60_000, 60_000), b"", mutate(before[:300], rng), b"text")))
            got = case(f"{key} with a bad film", lambda: kind.scan(folder), folder)
            if not isinstance(got, Exception): check_studies(got, folder)
            file.write_bytes(before)
            continue
        text = (gzip.decompress(before) if file.suffix == ".gz" else before).decode()
        data = mutate_table(text, rng, " " if file.suffix == ".txt" else ",")
        if file.suffix == ".gz" and rng.random() < .9: data = gzip.compress(data, 1, mtime=0)
        file.write_bytes(data)
        try:
            def read(on_missing):
                with watched(): found = kind.find(folder)
                if found is None: return
                got = case(f"{key} table", lambda: kind.scan(found, on_missing=on_missing), folder, row=None if on_missing == "skip" else r"row \d+|column|none of|cannot be read|there is no|which is|none of|no image became|not CSV|holds|damaged|say which")
                if not isinstance(got, Exception): check_studies(got, folder)
            read("skip"); read("raise")
            if kind.published and kind.find(folder): case(f"{key} published split", lambda: kind.published(folder), folder)
        finally: file.write_bytes(before)
    assert len(kind.scan(folder).studies) == 12


def check_studies(loading, folder):
    "No study points out of its folder, and every number is one."
    inside = os.path.realpath(folder)
    for s in loading.studies:
        assert os.path.realpath(s.image).startswith(inside), f"{s.image} lies outside"
        assert all(np.isfinite(b[1:]).all() for b in s.boxes), s.boxes


json_values = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)), lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3), max_leaves=6)


def mutate_json(value, rng):
    "JSON with one thing replaced by another kind of thing."
    junk = [None, True, -1, 0, 1e308, float("nan"), float("inf"), "", "x", [], {}, [[]], [None], "../../secret-canary", 10**30, {"a": 1}, [1, 2, 3, 4], ["a", "b", "c", "d"]]
    value = json.loads(json.dumps(value))
    at, path = value, []
    while isinstance(at, (dict, list)) and at and (not path or rng.random() < .8):
        k = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        path.append((at, k)); at = at[k]
    if not path: return rng.choice(junk)
    holder, k = path[-1]
    if rng.random() < .2: del holder[k]
    elif isinstance(holder, list) and rng.random() < .2: holder.append(holder[k])
    else: holder[k] = rng.choice(junk)
    return value if rng.random() < .95 else rng.choice(junk)


def json_bytes(value, rng):
    data = json.dumps(mutate_json(value, rng)).encode()
    return data if rng.random() < .7 else mutate(data, rng) if rng.random() < .8 else b"[" * 100_000


def test_coco_and_people(place, drawn):
    rng = random.Random(4)
    for key, pattern, read in ("covid_cxr", "annotations/*.json", read_lung_boxes), ("rsna", "*.json", read_people):
        folder = place / f"json-{key}"
        write_layout(key, drawn, folder)
        file = next(folder.glob(pattern))
        before = file.read_bytes()
        for _ in range(500):
            file.write_bytes(json_bytes(json.loads(before), rng))
            got = case(f"{key} JSON", lambda read=read, folder=folder: read(folder), file)
            if not isinstance(got, Exception):
                assert all(isinstance(k, str) and v is not None for k, v in got.items())
                if key == "covid_cxr": assert all(np.isfinite(b[1:]).all() for v in got.values() for b in v)
            if rng.random() < .2: case(f"{key} table", lambda key=key, folder=folder: DATASETS[key].scan(folder), folder)
        file.write_bytes(before)
    file = place / "json-covid_cxr" / "annotations" / "covid-severity-scores.csv"
    good = "# a note\nfilename,geographic_mean,opacity_mean\na.png,1,2\nb.png,8,6\n"
    for _ in range(200):
        file.write_bytes(mutate_table(good, rng))
        case("severity scores", lambda: read_severity(place / "json-covid_cxr"), file, row=r"row \d+|there is no|cannot be read|not CSV")


# Masks and shapes

numbers = st.one_of(st.integers(0, 70), st.integers(), st.sampled_from([2**31, 2**63, 2**64, 10**400]))
rle = st.one_of(st.lists(numbers, max_size=8).map(lambda v: " ".join(map(str, v))), st.text(alphabet="0123456789 -.e\t\n", max_size=20), st.text(max_size=10), st.just("-1"),
                st.lists(st.integers(1, 6), min_size=2, max_size=8).map(lambda v: " ".join(map(str, v))))


@some(900)
@given(rle, st.integers(0, 8), st.integers(0, 8))
def test_rle(text, h, w):
    got = case("run lengths", lambda: decode_rle(text, h, w))
    if not isinstance(got, Exception):
        mask = read_mask(got)
        assert mask.shape == (h, w) and decode_rle(encode_rle(got), h, w) == got


@some(300)
@given(st.lists(rle, min_size=1, max_size=4))
def test_rows_of_masks(texts):
    runs, wrong = case("run lengths of an image", lambda: read_masks({n: dict(ImageId="a", EncodedPixels=t) for n, t in enumerate(texts, 2)}, 8, 8), never=True)
    assert read_mask(runs).shape == (8, 8) and all(s.row >= 2 and s.reason for s in wrong)


coordinates = st.one_of(st.integers(-5, 20).map(str), st.floats(allow_nan=True).map(str), st.sampled_from(["nan", "1e308", "-1e308", "1e999", "", "a", "0x1", "1_0", "9" * 500]))
shapes = st.one_of(st.lists(st.tuples(st.sampled_from("0123x"), st.lists(coordinates, max_size=9)).map(lambda s: " ".join([s[0], *s[1]])), max_size=4).map(";".join), st.text(max_size=20),
                   st.lists(st.one_of(st.tuples(st.sampled_from("01"), *[st.integers(-2, 6)] * 2, *[st.integers(5, 14)] * 2), st.tuples(st.just("2"), *[st.integers(-2, 12)] * 8)).map(lambda s: " ".join(map(str, s))), max_size=3).map(";".join))


@some(900)
@given(shapes, st.booleans())
def test_polygons(text, sized):
    def read():
        drawn = read_annotation(text)
        return drawn, [make_box(s, (12, 9) if sized else None) for s in drawn], draw_runs(drawn, 9, 12)
    got = case("shapes", read)
    if isinstance(got, Exception): assert isinstance(got, BadRow) and got.reason; return
    assert all(np.isfinite(b[1:]).all() for b in got[1]) and read_mask(got[2]).shape == (9, 12)


# Images

def image_files(rng):
    "Small files of every mode and kind that Pillow writes."
    for mode in "1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "F":
        for size in (1, 1), (1, 7), (9, 5):
            image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 4), np.uint8), "RGBA")
            image = image.convert("L").convert(mode) if mode in ("I", "F", "I;16") else image.convert("RGB").convert(mode) if mode in ("LAB", "HSV", "YCbCr", "CMYK") else image.quantize(4) if mode == "P" else image.convert("LA").convert(mode) if mode == "PA" else image.convert(mode)
            for kind in "PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000", "TGA", "ICO", "PCX":
                out = io.BytesIO()
                try: image.save(out, kind, **(dict(transparency=0) if mode == "P" and kind in ("PNG", "GIF") else {}))
                except (OSError, ValueError, KeyError, AttributeError): continue # no such mode in this kind
                yield kind, out.getvalue()


def png(w, h, depth=8, colour=0):
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", __import__("zlib").crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, 0)) + chunk(b"IDAT", __import__("zlib").compress(b"\0" * 2000)) + chunk(b"IEND", b"")


def test_images(place):
    file, rng, chance = place / "an image.bin", np.random.default_rng(0), random.Random(5)
    files = list(image_files(rng))
    bombs = [("PNG", png(w, h, d, c)) for w, h in ((60_000, 60_000), (2**31 - 1, 1), (1, 2**31 - 1), (0, 5), (20_000, 20_000), (13_000, 13_000)) for d, c in ((8, 0), (16, 0), (1, 0), (8, 6), (8, 3), (5, 9))]
    bombs += [("GIF", b"GIF89a\xff\xff\xff\xff\x00\x00\x00,\0\0\0\0\xff\xff\xff\xff\0\x02\x02D\x01\0;"), ("BMP", b"BM" + struct.pack("<IHHIIiiHHIIiiII", 100, 0, 0, 54, 40, 2**30, -2**30, 1, 24, 0, 0, 0, 0, 0, 0))]
    for data in [d for _, d in files + bombs] + [mutate(chance.choice(files)[1], chance) for _ in range(1500)]:
        file.write_bytes(data)
        got = case("image", lambda: read_image(file, at_least=chance.choice((None, 4))), file)
        assert isinstance(got, Exception) or got.dtype == np.uint8 and got.ndim == 2
        if chance.random() < .3: case("image header", lambda: image_shape(file), file)
    assert sum(not isinstance(case("image", lambda d=d: (file.write_bytes(d), read_image(file))[1]), Exception) for _, d in files) == len(files), "every whole file is read"


def test_caches(place):
    "Image files through the cache, and the cache's own files."
    chance, rng = random.Random(6), np.random.default_rng(1)
    files, home = list(image_files(rng)), place / "cache images"
    home.mkdir()
    for n in range(60):
        paths = []
        for i in range(3):
            paths.append(home / f"{n}-{i}.png")
            paths[-1].write_bytes((mutate if chance.random() < .7 else lambda d, _: d)(chance.choice(files)[1], chance))
        got = case("image cache", lambda paths=paths: build_cache(paths, 8, place / "cache", on_error="skip", progress=False), *([] if n else [home]))
        assert isinstance(got, Exception) or len(got) + len(got.broken) == 3
    good = home / "good.png"
    Image.fromarray(rng.integers(0, 256, (9, 9), np.uint8)).save(good)
    whole = build_cache([good], 8, place / "cache", progress=False).folder
    index, pixels = (whole / "index.json").read_bytes(), (whole / "images.u8").read_bytes()
    for _ in range(250):
        (whole / "index.json").write_bytes(json_bytes(json.loads(index), chance))
        (whole / "images.u8").write_bytes(pixels if chance.random() < .7 else mutate(pixels, chance))
        got = case("cache index", lambda: ImageCache(whole), whole)
        if not isinstance(got, Exception): case("cache index", lambda got=got: got.rows(got.paths) and got.images[:].sum(), whole)


@pytest.fixture(scope="module")
def films(place):
    rng, made = np.random.default_rng(2), []
    for i, (photometric, bits) in enumerate([("MONOCHROME2", 8), ("MONOCHROME1", 12), ("MONOCHROME2", 16)]):
        write_dicom(rng.integers(0, 256, (6, 5), np.uint8), place / f"film{i}.dcm", "patient", "PA", photometric=photometric, bits=bits)
        made.append((place / f"film{i}.dcm").read_bytes())
    return made


TAGS = dict(Rows=b"\x28\x00\x10\x00US", Columns=b"\x28\x00\x11\x00US", BitsAllocated=b"\x28\x00\x00\x01US", BitsStored=b"\x28\x00\x01\x01US", HighBit=b"\x28\x00\x02\x01US",
            PixelRepresentation=b"\x28\x00\x03\x01US", SamplesPerPixel=b"\x28\x00\x02\x00US")


def test_dicom(place, films):
    "Generated films: flipped, cut, wrong bits, huge dimensions."
    file, chance = place / "film.dcm", random.Random(7)
    def tagged():
        data = bytearray(chance.choice(films))
        for _ in range(chance.randint(1, 3)):
            at = data.find(chance.choice(list(TAGS.values())))
            if at > 0: data[at + 8:at + 10] = struct.pack("<H", chance.choice((0, 1, 2, 7, 8, 9, 12, 16, 17, 32, 64, 65535, 30_000)))
        return bytes(data)
    for _ in range(1200):
        file.write_bytes(tagged() if chance.random() < .4 else mutate(chance.choice(films), chance))
        got = case("DICOM", lambda: read_image(file), file)
        assert isinstance(got, Exception) or got.dtype == np.uint8 and got.ndim == 2
        if chance.random() < .4: case("DICOM header", lambda: (dicom_header(file), image_shape(file)), file)


def test_real_dicom(place, shared_data):
    "Films of other people's makers, changed where the header is and in the pixels."
    file, chance, samples = place / "real film.dcm", random.Random(8), [p.read_bytes() for p in sorted((shared_data / "dicom-samples").glob("*.dcm"))]
    assert samples
    for _ in range(250):
        data = chance.choice(samples)
        cut = chance.choice((2000, 2000, len(data)))
        file.write_bytes(mutate(data[:cut], chance, 6) + data[cut:])
        case("real DICOM", lambda: read_image(file), file)


# Tables of ours, settings, models

def test_our_own_files(place, drawn):
    "Study tables, splits, fractions, published lists, runs."
    chance, home = random.Random(9), place / "ours"
    home.mkdir()
    table, split, fraction = home / "studies.jsonl", home / "split.json", home / "fraction.json"
    save_studies(drawn, table); lines = table.read_text().splitlines()
    split_studies(drawn, dict(train=.5, test=.5)).save(split); draw_fraction(drawn, .5).save(fraction)
    whole = [json.loads(p.read_text()) for p in (split, fraction)]
    for _ in range(250):
        n = chance.randrange(len(lines))
        changed = [json_bytes(json.loads(x), chance) if i == n else x.encode() for i, x in enumerate(lines)]
        table.write_bytes(b"\n".join(changed) + b"\n")
        got = case("study table", lambda: load_studies(table), table, row=r"line \d+")
        if not isinstance(got, Exception): case("study table", lambda got=got: save_studies(got, home / "again.jsonl"))
        for path, value, kind in zip((split, fraction), whole, (Split, Fraction)):
            path.write_bytes(json_bytes(value, chance))
            case(kind.__name__, lambda kind=kind, path=path: kind.load(path), path)
    lists = place / "lists"
    lists.mkdir()
    for _ in range(250):
        for name, text in ("train.csv", "ID,y\na,1\nb,0\nc,1\n"), ("validation.csv", "ID,y\nd,1\n"), ("test.txt", "e 1\nf 2\n"):
            (lists / name).write_bytes(mutate_table(text, chance, " " if name.endswith("txt") else ","))
        case("published lists", lambda: read_lists(lists), lists)
    runs = place / "runs"
    run = run_once(runs, "task", dict(a=1), lambda folder: dict(b=[1, 2]))
    for name in "config", "metrics", "environment":
        before = (run.folder / f"{name}.json").read_bytes()
        for _ in range(60):
            (run.folder / f"{name}.json").write_bytes(json_bytes(json.loads(before), chance) if chance.random() < .5 else mutate(before, chance))
            case("run folder", lambda name=name: [r.read(name) for r in list_runs(runs)], run.folder)
            case("run folder", lambda: find_run(runs, "task"))
        (run.folder / f"{name}.json").write_bytes(before)


setting = st.tuples(st.sampled_from(["lr", "width", "batch_size", "keep", "image_encoder", "use_hard", "objective", "objective_options", "image_size", "mask_share", "zoom", "seed", "x", "", "__class__", "precision", "text_encoder", "clusters", "margin_weight"]),
                    st.one_of(st.text(max_size=8), st.sampled_from(["nan", "inf", "-1", "0", "1e999", "9" * 5000, "true", "yes", "None", "resnet-tiny", "os:system", "builtins:eval", "__import__('os').system('touch /tmp/owned')", "best", "a:b", "../x", "weight=1"]))).map("=".join)


@some(700)
@given(st.lists(st.one_of(setting, st.text(max_size=10)), min_size=1, max_size=3))
def test_settings(texts):
    case("settings", lambda: check_settings(make_settings("tiny", **parse_changes(texts))))


@pytest.fixture(scope="module")
def model(place):
    build_model("resnet-tiny", "bert-tiny", 60, 32, make_settings("tiny", width=8, clusters=4)).save_pretrained(place / "model")
    return place / "model"


def test_checkpoints(model):
    "Configurations with other numbers, weights with other shapes, keys and bytes, and pickles in their place."
    chance, config, weights = random.Random(10), model / "config.json", model / "model.safetensors"
    before, whole = config.read_bytes(), weights.read_bytes()
    for _ in range(100):
        config.write_bytes(json_bytes(json.loads(before), chance) if chance.random() < .8 else mutate(before, chance))
        case("model configuration", lambda: load_model(model), model)
    config.write_bytes(before)
    n = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8:8 + n])
    for _ in range(100):
        h = json.dumps(mutate_json(header, chance)).encode() if chance.random() < .6 else mutate(whole[8:8 + n], chance)
        data = struct.pack("<Q", chance.choice((len(h), len(h), len(h), 2**63, 0, len(whole)))) + h + whole[8 + n:]
        weights.write_bytes(data if chance.random() < .8 else mutate(whole, chance))
        case("model weights", lambda: load_model(model), model)
    weights.unlink()
    case("model weights", lambda: load_model(model), model)
    evil = b"cposix\nsystem\n(S'touch %s'\ntR." % str(model.parent.parent / "owned").encode()
    for name in "pytorch_model.bin", "model.safetensors", "model.pt", "optimizer.pt":
        (model / name).write_bytes(evil)
        case("pickle as weights", lambda: load_model(model), model)
        (model / name).unlink()
    assert not (model.parent.parent / "owned").exists()
    weights.write_bytes(whole)
    load_model(model)


def test_ten_thousand_cases(capsys):
    "The count, by reader and by what became of the cases; it needs the whole file to have run."
    if len(READERS) < 30: pytest.skip(f"only {len(READERS)} readers were fuzzed: run the whole file")
    with capsys.disabled():
        print()
        for reader in sorted(READERS): print(f"{reader:28}", *(f"{COUNTS[reader, how]:6} {how}" for how in ("read", "skipped", "refused")))
        print(f"{'together':28} {sum(COUNTS.values()):6} cases")
    assert sum(COUNTS.values()) >= 10_000
    assert all(any(COUNTS[r, how] for r in READERS) for how in ("read", "skipped", "refused"))
