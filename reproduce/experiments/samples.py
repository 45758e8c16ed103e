"""Windows and sentences of a text for a model that was opened, spread evenly over it, in the model's own tokens."""

import functools
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from ..data.text import Text, sha256_of_both, train_and_held_out
from ..models.public.inputs import surrounding, whole
from ..models.public.opened import OpenModel

LONGEST = 4_000_000  # characters: of a longer text the rest is left
SENTENCE = re.compile(r"(?<=[a-z0-9)][.!?]) +(?=[A-Z])")
WORDS = (6, 40)  # of a sentence
BATCH = 64  # documents that are tokenised together


@dataclass(frozen=True)
class Windows:
    """Tokens of a text, as the model was trained to see them.

    Attributes:
        name: of the text.
        sha256: of what the windows were taken from.
        tokens: (windows, tokens), the special ones before and after each included.
        n_bytes: of the text in all windows together that a model of the next token predicts.
    """

    name: str
    sha256: str
    tokens: torch.Tensor
    n_bytes: int

    def describe(self) -> dict:
        """What a record says of them."""
        return {
            "name": self.name,
            "sha256": self.sha256,
            "unit": "tokens",
            "tokens": self.tokens.numel(),
            "window": self.tokens.shape[1],
        }


def spread(opened: OpenModel, text: Text, windows: int, length: int, option: str = "--text") -> Windows:
    """So many windows of a text, as far from one another as it allows; fewer where it is short.

    Args:
        opened: whose tokenizer and context count.
        text: as `read_documents` gives it.
        option: what named it, for error messages.
        windows: how many.
        length: tokens of each, special ones included; at most the model's context.

    Raises:
        ValueError: for a model without a tokenizer, a text shorter than one window, or tokens that the model does not have.
    """
    name, content = _joined(opened, text)
    tokenizer = whole(opened.tokenizer or "")
    before, after = surrounding(tokenizer)
    stretch = min(length, opened.context or length) - len(before) - len(after)
    ids = _ids(opened.tokenizer or "", content)
    there = len(ids) // stretch
    if there == 0:
        raise ValueError(f"{option} {name} holds fewer than one window of {stretch} tokens")
    _check_vocabulary(opened, ids)
    chosen = np.linspace(0, there - 1, min(windows, there)).round().astype(int)
    rows = ids[: there * stretch].reshape(there, stretch)[chosen]  # (windows, stretch)
    scored = rows if before else rows[:, 1:]  # a first token with nothing before it is not predicted
    n_bytes = sum(len(tokenizer.decode(row.tolist()).encode()) for row in scored)
    return Windows(name, hashlib.sha256(content.encode()).hexdigest(), _within(rows, before, after), n_bytes)


@functools.lru_cache(maxsize=1)  # of many models with one tokenizer, which read one text
def _ids(tokenizer: str, text: str) -> np.ndarray:
    """(tokens,), not to be changed.  tokenizer: its JSON."""
    return np.array(whole(tokenizer).encode(text, add_special_tokens=False).ids)


def _within(rows: np.ndarray, before: list[int], after: list[int]) -> torch.Tensor:
    """Rows of tokens, (rows, n), with the special ones before and after each."""
    ends = [np.tile(special, (len(rows), 1)).astype(rows.dtype) for special in (before, after)]
    return torch.from_numpy(np.concatenate([ends[0], rows, ends[1]], axis=1))


def _check_vocabulary(opened: OpenModel, ids: np.ndarray) -> None:
    if opened.vocabulary is not None and ids.max() >= opened.vocabulary:
        raise ValueError(
            f"{opened.name}: its tokenizer makes token {ids.max()}, beyond the {opened.vocabulary} of its embedding"
        )


@dataclass(frozen=True)
class Corpus:
    """A text to train on, and a part of it, or another one, to choose by.

    Attributes:
        name: of the text.
        sha256: of all documents, those that are held out too.
        tokens: (windows, tokens) to train on, as in `Windows`.
        held_out: to choose by.
    """

    name: str
    sha256: str
    tokens: torch.Tensor
    held_out: Windows


