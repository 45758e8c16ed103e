"""Differences between two rows as paired estimates with a 95 % interval, and what the interval says."""

import math
import statistics
from dataclasses import dataclass

from ..store.records import Record

MARGIN = 0.01  # nats per token within which two losses are called level
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t at 97.5 %, by degrees of freedom


@dataclass(frozen=True)
class Difference:
    """Ours minus theirs over pairs of runs.

    Args:
        mean: over the pairs.
        low, high: the ends of its 95 % interval.
        pairs: how many.
    """

    mean: float
    low: float
    high: float
    pairs: int

    def verdict(self, margin: float = MARGIN) -> str:
        """ "below" or "above" where the interval excludes zero, "level" where it lies within the margin, else "not resolved"."""
        if -margin <= self.low and self.high <= margin:
            return "level"
        return "below" if self.high < 0 else "above" if self.low > 0 else "not resolved"


def paired(ours: list[Record], theirs: list[Record], metric: str = "validation_loss") -> Difference | None:
    """The mean difference over runs of one seed, with Student's interval for as many.

    Args:
        ours, theirs: runs of two settings, of which none diverged.
        metric: what is compared.

    Returns:
        None where there are fewer than two pairs.
    """
    base = {r.seed: r.metrics[metric] for r in theirs}
    gaps = [r.metrics[metric] - base[r.seed] for r in ours if r.seed in base]
    if len(gaps) < 2:
        return None
    mean = statistics.mean(gaps)
    half = QUANTILES[min(len(gaps) - 1, len(QUANTILES)) - 1] * statistics.stdev(gaps) / math.sqrt(len(gaps))
    return Difference(mean, mean - half, mean + half, len(gaps))
