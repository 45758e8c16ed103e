"""Text too large for memory: tokenised once into two files on disk, which training then maps.

`python -m reproduce prepare openwebtext --out FOLDER` reads the documents through `datasets`, encodes them with GPT-2's byte pairs and
appends them to `train.bin` or `validation.bin`, plain uint16 with an end-of-text token after each document. `tokens.json` says how far
the files are whole, so the same command goes on after a crash, and the result does not depend on where it crashed.

With a held-out text of its own (--validation) it is a text that fits into memory, as `load_text` has it: runs on the folder are known
by the same content as runs on the text, and nothing is tokenised again on the next machine.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from ..store.checked import Count, Line, Part, check, read_json
from ..store.faults import as_one_line, first_line
from ..store.files import extend, write_atomically
from ..store.locks import locked
from .text import GPT2_VOCABULARY, TextData, bytes_per_token, check_places, check_tokenizer, encode, load_text, read_gpt2_tables

SOURCES = {"openwebtext": "Skylion007/openwebtext", "openwebtext2": "Geralt-Targaryen/openwebtext2"}  # on the Hugging Face hub
BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
HELD_OUT = 2000  # of so many documents the last is held out: our choice
AT_ONCE = 1000  # documents between two notes of progress
AT_A_TIME = 2**26  # tokens that are looked at together
SPLITS = ("train", "validation")
STATE = "tokens.json"


class Counts(Part):
    """Tokens in the two files."""

    train: Count
    validation: Count


class State(Part):
    """What `tokens.json` says: which text it is, and how far its files are whole."""

    name: Line
    files: str | None
    held_out: int | str
    documents: Count
    tokens: Counts
    sha256: str
    finished: bool


def is_prepared(path: str | None) -> bool:
    """Whether `prepare` wrote this folder, or began to."""
    return path is not None and (Path(path) / STATE).is_file()


def open_prepared(path: str) -> TextData:
    """The tokens of a prepared folder, on disk until they are read.

    Args:
        path: the folder that `prepare` wrote.

    Raises:
        ValueError: if they are not all there.
    """
    folder = Path(path)
    state = _read_state(folder)
    if not state["finished"]:
        raise ValueError(f"--text {path} is prepared up to document {state['documents']:,}; repeat `prepare` to finish it")
    splits = []
    for split in SPLITS:
        file, count = folder / f"{split}.bin", state["tokens"][split]
        if not file.is_file() or file.stat().st_size != 2 * count or not count:
            raise ValueError(
                f"--text {path}: {file.name} should hold {count:,} tokens, more than none; delete {path} and prepare it"
            )
        splits.append(np.memmap(file, dtype=np.uint16, mode="r"))
    tokenizer = _read_tokenizer(folder / "tokenizer.json")
    token_bytes = bytes_per_token(tokenizer)
    for split, tokens in zip(SPLITS, splits):
        if (largest := _largest(tokens)) >= len(token_bytes):
            raise ValueError(
                f"{folder / split}.bin holds token {largest:,}; its tokenizer.json makes {len(token_bytes):,}, from 0"
            )
    return TextData(state["name"], state["sha256"], *splits, token_bytes, tokenizer.to_str())


def _read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a prepared folder.  Raises ValueError, naming the file, if it is none that `prepare` wrote."""
    text = path.read_bytes()
    with as_one_line(lambda error: f"{path} is no tokenizer: {error}"):
        tokenizer = Tokenizer.from_str(text.decode())
    check_tokenizer(tokenizer, str(path))
    return tokenizer


def _largest(tokens: np.ndarray) -> int:
    """The largest token, read piece by piece from the disk."""
    return max(int(tokens[start : start + AT_A_TIME].max()) for start in range(0, len(tokens), AT_A_TIME))


def prepare(
    name: str,
    out: Path,
    files: str | None = None,
    bpe: str | None = None,
    validation: str | None = None,
    held_out: int = HELD_OUT,
) -> None:
    """Tokenise a text, or go on where an earlier call stopped.

    Args:
        name: of the text, one of SOURCES unless `files` is given.
        out: the folder for the tokens.
        files: a .txt, .jsonl or .parquet file or a pattern of them, with a column "text"; a .txt file is one document.
        bpe: as in `load_text`; None takes GPT-2's from the hub.
        validation: a held-out text of its own, which with `files` and `bpe` is read as `load_text` reads them: runs on the folder
            are then those on the text, and what fits into memory is tokenised once.
        held_out: otherwise of so many documents the last is held out.

    Raises:
        ValueError: if there is nothing to read, `out` holds another text, `validation` lacks `files` or `bpe`, or is a part of `files`.
    """
    if files is None and name not in SOURCES:
        raise ValueError(f"prepare {name}: known are {', '.join(SOURCES)}; any other text needs --files")
    if validation and not (files and bpe):
        raise ValueError(f"prepare {name}: --validation goes with --bpe, and with --files that name one file or folder")
    if validation and not Path(files).exists():
        raise ValueError(f"prepare {name}: --files {files} is no file or folder; beside --validation it names one")
    check_places([("--files", files), ("--validation", validation)])
    own = validation and str(Path(validation).absolute())
    source = {"name": name, "files": files and str(Path(files).absolute()), "held_out": own or held_out}
    tokenizer = read_gpt2_tables(Path(bpe)) if bpe else Tokenizer.from_pretrained("openai-community/gpt2")
    with locked(out):  # whoever comes second waits, and finds it finished
        _prepare(source, out, tokenizer, bpe, validation)


