"""How the lessons compare: `agree` for what must be the same, `control` for what must not be. Each prints one line.

A control is a wrong way, taken on purpose. Without it, a check that cannot see anything would look like one that is passed.
"""

import numpy as np

DIGITS = 12  # what a few products leave of float64
VISIBLE = 0.01  # of the largest number: an error that a control must exceed


def difference(found, expected) -> float:
    """The largest difference over the largest number expected.

    Args:
        found, expected: arrays or tensors of one shape.

    Raises:
        AssertionError: if the shapes differ.
    """
    found, expected = (np.asarray(one.detach() if hasattr(one, "detach") else one) * 1.0 for one in (found, expected))
    assert found.shape == expected.shape, f"shapes {found.shape} and {expected.shape}"
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def agree(what: str, found, expected, digits: int = DIGITS) -> None:
    """Two ways to the same numbers: say so, or raise AssertionError.

    Args:
        what: the line to print.
        found, expected: arrays or tensors.
        digits: after which they may differ.
    """
    off = difference(found, expected)
    assert off < 10.0**-digits, f"{what}: off by {off:.1e}"
    print(f"{what}: equal to {digits} digits")


def control(what: str, wrong, expected) -> None:
    """A wrong way: print the error that it makes, or raise AssertionError if it makes none that could be seen.

    Args:
        what: the line to print.
        wrong, expected: arrays or tensors.
    """
    off = difference(wrong, expected)
    assert off > VISIBLE, f"control, {what}: off by {off:.1e} only, so nobody would notice"
    print(f"control, {what}: off by {off:.0%}")
