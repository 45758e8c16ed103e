"""Rung 4. softmax(Q K^T * scale + mask) V: one function, several backends, all with the meaning of "reference" (PyTorch)."""

import functools
import warnings

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .checks import check_scale

FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = ("reference", "sdpa", *FORCED, "flex", "triton")


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
    Without queries, sources or sequences every backend gives the reference's empty result, or zeros. NaN and infinity stay
    in their own sequence of the batch, all of which they may spoil: a hidden value still counts zero times NaN. Where all of
    a query's logits are NaN, "sdpa" on a CPU yields zeros, as PyTorch's kernel takes them for hidden ones.
    backend: "reference" (plain einsum, the specification); "sdpa" (PyTorch chooses the kernel); "flash", "cudnn", "efficient",
    "math" (that kernel of PyTorch or an error); "flex" (PyTorch's flex_attention); "triton" (our kernel, without a mask).
    Raises ValueError on a shape, dtype, device, scale, mask or backend that does not fit, or a kernel that refuses, with its
    reason.
    """
    _check(q, k, v, scale, causal, mask, backend)
    if backend == "reference" or 0 in (q.shape[0], q.shape[2], k.shape[2]):  # nothing to attend to, which few kernels expect
        return _reference(q, k, v, scale, _allowed(q, k, causal, mask))
    if backend == "triton":
        return _triton(q, k, v, scale, causal)
    if backend == "flex":
        return _flex(q, k, v, scale, causal, mask)
    if backend in FORCED:
        return _forced(q, k, v, scale, causal, mask, backend)
    return _sdpa(q, k, v, scale, causal, mask)


def _sdpa(q, k, v, scale, causal, mask, grouped: bool = True):
    """grouped: whether the kernel may be told that heads share keys; else it sees each key as often as it is used."""
    if scale < 0:  # PyTorch's kernel on a CPU hides with -inf before it scales: the future would be seen, at +inf
        q, scale = -q, -scale
    b, h, n, _ = q.shape
    if n == 1 and mask is None:
        # Decoding: one token sees all sources, so the heads of a group can stand where queries stand, and K and V stay as
        # they are. With grouped heads SDPA may otherwise repeat them in memory.
        z = F.scaled_dot_product_attention(q.reshape(b, k.shape[1], -1, q.shape[3]), k, v, scale=scale)  # (b, g, c, v)
        return z.reshape(b, h, 1, -1)
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
    return SameLayoutBack.apply(z) if z.is_cuda else z


class SameLayoutBack(torch.autograd.Function):
    """Nothing forward; backward the gradient in the memory layout of the output.

    PyTorch (2.11) keeps cuDNN's backward plans by the layouts of q, k and v alone: after a gradient in one layout, the same plan reads
    a gradient in another layout as if it had the first, and its results are wrong without a warning.
    """

    @staticmethod
    def forward(ctx, z):
        ctx.strides = z.stride()
        return z.view_as(z)

    @staticmethod
    def backward(ctx, dz):
        if dz.stride() == ctx.strides:
            return dz
        return torch.empty_strided(dz.shape, ctx.strides, dtype=dz.dtype, device=dz.device).copy_(dz)


def _forced(q, k, v, scale, causal, mask, backend):
    """One kernel of PyTorch's and no other; its own warnings say why it refuses."""
    grouped = backend != "efficient"  # which knows no groups
    if torch.compiler.is_compiling():
        with sdpa_kernel(FORCED[backend]):
            return _sdpa(q, k, v, scale, causal, mask, grouped)
    with sdpa_kernel(FORCED[backend]), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return _sdpa(q, k, v, scale, causal, mask, grouped)
        except RuntimeError as error:
            reasons = "; ".join(dict.fromkeys(str(w.message).split(" (Triggered")[0] for w in said)) or str(error)
            shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {q.dtype} on {q.device}"
            raise ValueError(f"backend {backend!r} refuses {shapes}: {reasons}") from error


def _triton(q, k, v, scale, causal):
    from .kernels.decode import decode_attention
    from .kernels.latent_attention import flash_attention

    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.shape[2] == 1 and not trained and q.dtype != torch.float64:  # its sums are float32
        return decode_attention(q, k, v, scale=scale)
    return flash_attention(q, k, v, scale=scale, causal=causal)


def _flex(q, k, v, scale, causal, mask):
    """PyTorch's flex_attention: compiled to one kernel on a GPU; elsewhere plain, and without a gradient."""
    from torch.nn.attention.flex_attention import flex_attention

    n, m = q.shape[2], k.shape[2]
    full = None if mask is None else mask.expand(q.shape[0], q.shape[1], n, m)

    def keep_allowed(logit, b, h, i, j):
        if causal:
            logit = torch.where(j <= i + m - n, logit, -torch.inf)
        return logit if full is None else torch.where(full[b, h, i, j], logit, -torch.inf)

    options = dict(
        score_mod=keep_allowed if causal or full is not None else None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    if q.is_cuda:
        return _compiled(flex_attention)(q, k, v, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        try:
            return flex_attention(q, k, v, **options)
        except NotImplementedError as error:
            raise ValueError(f"backend 'flex' refuses {q.dtype} on {q.device}: {error}") from error


@functools.cache
def _compiled(function):
    return torch.compile(function, dynamic=False, fullgraph=True)  # or an error: never the plain version unseen


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


def _check(q, k, v, scale, causal, mask, backend):
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
