"""Differences between runs that share their seeds, as estimates with intervals.

Names and arguments are those of `reproduce.report.judge`, which can stand in its place.
"""

import statistics
from dataclasses import dataclass

from reproduce.store.records import Record

MARGIN = 0.01  # nats per token: what lies within it on both sides is level
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


def metric_difference(row: list[Record], base: list[Record], metric: str, *, seeds: int) -> Estimate | None:
    """By how much a row's metric is above another row's: Student's 95 % interval of the differences within seeds.

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
