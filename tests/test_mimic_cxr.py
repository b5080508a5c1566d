"MIMIC-CXR: sections of report text, real and hostile; broken trees; what is written is read again."
import csv
import dataclasses
import gzip
import logging
import random
import re
import shutil
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest import one_sentence
from cmcgns.data.mimic_cxr import (BLANK, LABELS, METADATA, TITLES, UNCERTAIN, compose_report, cut_sections, extract_sections, find_headings, find_mimic_cxr,
                                   find_report, load_mimic_cxr, mend_numbers, published_mimic_cxr, read_labels, scan_mimic_cxr, section_sentences, set_lines, write_mimic_cxr)
from cmcgns.data.studies import Study, check_disjoint, label_array, select
from cmcgns.data.synthetic import synthesize
from cmcgns.image import read_image
from cmcgns.text import note_sentences
from defusedxml import ElementTree
from hypothesis import given, settings
from hypothesis import strategies as st

# sections of real prose

PARTS = "indication", "comparison", "findings", "impression"


@pytest.fixture(scope="module")
def openi(shared_data):
    "Sections of 3,955 real reports, as their publisher tells them apart."
    archive = shared_data / "openi" / "NLMCXR_reports.tgz"
    if not archive.is_file():
        pytest.skip(f"real reports not found at {archive}")
    reports = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".xml"):
                root = ElementTree.fromstring(tar.extractfile(member).read())
                reports[member.name] = {a.get("Label").lower(): a.text or "" for a in root.iter("AbstractText")}
    assert len(reports) == 3955
    return [reports[k] for k in sorted(reports)]


def words(text):
    return text.split()


def style(report, gap, order=PARTS, heading=str.upper):
    "A report as MIMIC would set it; an empty section is left out."
    sections = [f" {heading(k)}: {gap}{set_lines(report[k]).lstrip() if gap == '' else set_lines(report[k])}\n \n" for k in order if report[k].strip()]
    return f"{'FINAL REPORT':>45}\n EXAMINATION:  CHEST (PA AND LAT)\n \n{''.join(sections)}"


STYLES = {"paragraphs": lambda r: style(r, "\n \n"), "the same line": lambda r: style(r, ""), "small letters": lambda r: style(r, " ", heading=str.capitalize),
          "impression first": lambda r: style(r, "\n \n", ("indication", "impression", "comparison", "findings")),
          "one line": lambda r: "  ".join(f"{k.upper()}:  {r[k]}" for k in PARTS if r[k].strip()),
          "fenced": lambda r: f" WET READ: ___ 9:18 PM\n Pneumonia.\n{'_' * 78}\n{style(r, '')}{'_' * 78}\n FINAL ADDENDUM\n IMPRESSION:  Told by phone.\n"}


@pytest.mark.parametrize("name", STYLES)
def test_real_prose_comes_out_as_it_went_in(openi, name):
    wrong = []
    for r in openi:
        parts = extract_sections(STYLES[name](r))
        if (words(parts.impression), words(parts.findings)) != (words(r["impression"]), words(r["findings"])):
            wrong.append((r, parts))
    (r, parts), = wrong # its impression holds a whole second report, which is taken apart
    assert "IMPRESSION: Exam:" in r["impression"] and "FINDINGS: The heart" in r["impression"]
    assert len(re.findall("The\\s+heart\\s+is\\s+mildly\\s+enlarged", parts.findings)) == 2 and parts.impression.count("basilar") == 2


def test_real_findings_without_a_heading(openi):
    "The heading is taken away: an indication, then loose paragraphs."
    some = [r for r in openi if r["indication"].strip() and len(re.findall("[A-Za-z]{3,}", r["findings"])) >= 3 and "IMPRESSION:" not in r["impression"]]
    assert len(some) > 3000
    for with_impression in True, False:
        for r in some:
            text = style(r | dict(findings="", impression=""), "") + set_lines(r["findings"]) + "\n \n" + (f" IMPRESSION:  {r['impression']}\n" if with_impression else "")
            parts = extract_sections(text)
            assert words(parts.findings) == words(r["findings"]) and words(parts.impression) == (words(r["impression"]) if with_impression else [])
            assert parts.how == "loose"


def test_real_prose_has_no_headings_of_the_report(openi):
    found = Counter(h.name for r in openi for k in ("findings", "impression") for h in find_headings(r[k]))
    assert found["findings"] == 1 and found["impression"] == 2 and sum(found.values()) - found[""] - found["views"] - found["organs"] <= 4, found


# sections of anything

