"""Windows and sentences of a text for a model that was opened, spread evenly over it, in the model's own tokens."""

import hashlib
import re
from dataclasses import dataclass

import numpy as np
import torch

from ..data.text import read_documents
from ..models.public.inputs import surrounding, whole
from ..models.public.opened import OpenModel

LONGEST = 4_000_000  # characters: of a longer text the rest is left
SENTENCE = re.compile(r"(?<=[a-z0-9)][.!?]) +(?=[A-Z])")
WORDS = (6, 40)  # of a sentence


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


def spread(opened: OpenModel, path: str | None, windows: int, length: int, option: str = "--text") -> Windows:
    """So many windows of a text, as far from one another as it allows; fewer where it is short.

    Args:
        opened: whose tokenizer and context count.
        path, option: as in `read_documents`.
        windows: how many.
        length: tokens of each, special ones included; at most the model's context.

    Raises:
        ValueError: for a model without a tokenizer, a text shorter than one window, or tokens that the model does not have.
    """
    name, text = _read(opened, path, option)
    tokenizer = whole(opened.tokenizer or "")
    before, after = surrounding(tokenizer)
    stretch = min(length, opened.context or length) - len(before) - len(after)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids)
    there = len(ids) // stretch
    if there == 0:
        raise ValueError(f"{option} {name} holds fewer than one window of {stretch} tokens")
    if ids.max() >= opened.vocabulary:
        raise ValueError(
            f"{opened.name}: its tokenizer makes token {ids.max()}, beyond the {opened.vocabulary} of its embedding"
        )
    chosen = np.linspace(0, there - 1, min(windows, there)).round().astype(int)
    rows = ids[: there * stretch].reshape(there, stretch)[chosen]  # (windows, stretch)
    scored = rows if before else rows[:, 1:]  # a first token with nothing before it is not predicted
    n_bytes = sum(len(tokenizer.decode(row.tolist()).encode()) for row in scored)
    ends = [np.tile(special, (len(rows), 1)).astype(rows.dtype) for special in (before, after)]
    tokens = torch.from_numpy(np.concatenate([ends[0], rows, ends[1]], axis=1))
    return Windows(name, hashlib.sha256(text.encode()).hexdigest(), tokens, n_bytes)


def sentence_pairs(opened: OpenModel, path: str | None, pairs: int, option: str = "--test") -> tuple[str, str, list[str]]:
    """Pairs of sentences that follow each other, spread evenly over a text.

    Args:
        opened, path, option: as in `spread`.
        pairs: how many.

    Returns:
        The text's name, the hash of what they were taken from, and the sentences, two of each pair side by side.

    Raises:
        ValueError: for a text without one pair.
    """
    name, text = _read(opened, path, option)
    lines = [SENTENCE.split(line) for line in text.splitlines()]
    found = [
        pair
        for sentences in lines
        for pair in zip(sentences, sentences[1:])
        if all(WORDS[0] <= len(sentence.split()) <= WORDS[1] for sentence in pair)
    ]
    if not found:
        raise ValueError(f"{option} {name} holds no two sentences of {WORDS[0]} to {WORDS[1]} words that follow each other")
    chosen = np.linspace(0, len(found) - 1, min(pairs, len(found))).round().astype(int)
    return name, hashlib.sha256(text.encode()).hexdigest(), [sentence for n in chosen for sentence in found[n]]


def _read(opened: OpenModel, path: str | None, option: str) -> tuple[str, str]:
    """A text's name, and its documents one after the other."""
    if opened.tokenizer is None:
        raise ValueError(f"{opened.name}: text needs its tokenizer, and none can be read beside it: {opened.no_tokenizer}")
    name, documents = read_documents(path, option)
    return name, "\n\n".join(documents)[:LONGEST]
