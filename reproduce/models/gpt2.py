"""GPT-2 (Radford et al. 2019): learned positions, pre-norm blocks, tied embedding. Biasless linears, as Table 2 counts them."""

import torch
from torch import nn

from .block import AttentionFactory, Block, layer_norm
from .language_model import LanguageModel


class GPT2(LanguageModel):
    """GPT-2 with any attention.

    Args:
        vocab_size: entries of the tokenizer.
        context: N, the longest sequence, beyond which there are no positions.
        d_model, n_heads, n_layers, attention: as in `Block`.
    """

    def __init__(self, vocab_size: int, context: int, d_model: int, n_heads: int, n_layers: int, attention: AttentionFactory):
        blocks = [Block(d_model, n_heads, n_layers, attention, causal=True) for _ in range(n_layers)]
        super().__init__(vocab_size, d_model, blocks, layer_norm(d_model), context)
        self.position_embedding = nn.Embedding(context, d_model)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def embed(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """As in `LanguageModel`, with the learned vector of each position added."""
        return self.token_embedding(tokens) + self.position_embedding(positions)
