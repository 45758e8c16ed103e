"""Test texts: read once, at the end, document by document, by the finished model alone."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from helpers import files_read, run_here, times_tables

from reproduce.data.text import load_text, read_tests, sha256_of
from reproduce.experiments import table2
from reproduce.models.gpt2 import GPT2
from reproduce.models.rows import TABLE2
from reproduce.store import records
from reproduce.train import held_out, language, loop
from reproduce.train.held_out import NO_TARGET, measure_unseen, read_unseen, windows_of
from reproduce.trust import survival

CONTEXT, END = 8, 0
LENGTHS = (3, 8, 20, 1, 16)


@pytest.fixture
def text(tmp_path):
    for folder, first, last in (("text", 0, 20), ("unseen", 40, 57)):
        for n in range(first, last):
            times_tables(tmp_path / folder, (n,), n % 7 + 1)
    times_tables(tmp_path / "text", (19, 20), 200)  # 19 is held out
    return tmp_path


def unseen_text() -> held_out.UnseenText:
    random = np.random.default_rng(0)
    documents = [np.append(random.integers(1, 50, size=n - 1), END).astype(np.uint16) for n in LENGTHS]
    return held_out.UnseenText("made up", "abc", documents, END, np.minimum(np.arange(50), 3))


def model() -> GPT2:
    torch.manual_seed(0)
    return GPT2(50, CONTEXT, 48, 12, 2, TABLE2[0].narrowed(16).build)


@pytest.mark.parametrize("length", LENGTHS)
def test_each_token_of_a_document_is_predicted_once_from_those_before_it(length):
    document = np.append(np.arange(1, length), END)
    inputs, targets = windows_of(document, END, CONTEXT)
    assert inputs.shape == targets.shape == (math.ceil(length / CONTEXT), CONTEXT)
    there = targets != NO_TARGET
    assert np.array_equal(targets[there], document) and there.sum() == length
    assert np.array_equal(inputs[there], [END, *document[:-1]])  # the first from an end-of-text mark alone
    assert there[:-1].all()  # what is lacking is at the end


def test_the_loss_of_each_document_is_that_of_its_windows_one_by_one():
    text, gpt2 = unseen_text(), model()
    (measured,) = measure_unseen(gpt2, [text], CONTEXT, 3, "float32", "title").values()
    assert [tokens for _, tokens in measured["articles"]] == list(LENGTHS)
    total = 0.0
    for document, (nats, _) in zip(text.documents, measured["articles"]):
        stream, expected = np.append([END], document).astype(np.int64), 0.0
        for start in range(0, len(document), CONTEXT):
            window = torch.from_numpy(stream[start : start + CONTEXT + 1])[None]
            expected += gpt2.loss(window).item() * (window.shape[1] - 1)
        assert nats == pytest.approx(expected, abs=0.006)  # two digits are recorded
        total += expected
    assert measured["tokens"] == sum(LENGTHS) and measured["loss"] == pytest.approx(total / sum(LENGTHS), abs=1e-5)
    n_bytes = sum(int(np.minimum(document, 3).sum()) for document in text.documents)
    assert measured["bits_per_byte"] == pytest.approx(total / math.log(2) / n_bytes, abs=1e-5)
    text.documents[2][9] = text.documents[2][9] % 49 + 1  # control: another word in one document
    (changed,) = measure_unseen(gpt2, [text], CONTEXT, 3, "float32", "title").values()
    assert [a != b for a, b in zip(changed["articles"], measured["articles"])] == [False, False, True, False, False]


def test_of_very_many_documents_neighbours_stand_together(monkeypatch):
    (each,) = measure_unseen(model(), [unseen_text()], CONTEXT, 3, "float32", "title").values()
    monkeypatch.setattr(held_out, "MOST_ENTRIES", 3)
    (grouped,) = measure_unseen(model(), [unseen_text()], CONTEXT, 3, "float32", "title").values()
    assert grouped["documents_per_entry"] == 2 and "documents_per_entry" not in each
    assert [tokens for _, tokens in grouped["articles"]] == [11, 21, 16]
    assert grouped["articles"][0][0] == pytest.approx(each["articles"][0][0] + each["articles"][1][0], abs=0.02)
    assert grouped["loss"] == each["loss"]


def test_the_tokens_are_those_of_the_models_byte_pairs(text):
    data = load_text(str(text / "text"), 300, text / "cache")
    (read,) = read_unseen(read_tests([str(text / "unseen")]), data)
    documents = [path.read_text(encoding="utf-8") for path in sorted((text / "unseen").iterdir())]
    assert read.name == "unseen" and read.sha256 == sha256_of(documents) != sha256_of(documents[::-1])
    assert len(read.documents) == 17 and all(document[-1] == read.end for document in read.documents)
    assert [int(data.token_bytes[document].sum()) for document in read.documents] == [len(d) for d in documents]


def test_a_test_text_that_was_seen_or_is_named_twice_is_refused(text):
    data = load_text(str(text / "text"), 300, text / "cache", validation=str(text / "unseen"))
    for seen in ("text", "unseen"):
        with pytest.raises(ValueError, match=f"--test {seen} is a text that models are made with, trained or chosen on"):
            read_unseen(read_tests([str(text / seen)]), data)
    other = load_text(str(text / "text"), 300, text / "cache")
    with pytest.raises(ValueError, match="--test text is a text that models are made with, trained or chosen on"):
        read_unseen(read_tests([str(text / "text")]), other)  # of which a tenth is held out
    assert len(read_unseen(read_tests([str(text / "unseen")]), other)) == 1  # control
    with pytest.raises(ValueError, match="--test: two test texts are called unseen"):
        read_unseen(2 * read_tests([str(text / "unseen")]), other)
    with pytest.raises(ValueError, match="--test .*nowhere: no such file"):
        read_tests([str(text / "nowhere")])


def test_a_part_of_tokens_that_were_seen_is_refused_too(text):
    """As of a prepared text, of which nothing else is there: a document that was copied out of it, and cut into others."""
    data = load_text(str(text / "text"), 300, text / "cache")
    for name, numbers in (("held out", [19]), ("trained on", [20]), ("both", range(5, 20))):
        seen = [(text / "text" / f"{n:02}.txt").read_text(encoding="utf-8") for n in numbers]
        (text / f"{name}.txt").write_text("<|endoftext|>".join(seen), encoding="utf-8")
        with pytest.raises(ValueError, match=f"--test {name}.txt is a text that models are made with, .* or stands in one"):
            read_unseen(read_tests([str(text / f"{name}.txt")]), data)
        with open(text / f"{name}.txt", "a", encoding="utf-8") as file:
            file.write("<|endoftext|>quite another text, and a longer one than that\n")
        read_unseen(read_tests([str(text / f"{name}.txt")]), data)  # control


@pytest.mark.parametrize("at_a_time", [7, 40, 2**24])
def test_a_document_is_found_wherever_it_stands(monkeypatch, at_a_time):
    monkeypatch.setattr(held_out, "AT_A_TIME", at_a_time)
    tokens = np.random.default_rng(0).integers(0, 3, size=100).astype(np.uint16)  # so few that beginnings are everywhere
    for length in (3, 32, 33, 60, 100):
        for start in range(0, 101 - length, 5):
            document = tokens[start : start + length].copy()
            assert held_out.holds(tokens, document)
            document[length // 2] = 3
            assert not held_out.holds(tokens, document)  # control
            document = tokens[start : start + length].copy()
            document[[0, -1]] = 3
            assert held_out.holds(tokens, document) == (length > 4 * held_out.EDGE)
    assert not held_out.holds(tokens, np.tile(tokens, 2))


def test_a_run_reads_it_once_and_is_otherwise_the_same(text, monkeypatch):
    """Neither the run's name nor a digit of what else it records depends on the test text; a resumed run reads it too."""
    toy = dataclasses.replace(survival.TOY, keep_models=False)
    monkeypatch.setitem(table2.PRESETS, "smoke", toy)
    read = []
    monkeypatch.setattr(language, "measure_unseen", lambda *a: read.append(a) or measure_unseen(*a))

    def run(folder, *more):
        places = ["--text", str(text / "text"), "--out", str(text / folder), "--records", str(text / folder / "records")]
        return run_here("table2", "--device", "cpu", "--rows", "MHA", "--steps", "10", *places, *more)

    def trained(folder):
        return [r for r in records.load(text / folder / "records", "table2") if r.is_trained]

    test = ("--test", str(text / "unseen"))
    assert run("without") == 0 and not read
    files = files_read(monkeypatch)
    assert run("with", *test) == 0 and len(read) == 1
    assert sorted(files) == sorted(
        path.name for folder in ("text", "unseen") for path in (text / folder).iterdir()
    )  # each once
    save = loop._save
    monkeypatch.setattr(loop, "_save", lambda *a: save(*a) or (_ for _ in ()).throw(KeyboardInterrupt))
    assert run("resumed", *test) == 130 and not trained("resumed") and len(read) == 1  # stopped after a checkpoint
    monkeypatch.setattr(loop, "_save", save)
    assert run("resumed", *test) == 0 and len(read) == 2
    (plain,), (tested,), (resumed,) = map(trained, ("without", "with", "resumed"))
    assert plain.id == tested.id == resumed.id
    clocks = ("tokens_per_second", "test")
    assert [{k: v for k, v in r.metrics.items() if k not in clocks} for r in (tested, resumed)] == [
        {k: v for k, v in plain.metrics.items() if k not in clocks}
    ] * 2
    assert tested.metrics["test"] == resumed.metrics["test"] and list(tested.metrics["test"]) == ["unseen"]
    assert len(tested.metrics["test"]["unseen"]["articles"]) == 17
