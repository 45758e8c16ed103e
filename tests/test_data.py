"""Text and images: split without overlap, tokens that count every byte once, errors that name the file."""

import gzip
import lzma
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer

from reproduce.data import text
from reproduce.data.images import load_images
from reproduce.data.text import check_places, load_text, read_documents, read_tests, train_and_held_out
from reproduce.models.public.transformers_models import known_as
from reproduce.store.files import called
from reproduce.store.records import run_id
from reproduce.train.held_out import validate
from reproduce.train.language import batch_of

STORY = [f"Chapter {n}\n" + "".join(f"line {n * k} of the tale, so long.\n" for k in range(40)) for n in range(30)]


@pytest.fixture
def folder(tmp_path):
    for n, chapter in enumerate(STORY):
        (tmp_path / f"{n:02}.txt").write_text(chapter, encoding="utf-8")
    return tmp_path


def test_every_byte_is_in_exactly_one_token_of_one_split(folder, tmp_path):
    data = load_text(str(folder), 300, tmp_path / "cache")
    n_bytes = sum(int(data.token_bytes[part].sum()) for part in (data.train, data.validation))
    assert n_bytes == sum(len(c.encode()) for c in STORY)
    held_out = sum(len(c.encode()) for c in STORY[9::10])
    assert int(data.token_bytes[data.validation].sum()) == held_out
    assert data.vocab_size == 300 and (data.token_bytes == 0).sum() == 1  # only the end-of-text mark stands for no byte


def test_tokens_are_cached_by_content(folder, tmp_path):
    cache = tmp_path / "cache"
    first = load_text(str(folder), 300, cache)
    stamp = next(cache.iterdir()).stat().st_mtime_ns
    again = load_text(str(folder), 300, cache)
    assert np.array_equal(first.train, again.train) and next(cache.iterdir()).stat().st_mtime_ns == stamp
    (folder / "00.txt").write_text("another beginning\n" * 9, encoding="utf-8")
    assert load_text(str(folder), 300, cache).sha256 != first.sha256


def test_compressed_text_is_the_same_text(folder, tmp_path):
    whole = "".join(STORY) * 8
    for suffix, module in ((".txt", None), (".gz", gzip), (".xz", lzma)):
        path = tmp_path / f"book{suffix}"
        path.write_bytes(module.compress(whole.encode()) if module else whole.encode())
        name, documents = read_documents(str(path))
        assert name == path.name and "".join(documents) == whole and len(documents) > 1


@pytest.mark.parametrize("path, name", [(".", "books"), ("..", "shelf"), ("../books/", "books"), ("./", "books")])
def test_a_folder_has_its_own_name_however_it_is_called(path, name, tmp_path, monkeypatch):
    """An empty name would stand in a record that no table reads again."""
    (tmp_path / "shelf" / "books").mkdir(parents=True)
    (tmp_path / "shelf" / "books" / "novel.txt").write_text("".join(STORY), encoding="utf-8")
    monkeypatch.chdir(tmp_path / "shelf" / "books")
    assert Path(".").name == ""  # control: what the path alone says
    assert read_documents(path)[0] == known_as(path) == called(path) == name
    assert called("/") == "/" and known_as("nobody/nothing") == "nobody/nothing"  # of the hub


def test_a_short_novel_is_long_enough(tmp_path):
    (tmp_path / "novel.txt").write_text("".join(STORY), encoding="utf-8")
    documents = read_documents(str(tmp_path / "novel.txt"))[1]
    assert 20 <= len(documents) <= 30 and "".join(documents) == "".join(STORY)
    assert len(load_text(str(tmp_path / "novel.txt"), 300, tmp_path / "cache").validation) > 100


def test_documents_may_be_marked_within_a_file(tmp_path):
    (tmp_path / "many.txt").write_text("<|endoftext|>\n".join(STORY), encoding="utf-8")
    assert len(read_documents(str(tmp_path / "many.txt"))[1]) == 30


def test_held_out_text_can_be_given(folder, tmp_path_factory):
    there = tmp_path_factory.mktemp("there")
    (there / "out.txt").write_text("quite another text\n" * 50, encoding="utf-8")
    data = load_text(str(folder), 300, there / "cache", validation=str(there))
    assert int(data.token_bytes[data.validation].sum()) == 50 * len("quite another text\n")


