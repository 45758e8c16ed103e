"""Rung 12j. Ranks for all layers of a model from one budget: a knapsack over their spectra (PyTorch, NumPy).

Each attention tensor of each layer takes one triple of ranks. A triple costs parameters or cache, and loses at most what the HOSVD's
bound says, sum of the three tails over the tensor's square. Both add up over the model, so the best choice is a knapsack with one
item of each kind, which dynamic programming solves: after each tensor, the least loss at every cost.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from ..cached_attention import CachedAttention
from ..checks import check_integer
from .factored_tensor import FactoredTensor, factored_tensors
from .spectra import spectra_of
from .truncation import Ranks

STEPS = 24  # at most so many ranks of a mode are tried
UNITS = 20_000  # a larger budget is counted in parts of this size


@dataclass(frozen=True)
class Choice:
    """One triple of ranks of one tensor.

    Attributes:
        ranks: the triple.
        cost: what it takes of the budget.
        loss: the bound of its squared error, over the tensor's square.
    """

    ranks: Ranks
    cost: int
    loss: float


def choose_model_ranks(
    layers: Sequence[CachedAttention],
    *,
    max_parameters: int | None = None,
    max_cache: int | None = None,
    moments: Sequence[torch.Tensor] | None = None,
) -> list[tuple[Ranks, Ranks]]:
    """Ranks of every layer for a budget of the whole model, with the least sum of relative squared errors that the HOSVD bounds.

    The optimum over the ranks that are tried: all of a mode of up to STEPS, evenly spaced ones of a larger. A budget above UNITS is
    counted in parts, each cost rounded up; it is never exceeded.

    Args:
        layers: any mechanism of this package without norms.
        max_parameters: of all layers together, output biases included.
        max_cache: cached numbers a token, of all layers together.
        moments: (D, D) each, as in `compress`.

    Returns:
        Per layer (head, query, key) before the softmax and (head, output, value) after it.

    Raises:
        ValueError: unless exactly one budget is given, for other numbers of moments than of layers, or if even the smallest ranks
            exceed it.
    """
    given = {"max_parameters": max_parameters, "max_cache": max_cache}
    budgets = [check_integer(name, budget, 0, math.inf) for name, budget in given.items() if budget is not None]
    if len(budgets) != 1:
        raise ValueError("choose_model_ranks needs exactly one of max_parameters and max_cache")
    if moments is not None and len(moments) != len(layers):
        raise ValueError(f"{len(moments)} moments for {len(layers)} layers; each needs its own")
    [budget], items = budgets, []
    for n, layer in enumerate(layers):
        both = factored_tensors(layer, None if moments is None else moments[n])
        items += [choices(tensor, _parameters if max_cache is None else _cached) for tensor in both]
        if max_cache is None and len(both[0].row_basis) > layer.d_model:
            budget -= layer.d_model  # the output bias
    chosen = [choice.ranks for choice in solve(items, budget)]
    return list(zip(chosen[::2], chosen[1::2]))


def _parameters(tensor: FactoredTensor, ranks: Ranks) -> int:
    """Factors and core."""
    (r, s, t), sizes = ranks, (len(tensor.left), len(tensor.row_basis), len(tensor.column_bases[0]))
    return sizes[0] * r + sizes[1] * s + sizes[2] * t + r * s * t


def _cached(tensor: FactoredTensor, ranks: Ranks) -> int:
    return ranks[2]


def choices(tensor: FactoredTensor, cost: Callable[[FactoredTensor, Ranks], int]) -> list[Choice]:
    """Triples of ranks that no other beats in both cost and loss, from the cheapest up.

    Args:
        tensor: one attention tensor.
        cost: of a triple.
    """
    spectrum = spectra_of(tensor)
    modes = [values.cpu().numpy() for values in (spectrum.head, spectrum.rows, spectrum.columns)]
    whole = tensor.squared_norm() or 1.0  # of a tensor of zeros nothing is lost
    lost = [np.append((mode[::-1] ** 2).cumsum()[::-1], 0.0) / whole for mode in modes]  # lost[mode][rank]
    tried = [_steps(len(mode), even=tensor.turns() and n == 2) for n, mode in enumerate(modes)]
    capped = (0, 1) if tensor.turns() else (0, 1, 2)
    found = []
    for r, s, t in product(*tried):
        ranks = (r, s, t)
        if all(ranks[mode] ** 2 <= r * s * t for mode in capped):
            found.append(Choice(ranks, cost(tensor, ranks), float(sum(tail[rank] for tail, rank in zip(lost, ranks)))))
    best: list[Choice] = []
    for choice in sorted(found, key=lambda c: (c.cost, c.loss)):
        if not best or choice.loss < best[-1].loss:
            best.append(choice)
    return best


def _steps(size: int, even: bool) -> list[int]:
    """At most STEPS ranks up to the size, both ends among them; even ones where channels turn in pairs."""
    step = 2 if even else 1
    last = size + size % step
    return sorted({step * round(x / step) for x in np.linspace(step, last, min(STEPS, last // step)).tolist()})


def solve(items: Sequence[Sequence[Choice]], budget: int) -> list[Choice]:
    """One choice of each item, with the least sum of losses whose costs fit the budget.

    Args:
        items: the choices of each, in any order.
        budget: the most that they may cost together.

    Returns:
        One choice an item. Exact where the budget is at most UNITS.

    Raises:
        ValueError: if even the cheapest choices exceed the budget.
    """
    unit = max(1, -(-budget // UNITS))
    size = budget // unit
    least = np.zeros(size + 1)  # least[c]: the least loss of the items so far at a cost of at most c units
    taken = []
    for choices_of_item in items:
        after, which = np.full(size + 1, np.inf), np.zeros(size + 1, dtype=int)
        for n, choice in enumerate(choices_of_item):
            units = -(-choice.cost // unit)
            if units > size:
                continue
            reached = least[: size + 1 - units] + choice.loss
            better = reached < after[units:]
            after[units:][better], which[units:][better] = reached[better], n
        least = after
        taken.append(which)
    if not np.isfinite(least[size]):
        smallest = sum(min(choice.cost for choice in item) for item in items)
        raise ValueError(f"the budget is {budget:,}; even the smallest ranks of all layers take {smallest:,}")
    chosen, left = [], size
    for choices_of_item, which in zip(reversed(items), reversed(taken)):
        chosen.append(choices_of_item[which[left]])
        left -= -(-chosen[-1].cost // unit)
    return chosen[::-1]
