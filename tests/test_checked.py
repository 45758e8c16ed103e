"""What comes from a file is checked before it is believed: types, numbers, sizes. One line says what is allowed."""

import contextlib
import errno
import gzip
import io
import json
import lzma
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated

import numpy as np
import pytest
import torch
from helpers import run_here
from pydantic import Field
from safetensors.torch import save_file
from torch import nn

import paper_figures.__main__
from reproduce import console
from reproduce.data import images, prepared, text
from reproduce.experiments import spectra
from reproduce.models.generation import generate, next_token
from reproduce.models.llama import Llama
from reproduce.models.public import checkpoint
from reproduce.models.rows import Row
from reproduce.store import checked, records, saved, schema
from reproduce.train import arguments
from reproduce.train.language import load_model, save_model
from reproduce.train.loop import train
from reproduce.train.settings import TrainConfig

STORY = "".join(f"line {n} of the tale, so long, and {n * n} more words.\n" for n in range(500))


@pytest.mark.parametrize(
    "row, message",
    [
        ({}, "f lacks mechanism"),
        ([3], r"f is \[3\]; it must be a dict"),
        ({"mechanism": "x"}, """f has mechanism "x"; it must be 'MHA', 'GQA', 'MLA' or 'Tucker'"""),
        ({"mechanism": "GQA", "n_kv_heads": 1.0}, "f has n_kv_heads 1.0; it must be an integer"),
        ({"mechanism": "GQA", "n_kv_heads": True}, "f has n_kv_heads true; it must be an integer"),
        ({"mechanism": "GQA", "n_kv_heads": "1"}, 'f has n_kv_heads "1"; it must be an integer'),
        ({"mechanism": "MLA", "latent": -1}, "f has latent -1; it must be at least 0"),
        ({"mechanism": "MLA", "latent": 10**16}, r"f has latent 10000000000000000; it must be at most 1e\+15"),
        ({"mechanism": "Tucker", "ranks": [1, 2]}, r"f has ranks \[1, 2\]; it must be three ranks or none"),
        ({"mechanism": "Tucker", "ranks": [1, 2, "3"]}, r'f has ranks\[2\] "3"; it must be an integer'),
        ({"mechanism": "MHA", "evil": 1}, "f has evil, which is not known here"),
        ({"mechanism": object}, "f has mechanism type; it must be 'MHA'"),
        ({"mechanism": "M" * 50}, 'f has mechanism "MMM.*M...; it must'),
    ],
)
def test_what_is_wrong_is_said_in_one_line(row, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        checked.check(schema.Row, row, "f")
    assert checked.check(schema.Row, {"mechanism": "Tucker", "ranks": [8, 64, 64]}, "f").ranks == [8, 64, 64]  # control


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "f: Expecting property name"),
        ('{"a": NaN}', "f: it holds NaN, which is no number"),
        ('{"a": -Infinity}', "f: it holds -Infinity, which is no number"),
        (f'{{"a": {2**63}}}', "f: it holds an integer of 19 digits; 64 bits do not hold it"),
        (f'{{"a": {10**400}}}', "f: it holds an integer of 401 digits"),
        ('{"a": "\\ud83d"}', "f: it holds half of a character"),
        ('{"a": "\\udcff"}', "f: it holds half of a character"),
        ('[{"a": {"b": 1, "c": 2, "b": 1}}]', 'f: it holds "b" twice in one object$'),
        ("[" * 100_000, "f: it is nested too deeply"),
    ],
)
def test_json_that_is_none_is_refused(content, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        checked.read_json(content, "f")


def test_json_that_is_some_is_read():
    assert checked.read_json('{"a": [1, -9223372036854775808, 1.5, "\\ud83d\\ude00"]}', "f") == {"a": [1, -(2**63), 1.5, "😀"]}


def test_what_is_nested_too_deeply_for_its_schema_is_said(monkeypatch):
    def too_deep(_value):
        raise RecursionError

    monkeypatch.setattr(schema.Row, "model_validate", too_deep)
    with pytest.raises(ValueError, match="^f is nested too deeply"):
        checked.check(schema.Row, {}, "f")


def test_bytes_in_words():
    words = {0: "0 bytes", 999: "999 bytes", 1000: "1.0 kB", 4_200_000: "4.2 MB", 10**9: "1.0 GB", 3 * 10**15: "3,000.0 TB"}
    assert {count: checked.in_words(count) for count in words} == words


def test_more_memory_than_the_machine_has_is_refused():
    checked.check_memory(checked.machine_memory(), "it")
    with pytest.raises(ValueError, match="^it takes .* of memory; this machine has "):
        checked.check_memory(checked.machine_memory() + 1, "it")


# Records.


def committed(name: str) -> dict:
    return json.loads((records.COMMITTED / name).read_text(encoding="utf-8"))[0]


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("table2.gpu.json", {"preset": "smoke"}, "is of table2.smoke; it must be of table2.gpu, as its file is"),
        ("table2.gpu.json", {"experiment": "table9"}, "is of table9.gpu; it must be of table2.gpu"),
        ("table2.gpu.json", {"method": "Tukker"}, 'has method "Tukker"; it must be'),
        ("table2.gpu.json", {"data": None}, "has data null; it must be a dict"),
        ("survival.smoke.json", {"metrics": {"training": {}}}, "lacks metrics.training.kills, metrics.training.ends"),
        ("speed.gpu.json", {"metrics": {"rows": [{}]}}, r"has metrics.rows\[0\] {}; it must be a dict that has 'what'"),
        (
            "speed.gpu.json",
            {"metrics": {"rows": [{"what": {}}]}},
            r'has metrics.rows\[0\] {"what": {}}; it must be a dict whose .what. is one of .copy., .matmul.',
        ),
        ("spectra.smoke.json", {"metrics": {"trained": []}}, r"has metrics.trained \[\]; it must be a list of 1 or more"),
        ("compress_speed.paper.json", {"config": {}}, "lacks config.head_dim, config.repeats"),
    ],
)
def test_a_record_that_could_not_be_shown_is_refused(name, change, message):
    named = tuple(name.split(".")[:2])
    entry = committed(name)
    schema.check_record(entry, "f: record 0", named)  # control
    with pytest.raises(ValueError, match=f"^f: record 0 {message}"):
        schema.check_record(entry | change, "f: record 0", named)


