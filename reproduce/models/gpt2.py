"""GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, tied embedding. Biasless linears, as Table 2 counts them."""

import torch
import torch.nn.functional as F
from torch import nn

from .block import AttentionFactory, Block


class GPT2(nn.Module):
    """vocab_size: entries of the tokenizer; context: the longest sequence N."""

    def __init__(self, vocab_size: int, context: int, d_model: int, n_heads: int, n_layers: int, attention: AttentionFactory):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(context, d_model)
        self.blocks = nn.ModuleList(
            Block(d_model, n_heads, n_layers, attention, causal=True, std=0.02) for _ in range(n_layers)
        )
        self.final_norm = nn.LayerNorm(d_model, bias=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens: (b, n) integers.  Returns: logits (b, n, vocab_size); the output matrix is the token embedding."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (b, n, d)
        for block in self.blocks:
            x = block(x)
        return F.linear(self.final_norm(x), self.token_embedding.weight)
