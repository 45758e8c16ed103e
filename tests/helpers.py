"""What all tests share: one measure of error, one table of tolerances, and layers that show a wrong logit."""

import functools
import json
import os
import random
import sys

import numpy as np
import torch

from reproduce.data import text
from reproduce.experiments.exactness import with_large_weights  # noqa: F401  (tests take it from here)
from reproduce.store import records
from reproduce.store.records import FIELDS, Record

# Relative error ||a - b|| / ||b|| allowed between two ways to compute the same thing, with the reason for each.
TOLERANCE = {
    torch.float64: 1e-12,  # the design's bound for proofs: eps 2e-16 times sums of some thousand terms
    torch.float32: 1e-5,  # eps 1e-7 times the same sums
    torch.bfloat16: 2e-2,  # eps 8e-3: the inputs' own rounding
}
EXACT = TOLERANCE[torch.float64]
DIFFERENT = 1e-3  # a negative control must miss by more than this: nine orders above EXACT


def relative_error(actual, expected) -> float:
    """||actual - expected|| / ||expected||, of NumPy arrays or tensors; infinite where anything is NaN."""
    actual, expected = (t.detach().double().cpu().numpy() if isinstance(t, torch.Tensor) else t for t in (actual, expected))
    assert actual.shape == expected.shape, f"shapes differ: {actual.shape} and {expected.shape}"
    error = float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))
    return error if np.isfinite(error) else np.inf


def tokens(batch: int, n_tokens: int, d_model: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(batch, n_tokens, d_model, generator=generator, dtype=torch.float64)


def output_and_gradient(layer, x: torch.Tensor, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's output and the gradient with respect to x of a fixed random projection of it."""
    x = x.detach().clone().requires_grad_()
    y = layer(x, **options)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(y)
    (y * direction).sum().backward()
    return y.detach(), x.grad


def worst_error(layer, other, x, **options) -> float:
    """The larger of the relative errors in output and in gradient between two layers."""
    pairs = zip(output_and_gradient(layer, x, **options), output_and_gradient(other, x, **options))
    return max(relative_error(a, b) for a, b in pairs)


def attention_inputs(b, h, g, n, m, k, v, dtype=torch.float64, device="cpu") -> list[torch.Tensor]:
    """q (b, h, n, k), k (b, g, m, k) and v (b, g, m, v), random, as leaves that want gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(b, h, n, k), (b, g, m, k), (b, g, m, v)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_() for s in shapes]


def times_tables(folder, numbers=range(20), lines: int = 100):
    """A text of a file a number, which holds its multiples; returns the folder, which is made where it is not there."""
    folder.mkdir(exist_ok=True)
    for n in numbers:
        multiples = "".join(f"{n} times {k} makes {n * k}.\n" for k in range(lines))
        (folder / f"{n:02}.txt").write_text(multiples, encoding="utf-8")
    return folder


def files_read(monkeypatch) -> list[str]:
    """The name of each file of text, every time that one is read from now on."""
    read, plain = [], text._read
    monkeypatch.setattr(text, "_read", lambda path: read.append(path.name) or plain(path))
    return read


def run_here(*arguments) -> int:
    """What `python -m reproduce ...` exits with, in this process: an exception that it does not catch fails the test."""
    from reproduce.__main__ import main  # all experiments: tests of the library start without them

    before, sys.argv = sys.argv, ["reproduce", *map(str, arguments)]
    try:
        return main()
    except SystemExit as stopped:  # by argparse
        return stopped.code
    finally:
        sys.argv = before


def unmeasured() -> dict[str, str]:
    """The environment of a process in which no coverage is measured: every line that it runs is run elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}


def a_record(**given) -> Record:
    """A record with these fields, and with others that mean nothing."""
    words = {name: "" for name in ("id", "experiment", "preset", "method", "command", "commit", "device", "finished")}
    return Record(**words | dict(config={}, seed=0, data=None, metrics={}, versions={}, wall_seconds=0.0) | given)


@functools.cache
def committed_records() -> list[Record]:
    """The records of the repository: read once for all tests, none of which changes them."""
    return records.load(records.COMMITTED)


def write_records(folder, runs: list[Record]) -> None:
    """What `records.append` leaves of them one by one, written at once: it reads all that is there for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for experiment, preset in {(r.experiment, r.preset) for r in runs}:
        entries = [
            {name: getattr(r, name) for name in FIELDS} for r in runs if (r.experiment, r.preset) == (experiment, preset)
        ]
        (folder / f"{experiment}.{preset}.json").write_text(json.dumps(entries), encoding="utf-8")


CHANGE = random.Random(0)


def nudged(measured):
    """The same metrics with every number changed, but those that name a case of `speed` or a step."""
    if isinstance(measured, dict):
        return {
            key: value if key in ("context", "batch", "step", "tokens", "value") else nudged(value)
            for key, value in measured.items()
        }
    if isinstance(measured, list):
        return [nudged(value) for value in measured]
    if isinstance(measured, float):
        return CHANGE.uniform(1.2, 1.8) * measured + 0.5  # not all alike, or ratios would stay
    return measured + 1_000_000 if isinstance(measured, int) and not isinstance(measured, bool) else measured