def test_a_curve_tells_of_all_its_steps():
    entry = committed("table2.smoke.json")
    for curve in (entry["metrics"]["curve"][1:], entry["metrics"]["curve"][::-1]):
        with pytest.raises(
            ValueError, match="has a metrics.curve that does not tell of its 250 steps, one entry after every 10"
        ):
            schema.check_record(entry | {"metrics": entry["metrics"] | {"curve": curve}}, "f", ("table2", "smoke"))


def test_sizes_grow_from_one_to_the_next():
    entry = committed("compress_speed.paper.json")
    sizes = {"metrics": {"sizes": entry["metrics"]["sizes"][::-1]}}
    with pytest.raises(ValueError, match="it must be from the narrowest layer to the widest"):
        schema.check_record(entry | sizes, "f", ("compress_speed", "paper"))


# Committed as they are, and with one thing changed that some table or figure asks for.
ASKED_FOR = [
    ("spectra.models", ("metrics", "inputs", 0, "pre", "head", "values"), [], "a list of 1 or more"),
    ("spectra.models", ("metrics", "centred", 0, "post", "value", "square_rank"), None, "a number"),
    ("compress_models.models", ("config", "weights"), {}, "a string"),
    ("compress_models.models", ("config", "n_kv_heads"), 0, "at least 1"),
    *(
        (name, ("seed",), None, "an integer")
        for name in ("table2.gpu-fresh", "ablations.gpu-sweep", "figure3.gpu", "spectra.gpu")
    ),
    ("compress.smoke", ("metrics", "ways", "plain", "agreement"), None, "a number"),
    ("speed.gpu", ("metrics", "rows"), [{"what": "copy", "gigabytes_per_second": 1.0}], "one row of copies and one of matrix"),
    ("speed.gpu", ("config", "dtype"), 3, "a string"),
    ("survival.smoke", ("metrics", "table2", "full_disks"), [], "an integer"),
    ("table2.sizes", ("metrics", "rows", 0, "paper", "cache_mb"), 0, "at least 1e-12"),
    ("table3.sizes", ("metrics", "rows", 0, "paper", "size"), "x", "a number"),
    ("table2.gpu-fresh", ("config", "train", "optimizer"), "x", "'adamw' or 'muon'"),
    ("opening.tests", ("metrics", "architectures", 0, "errors", "own layers"), -1.0, "at least 0"),
    (
        "theorems.float64",
        ("metrics", "growth", 0),
        {"layer": "Tucker", "d": 8, "r": 2, "parameters": 9},
        "a Tucker layer with r and",
    ),
]


@pytest.mark.parametrize(("name", "place", "change", "message"), ASKED_FOR)
def test_all_that_is_read_of_a_record_is_asked_for(name, place, change, message):
    entry, named = committed(f"{name}.json"), tuple(name.split("."))
    schema.check_record(entry, "f", named)  # control
    *steps, last = place
    inner = entry
    for step in steps:
        inner = inner[step]
    inner[last] = change
    with pytest.raises(ValueError, match=f"it must be {message}"):
        schema.check_record(entry, "f", named)


@pytest.mark.parametrize(("part", "name"), [("config", "pretrain"), ("metrics", "converted")])
def test_a_fine_tuning_tells_what_it_began_with(part, name):
    entries = json.loads((records.COMMITTED / "figure3.smoke.json").read_text(encoding="utf-8"))
    entry = next(entry for entry in entries if "row" in entry["config"])
    schema.check_record(entry, "f", ("figure3", "smoke"))  # control
    with pytest.raises(ValueError, match=f"^f has {part}.{name} null; it must be a dict"):
        schema.check_record(entry | {part: entry[part] | {name: None}}, "f", ("figure3", "smoke"))


