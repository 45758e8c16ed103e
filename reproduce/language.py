"""Train and judge a language model: batches, validation loss, bits per byte."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from .data.text import TextData


def batch_of(tokens: np.ndarray, step: int, seed: int, batch_size: int, context: int) -> torch.Tensor:
    """The random windows of one training step, a function of (seed, step) alone.  Returns: (batch, context + 1) int64."""
    starts = np.random.default_rng((seed, step)).integers(0, len(tokens) - context, size=batch_size)
    return torch.from_numpy(np.stack([tokens[s : s + context + 1] for s in starts]).astype(np.int64))


def next_token_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of predicting each token from those before it.  windows: (b, n + 1)."""
    logits = model(windows[:, :-1])  # (b, n, vocab)
    return F.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def validate(
    model: nn.Module, data: TextData, context: int, batch_size: int, max_tokens: int, precision: str, title: str
) -> dict:
    """Loss on consecutive windows from the start of the held-out text, every token predicted once.

    Returns: validation_loss (nats a token), bits_per_byte (comparable across vocabularies), validation_tokens.
    """
    device = next(model.parameters()).device
    n_windows = min(len(data.validation) - 1, max_tokens) // context
    if n_windows == 0:
        raise ValueError(f"{data.name}: {len(data.validation)} held-out tokens are fewer than one window of {context}")
    stream = data.validation[: n_windows * context + 1].astype(np.int64)
    targets = stream[1:].reshape(n_windows, context)
    inputs = stream[:-1].reshape(n_windows, context)
    model.eval()
    total = 0.0
    for start in tqdm(range(0, n_windows, batch_size), f"{title}: validation", leave=False):
        x, y = (torch.from_numpy(t[start : start + batch_size]).to(device) for t in (inputs, targets))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            logits = model(x)
        total += F.cross_entropy(logits.flatten(0, 1).float(), y.flatten(), reduction="sum").item()
    n_bytes = int(data.token_bytes[targets].sum())
    return {
        "validation_loss": total / targets.size,
        "bits_per_byte": total / math.log(2) / n_bytes,
        "validation_tokens": targets.size,
    }
