"""Runs that were made once more on another machine, beside those that are on record."""

import statistics
from pathlib import Path

from ..store.records import COMMITTED, Record, load
from .judge import SEEDS, test_losses
from .markdown import markdown
from .words import signed

FOLDER = COMMITTED / "again"


def render(records: list[Record], folder: Path = FOLDER) -> str:
    """What a run reached on its first test text, on record and once more, beside what its row's seeds differ by.

    Args:
        records: all that there are.
        folder: with those that were made once more; they bear the ids of the first ones.

    Returns:
        A table, empty where no run was made twice or a row has too few seeds to be set beside.
    """
    first, lines = {r.id: r for r in records}, []
    for second in load(folder):
        own = first.get(second.id)
        row = test_losses([r for r in records if own and (r.preset, r.config) == (own.preset, own.config)])
        both = test_losses([r for r in (own, second) if r])
        if own and len(both) == 2 and len(row) >= SEEDS:
            was, now = both
            cells = [f"{was:.4f}", f"{now:.4f}", signed(now - was, 4), f"{min(row):.4f} to {max(row):.4f}"]
            where = "within" if min(row) <= now <= max(row) else "outside"
            lines.append([f"{own.method}, seed {own.seed}", *cells, f"{statistics.stdev(row):.4f}", where])
    title = (
        "**Made once more, by the same command on another machine.** Nats per token on the first test text; seed and order are the same, "
        "the GPU's sums are not."
    )
    header = ["run", "on record", "once more", "difference", "the row's seeds", "their standard deviation", "once more is"]
    return f"{title}\n\n{markdown(header, lines)}" if lines else ""
