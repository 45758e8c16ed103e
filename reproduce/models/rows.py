"""The rows of the paper's tables: which attention layer each one names, and what the paper prints beside it."""

import copy
import dataclasses
from dataclasses import dataclass, field

import torch
from torch import nn

from tucker_ref import (
    Cost,
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    compress,
    gqa_cost,
    mha_cost,
    mla_cost,
    to_gqa,
    to_mla,
    tucker_cost,
)


@dataclass(frozen=True)
class Row:
    """One attention configuration, apart from the model it sits in.

    mechanism: "MHA", "GQA" (MQA is GQA with one group), "MLA" or "Tucker"; n_kv_heads: for GQA; latent: d_c of both latents, for MLA;
    ranks: (head, query, key) and (head, output, value) alike, for Tucker; shared_kv: for MLA and Tucker.
    paper: what the paper prints in this row, by column name.
    """

    mechanism: str
    n_kv_heads: int = 0
    latent: int = 0
    ranks: tuple[int, int, int] | tuple[()] = ()
    shared_kv: bool = False
    paper: dict[str, float] = field(default_factory=dict, compare=False)

    @property
    def label(self) -> str:
        if self.mechanism == "MHA":
            return "MHA"
        if self.mechanism == "GQA":
            return "MQA" if self.n_kv_heads == 1 else f"GQA n_KV={self.n_kv_heads}"
        kv = "shared" if self.shared_kv else "separated"
        if self.mechanism == "MLA":
            return f"MLA {kv} d_c={self.latent}"
        return f"Tucker [{','.join(map(str, self.ranks))}]" + (" shared" if self.shared_kv else "")

    def build(self, d_model: int, n_heads: int, rope_base: float | None = None) -> nn.Module:
        """A fresh attention layer of this kind; with a rope_base it turns head-wide keys (MHA, GQA) or its latent (MLA, Tucker)."""
        if self.mechanism in ("MHA", "GQA"):
            rotary = None if rope_base is None else Rotary.heads(d_model // n_heads, rope_base)
            if self.mechanism == "MHA":
                return MultiHeadAttention(d_model, n_heads, rotary=rotary)
            return GroupedQueryAttention(d_model, n_heads, self.n_kv_heads, rotary=rotary)
        rotary = None if rope_base is None else Rotary.latent(self.latent or self.ranks[2], rope_base)
        if self.mechanism == "MLA":
            width = self.latent
            return MultiHeadLatentAttention(d_model, n_heads, width, width, shared_kv=self.shared_kv, rotary=rotary)
        return TuckerAttention(d_model, n_heads, self.ranks, shared_kv=self.shared_kv, rotary=rotary)

    def converted(self, layer: nn.Module, *, mean: bool = False, moment: torch.Tensor | None = None) -> nn.Module:
        """A trained layer as this kind of attention.  mean: GQA by averaging heads; moment: of the inputs, as in `compress`."""
        if self.mechanism == "GQA":
            return to_gqa(layer, self.n_kv_heads, method="mean" if mean else "svd", moment=moment)
        if self.mechanism == "MLA":
            return to_mla(layer, self.latent, self.latent, shared_kv=self.shared_kv, moment=moment)
        if self.mechanism == "Tucker":
            return compress(layer, self.ranks, shared_kv=self.shared_kv, moment=moment)
        return copy.deepcopy(layer)

    def cost(self, d_model: int, n_heads: int, head_dim: int | None = None) -> Cost:
        """Its costs by Table 1's formulas.  head_dim: by default d / n_H."""
        if self.mechanism == "MHA":
            return mha_cost(d_model, n_heads, head_dim)
        if self.mechanism == "GQA":
            return gqa_cost(d_model, n_heads, self.n_kv_heads, head_dim)
        if self.mechanism == "MLA":
            return mla_cost(d_model, n_heads, self.latent, self.latent, head_dim, shared_kv=self.shared_kv)
        return tucker_cost(d_model, n_heads, self.ranks, shared_kv=self.shared_kv)

    def narrowed(self, factor: int) -> "Row":
        """The same row for a model `factor` times narrower with as many heads: widths shrink, head counts and r1 stay.

        Parameter ratios between rows are then those of the full-size model, up to n_H r1.
        """
        ranks = (self.ranks[0], *(rank // factor for rank in self.ranks[1:])) if self.ranks else ()
        return dataclasses.replace(self, latent=self.latent // factor, ranks=ranks, paper={})

    def config(self) -> dict:
        """The fields that define the layer, for records."""
        return {k: v for k, v in dataclasses.asdict(self).items() if k != "paper"}


# Table 2, GPT-2: d 768, 12 heads, 12 layers, 1,024 tokens; MB are 10^6 bytes in BF16.
TABLE2 = (
    Row("MHA", paper={"attention_mb": 56.62, "cache_mb": 37.74}),
    Row("GQA", n_kv_heads=4, paper={"attention_mb": 37.74, "cache_mb": 12.85}),
    Row("GQA", n_kv_heads=2, paper={"attention_mb": 33.02, "cache_mb": 6.29}),
    Row("MLA", latent=128, shared_kv=True, paper={"attention_mb": 26.00, "cache_mb": 3.14}),
    Row("Tucker", ranks=(8, 128, 128), paper={"attention_mb": 15.74, "cache_mb": 6.28}),
    Row("Tucker", ranks=(8, 128, 64), paper={"attention_mb": 10.24, "cache_mb": 3.14}),
    Row("Tucker", ranks=(8, 64, 64), paper={"attention_mb": 6.31, "cache_mb": 3.14}),
)

# Ours, to complete Table 2: one key and value for all heads, and the other choice of sharing for MLA and Tucker Attention.
TABLE2_BESIDE = (
    Row("GQA", n_kv_heads=1),
    Row("MLA", latent=128, shared_kv=False),
    Row("Tucker", ranks=(8, 128, 64), shared_kv=True),
)

# Ours: as many attention parameters as one of the rows above has, or as large a cache.
TABLE2_EQUAL = (
    Row("Tucker", ranks=(12, 256, 256)),  # the parameters of MHA, the cache of GQA n_KV=4
    Row("Tucker", ranks=(12, 200, 200)),  # the parameters of GQA n_KV=4
    Row("Tucker", ranks=(8, 184, 176)),  # the parameters of MLA shared d_c=128
    Row("MLA", latent=16, shared_kv=True),  # the parameters of Tucker [8,128,128]
)

# Table 3, LLaMA3-1B: d 2048, 32 heads; millions of parameters at 16 layers, or MB in BF16 at 8 (both readings fit).
TABLE3 = (
    Row("MHA", paper={"size": 268}),
    Row("GQA", n_kv_heads=8, paper={"size": 168}),
    Row("GQA", n_kv_heads=1, paper={"size": 138}),
    Row("MLA", latent=128, shared_kv=False, paper={"size": 93.3}),
    Row("MLA", latent=128, shared_kv=True, paper={"size": 93.3}),
    Row("Tucker", ranks=(32, 128, 128), paper={"size": 33.5}),
    Row("Tucker", ranks=(32, 128, 64), paper={"size": 21.0}),
    Row("Tucker", ranks=(32, 64, 64), paper={"size": 12.6}),
)