def test_spectra_are_of_all_layers_and_of_all_their_values():
    entry, named = committed("spectra.smoke.json"), ("spectra", "smoke")
    schema.check_record(entry, "f", named)  # control
    metrics = entry["metrics"]
    with pytest.raises(ValueError, match="in every way of as many layers, all of the same sizes"):
        schema.check_record(entry | {"metrics": metrics | {"initial": metrics["initial"][1:]}}, "f", named)
    fewer = {way: metrics[way][1:] for way in ("trained", "initial")}
    with pytest.raises(ValueError, match="f has a metrics.trained of 1 layers; its config says 2"):
        schema.check_record(entry | {"metrics": metrics | fewer}, "f", named)
    del metrics["trained"][0]["pre"]["head"]["values"][0]
    with pytest.raises(ValueError, match="it must be an unfolding with as many values as its size says"):
        schema.check_record(entry, "f", named)


def test_every_way_to_compress_is_judged_by_the_same_score():
    entry = committed("compress.smoke.json")
    score = next(name for name in schema.SCORES if name in entry["metrics"]["ways"]["aware"])
    schema.check_record(entry, "f", ("compress", "smoke"))  # control
    for judged in (entry["metrics"]["ways"]["aware"], entry["metrics"]["before"]):
        kept = judged.pop(score)
        with pytest.raises(ValueError, match="it must be judged by one or more of loss, top1, .* by the same"):
            schema.check_record(entry, "f", ("compress", "smoke"))
        judged[score] = kept
    entry["metrics"]["before"]["similarity"] = 1.0  # with which it would be compared is the model before itself
    with pytest.raises(ValueError, match="it must be judged by one or more of loss, top1, .* by the same"):
        schema.check_record(entry, "f", ("compress", "smoke"))


@pytest.mark.parametrize(
    "tests",
    [
        {"enwiki_test.txt": {"tokens": 9, "loss": 1.0, "bits_per_byte": 1.0}},
        {"novel.txt": {"sentences": 9, "cosine": 1, "rank_correlation": 1}},
    ],
)
def test_a_compressed_model_is_judged_as_the_one_it_came_from(tests):
    entry, named = committed("compress_models.models.json"), ("compress_models", "models")
    schema.check_record(entry, "f", named)  # control
    with pytest.raises(ValueError, match="it must be judged as the model before was, on the same texts"):
        schema.check_record(entry | {"metrics": entry["metrics"] | {"tests": tests}}, "f", named)


@pytest.mark.parametrize(
    "experiment, preset, config, metrics, kind",
    [
        ("figure3", "paper", {"train": {}}, {}, (schema.PaperVisionConfig, schema.PaperVisionEnded)),
        ("figure3", "gpu", {"train": {}}, {"diverged_at": 1}, (schema.VisionConfig, schema.VisionDiverged)),
        ("figure3", "gpu-tiny-imagenet", {"train": {}}, {}, (schema.ChosenVisionConfig, schema.ChosenVisionEnded)),
        ("figure3", "gpu", {}, {}, (schema.PretrainedConfig, schema.PretrainedEnded)),
        ("figure3", "gpu", {"train": {}}, {}, (schema.VisionConfig, schema.VisionEnded)),
        ("table3", "gpu", {}, {"diverged_at": 1}, (schema.LanguageConfig, schema.LanguageDiverged)),
        ("table3", "sizes", {}, {}, (schema.SizesConfig, schema.Sizes[schema.SizesRow3])),
        ("spectra", "models", {}, {}, (schema.OpenedConfig, schema.SpectraMetrics[schema.Drawn])),
        ("spectra", "gpu", {}, {}, (schema.LanguageConfig, schema.SpectraMetrics[schema.Drawn])),
        ("spectra", "gpu-fresh-optimizers", {}, {}, (schema.LanguageConfig, schema.SpectraMetrics[schema.Unfolding])),
        ("heal", "gpu", {}, {}, (schema.HealConfig, schema.HealMetrics)),
    ],
)
def test_a_record_is_asked_for_what_its_kind_has(experiment, preset, config, metrics, kind):
    fields = committed("table2.smoke.json") | dict(experiment=experiment, preset=preset, config=config, metrics=metrics)
    assert schema.kind_of(schema.Entry(**fields))[:2] == kind


# Text.


@pytest.mark.parametrize("pack, suffix", [(gzip.compress, ".gz"), (lzma.compress, ".xz"), (bytes, ".txt")])
def test_of_a_packed_text_no_more_is_read_than_is_allowed(tmp_path, monkeypatch, pack, suffix):
    monkeypatch.setattr(text, "MOST_CHARACTERS", 1000)
    for length in (1000, 1001):
        (tmp_path / f"{length}{suffix}").write_bytes(pack(b"a" * length))
    assert len(text._read(tmp_path / f"1000{suffix}")) == 1000
    with pytest.raises(ValueError, match=rf"1001{suffix} holds more than 1,000 characters, the most .*`prepare`"):
        text._read(tmp_path / f"1001{suffix}")


def test_a_text_beyond_memory_is_said(tmp_path, monkeypatch):
    class Full(io.StringIO):
        def read(self, _size):
            raise MemoryError

    monkeypatch.setitem(text.OPENERS, ".gz", lambda *_arguments, **_options: Full())
    with pytest.raises(ValueError, match="a.gz holds more text than there is memory for"):
        text._read(tmp_path / "a.gz")