def test_text_that_judges_is_not_the_text_that_was_learned(tmp_path, monkeypatch):
    """Whatever way leads there."""
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("text.txt", "data/a.txt", "data2.txt"):
        Path(name).write_text("".join(STORY), encoding="utf-8")
    Path("link.txt").symlink_to("text.txt")
    Path("folder").symlink_to("data")
    Path("round").symlink_to("round")
    apart = [
        ("text.txt", "data/a.txt"),
        ("data", "data2.txt"),
        ("data2.txt", "data"),
        (None, "data"),
        ("data", None),
        ("round", "data"),
    ]
    for pair in apart:  # controls
        check_places(zip(("--text", "--validation"), pair))
    same = [("text.txt", f"{tmp_path}/data/../text.txt"), ("text.txt", "link.txt"), ("folder", "data")]
    for first, second in [*same, ("data", "data/a.txt"), ("folder/a.txt", "data"), (".", "link.txt")]:
        for pair in ((first, second), (second, first)):
            with pytest.raises(
                ValueError, match="--test .* part of --validation |--validation .* part of --test .*: name another"
            ):
                check_places(zip(("--validation", "--test"), pair))


def test_a_held_out_text_has_something_new(folder, tmp_path_factory):
    """A copy is known by what it holds, packed or not; the control holds one document more."""
    there, name = tmp_path_factory.mktemp("there"), re.escape(folder.name)
    for n, documents in enumerate((STORY, STORY[:10], STORY[::-1])):
        content = "<|endoftext|>".join(documents).encode()
        (there / f"{n}.txt").write_bytes(content)
        (there / f"{n}.gz").write_bytes(gzip.compress(content))
    for path in sorted(there.iterdir()):
        with pytest.raises(
            ValueError, match=f"--validation .*: all of it stands in the text to train on, {name}; .*name another"
        ):
            load_text(str(folder), 300, there / "cache", validation=str(path))
    for name in ("one.txt", "two.txt"):
        (there / name).write_text("".join(STORY), encoding="utf-8")
    with pytest.raises(ValueError, match="all of it stands in the text to train on, one.txt"):
        train_and_held_out(read_documents(str(there / "one.txt")), str(there / "two.txt"))
    (there / "more.txt").write_text("<|endoftext|>".join([*STORY, "quite another text\n"]), encoding="utf-8")
    (_, train), (name, held_out) = train_and_held_out(read_documents(str(folder)), str(there / "more.txt"))
    assert (train, name, held_out) == (STORY, "more.txt", [*STORY, "quite another text\n"])


PARTS = {  # of the text that is trained on; cut into documents otherwise than it
    "one of its files": STORY[7],
    "two of its files": STORY[7] + STORY[8],
    "its end": "".join(STORY)[-9000:],
    "a few lines": "\n".join(STORY[7].splitlines()[3:5]),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("whole", ["folder", "one.txt"])
def test_a_part_that_was_copied_out_of_a_text_judges_no_model_that_read_it(folder, tmp_path_factory, whole, part):
    there = tmp_path_factory.mktemp("there")
    (there / "one.txt").write_text("".join(STORY), encoding="utf-8")
    (there / "part.txt").write_text(PARTS[part], encoding="utf-8")
    (there / "new.txt").write_text(PARTS[part] + "quite another text\n", encoding="utf-8")
    (there / "other.txt").write_text("quite another text\n" * 50, encoding="utf-8")
    text, given, new, other = (
        str(folder if whole == "folder" else there / whole),
        *(str(there / f"{name}.txt") for name in ("part", "new", "other")),
    )
    with pytest.raises(ValueError, match="--validation .*part.txt: all of it stands in the text to train on"):
        load_text(text, 300, there / "cache", validation=given)
    seen = "--test part.txt is a text that models are made with, trained or chosen on, or stands in one; what judges"
    for validation in (None, other):
        with pytest.raises(ValueError, match=seen):
            load_text(text, 300, there / "cache", validation, tests=read_tests([new, given]))
    with pytest.raises(ValueError, match=seen):  # of the text that models are chosen on
        train_and_held_out(read_documents(other), text, read_tests([given]))
    assert not (there / "cache").exists()
    train_and_held_out(read_documents(text), new, read_tests([other]))  # controls
    train_and_held_out(read_documents(other), None, read_tests([given]))


def bad_text(tmp_path, kind):
    path = tmp_path / {"unknown": "a.pdf", "gz": "a.gz", "spoiled": "a.gz", "xz": "a.xz"}.get(kind, "a.txt")
    content = {
        "empty": b"",
        "blank": b" \n\n ",
        "tiny": b"one line",
        "bytes": b"abc\xff\xfe",
        "unknown": b"x",
        "gz": gzip.compress(b"text" * 999)[:-20],
        "spoiled": gzip.compress(b"text" * 999)[:15] + b"\xff" * 30,
        "xz": lzma.compress(b"text" * 999)[:-20],
    }[kind]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    "kind, message",
    [
        ("empty", "no text found"),
        ("blank", "no text found"),
        ("tiny", "1 documents; at least 10"),
        ("bytes", "a.txt is not UTF-8 text: byte 3"),
        ("unknown", "a.pdf is not a text file known here"),
        ("gz", "a.gz is damaged"),
        ("xz", "a.xz is damaged"),
        ("spoiled", "a.gz is damaged"),
    ],
)
def test_unusable_text_is_named(tmp_path, kind, message):
    with pytest.raises(ValueError, match=message):
        load_text(str(bad_text(tmp_path, kind)), 300, tmp_path / "cache")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="--text .*absent: no such file"):
        load_text(str(tmp_path / "absent"), 300, tmp_path)
    with pytest.raises(ValueError, match="--images .*absent: no such file"):
        load_images(str(tmp_path / "absent"))
    (tmp_path / "a.txt").write_text("".join(STORY) * 9, encoding="utf-8")
    with pytest.raises(ValueError, match="vocab.json and merges.txt not found"):
        load_text(str(tmp_path / "a.txt"), 300, tmp_path / "cache", bpe=str(tmp_path))


