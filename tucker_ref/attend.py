"""Rung 4. softmax(Q K^T * scale + mask) V: one function, several backends, all with the meaning of "reference" (PyTorch)."""

import torch
import torch.nn.functional as F

from . import backends
from .backends import BACKENDS as BACKENDS
from .backends import FORCED, same_layout_back
from .checks import check_attention


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
    """softmax(Q K^T * scale + mask) V: every query attends to every source token, h query heads on g key/value heads.

    Without queries, sources or sequences every backend gives the reference's empty result, or zeros. NaN and infinity stay
    in their own sequence of the batch, all of which they may spoil: a hidden value still counts zero times NaN. Where all of
    a query's logits are NaN, "sdpa" on a CPU yields zeros, as PyTorch's kernel takes them for hidden ones.

    Args:
        q: Queries, (b, h, n, k).
        k: Keys, (b, g, m, k), where g divides h.
        v: Values, (b, g, m, v); they may be wider or narrower than the keys.
        scale: Multiplies the logits; always explicit, because a latent width is not the head width that the paper divides by.
        causal: The last query is the last source token; query j sees the sources up to its own place, j + m - n.
        mask: Boolean, True where a query may look, broadcastable to (b, h, n, m). A query that may look nowhere yields zeros.
        backend: "reference" (plain einsum, the specification); "sdpa" (PyTorch chooses the kernel); "flash", "cudnn",
            "efficient", "math" (that kernel of PyTorch or an error); "flex" (PyTorch's flex_attention); "triton" (our kernel,
            with a mask for a single query alone, the same for all heads, and then without a gradient).

    Returns:
        The values, weighed and summed, (b, h, n, v).

    Raises:
        ValueError: A shape, dtype, device, scale, mask or backend does not fit, or a kernel refuses, with its reason.
    """
    check_attention(q, k, v, scale, causal, mask, backend)
    if backend == "reference" or 0 in (q.shape[0], q.shape[2], k.shape[2]):  # nothing to attend to, which few kernels expect
        return _reference(q, k, v, scale, _allowed(q, k, causal, mask))
    if backend == "triton":
        return backends.triton(q, k, v, scale, causal, mask)
    if backend == "flex":
        return backends.flex(q, k, v, scale, causal, mask)
    if backend in FORCED:
        return backends.forced(_sdpa, q, k, v, scale, causal, mask, backend)
    if torch.compiler.is_dynamo_compiling():  # which knows no locks
        return _sdpa(q, k, v, scale, causal, mask)
    with backends.turns:
        return _sdpa(q, k, v, scale, causal, mask)


def _reference(q, k, v, scale, allowed):
    n_groups, single = k.shape[1], torch.promote_types(q.dtype, torch.float32)
    # As in every kernel, logits of half precision are single: in float16 a product, or a scaled query, may be infinite.
    q = (q.to(single) * scale).unflatten(1, (n_groups, -1))  # (b, g, c, n, k): c query heads share key/value head g
    logits = torch.einsum("bgcnk,bgmk->bgcnm", q, k.to(single)).flatten(1, 2)  # (b, h, n, m)
    if allowed is None:
        weights = logits.softmax(dim=-1)
    else:
        # A row with no source would be 0/0: leave it unmasked, so that its gradient stays finite, and zero it afterwards.
        empty = ~allowed.any(dim=-1, keepdim=True)
        weights = logits.masked_fill(~(allowed | empty), -torch.inf).softmax(dim=-1).masked_fill(empty, 0.0)
    weights = weights.to(v.dtype).unflatten(1, (n_groups, -1))  # (b, g, c, n, m)
    return torch.einsum("bgcnm,bgmv->bgcnv", weights, v).flatten(1, 2)  # (b, h, n, v)


def _allowed(q, k, causal, mask):
    """The boolean mask of all rules together, broadcastable to (b, h, n, m), or None where everything is allowed."""
    if not causal:
        return mask
    n, m = q.shape[2], k.shape[2]
    triangle = torch.ones(n, m, dtype=torch.bool, device=q.device).tril(diagonal=m - n)
    return triangle if mask is None else triangle & mask


def _sdpa(q, k, v, scale, causal, mask, grouped: bool = True):
    """grouped: whether the kernel may be told that heads share keys; else it sees each key as often as it is used."""
    if scale < 0:  # PyTorch's kernel on a CPU hides with -inf before it scales: the future would be seen, at +inf
        q, scale = -q, -scale
    b, h, n, _ = q.shape
    if n == 1 and (mask is None or mask.ndim < 3 or mask.shape[-3] == 1):
        # Decoding: one token sees all sources, so the heads of a group can stand where queries stand, and K and V stay as
        # they are. With grouped heads SDPA may otherwise repeat them in memory.
        q, allowed = q.reshape(b, k.shape[1], -1, q.shape[3]), None if mask is None else torch.atleast_2d(mask)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=scale).reshape(b, h, 1, -1)  # from (b, g, c, v)
    # SDPA's own causal flag aligns the first query with the first source, and refuses a mask beside it. Branches in place of
    # conditions as arguments: while a layer is compiled, sizes may be symbols.
    allowed, triangle, sharing = None, causal, False
    if mask is not None or n != k.shape[2]:
        allowed, triangle = _allowed(q, k, causal, mask), False
        allowed = None if allowed is None else torch.atleast_2d(allowed)
    if h != k.shape[1]:
        sharing = grouped
        if not grouped:  # a view without copies where all heads share one key, as in Tucker Attention
            k, v = (x.unsqueeze(2).expand(-1, -1, h // x.shape[1], -1, -1).flatten(1, 2) for x in (k, v))
    z = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, is_causal=triangle, scale=scale, enable_gqa=sharing)
    return same_layout_back(z) if z.is_cuda else z
