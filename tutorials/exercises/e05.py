"""Checks of notebook 05: the size of a Tucker layer, the core of an MLA, the gauge."""

import math

import torch

from .common import judge


def size(d, n_heads, ranks, post_ranks):
    (r, s, t), (u, o, v) = ranks, post_ranks
    return n_heads * (r + u) + d * (s + t + o + v) + r * s * t + u * o * v


def check_size(attempt) -> bool:
    return judge(
        attempt,
        [(768, 12, (8, 128, 64), (6, 96, 32)), (24, 6, (3, 8, 6), (3, 8, 6))],
        size,
        {
            "the cores are weights too, r s t and u o v numbers": lambda d, n, a, b: (
                size(d, n, a, b) - math.prod(a) - math.prod(b)
            ),
            "the head factors U1 and U~1 are missing, n_heads rows each": lambda d, n, a, b: (
                size(d, n, a, b) - n * (a[0] + b[0])
            ),
            "this is twice the first tensor; the second has ranks of its own": lambda d, n, a, b: size(d, n, a, a),
            "this is the first tensor alone; there are two": lambda d, n, a, b: size(d, n, a, a) // 2,
            "n_heads rows belong to the head factors only, d rows to the others": lambda d, n, a, b: size(d, d, a, b),
        },
        "two cores, two head factors, four factors with d rows. tucker_cost counts the same",
    )


def core(w_uq, w_uk):
    return torch.einsum("hsk,htk->hst", w_uq, w_uk)


def check_core(attempt) -> bool:
    generator = torch.Generator().manual_seed(0)
    w_uq, w_uk = (torch.randn(3, size, 4, generator=generator, dtype=torch.float64) for size in (5, 6))
    return judge(
        attempt,
        [(w_uq, w_uk), (w_uq, w_uk[:, :5])],
        core,
        {
            "query and key have changed places: the core is (head, query, key)": lambda q, k: core(k, q),
            "the heads are summed; each has a slice of its own": lambda q, k: core(q, k).sum(0),
            "the scale belongs to the softmax, not to the tensor": lambda q, k: core(q, k) * q.shape[2] ** -0.5,
        },
        "C_h = W_h^UQ W_h^UK^T, what is left of head h between the two latents",
    )


def gauge(core, key, a):
    return torch.einsum("rst,zt->rsz", core, torch.linalg.inv(a)), key @ a


def check_gauge(attempt) -> bool:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 3, 4), (5, 4), (4, 4)
    inputs = tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)

    def flat(function):
        def both(*arguments):
            result = function(*arguments)
            if result is None or result is Ellipsis:
                return None
            core, key = result
            if core.shape != arguments[0].shape:
                raise ValueError(f"the core keeps its shape {tuple(arguments[0].shape)}; yours has {tuple(core.shape)}")
            return torch.cat([core.reshape(-1), key.reshape(-1)])

        return both

    mistakes = {
        "the core takes the inverse of a, not a itself": lambda c, k, a: (c @ a.T, k @ a),
        "the inverse is transposed: mode 3 of the core is multiplied by a^-1, so its rows meet t": lambda c, k, a: (
            c @ torch.linalg.inv(a),
            k @ a,
        ),
        "the core did not change, so the tensor did": lambda c, k, a: (c, k @ a),
        "nothing changed: the new key factor is key @ a": lambda c, k, a: (c, k),
        "the key factor has changed the wrong way: it should be key @ a": lambda c, k, a: (
            gauge(c, k, torch.linalg.inv(a))[0],
            k @ torch.linalg.inv(a),
        ),
    }
    return judge(
        flat(attempt),
        [inputs],
        flat(gauge),
        {sentence: flat(wrong) for sentence, wrong in mistakes.items()},
        "other weights, the same tensor, the same layer",
        rtol=1e-9,
    )
