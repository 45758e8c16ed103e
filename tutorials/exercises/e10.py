"""Checks of notebook 10: how an interval is read, what it leaves out, and what the heads of trained models share."""

import torch

from .common import judge, judge_value


def word(low, high):
    """-1 below, 1 above, 0 not resolved."""
    return 1 if low > 0 else -1 if high < 0 else 0


def check_word(attempt) -> bool:
    mistakes = {
        "the mean alone decides nothing: zero may lie in the interval": lambda low, high: 1 if low + high > 0 else -1,
        "the signs are turned round: an interval of positive differences is above": lambda low, high: -word(low, high),
        "one end above zero is not enough: all of the interval must be": lambda low, high: (
            1 if high > 0 else -1 if low < 0 else 0
        ),
        "one end below zero is not enough: all of the interval must be": lambda low, high: (
            -1 if low < 0 else 1 if high > 0 else 0
        ),
    }
    inputs = [(0.02, 0.06), (-0.09, -0.01), (-0.02, 0.06), (-0.06, 0.02)]
    return judge(attempt, inputs, word, mistakes, "only an interval without zero has a word")


def check_uncovered(answer) -> bool:
    mistakes = {
        "other seeds are just what it is about: it is taken over them": 1,
        "both rows of a pair read the same batches, and each seed has others: that is in the spread": 3,
    }
    right = "it tells how other seeds would end at these rates, nothing of rates that nobody tried"
    return judge_value(answer, 2, mistakes, right)


def check_share(answer) -> bool:
    mistakes = {
        "that is about the query and the key mode": 0.5,
        "heads that shared so much would make a rank of eight or nine free": 0.75,
    }
    return judge_value(
        answer, 0.95, mistakes, "by this measure these heads have nearly all of their patterns to themselves", 0.05
    )


def qk_bound(q_gain, k_gain):
    """The largest logit that RMS-normalised queries and keys can have, with the scale 1/sqrt(width)."""
    return len(q_gain) ** 0.5 * (q_gain * k_gain).abs().max()


def check_qk_bound(attempt) -> bool:
    generator = torch.Generator().manual_seed(0)
    inputs = [tuple(torch.randn(2, width, generator=generator, dtype=torch.float64)) for width in (4, 16)]
    return judge(
        attempt,
        inputs,
        qk_bound,
        {
            "the scale 1/sqrt(width) is missing": lambda q, k: len(q) ** 0.5 * qk_bound(q, k),
            "a normalised vector has the length sqrt(width), not 1": lambda q, k: qk_bound(q, k) / len(q),
            "that is the scale alone: two lengths of sqrt(width), times 1/sqrt(width)": lambda q, k: (
                qk_bound(q, k) / len(q) ** 0.5
            ),
            "a bound, but not the least: query and key meet channel by channel, so take the largest product of two gains": (
                lambda q, k: len(q) ** 0.5 * q.abs().max() * k.abs().max()
            ),
            "gains may be negative: take absolute values": lambda q, k: len(q) ** 0.5 * (q * k).max(),
        },
        "Cauchy and Schwarz: sqrt(width) times the largest product of two gains",
    )
