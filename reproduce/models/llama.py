"""Llama 3 (Dubey et al. 2024): RMSNorm, SwiGLU, rotary attention, no biases, tied embedding as in the 1B model."""

from .block import AttentionFactory, Block, SwiGLU, rms_norm
from .language_model import LanguageModel


class Llama(LanguageModel):
    """Llama 3 with any attention.

    Args:
        vocab_size: entries of the tokenizer.
        d_model, n_heads, n_layers: as in `Block`.
        attention: as there, of layers that carry their own rotary embedding.
    """

    def __init__(self, vocab_size: int, d_model: int, n_heads: int, n_layers: int, attention: AttentionFactory):
        blocks = [Block(d_model, n_heads, n_layers, attention, causal=True, norm=rms_norm, mlp=SwiGLU) for _ in range(n_layers)]
        super().__init__(vocab_size, d_model, blocks, rms_norm(d_model))
