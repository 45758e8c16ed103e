"""The argument checks that every rung shares: each raises a ValueError that says what, where and what is allowed."""

import math


def check_positive(name: str, value: int) -> None:
    """Raise ValueError unless `value` is an integer of at least 1 (bool does not count as one)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least 1")


def check_scale(scale: float) -> None:
    """Raise ValueError unless the softmax scale is a finite, non-zero number."""
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < abs(scale) < math.inf:
        raise ValueError(f"scale is {scale!r}; it must be finite and not zero (the paper's choice is 1/sqrt(d_H))")


def check_tokens(x, d_model: int) -> None:
    """Raise ValueError unless x is a batch of token sequences, shape (B, N, d_model)."""
    shape = tuple(getattr(x, "shape", ()))
    if len(shape) != 3 or shape[-1] != d_model:
        raise ValueError(f"x has shape {shape}; it must be (batch, tokens, d_model) with d_model = {d_model}")


def check_ranks(name: str, ranks, sizes: tuple[float, ...], uncapped=()) -> tuple[int, ...]:
    """Return `ranks` as a tuple, or raise ValueError.

    A Tucker rank may exceed neither the size of its mode nor the product of the other ranks: a larger one only adds
    redundant parameters. `uncapped` names modes exempt from the second rule (a key latent that values share, say).
    """
    try:
        ranks = tuple(ranks)
    except TypeError:
        raise ValueError(f"{name} is {ranks!r}; it must be {len(sizes)} integers, one per mode") from None
    if len(ranks) != len(sizes):
        raise ValueError(f"{name} is {ranks!r}; it must be {len(sizes)} integers, one per mode of a tensor of sizes {sizes}")
    for mode, rank in enumerate(ranks):
        check_positive(f"{name}[{mode}]", rank)
    for mode, (rank, size) in enumerate(zip(ranks, sizes)):
        others = math.prod(ranks) // rank
        limit = size if mode in uncapped else min(size, others)
        if rank > limit:
            raise ValueError(
                f"{name}[{mode}] is {rank}; with {name} = {ranks} it may be at most {limit}: "
                f"the smaller of the mode's size {size} and the product of the other ranks {others}"
            )
    return ranks
