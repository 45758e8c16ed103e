"""Hostile input to the command line: one line that names the file or option, exit status 1 (2 for a wrong command), no traceback.

Every case runs beside a model, records and tables that were saved before; none of them may change, and no temporary file may stay.
"""

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import itertools
import json
import lzma
import multiprocessing
import os
import pickle
import re
import resource
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import run_here as run
from safetensors import safe_open
from test_prepared import tables

import paper_figures.__main__
from reproduce.__main__ import EXPERIMENTS
from reproduce.report import pages
from reproduce.store import records
from reproduce.train.loop import train
from reproduce.train.settings import TrainConfig
from reproduce.trust.survival import CLOCK

ROW = "Tucker [8,64,64]"
TRAIN = ["table2", "--rows", ROW, "--steps", "2", "--text", "story.txt"]
STORY = "".join(f"line {n} of the tale, so long, and {n * n} more words.\n" for n in range(2000))


def table(*cases):
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A trained model with its record, and everything hostile beside it."""
    place = tmp_path_factory.mktemp("hostile")
    (place / "story.txt").write_text(STORY, encoding="utf-8")
    assert run("table2", "--text", place / "story.txt", "--rows", ROW, "--steps", "2", *into(place)) == 0
    model = next((place / "out" / "models").iterdir())
    model.rename(place / "model.safetensors")
    for name, content in HOSTILE_FILES.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    np.savez(place / "pickled.npz", **images() | {"x_train": np.array([{}], dtype=object)})
    np.save(place / "one.npy", np.ones(3))
    (place / "loop.safetensors").symlink_to("loop.safetensors")
    os.mkfifo(place / "pipe.md")
    for name, changes in IMAGES.items():
        np.savez(place / f"{name}.npz", **(images() | changes))
    whole = (place / "model.safetensors").read_bytes()
    (place / "cut.safetensors").write_bytes(whole[:-1000])
    (place / "head.safetensors").write_bytes(whole[:50])
    with safe_open(place / "model.safetensors", "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, change in MODELS.items():
        changed = change(dict(metadata), dict(tensors))
        safetensors.torch.save_file(changed[1], place / f"{name}.safetensors", metadata=changed[0])
    (record,) = json.loads((place / "out" / "records" / "table2.smoke.json").read_text(encoding="utf-8"))  # as it stands there
    for name, content in RECORDS.items():
        folder = place / f"records {name}"
        folder.mkdir()
        made = content(record)
        (folder / "table2.smoke.json").write_text(made if isinstance(made, str) else json.dumps(made), encoding="utf-8")
    return place


def into(place: Path) -> list:
    return ["--out", place / "out", "--records", place / "out" / "records"]


@functools.cache
def digest(path: Path, *status: int) -> str:
    """Of a file's content, read again when the file was touched."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def saved(place: Path) -> dict:
    """Every file's content by its name; of records that are measured anew each time, all but the time of day."""

    def content(path: Path):
        if path.parent == place / "out" / "records":
            return [
                {k: v for k, v in record.items() if k not in CLOCK} for record in json.loads(path.read_text(encoding="utf-8"))
            ]
        status = path.stat()
        return digest(path, status.st_ino, status.st_mtime_ns, status.st_size)

    return {str(p.relative_to(place)): content(p) for p in place.rglob("*") if p.is_file() and p.name != ".lock"}


