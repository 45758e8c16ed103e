"""Checks of notebook 09: the rank that a budget buys, bits per byte, a paired verdict, and how it is read."""

import math

import torch

from .common import judge, judge_value


def query_rank(budget, d, n_heads, r, t):
    """2 (n_H r + d s + d t + r s t) <= budget, solved for s."""
    return (budget // 2 - n_heads * r - d * t) // (d + r * t)


def check_query_rank(attempt) -> bool:
    return judge(
        attempt,
        [(21358, 96, 6, 4, 16), (426176, 768, 12, 8, 64)],  # 2 less than rank 57 needs; what rank 128 needs
        query_rank,
        {
            "there are two tensors, before and after the softmax; you spend the whole budget on one": lambda b, d, n, r, t: (
                query_rank(2 * b, d, n, r, t)
            ),
            "the core grows with s too, by r t numbers for each": lambda b, d, n, r, t: (b // 2 - n * r - d * t) // d,
            "the key factor takes d t numbers whatever s is": lambda b, d, n, r, t: (b // 2 - n * r) // (d + r * t),
            "the head factor takes n_heads r numbers whatever s is": lambda b, d, n, r, t: (b // 2 - d * t) // (d + r * t),
            "this exceeds the budget: round down": lambda b, d, n, r, t: query_rank(b, d, n, r, t) + 1,
            "a rank is a whole number: round down": lambda b, d, n, r, t: (b / 2 - n * r - d * t) / (d + r * t),
        },
        "what is left after head and key factor, over d + r t",
        rtol=1e-9,
    )


def bits_per_byte(nats_per_token, n_tokens, n_bytes):
    return nats_per_token * n_tokens / math.log(2) / n_bytes


def check_bits_per_byte(attempt) -> bool:
    return judge(
        attempt,
        [(3.7, 16384, 43000), (2.0, 10, 30)],
        bits_per_byte,
        {
            "these are nats per byte; a bit is ln 2 nats": lambda loss, tokens, size: loss * tokens / size,
            "these are bits per token; the text's bytes are what is comparable": lambda loss, tokens, size: loss / math.log(2),
            "divide by ln 2, do not multiply: bits are smaller than nats": lambda loss, tokens, size: (
                loss * tokens * math.log(2) / size
            ),
            "tokens and bytes have changed places": lambda loss, tokens, size: loss * size / math.log(2) / tokens,
            "the loss is a mean over tokens; multiply by their number for the whole text": lambda loss, tokens, size: (
                loss / math.log(2) / size
            ),
        },
        "whole loss in bits over bytes: the unit is the same for any tokenizer, the value is not",
    )


def verdict(a, b):
    differences = torch.as_tensor(a) - torch.as_tensor(b)
    return differences.mean() / (differences.std() / len(differences) ** 0.5)


def check_verdict(attempt) -> bool:
    a = torch.tensor([3.61, 3.74, 3.70, 3.58], dtype=torch.float64)
    b = torch.tensor([3.65, 3.80, 3.72, 3.65], dtype=torch.float64)
    return judge(
        attempt,
        [(a, b), (b, a)],
        verdict,
        {
            "the standard error is the standard deviation over the root of the number of seeds": lambda a, b: (
                (a - b).mean() / (a - b).std()
            ),
            "this forgets that seeds are pairs; the spread is that of the differences": lambda a, b: (
                (a - b).mean() / ((a.var() + b.var()) / len(a)) ** 0.5
            ),
            "this is the mean difference; without its spread nobody knows whether it is large": lambda a, b: (a - b).mean(),
            "the sample standard deviation divides by seeds - 1": lambda a, b: (
                (a - b).mean() / ((a - b).std(correction=0) / len(a) ** 0.5)
            ),
            "the sign is turned round; a - b is wanted": lambda a, b: verdict(b, a),
        },
        "paired, so that what a seed does to both rows cancels",
    )


def check_spread(answer) -> bool:
    mistakes = {
        "so close end only runs of one seed; another seed is another start and other batches": 0.001,
        "a nat is most of what 60 steps teach here; seeds move a row much less": 1,
    }
    right = "about as much as many rows differ from one another, so one seed each says little"
    return judge_value(answer, 0.1, mistakes, right)


def check_reading(answer) -> bool:
    mistakes = {
        "the interval reaches from -0.25 to +0.17: rows that differ by a tenth fit into it as well": 1,
        "zero lies in the interval, so the sign of the mean says nothing": 2,
    }
    return judge_value(answer, 3, mistakes, "an interval that holds zero leaves the question open, and a wide one says little")
