"Report statistics against brute force, on random corpora, and on the real reports."
import json
import math
import re
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from cmcgns.data.covid_cxr import scan_covid_cxr
from cmcgns.data.openi import read_reports, write_openi
from cmcgns.data.report_statistics import RULES, count_repeats, count_tokens, measure_cleaning, most_frequent
from cmcgns.data.synthetic import synthesize
from cmcgns.reporting.pages import run_page
from cmcgns.text import clean_words, encode_reports, note_sentences, report_sentences, train_tokenizer


def go_through(reports, batch):
    "All batches, all pairs, no formula."
    pairs = same = twins = sentences = 0
    for chosen in combinations([r for r in reports if r], batch):
        said = [s for r in chosen for s in r]
        for i, a in enumerate(said):
            equal = [j for j, b in enumerate(said) if j != i and a == b]
            pairs, same, twins, sentences = pairs + len(said) - 1, same + len(equal), twins + bool(equal), sentences + 1
    return pairs / sentences, same / pairs if pairs else 0, same / sentences, twins / sentences


@pytest.mark.parametrize("seed", range(30))
def test_repeats_are_those_of_all_batches(seed):
    rng = np.random.default_rng(seed)
    words = rng.integers(2, 9) # few words, many repeats, also within a report
    reports = [[f"s{k}" for k in rng.integers(0, words, rng.integers(0, 5))] for _ in range(9)] + [["s0"], ["s1"], ["s0", "s0"]]
    n = sum(map(bool, reports))
    for batch in {2, 3, 5, n - 1, n}:
        found = count_repeats(reports, batch)
        assert np.allclose(found[4:], go_through(reports, batch), rtol=1e-12)
        assert found[:4] == (n, sum(map(len, reports)), len({s for r in reports for s in r}), batch)


def test_repeats_at_the_ends():
    same = count_repeats([["a"]] * 100, 64)
    assert same.pairs == same.twins == 1 and math.isclose(same.copies, 63) and math.isclose(same.negatives, 63)
    none = count_repeats([[f"s{k}", f"t{k}"] for k in range(100)], 64)
    assert none.pairs == none.twins == none.copies == 0 and math.isclose(none.negatives, 127)
    alone = count_repeats([["a"], ["b"]], 2)
    assert alone.pairs == 0 and alone.negatives == 1
    whole = [["a", "b"], ["a"], ["c", "c"]]
    assert count_repeats(whole, 3).twins == 4 / 5 # the only batch is everything


@pytest.mark.parametrize("batch", [0, 1, 4, 64])
def test_a_batch_that_cannot_be(batch):
    with pytest.raises(ValueError, match=f"batch is {batch} and 3 reports have sentences: give a batch of 2 up to that many"):
        count_repeats([["a"], ["b"], [], ["a"]], batch)


def test_most_frequent_against_sorting():
    rng = np.random.default_rng(0)
    reports = [[f"s{k}" for k in rng.integers(0, 12, rng.integers(0, 6))] for _ in range(60)]
    flat, full = [s for r in reports for s in r], [r for r in reports if r]
    expected = sorted({(-flat.count(s), s, sum(s in r for r in full) / len(full)) for s in flat})
    assert [(-f.times, f.sentence, f.share) for f in most_frequent(reports, 99)] == expected
    assert most_frequent([], 3) == []


def test_tokens_are_those_of_the_encoder():
    reports = [["no effusion", "heart size is normal"], ["lungs clear"], ["a nodule of 38 5", "zzz unknowns"]]
    tokenizer = train_tokenizer(["no effusion heart size lungs clear"], 120)
    lengths = encode_reports(tokenizer, reports)["attention_mask"].sum(1)
    assert count_tokens(tokenizer, reports).tolist() == lengths.tolist()
    assert count_tokens(tokenizer, [[], *reports, []]).tolist() == [2, *lengths.tolist(), 2] and count_tokens(tokenizer, []).shape == (0,)