def bpe_folder(folder: Path, change) -> Path:
    """GPT-2's two files, of 257 tokens, with the numbers of the tokens changed."""
    folder.mkdir()
    alphabet = sorted(text.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*alphabet, text.END_OF_TEXT])}
    (folder / "vocab.json").write_text(json.dumps(change(vocabulary)), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    return folder


def test_byte_pairs_are_numbered_without_a_gap(tmp_path):
    assert text.read_gpt2_tables(bpe_folder(tmp_path / "whole", lambda v: v)).get_vocab_size() == 257
    for name, change in {
        "gap": lambda v: v | {text.END_OF_TEXT: 300},
        "double": lambda v: v | {text.END_OF_TEXT: 3},
        "vast": lambda v: v | {text.END_OF_TEXT: 2**31},
    }.items():
        with pytest.raises(ValueError, match=f"--bpe .*{name}: vocab.json must number its 257 tokens from 0 to 256, each once"):
            text.read_gpt2_tables(bpe_folder(tmp_path / name, change))


def test_kept_tokens_of_another_kind_are_damaged(tmp_path):
    (tmp_path / "story.txt").write_text(STORY, encoding="utf-8")
    data = text.load_text(str(tmp_path / "story.txt"), 300, tmp_path / "cache")
    [kept] = (tmp_path / "cache").iterdir()
    with np.load(kept) as arrays:
        whole = dict(arrays)
    for change in (data.train.astype(np.int64), data.train[None], np.full_like(data.train, 300)):
        with open(kept, "wb") as file:
            np.savez(file, **whole | {"train": change})
        with pytest.raises(ValueError, match="is damaged .*delete it"):
            text.load_text(str(tmp_path / "story.txt"), 300, tmp_path / "cache")


# Prepared text.


@pytest.fixture
def folder(tmp_path):
    """A prepared text."""
    (tmp_path / "train.txt").write_text(STORY, encoding="utf-8")
    (tmp_path / "held.txt").write_text(f"{STORY[:4000]}, and what is new\n", encoding="utf-8")
    bpe = bpe_folder(tmp_path / "bpe", lambda v: v)
    out = tmp_path / "prepared"
    prepared.prepare("story", out, str(tmp_path / "train.txt"), str(bpe), str(tmp_path / "held.txt"))
    assert prepared.open_prepared(str(out)).vocab_size == 257  # control
    return out


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: [], r"tokens.json is damaged: it is \[\]; it must be a dict; delete"),
        (lambda s: {}, "tokens.json is damaged: it lacks name, "),
        (lambda s: s | {"tokens": 5}, "has tokens 5; it must be a dict"),
        (lambda s: s | {"tokens": {"train": -1, "validation": 1}}, "has tokens.train -1; it must be at least 0"),
        (lambda s: s | {"tokens": {"train": 1.5, "validation": 1}}, "has tokens.train 1.5; it must be an integer"),
        (lambda s: s | {"finished": "yes"}, 'has finished "yes"; it must be true or false'),
        (lambda s: s | {"tokens": {"train": 10**9, "validation": 1}}, "train.bin should hold 1,000,000,000 tokens"),
        (lambda s: {k: v for k, v in s.items() if k != "sha256"}, "lacks sha256"),
    ],
)
def test_prepared_text_of_another_shape_is_refused(folder, change, message):
    state = json.loads((folder / "tokens.json").read_text(encoding="utf-8"))
    (folder / "tokens.json").write_text(json.dumps(change(state)), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        prepared.open_prepared(str(folder))


def test_prepared_tokens_beyond_the_vocabulary_are_refused(folder):
    tokens = np.fromfile(folder / "train.bin", dtype=np.uint16)
    tokens[-1] = 257
    tokens.tofile(folder / "train.bin")
    with pytest.raises(ValueError, match="prepared/train.bin holds token 257; its tokenizer.json makes 257, from 0"):
        prepared.open_prepared(str(folder))


def test_a_prepared_tokenizer_that_is_none_is_refused(folder):
    whole = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(whole.replace(text.END_OF_TEXT, "end"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokenizer.json must hold <\|endoftext\|>"):
        prepared.open_prepared(str(folder))
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="tokenizer.json is no tokenizer: "):
        prepared.open_prepared(str(folder))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        prepared.open_prepared(str(folder))


# Images.


def archive(path: Path, change=lambda name, content: content, **options) -> Path:
    """Images and labels, with the content of each array's file changed."""
    arrays = dict(
        x_train=np.zeros((64, 8, 8, 3), np.uint8), y_train=np.arange(64) % 4,
        x_test=np.ones((8, 8, 8, 3), np.uint8), y_test=np.arange(8) % 4,
    )  # fmt: skip
    with zipfile.ZipFile(path, "w", **options) as file:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.save(buffer, array)
            file.writestr(f"{name}.npy", change(name, buffer.getvalue()))
    return path


def vast(name: str, content: bytes) -> bytes:
    return content.replace(b"(64, 8, 8, 3), }", b"(10**9, 8, 8), }") if name == "x_train" else content


def shaped(shape: str):
    """A head that says another shape."""
    return lambda name, content: (
        content.replace(b"(64, 8, 8, 3), }", f"{shape}, }}".encode().ljust(16)) if name == "x_train" else content
    )


def test_images_are_no_larger_than_they_say(tmp_path, monkeypatch):
    assert len(images.load_images(str(archive(tmp_path / "whole.npz"))).x_train) == 64  # control
    refused = {
        "(900000, 8, 8)": r"x_train is said to be \(900000, 8, 8\), 57.6 MB; there are 12.4 kB of it",
        "(9000000000, 8, 8)": "x_train takes 576.0 GB; an array of images in memory may take 17.2 GB",
        "(64, 0, 0, 3)": "x_train .64, 0, 0, 3. and y_train .64,. are not labelled square images",
        "(64, 192)": r"x_train is uint8 \(64, 192\); images are uint8",
        "(-1, 8, 8, 3)": "is not a readable .npz file",
        "((((((((((": "is not a readable .npz file",
        "'x'": "is not a readable .npz file",
    }
    for n, (shape, message) in enumerate(refused.items()):
        with pytest.raises(ValueError, match=f"--images .*{n}.npz.*{message}"):
            images.load_images(str(archive(tmp_path / f"{n}.npz", shaped(shape))))
    monkeypatch.setattr(images, "MOST_BYTES", 10_000)
    with pytest.raises(ValueError, match="bomb.npz: x_train takes 12.4 kB; .* may take 10.0 kB"):
        images.load_images(str(archive(tmp_path / "bomb.npz", compression=zipfile.ZIP_DEFLATED)))


def test_archives_of_other_kinds_are_refused(tmp_path):
    assert len(images.load_images(str(archive(tmp_path / "lzma.npz", compression=zipfile.ZIP_LZMA))).x_test) == 8  # control
    spoiled = bytearray((tmp_path / "lzma.npz").read_bytes())
    spoiled[60:90] = b"\xff" * 30
    (tmp_path / "spoiled.npz").write_bytes(spoiled)
    whole = archive(tmp_path / "whole.npz").read_bytes()
    for name, method, flags in (("deflate64", b"\x09\x00", b"\x00\x00"), ("encrypted", b"\x00\x00", b"\x01\x00")):
        content = bytearray(whole)
        for head, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            start = content.find(head)
            while start >= 0:
                content[start + offset : start + offset + 4] = flags + method
                start = content.find(head, start + 4)
        (tmp_path / f"{name}.npz").write_bytes(content)
    for name in ("spoiled", "deflate64", "encrypted"):
        with pytest.raises(ValueError, match=f"{name}.npz is not a readable .npz file: "):
            images.load_images(str(tmp_path / f"{name}.npz"))


# Model files.


def tiny() -> tuple[Llama, dict, str]:
    row = Row("MHA")
    config = dict(
        model="llama", attention=row.config(), d_model=8, n_heads=2, n_layers=2, context=16, vocab_size=257, rope_base=1e4
    )
    tokenizer = text._learn_byte_pairs([STORY], 257)
    torch.manual_seed(0)
    return Llama(257, 8, 2, 2, lambda d, h: row.build(d, h, 1e4)), config, tokenizer.to_str()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"n_layers": 10**9}, "describes a model of 1,000,000,000 layers; its .* tensors are too few for them"),
        ({"n_layers": 3}, "its weights do not fit the model that it describes"),
        ({"vocab_size": 10**9}, "its weights do not fit the model that it describes"),
        ({"d_model": 10**6}, "its weights do not fit the model that it describes"),
        ({"n_layers": -1}, "describes no model .*: its config has n_layers -1; it must be at least 1"),
        ({"n_layers": 2.0}, "its config has n_layers 2.0; it must be an integer"),
        ({"vocab_size": 256}, "its tokenizer makes token 256, beyond a vocabulary of 256"),
        ({"rope_base": None}, "its config has no rope_base, from which a Llama's frequencies come"),
        ({"model": "bert"}, """its config has model "bert"; it must be 'gpt2' or 'llama'"""),
    ],
)
def test_a_model_is_made_only_where_its_weights_are_there(tmp_path, change, message):
    model, config, tokenizer = tiny()
    save_model(tmp_path / "whole.safetensors", model, config, tokenizer)
    assert load_model(tmp_path / "whole.safetensors")[2] == json.loads(json.dumps(config))  # control
    save_model(tmp_path / "m.safetensors", model, config | change, tokenizer)
    with pytest.raises(ValueError, match=f"m.safetensors.*{message}"):
        load_model(tmp_path / "m.safetensors")


