"Open-i: exact counts on the real reports, archives and XML that mean harm, writer and loader, broken downloads."
import gzip
import io
import logging
import re
import shutil
import tarfile
from collections import Counter, defaultdict
from dataclasses import replace

import pytest
from conftest import one_sentence
from cmcgns.data.openi import (FRONTAL, HEADINGS, LARGEST, LATERAL, LIST, TABLE, count_sections, find_openi, find_reports, heading, image_key,
                               label_reports, load_openi, open_reports, parse_report, read_reports, read_views, scan_openi, tell_views, write_openi)
from cmcgns.data.studies import check_disjoint, read_rows, split_studies
from cmcgns.data.synthetic import synthesize
from cmcgns.image import read_image
from cmcgns.text import note_sentences, report_sentences, split_report
from PIL import Image


@pytest.fixture(scope="module")
def home(shared_data):
    return shared_data / "openi"


@pytest.fixture(scope="module")
def reports(home):
    found, skipped = read_reports(home)
    assert skipped == []
    return found


def sentences_of(report, **kwargs):
    return report_sentences(report.sections.get("impression", ""), report.sections.get("findings", ""), **kwargs)


# the real reports

def test_all_reports_are_parsed(reports, home, shared_data):
    assert len(reports) == len({r.id for r in reports}) == 3955
    assert [r.id for r in reports] == sorted((r.id for r in reports), key=lambda i: int(i[3:])) and reports[0].id == "CXR1"
    assert count_sections(reports) == {"both": 3419, "findings only": 6, "impression only": 502, "none": 28, "without images": 104}
    assert Counter(k for r in reports for k in r.sections) == {"impression": 3921, "indication": 3865, "findings": 3425, "comparison": 3333}
    assert max(len(data) for _, data in open_reports(find_reports(home))) == 8967
    assert find_openi(home) == home and find_openi(shared_data) == home and find_openi(shared_data / "labels") is None


def test_sections_are_as_they_were_written(reports, home):
    with tarfile.open(home / "NLMCXR_reports.tgz") as archive:
        text = archive.extractfile("ecgen-radiology/1.xml").read().decode()
    assert text.count('<AbstractText Label="') == 4
    assert reports[0].sections == {k.lower(): v for k, v in re.findall('<AbstractText Label="(.*?)">(.*?)</AbstractText>', text)}
    assert reports[0].sections["impression"] == "Normal chest x-XXXX." and reports[0].major == ("normal",)


def test_sentences(reports):
    said = [sentences_of(r) for r in reports]
    assert sum(map(len, said)) == 22728 and len({s for r in said for s in r}) == 8481 and sum(not r for r in said) == 28
    assert sum(len(sentences_of(r, split=note_sentences)) for r in reports) == 22675
    counts = Counter(s for r in said for s in r)
    assert sorted(counts.items(), key=lambda c: (-c[1], c[0]))[:10] == [
        ("no acute cardiopulmonary abnormality", 492), ("the lungs are clear", 366), ("no pneumothorax", 290), ("lungs are clear", 242),
        ("no acute cardiopulmonary findings", 208), ("heart size normal", 186), ("no acute cardiopulmonary disease", 183), ("heart size is normal", 180),
        ("no pneumothorax or pleural effusion", 180), ("the heart is normal in size", 177)]


def test_labels(reports):
    labels = label_reports(reports)
    assert len(labels["CXR1"]) == 118 and len({tuple(v) for v in labels.values()}) == 1
    assert Counter(v["normal"] for v in labels.values()) == {1: 1391, 0: 2469, None: 95}
    assert all(r.major for r in reports) and all(r.major == ("normal",) for r in reports if "normal" in r.major) and all(r.major == ("No Indexing",) for r in reports if "No Indexing" in r.major)
    counts = {k: sum(v[k] == 1 for v in labels.values()) for k in labels["CXR1"]}
    assert sorted(counts.items(), key=lambda c: -c[1])[:6] == [("normal", 1391), ("Lung", 554), ("Opacity", 455), ("Cardiomegaly", 375), ("Pulmonary Atelectasis", 332), ("Calcinosis", 305)]
    raw = {" ".join(t.split("/")[0].split()) for r in reports for t in r.major}
    assert {"Thoracic Vertebrae", "Thoracic vertebrae"} <= raw and "Thoracic vertebrae" not in counts and "Thoracic Vertebrae" in counts
    for r in reports:
        assert {k.casefold() for k, v in labels[r.id].items() if v} == {heading(t).casefold() for t in r.major} - {"no indexing"}
    assert {"Subcutaneous Emphysema", "Pericardial Effusion"} <= {t.title() for r in reports for t in r.automatic}