def images() -> dict:
    draw = np.random.default_rng(0)
    return {
        "x_train": draw.integers(0, 256, (64, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(64) % 4,
        "x_test": draw.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }


class Code:
    """Unpickled, it would write a file."""

    def __reduce__(self):
        return open, ("executed", "w")


HOSTILE_FILES = {
    "file": b"x",
    "empty.txt": b"",
    "blank.txt": b" \n \n",
    "tiny.txt": b"one line",
    "short.txt": b"short line\n" * 40,
    "latin.txt": "naïve".encode("latin-1"),
    "nul.txt": b"\0" * 5000,
    "cut.gz": gzip.compress(STORY.encode())[:-20],
    "spoiled.gz": gzip.compress(STORY.encode())[:40] + b"\xff" * 40,
    "false.gz": b"no gzip",
    "cut.xz": lzma.compress(STORY.encode())[:-20],
    "book.pdf": b"%PDF-1.4",
    "photograph.png": b"\x89PNG\r\n\x1a\n" + b"0" * 99,
    "noise.npz": bytes(range(256)) * 4,
    "noise.safetensors": bytes(range(256)) * 4,
    "nothing.safetensors": b"",
    "bpe/vocab.json": b"{",
    "bpe/merges.txt": b"",
    "bpe2/vocab.json": b'{"a": 0}',
    "bpe2/merges.txt": b"",
    "folder/notes.md": b"no text",
    "code.pt": pickle.dumps(Code()),
    "page.md": b"no marks",
    "binary.md": b"\xff\xfe",
}
IMAGES = {
    "floats": dict(x_train=np.zeros((64, 8, 8, 3))),
    "flat": dict(x_train=np.zeros((64, 64), np.uint8)),
    "oblong": dict(x_train=np.zeros((64, 8, 6, 3), np.uint8)),
    "unlabelled": dict(y_train=np.arange(63)),
    "half labels": dict(y_train=np.arange(64) / 2),
    "negative": dict(y_test=np.arange(8) - 1),
    "vast": dict(y_train=np.full(64, 10**12)),
    "sizes": dict(x_test=np.zeros((8, 6, 6, 3), np.uint8)),
    "none": dict(x_test=np.zeros((0, 8, 8, 3), np.uint8), y_test=np.zeros(0, int)),
    "few": dict(x_train=np.zeros((20, 8, 8, 3), np.uint8), y_train=np.arange(20) % 4),
    "seven": dict(x_train=np.zeros((64, 7, 7, 3), np.uint8), x_test=np.ones((8, 7, 7, 3), np.uint8)),
}


def config(**changes):
    def change(metadata, tensors):
        return metadata | {"config": json.dumps(json.loads(metadata["config"]) | changes)}, tensors

    return change


MODELS = {
    "undescribed": lambda m, t: ({"format": "pt"}, t),
    "config junk": lambda m, t: (m | {"config": "{"}, t),
    "config list": lambda m, t: (m | {"config": "[]"}, t),
    "config empty": lambda m, t: (m | {"config": "{}"}, t),
    "config unknown field": config(attention={"mechanism": "MHA", "evil": 1}),
    "config unknown mechanism": config(attention={"mechanism": "evil"}),
    "config negative": config(d_model=-5),
    "config word": config(n_heads="4"),
    "config deeper": config(n_layers=3),
    "config vast": config(vocab_size=10**13),
    "attention junk": lambda m, t: (m | {"attention": "{"}, t),
    "attention elsewhere": lambda m, t: (m | {"attention": json.dumps({"blocks.9.attention": {}})}, t),
    "tokenizer junk": lambda m, t: (m | {"tokenizer": "{"}, t),
    "without a tensor": lambda m, t: (m, dict(list(t.items())[1:])),
    "other shapes": lambda m, t: (m, {name: x[..., :-1].contiguous() for name, x in t.items()}),
    "nan": lambda m, t: (m, {name: x * float("nan") for name, x in t.items()}),
    "vit junk": lambda m, t: ({"vit": "{}", "attention": "{}", "run": "x"}, t),
    "public junk": lambda m, t: ({"public": json.dumps({"class": "evil", "config": {}}), "attention": "{}"}, t),
}
RECORDS = {
    "junk": lambda r: "[{",
    "binary": lambda r: "\0\1",
    "empty": lambda r: "",
    "object": lambda r: r,
    "of numbers": lambda r: [3],
    "without metrics": lambda r: [{k: v for k, v in r.items() if k != "metrics"}],
    "metrics null": lambda r: [r | {"metrics": None}],
    "metrics empty": lambda r: [r | {"metrics": {}}],
    "config word": lambda r: [r | {"config": "x"}],
    "method number": lambda r: [r | {"method": 3}],
    "data null": lambda r: [r | {"data": None}],
}


def text(file, message, option="--text"):
    return f"text: {option} {file}", [*TRAIN, option, file], 1, message


def picture(file, message):
    return f"images: {file}", ["figure3", "--steps", "1", "--images", file], 1, message


def model(file, message, command="generate"):
    more = {"generate": ["--prompt", "hi", "--tokens", "2"], "compress": ["--ranks", "4,4,4", "--text", "story.txt"]}
    return f"model: {command} {file}", [command, "--model", file, *more.get(command, [])], 1, message


def wrong(option, value, message, code=2):
    options = dict(zip(TRAIN[1::2], TRAIN[2::2])) | {option: value}
    return f"option: {option} {value}", ["table2", *map("=".join, options.items())], code, message


def written(option, value, code=2, message=""):
    arguments = ["generate", "--model", "model.safetensors", "--prompt", "hi", f"{option}={value}"]
    return f"option: generate {option} {value[:20]}", arguments, code, message


def compressed(option, value, code, message):
    options = {"--ranks": "4,4,4", option: value}
    arguments = ["compress", "--model", "model.safetensors", "--text", "story.txt", *map("=".join, options.items())]
    return f"option: compress {option} {value}", arguments, code, message


def judged(name, message):
    return f"records: {name}", ["report", "--records", f"records {name}"], 1, message


UNNAMED = {  # options that a variable of the shell, which is not set, would leave to their defaults
    "table2": ("--text", "--validation", "--bpe", "--out", "--records"),
    "compress": ("--model", "--save"),
    "figure3": ("--images", "--model"),
    "prepare": ("--bpe", "--validation", "--files", "--out"),
    "generate": ("--model",),
    "report": ("--records", "--write"),
}
COMMANDS = table(
    text("absent.txt", "--text .*absent.txt: no such file or folder"),
    text("empty.txt", "empty.txt: no text found; a file or folder of .txt"),
    text("blank.txt", "blank.txt: no text found"),
    text("tiny.txt", "tiny.txt holds 1 documents; at least 10"),
    text("short.txt", "short.txt: .* tokens are fewer than one window of 129"),
    text("latin.txt", "latin.txt is not UTF-8 text: byte 2"),
    text("nul.txt", "nul.txt holds 1 documents"),
    text("cut.gz", "cut.gz is damaged"),
    text("spoiled.gz", "spoiled.gz is damaged"),
    text("false.gz", "false.gz is damaged"),
    text("cut.xz", "cut.xz is damaged"),
    text("book.pdf", "book.pdf is not a text file known here; it must end in .txt"),
    text("folder", "folder: no text found"),
    text("absent.txt", "--validation .*absent.txt: no such file or folder", "--validation"),
    text("tiny.txt", "validation tokens are fewer than one window", "--validation"),
    text("absent", "--bpe .*absent: vocab.json and merges.txt not found there", "--bpe"),
    text("bpe", "--bpe .*bpe: .*EOF", "--bpe"),
    text("bpe2", "--bpe .*bpe2: vocab.json must hold <|endoftext|>", "--bpe"),
    picture("absent.npz", "--images .*absent.npz: no such file"),
    picture("folder", "--images .*folder: no such file"),
    picture("photograph.png", "photograph.png is not a readable .npz file: it is no archive"),
    picture("noise.npz", "noise.npz is not a readable .npz file"),
    picture("one.npy", "one.npy is not a readable .npz file"),
    picture("pickled.npz", "pickled.npz is not a readable .npz file: Object arrays cannot be loaded"),
    picture("floats.npz", "floats.npz: x_train is float64"),
    picture("flat.npz", r"flat.npz: x_train is uint8 \(64, 64\)"),
    picture("oblong.npz", "oblong.npz: .* not labelled square images"),
    picture("unlabelled.npz", "unlabelled.npz: .* not labelled square images"),
    picture("half labels.npz", "half labels.npz: y_train is float64"),
    picture("negative.npz", "negative.npz: y_test holds -1; classes count from 0"),
    picture("vast.npz", "vast.npz: y_train holds 1000000000000; classes count from 0 to at most 65535"),
    picture("sizes.npz", "sizes.npz: .* images of different sizes"),
    picture("none.npz", "none.npz: .* not labelled square images"),
    picture("few.npz", "few.npz holds 20 training images; .* one batch of 64"),
    picture("seven.npz", "patch_size is 2; it must divide image_size = 7"),
    *(model(f, m, c) for c in ("generate", "compress", "spectra") for f, m in (
        ("absent.safetensors", "absent.safetensors is not a readable safetensors file: there is no such file"),
        ("noise.safetensors", "noise.safetensors is not a readable safetensors file"),
        ("nothing.safetensors", "nothing.safetensors is not a readable safetensors file"),
        ("cut.safetensors", "cut.safetensors is not a readable safetensors file"),
        ("head.safetensors", "head.safetensors is not a readable safetensors file"),
        ("undescribed.safetensors", "undescribed.safetensors was not saved by this program"),
        ("config junk.safetensors", "config junk.safetensors describes no model that can be built"),
        ("config list.safetensors", "config list.safetensors describes no model"),
        ("config empty.safetensors", "config empty.safetensors describes no model"),
        ("config unknown field.safetensors", "describes no model that can be built: .*evil"),
        ("config unknown mechanism.safetensors", "config unknown mechanism.safetensors"),
        ("config negative.safetensors", "config negative.safetensors describes no model"),
        ("config word.safetensors", 'config word.safetensors describes no model .*: its config has n_heads "4"; it must be an integer'),
        ("config deeper.safetensors", "config deeper.safetensors: its weights do not fit"),
        ("config vast.safetensors", "config vast.safetensors: its weights do not fit"),
        ("attention junk.safetensors", "attention junk.safetensors describes no model"),
        ("attention elsewhere.safetensors", "attention elsewhere.safetensors describes no model"),
        ("tokenizer junk.safetensors", "tokenizer junk.safetensors describes no model"),
        ("without a tensor.safetensors", "without a tensor.safetensors: its weights do not fit"),
        ("other shapes.safetensors", "other shapes.safetensors: its weights do not fit"),
        ("nan.safetensors", "NaN or infinity|must be finite"),
    )),
    model("folder", "folder is not a readable safetensors file"),
    model("code.pt", "code.pt is not a readable safetensors file"),
    model("folder", "folder cannot be opened", "compress"),
    model("code.pt", "code.pt cannot be opened", "compress"),
    model("vit junk.safetensors", "vit junk.safetensors describes no model", "compress"),
    model("public junk.safetensors", "public junk.safetensors describes no model", "compress"),
    ("model: absent folder", ["compress", "--model", "/nowhere/at/all"], 1, "--model /nowhere/at/all: no such file or folder"),
    ("model: none trained yet", ["compress", "--out", "folder"], 1, "folder.models holds no multi-head model; run table2 first"),
    ("model: no spectra yet", ["spectra", "--out", "folder"], 1, "folder.models holds no model of table2; run"),
    *(compressed("--ranks", ranks, code, message) for ranks, code, message in (
        ("0,8,8", 1, r"ranks\[0\] is 0"),
        ("13,8,8", 1, r"ranks\[0\] is 13"),
        ("4,999,8", 1, r"ranks\[1\] is 999"),
        ("4,8", 2, "'4,8' is not a list of head,query,key ranks"),
        ("a,b,c", 2, "'a,b,c' is not a list of integers"),
        ("-1,2,3", 2, "'-1,2,3' is not a list of integers"),
        ("4,8,8;", 2, "'' is not a list of integers"),
        ("", 2, "'' is not a list of integers"),
    )),
    *(compressed("--save", file, 1, message) for file, message in (
        ("folder", "--save .*folder: a folder, or the model itself; name another file"),
        ("model.safetensors", "--save .*model.safetensors: a folder, or the model itself"),
        ("loop.safetensors", "loop.safetensors"),
        ("small.st", "--save .*small.st: its name must end in .safetensors"),
        ("file/small.safetensors", "file"),
    )),
    ("option: compress --save two", ["compress", "--ranks=4,4,4;2,2,2", "--save", "x"], 1, "exactly one triple of --ranks"),
    *((f"option: {command} {option} of nothing", [command, f"{option}="], 2, f"argument {option}: '' names nothing; leave")
      for command, options in UNNAMED.items() for option in options),
    *(wrong("--learning-rate", value, f"'{value}' is not a positive number") for value in ("nan", "inf", "-1", "0", "fast")),
    wrong("--learning-rate", "1e-3,2e30", r"2e\+30 is no learning rate; it must be at most 1e\+30"),
    *(wrong("--steps", value, f"'{value}' is not a number of 1 or more") for value in ("0", "-3", "1.5", "many")),
    *(wrong("--seeds", value, "is not a") for value in ("", "x", "-1", "0,,1", "1.5", "9" * 30)),
    *(wrong("--device", value, f"--device {value} cannot be used here", 1) for value in ("toaster", "meta", "cuda:99", "")),
    wrong("--preset", "enormous", "invalid choice: 'enormous'"),
    wrong("--rows", "MHA,Tukker", "no row is called Tukker; there are: MHA", 1),
    wrong("--rows", "[8", r"no row is called \[8", 1),
    wrong("--speed", "9", "unrecognized arguments: --speed=9"),
    ("option: a preset of another experiment", ["figure3", "--preset", "gpu-sweep"], 2, "--preset: invalid choice: 'gpu-sweep'"),
    ("option: no command", [], 2, "the following arguments are required: COMMAND"),
    ("option: an unknown command", ["table9"], 2, "invalid choice: 'table9'"),
    ("option: no prompt", ["generate", "--model", "model.safetensors"], 2, "required: --prompt"),
    written("--tokens", "0", message="'0' is not a number of 1 or more"),
    written("--tokens", "100000", 1, "this model has positions for 128"),
    written("--prompt", "", 1, "a prompt is empty"),
    written("--prompt", "hi " * 2000, 1, "this model has positions for 128"),
    written("--temperature", "-1", 1, "temperature is -1.0; it must be 0"),
    written("--temperature", "nan", 1, "temperature is nan"),
    written("--top-p", "0", 1, r"top_p is 0.0; it must be in \(0, 1\]"),
    written("--top-p", "nan", 1, "top_p is nan"),
    written("--seed", "-1", message="'-1' is not an integer from 0"),
    written("--seed", "9" * 30, message="is not an integer from 0"),
    *(judged(name, f"records {name}/table2.smoke.json is not a record file") for name in ("junk", "binary", "empty", "object")),
    judged("of numbers", "table2.smoke.json: record 0 is 3; it must be a dict"),
    judged("without metrics", "table2.smoke.json: record 0 lacks metrics"),
    judged("metrics null", "record 0 has metrics null; it must be a dict"),
    judged("metrics empty", "table2.smoke.json: record 0 lacks metrics.attention_parameters, metrics.cache_per_token, "),
    judged("config word", 'record 0 has config "x"; it must be a dict'),
    judged("method number", "record 0 has method 3; it must be a str"),
    judged("data null", "table2.smoke.json: record 0 has data null; it must be a dict"),
    ("records: damaged, and a run to record", [*TRAIN, "--records", "records junk"], 1, "is not a record file"),
    ("records: an absent folder", ["claims", "--records", "absent"], 1, "absent holds no records; run an experiment first"),
    ("records: a file for a folder", ["report", "--records", "file"], 1, "file holds no records"),
    ("records: a page without marks", ["report", "--write", "page.md"], 1, "page.md lacks the marks"),
    ("records: a page that is no text", ["report", "--write", "binary.md"], 1, "binary.md is not UTF-8 text: byte 0"),
    ("records: a page that is not there", ["report", "--write", "absent.md"], 1, "absent.md"),
    ("records: a pipe for a page", ["report", "--write", "pipe.md"], 1, "pipe.md is no page: it is no regular file"),
    ("records: a folder for a page", ["report", "--write", "folder"], 1, "Is a directory: .*folder"),
    ("folder: output below a file", [*TRAIN, "--out", "file/out"], 1, "file/out"),
    ("folder: records below a file", [*TRAIN, "--seeds", "7", "--records", "file/r"], 1, "file/r"),
    ("folder: a file for records", ["table1", "--records", "file"], 1, "file"),
)  # fmt: skip


def test_what_is_not_hostile_runs(place, capsys):
    """Control: the commands above fail for what is hostile in them."""
    assert run("table3", "--rows", "MQA", "--steps", "1", "--text", place / "story.txt", *into(place)) == 0
    assert run("generate", "--model", place / "model.safetensors", "--prompt", "a", "--prompt", "b", "--tokens", "2") == 0
    assert "--- prompt 2" in capsys.readouterr().out
    assert run("generate", "--model", place / "model.safetensors", "--prompt", "a", "--tokens", "2") == 0
    assert "--- prompt" not in capsys.readouterr().out
    assert run("spectra", "--model", place / "model.safetensors", *into(place)) == 0
    assert run("report", "--records", place / "out" / "records") == 0
    assert run("claims", "--records", place / "out" / "records") == 0
    said = capsys.readouterr().out
    assert (
        "Table 3, Llama, REDUCED SCALE, not the paper's: validation loss" in said
        and "Effective ranks of trained models, in per cent of their size" in said
        and re.search(r"\| verdict +\| rule", said)
    )


@pytest.mark.parametrize("arguments, code, message", COMMANDS)
def test_one_line_says_what_is_wrong_and_nothing_saved_is_harmed(place, monkeypatch, capsys, arguments, code, message):
    monkeypatch.chdir(place)
    before = saved(place)
    if arguments and arguments[0] not in ("report", "claims", "generate", "table9"):
        arguments = [arguments[0], *into(place), *arguments[1:]]
    assert run(*arguments) == code
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "error: " in line]
    assert len(lines) == 1 and re.search(message, lines[0]), said
    after = saved(place)
    assert not {name for name in before if after.get(name) != before[name]}
    assert not [name for name in after if name.endswith(".part")] and not (place / "executed").exists()


CONFIG = TrainConfig(steps=10, batch_size=2, learning_rate=1e-2, log_every=5, checkpoint_every=5)


def toy(checkpoint: Path, width: int = 4, **changes):
    torch.manual_seed(0)
    net, settings = torch.nn.Linear(width, width), TrainConfig(**(vars(CONFIG) | changes))
    batch = lambda step: (torch.ones(2, width),)  # noqa: E731
    return train(net, batch, lambda m, x: m(x).square().mean(), settings, checkpoint, "toy")


def spoil_nothing(content: bytes) -> bytes:
    return content


CHECKPOINTS = table(
    ("checkpoint: truncated", lambda c: c[:-100], {}, "is not a readable checkpoint"),
    ("checkpoint: cut to its head", lambda c: c[:20], {}, "is not a readable checkpoint"),
    ("checkpoint: empty", lambda c: b"", {}, "is not a readable checkpoint"),
    ("checkpoint: pickled code", lambda c: pickle.dumps(Code()), {}, "is not a readable checkpoint"),
    ("checkpoint: text", lambda c: b"hello", {}, "is not a readable checkpoint"),
    ("checkpoint: of another rate", spoil_nothing, dict(learning_rate=1.0), "another learning_rate; delete it to start again"),
    ("checkpoint: of another length", spoil_nothing, dict(steps=20), "another steps; delete it"),
    ("checkpoint: of another model", spoil_nothing, dict(width=5), "holds the weights of another model; delete it"),
)


@pytest.mark.parametrize("spoil, changes, message", CHECKPOINTS)
def test_a_checkpoint_that_does_not_belong_is_refused_and_kept(tmp_path, monkeypatch, spoil, changes, message):
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "toy.pt"
    toy(checkpoint)
    checkpoint.write_bytes(spoil(checkpoint.read_bytes()))
    before = saved(tmp_path)
    with pytest.raises(ValueError, match=f"toy.pt .*{message}"):
        toy(checkpoint, **changes)
    assert saved(tmp_path) == before  # and no code was run


def test_a_checkpoint_with_code_inside_its_archive_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"config": Code()}, tmp_path / "toy.pt")
    with pytest.raises(ValueError, match="toy.pt is not a readable checkpoint .UnpicklingError"):
        toy(tmp_path / "toy.pt")
    assert not (tmp_path / "executed").exists()


