"""Checks of notebook 07: the running sum, tiles under a causal mask, caches, parts of a softmax joined."""

import torch

from .common import judge, judge_value


def check_reason(answer) -> bool:
    mistakes = {
        "exponentials are positive: a negative logit adds little, but it takes nothing away": 1,
        "rounding changes the sixteenth digit, not half of a bar": 3,
    }
    return judge_value(answer, 2, mistakes, "the sum is multiplied by exp(old maximum - new maximum), which is less than 1")


def check_megabytes(answer) -> bool:
    mistakes = {
        "that is with a latent for keys and another for values; here they share one": 3,
        "heads do not count: one latent of 64 numbers a token and layer, for all twelve": 13,
    }
    right = "64 numbers of two bytes, 12 layers, 1,024 tokens: 1.57 MB, a 24th of MHA's"
    return judge_value(answer, 1.6, mistakes, right, rtol=0.03)


def join(z1, lse1, z2, lse2):
    weights = torch.stack([lse1, lse2]).softmax(0)[..., None]  # (2, n, 1)
    return weights[0] * z1 + weights[1] * z2


def check_join(attempt) -> bool:
    generator = torch.Generator().manual_seed(0)
    z1, z2 = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    lse1, lse2 = torch.randn(2, 4, generator=generator, dtype=torch.float64)
    return judge(
        attempt,
        [(z1, lse1, z2, lse2), (z1, lse1 + 2000, z2, lse2 + 2000), (z1, lse1, z2, lse2 + 2000)],
        join,
        {
            "this is the plain mean; the part with the larger sum weighs more": lambda a, la, b, lb: (a + b) / 2,
            "the parts are added as they are; each is divided by its own sum already, so weights must add up to 1": lambda a, la, b, lb: (
                a + b
            ),
            "exp overflows for large lse; subtract the larger one first, or use softmax": lambda a, la, b, lb: (
                (la.exp()[:, None] * a + lb.exp()[:, None] * b) / (la.exp() + lb.exp())[:, None]
            ),
            "exp overflows where lse2 is far above lse1; subtract the larger of the two, whichever it is": lambda a, la, b, lb: (
                (a + (lb - la).exp()[:, None] * b) / (1 + (lb - la).exp())[:, None]
            ),
            "the weights are not divided by their sum": lambda a, la, b, lb: la.exp()[:, None] * a + lb.exp()[:, None] * b,
            "the logarithms themselves are no weights; take their exponentials": lambda a, la, b, lb: (
                (la[:, None] * a + lb[:, None] * b) / (la + lb)[:, None]
            ),
            "the weights of the two parts have changed places": lambda a, la, b, lb: join(a, lb, b, la),
        },
        "the softmax of the logarithms weighs the parts",
    )


def tiles(n, queries, sources):
    """The last query of a tile decides: it sees the sources up to its own place."""
    return sum(-(-(first + queries) // sources) for first in range(0, n, queries))


def check_tiles(attempt) -> bool:
    return judge(
        attempt,
        [(128, 32, 16), (64, 8, 32), (64, 16, 16), (12, 4, 6)],
        tiles,
        {
            "this is all tiles; those above the diagonal are skipped": lambda n, q, s: (n // q) * (n // s),
            "tiles that the diagonal runs through are computed too": lambda n, q, s: sum(
                first // s for first in range(0, n, q)
            ),
            "half of all tiles is close, but tiles on the diagonal are computed whole": lambda n, q, s: (
                (n // q) * (n // s) // 2
            ),
            "the first query of a tile does not look as far as its last one": lambda n, q, s: sum(
                first // s + 1 for first in range(0, n, q)
            ),
        },
        "each tile of queries goes on to the place of its last query",
    )


def max_tokens(budget, n_layers, t, v, bytes_per_number):
    return budget // (n_layers * (t + v) * bytes_per_number)


def check_max_tokens(attempt) -> bool:
    return judge(
        attempt,
        [(10**9, 12, 64, 64, 2), (10**8, 16, 128, 32, 4)],
        max_tokens,
        {
            "every layer keeps a cache of its own": lambda budget, layers, t, v, size: budget // ((t + v) * size),
            "a number takes bytes_per_number bytes": lambda budget, layers, t, v, size: budget // (layers * (t + v)),
            "values are cached too": lambda budget, layers, t, v, size: budget // (layers * t * size),
            "the value rank may differ from the key rank": lambda budget, layers, t, v, size: budget // (layers * 2 * t * size),
            "a part of a token does not fit: round down": lambda budget, layers, t, v, size: budget / (layers * (t + v) * size),
        },
        "t + v numbers a token and layer, for all heads together",
        rtol=1e-12,
    )