def slow_cleaning(reports, least=3):
    "The published rule by hand: numberings out, full stops cut, word by word."
    words = kept = single = few = numbers = 0
    for texts in reports:
        whole = 0
        for text in texts:
            found = re.findall("[a-z0-9]+", text.lower())
            words += len(found)
            numbers += len(found) - len(re.findall("[a-z0-9]+", re.sub(r"[0-9]+\.", ".", text.lower())))
            for piece in re.sub(r"[0-9]+\.", ".", text.lower()).split("."):
                k = len(re.findall("[a-z0-9]+", piece))
                single += k == 1
                whole += k if k > 1 else 0
        kept, few = (kept + whole, few) if whole >= least else (kept, few + whole)
    return words, kept, numbers, single, few


def slow_marked(reports, least=3):
    marked = 0
    for texts in reports:
        pieces = [(p, len(re.findall("[a-z0-9]+", p.lower()))) for t in texts for p in re.sub(r"[0-9]+\.", ".", t).split(".")]
        whole = [(p, k) for p, k in pieces if k > 1]
        if sum(k for _, k in whole) >= least: marked += sum("XXXX" in p or "___" in p for p, _ in whole)
    return marked


def random_report(rng):
    parts = ["No effusion", "1.", "2", "stable", ".", ". ", "XXXX", "x-XXXX", "2.5 cm", "___", "\n", "a", " ", "12.", "Dr. Lee"]
    return ["".join(str(p) + (" " if rng.random() < .7 else "") for p in rng.choice(parts, rng.integers(0, 9))) for _ in range(2)]


@pytest.mark.parametrize("seed", range(20))
def test_every_word_is_accounted_for(seed):
    rng = np.random.default_rng(seed)
    reports = [random_report(rng) for _ in range(30)]
    c = measure_cleaning(reports)
    assert (c.words, c.kept, c.numbers, c.single, c.few) == slow_cleaning(reports)
    said = [report_sentences(*r) for r in reports]
    assert c.sentences == sum(map(len, said)) and c.kept == sum(len(s.split()) for r in said for s in r)
    assert c.marked == slow_marked(reports) and c.single == sum(c.dropped.values())
    assert c.reports - c.short == sum(map(bool, said)) and c.reports == sum(bool(clean_words(" ".join(r))) for r in reports)
    n = measure_cleaning(reports, note_sentences)
    notes = [report_sentences(*r, split=note_sentences) for r in reports]
    assert n.words == n.kept + n.numbers + n.single + n.few and n.numbers == 0 and n.kept == sum(len(s.split()) for r in notes for s in r)
    everything = measure_cleaning(reports, least=0)
    assert everything.few == everything.short == 0 and everything.kept == c.kept + c.few


def test_an_unknown_rule():
    with pytest.raises(ValueError, match="split is 'split': known are split_report and note_sentences"):
        measure_cleaning([["a b c"]], str.split)


# real reports

@pytest.fixture(scope="module")
def texts(shared_data):
    reports, _ = read_reports(shared_data / "openi")
    return [(r.sections.get("impression", ""), r.sections.get("findings", "")) for r in reports]


def test_the_rules_are_those_of_the_text_page(texts, shared_data):
    notes = [s.report["notes"] for s in scan_covid_cxr(shared_data / "covid-chestxray-dataset").studies]
    for split, (mend, cut) in RULES.items():
        for text in {t for pair in texts[::7] for t in pair} | set(notes):
            assert split(text) == [" ".join(w) for piece in cut(mend(text)) if len(w := clean_words(piece)) > 1]


