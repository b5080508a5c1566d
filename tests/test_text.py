"What the text page does not carry: fuzzing, other processes, real notes and reports."
import csv
import re
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ET
from collections import Counter

import pytest
import torch
from cmcgns.text import (SPECIAL, clean_words, cut_note, encode_reports, load_tokenizer, mend_marks, note_sentences,
                         pool_tokens, report_sentences, split_report, train_tokenizer)
from hypothesis import given, settings
from hypothesis import strategies as st

WORD = re.compile(r"[a-z0-9]+( [a-z0-9]+)+")
CORPUS = ["no pneumothorax is seen", "there is no pleural effusion", "the heart is mildly enlarged", "small left effusion"] * 3


def published_split(text):
    "The published rule, written again from its description: cut at numbers, then at stops, then word by word."
    pieces = [p for part in re.split(r"[0-9]+\.", text.replace("\n", " ")) for p in part.split(".")]
    words = [re.findall(r"\w+", p.lower()) for p in pieces]
    return [" ".join(w) for w in words if len(w) > 1]


@given(st.text(alphabet="aB1. ,?\n-"))
def test_split_report_is_the_published_rule(text):
    assert split_report(text) == published_split(text)


@given(st.text())
def test_any_text_gives_clean_sentences(text):
    for split in (split_report, note_sentences):
        assert all(WORD.fullmatch(s) for s in split(text))


@given(st.text(alphabet="aBc12. ,?!\n()/-"))
def test_a_note_loses_no_word_when_cut(text):
    assert [w for piece in cut_note(text) for w in clean_words(piece)] == clean_words(text)


@pytest.mark.parametrize("note, sentences", [
    ("Temperature 38.1 C. She coughed. Then 39.2?C. He slept.", ["temperature 38 1 c", "she coughed", "then 39 2 c", "he slept"]),
    ("Seen by Prof. B. Jones and Mrs. Smith vs. the team.", ["seen by prof b jones and mrs smith vs the team"]),
    ("As shown (Figs. 1a and 2). No change.", ["as shown figs 1a and 2", "no change"]),
    ("CRP 63 mg / L. WBC 9.2 (10^9 /L). LDH 280 U/L. which fell", ["crp 63 mg l", "wbc 9 2 10 9 l", "ldh 280 u l", "which fell"]),
    ("Opacities, esp. on the left, approx. 3 cm. in size.", ["opacities esp on the left approx 3 cm in size"]),
    ("Given b.i.d. for a week. Given b.i.d. He improved.", ["given b i d for a week", "given b i d", "he improved"]),
    ("Smoker? No. Asthma? Never had it.", ["never had it"]),
    ("Positive on day 6. 2 days later worse.", ["positive on day 6", "2 days later worse"]),
    ("lungs clear.no effusion seen", ["lungs clear no effusion seen"]),
    ("Lungs are clear.No effusion seen", ["lungs are clear", "no effusion seen"]),
    ("Visit www.example.org for more", ["visit www example org for more"]),
    ("   ", []), ("?", []), ("...", []),
])
def test_notes(note, sentences):
    assert note_sentences(note) == sentences


def test_only_real_question_marks_are_left():
    assert mend_marks("Was it normal? Yes") == "Was it normal? Yes"
    for lost in ["38?C", "65?mmHg", "113 ? 109", "(38.1?).", "a?d", "People?s", "l\ufffd\ufffdtoile", "cells/?L", "normal ? 5"]:
        assert "?" not in mend_marks(f"x {lost} x") and "\ufffd" not in mend_marks(lost)


def test_no_section_and_short_reports():
    assert report_sentences(None, None) == []
    assert report_sentences("", "No change") == []
    assert report_sentences("Normal.", "Stable. Clear. Unchanged.") == []
    assert report_sentences("No change", "Old scar") == ["no change", "old scar"]


def test_the_vocabulary_is_the_same_in_every_process():
    code = ("import hashlib, random; from cmcgns.text import train_tokenizer\n"
            "draw = random.Random(0); corpus = [' '.join(''.join(draw.choices('abcdefgh', k=5)) for _ in range(6)) for _ in range(200)]\n"
            "print(hashlib.sha256(repr(sorted(train_tokenizer(corpus, 200).get_vocab().items())).encode()).hexdigest())")
    prints = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(3)}
    assert len(prints) == 1 and len(prints.pop()) == 65


def test_vocabulary_size_and_known_words():
    tokenizer = train_tokenizer(iter(CORPUS), vocab_size=200)
    assert len(tokenizer) <= 200 and tokenizer.convert_tokens_to_ids(SPECIAL) == list(range(5))
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    for sentence in CORPUS:
        assert tokenizer.tokenize(sentence) == sentence.split() and tokenizer.unk_token_id not in tokenizer(sentence).input_ids
    assert tokenizer.decode(tokenizer("no left effusion").input_ids, skip_special_tokens=True) == "no left effusion"
    with pytest.raises(ValueError, match="the corpus has none"): train_tokenizer(["", " "])


