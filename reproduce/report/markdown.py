"""Markdown tables."""

from collections.abc import Iterable, Sequence


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub table, padded so that the source reads well too.

    Args:
        header: of each column; the first is aligned to the left, the others to the right.
        rows: as many cells each; what is not text becomes it.
    """
    # tabulate's formats "github" and "pipe" make other bytes: columns at least two wider than their headers, and rules with more colons.
    cells = [list(header), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [_line(cells[0], widths), "|" + "|".join(_rule(i, w) for i, w in enumerate(widths)) + "|"]
    return "\n".join(lines + [_line(row, widths) for row in cells[1:]])


def _line(cells: list[str], widths: list[int]) -> str:
    padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
    return "| " + " | ".join(padded) + " |"


def _rule(column: int, width: int) -> str:
    return "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"
