"""Cells and sentences that several tables share."""

import statistics

from ..store.records import Record
from .judge import metric_difference
from .query import diverged, largest_logit, losses_of
from .words import divergence, mean_and_spread, signed

UNKNOWN = "The paper's losses are not available to us."


def loss_cell(group: list[Record]) -> str:
    """A group's loss: mean and spread over seeds in nats per token, or which of them diverged.

    Args:
        group: runs of one setting.
    """
    if not group:
        return "not run"
    return divergence(group) or mean_and_spread(losses_of(group), 3)


def above_cell(group: list[Record], base: list[Record]) -> str:
    """How far a row ends above another, with the interval between seeds; without one where there is but one pair.

    Args:
        group, base: their runs.
    """
    if not base or group is base or diverged(group) or diverged(base):
        return ""
    if gap := metric_difference(group, base, "validation_loss", seeds=2):
        return f"{signed(gap.value, 3)} [{signed(gap.low, 3)}, {signed(gap.high, 3)}]"
    return signed(statistics.mean(losses_of(group)) - statistics.mean(losses_of(base)), 3)


def logit_cell(runs: list[Record]) -> str:
    """The largest logit of the runs, empty where none was looked at."""
    return f"{logit:,.0f}" if (logit := largest_logit(runs)) else ""
