"""Checks of notebook 02: multi-head attention in PyTorch."""

import torch

from tucker_ref import MultiHeadAttention, attend

from .common import judge, judge_value

GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def check_split_heads(attempt) -> bool:
    mistakes = {
        "the heads come before the tokens: (b, h, n, k)": lambda x, h: x.unflatten(-1, (h, -1)),
        "a reshape alone mixes tokens and heads: first split the channels, then exchange the two middle axes": (
            lambda x, h: x.reshape(len(x), h, x.shape[1], -1)
        ),
        "head h is a *run* of k channels; you dealt the channels out in turn": lambda x, h: x.unflatten(-1, (-1, h)).permute(
            0, 3, 1, 2
        ),
    }
    inputs = [(normal(2, 5, 12), 3), (normal(1, 4, 16), 4)]
    return judge(attempt, inputs, lambda x, h: x.unflatten(-1, (h, -1)).transpose(1, 2), mistakes, "head h, token n")


def check_attend(attempt) -> bool:
    def wrong(axis=-1, transposed=False):
        def run(q, k, v, scale):
            logits = torch.einsum("bhnk,bhmk->bhnm", q, k) * scale
            return torch.einsum("bhnm,bhmv->bhnv", logits.softmax(axis), v)

        return run

    mistakes = {
        "the softmax runs over the queries; each *query* shares out one unit of attention over the sources": wrong(axis=2),
        "the softmax runs over the heads": wrong(axis=1),
        "the scale is missing": lambda q, k, v, scale: attend(q, k, v, scale=1.0),
        "the scale must come before the softmax": lambda q, k, v, scale: attend(q, k, v, scale=1.0) * scale,
        "you divide by the scale": lambda q, k, v, scale: attend(q, k, v, scale=1 / scale),
        "the scale is an argument; you used 1/sqrt(width of the query)": lambda q, k, v, scale: attend(
            q, k, v, scale=q.shape[-1] ** -0.5
        ),
        "the softmax is missing": lambda q, k, v, scale: torch.einsum("bhnk,bhmk,bhmv->bhnv", q, k, v) * scale,
    }
    inputs = [(normal(2, 3, 5, 4), normal(2, 3, 5, 4), normal(2, 3, 5, 4), 0.7)]
    inputs.append((normal(1, 2, 3, 4), normal(1, 2, 7, 4), normal(1, 2, 7, 6), 0.3))
    return judge(attempt, inputs, lambda q, k, v, scale: attend(q, k, v, scale=scale), mistakes, "softmax over the sources")


def check_causal(attempt) -> bool:
    def mask(n, m, shift=0):
        return torch.ones(n, m).tril(m - n + shift).bool()

    mistakes = {
        "that hides the past and shows the future": lambda n, m: ~mask(n, m),
        "a token may look at itself": lambda n, m: mask(n, m, -1),
        "with more sources than queries the *last* query stands at the last source; you aligned the first ones": (
            lambda n, m: torch.ones(n, m).tril().bool()
        ),
        "rows are queries, columns are sources": lambda n, m: mask(n, m).T,
    }

    def booleans(n, m):
        result = attempt(n, m)
        if isinstance(result, torch.Tensor) and result.dtype != torch.bool:
            raise TypeError(f"a mask is boolean, True where a query may look; yours is {result.dtype}")
        return result

    inputs = [(4, 4), (3, 8), (1, 5)]
    return judge(booleans, inputs, mask, mistakes, "query j sees the sources up to j + m - n")


def check_tensor(attempt) -> bool:
    def weights(layer):
        return layer.q_proj.weight.detach(), layer.k_proj.weight.detach(), layer.n_heads

    def tensor(layer):
        q, k, h = weights(layer)
        return torch.einsum("hkd,hke->hde", q.unflatten(0, (h, -1)), k.unflatten(0, (h, -1)))

    def dealt(layer):
        q, k, h = weights(layer)
        return torch.einsum("khd,khe->hde", q.unflatten(0, (-1, h)), k.unflatten(0, (-1, h)))

    def columns(layer):
        q, k, h = weights(layer)
        return torch.einsum("dhk,ehk->hde", q.unflatten(1, (h, -1)), k.unflatten(1, (h, -1)))

    mistakes = {
        "a Linear's weight is (out, in): the heads are runs of *rows*; you cut its columns": columns,
        "head h is a *run* of k rows; you dealt them out in turn": dealt,
        "query and key are exchanged": lambda layer: tensor(layer).mT,
        "the heads are summed; stack them": lambda layer: tensor(layer).sum(dim=0),
        "the scale is not part of W": lambda layer: tensor(layer) * layer.scale,
    }
    return judge(attempt, [(MultiHeadAttention(12, 3),)], tensor, mistakes, "W_h = W_h^Q W_h^K^T from the layer's weights")


def check_sources(answer) -> bool:
    mistakes = {
        "64 would be equal weights; but the logits have a standard deviation of 16, and the softmax takes exponentials": 64,
        "with logits 16 apart, the second weight is a ten-millionth of the first": 8,
    }
    return judge_value(answer, 1, mistakes, "between one and two: the softmax has become a choice", rtol=0.1)


def check_ones(answer) -> bool:
    mistakes = {
        "that is one head; there are three": 8,
        "that is a whole slice; most of it is white": 24 * 24,
        "that is the whole core; most of it is white": 3 * 24 * 24,
        "only channels of the same number meet, not all channels of a head": 3 * 8 * 8,
    }
    return judge_value(answer, 24, mistakes, "one for each channel of each head; the rest only says who is not meant")