def prepared(out: str, *more: str) -> list:
    return ["prepare", "letters", "--files", "letters.jsonl", "--bpe", "tables/bpe", "--out", out, *more]


FULL = table(
    ("disk full: while records are written", ["table1"], 10, "table1.sizes.json"),
    ("disk full: while tokens are kept", [*TRAIN, "--text", "cut2.txt"], 100, "tokens-.*.npz"),
    ("disk full: at a checkpoint", [*TRAIN, "--seeds", "3"], 1000, r"\.pt"),
    ("disk full: late in a checkpoint", [*TRAIN, "--seeds", "4"], 900_000, r"\.pt"),
    ("disk full: while a model is kept", [*TRAIN, "--seeds", "5"], 1000, "seed-5.safetensors"),
    ("disk full: while a model is compressed", compressed("--save", "s.safetensors", 0, "")[1], 1000, "s.safetensors"),
    ("disk full: while a page is written", ["report", "--write", "README.md"], 1000, "README.md"),
    ("disk full: while claims are written", ["claims", "--write", "README.md"], 1000, "README.md"),
    ("disk full: while a figure is drawn", ["paper_figures", "--records", "out/records", "--out", "drawn"], 9000, "tucker_.*png"),
    ("disk full: while a tokenizer is kept", prepared("p1"), 1000, "tokenizer.json"),
    ("disk full: while tokens are prepared", prepared("p2"), 1000, "train.bin"),
    ("disk full: while progress is noted", prepared("p3"), 10, "tokens.json"),
    ("disk full: while a text is prepared", prepared("p4", "--files", "story.txt", "--validation", "cut2.txt"), 1000, "validation.bin"),
)  # fmt: skip
APART = multiprocessing.get_context("forkserver")


