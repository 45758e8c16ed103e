"""How one layer's cost grows with its sizes: what was counted and measured, and the power laws that fit it best."""

from collections.abc import Sequence

import numpy as np

COSTS = {  # what each is called, in which unit, and with how many digits
    "parameters": ("parameters (M)", 1e6, ".1f"),
    "cache_bytes": ("cache, MB", 1e6, ".1f"),
    "milliseconds": ("training, ms", 1, ".1f"),
    "megabytes": ("training, peak MB", 1, ",.0f"),
    "microseconds": ("decoding, µs", 1, ".0f"),
}


def points_of(rows: list[dict], along: str, row: str, cost: str) -> tuple[list[float], list[float]]:
    """The sizes at which a cost is known, and the cost there in its unit.

    Args:
        rows: of speed's section "curves".
        along: the size that is varied: "d", "n_H" or "N".
        row: whose layer.
        cost: of COSTS.
    """
    known = [r for r in rows if (r["along"], r["row"]) == (along, row) and r.get(cost)]
    return [r["value"] for r in known], [r[cost] / COSTS[cost][1] for r in known]


def fitted_power(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float] | None:
    """The straight line through the logarithms: values = factor sizes^exponent.

    Args:
        sizes, values: as many, above zero.

    Returns:
        Exponent and factor; None of fewer than three points, which a line fits whatever they are.
    """
    if len(sizes) < 3:
        return None
    slope, constant = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(slope), float(np.exp(constant))


def in_words(exponent: float) -> str:
    """To two digits, without a minus before zero."""
    return f"{round(exponent, 2) + 0.0:.2f}"
