"Every layout is written, found, read and checked by the same code; what is wrong with a folder is named and counted."
import json

import pytest

from cmcgns.data.check import DATASETS, check_dataset, describe_check, find_datasets, is_synthetic, write_layout
from cmcgns.data.studies import fingerprint
from cmcgns.data.synthetic import synthesize


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return synthesize(40, tmp_path_factory.mktemp("world"), size=96, masks=True)


@pytest.fixture(scope="module", params=DATASETS)
def layout(request, drawn, tmp_path_factory):
    "A folder in one publisher's layout, and its key."
    return request.param, write_layout(request.param, drawn, tmp_path_factory.mktemp("root") / request.param)


def test_a_folder_is_found_from_above_and_from_itself(layout):
    key, folder = layout
    assert list(find_datasets(folder)) == [key] == list(find_datasets(folder.parent))
    place = find_datasets(folder)[key]
    assert is_synthetic(place), "it must say that it was drawn"
    assert DATASETS[key].scan(place).studies == DATASETS[key].scan(find_datasets(folder.parent)[key]).studies


def test_a_whole_folder_has_no_problems(layout):
    key, folder = layout
    report = check_dataset(key, find_datasets(folder)[key], progress=False)
    assert report["problems"] == 0 and report["synthetic"] and report["studies"] > 0, describe_check(report)
    assert describe_check(report).startswith(f"synthetic {key}: {report['studies']} studies")
    json.dumps(report)


def test_an_empty_mask_marks_nothing(drawn, tmp_path):
    folder = write_layout("siim", drawn, tmp_path / "siim")
    studies = DATASETS["siim"].scan(folder).studies
    report = check_dataset("siim", folder, progress=False)
    assert all(s.masks for s in studies) and report["masks"] == report["labels"]["Pneumothorax"]["yes"] == sum(s.labels["Pneumothorax"] for s in studies) < len(studies)
    assert f"{report['masks']} studies with masks" in describe_check(report)


def test_a_broken_image_is_counted(layout):
    key, folder = layout
    place = find_datasets(folder)[key]
    study = DATASETS[key].scan(place).studies[0]
    whole = study.image.read_bytes()
    study.image.write_bytes(whole[:len(whole) // 3])
    try: report = check_dataset(key, place, progress=False)
    finally: study.image.write_bytes(whole)
    assert report["problems"] >= 1 and str(study.image) in json.dumps([report["unreadable_images"], report["broken_rows"]])
    assert study.image.name in describe_check(report)


def test_several_data_sets_side_by_side(drawn, tmp_path):
    for key in ("rsna", "siim"): write_layout(key, drawn[:12], tmp_path / key)
    assert set(find_datasets(tmp_path)) == {"rsna", "siim"}


def test_a_folder_in_use_is_not_written_to(drawn, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="it is not empty; give a new folder"): write_layout("rsna", drawn[:2], tmp_path)
    with pytest.raises(ValueError, match="unknown data set 'nih': known are covid_cxr"): write_layout("nih", drawn[:2], tmp_path / "x")


def test_no_data(tmp_path):
    with pytest.raises(ValueError, match="none of covid_cxr, openi"): find_datasets(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"): find_datasets(tmp_path / "nowhere")


def test_the_check_changes_nothing(layout):
    key, folder = layout
    place = find_datasets(folder)[key]
    before = fingerprint(DATASETS[key].scan(place).studies)
    check_dataset(key, place, progress=False)
    assert before == fingerprint(DATASETS[key].scan(place).studies)


def test_command(run_cmcgns, drawn, tmp_path):
    "Exit status 0 for a whole folder, 1 for one with a problem, the report as JSON."
    folder = write_layout("object_cxr", drawn, tmp_path / "films")
    done = run_cmcgns("data", "check", folder, "--json", "report.json")
    assert done.returncode == 0 and "0 problems" in done.stdout, done.stderr
    lost = DATASETS["object_cxr"].scan(find_datasets(folder)["object_cxr"]).studies[3].image
    lost.unlink()
    done = run_cmcgns("data", "check", folder, "--json", "report.json", "--no-decode")
    report = json.loads((tmp_path / "report.json").read_text())[0]
    assert done.returncode == 1 and "1 problems" in done.stdout and lost.name in done.stdout and report["problems"] == 1


def test_real(shared_data, tmp_path):
    "The real sets: known counts, and the problems that are known of them."
    found = find_datasets(shared_data)
    assert "covid_cxr" in found
    report = check_dataset("covid_cxr", found["covid_cxr"], decode=False)
    assert report["studies"] == 555 and not report["synthetic"] and not report["patients_in_two_parts"]