def test_a_llama_names_the_base_of_its_frequencies(tmp_path):
    """Weights know nothing of it: any other base would give another model."""
    model, config, tokenizer = tiny()
    del config["rope_base"]
    save_model(tmp_path / "m.safetensors", model, config, tokenizer)
    with pytest.raises(ValueError, match="m.safetensors describes no model that can be built: .* its config has no rope_base"):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("change", [{"n_heads": 4}, {"rope_base": 500.0}])
def test_a_description_that_was_changed_is_refused_though_the_weights_fit_it(tmp_path, change):
    model, config, tokenizer = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(20)  # logits far from zero
    path = tmp_path / "m.safetensors"
    save_model(path, model, config, tokenizer)
    metadata, tensors = saved.read_model(path)
    save_file(tensors, path, metadata | {"run": "another name"})  # control: nothing of the model hangs on it
    tokens = torch.arange(8)[None]
    expected = load_model(path)[0](tokens)
    assert torch.equal(expected, model.eval()(tokens))
    changed = metadata | {"config": json.dumps(config | change)}
    save_file(tensors, path, changed)
    with pytest.raises(ValueError, match="m.safetensors: the description of its model was changed after it was written"):
        load_model(path)
    del changed["seal"]
    save_file(tensors, path, changed)  # control: as an older file it opens, and is another model
    assert not torch.allclose(load_model(path)[0](tokens), expected, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.int8, torch.uint8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64])
