"""Rung 12f. Which ranks a tensor may have, and which an error or a budget allows (PyTorch)."""

import math

import torch
import torch.nn.functional as F

from ..cached_attention import CachedAttention
from ..checks import as_integer, check_number, check_ranks
from ..costs import tucker_cost
from .factored_tensor import FactoredTensor, factored_tensors
from .spectra import Spectra, spectra_of
from .truncation import Ranks


def check_tensor_ranks(tensor: FactoredTensor, ranks, name: str = "ranks", uncapped=()) -> Ranks:
    """`ranks` as a tuple.  Raises ValueError for ranks beyond the tensor's, or an odd one for channels that turn in pairs.

    uncapped: modes that no product of the other ranks bounds, as in `check_ranks`; turning columns always are.
    """
    turns = tensor.turns()
    channels = sum(right.shape[1] * (2 if group.turns() else 1) for right, group in zip(tensor.rights, tensor.classes))
    if turns:
        channels += channels % 2  # an odd unturned part is filled up with a channel of zeros
    sizes = (len(tensor.left), tensor.left.shape[1], channels)
    head, rows, columns = check_ranks(name, ranks, sizes, uncapped=(*uncapped, 2) if turns else uncapped)
    if turns and columns % 2:
        raise ValueError(f"{name}[2] is {columns}; under rotary embedding channels come in pairs, so it must be even")
    return head, rows, columns


def choose_ranks(
    layer: CachedAttention,
    *,
    relative_error: float | None = None,
    max_parameters: int | None = None,
    max_cache: int | None = None,
    moment: torch.Tensor | None = None,
) -> tuple[Ranks, Ranks]:
    """Ranks for a bound on exactly one thing, by the HOSVD's error bound (De Lathauwer et al. 2000), shared evenly by the modes.

    Args:
        layer: any mechanism of this package without latent norms.
        relative_error: of each tensor.
        max_parameters: of the compressed layer, output bias included; the smallest error that fits.
        max_cache: cached numbers a token, r3 + r~3 (bytes over the bytes of a number); the smallest error that fits.
        moment: (D, D), as in `compress`.

    Returns:
        (head, query, key) before the softmax and (head, output, value) after it.

    Raises:
        ValueError: unless exactly one bound is given, a number of at least 0, or if even the smallest layer exceeds a budget.
    """
    bounds = {"relative_error": relative_error, "max_parameters": max_parameters, "max_cache": max_cache}
    given = [(name, bound) for name, bound in bounds.items() if bound is not None]
    if len(given) != 1:
        raise ValueError("choose_ranks needs exactly one of relative_error, max_parameters and max_cache")
    [(name, bound)] = given
    bound = _check_bound(name, bound)
    tensors = factored_tensors(layer, moment)
    both = [spectra_of(tensor) for tensor in tensors]

    def ranks_at(error: float) -> tuple[Ranks, Ranks]:
        pre, post = (_ranks_for(spectrum, error, tensor.turns()) for spectrum, tensor in zip(both, tensors))
        return pre, post

    if relative_error is not None:
        return ranks_at(bound)

    def fits(error: float) -> bool:
        pre, post = ranks_at(error)
        cost, d = tucker_cost(layer.d_model, layer.n_heads, pre, post), layer.d_model
        if max_cache is not None:
            return cost.cache_per_token <= bound
        # With biases U2, U3 and U~3 have one more row each, and there is an output bias.
        biases = pre[1] + pre[2] + post[2] + d if len(tensors[0].row_basis) > d else 0
        return cost.parameters + biases <= bound

    low, high = 0.0, 3**0.5  # at the upper end every mode may be cut to one
    if not fits(high):
        raise ValueError(f"{name} = {bound}: even the smallest ranks, {ranks_at(high)}, exceed it")
    if fits(low):
        return ranks_at(low)
    for _ in range(60):  # bisection to the last bit
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return ranks_at(high)


def _check_bound(name: str, bound) -> float:
    """The bound, an integer of any size or a float; infinity is none.  Raises ValueError unless it is a number of at least 0."""
    whole = as_integer(bound)
    if whole is not None and whole >= 0:
        return whole
    return check_number(name, bound, 0.0, math.inf, "a number of at least 0")


def _ranks_for(spectrum: Spectra, relative_error: float, even: bool) -> Ranks:
    """The smallest ranks whose tails are each at most a third of the squared error allowed, within what ranks may be.

    even: of columns that turn in pairs, which no product of ranks bounds.
    """
    allowed = min(relative_error, 2.0) ** 2 / 3 * (spectrum.rows**2).sum()
    tails = [  # tails[mode][r]: what rank r discards, nothing at the end
        F.pad((values**2).flip(0).cumsum(0).flip(0), (0, 1)) for values in (spectrum.head, spectrum.rows, spectrum.columns)
    ]
    ranks = [max(1, int((tail > allowed).sum())) for tail in tails]
    if even:
        ranks[2] += ranks[2] % 2
    bounded = (0, 1) if even else (0, 1, 2)
    # No rank may exceed the product of the others. Cut down to it, it would discard more than was allowed; so less is allowed,
    # and ranks grow in the order of what they discard, at most to the tensor's own, which are within each other's product.
    while any(ranks[mode] ** 2 > math.prod(ranks) for mode in bounded):
        discarded = [tail[rank].item() for tail, rank in zip(tails, ranks)]
        mode = discarded.index(max(discarded))
        if discarded[mode] == 0:
            break  # the tensor's own ranks, but for singular values that are rounding errors
        ranks[mode] += 2 if even and mode == 2 else 1
    for mode in bounded:
        ranks[mode] = min(ranks[mode], math.prod(ranks) // ranks[mode])
    return ranks[0], ranks[1], ranks[2]
