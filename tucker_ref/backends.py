"""Rung 4, continued. Attention by a kernel of one's choice: PyTorch's with none other allowed, flex_attention, and ours in Triton.

Each takes what `attend` has checked, and what it cannot do it refuses with a ValueError and the reason.

Threads may call `attend` at once. A forced kernel, and "flex" on a CPU, then run alone, as they set what belongs to the whole process;
attention that others ask PyTorch for directly may see it meanwhile, and so may torch.compile: compile before threads start.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .own_code import with_own_code

FORCED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
BACKENDS = ("reference", "sdpa", *FORCED, "flex", "triton")


class Turns:
    """Whose turn it is, of the threads: any number of them inside `with turns:`, or one inside `with turns.alone():`.

    PyTorch's switches of kernels belong to the whole process, and so do Python's filters of warnings. Two threads that set them at once
    put back each other's settings, and a third that lets PyTorch choose would be told that there is no kernel, or get another one.
    """

    def __init__(self) -> None:
        self._door = threading.Lock()  # shut while a thread is alone, or waits until it is: no others come in meanwhile
        self._room = threading.Lock()  # held by the one that is alone, or by all others together
        self._count, self._inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._door, self._count:
            self._inside += 1
            if self._inside == 1:
                self._room.acquire()

    def __exit__(self, *_) -> None:
        with self._count:
            self._inside -= 1
            if self._inside == 0:
                self._room.release()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        with self._door, self._room:
            yield


turns = Turns()


def forced(sdpa, q, k, v, scale, causal, mask, backend):
    """One kernel of PyTorch's and no other; its own warnings say why it refuses. sdpa: attends by what PyTorch's switches allow."""
    grouped = backend != "efficient"  # which knows no groups
    if torch.compiler.is_dynamo_compiling():  # the choice becomes part of the compiled code, which touches no switches
        with sdpa_kernel(FORCED[backend]):
            return sdpa(q, k, v, scale, causal, mask, grouped)
    with turns.alone(), sdpa_kernel(FORCED[backend]), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return sdpa(q, k, v, scale, causal, mask, grouped)
        except RuntimeError as error:
            reasons = "; ".join(dict.fromkeys(str(w.message).split(" (Triggered")[0] for w in said)) or str(error)
            shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}, {q.dtype} on {q.device}"
            raise ValueError(f"backend {backend!r} refuses {shapes}: {reasons}") from error


def triton(q, k, v, scale, causal, mask):
    """Our kernels: one of them for one query a head that needs no gradient, as while a model writes. It alone takes a mask."""
    from .kernels.decode import decode_attention
    from .kernels.latent_attention import flash_attention

    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if q.shape[2] == 1 and not trained and q.dtype != torch.float64:  # its sums are float32
        return decode_attention(q, k, v, scale=scale, mask=mask)
    if mask is not None:
        raise ValueError(f"backend 'triton' takes no mask with a gradient or in float64; here q is {q.dtype}, {trained = }")
    return flash_attention(q, k, v, scale=scale, causal=causal)


def flex(q, k, v, scale, causal, mask):
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
        return _compiled(flex_attention, q.shape, v.shape)(q, k, v, **options)  # from which k's shape follows
    with turns.alone(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not compiled
        try:
            return flex_attention(q, k, v, **options)
        except NotImplementedError as error:
            raise ValueError(f"backend 'flex' refuses {q.dtype} on {q.device}: {error}") from error


@functools.lru_cache(maxsize=256)
def _compiled(function, *shapes):
    """Apart for these shapes, or the ninth would find no compilation left."""
    return torch.compile(with_own_code(function), dynamic=False, fullgraph=True)  # or an error: never the plain version unseen


def same_layout_back(z: torch.Tensor) -> torch.Tensor:
    """z, (b, h, n, v), whose gradient comes back in the memory layout of z.

    PyTorch (2.11) keeps cuDNN's backward plans by the layouts of q, k and v alone: after a gradient in one layout, the same plan reads
    a gradient in another layout as if it had the first, and its results are wrong without a warning.
    """
    # Tokens before heads, as z lies in most layers: torch.compile makes the gradient of what asks for strides contiguous, and would copy.
    return SameLayoutBack.apply(z.transpose(1, 2)).transpose(1, 2)


class SameLayoutBack(torch.autograd.Function):
    """Nothing forward; backward the gradient in the memory layout of the output, see `same_layout_back`."""

    @staticmethod
    def forward(ctx, z):
        ctx.strides = z.stride()
        return z.view_as(z)

    @staticmethod
    def backward(ctx, dz):
        if dz.stride() == ctx.strides:
            return dz
        return torch.empty_strided(dz.shape, ctx.strides, dtype=dz.dtype, device=dz.device).copy_(dz)