def test_images(reports):
    assert Counter(len(r.images) for r in reports) == {2: 3208, 1: 446, 3: 181, 0: 104, 4: 15, 5: 1}
    names = [i for r in reports for i in r.images]
    assert len(names) == len(set(names)) == 7470 and all(i.startswith(f"{r.id}_") for r in reports for i in r.images)
    assert len({image_key(i) for i in names}) == 7470


def test_the_view_table_cannot_be_taken_at_its_word(reports, home):
    table, seen = read_views(home)
    assert seen == {} and len(table) == 7469
    views = {i: table.get(image_key(i)) for r in reports for i in r.images}
    assert Counter(views.values()) == {"PA": 3593, "": 2586, "LL": 717, "AP": 423, "LATERAL": 119, "RL": 29, "LARGE LATERAL": 2, None: 1}
    pairs = [r for r in reports if len(r.images) == 2]
    both = [r for r in pairs if [views[i] for i in r.images] == ["PA", "PA"]]
    assert len(pairs) == 3208 and len(both) == 1089 and sum(bool(re.search(r"\blat", next(iter(r.images.values())), re.I)) for r in both) == 904


def test_patient_numbers_are_report_numbers(home, reports):
    rows = read_rows(home / f"{TABLE}.gz", ["imageid", "Patient ID"], "").values()
    assert {(r["imageid"].split("_")[0], f"CXR{r['Patient ID']}") for r in rows} == {(r.id, r.id) for r in reports if r.images}


@pytest.mark.parametrize("choice, studies, patients", [({}, 833, 807), (dict(believe=True), 4016, 2562), (dict(views=(*FRONTAL, "")), 6603, 3812)])
def test_what_the_choices_of_views_come_to(home, choice, studies, patients):
    found = scan_openi(home, need_images=False, **choice)
    assert len(found.studies) == len({s.id for s in found.studies}) == studies and len({s.patient for s in found.studies}) == patients
    assert len(found.studies) + len(found.skipped) == 7470 + 104 and not any(s.broken for s in found.skipped)
    split = split_studies(found.studies, stratify="normal")
    check_disjoint(found.studies, split)


def test_believed_views_have_a_lateral_beside_them(reports, home):
    table, seen = read_views(home)
    for r in reports:
        views = tell_views(r.images, table, seen)
        assert not {"PA", "AP"} & set(views.values()) or set(LATERAL) & set(views.values())


def test_unpacked_is_the_same(home, reports, tmp_path):
    with tarfile.open(home / "NLMCXR_reports.tgz") as archive:
        archive.extractall(tmp_path / "NLMCXR_reports", filter="data")
    assert read_reports(tmp_path) == (reports, [])


def test_the_real_images_are_asked_for(home):
    with pytest.raises(ValueError, match="no image became a study .*833 no such image.*; unpack NLMCXR_png.tgz there, or read the reports alone with need_images=False") as error:
        load_openi(home)
    one_sentence(error)


# trees made here

def make_xml(n, findings="The lungs are clear.", impression="No acute disease.", major=("normal",), images=None, head='<?xml version="1.0" encoding="utf-8"?>'):
    films = "".join(f'<parentImage id="{i}"/>' for i in ([f"CXR{n}_IM-{n:04d}-1001"] if images is None else images))
    return (f'{head}<eCitation><uId id="CXR{n}"/><AbstractText Label="FINDINGS">{findings}</AbstractText><AbstractText Label="IMPRESSION">{impression}</AbstractText>'
            f'<MeSH>{"".join(f"<major>{m}</major>" for m in major)}</MeSH>{films}</eCitation>').encode()


