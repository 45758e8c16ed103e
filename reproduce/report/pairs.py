"""Differences that are shown and judge nothing: those of a single pair of runs too, which figures and tables must have alike."""

from ..store.records import Record
from .judge import Estimate, metric_difference
from .query import losses_of


def paired_difference(group: list[Record], base: list[Record]) -> Estimate | None:
    """Validation losses of a group minus those of the base with the same seeds, in nats per token.

    Args:
        group, base: their runs.

    Returns:
        That of one pair is as wide as nothing; None where no seed is shared.
    """
    if several := metric_difference(group, base, "validation_loss", seeds=2):
        return several
    pairs = [losses_of([r])[0] - losses_of([b])[0] for r in group for b in base if r.seed == b.seed]
    return Estimate(pairs[0], pairs[0], pairs[0], "one seed") if pairs else None
