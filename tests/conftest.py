"""Triton's interpreter where there is no GPU, and the matrix of exactness at the end of a run: worst errors, smallest controls."""

import os

import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
import torch._dynamo  # noqa: E402, F401  (the first custom operator imports it, a second that every mutant would pay again)

# ci: the same few inputs in every run. long: minutes, and other inputs each time (`make fuzz`).
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("long", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

MATRIX: dict[tuple[str, str], float] = {}


def pytest_terminal_summary(terminalreporter):
    if not MATRIX:
        return
    columns = sorted({column for _, column in MATRIX}, key=lambda c: (c == "least control", c.endswith("decoded"), c))
    rows = list(dict.fromkeys(row for row, _ in MATRIX))
    width = max(map(len, rows))
    write = terminalreporter.write_line
    terminalreporter.section("as_tucker(layer) against layer: relative error in output and gradient, float64")
    write(" " * width + "".join(column.rjust(18) for column in columns))
    for row in rows:
        cells = (MATRIX.get((row, column)) for column in columns)
        write(row.ljust(width) + "".join(("" if cell is None else f"{cell:.0e}").rjust(18) for cell in cells))