def test_numbers_that_stand_for_others_fill_no_model(tmp_path, kind):
    model, config, tokenizer = tiny()
    path, name = tmp_path / "m.safetensors", "blocks.1.attention.q_proj.weight"
    save_model(path, model, config, tokenizer)
    metadata, tensors = saved.read_model(path)
    for other in (torch.float64, torch.bfloat16, torch.float16):  # control
        save_file(tensors | {name: tensors[name].to(other)}, path, metadata)
        assert torch.equal(load_model(path)[0].state_dict()[name], tensors[name].to(other).float())
    save_file(tensors | {name: (20 * tensors[name]).to(kind)}, path, metadata)
    with pytest.raises(
        ValueError, match=f"m.safetensors: {name} is {kind} in the file, and torch.float32 in the model that it"
    ):
        load_model(path)


@pytest.mark.parametrize("name", ["token_embedding.weight", "blocks.1.mlp.up.weight", "blocks.0.attention.q_proj.weight"])
def test_weights_that_are_not_finite_fill_no_model(tmp_path, name):
    """Of a model's spectra, say, those outside of its attention are no part."""
    model, config, tokenizer = tiny()
    path = tmp_path / "m.safetensors"
    save_model(path, model, config, tokenizer)
    metadata, tensors = saved.read_model(path)
    for value, kind in ((math.nan, torch.float32), (-math.inf, torch.float32), (1e300, torch.float64)):
        weight = tensors[name].to(kind)
        weight[1, 2] = value
        save_file(tensors | {name: weight}, path, metadata)
        with pytest.raises(ValueError, match=f"m.safetensors: NaN or infinity is in {name}$"):
            load_model(path)


@pytest.mark.parametrize(
    "said, message",
    [
        ({"validation_loss": '"low"'}, 'what it says of its run has validation_loss "low"; it must be a number'),
        ({"validation_loss": "-1.0"}, "what it says of its run has validation_loss -1.0; it must be at least 0"),
        ({"validation_loss": "NaN"}, "its validation_loss: it holds NaN, which is no number"),
        ({"data": "[]"}, r"what it says of its run has data \[\]; it must be a dict"),
        ({"data": '{"name": "novel"}'}, "what it says of its run lacks data.sha256"),
    ],
)
def test_what_a_model_says_of_its_run_is_checked_before_it_is_on_record(tmp_path, said, message):
    model, config, tokenizer = tiny()
    path = tmp_path / "m.safetensors"
    save_model(path, model, config, tokenizer, validation_loss="2.5")
    assert spectra.of_its_run(path, saved.read_metadata(path)) == {"validation_loss": 2.5}
    save_model(path, model, config, tokenizer, **said)
    with pytest.raises(ValueError, match=f"m.safetensors: {message}"):
        spectra.of_its_run(path, saved.read_metadata(path))


class Config:
    """Of transformers, as far as it is looked at."""

    def __init__(self, layers: int):
        self.num_hidden_layers = layers


def test_a_public_model_is_no_larger_than_the_machine():
    checkpoint.check_size(Config(2), lambda: nn.Linear(8, 8))  # control
    with pytest.raises(ValueError, match="its num_hidden_layers is 1,000,000,000; it must be from 0 to 1,024"):
        checkpoint.check_size(Config(10**9), lambda: pytest.fail("it was made"))
    with pytest.raises(ValueError, match="a model of its config.json takes 4,000.0 TB of memory; this machine has"):
        checkpoint.check_size(Config(2), lambda: nn.Linear(10**9, 10**6))


# Checkpoints.


SETTINGS = TrainConfig(steps=10, batch_size=2, learning_rate=1e-2, log_every=5, checkpoint_every=5)


