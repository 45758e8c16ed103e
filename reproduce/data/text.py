"""Text for the language models: read it, split it, learn a byte-pair vocabulary, keep the tokens.

Without a path the text is the Python standard library's own source: real, on every machine that can run this, no download.
"""

import functools
import gzip
import hashlib
import itertools
import lzma
import os
import re
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from ..store.faults import as_one_line
from ..store.files import called, write_atomically

END_OF_TEXT = "<|endoftext|>"
MOST_CHARACTERS = 2**30  # of one file: a small packed one can hold any number of them
PREPARED = "`prepare` takes texts of any size, as .jsonl or .parquet"
GPT2_VOCABULARY = 50_257
ALLOWED = "what judges a model is text that it did not learn from: name another"
VALIDATION_SHARE = 10  # every tenth document is held out
OPENERS = {".txt": open, ".py": open, ".gz": gzip.open, ".xz": lzma.open}
# Not library code but its tests, demos, tables and whatever else was installed beside it.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "turtledemo", "encodings", "pydoc_data"}
Text = tuple[str, list[str]]  # that was read: its name and its documents


@dataclass(frozen=True)
class TextData:
    """Tokenised text.

    Args:
        name, sha256: what a record says of it; the hash is of the text, or of the tokens where they were prepared.
        train, validation: (tokens,) uint16.
        token_bytes: (vocab_size,), bytes that each token stands for.
        tokenizer: its JSON, for `tokenizers`.
        learned: whether its byte pairs come from this text.
    """

    name: str
    sha256: str
    train: np.ndarray
    validation: np.ndarray
    token_bytes: np.ndarray
    tokenizer: str
    learned: bool = False

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer."""
        return len(self.token_bytes)

    def describe(self) -> dict:
        """What a record says of the data; of byte pairs that could be taken for GPT-2's by their number, that they are not."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "vocab_size": self.vocab_size,
            "train_tokens": len(self.train),
            "validation_tokens": len(self.validation),
            **({"byte_pairs": "learned"} if self.learned and self.vocab_size == GPT2_VOCABULARY else {}),
        }


