"""How good a language model is: its loss on held-out text while rates are chosen, and on test texts that are read once, at the end."""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import nn
from tqdm import tqdm

from ..data.text import END_OF_TEXT, Text, TextData, check_apart, encode, sha256_of

MOST_ENTRIES = 500  # per test text on record; of more documents, neighbours share one
NO_TARGET = -100  # cross_entropy leaves it out
EDGE = 8  # tokens at either end of a document
AT_A_TIME = 2**24  # tokens that are looked through together


def validate(
    model: nn.Module, data: TextData, context: int, batch_size: int, max_tokens: int, precision: str, title: str
) -> dict:
    """Loss on consecutive windows from the start of the held-out text, every token predicted once.

    Args:
        model: tokens -> logits; it is left in evaluation mode.
        data: whose held-out text.
        context: tokens of a window.
        batch_size: windows at a time.
        max_tokens: the most that are looked at.
        precision: "float32", or "bfloat16" for autocast.
        title: of the progress bar.

    Returns:
        `validation_loss` (nats a token), `bits_per_byte` (comparable across vocabularies), `validation_tokens`.

    Raises:
        ValueError: if the held-out text is shorter than one window.
    """
    n_windows = min(len(data.validation) - 1, max_tokens) // context
    if n_windows == 0:
        raise ValueError(f"{data.name}: {len(data.validation)} held-out tokens are fewer than one window of {context}")
    stream = data.validation[: n_windows * context + 1].astype(np.int64)
    inputs, targets = (part.reshape(n_windows, context) for part in (stream[:-1], stream[1:]))
    total = sum(loss.item() for loss in cross_entropies(model, inputs, targets, batch_size, precision, title, "sum"))
    return {
        "validation_loss": total / targets.size,
        "bits_per_byte": total / math.log(2) / int(data.token_bytes[targets].sum()),
        "validation_tokens": targets.size,
    }


@torch.no_grad()
def cross_entropies(
    model: nn.Module,
    inputs: np.ndarray,
    targets: np.ndarray,
    batch_size: int,
    precision: str,
    title: str,
    reduction: str,
) -> list[torch.Tensor]:
    """The model's cross-entropy in nats, batch by batch.

    Args:
        model, batch_size, precision, title: as in `validate`.
        inputs, targets: (windows, context) int64; a target may be NO_TARGET.
        reduction: as in torch.

    Returns:
        Per batch a scalar, or with reduction "none" a tensor (rows * context,).
    """
    device = next(model.parameters()).device
    model.eval()
    losses = []
    for start in tqdm(range(0, len(inputs), batch_size), f"{title}: validation", leave=False):
        x, y = (torch.from_numpy(part[start : start + batch_size]).to(device) for part in (inputs, targets))
        with (
            torch.compiler.set_stance("force_eager"),  # the last batch is smaller: a compilation would not pay
            torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"),
        ):
            logits = model(x)
        losses.append(F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction=reduction, ignore_index=NO_TARGET))
    return losses


@dataclass(frozen=True)
class UnseenText:
    """A text for finished models alone.

    Args:
        name: of its file or folder.
        sha256: of its documents.
        documents: the tokens of each, (tokens,) uint16, an end-of-text mark last.
        end: that mark.
        token_bytes: as in `TextData`.
    """

    name: str
    sha256: str
    documents: list[np.ndarray]
    end: int
    token_bytes: np.ndarray


def read_unseen(tests: list[Text], data: TextData) -> list[UnseenText]:
    """The texts of --test in the byte pairs of the training text.

    Args:
        tests: as `read_tests` gives them.
        data: the training text.

    Raises:
        ValueError: as `check_apart` does.
    """
    texts, known = [], []
    for name, documents in tests:
        tokenizer = Tokenizer.from_str(data.tokenizer)
        tokens, end = encode(tokenizer, documents, f"tokenising {name}"), tokenizer.token_to_id(END_OF_TEXT)
        each = np.split(tokens, np.flatnonzero(tokens == end) + 1)[:-1]  # after the last mark there is nothing
        known.append((name, all(holds(data.train, document) or holds(data.validation, document) for document in each)))
        texts.append(UnseenText(name, sha256_of(documents), each, end, data.token_bytes))
    check_apart(known)
    return texts