def test_batches_depend_on_seed_and_step_alone():
    tokens = np.arange(1000, dtype=np.uint16)
    a, b = (batch_of(tokens, 3, 0, 4, 16) for _ in range(2))
    assert a.shape == (4, 17) and np.array_equal(a, b)
    assert (a[:, 1:] - a[:, :-1] == 1).all()  # windows are consecutive tokens
    assert not np.array_equal(a, batch_of(tokens, 4, 0, 4, 16)) and not np.array_equal(a, batch_of(tokens, 3, 1, 4, 16))


def test_too_little_held_out_text_is_named(folder, tmp_path):
    data = load_text(str(folder), 300, tmp_path)
    with pytest.raises(ValueError, match=r"held-out tokens are fewer than one window of 100000"):
        validate(torch.nn.Linear(1, 1), data, 100_000, 1, 10**6, "float32", "title")


def test_the_last_token_can_be_drawn():
    windows = [batch_of(np.arange(18, dtype=np.uint16), step, 0, 8, 16) for step in range(20)]
    assert {int(w.max()) for w in windows} == {17}


def test_the_digits_are_split_without_overlap():
    data = load_images(None)
    assert data.x_train.shape == (1437, 8, 8, 1) and data.x_test.shape == (360, 8, 8, 1) and data.n_classes == 10
    assert data.x_train.max() == data.pixel_range == 16
    assert np.bincount(data.y_test).min() > 20  # shuffled: every class is tested
    seen = {x.tobytes() for x in data.x_train}
    assert sum(x.tobytes() in seen for x in data.x_test) == 0


def arrays(**changes):
    rng = np.random.default_rng(0)
    made = {
        "x_train": rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8),
        "y_train": np.arange(20) % 4,
        "x_test": rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8),
        "y_test": np.arange(8) % 4,
    }
    return {k: v for k, v in (made | changes).items() if v is not None}


@pytest.mark.parametrize("depth", [(), (3,)])
def test_images_that_judge_are_not_those_that_were_learned(tmp_path, depth):
    x = np.random.default_rng(0).integers(0, 256, (20, 8, 8, *depth), dtype=np.uint8)
    test = x[[7, 3, 3]]
    new = test.copy()
    new[1, 0, 0] ^= 1
    for name, x_test in (("seen", test), ("new", new)):
        np.savez(tmp_path / f"{name}.npz", **arrays(x_train=x, x_test=x_test, y_test=np.arange(3)))
    assert len(load_images(str(tmp_path / "new.npz")).x_test) == 3  # control: one pixel of one image is another
    with pytest.raises(ValueError, match="--images .*seen.npz: every image of x_test stands in x_train; a model is judged by"):
        load_images(str(tmp_path / "seen.npz"))


