"""The argument checks that every rung shares: each raises a ValueError that says what, where and what is allowed."""

import math

import torch

from .backends import BACKENDS


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


def check_attention(q, k, v, scale, causal, mask, backend) -> None:
    """Raise ValueError unless these arguments of `attend` fit each other."""
    check_rules(causal, mask, backend)
    check_scale(scale)
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_numbers(name, x, q)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4 or 0 in (q.shape[1], k.shape[1]):
        raise ValueError(f"{shapes}: each must be (batch, heads, tokens, width), with at least one head")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3] and q.shape[3] == k.shape[3]):
        raise ValueError(f"{shapes}: batch, key/value heads, source tokens and query/key width must agree")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: {q.shape[1]} query heads cannot be shared out evenly to {k.shape[1]} key/value heads")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"{shapes}: causal attention needs at least as many source tokens as queries")
    check_mask(mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]), q.device)


def check_numbers(name: str, x: torch.Tensor, like: torch.Tensor) -> None:
    """Raise ValueError unless x holds real floating-point numbers of the dtype (but under autocast) and on the device of `like`."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"{name} is {kind}; it must be a tensor of floating-point numbers")
    if x.device != like.device or (x.dtype != like.dtype and not torch.is_autocast_enabled(x.device.type)):
        raise ValueError(f"{name} is {x.dtype} on {x.device}; here it must be {like.dtype} on {like.device}")


def check_rules(causal: bool, mask: torch.Tensor | None, backend: str) -> None:
    """Raise ValueError for an unknown backend, one that takes no mask, or a `causal` that is not a bool."""
    if causal is not True and causal is not False:
        raise ValueError(f"causal is {causal!r}; it must be True or False")
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
    if backend == "triton" and mask is not None:
        raise ValueError("backend 'triton' takes no mask beside the causal rule; 'sdpa', 'efficient' and 'flex' do")


def check_mask(mask: torch.Tensor | None, full: tuple[int, int, int, int], device: torch.device) -> None:
    """Raise ValueError unless the mask is boolean, broadcastable to `full` and on this device."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"mask is {type(mask).__name__}; it must be a boolean tensor")
    fits = mask.ndim <= 4 and all(a == 1 or a == b for a, b in zip(mask.shape[::-1], full[::-1]))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; it must be boolean (True: may look), broadcastable to {full}"
        )
    if mask.device != device:
        raise ValueError(f"mask is on {mask.device}; the tokens are on {device}")
