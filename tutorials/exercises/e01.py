"""Checks of notebook 01: attention is two tensors."""

import numpy as np

from tucker_ref import mode_product, post_softmax_tensor

from .common import judge, judge_value

RNG = np.random.default_rng(0)
X = RNG.standard_normal((4, 4))  # as many tokens as channels, where a wrong order does not show in the shape
W_PRE = RNG.standard_normal((3, 4, 4))


def check_logits(attempt) -> bool:
    def logits(w_pre, x, scale):
        return mode_product(mode_product(w_pre, x, 1), x, 2) * scale

    mistakes = {
        "query and key are exchanged: the query token comes second, the source token last": (
            lambda w, x, scale: logits(w, x, scale).transpose(0, 2, 1)
        ),
        "the scale is missing": lambda w, x, scale: logits(w, x, 1.0),
        "the scale multiplies; you divide by it": lambda w, x, scale: logits(w, x, 1 / scale),
        "the heads are summed; each keeps its own logits": lambda w, x, scale: logits(w, x, scale).sum(axis=0),
    }
    inputs = [(W_PRE, X, 0.5), (RNG.standard_normal((2, 5, 5)), RNG.standard_normal((7, 5)), 0.3)]
    return judge(attempt, inputs, logits, mistakes, "one (query, source) table per head")


def check_post(attempt) -> bool:
    mistakes = {
        "the transpose is missing: a slice must be (output, value), and W_V W_O is (value, output)": (
            lambda w_v, w_o: np.einsum("hdk,hke->hde", w_v, w_o)
        ),
        "the heads are summed; stack them": lambda w_v, w_o: post_softmax_tensor(w_v, w_o).sum(axis=0),
        "these are matrices of one head beside the other; the head mode comes first": lambda w_v, w_o: np.moveaxis(
            post_softmax_tensor(w_v, w_o), 0, -1
        ),
    }
    inputs = [(RNG.standard_normal((3, 6, 2)), RNG.standard_normal((3, 2, 6)))]
    return judge(attempt, inputs, post_softmax_tensor, mistakes, "slice h is the transpose of W_h^V W_h^O")


def check_eq6(attempt) -> bool:
    def eq6(h1, h2):
        return np.einsum("hnm,hdm->nd", h1, h2)

    mistakes = {
        "this is (d, n): token first, channel second": lambda h1, h2: eq6(h1, h2).T,
        "the heads are still apart: sum over them too": lambda h1, h2: np.einsum("hnm,hdm->hnd", h1, h2),
        "the heads are averaged; Eq. 6 sums them": lambda h1, h2: eq6(h1, h2) / len(h1),
        "H1 is transposed: sum over its *last* index, the source token": lambda h1, h2: np.einsum("hmn,hdm->nd", h1, h2),
    }
    h1 = RNG.random((3, 5, 5))
    return judge(attempt, [(h1, RNG.standard_normal((3, 7, 5)))], eq6, mistakes, "summed over heads and source tokens")


def check_table(attempt) -> bool:
    def table(n_letters, n_positions, strength):
        w = np.zeros((n_letters + n_positions,) * 2)
        w[n_letters:, n_letters] = strength
        return w

    mistakes = {
        "rows are queries and columns are keys; here the first position looks at everybody": (lambda *sizes: table(*sizes).T),
        "that is the first *letter* of the alphabet; positions come after the letters": lambda a, p, s: np.where(
            np.arange(a + p) == 0, s * (np.arange(a + p) >= a)[:, None], 0.0
        ),
        "only the first position looks at the first position; every position shall": lambda a, p, s: (
            table(a, p, s) * (np.arange(a + p) == a)[:, None]
        ),
        "the strength is missing": lambda a, p, s: table(a, p, 1.0),
    }
    inputs = [(5, 11, 20.0), (3, 4, 7.0)]
    return judge(attempt, inputs, table, mistakes, "whatever the letters, all look at the first token")


def check_freedom(answer) -> bool:
    h, d, k = 12, 768, 64
    mistakes = {
        "that is one side only: there is an A between query and key and a B between value and output": h * k**2,
        "that is one head; there are twelve": 2 * k**2,
        "that is one head and one side": k**2,
        "A and B are d_H x d_H, not d_H x d: they stand between the two factors": 2 * h * d * k,
        "that is all parameters; how many of them do nothing?": 4 * h * d * k,
    }
    return judge_value(answer, 2 * h * k**2, mistakes, "2 n_H d_H^2 numbers only choose a basis; that is 1/24 of the layer")


def check_exchange(answer) -> bool:
    mistakes = {
        "that is 'same': the table of previous has nothing on its diagonal, and its transpose has nothing there either": 1,
        "that is what it did before: p looks for p - 1. Exchanged, p - 1 looks for p": 3,
    }
    return judge_value(answer, 2, mistakes, "p - 1 looks for p: everybody looks at the next token")


def check_features(answer) -> bool:
    mistakes = {
        "nobody looks for the last position: no token has it as the previous one": 11,
        "each position looks for another one, so one feature cannot serve them all": 1,
        "that is the key rank of all heads together; how many are new?": 15,
        "positions are no letters: what a query looks for must be among the key features": 0,
    }
    return judge_value(answer, 10, mistakes, "the positions 0 to 9; the key rank becomes 15")