def make_tree(root, files, images=(), packed=False):
    root.mkdir(parents=True)
    if packed:
        pack(root / "NLMCXR_reports.tgz", files)
    else:
        (root / "ecgen-radiology").mkdir()
        for name, data in files.items():
            (root / "ecgen-radiology" / name).write_bytes(data)
    (root / "NLMCXR_png").mkdir()
    for name in images:
        Image.new("L", (8, 8), 90).save(root / "NLMCXR_png" / f"{name}.png")
    return root


def pack(path, files, prefix="ecgen-radiology/"):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


BOMB = (b'<?xml version="1.0"?><!DOCTYPE x [<!ENTITY a "' + b"ha" * 50 + b'">'
        + b"".join(b'<!ENTITY %c "' % (98 + i) + b"&%c;" % (97 + i) * 10 + b'">' for i in range(9)) + b']><eCitation><uId id="CXR9"/><AbstractText Label="FINDINGS">&j;</AbstractText></eCitation>')
BROKEN = {
    "2.xml": (b"", "malformed XML (no element found: line 1, column 0)"),
    "3.xml": (make_xml(3)[:90], "malformed XML (unclosed token: line 1, column 65)"),
    "4.xml": (b"<!DOCTYPE html><html><body>404<br></body></html>", "malformed XML (mismatched tag: line 1, column 36)"),
    "5.xml": (b"<html>moved</html>", "XML without a report's number"),
    "6.xml": (make_xml(6)[:-1], "malformed XML"),
    "7.xml": (b'<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/hostname">]><eCitation><uId id="CXR7"/><AbstractText Label="FINDINGS">&f;</AbstractText></eCitation>', "XML with entities"),
    "8.xml": (make_xml(8, "&nbsp;clear"), "malformed XML (undefined entity: line 1"),
    "9.xml": (BOMB, "XML with entities"),
    "10.xml": (make_xml(10, head='<?xml version="1.0" encoding="x-none"?>'), "malformed XML (unknown encoding: x-none)"),
    "11.xml": (make_xml(11, "38\xb0".encode("latin1").decode("latin1")).replace("\xb0".encode(), b"\xb0"), "malformed XML (not well-formed (invalid token): line 1"),
    "12.xml": (b" " * (LARGEST + 5), "larger than a report can be"),
    "13.xml": (bytes(range(256)), "malformed XML (not well-formed (invalid token): line 1, column 0)"),
    "14.xml": (make_xml("1/../../x", images=[]), "XML without a report's number"),
    "15.xml": (gzip.compress(make_xml(15)), "malformed XML"),
}


@pytest.mark.parametrize("packed", [False, True])
def test_a_broken_report_is_one_row_with_its_reason(tmp_path, packed):
    root = make_tree(tmp_path / "openi", {"1.xml": make_xml(1), "16.xml": make_xml(1)} | {k: v for k, (v, _) in BROKEN.items()}, packed=packed)
    reports, skipped = read_reports(root)
    assert [r.id for r in reports] == ["CXR1"] and all(s.broken and "\n" not in s.reason for s in skipped)
    reasons = {s.name: s.reason for s in skipped}
    assert reasons.pop("16.xml") == "number given twice"
    assert reasons.keys() == BROKEN.keys()
    for name, reason in reasons.items():
        assert reason.startswith(BROKEN[name][1]), name
    with pytest.raises(ValueError, match=r"10.xml: malformed XML \(unknown encoding: x-none\); download it again, or load with on_missing='skip'") as error:
        load_openi(root, views=[""], on_missing="raise", need_images=False)
    one_sentence(error)


def test_entities_are_never_expanded():
    for data in BOMB, BROKEN["7.xml"][0]:
        with pytest.raises(ValueError, match="^XML with entities$"):
            parse_report(data)
    assert parse_report(b"<!DOCTYPE eCitation>" + make_xml(1, "a &lt; b &amp; c &#176;", head="")).sections["findings"] == "a < b & c \xb0"


def test_deep_nesting_does_no_harm():
    data = b'<eCitation><uId id="CXR1"/>' + b"<a>" * 100_000 + b"</a>" * 100_000 + b"</eCitation>"
    assert parse_report(data).id == "CXR1"