def command(*arguments) -> int:
    """Of this package, or of the figures."""
    if arguments[0] != "paper_figures":
        return run(*arguments)
    before, sys.argv = sys.argv, list(map(str, arguments))
    try:
        return paper_figures.__main__.main()
    finally:
        sys.argv = before


def filling_the_disk(place: Path, arguments: list, room: int, file: str, said) -> None:
    """The command in a process of its own, in which no file grows beyond so many bytes once this one is begun."""
    os.chdir(place)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_from_here(event, given):
        if event == "open" and str(given[0]).endswith((".part", ".bin")) and re.search(file, str(given[0])):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))

    sys.addaudithook(full_from_here)
    told = io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        status = command(*arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)  # at the end coverage writes more
    said.send((status, told.getvalue()))


@pytest.mark.no_cover
@pytest.mark.parametrize("arguments, room, file", FULL)
def test_a_full_disk_harms_nothing_that_was_saved(place, monkeypatch, arguments, room, file):
    monkeypatch.chdir(place)
    (place / "README.md").write_text(
        "\n".join(["page", pages.MARK[0].format("results"), "old", pages.MARK[1].format("results"), ""]), encoding="utf-8"
    )
    (place / "cut2.txt").write_text(f"{STORY[:30_000]}, and what is new\n", encoding="utf-8")
    (place / "s.safetensors").write_bytes((place / "model.safetensors").read_bytes())
    letters = (json.dumps({"text": f"Letter {n}: we sold {n * n}."}) for n in range(2100))
    (place / "letters.jsonl").write_text("\n".join(letters), encoding="utf-8")
    if not (place / "tables").exists():
        (place / "tables").mkdir()
        tables(place / "tables")
    before = saved(place)
    arguments = [*arguments, *(into(place) if arguments[0] in EXPERIMENTS else [])]
    mine, theirs = APART.Pipe()
    process = APART.Process(target=filling_the_disk, args=(place, arguments, room, file, theirs))
    process.start()
    theirs.close()
    status, told = mine.recv()
    process.join()
    assert status == 1
    assert re.search(f"error: .Errno 27. cannot be written: File too large: '.*{file}'\n$", told), told
    assert len([line for line in re.split(r"[\r\n]", told) if "rror" in line]) == 1
    after = saved(place)
    assert not {name for name in before if after.get(name) != before[name]}
    assert not [name for name in after if name.endswith(".part")]
    assert command(*arguments) == 0  # and with room again the same command succeeds