def _prepare(source: dict, out: Path, tokenizer: Tokenizer, bpe: str | None, validation: str | None) -> None:
    """`prepare` where nobody else writes; `source` is what the state says of where the text comes from."""
    name, files, held_out = source.values()
    if (out / STATE).exists():
        state = _read_state(out)
        if {key: state[key] for key in source} != source or (out / "tokenizer.json").read_text(
            encoding="utf-8"
        ) != tokenizer.to_str():
            raise ValueError(f"{out} holds {state['name']}, or the same cut otherwise; choose another folder for {name}")
    else:
        state = source | {"documents": 0, "tokens": dict.fromkeys(SPLITS, 0), "sha256": "", "finished": False}
        write_atomically(out / "tokenizer.json", lambda file: file.write(tokenizer.to_str().encode()))
        _write_state(out, state)
    if state["finished"]:
        print(f"{out} is finished: {state['tokens']['train']:,} tokens to train on")
        return
    if files and bpe and validation:
        cache = out / "cache"  # of a fixed name: what a kill leaves is used by the next call, or goes with it
        data = load_text(files, GPT2_VOCABULARY, cache, validation, bpe)
        shutil.rmtree(cache)
        return _prepare_whole(data, out, state)
    documents = _documents(name, files, skip=state["documents"])
    for split in SPLITS:
        extend(out / f"{split}.bin", 2 * state["tokens"][split], b"")  # without what came after the last note
    with tqdm(desc=f"tokenising {name}", unit=" documents", initial=state["documents"]) as progress:
        while chunk := list(itertools.islice(documents, AT_ONCE)):
            _append(chunk, state, tokenizer, out)
            _write_state(out, state)
            progress.update(len(chunk))
    if not all(state["tokens"].values()):
        raise ValueError(f"prepare {name}: {state['documents']} documents are too few; one in {held_out} is held out")
    _write_state(out, state | {"finished": True})
    print(f"{out} holds {state['tokens']['train']:,} tokens to train on and {state['tokens']['validation']:,} held out")


def _prepare_whole(data: TextData, out: Path, state: dict) -> None:
    """Write a text that is in memory; nothing is counted before all is on disk."""
    for split in SPLITS:
        tokens = getattr(data, split)
        write_atomically(out / f"{split}.bin", lambda file, tokens=tokens: file.write(tokens.tobytes()))
        state["tokens"][split] = len(tokens)
    _write_state(out, state | {"sha256": data.sha256, "finished": True})
    print(f"{out} holds {len(data.train):,} tokens to train on and {len(data.validation):,} held out")


def _append(chunk: list[str], state: dict, tokenizer: Tokenizer, out: Path) -> None:
    """Write these documents and count them in `state`; they are on disk before they are counted."""
    held_out = [document for i, document in enumerate(chunk, state["documents"] + 1) if i % state["held_out"] == 0]
    train = [document for i, document in enumerate(chunk, state["documents"] + 1) if i % state["held_out"]]
    for split, documents in zip(SPLITS, (train, held_out)):
        if documents:
            content = encode(tokenizer, documents, split).tobytes()
            extend(out / f"{split}.bin", 2 * state["tokens"][split], content)
            state["tokens"][split] += len(content) // 2
            state["sha256"] = hashlib.sha256(state["sha256"].encode() + split.encode() + content).hexdigest()
    state["documents"] += len(chunk)


def _documents(name: str, files: str | None, skip: int) -> Iterator[str]:
    """The texts of all rows but the first so many.  Raises ValueError, naming what is read, for a row without one."""
    where = f"--files {files}" if files else f"prepare {name}"
    for number, row in enumerate(_rows(name, files, skip, where), skip + 1):
        if "text" not in row:
            raise ValueError(f'{where}: its columns are {", ".join(row)}; one of them must be "text"')
        if not isinstance(text := row["text"], str):
            raise ValueError(f"{where}: the text of document {number:,} is a {type(text).__name__}; it must be a string")
        yield text


def _rows(name: str, files: str | None, skip: int, where: str) -> Iterator[dict]:
    """All rows but the first so many.  Raises ValueError where `datasets` cannot read them; it raises what it likes."""
    datasets = import_datasets()
    builder = BUILDERS.get(Path(files).suffix) if files else SOURCES[name]
    if builder is None:
        raise ValueError(f"{where}: the name must end in {', '.join(BUILDERS)}")
    options = {"data_files": files} if files else {}
    if builder == "text":
        options["sample_by"] = "document"
    with as_one_line(lambda error: f"{where} cannot be read: {first_line(error) or 'nothing is in it'}"):
        yield from datasets.load_dataset(builder, **options, split="train", streaming=True).skip(skip)


def import_datasets():
    """The package `datasets`.  Raises ValueError if it is not installed."""
    try:
        import datasets
    except ImportError:
        raise ValueError("the paper's data needs the package datasets: pip install 'tucker-ref[paper]'") from None
    return datasets


def _read_state(folder: Path) -> dict:
    """What `tokens.json` says, checked.  Raises ValueError, naming the file, if it is damaged."""
    path = folder / STATE
    try:
        state = read_json(path.read_text(encoding="utf-8"), f"{path} is damaged")
        check(State, state, f"{path} is damaged: it")
    except ValueError as error:
        raise ValueError(f"{error}; delete {folder} and prepare it again") from None
    return state


def _write_state(folder: Path, state: dict) -> None:
    write_atomically(folder / STATE, lambda file: file.write(json.dumps(state, indent=1).encode()))