def test_tokenizers_from_folders(tmp_path):
    tokenizer = train_tokenizer(CORPUS, vocab_size=200)
    tokenizer.save_pretrained(tmp_path / "ours")
    again = load_tokenizer(tmp_path / "ours")
    assert again.get_vocab() == tokenizer.get_vocab() and again("no effusion.").input_ids == tokenizer("no effusion.").input_ids

    classic = tmp_path / "classic" # as older BERT models are shipped
    classic.mkdir()
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    (classic / "vocab.txt").write_text("\n".join(words))
    (classic / "config.json").write_text('{"model_type": "bert"}')
    assert load_tokenizer(classic)("no pleural effusion").input_ids == tokenizer("no pleural effusion").input_ids

    (classic / "vocab.txt").unlink()
    with pytest.raises(ValueError, match="has no words"): load_tokenizer(classic)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no tokenizer found at"): load_tokenizer(tmp_path / "empty")


reports_of_words = st.lists(st.lists(st.sampled_from(CORPUS), min_size=1, max_size=8), min_size=1, max_size=5)


@settings(deadline=None, max_examples=40)
@given(reports_of_words, st.integers(3, 30))
def test_encoding_one_by_one_is_encoding_the_batch(reports, max_tokens):
    tokenizer = train_tokenizer(CORPUS, vocab_size=200)
    batch = encode_reports(tokenizer, reports, max_tokens)
    assert all(v.dtype == torch.int64 and v.shape == batch["input_ids"].shape for v in batch.values())
    assert batch["input_ids"].shape[1] <= max_tokens and batch["attention_mask"].sum(1).max() == batch["input_ids"].shape[1]
    for i, report in enumerate(reports):
        alone = encode_reports(tokenizer, [report], max_tokens)
        n = alone["input_ids"].shape[1]
        assert all(torch.equal(batch[k][i, :n], alone[k][0]) and not batch[k][i, n:].any() for k in batch)
        whole = tokenizer(" ".join(report)).input_ids
        assert alone["input_ids"][0].tolist() == (whole if len(whole) <= max_tokens else whole[:max_tokens - 1] + [tokenizer.sep_token_id])


def test_reports_without_words_are_refused():
    tokenizer = train_tokenizer(CORPUS, vocab_size=200)
    for reports in ([[]], [[""]]):
        with pytest.raises(ValueError, match="report 0 of 1 has no sentences"): encode_reports(tokenizer, reports)
    with pytest.raises(ValueError, match="report 2 of 3"): encode_reports(tokenizer, [["no effusion"], ["old scar"], ["", " "]])


def test_pooling_keeps_the_dtype_and_the_place_of_a_missing_sentence():
    h, s = torch.ones(1, 4, 3, dtype=torch.bfloat16), torch.tensor([[0, 1, 3, 0]])
    f, exists = pool_tokens(h, s)
    assert f.dtype == torch.bfloat16 and exists.tolist() == [[True, False, True]] and not f[0, 1].any()


def test_real_notes(shared_data):
    file = shared_data / "covid-chestxray-dataset" / "metadata.csv"
    if not file.is_file(): pytest.skip(f"{file} is not there")
    with open(file, encoding="utf-8", newline="") as f:
        notes = {row["clinical_notes"] for row in csv.DictReader(f)} - {""}
    sentences = [s for note in notes for s in note_sentences(note)]
    assert len(notes) == 500 and 2200 < len(sentences) < 2500
    lengths = Counter(len(s.split()) for s in sentences)
    assert max(lengths) < 120 and sum(n for words, n in lengths.items() if words > 50) < 25
    torn = [s for s in sentences if s.endswith((" fig", " figs", " dr", " e g", " i e", " vs"))]
    assert not torn


def test_real_reports(shared_data):
    file = shared_data / "openi" / "NLMCXR_reports.tgz"
    if not file.is_file(): pytest.skip(f"{file} is not there")
    reports = []
    with tarfile.open(file) as archive:
        for member in archive:
            if member.name.endswith(".xml"):
                root = ET.parse(archive.extractfile(member)).getroot()
                text = {a.get("Label"): a.text or "" for a in root.iter("AbstractText")}
                reports.append((text["IMPRESSION"], text["FINDINGS"]))
    published = [report_sentences(*r) for r in reports]
    assert len(reports) == 3955 and sum(map(len, published)) == 22728 and sum(not p for p in published) == 28
    for (impression, findings), sentences in zip(reports, published):
        assert sentences in ([], published_split(impression) + published_split(findings))
    better = [report_sentences(*r, split=note_sentences) for r in reports]
    assert sum(Counter(p) != Counter(b) for p, b in zip(published, better)) == 105

    tokenizer = train_tokenizer([s for p in published for s in p])
    assert len(tokenizer) == 4000
    assert tokenizer.tokenize("no pneumothorax or cardiomegaly") == ["no", "pneumothorax", "or", "cardiomegaly"]
    kept = [p for p in published if p]
    batch = encode_reports(tokenizer, kept)
    assert not (batch["input_ids"] == tokenizer.unk_token_id).any()
    assert pool_tokens(torch.ones(*batch["input_ids"].shape, 1), batch["sentence_ids"])[1].sum() >= sum(map(len, kept)) - 10
