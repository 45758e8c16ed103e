"""Checks of notebook 05: Tucker Attention built by hand, the core of an MLA, the gauge, sizes."""

import math

import torch

from .common import judge, judge_value


def normal(*shapes) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def logit(query, source, head, core, u1, u2, u3):
    return torch.einsum("d,e,r,rst,ds,et->", query, source, u1[head], core, u2, u3)


def check_logit(attempt) -> bool:
    query, source, core, u1, u2, u3, wide = normal((5,), (5,), (2, 3, 3), (4, 2), (5, 3), (5, 3), (5, 4))
    inputs = [(query, source, head, core, u1, u2, u3) for head in (1, 3)]
    inputs += [(query, source, 1, torch.cat([core, core[:, :, :1] ** 2], dim=2), u1, u2, wide)]
    return judge(
        attempt,
        inputs,
        logit,
        {
            "query and source have changed places: the query meets U2": lambda q, s, *rest: logit(s, q, *rest),
            "a head takes its own row of U1, not all of them": lambda q, s, h, c, u1, u2, u3: logit(
                q, s, 0, c, u1.sum(0, keepdim=True), u2, u3
            ),
            "U1 is missing: the patterns C_r are weighted by row `head` of U1": lambda q, s, h, c, u1, u2, u3: logit(
                q, s, 0, c, torch.ones_like(u1), u2, u3
            ),
            "that is pattern `head` of the core; head and pattern are two things, and U1 joins them": (
                lambda q, s, h, c, u1, u2, u3: logit(q, s, 0, c[h : h + 1], torch.ones_like(u1[:1, :1]), u2, u3)
            ),
            "the core's last two modes are (query, key)": lambda q, s, h, c, u1, u2, u3: logit(q, s, h, c.mT, u1, u2, u3),
        },
        "C_rst times four small sums: no d x d matrix is made",
    )


def output(z, core, u1, u2):
    return torch.einsum("bhnv,uov,hu,do->bnd", z, core, u1, u2)


def check_output(attempt) -> bool:
    inputs = [normal((2, 4, 5, 3), (4, 3, 3), (4, 4), (6, 3)), normal((2, 4, 5, 3), (2, 6, 3), (4, 2), (7, 6))]
    return judge(
        attempt,
        inputs,
        output,
        {
            "the heads are still apart: an output is the sum over all of them": lambda z, c, u1, u2: torch.einsum(
                "bhnv,uov,hu,do->bhnd", z, c, u1, u2
            ),
            "the heads were summed before their cores; each has a core of its own": lambda z, c, u1, u2: torch.einsum(
                "bhnv,uov,ku,do->bnd", z, c, u1, u2
            ),
            "the core is (head, output, value): its last mode meets the mixtures": lambda z, c, u1, u2: output(z, c.mT, u1, u2),
            "U~2 is missing: from the output latent to the output": lambda z, c, u1, u2: torch.einsum(
                "bhnv,uov,hu->bno", z, c, u1
            ),
            "U~1 has a row for each head and a column for each pattern": lambda z, c, u1, u2: output(z, c, u1.T, u2),
        },
        "a core for each head, the sum over heads, then U~2 once",
    )


def check_times(answer) -> bool:
    mistakes = {
        "a special case need not be a small one: count U2, U3 and the core": 0.5,
        "factors as large as the projections, but the core comes on top, mostly zeros": 1,
    }
    right = "2 (12 12 + 2 768 768 + 12 768 768) is seven times 4 768 768; nearly all of it is the core, mostly zeros"
    return judge_value(answer, 7, mistakes, right, rtol=0.01)


def check_patterns(answer) -> bool:
    mistakes = {
        "that cuts into patterns that heads do take: at 2 the error of A is large": 2,
        "that keeps all twelve; in A the columns from 3 on are empty": 12,
        "patterns count from 0 in the picture, ranks from 1": 4,
    }
    return judge_value(answer, 3, mistakes, "A needs three patterns; cut any of B's twelve, and something is lost")


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
