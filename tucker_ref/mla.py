"""Rung 9. Multi-head latent attention (DeepSeek-V2, 2024): all heads read keys and values from a narrow latent (PyTorch)."""

from typing import Any

import torch
from torch import nn

from .attend import attend
from .cache import Cache
from .cached_attention import CachedAttention, keeps_cache, plain_weight, token_positions
from .checks import check_flags, check_latents, resolve_sizes
from .initialisation import initialise_latent
from .mha import merge_heads, split_heads
from .rotary import Rotary


class MultiHeadLatentAttention(CachedAttention):
    """Queries, keys and values per head are up-projections of latents: Q_h = L_Q W_h^UQ, K_h = L_K W_h^UK, V_h = L_V W_h^UV.

    Args:
        d_model: d.
        n_heads: n_H.
        q_rank: d_c^Q, the width of L_Q = X W^DQ, at most d.
        kv_rank: d_c^K, the width of L_K = X W^DKV, at most d.
        head_dim: d_H of queries and keys, by default d / n_H.
        v_head_dim: that of values, by default head_dim.
        shared_kv: values read the keys' latent (L_V = L_K), else a latent of their own (L_V = X W^DV, in `v_a_proj`).
        rope_dim: d_R, decoupled rotary channels: every head gets as many more query channels and shares one more key of that
            width, both turned, and logits are scaled by 1/sqrt(d_H + d_R).
        latent_norm: RMSNorm on every latent, as DeepSeek has it. Not linear, hence outside Def. 2.1 of the paper.
        rotary: None; of width rope_dim where that is positive (decoupled); else of width kv_rank, which turns the latent itself
            (coupled; Cor. 3.2.1, Eqs. 13, 14, 20).
        absorb: multiply W^UK into the query and W^UV into the output, so that attention runs on the latents themselves and no
            per-head key or value exists. The same function at another cost. Coupled rotary has no other form.

    Raises:
        ValueError: if a size does not fit.
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        q_rank: int,
        kv_rank: int,
        *,
        head_dim: int | None = None,
        v_head_dim: int | None = None,
        shared_kv: bool = True,
        rope_dim: int = 0,
        latent_norm: bool = False,
        rotary: Rotary | None = None,
        absorb: bool = False,
    ):
        super().__init__()
        self.d_model, self.n_heads, self.head_dim = d_model, n_heads, _ = resolve_sizes(d_model, n_heads, head_dim)
        widths = check_latents(d_model, q_rank, kv_rank, self.head_dim if v_head_dim is None else v_head_dim, rope_dim, rotary)
        self.q_rank, self.kv_rank, self.v_head_dim, self.rope_dim = q_rank, kv_rank, _, rope_dim = widths
        self.rotary: Any = rotary  # there where rope_dim or coupled says so
        self.shared_kv, self.latent_norm, absorb = check_flags(shared_kv=shared_kv, latent_norm=latent_norm, absorb=absorb)
        self.coupled = rotary is not None and rope_dim == 0
        self.absorb = absorb or self.coupled
        self.rotates_on_reading = self.coupled and shared_kv
        self.scale = (self.head_dim + rope_dim) ** -0.5

        def norm(width: int) -> nn.Module:
            return nn.RMSNorm(width, eps=1e-6) if latent_norm else nn.Identity()

        self.q_a_proj = nn.Linear(d_model, q_rank, bias=False)  # W^DQ
        self.q_a_layernorm = norm(q_rank)
        self.q_b_proj = nn.Linear(q_rank, n_heads * (self.head_dim + rope_dim), bias=False)  # W^UQ, W^QR
        self.kv_a_proj_with_mqa = nn.Linear(d_model, kv_rank + rope_dim, bias=False)  # W^DKV, W^KR
        self.kv_a_layernorm = norm(kv_rank)
        if not shared_kv:
            self.v_a_proj = nn.Linear(d_model, kv_rank, bias=False)  # W^DV
            self.v_a_layernorm = norm(kv_rank)
        self.kv_b_proj = nn.Linear(kv_rank, n_heads * (self.head_dim + self.v_head_dim), bias=False)  # W^UK, W^UV
        self.o_proj = nn.Linear(n_heads * self.v_head_dim, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, output_gain: float = 1.0) -> None:
        """Start with queries, keys, values and outputs as large as multi-head attention's.  std, output_gain: as there."""
        initialise_latent(self, std, output_gain)

    def up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-head W^UK (h, k, t) and W^UV (h, v, t), views of kv_b_proj; t is the latent width."""
        return plain_weight(self, "kv_b_proj").unflatten(0, (self.n_heads, -1)).split([self.head_dim, self.v_head_dim], dim=1)

    def cache_streams(self) -> dict[str, tuple[int, int]]:
        """The latent, with the decoupled key behind it, and the value latent where that is another: one head each."""
        key = {"key": (1, self.kv_rank + self.rope_dim)}
        return key if self.shared_kv else key | {"value": (1, self.kv_rank)}

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
        """x: (b, n, d); the other arguments as in MultiHeadAttention.  Returns: (b, n, d)."""
        self.check_call(x, causal, mask, positions, cache, backend)
        new_positions = None if self.rotary is None else token_positions(x, positions, cache)
        q, q_rope = self._queries(x, new_positions)  # (b, h, n, k), (b, h, n, rope)
        c_k, c_v = self._latents(x, new_positions, positions, cache)  # (b, 1, m, t + rope), (b, 1, m, t)
        w_uk, w_uv = self.up_projections()  # (h, k, t), (h, v, t)
        options: dict[str, Any] = dict(scale=self.scale, causal=causal, mask=mask, backend=backend)
        if self.absorb:
            q = torch.einsum("bhnk,hkt->bhnt", q, w_uk)  # q (C W)^T = (q W^T) C^T: the up-projection moves to the query
            if self.coupled:
                q = self.rotary(q, new_positions)
            z = attend(torch.cat([q, q_rope], dim=-1), c_k, c_v, **options)  # (b, h, n, t), one key/value head for all
            z = torch.einsum("bhnt,hvt->bhnv", z, w_uv)
        else:
            latent, k_rope = c_k.split([self.kv_rank, self.rope_dim], dim=-1)
            k = torch.einsum("bgmt,hkt->bhmk", latent, w_uk)  # g is the one shared latent
            v = torch.einsum("bgmt,hvt->bhmv", c_v, w_uv)
            k = torch.cat([k, k_rope.expand(-1, self.n_heads, -1, -1)], dim=-1)  # (b, h, m, k + rope)
            z = attend(torch.cat([q, q_rope], dim=-1), k, v, **options)  # (b, h, n, v)
        return self.o_proj(merge_heads(z))  # (b, n, d)

    def _queries(self, x, new_positions):
        """Per head the content query (b, h, n, k) and the turned, decoupled one (b, h, n, rope), which may be empty."""
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        q, q_rope = split_heads(q, self.head_dim + self.rope_dim).split([self.head_dim, self.rope_dim], dim=-1)
        return q, self.rotary(q_rope, new_positions) if self.rope_dim else q_rope

    def _latents(self, x, new_positions, positions, cache):
        """Key latent, turned or with the turned, decoupled key behind it, and value latent.

        Whatever can be turned is turned before it is cached. A coupled latent that values share cannot: it is turned on reading.
        """
        latent, k_rope = self.kv_a_proj_with_mqa(x).unsqueeze(1).split([self.kv_rank, self.rope_dim], dim=-1)
        c_k = self.kv_a_layernorm(latent)  # (b, 1, n, t)
        if self.rope_dim:
            c_k = torch.cat([c_k, self.rotary(k_rope, new_positions)], dim=-1)  # (b, 1, n, t + rope)
        if self.shared_kv:
            all_positions = new_positions
            if cache is not None:
                (c_k,) = cache.append(positions, key=c_k)
                all_positions = cache.positions(x.device)
            return self.rotary(c_k, all_positions) if self.coupled else c_k, c_k[..., : self.kv_rank]
        c_v = self.v_a_layernorm(self.v_a_proj(x)).unsqueeze(1)
        if self.coupled:
            c_k = self.rotary(c_k, new_positions)
        if cache is not None:
            c_k, c_v = cache.append(key=c_k, value=c_v)
        return c_k, c_v
