"""The pre-norm transformer block that GPT-2 and ViT share: attention is an argument."""

from collections.abc import Callable

import torch
from torch import nn

AttentionFactory = Callable[[int, int], nn.Module]  # (d_model, n_heads) -> a layer of tucker_ref


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    n_layers: the depth of the whole model; both residual branches start scaled by 1/sqrt(2 n_layers).
    std: of the initial weights, elsewhere.
    """

    def __init__(self, d_model: int, n_heads: int, n_layers: int, attention: AttentionFactory, causal: bool, std: float):
        super().__init__()
        self.causal = causal
        self.attention_norm = nn.LayerNorm(d_model, bias=False)
        self.attention = attention(d_model, n_heads)
        self.mlp_norm = nn.LayerNorm(d_model, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model, bias=False), nn.GELU(), nn.Linear(4 * d_model, d_model, bias=False)
        )
        gain = (2 * n_layers) ** -0.5
        self.attention.reset_parameters(std, gain)
        nn.init.normal_(self.mlp[0].weight, std=std)
        nn.init.normal_(self.mlp[2].weight, std=std * gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: (b, n, d).  Returns: (b, n, d)."""
        x = x + self.attention(self.attention_norm(x), causal=self.causal)
        return x + self.mlp(self.mlp_norm(x))