def test_odd_reports_are_still_reports():
    report = parse_report(b'<eCitation><uId id="CXR5"/><AbstractText Label="Findings"> Clear <b>lungs</b>. </AbstractText><AbstractText Label="FINDINGS">No effusion.</AbstractText>'
                          b'<AbstractText>nobody knows</AbstractText><MeSH><major> Lung/x </major><major/></MeSH><parentImage/></eCitation>')
    assert report.sections == {"findings": "Clear lungs.\nNo effusion.", "": "nobody knows"} and report.major == ("Lung/x", "") and report.images == {"": ""}
    assert parse_report('<?xml version="1.0" encoding="utf-16"?><eCitation><uId id="CXR6"/></eCitation>'.encode("utf-16")) == ("CXR6", {}, (), (), {})


def test_only_plain_files_of_the_folder_are_read(tmp_path):
    secret = tmp_path / "secret.xml"
    secret.write_bytes(make_xml(66))
    with tarfile.open(tmp_path / "NLMCXR_reports.tgz", "w:gz") as archive:
        for kind, name, target in [(tarfile.SYMTYPE, "ecgen-radiology/66.xml", str(secret)), (tarfile.LNKTYPE, "ecgen-radiology/67.xml", "ecgen-radiology/1.xml"),
                                   (tarfile.FIFOTYPE, "ecgen-radiology/68.xml", ""), (tarfile.CHRTYPE, "ecgen-radiology/69.xml", ""), (tarfile.DIRTYPE, "ecgen-radiology/70.xml", "")]:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
        for name in "../71.xml", "../ecgen-radiology/72.xml", "/ecgen-radiology/73.xml", "ecgen-radiology/../74.xml", "ecgen-radiology/deep/75.xml", "ecgen-radiology/._1.xml", "76.xml", "ecgen-radiology/77.xml.txt":
            data = make_xml(int(re.sub(r"\D", "", name) or 0))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        member = tarfile.TarInfo("./NLMCXR_reports/ecgen-radiology/1.xml")
        member.size = len(make_xml(1))
        archive.addfile(member, io.BytesIO(make_xml(1)))
    before = sorted(tmp_path.rglob("*"))
    reports, skipped = read_reports(tmp_path)
    assert [r.id for r in reports] == ["CXR1"] and skipped == [] and sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("keep", [0, 5, 300, -20])
def test_a_damaged_archive_is_one_sentence(tmp_path, keep):
    path = pack(tmp_path / "NLMCXR_reports.tgz", {f"{n}.xml": make_xml(n, f"{n * 7919} {n ** 5} mm.") for n in range(1, 60)})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="NLMCXR_reports.tgz: the archive is damaged or not whole .*; download it again") as error:
        read_reports(tmp_path)
    one_sentence(error)


@pytest.mark.parametrize("content", [b"<html>Not Found</html>", bytes(1000) + b"x"])
def test_no_archive_at_all(tmp_path, content):
    (tmp_path / "NLMCXR_reports.tgz").write_bytes(content)
    with pytest.raises(ValueError, match="NLMCXR_reports.tgz: (the archive is damaged or not whole|none of 0 files is a report)") as error:
        read_reports(tmp_path)
    one_sentence(error)


def test_a_flipped_byte_is_noticed(tmp_path):
    path = pack(tmp_path / "NLMCXR_reports.tgz", {f"{n}.xml": make_xml(n, f"{n * 7919} {n ** 5} mm.") for n in range(1, 60)})
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xff
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="the archive is damaged or not whole"):
        read_reports(tmp_path)


def test_no_folder_no_reports(tmp_path):
    for root in tmp_path / "none", tmp_path:
        with pytest.raises(FileNotFoundError, match="neither NLMCXR_reports.tgz nor ecgen-radiology/ is there or one folder below; get https://openi") as error:
            scan_openi(root)
        one_sentence(error)
    (tmp_path / "ecgen-radiology").mkdir()
    with pytest.raises(ValueError, match="ecgen-radiology: none of 0 files is a report; download it again"):
        read_reports(tmp_path)
    (tmp_path / "ecgen-radiology" / "1.xml").write_bytes(b"<html/>")
    with pytest.raises(ValueError, match="none of 1 files is a report, 1.xml: XML without a report's number; download it again") as error:
        read_reports(tmp_path)
    one_sentence(error)


