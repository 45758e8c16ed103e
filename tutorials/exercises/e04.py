"""Checks of notebook 04: sharing latents, MLA."""

import torch

from .common import judge, judge_value

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def check_absorb_query(attempt) -> bool:
    mistakes = {
        "the heads are summed; each head has a latent query of its own": lambda q, w: torch.einsum("bhnk,hkt->bnt", q, w),
        "you used W^UK of head 0 for every head": lambda q, w: torch.einsum("bhnk,kt->bhnt", q, w[0]),
        "that sums over the wrong index: the head width k must go, the latent width t must stay": (
            lambda q, w: torch.einsum("bhnk,htk->bhnt", q, w)
        ),
        "heads and tokens are exchanged: (b, h, n, t)": lambda q, w: torch.einsum("bhnk,hkt->bnht", q, w),
    }
    inputs = [(normal(2, 3, 5, 4), normal(3, 4, 4)), (normal(2, 3, 5, 4), normal(3, 4, 6))]
    right = "(q W^UK^T) L^T = q (L W^UK)^T: no key is needed"
    return judge(attempt, inputs, lambda q, w: torch.einsum("bhnk,hkt->bhnt", q, w), mistakes, right)


def check_absorb_output(attempt) -> bool:
    def fused(w_uv, w_o):
        return torch.einsum("hvt,hvd->htd", w_uv, w_o)

    mistakes = {
        "it must take a latent (t) to an output (d); yours goes the other way": lambda w_uv, w_o: fused(w_uv, w_o).mT,
        "the heads are summed, but each weighs the sources in its own way: keep them apart": (
            lambda w_uv, w_o: fused(w_uv, w_o).sum(dim=0)
        ),
        "that pairs value channels with latent channels: sum over v": lambda w_uv, w_o: torch.einsum("htv,hvd->htd", w_uv, w_o),
    }
    inputs = [(normal(3, 4, 4), normal(3, 4, 4)), (normal(3, 4, 6), normal(3, 4, 12))]
    return judge(attempt, inputs, fused, mistakes, "W_h^UV W_h^O: no value is needed either")


def check_ranks(attempt) -> bool:
    def ranks(d, h, k, s, t):
        return h, min(d, h * min(k, t)), t

    mistakes = {
        "those are the theorem's maxima; a narrow latent does not fill the output mode: min(d, n_H min(d_H, d_c))": (
            lambda d, h, k, s, t: (h, d, t)
        ),
        "each head writes at most min(d_H, d_c) output directions, not d_H": lambda d, h, k, s, t: (h, min(d, h * k), t),
        "each head writes at most min(d_H, d_c) output directions, not d_c": lambda d, h, k, s, t: (h, min(d, h * t), t),
        "those are the ranks of the first tensor; the second has an output mode, and no query latent": (
            lambda d, h, k, s, t: (h, s, t)
        ),
    }
    inputs = [(24, 2, 8, 10, 5), (48, 3, 4, 7, 9), (24, 6, 4, 10, 8), (768, 12, 64, 128, 128)]
    return judge(attempt, inputs, ranks, mistakes, "all heads together write n_H min(d_H, d_c) directions, at most d")


def check_cache(attempt) -> bool:
    def size(d, h, t, tokens, layers, shared):
        return tokens * layers * t * (1 if shared else 2) * 2

    mistakes = {
        "BF16 has two bytes a number": lambda *a: size(*a) // 2,
        "keys and values read the *same* latent with shared KV, and two latents without": lambda *a: size(*a[:-1], not a[-1]),
        "the latent is shared by all heads: it is kept once, not once per head": lambda d, h, *rest: h * size(d, h, *rest),
        "that is the cache of multi-head attention": lambda d, h, t, tokens, layers, shared: 4 * tokens * layers * d,
        "every layer has a cache": lambda d, h, t, tokens, layers, shared: size(d, h, t, tokens, 1, shared),
    }
    inputs = [(768, 12, 128, 1024, 12, True), (2048, 32, 96, 4096, 16, False)]
    return judge(attempt, inputs, size, mistakes, "N d_c numbers a layer, twice that where values have a latent of their own")


def check_gain(answer) -> bool:
    mistakes = {
        "rebuilding makes twelve keys and twelve values of 64 numbers from each cached latent; absorbing makes none": 2,
        "a rebuilt key or value costs 128 multiply-adds a number, and each number is then used once": 10,
    }
    return judge_value(answer, 60, mistakes, "nearly all of the work was making keys and values that are used once", rtol=0.2)


def check_untouched(answer) -> bool:
    mistakes = {
        "MLA makes all queries from a latent of ten numbers: its curve stops there": 2,
        "all three but MHA stop at eight": 3,
    }
    return judge_value(answer, 1, mistakes, "all three have six values there: nobody has touched the heads")
