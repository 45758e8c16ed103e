"""Text prepared on disk: the same tokens as in memory, the same bytes after a crash, errors that name the folder."""

import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import run_here

from reproduce.data import prepared
from reproduce.data.prepared import open_prepared, prepare
from reproduce.data.text import load_text
from reproduce.experiments.table2 import PRESETS
from reproduce.train.language import batch_of, read_text
from reproduce.train.options import Options

DOCUMENTS = [
    f"Letter {n}.\n" + "".join(f"On day {k} we sold {n * k} — no more.\n" for k in range(n % 7 + 3)) for n in range(67)
]
DOCUMENTS, OTHERS = DOCUMENTS[:55], DOCUMENTS[55:]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Two .jsonl files of documents, GPT-2-like tables, and notes of progress every ten documents."""
    pytest.importorskip("datasets", reason="datasets is not installed; it is in the paper extra")
    monkeypatch.setattr(prepared, "AT_ONCE", 10)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for number, part in enumerate((DOCUMENTS[:30], DOCUMENTS[30:])):
        (tmp_path / f"part{number}.jsonl").write_text(
            "".join(json.dumps({"text": d, "id": 0}) + "\n" for d in part), encoding="utf-8"
        )
    return dict(files=str(tmp_path / "part*.jsonl"), bpe=str(tables(tmp_path)), held_out=7)


def tables(folder):
    (folder / "text").mkdir()
    for n, document in enumerate(DOCUMENTS):
        (folder / "text" / f"{n:02}.txt").write_text(document, encoding="utf-8")
    (folder / "held_out.txt").write_text("<|endoftext|>".join(OTHERS), encoding="utf-8")
    learned = json.loads(load_text(str(folder / "text"), 300, folder / "cache").tokenizer)["model"]
    (folder / "bpe").mkdir()
    (folder / "bpe" / "vocab.json").write_text(json.dumps(learned["vocab"]), encoding="utf-8")
    (folder / "bpe" / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(m) for m in learned["merges"]), encoding="utf-8"
    )
    return folder / "bpe"


def test_without_files_the_hub_is_asked(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((*arguments, options))
        return SimpleNamespace(skip=lambda count: [{"text": d} for d in DOCUMENTS[count:]])

    monkeypatch.setattr(prepared, "import_datasets", lambda: SimpleNamespace(load_dataset=load_dataset))
    assert list(prepared._documents("openwebtext", None, 3)) == DOCUMENTS[3:]
    assert asked == [(prepared.SOURCES["openwebtext"], {"split": "train", "streaming": True})]


def test_the_tokens_are_those_that_fit_into_memory(places, tmp_path):
    prepare("letters", tmp_path / "out", **places)
    data = open_prepared(str(tmp_path / "out"))
    train = [d for n, d in enumerate(DOCUMENTS, 1) if n % 7]
    for tokens, documents in ((data.train, train), (data.validation, DOCUMENTS[6::7])):
        assert int(data.token_bytes[tokens].sum()) == sum(len(d.encode()) for d in documents)
        assert (tokens == 0).sum() == len(documents)  # the end-of-text mark
    assert np.array_equal(
        read_text(PRESETS["paper"], Options("paper", tmp_path, tmp_path, text=str(tmp_path / "out"))).train, data.train
    )
    for n, document in enumerate(train):
        (tmp_path / "text" / f"{n:02}.txt").write_text(
            document, encoding="utf-8"
        )  # as many as they were, so the last ones are held out too
    for n in range(len(train), len(DOCUMENTS)):
        (tmp_path / "text" / f"{n:02}.txt").unlink()
    in_memory = load_text(str(tmp_path / "text"), 300, tmp_path / "cache2", str(tmp_path / "held_out.txt"), places["bpe"])
    assert np.array_equal(in_memory.train, data.train) and in_memory.tokenizer == data.tokenizer
    assert isinstance(data.train, np.memmap) and data.describe()["train_tokens"] == len(data.train)
    assert (batch_of(data.train, 3, 0, 4, 16) == batch_of(in_memory.train, 3, 0, 4, 16)).all()


@pytest.mark.parametrize("writes", [1, 3])
def test_after_a_crash_the_bytes_are_those_of_a_whole_run(places, tmp_path, monkeypatch, writes):
    prepare("letters", tmp_path / "whole", **places)
    notes, write = [], prepared._write_state

    def dying(folder, state):  # after the tokens are written and before they are counted
        notes.append(state["documents"])
        if len(notes) > writes:
            raise OSError("the disk is gone")
        write(folder, state)

    monkeypatch.setattr(prepared, "_write_state", dying)
    with pytest.raises(OSError, match="the disk is gone"):
        prepare("letters", tmp_path / "out", **places)
    monkeypatch.setattr(prepared, "_write_state", write)
    noted = json.loads((tmp_path / "out" / "tokens.json").read_text(encoding="utf-8"))["tokens"]["train"]
    assert (tmp_path / "out" / "train.bin").stat().st_size > 2 * noted  # there is something to cut off
    with pytest.raises(ValueError, match=f"prepared up to document {10 * (writes - 1)}; repeat `prepare`"):
        open_prepared(str(tmp_path / "out"))
    prepare("letters", tmp_path / "out", **places)
    for name in ("train.bin", "validation.bin", "tokens.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    whole = open_prepared(str(tmp_path / "whole"))
    prepare("letters", tmp_path / "other", **(places | {"files": places["files"].replace("*", "1")}))
    assert open_prepared(str(tmp_path / "other")).sha256 != whole.sha256  # control


def test_with_a_held_out_text_runs_on_the_folder_are_those_on_the_text(tmp_path, capsys):
    """Same tokens, same content hash, same counts, hence the same run: only the tokenising is saved."""
    bpe = str(tables(tmp_path))
    given = {"files": str(tmp_path / "text"), "bpe": bpe, "validation": str(tmp_path / "held_out.txt")}
    prepare("text", tmp_path / "out", **given)
    folder = read_text(PRESETS["gpu-fresh"], Options("gpu-fresh", tmp_path, tmp_path, text=str(tmp_path / "out")))
    text = load_text(given["files"], 300, tmp_path / "cache", given["validation"], bpe)
    assert folder.describe() == text.describe() and folder.tokenizer == text.tokenizer
    for part in ("train", "validation", "token_bytes"):
        assert np.array_equal(getattr(folder, part), getattr(text, part))
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "tokenizer.json",
        "tokens.json",
        "train.bin",
        "validation.bin",
    ]
    capsys.readouterr()
    prepare("text", tmp_path / "out", **given)
    assert "is finished: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="or the same cut otherwise"):
        prepare("text", tmp_path / "out", given["files"], bpe)
    (tmp_path / "held_out.txt").write_text("<|endoftext|>".join(OTHERS[1:]), encoding="utf-8")  # control: another held-out text
    prepare("text", tmp_path / "other", **given)
    assert open_prepared(str(tmp_path / "other")).sha256 != folder.sha256
    for missing in ("files", "bpe"):
        with pytest.raises(ValueError, match="prepare text: (known are|--validation goes with --bpe, and with --files)"):
            prepare("text", tmp_path / "third", **given | {missing: None})
    with pytest.raises(ValueError, match="--validation .*00.txt is a part of --files .*text, or the same; what judges a model"):
        prepare("text", tmp_path / "third", **given | {"validation": str(tmp_path / "text" / "00.txt")})
    for other in ("part*.jsonl", "absent"):
        with pytest.raises(ValueError, match=r"--files .* is no file or folder; beside --validation it names one"):
            prepare("text", tmp_path / "third", **given | {"files": str(tmp_path / other)})


def test_after_a_crash_a_text_in_memory_is_written_again(tmp_path, monkeypatch):
    bpe, write = str(tables(tmp_path)), prepared.write_atomically
    given = {"files": str(tmp_path / "text"), "bpe": bpe, "validation": str(tmp_path / "held_out.txt")}

    def broken(path, content):
        if path.name == "validation.bin":
            raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(prepared, "write_atomically", broken)
    with pytest.raises(KeyboardInterrupt):
        prepare("text", tmp_path / "out", **given)
    with pytest.raises(ValueError, match="repeat `prepare` to finish it"):
        open_prepared(str(tmp_path / "out"))
    monkeypatch.setattr(prepared, "write_atomically", write)
    prepare("text", tmp_path / "out", **given)
    prepare("text", tmp_path / "whole", **given)
    for name in ("train.bin", "validation.bin", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_folder_is_left_alone_and_another_text_refused(places, tmp_path, capsys):
    prepare("letters", tmp_path / "out", **places)
    stamp = (tmp_path / "out" / "train.bin").stat().st_mtime_ns
    prepare("letters", tmp_path / "out", **places)
    assert "is finished" in capsys.readouterr().out and (tmp_path / "out" / "train.bin").stat().st_mtime_ns == stamp
    with pytest.raises(ValueError, match="out holds letters, or the same cut otherwise"):
        prepare("novels", tmp_path / "out", **places)
    elsewhere = tmp_path / "elsewhere"  # files of the same names
    elsewhere.mkdir()
    with pytest.raises(ValueError, match="out holds letters, or the same cut otherwise"):
        prepare("letters", tmp_path / "out", **(places | {"files": str(elsewhere / "part*.jsonl")}))


@pytest.mark.parametrize("suffix", [".txt", ".parquet"])
def test_other_files_hold_documents_too(places, tmp_path, suffix):
    if suffix == ".parquet":
        import pandas

        pandas.DataFrame({"text": DOCUMENTS}).to_parquet(tmp_path / "all.parquet")
    prepare("letters", tmp_path / "jsonl", **places)
    files = str(tmp_path / ("text/*.txt" if suffix == ".txt" else "all.parquet"))
    prepare("letters", tmp_path / "out", **(places | {"files": files}))
    assert open_prepared(str(tmp_path / "out")).sha256 == open_prepared(str(tmp_path / "jsonl")).sha256


def test_damage_is_named(places, tmp_path):
    prepare("letters", tmp_path / "out", **places)
    (tmp_path / "out" / "train.bin").write_bytes(b"\0\0")
    with pytest.raises(ValueError, match="train.bin should hold [0-9,]+ tokens"):
        open_prepared(str(tmp_path / "out"))
    (tmp_path / "out" / "tokens.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="tokens.json is damaged"):
        open_prepared(str(tmp_path / "out"))
    with pytest.raises(ValueError, match="55 documents are too few; one in 99 is held out"):
        prepare("letters", tmp_path / "few", **(places | {"held_out": 99}))
    with pytest.raises(ValueError, match="must end in .txt, .json, .jsonl, .parquet"):
        prepare("letters", tmp_path / "pdf", **(places | {"files": "all.pdf"}))


def test_what_a_prepared_text_has_of_its_own_cannot_be_given(places, tmp_path):
    prepare("letters", tmp_path / "out", **places)
    for option in ("validation", "bpe"):
        options = Options("smoke", tmp_path, tmp_path, text=str(tmp_path / "out"), **{option: str(tmp_path / "text")})
        with pytest.raises(ValueError, match=f"--{option}: .*out is prepared, with byte pairs and a held-out part of its own"):
            read_text(PRESETS["smoke"], options)


def test_a_table_without_texts_is_refused(places, tmp_path):
    (tmp_path / "other.jsonl").write_text(json.dumps({"body": "a letter"}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match='other.jsonl: its columns are body; one of them must be "text"'):
        prepare("letters", tmp_path / "out", **(places | {"files": str(tmp_path / "other.jsonl")}))


LETTERS = "".join(json.dumps({"text": f"letter {n}"}) + "\n" for n in range(30)).encode()
UNREADABLE = {  # what a file holds, and what is said of it
    "null": (LETTERS + b'{"text": null}\n' + LETTERS, "the text of document 31 is a NoneType; it must be a string"),
    "number": (b'{"text": 3}\n' * 30, "the text of document 1 is a int; it must be a string"),
    "list": (b'{"text": ["a"]}\n' * 30, "the text of document 1 is a list; it must be a string"),
    "half a row": (LETTERS + b'{"text": ', "cannot be read: .+"),
    "latin": (LETTERS + b'{"text": "na\xefve"}\n', "cannot be read: 'utf-8' codec can't decode byte 0xef"),
    "half a character": (LETTERS + b'{"text": "\\ud800"}\n', "cannot be read: JSON parse error: The surrogate pair"),
    "empty": (b"", "cannot be read: nothing is in it"),
    "control": (LETTERS, None),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_said_of_its_file(name, tmp_path, capsys):
    content, message = UNREADABLE[name]
    (tmp_path / "letters.jsonl").write_bytes(content)
    given = {"--files": tmp_path / "letters.jsonl", "--bpe": tables(tmp_path), "--out": tmp_path / "out"}
    status = run_here("prepare", "letters", *(word for pair in given.items() for word in pair))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    if message is None:  # nothing but too few documents to hold one out
        assert status == 1 and "30 documents are too few" in said[0]
    else:
        assert status == 1 and len(said) == 1 and re.match(rf"error: --files \S*letters.jsonl:? {message}", said[0]), said


def test_a_table_of_bytes_is_none_of_text(places, tmp_path):
    import pandas

    pandas.DataFrame({"text": [b"\xff"] * 30}).to_parquet(tmp_path / "bytes.parquet")
    with pytest.raises(ValueError, match="bytes.parquet: the text of document 1 is a bytes; it must be a string"):
        prepare("letters", tmp_path / "out", **(places | {"files": str(tmp_path / "bytes.parquet")}))
    pandas.DataFrame({"text": ["a letter"] * 30}).to_parquet(tmp_path / "bytes.parquet")  # control
    prepare("letters", tmp_path / "out", **(places | {"files": str(tmp_path / "bytes.parquet")}))


def test_without_the_package_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'tucker-ref\[paper\]'"):
        prepare("letters", tmp_path / "out", files="*.jsonl", bpe=str(tables(tmp_path)))
    with pytest.raises(ValueError, match="known are openwebtext, openwebtext2; any other text needs --files"):
        prepare("wikipedia", tmp_path / "out")