def test_images_from_a_file(tmp_path):
    np.savez(tmp_path / "i.npz", **arrays())
    data = load_images(str(tmp_path / "i.npz"))
    assert data.n_classes == 4 and data.x_train.shape == (20, 8, 8, 3) and data.pixel_range == 255
    grey = arrays(x_train=arrays()["x_train"][..., 0], x_test=arrays()["x_test"][..., 0])
    np.savez(tmp_path / "g.npz", **grey)
    assert load_images(str(tmp_path / "g.npz")).x_train.shape == (20, 8, 8, 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(y_test=None), "y_test missing"),
        (dict(x_train=np.zeros((20, 8, 8, 3))), "x_train is float64"),
        (dict(x_train=np.zeros((20, 64), np.uint8)), "x_train is uint8"),
        (dict(y_train=np.zeros(20)), "y_train is float64"),
        (dict(y_train=np.zeros(19, int)), "not labelled square images"),
        (dict(x_test=np.zeros((8, 8, 6, 3), np.uint8)), "not labelled square images"),
        (dict(x_test=np.zeros((8, 6, 6, 3), np.uint8)), "images of different sizes"),
        (dict(y_test=np.arange(8) - 1), "y_test holds -1; classes count from 0"),
        (dict(x_test=np.zeros((0, 8, 8, 3), np.uint8), y_test=np.zeros(0, int)), "not labelled square images"),
    ],
)
def test_unusable_images_are_named(tmp_path, changes, message):
    np.savez(tmp_path / "i.npz", **arrays(**changes))
    with pytest.raises(ValueError, match=message):
        load_images(str(tmp_path / "i.npz"))


def test_a_file_of_another_kind_is_named(tmp_path):
    (tmp_path / "i.npz").write_bytes(b"not an archive")
    with pytest.raises(ValueError, match="not a readable .npz file"):
        load_images(str(tmp_path / "i.npz"))


def test_without_a_path_the_text_is_the_standard_library():
    name, documents = read_documents(None)
    assert name == "Python standard library source" and len(documents) > 300
    assert any("Support for regular expressions" in document for document in documents)


def test_given_byte_pairs_are_used(tmp_path):
    """A folder with tables in GPT-2's form: the text comes back, and no other byte pairs are learned."""
    (tmp_path / "a.txt").write_text("".join(STORY) * 9, encoding="utf-8")
    learned = load_text(str(tmp_path / "a.txt"), 300, tmp_path / "cache")
    Tokenizer.from_str(learned.tokenizer).model.save(str(tmp_path))
    given = load_text(str(tmp_path / "a.txt"), 999, tmp_path / "cache", bpe=str(tmp_path))
    assert given.vocab_size == 300 and np.array_equal(given.train, learned.train)
    assert np.array_equal(given.token_bytes, learned.token_bytes)


def test_as_many_learned_byte_pairs_as_gpt2_has_are_not_taken_for_them(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("".join(STORY) * 9, encoding="utf-8")
    learned = load_text(str(tmp_path / "a.txt"), 300, tmp_path / "cache")
    assert "byte_pairs" not in learned.describe()  # nothing could be mistaken
    monkeypatch.setattr(text, "GPT2_VOCABULARY", 300)
    Tokenizer.from_str(learned.tokenizer).model.save(str(tmp_path))
    given = load_text(str(tmp_path / "a.txt"), 300, tmp_path / "cache", bpe=str(tmp_path))
    assert learned.describe() == given.describe() | {"byte_pairs": "learned"}
    ids = {run_id("table2", "gpu", "MHA", {}, 0, data.describe()) for data in (learned, given)}
    assert len(ids) == 2


def test_tokens_of_other_tables_are_not_taken_from_the_cache(tmp_path):
    (tmp_path / "a.txt").write_text("".join(STORY) * 9, encoding="utf-8")
    seen = set()
    for size in (300, 280):
        tables = tmp_path / str(size)
        tables.mkdir()
        Tokenizer.from_str(load_text(str(tmp_path / "a.txt"), size, tmp_path / "cache").tokenizer).model.save(str(tables))
        seen.add(load_text(str(tmp_path / "a.txt"), 999, tmp_path / "cache", bpe=str(tables)).vocab_size)
    assert seen == {300, 280}
    with pytest.raises(ValueError, match="--bpe nowhere: vocab.json and merges.txt not found there"):
        load_text(str(tmp_path / "a.txt"), 999, tmp_path / "cache", bpe="nowhere")
