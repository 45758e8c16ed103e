"""Beside rung 6. What a cache gives back carries no gradient, and a backward pass that asks for one is refused (PyTorch)."""

import torch


def without_gradient(stored: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """`stored`, whose last tokens are a copy of `new`. A backward pass that asks for the gradient of `new` raises RuntimeError.

    Older tokens belong to calls that are over, so no gradient through a cache would be right. To make a cache without
    `torch.no_grad()` is no fault by itself: weights want gradients, and while a model writes nobody asks for them.

    Args:
        stored: (batch, heads, length, width).
        new: (batch, heads, n, width).

    Returns:
        A view of `stored`.
    """
    return _Stored.apply(stored, new) if torch.is_grad_enabled() and new.requires_grad else stored


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stored, new):
        ctx.n = new.shape[2]
        return stored.data

    @staticmethod
    def backward(ctx, gradient):
        return None, refused(gradient)[:, :, -ctx.n :]


@torch.library.custom_op("tucker_ref::refused", mutates_args=())
def refused(gradient: torch.Tensor) -> torch.Tensor:
    """Raises RuntimeError. An operator of its own, or torch.compile would meet the error while it compiles, asked or not."""
    raise RuntimeError(
        "a gradient is asked for through a cache, which keeps none: call the layer without a cache to train it, "
        "and with a cache inside torch.no_grad()"
    )


@refused.register_fake
def _(gradient):
    return torch.empty_like(gradient)