WORDS = st.sampled_from("""IMPRESSION: FINDINGS: FINDINGS IMPRESSION: Findings: COMPARISON: LUNGS: CHEST, TWO VIEWS: HISTORY: INDICATION: TECHNIQUE: NOTIFICATION:
    RECOMMENDATION(S): ADDENDUM: PROVIDER: AND ___ 6:29 1. 2) (3) no lungs are clear. Effusion. pneumothorax : ; - é \ufffd \x00""".split() + ["FINAL REPORT", "FINAL ADDENDUM", "WET READ: ___", "_" * 30])
SPACES = st.sampled_from([" ", "  ", "\n", "\n ", "\n \n ", "\n\n", "\t", "\r\n", "\n" + "_" * 40 + "\n", "\x0c", ""])
REPORTS = st.one_of(st.text(max_size=300), st.lists(st.tuples(SPACES, WORDS), max_size=60).map(lambda pairs: "".join(a + b for a, b in pairs)))


def made_of(part, spans):
    "Whether a text is some of these, in their order, with empty lines between them."
    return part == "" or any(part == s or part.startswith(f"{s}\n\n") and made_of(part[len(s) + 2:], spans[i + 1:]) for i, s in enumerate(spans))


@settings(max_examples=600, deadline=None)
@given(REPORTS)
def test_sections_of_anything(text):
    sections, (start, end) = cut_sections(text), find_report(text)
    assert 0 <= start <= end <= len(text)
    at = start
    for s in sections:
        assert at <= s.start < s.end <= end and text[s.start:s.end].strip() == text[s.start:s.end]
        at = s.end
    parts = extract_sections(text)
    for part in parts[:2]:
        assert made_of(part, [text[s.start:s.end] for s in sections]) or parts.how == "last paragraph" and part in text
    assert bool(parts.findings) == bool(parts.how)
    sentences = section_sentences(parts)
    assert all(re.fullmatch("[a-z0-9]+( [a-z0-9]+)+", s) for s in sentences)


@settings(max_examples=300, deadline=None)
@given(REPORTS)
def test_no_word_of_a_report_is_lost(text):
    start, end = find_report(text)
    headings = [(h.start, h.end) for h in find_headings(text, start, end)]
    covered = np.zeros(len(text) + 1, bool)
    for a, b in headings + [(s.start, s.end) for s in cut_sections(text)]:
        covered[a:b] = True
    lost = "".join(c for i, c in enumerate(text[start:end], start) if not covered[i] and not c.isspace())
    assert set(lost) <= {"_"}, lost # only lines that separate


@settings(max_examples=200, deadline=None)
@given(REPORTS)
def test_a_wet_read_before_and_an_addendum_after_change_nothing(text):
    if not re.search("FINAL REPORT|ADDENDUM|WET READ|PRELIMINARY", text) and re.search("[A-Za-z]{2}", text):
        alone, fenced = f"FINAL REPORT\n{text}", f" WET READ: ___\n IMPRESSION: Pneumonia.\n{'_' * 60}\nFINAL REPORT\n{text}\n{'_' * 60}\n ADDENDUM\n FINDINGS: Told."
        assert extract_sections(fenced) == extract_sections(alone + "\n")


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="12)(.: \nab", max_size=80))
def test_mending_numbers_changes_only_their_marks(text):
    mended = mend_numbers(text)
    assert len(mended) == len(text) and all(a == b or (a, b) == (")", ".") for a, b in zip(text, mended))


@pytest.mark.parametrize("unit", ["A ", "IMPRESSION ", "IMPRESSION: ", "_", " ", "\n", "\n ", "FINDINGS AND ", "ABC.DEF", "1) ", "1:1", "WET READ\n", "FINAL REPORT\n", "_____\n", "A" * 72 + "\n"])
def test_long_hostile_text_ends(unit):
    extract_sections((unit * 200_000)[:200_000])


@pytest.mark.parametrize("text, impression, findings", [
    (" FINAL REPORT PORTABLE CHEST:  The heart is large.", "", "The heart is large."),
    ("FINAL REPORT FINDINGS:  The heart is large.", "", "The heart is large."),
    (" ADDENDUM:  Dr. ___ was told.\n FINDINGS:  Clear.\n", "", "Clear."),
    (" FINDINGS:  Clear.\n ADDENDUM:  Dr. ___ was told.\n", "", "Clear."),
    (" IMPRESSION:\n 1.  Small effusion.\n 2.  Edema.\n", "1.  Small effusion.\n 2.  Edema.", ""),
    (" IMPRESSION:  AP chest compared to ___:\n \n Lungs are low.\n \n Heart is large.\n", "AP chest compared to ___:\n \n Lungs are low.\n \n Heart is large.", ""),
    (" FINDINGS:\n \n PA AND LATERAL VIEWS OF THE CHEST:  Clear.\n LEFT SHOULDER:  Intact.\n", "", "PA AND LATERAL VIEWS OF THE CHEST:  Clear.\n LEFT SHOULDER:  Intact."),
    (" IMPRESSION/RECOMMENDATIONS:  Clear.\n", "Clear.", ""),
    ("\n IMPRESSION", "", ""),
    ("Lungs are clear throughout.", "", "Lungs are clear throughout."),
    (" REASON FOR THIS EXAMINATION:  ___ year old man\n \n Findings: Clear.  Impression is stable.\n", "", "Clear.  Impression is stable."),
])
def test_further_reports(text, impression, findings):
    assert extract_sections(text)[:2] == (impression, findings)


