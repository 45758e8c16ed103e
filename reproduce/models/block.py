"""The pre-norm transformer block that all models share: attention, norm and feed-forward layer are arguments."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from tucker_ref import Cache

AttentionFactory = Callable[[int, int], nn.Module]  # (d_model, n_heads) -> a layer of tucker_ref


class GeluMLP(nn.Module):
    """down(gelu(up(x))), four times as wide inside (GPT-2, ViT)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, n, d).  Returns: (b, n, d)."""
        return self.down(F.gelu(self.up(x)))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), four times as wide inside (Shazeer 2020; LLaMA3-1B's width)."""

    def __init__(self, d_model: int):
        super().__init__()
        self.gate = nn.Linear(d_model, 4 * d_model, bias=False)
        self.up = nn.Linear(d_model, 4 * d_model, bias=False)
        self.down = nn.Linear(4 * d_model, d_model, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, n, d).  Returns: (b, n, d)."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def layer_norm(d_model: int) -> nn.Module:
    """LayerNorm over the last axis, without a bias."""
    return nn.LayerNorm(d_model, bias=False)


def rms_norm(d_model: int) -> nn.Module:
    """RMSNorm over the last axis."""
    return nn.RMSNorm(d_model, eps=1e-5)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
        d_model: d.
        n_heads: n_H.
        n_layers: the depth of the whole model; both residual branches start scaled by 1/sqrt(2 n_layers).
        attention: builds the attention layer from d and n_H.
        causal: whether tokens see only those before them.
        std: of the initial weights, elsewhere.
        norm: builds a norm of width d.
        mlp: builds the feed-forward layer of width d; its last matrix is called `down`.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_layers: int,
        attention: AttentionFactory,
        *,
        causal: bool,
        std: float = 0.02,
        norm: Callable[[int], nn.Module] = layer_norm,
        mlp: Callable[[int], nn.Module] = GeluMLP,
    ):
        super().__init__()
        self.causal = causal
        self.attention_norm = norm(d_model)
        self.attention = attention(d_model, n_heads)
        self.mlp_norm = norm(d_model)
        self.mlp = mlp(d_model)
        gain = (2 * n_layers) ** -0.5
        self.attention.reset_parameters(std, gain)
        for linear in self.mlp.children():
            nn.init.normal_(linear.weight, std=std * gain if linear is self.mlp.down else std)

    def forward(
        self,
        x: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: Cache | None = None,
        backend: str = "sdpa",
    ) -> torch.Tensor:
        """One block.

        Args:
            x: (b, n, d).
            mask, positions, cache, backend: as the attention layers take them.

        Returns:
            (b, n, d).
        """
        options = dict(mask=mask, positions=positions, cache=cache, backend=backend)
        x = x + self.attention(self.attention_norm(x), causal=self.causal, **options)
        return x + self.mlp(self.mlp_norm(x))
