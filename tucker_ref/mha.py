"""Rung 7. Multi-head attention (Vaswani et al. 2017): every head has its own queries, keys and values (PyTorch)."""

import torch
from torch import nn

from .attend import attend
from .cache import Cache
from .cached_attention import CachedAttention, keeps_cache, token_positions
from .checks import check_bias, check_qk_norm, check_rotary, resolve_sizes
from .initialisation import initialise_heads
from .norms import QKNorm
from .recompute import laid_by_token, queries_made_again
from .rotary import Rotary


class MultiHeadAttention(CachedAttention):
    """y = sum over heads of softmax(Q_h K_h^T / sqrt(d_H)) V_h W_h^O.

    Args:
        d_model: d, the width of a token.
        n_heads: n_H.
        head_dim: d_H, by default d / n_H.
        bias: False, True for all four projections (GPT-2, ViT), or "qkv" for all but the output (Qwen).
        rotary: turns queries and keys, width head_dim; None for none.
        qk_norm: RMSNorm on queries and keys before they are turned: None, per "head" (Qwen3), or over "all" heads (OLMo 2).

    Raises:
        ValueError: if a size is not positive, n_heads does not divide d_model and no head_dim is given, or a width is off.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        *,
        head_dim: int | None = None,
        bias: bool | str = False,
        rotary: Rotary | None = None,
        qk_norm: str | None = None,
    ):
        super().__init__()
        self.d_model, self.n_heads, self.head_dim = d_model, n_heads, _ = resolve_sizes(d_model, n_heads, head_dim)
        check_bias(bias)
        check_rotary(rotary, self.head_dim, "head_dim")
        check_qk_norm(qk_norm)
        self.bias, self.rotary, self.qk_norm, self.scale = bias, rotary, qk_norm, self.head_dim**-0.5
        self.recompute = False  # True makes queries, keys and values again in the backward pass, unless a cache keeps them
        inner = n_heads * self.head_dim
        self.q_proj = nn.Linear(d_model, inner, bias=bool(bias))
        self.k_proj = nn.Linear(d_model, inner, bias=bool(bias))
        self.v_proj = nn.Linear(d_model, inner, bias=bool(bias))
        self.o_proj = nn.Linear(inner, d_model, bias=bias is True)
        self.q_norm, self.k_norm = (QKNorm.of(qk_norm, self.head_dim, n_heads) for _ in range(2))
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, output_gain: float = 1.0) -> None:
        """GPT-2's initialisation: normal weights, zero biases, gains of one. Deep models pass output_gain = 1/sqrt(2 L)."""
        initialise_heads(self, std, output_gain)

    def cache_streams(self) -> dict[str, tuple[int, int]]:
        """Keys, normalised and turned, and values: (g, k) each."""
        kv = self.k_proj.out_features // self.head_dim, self.head_dim
        return {"key": kv, "value": kv}

    @keeps_cache
    def forward(
        self,
        x: torch.Tensor,
        *,
        causal: bool = True,
        mask: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        cache: Cache | None = None,
        backend: str = "sdpa",
    ) -> torch.Tensor:
        """An empty batch or a sequence without tokens gives an empty output. NaN and infinity in one sequence spoil no other.

        Args:
            x: (b, n, d).
            causal, mask, backend: as in `attend`; with a cache, m counts the cached tokens too.
            positions: (n,) or (b, n) integers for the rotary embedding, by default those that follow the cache; negative ones
                too, since only differences count.
            cache: from `new_cache`; x's tokens are appended, and every query may see all that is cached.

        Returns:
            (b, n, d).

        Raises:
            ValueError: for an argument that does not fit or a kernel that refuses; the cache is then as it was.
        """
        self.check_call(x, causal, mask, positions, cache, backend)
        positions = None if self.rotary is None else token_positions(x, positions, cache)
        options = dict(scale=self.scale, causal=causal, mask=mask, backend=backend)
        z = queries_made_again(self._attention, x, positions, cache, options, when=self.recompute and cache is None)
        return self.o_proj(merge_heads(z))  # (b, n, d) from (b, h, n, k)

    def _attention(self, x, positions, cache, options):
        q = split_heads(self.q_proj(x), self.head_dim)  # (b, h, n, k)
        k = split_heads(self.k_proj(x), self.head_dim)  # (b, g, n, k), g = h in multi-head attention
        v = split_heads(self.v_proj(x), self.head_dim)  # (b, g, n, k)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None:
            q, k = laid_by_token(self.rotary(q, positions)), self.rotary(k, positions)
        if cache is not None:
            k, v = cache.append(key=k, value=v)  # (b, g, m, k)
        return attend(q, k, v, **options)


def split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """(b, n, heads * head_dim) -> (b, heads, n, head_dim)."""
    return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def merge_heads(x: torch.Tensor) -> torch.Tensor:
    """(b, heads, n, head_dim) -> (b, n, heads * head_dim)."""
    return x.transpose(1, 2).flatten(2)