# a tree

ROW = dict(PerformedProcedureStepDescription="CHEST", ViewPosition="AP", Rows=8, Columns=8)
REPORT = b" FINAL REPORT\n FINDINGS:  Lungs are clear.  Heart is normal.\n"


def image(dicom="a", patient="10000032", study="50000001", view="AP"):
    return dict(ROW, dicom_id=dicom, subject_id=patient, study_id=study, ViewPosition=view)


def put(file, columns, rows):
    with open(file, "w", newline="") as f:
        writer = csv.DictWriter(f, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def make_tree(root, images, texts=REPORT, labels=(), split=None):
    "A tree with an image and a report for each row."
    root.mkdir(parents=True)
    put(root / "mimic-cxr-2.0.0-metadata.csv", METADATA, images)
    put(root / "mimic-cxr-2.0.0-split.csv", ("dicom_id", "study_id", "subject_id", "split"), split if split is not None else [r | dict(split="train") for r in images])
    put(root / "mimic-cxr-2.0.0-chexpert.csv", ("subject_id", "study_id", *LABELS), labels)
    for r in images:
        folder = root / "files" / f"p{r['subject_id'][:2]}" / f"p{r['subject_id']}" / f"s{r['study_id']}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{r['dicom_id']}.jpg").write_bytes(b"not opened by the loader")
        folder.with_suffix(".txt").write_bytes(texts)
    return root


def reasons(found):
    return [(s.row, s.reason, s.broken) for s in found.skipped]


def test_finding(tmp_path):
    root = make_tree(tmp_path / "data" / "mimic", [image()])
    (tmp_path / "data" / "a file").write_text("")
    assert find_mimic_cxr(tmp_path / "data") == find_mimic_cxr(root) == root
    assert find_mimic_cxr(tmp_path) is None and find_mimic_cxr(tmp_path / "none") is None and find_mimic_cxr(tmp_path / "data" / "a file") is None