def load_text(
    path: str | None,
    vocab_size: int,
    cache: Path,
    validation: str | None = None,
    bpe: str | None = None,
    tests: Iterable[Text] = (),
) -> TextData:
    """Read, split and tokenise text; the tokens are kept and found again by content hash.

    Args:
        path: a .txt, .gz or .xz file or a folder of such files; None for the standard library's source.
        vocab_size: entries of the tokenizer, where it is learned.
        cache: the folder where tokens are kept.
        validation: the held-out text, likewise; None to hold out every tenth document of `path`.
        bpe: a folder with GPT-2's own tables (vocab.json and merges.txt); None to learn byte pairs from the text.
        tests: as in `train_and_held_out`.

    Raises:
        ValueError: for a path that holds no text, too few documents to hold one out, tables that do not fit, or damaged tokens, and
            as `train_and_held_out` does.
    """
    (name, train), (_, held_out) = train_and_held_out(read_documents(path), validation, tests)
    if not train or not held_out:
        raise ValueError(f"{name} holds {len(train)} documents; at least {VALIDATION_SHARE} are needed to hold one out")
    sha256 = sha256_of_both(train, held_out)
    tables = read_gpt2_tables(Path(bpe)) if bpe else None
    kind = f"gpt2-{hashlib.sha256(tables.to_str().encode()).hexdigest()[:8]}" if tables else vocab_size
    kept = cache / f"tokens-{sha256[:16]}-{kind}.npz"
    if not kept.exists():
        tokenizer = tables or _learn_byte_pairs(train, vocab_size)
        arrays = {
            "train": encode(tokenizer, train, "tokenising"),
            "validation": encode(tokenizer, held_out, "tokenising held-out text"),
            "token_bytes": bytes_per_token(tokenizer),
            "tokenizer": np.frombuffer(tokenizer.to_str().encode(), dtype=np.uint8),
        }
        write_atomically(kept, lambda file: np.savez(file, **arrays))
    try:
        with open(kept, "rb") as file, np.load(file) as arrays:
            tokenizer = arrays["tokenizer"].tobytes().decode()
            data = TextData(name, sha256, arrays["train"], arrays["validation"], arrays["token_bytes"], tokenizer, not bpe)
        for tokens in (data.train, data.validation):
            if tokens.dtype != np.uint16 or tokens.ndim != 1 or tokens.max() >= data.vocab_size:
                raise ValueError
        return data
    except (EOFError, KeyError, ValueError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{kept} is damaged ({type(error).__name__}); delete it and the text is tokenised again") from None


def train_and_held_out(text: Text, validation: str | None, tests: Iterable[Text] = ()) -> tuple[Text, Text]:
    """A text to train on and what is held out to judge by.

    Args:
        text: all of the first.
        validation: the path of the second; None for every tenth document of the first.
        tests: texts for finished models.

    Raises:
        ValueError: as `read_documents` does, for a held-out text of which nothing is new, and as `check_unread` does.
    """
    name, documents = text
    in_text = standing_in(documents)
    if validation is None:
        check_unread(tests, in_text)
        train, held_out = split(documents)
        return (name, train), (name, held_out)
    other, held_out = read_documents(validation, "--validation")
    if in_text(held_out):
        raise ValueError(f"--validation {validation}: all of it stands in the text to train on, {name}; {ALLOWED}")
    check_unread(tests, in_text, standing_in(held_out))
    return (name, documents), (other, held_out)


def standing_in(others: list[str]) -> Callable[[list[str]], bool]:
    """Documents -> whether all of them stand in these, however both are cut: a part that was copied out.  others: of a whole text."""
    known, whole = set(others), functools.cache(lambda: "".join(others))  # made once, and only for a text that is new

    def stands(documents: list[str]) -> bool:
        return all(document.strip() in whole() for document in documents if document not in known)

    return stands


def check_places(texts: Iterable[tuple[str, str | None]]) -> None:
    """Refuse texts of which one lies within another, whatever links and other ways lead there.

    Args:
        texts: the option that names each, and its path; None for none.

    Raises:
        ValueError: naming both.
    """
    given = [(option, path, Path(os.path.realpath(path))) for option, path in texts if path]
    for (option, path, place), (other, around, folder) in itertools.permutations(given, 2):
        if place.is_relative_to(folder):
            raise ValueError(f"{option} {path} is a part of {other} {around}, or the same; {ALLOWED}")


def check_apart(tests: Iterable[tuple[str, bool]]) -> None:
    """Refuse test texts of which a record would keep one alone, and those that say nothing since they were read before.

    Args:
        tests: the name of each, and whether models are made with it, trained or chosen on it.

    Raises:
        ValueError: naming the text.
    """
    names: set[str] = set()
    for name, seen in tests:
        if name in names:
            raise ValueError(f"--test: two test texts are called {name}")
        if seen:
            raise ValueError(
                f"--test {name} is a text that models are made with, trained or chosen on, or stands in one; {ALLOWED}"
            )
        names.add(name)


def check_unread(tests: Iterable[Text], *read: Callable[[list[str]], bool]) -> None:
    """`check_apart` of test texts.

    Args:
        tests: the texts.
        read: `standing_in` of each text that models are made with, trained or chosen on.

    Raises:
        ValueError: as `check_apart` does.
    """
    check_apart((name, any(stands(documents) for stands in read)) for name, documents in tests)


def read_tests(paths: Iterable[str]) -> list[Text]:
    """The texts of --test.  Raises ValueError as `read_documents` does."""
    return [read_documents(path, "--test") for path in paths]


def read_documents(path: str | None, option: str = "--text") -> Text:
    """The name of a text and its documents in a fixed order: one per file, and within a file one per end-of-text mark.

    Fewer than ten documents are cut at line ends, or else between words, into twenty or more stretches of at most 64 KiB, so
    that some can be held out.

    Args:
        path: as in `load_text`.
        option: what named the path, for error messages.

    Raises:
        ValueError: if there is no text, or a file that is damaged or not UTF-8.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        # _sysconfigdata differs from machine to machine.
        files = [p for p in sorted(_sources(root)) if not p.name.startswith("_sysconfigdata")]
        return "Python standard library source", [_read(p) for p in tqdm(files, "reading source", leave=False)]
    source = Path(path)
    if not path or not source.exists():
        raise ValueError(f"{option} {path}: no such file or folder")
    files = [source] if source.is_file() else [p for p in sorted(source.rglob("*")) if p.suffix in OPENERS and p.is_file()]
    documents = [d for p in tqdm(files, "reading text", leave=False) for d in _read(p).split(END_OF_TEXT) if d.strip()]
    if not documents:
        raise ValueError(f"{option} {path}: no text found; a file or folder of {', '.join(OPENERS)} is needed")
    if len(documents) < VALIDATION_SHARE:
        whole = "".join(documents)
        documents = _stretches(whole, size=min(65536, len(whole) // (2 * VALIDATION_SHARE) + 1))
    return called(source), documents


def _sources(root: Path) -> Iterator[Path]:
    """All .py files below a folder, but for those in SKIPPED_FOLDERS, which may hold ten thousands and are not walked through."""
    for place, folders, names in os.walk(root):
        folders[:] = set(folders) - SKIPPED_FOLDERS
        yield from (Path(place, name) for name in names if name.endswith(".py"))


def _read(path: Path) -> str:
    opener = OPENERS.get(path.suffix)
    if opener is None:
        raise ValueError(f"{path} is not a text file known here; it must end in {', '.join(OPENERS)}")
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            text = file.read(MOST_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from None
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    except MemoryError:
        raise ValueError(f"{path} holds more text than there is memory for; {PREPARED}") from None
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"{path} holds more than {MOST_CHARACTERS:,} characters, the most that are read at once; {PREPARED}")
    return text


def _stretches(text: str, size: int) -> list[str]:
    """Cut at line ends; where lines are too long for that, between words."""
    lines, words = (_gathered(pieces, size) for pieces in (text.splitlines(keepends=True), re.findall(r"\s*\S+\s*", text)))
    return words if len(lines) < VALIDATION_SHARE <= len(words) else lines


def _gathered(pieces: list[str], size: int) -> list[str]:
    """Pieces together until they are `size` characters."""
    gathered, stretches, length = [], [], 0
    for piece in pieces:
        gathered.append(piece)
        length += len(piece)
        if length >= size:
            stretches.append("".join(gathered))
            gathered, length = [], 0
    return stretches + ["".join(gathered)] if gathered else stretches


def sha256_of(documents: list[str]) -> str:
    """What tells these documents, in this order, from any others: 64 hex digits."""
    digest = hashlib.sha256()
    for document in documents:
        digest.update(document.encode() + b"\0")
    return digest.hexdigest()


def split(documents: list[str]) -> tuple[list[str], list[str]]:
    """Documents to train on, and every tenth, which is held out."""
    return [d for n, d in enumerate(documents, 1) if n % VALIDATION_SHARE], documents[VALIDATION_SHARE - 1 :: VALIDATION_SHARE]


def sha256_of_both(train: list[str], held_out: list[str]) -> str:
    """`sha256_of` documents to train on and those held out."""
    return sha256_of([*train, "\0held out\0", *held_out])


def _learn_byte_pairs(documents: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level byte-pair encoding, learned from at most 4 MB spread evenly over the documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    share = min(1.0, 4e6 / sum(map(len, documents)))
    sample = [d[: int(len(d) * share) + 1] for d in documents]
    with tqdm(sample, "learning byte pairs", leave=False) as progress:  # dropped within the trainer, it would swallow a Ctrl-C
        tokenizer.train_from_iterator(progress, trainer)
    return tokenizer


def read_gpt2_tables(folder: Path) -> Tokenizer:
    """GPT-2's tokenizer from its own two files.

    Args:
        folder: with vocab.json and merges.txt.

    Raises:
        ValueError: if one is missing or damaged, or holds more tokens than uint16 can count.
    """
    missing = [name for name in ("vocab.json", "merges.txt") if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"--bpe {folder}: {' and '.join(missing)} not found there")
    with as_one_line(lambda error: f"--bpe {folder}: {error}"):
        tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    check_tokenizer(tokenizer, f"--bpe {folder}: vocab.json")
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, where: str) -> None:
    """Refuse tokens that are not numbered from 0 without a gap, that uint16 cannot count, or that lack the end of a text.

    Args:
        tokenizer: as it was read.
        where: what the message begins with.

    Raises:
        ValueError: for what does not fit.
    """
    vocabulary = tokenizer.get_vocab()
    if END_OF_TEXT not in vocabulary or len(vocabulary) > 2**16:
        raise ValueError(f"{where} must hold {END_OF_TEXT} and at most {2**16:,} tokens")
    if sorted(vocabulary.values()) != list(range(len(vocabulary))):
        raise ValueError(f"{where} must number its {len(vocabulary):,} tokens from 0 to {len(vocabulary) - 1:,}, each once")


def encode(tokenizer: Tokenizer, documents: list[str], title: str) -> np.ndarray:
    """All documents as one stream, an end-of-text token after each.

    Args:
        tokenizer: knows END_OF_TEXT.
        documents: at least one.
        title: of the progress bar.

    Returns:
        (tokens,) uint16.
    """
    end, pieces = tokenizer.token_to_id(END_OF_TEXT), []
    for start in tqdm(range(0, len(documents), 32), title, leave=False):
        for encoding in tokenizer.encode_batch(documents[start : start + 32], add_special_tokens=False):
            pieces.append(np.array([*encoding.ids, end], dtype=np.uint16))
    return np.concatenate(pieces)


def bytes_per_token(tokenizer: Tokenizer) -> np.ndarray:
    """How many bytes of text each token stands for.

    In a byte-level vocabulary each character of a token's name stands for one byte; the end-of-text mark for none.

    Args:
        tokenizer: of byte-level byte pairs.

    Returns:
        (vocab_size,) int64.
    """
    vocabulary = tokenizer.get_vocab()
    lengths = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in vocabulary.items():
        lengths[index] = 0 if token == END_OF_TEXT else len(token)
    return lengths