def holds(tokens: np.ndarray, document: np.ndarray) -> bool:
    """Whether a document stands in a text; its edges apart, where what was cut out of another one has tokens of its own.

    Args:
        tokens: (tokens,), as large as a disk.
        document: (tokens,).
    """
    sought = document[EDGE:-EDGE] if len(document) > 4 * EDGE else document
    for start in range(0, len(tokens) - len(sought) + 1, AT_A_TIME):
        part = tokens[start : start + AT_A_TIME + len(sought) - 1]
        places = np.flatnonzero(part[: len(part) - len(sought) + 1] == sought[0])
        for offset, token in enumerate(sought):  # after few of them no place is left, where none is the right one
            places = places[part[places + offset] == token]
            if not len(places):
                break
        else:
            return True
    return False


def windows_of(document: np.ndarray, end: int, context: int) -> tuple[np.ndarray, np.ndarray]:
    """A document cut into windows, each of its tokens and the mark at its end predicted once.

    The first token is predicted from an end-of-text mark alone, as within the training text. A document longer than the context
    goes on in a next window, whose first input is the last token of the one before; what a short window lacks has no target.

    Args:
        document: (tokens,), the mark at its end too.
        end: that mark.
        context: tokens of a window.

    Returns:
        Inputs and targets, (windows, context) int64 each.
    """
    lacking = -len(document) % context
    inputs = np.concatenate([[end], document[:-1], np.full(lacking, end)]).astype(np.int64)
    targets = np.concatenate([document, np.full(lacking, NO_TARGET)]).astype(np.int64)
    return inputs.reshape(-1, context), targets.reshape(-1, context)


def measure_unseen(
    model: nn.Module, texts: list[UnseenText], context: int, batch_size: int, precision: str, title: str
) -> dict[str, dict]:
    """The loss on every document of each text, for a record.

    Args:
        model, context, batch_size, precision, title: as in `validate`.
        texts: all that are read.

    Returns:
        By name `sha256`, `loss` (nats a token), `bits_per_byte`, `tokens`, and `articles`: nats and tokens of each document. Of
        more than MOST_ENTRIES documents, neighbours stand together, `documents_per_entry` of them.
    """
    measured = {}
    for text in texts:
        windows = [windows_of(document, text.end, context) for document in text.documents]
        inputs, targets = (np.concatenate(parts) for parts in zip(*windows))  # (w, context)
        losses = torch.cat(cross_entropies(model, inputs, targets, batch_size, precision, f"{title}, {text.name}", "none"))
        nats = losses.double().view(len(inputs), context).sum(1).cpu().numpy()  # (w,)
        first = np.cumsum([0] + [len(part) for part, _ in windows[:-1]])  # (documents,), where each one's windows begin
        together = math.ceil(len(windows) / MOST_ENTRIES)
        first = first[::together]  # (entries,)
        each, tokens = np.add.reduceat(nats, first), np.add.reduceat((targets != NO_TARGET).sum(1), first)
        n_bytes = sum(int(text.token_bytes[document].sum()) for document in text.documents)
        measured[text.name] = {
            "sha256": text.sha256,
            "loss": round(float(nats.sum()) / int(tokens.sum()), 6),
            "bits_per_byte": round(float(nats.sum()) / math.log(2) / n_bytes, 6),
            "tokens": int(tokens.sum()),
            "articles": [[round(n, 2), count] for n, count in zip(each.tolist(), tokens.tolist())],
            **({"documents_per_entry": together} if together > 1 else {}),
        }
    return measured