def test_open_i(texts):
    said = [report_sentences(*t) for t in texts]
    c, r = measure_cleaning(texts), count_repeats(said)
    assert (c.reports, c.short, c.sentences) == (3927, 0, 22728) and c.words == c.kept + c.numbers + c.single + c.few
    assert (r.reports, r.sentences, r.distinct) == (3927, 22728, 8481)
    assert (c.words, c.kept, c.numbers, c.single, c.few) == (150743, 149124, 1406, 213, 0) and (c.marked, c.marks, c.decimals) == (2905, 3734, 79)
    assert c.dropped.most_common(3) == [("chest", 64), ("cardiomegaly", 38), ("emphysema", 19)]
    assert (round(r.negatives, 2), round(r.copies, 4), round(r.pairs, 6), round(r.twins, 4)) == (370.19, .8984, .002427, .3397)
    assert [(f.sentence, f.times) for f in most_frequent(said, 3)] == [("no acute cardiopulmonary abnormality", 492), ("the lungs are clear", 366), ("no pneumothorax", 290)]


def test_covid_notes(shared_data):
    notes = [(s.report["notes"],) for s in scan_covid_cxr(shared_data / "covid-chestxray-dataset").studies]
    said = [note_sentences(n) for n, in notes]
    c, r = measure_cleaning(notes, note_sentences, 0), count_repeats(said)
    assert (c.reports, c.sentences, c.words, c.kept, c.single, c.numbers, c.decimals) == (444, 2222, 35678, 35669, 9, 0, 280)
    assert (r.reports, r.sentences, r.distinct, round(r.pairs, 6), round(r.twins, 4)) == (444, 2222, 1510, .000497, .1346)
    once = count_repeats([note_sentences(n) for n, in set(notes)])
    assert (once.reports, once.sentences, round(once.twins, 4)) == (392, 1888, .0942)


def test_drawn_batches_agree_on_real_reports(texts):
    "What is expected lies within what 400 drawn batches give."
    said = [s for t in texts if (s := report_sentences(*t))]
    rng, rows = np.random.default_rng(0), []
    for _ in range(400):
        batch = Counter(s for i in rng.choice(len(said), 64, replace=False) for s in said[i])
        n = sum(batch.values())
        rows.append((n, n * (n - 1), sum(v * (v - 1) for v in batch.values()), sum(v for v in batch.values() if v > 1)))
    n, pairs, same, twins = np.array(rows, float).T
    r = count_repeats(said)
    for top, bottom, expected in (pairs, n, r.negatives), (same, pairs, r.pairs), (same, n, r.copies), (twins, n, r.twins):
        error = (top - expected * bottom).std() / bottom.mean() / math.sqrt(len(n))
        assert abs(top.sum() / bottom.sum() - expected) < 4 * error


# the page

@pytest.mark.slow
def test_the_page(tmp_path):
    write_openi(synthesize(60, tmp_path / "made", size=64), tmp_path / "data" / "openi")
    page = run_page("report_statistics", tmp_path / "out", data_root=str(tmp_path / "data"), batch=16, synthetic=100)
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["dataset"] == ["openi", "synthetic data, no patients"] and result["batch"] == 16
    assert result["repeats"]["openi"]["reports"] == 60 and result["repeats"]["synthetic data, no patients"]["reports"] == 100
    assert result["same_meaning"]["same"] > result["same_meaning"]["equal"] > 0
    assert {row["data"] for rows in result["rows"].values() for row in rows} == {*result["dataset"]}
    assert all((tmp_path / "out" / f).stat().st_size > 5000 for f in ("lengths.png", "repeats.png")) and page.is_file()


@pytest.mark.slow
def test_the_page_without_data_says_synthetic(tmp_path):
    run_page("report_statistics", tmp_path, batch=16, synthetic=100)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["dataset"] == "synthetic" and {row["data"] for rows in result["rows"].values() for row in rows} == {"synthetic data, no patients"}


@pytest.mark.slow
def test_the_page_without_what_it_needs(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(Exception, match="empty: neither Open-i nor covid-chestxray-dataset is there or one folder below; data/README.md tells how to get them"):
        run_page("report_statistics", tmp_path / "out", data_root=str(tmp_path / "empty"))
