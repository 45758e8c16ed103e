"""Rung 4. softmax(Q K^T * scale + mask) V: one function, several backends, all with the meaning of "reference" (PyTorch)."""

import torch
import torch.nn.functional as F

from .checks import check_scale, check_tokens

BACKENDS = ("reference", "sdpa")


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    backend: str = "sdpa",
) -> torch.Tensor:
    """Attention of every query to every source token, h query heads on g key/value heads (g divides h).

    q: (b, h, n, k); k: (b, g, m, k); v: (b, g, m, v); key and value widths may differ.  Returns: (b, h, n, v).
    scale: multiplies the logits; always explicit, because a latent width is not the head width that the paper divides by.
    causal: the last query is the last source token; query j sees the sources up to its own place, j + m - n.
    mask: boolean, True where a query may look, broadcastable to (b, h, n, m). A query that may look nowhere yields zeros.
    backend: "reference" (plain einsum, the specification) or "sdpa" (PyTorch chooses the kernel).
    Raises ValueError on a shape, scale, mask or backend that does not fit.
    """
    _check(q, k, v, scale, causal, mask, backend)
    if backend == "reference":
        return _reference(q, k, v, scale, _allowed(q, k, causal, mask))
    b, h, n, _ = q.shape
    if n == 1 and mask is None:
        # Decoding: one token sees all sources, so the heads of a group can stand where queries stand, and K and V stay as
        # they are. With grouped heads SDPA may otherwise repeat them in memory.
        z = F.scaled_dot_product_attention(q.reshape(b, k.shape[1], -1, q.shape[3]), k, v, scale=scale)  # (b, g, c, v)
        return z.reshape(b, h, 1, -1)
    # SDPA's own causal flag aligns the first query with the first source, and refuses a mask beside it.
    square = q.shape[2] == k.shape[2] and mask is None
    allowed = None if square else _allowed(q, k, causal, mask)
    if allowed is not None:
        allowed = torch.atleast_2d(allowed)
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=causal and square, scale=scale, enable_gqa=grouped
    )


def _reference(q, k, v, scale, allowed):
    n_groups = k.shape[1]
    q = q.unflatten(1, (n_groups, -1))  # (b, g, c, n, k): c query heads share key/value head g
    logits = torch.einsum("bgcnk,bgmk->bgcnm", q, k).flatten(1, 2) * scale  # (b, h, n, m)
    if allowed is None:
        weights = logits.softmax(dim=-1)
    else:
        # A row with no source would be 0/0: leave it unmasked, so that its gradient stays finite, and zero it afterwards.
        empty = ~allowed.any(dim=-1, keepdim=True)
        weights = logits.masked_fill(~(allowed | empty), -torch.inf).softmax(dim=-1).masked_fill(empty, 0.0)
    weights = weights.unflatten(1, (n_groups, -1))  # (b, g, c, n, m)
    return torch.einsum("bgcnm,bgmv->bgcnv", weights, v).flatten(1, 2)  # (b, h, n, v)


def _allowed(q, k, causal, mask):
    """The boolean mask of all rules together, broadcastable to (b, h, n, m), or None where everything is allowed."""
    if not causal:
        return mask
    n, m = q.shape[2], k.shape[2]
    triangle = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(diagonal=m - n)
    return triangle if mask is None else triangle & mask


def check_call(layer, x: torch.Tensor, mask: torch.Tensor | None, backend: str, cache) -> None:
    """What a layer checks before it touches its cache, so that a refused call leaves the cache as it was."""
    check_tokens(x, layer.d_model)
    _check_backend(backend)
    batch, n = x.shape[:2]
    _check_mask(mask, (batch, layer.n_heads, n, n if cache is None else cache.length + n))


def _check(q, k, v, scale, causal, mask, backend):
    _check_backend(backend)
    check_scale(scale)
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"{shapes}: each must be (batch, heads, tokens, width)")
    if not (q.shape[0] == k.shape[0] == v.shape[0] and k.shape[1:3] == v.shape[1:3] and q.shape[3] == k.shape[3]):
        raise ValueError(f"{shapes}: batch, key/value heads, source tokens and query/key width must agree")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}: {q.shape[1]} query heads cannot be shared out evenly to {k.shape[1]} key/value heads")
    if causal and q.shape[2] > k.shape[2]:
        raise ValueError(f"{shapes}: causal attention needs at least as many source tokens as queries")
    _check_mask(mask, (q.shape[0], q.shape[1], q.shape[2], k.shape[2]))


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")


def _check_mask(mask: torch.Tensor | None, full: tuple[int, int, int, int]) -> None:
    if mask is None:
        return
    fits = mask.ndim <= 4 and all(a == 1 or a == b for a, b in zip(mask.shape[::-1], full[::-1]))
    if mask.dtype != torch.bool or not fits:
        raise ValueError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; it must be boolean (True: may look), broadcastable to {full}"
        )