def test_where_reports_are_found(tmp_path):
    file = tmp_path / "a.xml"
    file.write_bytes(b"")
    assert find_openi(tmp_path) is None and find_openi(file) is None and find_openi(tmp_path / "none") is None
    root = make_tree(tmp_path / "any name" / "NLMCXR_reports", {"1.xml": make_xml(1)})
    assert find_reports(tmp_path / "any name").name == "ecgen-radiology" and find_openi(tmp_path / "any name") == tmp_path / "any name"
    assert find_openi(root) == root and find_openi(tmp_path) == tmp_path / "any name"
    pack(tmp_path / "any name" / "NLMCXR_reports.tgz", {"2.xml": make_xml(2)})
    assert [r.id for r in read_reports(tmp_path)[0]] == ["CXR2"] # the archive comes first


def test_images_and_reports_that_lack_each_other(tmp_path):
    root = make_tree(tmp_path / "a", {"1.xml": make_xml(1), "2.xml": make_xml(2), "3.xml": make_xml(3, images=[]), "4.xml": make_xml(4, "", "", images=["CXR4_IM-1"])},
                     ["CXR1_IM-0001-1001", "CXR4_IM-1", "CXR9_IM-1", "._CXR1_IM-0001-1001"])
    (root / "NLMCXR_png" / "CXR2_IM-0002-1001.png").mkdir() # a folder is no image
    found = scan_openi(root, views=[""])
    assert [(s.id, s.patient, bool(s.sentences)) for s in found.studies] == [("CXR1_IM-0001-1001", "CXR1", True), ("CXR4_IM-1", "CXR4", False)]
    assert {(s.name, s.reason, s.broken) for s in found.skipped} == {("CXR2_IM-0002-1001", "no such image", True), ("CXR3", "report without images", False), ("CXR9_IM-1", "image without a report", False)}
    with pytest.raises(FileNotFoundError, match="CXR2_IM-0002-1001.png: no such image, and CXR2 names it") as error:
        scan_openi(root, views=[""], on_missing="raise")
    one_sentence(error)
    with pytest.raises(ValueError, match="on_missing is 'ignore': known are 'skip' and 'raise'"):
        scan_openi(root, on_missing="ignore")
    assert len(load_openi(root, views=[""], need_images=False)) == 3


def test_images_beside_the_reports_and_endings_in_capitals(tmp_path):
    root = make_tree(tmp_path / "a", {"1.xml": make_xml(1)})
    Image.new("L", (8, 8)).save(root / "CXR1_IM-0001-1001.PNG")
    assert load_openi(root, views=[""])[0].image == root / "CXR1_IM-0001-1001.PNG"


def test_views_from_tables(tmp_path):
    names = ["CXR1_IM-1-1", "CXR1_IM-1-2"]
    root = make_tree(tmp_path / "a", {"1.xml": make_xml(1, images=names)}, names)
    with pytest.raises(ValueError, match="2 view not told.*put indiana_projections.csv or nlmcxr_dicom_metadata.csv beside the reports, or ask") as error:
        load_openi(root)
    one_sentence(error)
    (root / TABLE).write_text("imageid,View Position\nCXR1_IM-1-1,PA\nCXR1_IM-1-2,PA\n")
    with pytest.raises(ValueError, match="2 view not told"):
        load_openi(root)
    assert len(load_openi(root, believe=True)) == 2
    (root / LIST).write_bytes(b"\xef\xbb\xbfuid,filename,projection\r\n1,1_IM-1-1.dcm.png,Lateral\r\n1,1_IM-1-2.dcm.png,FRONTAL\r\n")
    assert [(s.id, s.view) for s in load_openi(root)] == [("CXR1_IM-1-2", "PA")]
    with pytest.raises(ValueError, match="no image became a study .rows skipped: 1 view lateral, 1 view PA.; check the views"):
        load_openi(root, views=["pa"])
    (root / LIST).write_text("uid,filename,projection\n1,1_IM-1-1.dcm.png,Oblique\n")
    with pytest.raises(ValueError, match="indiana_projections.csv, row 2: projection is 'Oblique', 'Frontal' or 'Lateral' was expected; mend or delete the row") as error:
        load_openi(root)
    one_sentence(error)
    (root / LIST).unlink()
    (root / TABLE).write_text("imageid,View\nCXR1_IM-1-1,PA\n")
    with pytest.raises(ValueError, match="column 'View Position' is missing, the columns are imageid, View; get it again, or delete it to go without views") as error:
        load_openi(root)
    one_sentence(error)
    (root / TABLE).unlink()
    (root / f"{TABLE}.gz").write_bytes(b"\x1f\x8b no")
    with pytest.raises(ValueError, match="cannot be read as a table") as error:
        load_openi(root)
    assert "\n" not in str(error.value)


