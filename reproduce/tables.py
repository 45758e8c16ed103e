"""Markdown tables, and the small arithmetic that every table needs."""

import statistics
from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub table; the first column left-aligned, the others right-aligned, padded so that the source reads well too."""
    cells = [list(header), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [_line(cells[0], widths), "|" + "|".join(_rule(i, w) for i, w in enumerate(widths)) + "|"]
    return "\n".join(lines + [_line(row, widths) for row in cells[1:]])


def _line(cells: list[str], widths: list[int]) -> str:
    padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
    return "| " + " | ".join(padded) + " |"


def _rule(column: int, width: int) -> str:
    return "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """ "4.321" for one value, "4.321 ± 0.012 (3)" with the standard deviation and the number of runs for more."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} ({len(values)})"


def counted(number: int, thing: str) -> str:
    """ "1 worker", "8 workers"."""
    return f"{number:,} {thing}{'s' if number > 1 else ''}"


def difference(ours: float, paper: float) -> str:
    """ours / paper - 1 in per cent, signed."""
    return f"{100 * (ours / paper - 1):+.1f} %"
