"""Rung 9. Multi-head latent attention (DeepSeek-V2, 2024): all heads read keys and values from a narrow latent (PyTorch)."""

import torch
from torch import nn

from .attend import attend
from .checks import check_positive, check_tokens
from .mha import merge_heads, resolve_head_dim, split_heads


class MultiHeadLatentAttention(nn.Module):
    """Queries, keys and values per head are up-projections of latents: Q_h = C_Q W_h^UQ, K_h = C_K W_h^UK, V_h = C_V W_h^UV.

    q_rank: d_c^Q, the width of C_Q = X W^DQ; kv_rank: d_c^K, the width of C_K = X W^DKV (both at most d).
    head_dim: d_H of queries and keys, by default d / n_H; v_head_dim: that of values, by default head_dim.
    shared_kv: values read the keys' latent (C_V = C_K), else a latent of their own (C_V = X W^DV, in `v_a_proj`).
    latent_norm: RMSNorm on every latent, as DeepSeek has it. Not linear, hence outside Def. 2.1 of the paper.
    absorb: multiply W^UK into the query and W^UV into the output, so that attention runs on the latents themselves and no
    per-head key or value exists. Same function, other cost: few wide heads' work against many narrow ones.
    Raises ValueError if a size does not fit.
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
        latent_norm: bool = False,
        absorb: bool = False,
    ):
        super().__init__()
        self.d_model, self.n_heads, self.head_dim = d_model, n_heads, resolve_head_dim(d_model, n_heads, head_dim)
        self.v_head_dim = self.head_dim if v_head_dim is None else v_head_dim
        check_positive("v_head_dim", self.v_head_dim)
        for name, rank in (("q_rank", q_rank), ("kv_rank", kv_rank)):
            check_positive(name, rank)
            if rank > d_model:
                raise ValueError(f"{name} is {rank}; a latent wider than d_model = {d_model} only adds redundant parameters")
        self.q_rank, self.kv_rank = q_rank, kv_rank
        self.shared_kv, self.latent_norm, self.absorb = shared_kv, latent_norm, absorb
        self.scale = self.head_dim**-0.5

        def norm(width: int) -> nn.Module:
            return nn.RMSNorm(width, eps=1e-6) if latent_norm else nn.Identity()

        self.q_a_proj = nn.Linear(d_model, q_rank, bias=False)  # W^DQ
        self.q_a_layernorm = norm(q_rank)
        self.q_b_proj = nn.Linear(q_rank, n_heads * self.head_dim, bias=False)  # W^UQ
        self.kv_a_proj_with_mqa = nn.Linear(d_model, kv_rank, bias=False)  # W^DKV
        self.kv_a_layernorm = norm(kv_rank)
        if not shared_kv:
            self.v_a_proj = nn.Linear(d_model, kv_rank, bias=False)  # W^DV
            self.v_a_layernorm = norm(kv_rank)
        self.kv_b_proj = nn.Linear(kv_rank, n_heads * (self.head_dim + self.v_head_dim), bias=False)  # W^UK, W^UV
        self.o_proj = nn.Linear(n_heads * self.v_head_dim, d_model, bias=False)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02, output_gain: float = 1.0) -> None:
        """Normal weights such that queries, keys, values and outputs start with the variance they have in multi-head attention.

        Latents get variance 1 from unit-variance tokens, and the up-projections bring it to d std^2.
        """
        d = self.d_model
        for down in (self.q_a_proj, self.kv_a_proj_with_mqa, *([] if self.shared_kv else [self.v_a_proj])):
            nn.init.normal_(down.weight, std=d**-0.5)
        for up in (self.q_b_proj, self.kv_b_proj):
            nn.init.normal_(up.weight, std=std * (d / up.in_features) ** 0.5)
        nn.init.normal_(self.o_proj.weight, std=std * output_gain)

    def up_projections(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-head W^UK (h, k, t) and W^UV (h, v, t), views of kv_b_proj; t is the latent width."""
        return self.kv_b_proj.weight.unflatten(0, (self.n_heads, -1)).split([self.head_dim, self.v_head_dim], dim=1)

    def forward(
        self, x: torch.Tensor, *, causal: bool = True, mask: torch.Tensor | None = None, backend: str = "sdpa"
    ) -> torch.Tensor:
        """x: (b, n, d), mask and backend as in `attend`.  Returns: (b, n, d)."""
        check_tokens(x, self.d_model)
        options = dict(scale=self.scale, causal=causal, mask=mask, backend=backend)
        c_q = self.q_a_layernorm(self.q_a_proj(x))  # (b, n, s)
        c_k = self.kv_a_layernorm(self.kv_a_proj_with_mqa(x))  # (b, m, t)
        c_v = c_k if self.shared_kv else self.v_a_layernorm(self.v_a_proj(x))  # (b, m, t)
        q = split_heads(self.q_b_proj(c_q), self.head_dim)  # (b, h, n, k)
        w_uk, w_uv = self.up_projections()  # (h, k, t), (h, v, t)
        if self.absorb:
            q = torch.einsum("bhnk,hkt->bhnt", q, w_uk)  # the key's up-projection moves to the query: q (C W)^T = (q W^T) C^T
            z = attend(q, c_k.unsqueeze(1), c_v.unsqueeze(1), **options)  # (b, h, n, t), one key/value head for all
            z = torch.einsum("bhnt,hvt->bhnv", z, w_uv)
        else:
            k = torch.einsum("bmt,hkt->bhmk", c_k, w_uk)
            v = torch.einsum("bmt,hvt->bhmv", c_v, w_uv)
            z = attend(q, k, v, **options)  # (b, h, n, v)
        return self.o_proj(merge_heads(z))  # (b, n, d)
