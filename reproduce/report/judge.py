"""Differences between two rows as paired estimates with a 95 % interval, and the word for what the interval says."""

import statistics
from dataclasses import dataclass

from ..store.records import Record

MARGIN = 0.01  # nats per token: what lies within it on both sides is level
BELOW, ABOVE, LEVEL, UNRESOLVED = "below", "above", "level", "not resolved"
T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # of Student, at 97.5 %, for 1, 2, ... degrees of freedom


@dataclass(frozen=True)
class Estimate:
    """A mean difference and its interval.

    Args:
        value: the mean.
        low, high: where the interval begins and ends.
        over: what it is taken over, in words.
    """

    value: float
    low: float
    high: float
    over: str

    @property
    def word(self) -> str:
        """ "below" or "above" where zero is excluded, "level" within MARGIN, else "not resolved"."""
        if self.low > 0 or self.high < 0:
            return ABOVE if self.low > 0 else BELOW
        return LEVEL if self.low >= -MARGIN and self.high <= MARGIN else UNRESOLVED


def metric_difference(row: list[Record], base: list[Record], metric: str, *, seeds: int) -> Estimate | None:
    """By how much a row's metric is above another row's: Student's interval of the differences within seeds.

    Args:
        row: its runs, none of which diverged.
        base: the other's.
        metric: which.
        seeds: how many both must have.

    Returns:
        None where both have fewer.
    """
    at = {r.seed: r.metrics[metric] for r in base}
    differences = [r.metrics[metric] - at[r.seed] for r in row if r.seed in at]
    n = len(differences)
    if n < seeds:
        return None
    mean, half = statistics.mean(differences), T[n - 2] * statistics.stdev(differences) / n**0.5
    return Estimate(mean, mean - half, mean + half, f"{n} seeds")
