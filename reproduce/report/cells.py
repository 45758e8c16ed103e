"""Cells and sentences that several tables share."""

from ..store.records import Record
from .judge import Estimate, broken, loss_difference
from .pairs import paired_difference
from .query import diverged, largest_logit, losses_of, mean_loss
from .words import divergence, mean_and_spread, signed

BOLD = "Validation loss in nats per token, each row's best in bold."
UNKNOWN = "The paper's losses are not available to us."


def loss_cell(group: list[Record]) -> str:
    """A group's loss: mean and spread over seeds in nats per token, or which of them diverged.

    Args:
        group: runs of one setting.
    """
    if not group:
        return "not run"
    return divergence(group) or mean_and_spread(losses_of(group), 3)


def bold_if_best(group: list[Record], best: float | None) -> str:
    """A group's loss as in `loss_cell`, in bold where it is the lowest.

    Args:
        group: runs of one setting, or none.
        best: lowest loss of all that stand beside it, None where none ended.
    """
    mark = "**" if best is not None and mean_loss(group) == best else ""
    return f"{mark}{loss_cell(group)}{mark}"


def above_cell(group: list[Record], base: list[Record]) -> str:
    """How far a row ends above another, with the interval between seeds; without one where there is but one pair.

    Args:
        group, base: their runs.

    Returns:
        Empty where no seed is shared or a run diverged.
    """
    if not base or group is base or diverged(group) or diverged(base) or not (gap := paired_difference(group, base)):
        return ""
    return with_interval(gap) if gap.low < gap.high else signed(gap.value, 3)


def with_interval(estimate: Estimate, unit: float = 1, digits: int = 3) -> str:
    """ "−0.005 [−0.019, +0.009]".

    Args:
        estimate: of a difference.
        unit: what is shown of one of its own, 100 for points.
        digits: after the point.
    """
    return f"{signed(unit * estimate.value, digits)} {bracketed(estimate, unit, digits)}"


def bracketed(estimate: Estimate, unit: float = 1, digits: int = 3) -> str:
    """ "[−0.019, +0.009]".  estimate, unit, digits: as in `with_interval`."""
    return f"[{signed(unit * estimate.low, digits)}, {signed(unit * estimate.high, digits)}]"


def difference_cells(runs: list[Record], base: list[Record]) -> list[str]:
    """By how much a row's test loss is above the base's, and the word for it.

    Args:
        runs, base: those that judge each.
    """
    if runs is base or not base or broken(runs, base) or not (estimate := loss_difference(runs, base)):
        return ["", ""]
    return [with_interval(estimate), estimate.word if estimate.of_seeds else f"{estimate.word}, these models"]


def logit_cell(runs: list[Record]) -> str:
    """The largest logit of the runs, empty where none was looked at."""
    return f"{logit:,.0f}" if (logit := largest_logit(runs)) else ""