def toy(path: Path):
    torch.manual_seed(0)
    net = nn.Linear(4, 4)
    return train(net, lambda step: (torch.ones(2, 4),), lambda m, x: m(x).square().mean(), SETTINGS, path, "toy")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"step": 10**9}, "its step is 1,000,000,000 of 10"),
        ({"step": -1}, "it has step -1; it must be at least 1"),
        ({"step": 0}, "it has step 0; it must be at least 1"),
        ({"step": "5"}, 'it has step "5"; it must be an integer'),
        ({"curve": None}, "it has curve null; it must be a list"),
        ({"curve": [[1, 2]]}, r"it has curve\[0\] \[1, 2\]; it must be a list of 3 or more"),
        ({"seconds": float("nan")}, "it has seconds NaN; it must be"),
        ({"config": "[]"}, "its config is no dict"),
        ({"config": "{"}, "its config: Expecting"),
        ({"optimizer": []}, r"it has optimizer \[\]; it must be a dict"),
        ({"optimizer": {"state": {}}}, "it lacks optimizer.param_groups"),
        ({"optimizer": {"state": {0: 3}, "param_groups": []}}, r"it has optimizer.state\[0\] 3; it must be a dict"),
        ({"optimizer": {"state": {0: {"exp_avg": "x"}}, "param_groups": []}}, None),
        ({"optimizer": {"state": {7: {}}, "param_groups": []}}, None),
        ({"optimizer": {"state": {-1: {}}, "param_groups": []}}, None),
        ({"model": {"other": torch.ones(1)}}, None),
        ({"model": {"weight.other": torch.ones(1)}}, None),
    ],
)
def test_a_checkpoint_of_other_steps_is_refused(tmp_path, change, message):
    toy(tmp_path / "toy.pt")
    state = torch.load(tmp_path / "toy.pt", weights_only=True)
    del state["seal"]  # as before there was one
    assert len(toy(tmp_path / "toy.pt").curve) == 2  # control: as it is, it is done
    torch.save(state | change, tmp_path / "toy.pt")
    message = f"is not a readable checkpoint: {message}" if message else "holds the weights of another model"
    with pytest.raises(ValueError, match=f"toy.pt {message}.*; delete it to start again"):
        toy(tmp_path / "toy.pt")


# The command line.


@pytest.mark.parametrize("option", ["--rows", "--test"])
@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_none_of_several_is_not_all_of_them(capsys, option, value):
    assert run_here("table2", f"{option}={value}") == 2
    assert f"argument {option}: {value!r} names none; leave the option out for the default" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["1e39", "1e308", "inf", "1e400"])
def test_a_rate_beyond_float32_is_refused(capsys, value):
    assert run_here("table2", f"--learning-rate={value}") == 2
    assert f"'{value}' is not a positive number of at most 3.40282e+38" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("table2", "--test", "a.txt"),
        ("compress_models", "--test", "a.txt"),
        ("table2", "--rows", "MHA"),
        ("table2", "--seeds", "1"),
        ("ablations", "--learning-rate", "1e-3"),
        ("figure3", "--pretrain-rate", "1e-3"),
        ("compress", "--ranks", "1,1,1"),
    ],
)
def test_an_option_of_several_values_is_not_given_twice(capsys, command, option, value):
    """The first would be forgotten, and a finished model not be judged by its text, or a row not be run."""
    assert run_here(command, option, value, f"{option}={value}") == 2
    assert f"argument {option}: it is given twice, and the first would be forgotten" in capsys.readouterr().err


def test_an_option_of_one_value_may_be_given_again(capsys):
    """Control for the test above."""
    assert run_here("table2", "--text", "a.txt", "--text", "absent.txt", "--rows", "MHA", "--seeds", "0,1") == 1
    assert "given twice" not in capsys.readouterr().err


def test_numbers_beyond_what_is_counted_are_refused():
    assert arguments.positive("1000000000000000") == 10**15
    for value in ("1000000000000001", "9" * 5000):
        with pytest.raises(arguments.argparse.ArgumentTypeError, match="is not a number of 1 or more, and at most"):
            arguments.positive(value)


def test_a_prompt_is_utf8(capsys):
    assert run_here("generate", "--model", "m", "--prompt", b"a\xff".decode(errors="surrogateescape")) == 2
    assert r"argument --prompt: 'a\udcff' is not UTF-8 text: character 1 cannot be read" in capsys.readouterr().err
    assert arguments.utf8("naïve 😀") == "naïve 😀"


@pytest.mark.parametrize("device", ["hpu", "xla"])
def test_a_device_that_is_not_there_is_said_in_one_line(capsys, device):
    assert run_here("decode", "--device", device) == 1
    said = capsys.readouterr().err
    assert (
        said.startswith(f"error: --device {device} cannot be used here: ") and len(said.splitlines()) == 1 and len(said) < 200
    )


def test_more_tokens_than_memory_are_refused_before_any_is_made():
    with pytest.raises(ValueError, match="caching 1 x 1,000,000,000,001 tokens takes .* TB of memory; this machine has"):
        next(generate(tiny()[0], [[1]], 10**12))


def test_the_likeliest_token_stays_however_small_a_share_is_asked_for():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    assert next_token(logits, 1.0, 1e-320, torch.Generator().manual_seed(0)).item() == 1


def test_an_internal_error_stays_one_and_says_so(monkeypatch):
    from reproduce import __main__

    monkeypatch.setattr(__main__, "show_records", lambda _options: {}["missing"])
    with pytest.raises(KeyError, match="missing") as raised:
        run_here("report")
    assert raised.value.__notes__ == [console.BUG]
    monkeypatch.setattr(paper_figures.__main__.records, "load_some", lambda _folder: {}["missing"])
    monkeypatch.setattr("sys.argv", ["paper_figures"])
    with pytest.raises(KeyError, match="missing") as raised:
        paper_figures.__main__.main()
    assert raised.value.__notes__ == [console.BUG]