@pytest.fixture
def without_rights(place):
    """Root, who may write everywhere, is nobody for the time of a test; what that takes was imported when `place` was made."""
    if os.geteuid() == 0:
        os.seteuid(65534)
        yield
        os.seteuid(0)
    else:
        yield


@pytest.mark.parametrize("option", ("--out", "--records"))
def test_a_folder_without_permission_is_named(capsys, option, without_rights):
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "story.txt").write_text(STORY, encoding="utf-8")
        (Path(place) / "closed").mkdir(mode=0o500)
        where = {"--out": f"{place}/out", "--records": f"{place}/records"} | {option: f"{place}/closed/in"}
        assert run(*TRAIN, "--text", f"{place}/story.txt", *itertools.chain(*where.items())) == 1
        assert re.search("error: .Errno 13. Permission denied: .*closed/in'", capsys.readouterr().err)


def test_damaged_tokens_are_named(place, capsys):
    cache = place / "tokens"
    arguments = ["table2", "--rows", ROW, "--steps", "1", "--text", place / "story.txt", *into(cache)]
    assert run(*arguments) == 0
    kept = next((cache / "out" / "cache").glob("*.npz"))
    kept.write_bytes(kept.read_bytes()[:100])
    assert run(*arguments, "--seeds", "5") == 1
    assert re.search(r"tokens-.*npz is damaged .*delete it", capsys.readouterr().err)


