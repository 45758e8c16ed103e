"""Rung 7. Multi-head attention (Vaswani et al. 2017): every head has its own queries, keys and values (PyTorch)."""

import torch
from torch import nn

from .attend import attend
from .checks import check_positive, check_tokens


class MultiHeadAttention(nn.Module):
    """y = sum over heads of softmax(Q_h K_h^T / sqrt(d_H)) V_h W_h^O.

    d_model: d; n_heads: n_H; head_dim: d_H, by default d / n_H.
    Raises ValueError if a size is not positive, or if n_heads does not divide d_model and no head_dim is given.
    """

    def __init__(self, d_model: int, n_heads: int, *, head_dim: int | None = None):
        super().__init__()
        self.d_model, self.n_heads, self.head_dim = d_model, n_heads, resolve_head_dim(d_model, n_heads, head_dim)
        self.scale = self.head_dim**-0.5
        inner = n_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, inner, bias=False)
        self.k_proj = nn.Linear(d_model, inner, bias=False)
        self.v_proj = nn.Linear(d_model, inner, bias=False)
        self.o_proj = nn.Linear(inner, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, output_gain: float = 1.0) -> None:
        """GPT-2's initialisation: normal weights. Deep models pass output_gain = 1/sqrt(2 L) to tame the residual sum."""
        for projection in (self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=std)
        nn.init.normal_(self.o_proj.weight, std=std * output_gain)

    def forward(
        self, x: torch.Tensor, *, causal: bool = True, mask: torch.Tensor | None = None, backend: str = "sdpa"
    ) -> torch.Tensor:
        """x: (b, n, d), mask and backend as in `attend`.  Returns: (b, n, d)."""
        check_tokens(x, self.d_model)
        q = split_heads(self.q_proj(x), self.head_dim)  # (b, h, n, k)
        k = split_heads(self.k_proj(x), self.head_dim)  # (b, h, m, k)
        v = split_heads(self.v_proj(x), self.head_dim)  # (b, h, m, k)
        z = attend(q, k, v, scale=self.scale, causal=causal, mask=mask, backend=backend)  # (b, h, n, k)
        return self.o_proj(merge_heads(z))  # (b, n, d)


def split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(b, n, heads * head_dim) -> (b, heads, n, head_dim)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(b, heads, n, head_dim) -> (b, n, heads * head_dim)."""
    return x.transpose(1, 2).flatten(2)


def resolve_head_dim(d_model: int, n_heads: int, head_dim: int | None) -> int:
    """head_dim itself, or d_model / n_heads where none is given.  Raises ValueError if a size does not fit."""
    check_positive("d_model", d_model)
    check_positive("n_heads", n_heads)
    if head_dim is None:
        if d_model % n_heads:
            raise ValueError(f"n_heads is {n_heads}; it must divide d_model = {d_model}, or head_dim must be given")
        head_dim = d_model // n_heads
    check_positive("head_dim", head_dim)
    return head_dim