def test_what_was_skipped_is_one_line_of_the_log(tmp_path, caplog):
    root = make_tree(tmp_path / "a", {"1.xml": make_xml(1), "2.xml": make_xml(2), "3.xml": b""}, ["CXR1_IM-0001-1001"])
    with caplog.at_level(logging.INFO, "cmcgns"):
        load_openi(root, views=[""])
    assert [r.getMessage() for r in caplog.records] == ["openi: 1 studies; rows skipped: 1 malformed XML (no element found: line 1, column 0), 1 no such image"]


# writer and loader

@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    return synthesize(200, tmp_path_factory.mktemp("made"), size=96, seed=3)


@pytest.mark.parametrize("packed", [True, False])
def test_writer_then_loader(synthetic, tmp_path, packed):
    found = scan_openi(write_openi(synthetic, tmp_path / "tree", packed=packed), on_missing="raise")
    assert len(found.studies) == 200 and found.skipped == [] and len({s.patient for s in found.studies}) == 200
    for a, b in zip(synthetic, found.studies, strict=True):
        assert b.sentences == a.sentences and b.view == a.view and b.report == {k: v.strip() for k, v in a.report.items() if v.strip()}
        assert b.labels == {HEADINGS[k]: v for k, v in a.labels.items()} | {"normal": float(not any(a.labels.values()))}
        assert (read_image(b.image) == read_image(a.image)).all()
    assert {s.view for s in found.studies} == {"PA", "AP"}
    seen = defaultdict(set)
    for s in found.studies:
        for k, v in s.labels.items():
            seen[k].add(v)
    assert len(seen) >= 8 and all(v == {0, 1} for v in seen.values()) # the comparison above can fail


def test_sections_can_be_made_of_sentences(synthetic, tmp_path):
    bare = [replace(s, report={}) for s in synthetic[:40]]
    bare[0] = replace(bare[0], sentences=("a nodule of 38 5", "unchanged since 2013", "heart is normal"), meanings=())
    folder = write_openi(bare, tmp_path / "tree")
    for split in split_report, note_sentences:
        assert [s.sentences for s in load_openi(folder, split=split)] == [s.sentences for s in bare]


def test_open_i_is_written_back(home, tmp_path):
    film = tmp_path / "film.png"
    Image.new("L", (8, 8), 90).save(film)
    real = [replace(s, image=film) for s in scan_openi(home, views=("PA", "AP", "LL", "LATERAL", ""), need_images=False).studies[::17]]
    again = load_openi(write_openi(real, tmp_path / "tree"), views=(*FRONTAL, *LATERAL, ""))
    assert [(s.view, s.sentences, dict(s.report)) for s in again] == [(s.view, s.sentences, dict(s.report)) for s in real]
    for a, b in zip(real, again, strict=True):
        assert {k: v for k, v in a.labels.items() if v} == {k: v for k, v in b.labels.items() if v} and (None in a.labels.values()) == (None in b.labels.values())


def test_control_characters_do_not_break_the_file(synthetic, tmp_path):
    odd = replace(synthetic[0], report={"findings": "Clear\x00 lungs\x0c <b> & \ud800 \u2265 3 cm."})
    study, = load_openi(write_openi([odd], tmp_path / "tree"))
    assert study.report == {"findings": "Clear  lungs  <b> &   \u2265 3 cm."}


def test_a_missing_image_file_is_named(synthetic, tmp_path):
    with pytest.raises((OSError, ValueError), match="lost.png"):
        write_openi([replace(synthetic[0], image=tmp_path / "lost.png")], tmp_path / "tree")
    assert find_reports(tmp_path / "tree") is None
    shutil.rmtree(tmp_path / "tree")
