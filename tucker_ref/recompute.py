"""Beside rung 10. Less memory in training, with any stock kernel: the queries of all heads are made again in the backward pass.

Between its forward and its backward pass a layer keeps what the gradients need. For Tucker Attention most of that is what every head
has of its own: queries (b, h, n, t) and outputs (b, h, n, v), while the latents P, K and V are no wider than a few heads together.
The outputs are dear, since attention made them. The queries are cheap: one small product Q_h = P T_h, and a rotation.

So `queries_made_again` keeps the latents and what the kernel gave back, its output and the logarithms of its sums, and drops the rest.
Multi-head attention has no latents: queries, keys and values come from x again, three products as large as the layer's fourth.

PyTorch calls this selective activation checkpointing: torch.compile knows it too, and does not undo it. A kernel that is not in KEPT, as
"math", "reference" and "flex", is run again as well: right, but slower.
"""

import functools
from collections.abc import Callable

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

_ATEN = torch.ops.aten
KEPT = [
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
]


def queries_made_again(attention: Callable[..., torch.Tensor], *latents, when: bool = True) -> torch.Tensor:
    """attention(*latents), of which the backward pass finds the latents and the kernel's results, and makes all else again.

    Args:
        attention: makes queries from the latents and attends. Nothing in it is random, and it changes nothing outside.
        latents: tensors, which are kept, and whatever else it takes.
        when: otherwise attend and keep all, as without gradients.

    Returns:
        What `attention` returns.

    Raises:
        RuntimeError: in the backward pass, if PyTorch may choose among other kernels by then, as outside a `with sdpa_kernel(...)`
            that the forward pass was inside of; and in a second one, as after retain_graph=True: the first lets the kernel's results go.
    """
    if not (when and torch.is_grad_enabled()):
        return attention(*latents)
    kept = functools.partial(create_selective_checkpoint_contexts, KEPT)
    return checkpoint(
        _under_the_same_switches(attention), *latents, use_reentrant=False, preserve_rng_state=False, context_fn=kept
    )


def _under_the_same_switches(attention: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The same for two calls, that of the forward pass and that of its one backward pass, at which the same kernels are allowed."""
    seen: list[tuple[bool, ...]] = []

    def attend(*latents) -> torch.Tensor:
        if not torch.compiler.is_dynamo_compiling():  # then kernels are chosen for good
            seen.append(_switches())
            if len(seen) > 2:
                raise RuntimeError(
                    "recompute: one backward pass only, even with retain_graph=True; keep all with recompute = False"
                )
            if seen[0] != seen[-1]:
                raise RuntimeError(
                    "recompute: the backward pass must see the kernels of the forward pass; put it inside the same sdpa_kernel"
                )
        return attention(*latents)

    return attend


def _switches() -> tuple[bool, ...]:
    """Which kernels PyTorch may choose."""
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()


def laid_by_token(x: torch.Tensor) -> torch.Tensor:
    """The same (b, h, n, k), with the heads of one token side by side in memory, as the product after attention reads them.

    A kernel lays its output as its queries lie. If heads lie apart, that product copies the output first, and both are kept.
    """
    return x.transpose(1, 2).contiguous().transpose(1, 2)