def test_numbers_that_are_not_finite_are_not_recorded(tmp_path):
    record = records.new_record("decode", "p", "m", {}, {"loss": 1.0})
    records.append(tmp_path, record)
    before = saved(tmp_path)
    with pytest.raises(ValueError, match="decode.p.json: m measured NaN or infinity"):
        records.append(tmp_path, records.new_record("decode", "p", "m", {"other": 1}, {"loss": float("nan")}))
    assert saved(tmp_path) == before


def test_unknown_fields_of_a_record_are_kept(tmp_path):
    record = records.new_record("decode", "p", "m", {}, {"loss": 1.0})
    records.append(tmp_path, dataclasses.replace(record, more={"note": "from elsewhere"}))
    records.append(tmp_path, records.new_record("decode", "p", "m", {"other": 1}, {"loss": 2.0}))
    assert [r.more for r in records.load(tmp_path)] == [{"note": "from elsewhere"}, {}]


def train_beside(place, both_ready):
    both_ready.wait(60)
    sys.exit(run("table2", "--rows", ROW, "--steps", "3", "--text", place / "story.txt", *into(place / "two")))


def test_two_runs_in_one_folder_leave_one_record(place):
    context = multiprocessing.get_context("forkserver")
    both_ready = context.Barrier(2)
    both = [context.Process(target=train_beside, args=(place, both_ready)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert len(records.load(place / "two" / "out" / "records", "table2", "smoke")) == 1
    assert not list((place / "two").rglob("*.pt")) and not list((place / "two").rglob("*.part"))
