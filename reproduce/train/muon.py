"""Muon, an optimiser for matrices, here for the slices of tensors too.

Muon (Jordan 2024) replaces each matrix's momentum by the nearest orthogonal matrix, nearly: five steps of a Newton-Schulz
iteration. Here its update has the size of AdamW's (Liu et al. 2025), so one grid of learning rates serves both.
`torch.optim.Muon` is the specification; this one multiplies matrices of one shape as one batch, and takes the cores of Tucker
Attention, which are of third order. A core (r, s, t) is r matrices: its slices C_r stand where W^Q W^K^T of a head stands, between
a query and a key latent, so each is orthogonalised by itself. An unfolding (r s, t) would share one budget among all of them.
"""

import itertools
from collections.abc import Iterable

import torch
from torch import nn

from .distributed import is_sharded, sharded_like

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the iteration, as torch.optim.Muon has them


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon(adjust_lr_fn="match_rms_adamw") for matrices, and for the slices of tensors (..., rows, columns).

    Args:
        params: each of at least two dimensions; the last two are its matrices.
        lr: the learning rate, on AdamW's scale.
        weight_decay: share of the weights that a step of rate 1 takes away, decoupled.
        momentum: of the gradients' running mean; steps look ahead (Nesterov).

    Raises:
        ValueError: for a parameter without rows and columns.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.1, momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for parameter in itertools.chain(*(group["params"] for group in self.param_groups)):
            if parameter.ndim < 2:
                raise ValueError(f"Muon got a parameter of shape {tuple(parameter.shape)}; it needs rows and columns")

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient.

        Args:
            closure: computes the loss and its gradients anew, if it is given.

        Returns:
            What `closure` returns, if it is given.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            means = [self.state[p]["momentum_buffer"] for p in params]
            torch._foreach_lerp_(means, grads, 1 - group["momentum"])
            # One by one: before torch 2.12 DTensor has no torch._foreach_lerp.
            ahead = [grad.lerp(mean, group["momentum"]) for grad, mean in zip(grads, means)]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            for parameter, update in zip(params, orthogonal(ahead)):
                size = 0.2 * max(parameter.shape[-2:]) ** 0.5  # AdamW's root mean square, whatever the shape
                parameter.add_(sharded_like(parameter, update), alpha=-group["lr"] * size)
        return loss


def orthogonal(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Every matrix of the last two dimensions made nearly orthogonal, those of one shape in one batch, wide ones transposed.

    Args:
        tensors: (..., rows, columns) each, sharded or not.

    Returns:
        The same shapes, whole, in the tensors' dtype.
    """
    tensors = [x.full_tensor() if is_sharded(x) else x for x in tensors]
    batches: dict[tuple, list[int]] = {}
    for number, x in enumerate(tensors):
        batches.setdefault((*sorted(x.shape[-2:]), x.device), []).append(number)
    results = list(tensors)
    for numbers in batches.values():
        flat = [_wide(tensors[n]).flatten(0, -3) if tensors[n].ndim > 2 else _wide(tensors[n])[None] for n in numbers]
        batch = torch.cat(flat)  # (matrices, short side, long side)
        # bfloat16 is enough, and what the tensor cores multiply; float64, where somebody asks for it, is kept.
        whole = newton_schulz(batch if batch.dtype == torch.float64 else batch.bfloat16())
        for n, part in zip(numbers, whole.split([len(x) for x in flat])):
            x = tensors[n]
            tall = x.shape[-2] > x.shape[-1]
            results[n] = (part.mT if tall else part).reshape(x.shape).to(x.dtype)
    return results


def _wide(x: torch.Tensor) -> torch.Tensor:
    """With the shorter side first."""
    return x.mT if x.shape[-2] > x.shape[-1] else x


def newton_schulz(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Singular values pushed towards 1: they end between 0.7 and 1.2.

    Args:
        x: (batch, short side, long side).
        steps: of the iteration.

    Returns:
        The same shape.
    """
    a, b, c = COEFFICIENTS
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)  # all at most 1
    for _ in range(steps):
        gram = x @ x.mT  # (batch, short, short)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