def test_no_folder_no_table_no_column(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_mimic_cxr(tmp_path / "none")
    assert "none: there is no such folder; expected MIMIC-CXR-JPG, unpacked: get it from https" in one_sentence(error)
    for kind in "metadata", "chexpert", "split":
        root = make_tree(tmp_path / kind, [image()])
        (root / f"mimic-cxr-2.0.0-{kind}.csv").unlink()
        with pytest.raises(FileNotFoundError) as error:
            published_mimic_cxr(root, load_mimic_cxr(root))
        assert f"there is no mimic-cxr-2.0.0-{kind}.csv or .csv.gz in this folder; get it from" in one_sentence(error)
        assert ("or load with labeler=None" in str(error.value)) == (kind == "chexpert")
    assert len(load_mimic_cxr(tmp_path / "chexpert", labeler=None)) == 1
    for column in "dicom_id", "subject_id", "study_id", "ViewPosition":
        root = make_tree(tmp_path / column, [image()])
        table = root / "mimic-cxr-2.0.0-metadata.csv"
        table.write_text(table.read_text().replace(column, "other", 1))
        with pytest.raises(ValueError, match=f"metadata.csv: column '{column}' is missing") as error:
            load_mimic_cxr(root)
        one_sentence(error)


def test_a_table_that_was_cut(tmp_path):
    root = make_tree(tmp_path / "a", [image(f"{i:040x}", study=str(50_000_000 + i)) for i in range(200)])
    whole = gzip.compress((root / "mimic-cxr-2.0.0-metadata.csv").read_bytes())
    (root / "mimic-cxr-2.0.0-metadata.csv").unlink()
    for kept, says in (len(whole) // 2, "it cannot be read as a table .Compressed file ended"), (0, "column 'dicom_id' is missing"), (5, "it cannot be read as a table"):
        (root / "mimic-cxr-2.0.0-metadata.csv.gz").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=says) as error:
            load_mimic_cxr(root)
        one_sentence(error)
    (root / "mimic-cxr-2.0.0-metadata.csv.gz").write_bytes(b"<html>Log in to PhysioNet</html>")
    with pytest.raises(ValueError, match="it cannot be read as a table .Not a gzipped file"):
        load_mimic_cxr(root)


def test_versions_and_packed_tables(tmp_path):
    root = make_tree(tmp_path / "a", [image()])
    old = root / "mimic-cxr-2.0.0-metadata.csv"
    (root / "mimic-cxr-2.1.0-metadata.csv.gz").write_bytes(gzip.compress(old.read_bytes().replace(b"10000032", b"10000033")))
    (root / "mimic-cxr-2.1.0-test-set-labeled.csv").write_text("study_id\n") # ships with 2.1.0, and is none of ours
    assert [s.patient for s in load_mimic_cxr(root, need_images=False, need_reports=False)] == ["10000033"]


BROKEN = {
    "no such image": lambda folder: (folder / "a.jpg").unlink(), "no report": lambda folder: folder.with_suffix(".txt").unlink(),
    "unreadable report": lambda folder: (folder.with_suffix(".txt").unlink(), folder.with_suffix(".txt").mkdir())}


@pytest.mark.parametrize("reason", BROKEN)
def test_missing_files_are_skipped_or_refused(tmp_path, reason):
    root = make_tree(tmp_path / "a", [image(), image("b", "11000017", "50000002")])
    BROKEN[reason](root / "files" / "p10" / "p10000032" / "s50000001")
    found = scan_mimic_cxr(root)
    assert [s.id for s in found.studies] == ["b"] and reasons(found) == [(2, reason, True)]
    with pytest.raises(FileNotFoundError, match=rf"metadata.csv, row 2: {reason}; expected an? .* at .*s50000001.*; restore it, or load with on_missing='skip'") as error:
        load_mimic_cxr(root, on_missing="raise")
    one_sentence(error)
    assert len(load_mimic_cxr(root, need_images=False, need_reports=False, on_missing="raise")) == 2


def test_a_row_without_patient_or_with_odd_numbers(tmp_path):
    root = make_tree(tmp_path / "a", [image()])
    odd = [image("b", ""), image("c", "../../etc"), image("d", study="5000.0"), image("../../x"), image("")]
    put(root / "mimic-cxr-2.0.0-metadata.csv", METADATA, [image(), *odd, image()])
    found = scan_mimic_cxr(root)
    assert reasons(found) == [(3, "no patient", True), *((n, "odd number", True) for n in (4, 5, 6, 7)), (8, "listed before", False)]
    with pytest.raises(FileNotFoundError, match="row 3: no patient; expected a patient number in subject_id") as error:
        load_mimic_cxr(root, on_missing="raise")
    one_sentence(error)
    with pytest.raises(ValueError, match="on_missing is 'ignore': known are 'skip' and 'raise'"):
        load_mimic_cxr(root, on_missing="ignore")


def test_nothing_at_all(tmp_path):
    root = make_tree(tmp_path / "a", [image()])
    shutil.rmtree(root / "files")
    with pytest.raises(ValueError, match="none of 1 rows became a study .rows skipped: 1 no such image.; check that files/ and the reports are there") as error:
        load_mimic_cxr(root)
    one_sentence(error)
    (root / "files").write_text("a file")
    with pytest.raises(ValueError, match="1 no such image"):
        load_mimic_cxr(root)


@pytest.mark.parametrize("text, sentences", [
    (b"", ()), (b" \n ___ \n", ()), (b"\x00" * 2000, ()), (bytes(range(256)), None),
    ("\ufeffFINDINGS: Temp\u00e9rature 39 \u00b0C, lungs clear.".encode(), ("temperature 39 c lungs clear",)),
    ("FINDINGS: Patient\u2019s lungs are clear.".encode("cp1252"), ("patient s lungs are clear",)),
    (b"FINDINGS: Lungs\x81are clear.", ("lungs are clear",)), # a byte that Windows-1252 does not have either
    (b"FINDINGS: Lungs\r\nare clear.\r\n\r\nIMPRESSION:\r\nNo acute process.\r\n", ("no acute process", "lungs are clear")),
    (b"FINDINGS: Lungs\rare clear.\r\rIMPRESSION:\rNo acute process.", ("no acute process", "lungs are clear"))])
def test_report_files_of_every_kind(tmp_path, text, sentences):
    found = scan_mimic_cxr(make_tree(tmp_path / "a", [image()], text))
    assert found.skipped == [] and (sentences is None or found.studies[0].sentences == sentences)


def test_an_empty_report_stays_and_is_seen(tmp_path):
    study, = load_mimic_cxr(make_tree(tmp_path / "a", [image()], b" INDICATION:  Cough.\n"))
    assert study.sentences == () and study.report == {} and study.dataset == "mimic_cxr"


def test_reports_wherever_they_lie(tmp_path):
    root = make_tree(tmp_path / "a", [image(), image("b", "11000017", "50000002")])
    here = load_mimic_cxr(root)
    beside = root / "mimic-cxr-reports" / "files"
    for file in sorted(root.glob("files/*/*/*.txt")):
        new = beside / file.relative_to(root / "files")
        new.parent.mkdir(parents=True)
        file.rename(new)
    assert load_mimic_cxr(root) == here
    with zipfile.ZipFile(root / "mimic-cxr-reports.zip", "w") as z:
        for file in beside.rglob("*.txt"):
            z.write(file, Path("files") / file.relative_to(beside))
    shutil.move(root / "mimic-cxr-reports", tmp_path / "elsewhere")
    assert load_mimic_cxr(root) == load_mimic_cxr(root, reports=tmp_path / "elsewhere") == load_mimic_cxr(root, reports=tmp_path / "elsewhere" / "files") == here
    shutil.move(root / "mimic-cxr-reports.zip", tmp_path / "reports.zip")
    assert load_mimic_cxr(root, reports=tmp_path / "reports.zip") == here
    with pytest.raises(ValueError, match="none of 2 rows became a study .rows skipped: 2 no report.") as error:
        load_mimic_cxr(root)
    one_sentence(error)
    with pytest.raises(FileNotFoundError, match="there is no such folder or archive of reports; get mimic-cxr-reports.zip from https") as error:
        load_mimic_cxr(root, reports=tmp_path / "nowhere")
    one_sentence(error)


def test_a_damaged_archive(tmp_path):
    root = make_tree(tmp_path / "a", [image(), image("b", "11000017", "50000002")])
    archive = root / "mimic-cxr-reports.zip"
    with zipfile.ZipFile(archive, "w") as z: # stored, so that a changed byte is found by its sum
        for p, s in ("10000032", "50000001"), ("11000017", "50000002"):
            z.writestr(f"mimic-cxr-reports/files/p{p[:2]}/p{p}/s{s}.txt", REPORT)
    whole = archive.read_bytes()
    archive.write_bytes(whole.replace(b"Lungs", b"Lunge", 1))
    assert reasons(scan_mimic_cxr(root)) == [(2, "unreadable report", True)]
    archive.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(ValueError, match="mimic-cxr-reports.zip: it cannot be read as an archive .*; get mimic-cxr-reports.zip from") as error:
        load_mimic_cxr(root)
    one_sentence(error)


def test_views(tmp_path):
    root = make_tree(tmp_path / "a", [image("a", view="PA"), image("b", view="AP"), image("c", view="LATERAL"), image("d", view="LL"), image("e", view=""), image("f", view="AP")])
    found = scan_mimic_cxr(root)
    assert [s.view for s in found.studies] == ["PA", "AP", "AP"] and Counter(s.reason for s in found.skipped) == {"view LATERAL": 1, "view LL": 1, "view not given": 1}
    assert not any(s.broken for s in found.skipped)
    assert [s.id for s in load_mimic_cxr(root, views=["LL", "LATERAL"])] == ["c", "d"]
    one = scan_mimic_cxr(root, one_per_study=True)
    assert [s.id for s in one.studies] == ["a"] and [s.reason for s in one.skipped].count("another image of its study") == 2
    assert [s.id for s in load_mimic_cxr(root, one_per_study=True, views=["AP", "PA"])] == ["b"] # the first of the better view


def test_the_order_of_rows_does_not_matter(tmp_path):
    images = [image(f"i{i}", str(10_000_000 + i % 7), str(50_000_000 + i % 11)) for i in range(77)]
    root = make_tree(tmp_path / "a", images)
    sorted_ = {s.id: s for s in load_mimic_cxr(root)}
    random.Random(1).shuffle(images)
    put(root / "mimic-cxr-2.0.0-metadata.csv", METADATA, images)
    mixed = load_mimic_cxr(root)
    assert [s.id for s in mixed] == [r["dicom_id"] for r in images] and {s.id: s for s in mixed} == sorted_


def test_sentences_can_be_cut_otherwise(tmp_path):
    root = make_tree(tmp_path / "a", [image()], b" FINDINGS:  A nodule of 1.5 cm is new.")
    assert load_mimic_cxr(root)[0].sentences == ("a nodule of", "5 cm is new")
    assert load_mimic_cxr(root, split=note_sentences)[0].sentences == ("a nodule of 1 5 cm is new",)


# labels

def test_labels(tmp_path):
    rows = [dict(study_id="50000001", Edema="-1.0", Pneumonia="-1", Fracture="0", Cardiomegaly="-1.0", **{"No Finding": "1", "Pleural Effusion": "1.0"})]
    root = make_tree(tmp_path / "a", [image()], labels=rows)
    def got(**kw):
        labels = load_mimic_cxr(root, **dict(blank="unknown") | kw)[0].labels
        assert list(labels) == list(LABELS)
        return {k: v for k, v in labels.items() if v is not None}
    sure = {"Fracture": 0, "No Finding": 1, "Pleural Effusion": 1}
    assert got() == sure and got(uncertain="positive") == sure | dict(Edema=1, Pneumonia=1, Cardiomegaly=1) and got(uncertain="negative") == sure | dict(Edema=0, Pneumonia=0, Cardiomegaly=0)
    assert got(uncertain="published") == sure | dict(Edema=1, Cardiomegaly=0)
    assert got(blank="negative", uncertain="negative") == {k: sure.get(k, 0) for k in LABELS}
    assert load_mimic_cxr(root)[0].labels == {k: sure.get(k, 0) for k in LABELS} | dict(Edema=None, Pneumonia=None, Cardiomegaly=None)
    for option in dict(uncertain="maybe"), dict(blank="maybe"), dict(labeler="chexbert"):
        (name, value), = option.items()
        with pytest.raises(ValueError, match=f"{name} is '{value}': known are ") as error:
            load_mimic_cxr(root, **option)
        one_sentence(error)


def test_every_option_of_labels_is_a_mapping_of_the_same_cells(tmp_path):
    rng = random.Random(0)
    rows = [dict(study_id=str(50_000_000 + i), **{k: rng.choice(["", "1.0", "0.0", "-1.0"]) for k in LABELS}) for i in range(300)]
    root = make_tree(tmp_path / "a", [image()], labels=rows)
    for uncertain in UNCERTAIN:
        for blank in BLANK:
            labels = read_labels(root, uncertain=uncertain, blank=blank)
            for row in rows:
                for k in LABELS:
                    expected = {"1.0": 1, "0.0": 0, "": BLANK[blank], "-1.0": UNCERTAIN[uncertain].get(k)}[row[k]]
                    assert labels[row["study_id"]][k] == expected


def test_negbio_and_studies_without_labels(tmp_path):
    root = make_tree(tmp_path / "a", [image(), image("b", "11000017", "50000002")])
    put(root / "mimic-cxr-2.0.0-negbio.csv", ("subject_id", "study_id", *LABELS), [dict(study_id="50000001", Edema="1")])
    a, b = load_mimic_cxr(root, labeler="negbio")
    assert a.labels["Edema"] == 1 and a.labels["Fracture"] == 0 and set(b.labels.values()) == {None} and list(b.labels) == list(LABELS)


def test_a_label_that_is_none(tmp_path):
    root = make_tree(tmp_path / "a", [image(), image("b", "11000017", "50000002")], labels=[dict(study_id="50000001", Edema="2"), dict(study_id="50000002", Edema="1")])
    found = scan_mimic_cxr(root)
    assert [s.id for s in found.studies] == ["b"] and reasons(found) == [(2, "unreadable label", True)]
    with pytest.raises(ValueError, match="chexpert.csv, row 2: Edema is '2'; expected 1, 0, -1 or nothing; get it from .*, or load with on_missing='skip'") as error:
        load_mimic_cxr(root, on_missing="raise")
    one_sentence(error)
    table = root / "mimic-cxr-2.0.0-chexpert.csv"
    table.write_text(table.read_text().replace("Fracture", "Fractures"))
    with pytest.raises(ValueError, match="column 'Fracture' is missing"):
        load_mimic_cxr(root)


# the published split

def test_the_published_split(tmp_path):
    images = [image(f"i{i}", str(10_000_000 + i // 2), str(50_000_000 + i)) for i in range(12)]
    split = [r | dict(split=("train", "train", "train", "validate", "test", "test")[i // 2]) for i, r in enumerate(images)]
    root = make_tree(tmp_path / "a", images, split=split)
    studies = load_mimic_cxr(root)
    got = published_mimic_cxr(root, studies)
    assert got.counts() == dict(train=6, validation=2, test=4) and got.by == "patient" and got.parts == published_mimic_cxr(root).parts
    check_disjoint(studies, got)
    assert [s.id for s in select(studies, got, "validation")] == ["i6", "i7"]
    assert published_mimic_cxr(root, studies, merge_test=True).counts() == dict(train=6, validation=6)
    assert published_mimic_cxr(root, studies[:3]).counts() == dict(train=3, validation=0, test=0)


@pytest.mark.parametrize("change, says", [
    (dict(split="test"), "row 3: study_id 50000001 is in 'test', and in row 2 in 'train'; expected it in one part"),
    (dict(split="test", study_id="50000009"), "row 3: subject_id 10000032 is in 'test', and in row 2 in 'train'"),
    (dict(split="test", study_id="50000009", subject_id="19999999", dicom_id="a"), "row 3: dicom_id a is in 'test', and in row 2 in 'train'"),
    (dict(split="val"), "row 3: split is 'val'; expected train, validate or test"), (dict(split=""), "row 3: split is ''; expected"),
    (dict(dicom_id="x"), "there is no row for the image 'b'; metadata and split must be of the same version")])
def test_a_split_that_is_none(tmp_path, change, says):
    images = [image("a"), image("b")]
    root = make_tree(tmp_path / "a", images, split=[images[0] | dict(split="train"), images[1] | dict(split="train") | change])
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        published_mimic_cxr(root, load_mimic_cxr(root))
    one_sentence(error)


# the log, and relative folders

def test_what_was_skipped_is_one_line_of_the_log(tmp_path, caplog, monkeypatch):
    make_tree(tmp_path / "a", [image(), image("b", view="LL")])
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.INFO, "cmcgns"):
        study, = load_mimic_cxr("a")
    assert [r.getMessage() for r in caplog.records] == ["mimic_cxr: 1 studies; rows skipped: 1 view LL"]
    assert study.image == Path("a/files/p10/p10000032/s50000001/a.jpg")


# writing

@pytest.fixture(scope="module")
def written(tmp_path_factory):
    place = tmp_path_factory.mktemp("mimic")
    drawn = synthesize(200, place, size=128, seed=5)
    return drawn, write_mimic_cxr(drawn, place / "mimic")


def test_what_is_written_is_read_again(written):
    drawn, root = written
    found = scan_mimic_cxr(root, on_missing="raise")
    again = found.studies
    assert len(again) == 200 and found.skipped == [] and len({s.id for s in again}) == 200
    assert [s.sentences for s in again] == [s.sentences for s in drawn] and [s.view for s in again] == [s.view for s in drawn]
    known = [k for k in drawn[0].labels if k in TITLES]
    assert len(known) >= 7 and (label_array(again, [TITLES[k] for k in known]) == label_array(drawn, known)).all()
    pairs = {(a.patient, b.patient) for a, b in zip(drawn, again)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) > 50
    healthy = [not any(s.labels[k] for k in known if k != "devices") for s in drawn] # devices are no finding, for the publisher
    assert [s.labels["No Finding"] == 1 for s in again] == healthy and 0 < sum(healthy) < 200
    assert all(s.labels["Fracture"] is None for s in load_mimic_cxr(root, blank="unknown")) # nobody drew or denied one


def test_images_are_written_in_the_publishers_layout(written):
    drawn, root = written
    for a, b in zip(drawn, load_mimic_cxr(root)):
        assert re.fullmatch(r"files/p1\d/p1\d{7}/s5\d{7}/[0-9a-f]{8}(-[0-9a-f]{8}){4}\.jpg", b.image.relative_to(root).as_posix())
        x, y = read_image(a.image).astype(int), read_image(b.image).astype(int)
        assert x.shape == y.shape and np.abs(x - y).mean() < 2
    with gzip.open(root / "mimic-cxr-2.0.0-metadata.csv.gz", "rt") as f:
        rows = list(csv.DictReader(f))
    assert tuple(rows[0]) == METADATA and {(r["Rows"], r["Columns"]) for r in rows} == {("128", "128")}
    assert max(len(line) for p in root.glob("files/*/*/*.txt") for line in p.read_text().splitlines()) <= 80


def test_the_written_split_is_by_patient(written):
    drawn, root = written
    studies = load_mimic_cxr(root)
    split = published_mimic_cxr(root, studies)
    check_disjoint(studies, split)
    assert sum(split.counts().values()) == 200 and all(split.counts().values()) and split.counts()["train"] > 120


def test_writing_twice_gives_the_same_bytes(written, tmp_path):
    drawn, root = written
    again = write_mimic_cxr(drawn[:5], tmp_path / "a"), write_mimic_cxr(drawn[:5], tmp_path / "b")
    files = [sorted(p.relative_to(r) for p in r.rglob("*") if p.is_file()) for r in again]
    assert files[0] == files[1] and len(files[0]) == 13 and all((again[0] / p).read_bytes() == (again[1] / p).read_bytes() for p in files[0])
    with pytest.raises(FileExistsError, match="it is there already; write into an empty folder") as error:
        write_mimic_cxr(drawn[:1], tmp_path / "a")
    one_sentence(error)


def test_sections_are_written_and_a_jpeg_is_copied(written, tmp_path):
    study = load_mimic_cxr(written[1])[0]
    mine = dataclasses.replace(study, report={"findings": "Effusion of 1.5 cm.  LINES:  None. " + "Heart is normal. " * 20, "impression": "1. Effusion."})
    back, = load_mimic_cxr(write_mimic_cxr([mine], tmp_path / "a"))
    assert {k: v.split() for k, v in back.report.items()} == {k: v.split() for k, v in mine.report.items()}
    assert back.image.read_bytes() == study.image.read_bytes()
    silent, = load_mimic_cxr(write_mimic_cxr([dataclasses.replace(study, report={}, sentences=(), meanings=())], tmp_path / "b"))
    assert silent.sentences == () and silent.report == {}
    with pytest.raises(ValueError, match="its impression cannot be told from the rest of a report; take headings out of its text") as error:
        write_mimic_cxr([dataclasses.replace(study, report={"impression": "Clear. COMPARISON: None."})], tmp_path / "c")
    one_sentence(error)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(st.from_regex("[a-z0-9]{1,12}", fullmatch=True), min_size=2, max_size=12).map(" ".join), max_size=8))
def test_any_clean_sentences_survive_a_report(sentences):
    study = Study("s", Path("s.png"), "p", tuple(sentences), view="AP")
    kept = sentences if sum(len(s.split()) for s in sentences) >= 3 else []
    if all(re.search("[a-z]{2}", s) for s in sentences):
        assert section_sentences(extract_sections(compose_report(study))) == tuple(kept)


# size

def write_tables(root, patients, rng, views=(("AP", 147173), ("PA", 96161), ("LATERAL", 82853), ("LL", 35133), ("", 15769), ("XTABLE LATERAL", 21))):
    "Tables of made-up numbers, with the shares of views, splits and labels that the publisher tells."
    root.mkdir()
    with gzip.open(root / "mimic-cxr-2.0.0-metadata.csv.gz", "wt", 1) as m, gzip.open(root / "mimic-cxr-2.0.0-split.csv.gz", "wt", 1) as s, gzip.open(root / "mimic-cxr-2.0.0-chexpert.csv.gz", "wt", 1) as c:
        m.write(",".join(METADATA) + "\n"), s.write("dicom_id,study_id,subject_id,split\n"), c.write(",".join(("subject_id", "study_id", *LABELS)) + "\n")
        counts, names, study = Counter(), [v for v, _ in views], 50_000_000
        for p in range(10_000_000, 10_000_000 + patients):
            part = rng.choices(("train", "validate", "test"), (64586, 500, 293))[0]
            for _ in range(rng.choice((1, 2, 3, 8))):
                study += 1
                c.write(f"{p},{study}," + ",".join(rng.choices(("", "1.0", "0.0", "-1.0"), (8, 2, 1, .3), k=14)) + "\n")
                for _ in range(rng.choice((1, 2, 2))):
                    view = rng.choices(names, [n for _, n in views])[0]
                    dicom = f"{rng.getrandbits(160):040x}"
                    counts[view, part] += 1
                    m.write(f"{dicom},{p},{study},CHEST,{view},2544,3056,21800506,213014.531,CHEST,,\n"), s.write(f"{dicom},{study},{p},{part}\n")
    return counts


def test_large_tables_are_counted_right(tmp_path):
    counts = write_tables(tmp_path / "a", 2000, random.Random(0))
    found = scan_mimic_cxr(tmp_path / "a", need_images=False, need_reports=False)
    frontal = {k: n for k, n in counts.items() if k[0] in ("AP", "PA")}
    assert len(found.studies) == sum(frontal.values()) > 4000 and len(found.studies) + len(found.skipped) == sum(counts.values())
    split = published_mimic_cxr(tmp_path / "a", found.studies)
    assert split.counts() == {k: sum(n for (_, part), n in frontal.items() if part == p) for k, p in dict(train="train", validation="validate", test="test").items()}
    assert sum(published_mimic_cxr(tmp_path / "a").counts().values()) == sum(counts.values())
    alike = Counter(id(s.labels) for s in found.studies)
    assert len(alike) < len(found.studies) # labels of one examination, and equal ones, are kept once


# the real tables

@pytest.fixture(scope="module")
def real(shared_data):
    root = find_mimic_cxr(shared_data)
    if root is None:
        pytest.skip(f"no MIMIC-CXR tables in {shared_data}: they need credentials of their own")
    return root


@pytest.mark.slow
def test_counts_of_the_real_tables(real):
    found = scan_mimic_cxr(real, need_images=False, need_reports=False)
    assert len(found.studies) + len(found.skipped) == 377_110 and Counter(s.view for s in found.studies) == {"AP": 147_173, "PA": 96_161}
    assert published_mimic_cxr(real).counts() == dict(train=368_960, validation=2_991, test=5_159) and len(read_labels(real)) == 227_827
