"""Rung 13. What each mechanism costs: Table 1 as functions, and the arithmetic beside it. Plain integers, no tensors.

All counts are for one layer without biases and without the gains of norms. "Numbers" are scalars of any dtype: multiply by 2 for
bytes in BF16. Sizes below one raise ValueError; the layers themselves say which sizes do not go together.
"""

import math
from dataclasses import dataclass

from .checks import check_flags, check_groups, check_integer, check_positive, check_widths, resolve_sizes


@dataclass(frozen=True)
class Cost:
    """The counts of one layer.

    Attributes:
        parameters: trainable numbers.
        cache_per_token: numbers that decoding keeps for every token.
        projections: multiply-adds per token.
        attention: multiply-adds per (query, source) pair.
        once: multiply-adds per update of the weights.
    """

    parameters: int
    cache_per_token: int
    projections: int
    attention: int
    once: int = 0

    def parameter_bytes(self, n_layers: int = 1, bytes_per_number: int = 2) -> int:
        """Bytes of the weights of n_layers such layers.  Raises ValueError for a number that is none, as the others do."""
        return self.parameters * _count(n_layers=n_layers) * _count(bytes_per_number=bytes_per_number)

    def cache_bytes(self, n_tokens: int, n_layers: int = 1, bytes_per_number: int = 2) -> int:
        """Bytes that decoding keeps for n_tokens in n_layers such layers."""
        layers = _count(n_layers=n_layers) * _count(bytes_per_number=bytes_per_number)
        return self.cache_per_token * _count(n_tokens=n_tokens) * layers

    def flops(self, n_tokens: int) -> int:
        """Floating-point operations of a full, non-causal forward pass over one sequence; a multiply-add counts as two."""
        n = _count(n_tokens=n_tokens)
        return 2 * (self.once + self.projections * n + self.attention * n**2)


def _count(**one) -> int:
    """The one argument that has a name, as an int."""
    [(name, value)] = one.items()
    return check_integer(name, value, 0, math.inf)


def mha_cost(d_model: int, n_heads: int, head_dim: int | None = None) -> Cost:
    """Multi-head attention (Table 1): 4 d^2 parameters, 2 d cached numbers a token (with n_H d_H = d).

    Args:
        d_model: d.
        n_heads: n_H.
        head_dim: d_H, by default d / n_H.

    Returns:
        The counts of a layer without biases, here and below.

    Raises:
        ValueError: for a size that is no integer of at least 1, or n_heads that does not divide d_model where no head_dim is given.
    """
    return gqa_cost(d_model, n_heads, n_heads, head_dim)


def gqa_cost(d_model: int, n_heads: int, n_kv_heads: int, head_dim: int | None = None) -> Cost:
    """Grouped-query attention (Table 1): 2 d^2 + 2 n_KV d_H d parameters, 2 n_KV d_H cached numbers a token. MQA: n_kv_heads = 1.

    Args:
        d_model: d.
        n_heads: n_H.
        n_kv_heads: n_KV, a divisor of n_heads.
        head_dim: d_H, by default d / n_H.

    Raises:
        ValueError: as `mha_cost`, and for n_kv_heads that does not divide n_heads.
    """
    d_model, n_heads, width = resolve_sizes(d_model, n_heads, head_dim)
    n_kv_heads = check_groups(n_kv_heads, n_heads)
    inner, kv = n_heads * width, n_kv_heads * width
    parameters = 2 * d_model * inner + 2 * d_model * kv
    return Cost(parameters, cache_per_token=2 * kv, projections=parameters, attention=2 * inner)


def mla_cost(
    d_model: int,
    n_heads: int,
    q_rank: int,
    kv_rank: int,
    head_dim: int | None = None,
    v_head_dim: int | None = None,
    shared_kv: bool = True,
    rope_dim: int = 0,
) -> Cost:
    """Multi-head latent attention (Table 1), up-projected ("naive") path.

    With all latents of width d_c and n_H d_H = d: d^2 + 5 d d_c parameters and d_c cached numbers a token with shared KV,
    d^2 + 6 d d_c and 2 d_c with separate latents. A decoupled rotary key adds d_R numbers to the cache.

    Args:
        d_model: d.
        n_heads: n_H.
        q_rank: d_c^Q, width of the query latent.
        kv_rank: d_c^K, width of the key and value latents.
        head_dim: d_H, by default d / n_H.
        v_head_dim: of values, by default head_dim.
        shared_kv: keys and values read one latent.
        rope_dim: d_R, width of the decoupled rotary key; 0 for none.

    Raises:
        ValueError: as `mha_cost`.
    """
    d_model, n_heads, width = resolve_sizes(d_model, n_heads, head_dim)
    q_rank, kv_rank, v_width, rope_dim = check_widths(q_rank, kv_rank, width if v_head_dim is None else v_head_dim, rope_dim)
    [shared_kv] = check_flags(shared_kv=shared_kv)
    n_latents = 1 if shared_kv else 2
    parameters = (
        d_model * (q_rank + n_latents * kv_rank + rope_dim)
        + n_heads * (q_rank * (width + rope_dim) + kv_rank * (width + v_width))
        + n_heads * v_width * d_model
    )
    cached = n_latents * kv_rank + rope_dim
    return Cost(parameters, cached, projections=parameters, attention=n_heads * (width + rope_dim + v_width))


def tucker_cost(
    d_model: int,
    n_heads: int,
    ranks: tuple[int, int, int],
    post_ranks: tuple[int, int, int] | None = None,
    shared_kv: bool = False,
) -> Cost:
    """Tucker Attention (Table 1).

    With equal ranks on both sides: 2 (n_H r1 + d r2 + d r3 + r1 r2 r3) parameters and 2 r3 cached numbers a token;
    shared KV saves one d r3 of the parameters and half of the cache.

    Args:
        d_model: d.
        n_heads: n_H.
        ranks: (head, query, key) = (r1, r2, r3).
        post_ranks: (head, output, value), by default `ranks`.
        shared_kv: the value latent is the key latent.

    Raises:
        ValueError: for a size or rank that is no integer of at least 1, or ranks that are not three.
    """
    d_model, n_heads, _ = resolve_sizes(d_model, n_heads, 1)
    (r, s, t), (u, o, v) = _triple("ranks", ranks), _triple("post_ranks", ranks if post_ranks is None else post_ranks)
    [shared_kv] = check_flags(shared_kv=shared_kv)
    value = 0 if shared_kv else d_model * v
    factors = d_model * (s + t + o) + value
    parameters = n_heads * (r + u) + factors + math.prod((r, s, t)) + math.prod((u, o, v))
    return Cost(
        parameters,
        cache_per_token=t if shared_kv else t + v,
        projections=factors + n_heads * (s * t + o * v),  # latents in and out, then each head's own small matrix
        attention=n_heads * (t + v),
        once=n_heads * (r * s * t + u * o * v),  # C x_1 U1 and C~ x_1 U~1
    )


def _triple(name: str, ranks) -> tuple[int, ...]:
    if not isinstance(ranks, (tuple, list)) or len(ranks) != 3:
        raise ValueError(f"{name} is {ranks!r}; it must be 3 integers")
    return tuple(check_positive(f"{name}[{mode}]", rank) for mode, rank in enumerate(ranks))