def corpus(
    opened: OpenModel,
    text: Text,
    validation: str | None,
    windows: int,
    length: int,
    held_out: int,
    tests: Iterable[Text] = (),
) -> Corpus:
    """The first windows of a text, one after the other, and windows of a held-out text.

    Args:
        opened, text: as in `spread`.
        validation, tests: as in `train_and_held_out`.
        windows: how many to train on.
        length: tokens of each, special ones included.
        held_out: how many windows to choose by, spread evenly.

    Raises:
        ValueError: for a text that is too short, and as `train_and_held_out` and `spread` do.
    """
    check_reads_text(opened)
    (name, train), chooses = train_and_held_out(text, validation, tests)
    tokenizer = whole(opened.tokenizer or "")
    before, after = surrounding(tokenizer)
    stretch = min(length, opened.context or length) - len(before) - len(after)
    ids = _first_tokens(tokenizer, train, windows * stretch)
    if len(ids) < windows * stretch:
        raise ValueError(
            f"--text {name} holds {len(ids):,} tokens to train on; {windows:,} windows of {stretch} need {windows * stretch:,}: "
            "name a longer text, or fewer --steps"
        )
    _check_vocabulary(opened, ids)
    return Corpus(
        name,
        sha256_of_both(train, chooses[1]),
        _within(ids.reshape(windows, stretch), before, after),
        spread(opened, chooses, held_out, length, "--validation"),
    )


def _first_tokens(tokenizer: Tokenizer, documents: list[str], count: int) -> np.ndarray:
    """So many tokens of documents one after the other, or all there are; int32."""
    pieces, there = [np.zeros(0, np.int32)], 0
    with tqdm(total=count, desc="tokenising", unit=" tokens", leave=False) as progress:
        for start in range(0, len(documents), BATCH):
            if there >= count:
                break
            batch = [f"{document}\n\n" for document in documents[start : start + BATCH]]
            for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
                pieces.append(np.array(encoding.ids, dtype=np.int32))
                there += len(encoding.ids)
            progress.update(min(there, count) - progress.n)
    return np.concatenate(pieces)[:count]


def sentence_pairs(opened: OpenModel, text: Text, pairs: int) -> tuple[str, str, list[str]]:
    """Pairs of sentences that follow each other, spread evenly over a text of --test.

    Args:
        opened, text: as in `spread`.
        pairs: how many.

    Returns:
        The text's name, the hash of what they were taken from, and the sentences, two of each pair side by side.

    Raises:
        ValueError: for a text without one pair.
    """
    name, content = _joined(opened, text)
    lines = [SENTENCE.split(line) for line in content.splitlines()]
    found = [
        pair
        for sentences in lines
        for pair in zip(sentences, sentences[1:])
        if all(WORDS[0] <= len(sentence.split()) <= WORDS[1] for sentence in pair)
    ]
    if not found:
        raise ValueError(f"--test {name} holds no two sentences of {WORDS[0]} to {WORDS[1]} words that follow each other")
    chosen = np.linspace(0, len(found) - 1, min(pairs, len(found))).round().astype(int)
    return name, hashlib.sha256(content.encode()).hexdigest(), [sentence for n in chosen for sentence in found[n]]


def _joined(opened: OpenModel, text: Text) -> tuple[str, str]:
    """A text's name, and its documents one after the other."""
    check_reads_text(opened)
    name, documents = text
    return name, "\n\n".join(documents)[:LONGEST]


def check_reads_text(opened: OpenModel) -> None:
    """Raise ValueError for a model of images, or one whose tokenizer cannot be read."""
    if not opened.takes_text:
        raise ValueError(f"--text: {opened.name} takes images, not text")
    if opened.tokenizer is None:
        raise ValueError(f"{opened.name}: text needs its tokenizer, and none can be read beside it: {opened.no_tokenizer}")