def test_weights_of_another_shape_fill_no_model():
    metadata, model = {"attention": "{}"}, nn.Linear(2, 3)
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    assert torch.equal(saved.fill(model, metadata, weights, Path("m")).bias, weights["bias"])  # control
    with pytest.raises(ValueError, match="m: its weights do not fit the model that it describes"):
        saved.fill(model, metadata, weights | {"bias": torch.zeros(2)}, Path("m"))


# Streams that nobody reads.


def piped(tmp_path: Path, command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, encoding="utf-8")


@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-", "2>&1 | true"])
def test_nothing_is_lost_but_what_nobody_reads(tmp_path, closed):
    done = piped(tmp_path, f"set -o pipefail; {sys.executable} -m reproduce table1 --records r {closed}")
    assert done.returncode == 0 and "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    assert len(records.load(tmp_path / "r", "table1")) == 1
    assert {path.name for path in (tmp_path / "r").iterdir()} <= {"table1.sizes.json", ".lock"}


def test_a_stream_goes_on_into_nothing_once_its_reader_has_gone(monkeypatch):
    reader, writer = os.pipe()
    with open(writer, "w", encoding="utf-8") as stream:
        patient = console.Patient(stream)
        assert patient.write("heard\n") == 6 and patient.encoding == "utf-8"
        patient.flush()
        assert os.read(reader, 100) == b"heard\n"
        os.close(reader)
        assert patient.write("x" * 100_000) == 100_000  # more than the stream keeps
        patient.write("and more")
        patient.flush()
        os.write(writer, b"nobody minds")


@pytest.mark.parametrize("where, status, said", [
    (">/dev/full", 1, "error: what was printed is not all there: standard output: No space left on device"),
    ("2>/dev/full", 0, ""),  # what is said while it runs is no result
    (">/dev/full 2>&1", 1, ""),
])  # fmt: skip
def test_on_a_full_disk_a_run_goes_on_and_the_end_says_what_is_lost(tmp_path, where, status, said, warm):
    done = piped(tmp_path, f"{warm.python} -m reproduce spectra --out /nowhere --records r {where}")
    assert done.returncode == 1  # control: an error is one all the same
    done = piped(tmp_path, f"{sys.executable} -m reproduce table1 --records r {where}")
    assert done.returncode == status and done.stderr.strip() == said
    assert len(records.load(tmp_path / "r", "table1")) == 1


def test_what_was_lost_is_known_and_makes_an_error_of_a_run_that_ended_well(monkeypatch, capsys):
    with open("/dev/full", "w", encoding="utf-8") as stream:
        patient = console.Patient(stream)
        assert patient.write("x" * 100_000) == 100_000 and patient.lost.errno == errno.ENOSPC
    for lost, status in ((patient.lost, 1), (None, 0)):
        monkeypatch.setattr(console, "patient", lambda lost=lost: contextlib.nullcontext(SimpleNamespace(lost=lost)))
        assert console.at_the_terminal(lambda: 0)() == status
        assert ("standard output: No space left on device" in capsys.readouterr().err) == bool(status)


def test_a_terminal_that_is_gone_stops_nothing(tmp_path):
    master, terminal = os.openpty()
    os.close(master)
    with pytest.raises(OSError):  # control
        os.write(terminal, b"x")
    command = [sys.executable, "-m", "reproduce", "table1", "--records", str(tmp_path / "r")]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, env=environment, stdout=terminal, stderr=terminal)
    os.close(terminal)
    assert done.returncode == 0 and len(records.load(tmp_path / "r", "table1")) == 1


def test_a_pipe_that_breaks_at_the_last_flush_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="utf-8") as stream:
        patient = console.Patient(stream)
        patient.write("kept until it is flushed")
        with pytest.raises(BrokenPipeError):  # control: the stream alone
            stream.flush()
        patient.flush()


def test_closed_streams_are_opened_on_nothing(monkeypatch):
    calls = []

    class System:
        devnull, O_RDWR = os.devnull, os.O_RDWR

        def fstat(self, number):
            if number == 2:
                raise OSError

        def open(self, path, _flags):
            calls.append(path)
            return 9

        def dup2(self, *numbers):
            calls.append(numbers)

        def close(self, number):
            calls.append(number)

    nothing = io.StringIO()
    monkeypatch.setattr(console, "os", System())
    monkeypatch.setattr(console, "open", lambda *_arguments, **_options: nothing, raising=False)
    monkeypatch.setattr(sys, "stdin", None)
    console.open_closed()
    assert calls == [os.devnull, (9, 2), 9] and sys.stdin is nothing


def test_words_of_pydantic_are_no_template():
    class Braces(checked.Part):
        code: Annotated[str, Field(pattern="^[{]0[}]$")]

    assert checked.check(Braces, {"code": "{0}"}, "f").code == "{0}"  # control
    with pytest.raises(ValueError, match='^f has code "x"; it must be .*{.0'):
        checked.check(Braces, {"code": "x"}, "f")
