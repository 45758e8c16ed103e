"""Checks of notebook 00: tensors, unfoldings and the Tucker decomposition."""

import math

import numpy as np

from tucker_ref import fold, mode_product, unfold

from .common import judge, judge_value

RNG = np.random.default_rng(0)
TENSOR = RNG.standard_normal((3, 4, 5))
CUBE = RNG.standard_normal((4, 4, 4))  # where a wrong order does not show in the shape


def check_unfold(attempt) -> bool:
    mistakes = {
        "the mode comes first, as rows; you have it as columns": lambda t, n: unfold(t, n).T,
        "a bare reshape cuts the rows of memory apart: first move the mode to the front": lambda t, n: t.reshape(
            t.shape[n], -1
        ),
        "these are Kolda & Bader's columns, in another order: here the last of the other modes runs fastest": (
            lambda t, n: np.moveaxis(t, n, 0).reshape(t.shape[n], -1, order="F")
        ),
        "swapping the mode with the first also moves the first: use moveaxis": lambda t, n: t.swapaxes(0, n).reshape(
            t.shape[n], -1
        ),
    }
    return judge(attempt, [(TENSOR, mode) for mode in (1, 2, 0)], unfold, mistakes, "one row per index of the mode")


def check_mode_product(attempt) -> bool:
    def mistaken_order(t, m, n):
        return np.moveaxis(mode_product(t, m, n), n, 0)

    def unfolded(t, m, n):
        return m @ unfold(t, n)

    def right_side(t, m, n):
        return fold((unfold(t, n).T @ m).T, n, t.shape)

    mistakes = {
        "the new mode must go back to its place: fold with the new shape": mistaken_order,
        "this is still unfolded: fold it back": unfolded,
        "the matrix acts from the left, M T_(n); you applied its transpose": right_side,
    }
    inputs = [(CUBE, RNG.standard_normal((4, 4)), 1), (TENSOR, RNG.standard_normal((2, 4)), 1)]
    inputs.append((TENSOR, RNG.standard_normal((6, 5)), 2))
    return judge(attempt, inputs, mode_product, mistakes, "unfold, multiply, fold back with the new size")


def check_size(attempt) -> bool:
    def factors(shape, ranks):
        return sum(size * rank for size, rank in zip(shape, ranks))

    mistakes = {
        "that is the factors; the core is stored too": factors,
        "that is the core; the factors are stored too": lambda shape, ranks: math.prod(ranks),
        "that is the full tensor": lambda shape, ranks: math.prod(shape),
        "one factor per mode, and their sizes add up": lambda shape, ranks: (
            math.prod(ranks) + math.prod(size * rank for size, rank in zip(shape, ranks))
        ),
    }
    inputs = [((12, 768, 768), (8, 128, 64)), ((64, 8, 8), (16, 6, 6))]
    return judge(attempt, inputs, lambda s, r: factors(s, r) + math.prod(r), mistakes, "core and one factor per mode")


def check_rank(attempt) -> bool:
    def sigma(t, mode):
        return np.linalg.svd(unfold(t, mode), compute_uv=False)

    def smallest(energies, limit):
        tails = np.append(np.cumsum(energies[::-1])[::-1], 0.0)  # tails[r]: after the first r
        return int(np.argmax(tails <= limit))

    def rank(t, mode, eps):
        return smallest(sigma(t, mode) ** 2, eps**2 * (t**2).sum() / 3)

    mistakes = {
        "one too many: sigma[r:] is what is left after the first r": lambda t, mode, eps: rank(t, mode, eps) + 1,
        "one too few: sigma[r:] is what is left after the first r": lambda t, mode, eps: rank(t, mode, eps) - 1,
        "the tail is a sum of *squared* singular values": lambda t, mode, eps: smallest(
            sigma(t, mode), eps * np.linalg.norm(t) / 3**0.5
        ),
        "do not forget to divide by 3: three modes share the error": lambda t, mode, eps: smallest(
            sigma(t, mode) ** 2, eps**2 * (t**2).sum()
        ),
        "that counts single singular values above the limit; the tail adds up all that follow": lambda t, mode, eps: int(
            (sigma(t, mode) ** 2 > eps**2 * (t**2).sum() / 3).sum()
        ),
    }
    sizes = (10, 12, 14)
    decaying = np.random.default_rng(1).standard_normal(sizes)
    for mode, size in enumerate(sizes):
        decaying = mode_product(decaying, np.diag(0.8 ** np.arange(size)), mode)
    inputs = [(decaying, 1, 0.5), (decaying, 2, 0.2), (decaying, 0, 0.1)]
    return judge(attempt, inputs, rank, mistakes, "three such ranks keep the relative error below epsilon")


def check_order(answer) -> bool:
    mistakes = {"the product that comes first stands nearest to the tensor, as in Q (P x)": 1}
    return judge_value(answer, 2, mistakes, "each fibre x becomes Q (P x), and that is (Q P) x")


def check_cut(answer) -> bool:
    mistakes = {
        "eight rows are few already, and a quarter of them is two: see how much stands to the right of 2": 2,
        "eight columns are few already, and a quarter of them is two: see how much stands to the right of 2": 3,
    }
    right = "after 16 of 64 values the neuron curve lies nearly at zero; the shuffled one does not"
    return judge_value(answer, 1, mistakes, right)
