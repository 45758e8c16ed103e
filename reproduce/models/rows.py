"""The rows of the paper's tables: which attention layer each one names, and what the paper prints beside it."""

import copy
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

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

    Args:
        mechanism: "MHA", "GQA" (MQA is GQA with one group), "MLA" or "Tucker".
        n_kv_heads: n_KV, for GQA.
        latent: d_c of both latents, for MLA.
        rope_dim: d_R of decoupled rotary channels, for MLA (DeepSeek-V2); without them the latent itself is turned.
        ranks: for Tucker, (head, query, key), and (head, output, value) alike where post_ranks says nothing.
        post_ranks: for Tucker, (head, output, value) where it differs.
        shared_kv: keys and values read one latent, for MLA and Tucker.
        qk_norm: RMSNorm on queries and keys, "head" or "all", for all but MLA.
        latent_norm: RMSNorm on the latents, for MLA and Tucker.
        paper: what the paper prints in this row, by column name.

    Raises:
        ValueError: for a norm that the mechanism does not have.
    """

    mechanism: str
    n_kv_heads: int = 0
    latent: int = 0
    ranks: tuple[int, int, int] | tuple[()] = ()
    shared_kv: bool = False
    qk_norm: str | None = None
    latent_norm: bool = False
    post_ranks: tuple[int, int, int] | tuple[()] = ()
    rope_dim: int = 0
    paper: dict[str, float] = field(default_factory=dict, compare=False)

    def __post_init__(self):
        if self.qk_norm and self.mechanism == "MLA":
            raise ValueError("MLA has latent_norm, not qk_norm")
        if self.latent_norm and self.mechanism in ("MHA", "GQA"):
            raise ValueError(f"{self.mechanism} has no latents: qk_norm, not latent_norm")

    @property
    def label(self) -> str:
        """What tables, records and `--rows` call this row."""
        over = " over all heads" if self.qk_norm == "all" else ""
        norms = (" latent norms" if self.latent_norm else "") + (f" QK-norm{over}" if self.qk_norm else "")
        return self._label() + norms

    def _label(self) -> str:
        """Without its norms."""
        if self.mechanism == "MHA":
            return "MHA"
        if self.mechanism == "GQA":
            return "MQA" if self.n_kv_heads == 1 else f"GQA n_KV={self.n_kv_heads}"
        kv = "shared" if self.shared_kv else "separated"
        if self.mechanism == "MLA":
            return f"MLA {kv} d_c={self.latent}" + (f" d_R={self.rope_dim}" if self.rope_dim else "")
        both = " / ".join(",".join(map(str, triple)) for triple in (self.ranks, self.post_ranks) if triple)
        return f"Tucker [{both}]" + (" shared" if self.shared_kv else "")

    def build(self, d_model: int, n_heads: int, rope_base: float | None = None) -> nn.Module:
        """A fresh attention layer of this kind.

        Args:
            d_model: d.
            n_heads: n_H.
            rope_base: where it is given, MHA and GQA turn their head-wide keys, MLA and Tucker their latent (Def. 3.1).
        """
        if self.mechanism in ("MHA", "GQA"):
            rotary = None if rope_base is None else Rotary.heads(d_model // n_heads, rope_base)
            if self.mechanism == "MHA":
                return MultiHeadAttention(d_model, n_heads, rotary=rotary, qk_norm=self.qk_norm)
            return GroupedQueryAttention(d_model, n_heads, self.n_kv_heads, rotary=rotary, qk_norm=self.qk_norm)
        rotary = None if rope_base is None else Rotary.latent(self.latent or self.ranks[2], rope_base)
        options: dict[str, Any] = {"shared_kv": self.shared_kv, "rotary": rotary, "latent_norm": self.latent_norm}
        if self.mechanism == "MLA":
            if self.rope_dim and rope_base is not None:
                options |= {"rope_dim": self.rope_dim, "rotary": Rotary.heads(self.rope_dim, rope_base)}
            return MultiHeadLatentAttention(d_model, n_heads, self.latent, self.latent, **options)
        return TuckerAttention(d_model, n_heads, self.ranks, self.post_ranks or None, qk_norm=self.qk_norm, **options)

    def converted(
        self, layer: nn.Module, *, mean: bool = False, moment: torch.Tensor | None = None, method: str = "hosvd"
    ) -> nn.Module:
        """A trained layer as this kind of attention.

        Args:
            layer: any mechanism of `tucker_ref` that can be converted to this one.
            mean: GQA by averaging the heads of a group, not by SVD.
            moment: (D, D) of the layer's inputs, as in `compress`.
            method: of Tucker rows, as in `compress`.

        Returns:
            A layer with weights of its own.

        Raises:
            ValueError: as `to_gqa`, `to_mla` and `compress` do; for a row with norms, which no layer without them can be turned into.
        """
        if self.qk_norm or self.latent_norm:
            raise ValueError(f"{self.label} is trained from scratch; no layer is converted to it")
        if self.mechanism == "GQA":
            return to_gqa(layer, self.n_kv_heads, method="mean" if mean else "svd", moment=moment)
        if self.mechanism == "MLA":
            return to_mla(layer, self.latent, self.latent, shared_kv=self.shared_kv, moment=moment)
        if self.mechanism == "Tucker":
            return compress(layer, self.ranks, self.post_ranks or None, method=method, shared_kv=self.shared_kv, moment=moment)
        return copy.deepcopy(layer)

    def cost(self, d_model: int, n_heads: int, head_dim: int | None = None) -> Cost:
        """Its costs by Table 1's formulas, without the gains of norms; `count_parameters` of the built layer has them.

        Args:
            d_model: d.
            n_heads: n_H.
            head_dim: d_H, by default d / n_H.
        """
        if self.mechanism == "MHA":
            return mha_cost(d_model, n_heads, head_dim)
        if self.mechanism == "GQA":
            return gqa_cost(d_model, n_heads, self.n_kv_heads, head_dim)
        if self.mechanism == "MLA":
            options = dict(shared_kv=self.shared_kv, rope_dim=self.rope_dim)
            return mla_cost(d_model, n_heads, self.latent, self.latent, head_dim, **options)
        return tucker_cost(d_model, n_heads, self.ranks, self.post_ranks or None, shared_kv=self.shared_kv)

    def narrowed(self, factor: int) -> "Row":
        """The same row for a narrower model with as many heads: widths shrink, head counts and r1 stay.

        Parameter ratios between rows are then those of the full-size model, up to n_H r1.

        Args:
            factor: by which d, and the latent widths with it, are divided.
        """

        def narrow(ranks):
            return (ranks[0], *(rank // factor for rank in ranks[1:])) if ranks else ()

        return dataclasses.replace(
            self, latent=self.latent // factor, ranks=narrow(self.ranks), post_ranks=narrow(self.post_ranks), paper={}
        )

    def config(self) -> dict:
        """The fields that define the layer, for records; later ones only where they are set, so that older runs keep their ids."""
        later = {name for name in ("qk_norm", "latent_norm", "post_ranks", "rope_dim") if not getattr(self, name)}
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in later | {"paper"}}

    def normed(self) -> "Row":
        """The same row with what keeps its logits small from within: norms on the latents of MLA, QK-norm for the others."""
        return dataclasses.replace(
            self, **({"latent_norm": True} if self.mechanism == "MLA" else {"qk_norm": "head"}), paper={}
        )


def row_of(fields: dict) -> Row:
    """The row that a record describes: its file has lists for tuples."""
    return Row(**{name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()})


def labels_of(rows: Iterable[Row], mechanism: str = "") -> tuple[str, ...]:
    """What tables, records and `--rows` call these rows, all of them or those of one mechanism."""
    return tuple(row.label for row in rows if mechanism in ("", row.mechanism))


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

# Ours: every mechanism as it is, then with norms, for the comparison of each one at its best.
_KINDS = ("MHA", "GQA", "MLA", "Tucker")  # in this order
_BESIDE = tuple(row for row in TABLE2_BESIDE if row.mechanism != "Tucker")
TABLE2_BEST = tuple(sorted((*TABLE2, *_BESIDE), key=lambda row: _KINDS.index(row.mechanism)))
TABLE2_NORMED = tuple(row.normed() for row in TABLE2_BEST)
_LEFT_OUT = ("GQA n_KV=2", "MQA", "MLA shared d_c=128")
TABLE2_JUDGED = tuple(row.normed() for row in TABLE2_BEST if row.label not in _LEFT_OUT)  # by new seeds, as each does best

# Ours: as many attention parameters as one of the rows above has, or as large a cache.
TABLE2_EQUAL = (
    Row("Tucker", ranks=(12, 256, 256)),  # the parameters of MHA, the cache of GQA n_KV=4
    Row("Tucker", ranks=(12, 200, 200)),  # the parameters of GQA n_KV=4
    Row("Tucker", ranks=(8, 184, 176)),  # the parameters of MLA shared d_c=128
    Row("MLA", latent=16, shared_kv=True),  # the parameters of Tucker [8,128,128]
)


# Ours: nine other ways to spend the attention parameters of each Tucker row above, within 1 %, by that row's label. Each gives to
# something what it takes from something else: from one tensor to the other (first four), within both alike (next four), or by one latent
# for keys and values. `ALLOCATION_GIVES` says to what, in the same order.
ALLOCATION_GIVES = (
    "the output mode, from the query mode",
    "the query mode, from the output mode",
    "the head mode after the softmax, from that before it",
    "the head mode before the softmax, from that after it",
    "keys and values, from queries and outputs",
    "queries and outputs, from keys and values",
    "queries and outputs, from the head modes",
    "the head modes, from queries and outputs",
    "queries and outputs, by one latent for keys and values",
)


def _spent(ranks: tuple[int, int, int], *alike: tuple[int, int, int]) -> tuple[Row, ...]:
    """Four rows with exactly the parameters of Tucker [ranks], where a tensor has half of a rank and the other half as much again; then
    those with `alike` in both tensors, of which the last shares its latent."""
    r, s, t = ranks
    pairs = (
        ((r, s // 2, t), (r, 3 * s // 2, t)),
        ((r, 3 * s // 2, t), (r, s // 2, t)),
        ((r // 2, s, t), (3 * r // 2, s, t)),
        ((3 * r // 2, s, t), (r // 2, s, t)),
    )
    *separate, shared = alike
    rows = [Row("Tucker", ranks=pre, post_ranks=post) for pre, post in pairs] + [Row("Tucker", ranks=own) for own in separate]
    return (*rows, Row("Tucker", ranks=shared, shared_kv=True))


TABLE2_ALLOCATIONS = {
    f"Tucker [{','.join(map(str, ranks))}]": _spent(ranks, *alike)
    for ranks, *alike in (
        ((8, 128, 128), (8, 64, 216), (8, 216, 64), (4, 180, 128), (12, 100, 128), (8, 156, 128)),
        ((8, 128, 64), (8, 64, 128), (8, 184, 32), (4, 160, 64), (12, 108, 64), (8, 148, 64)),
        ((8, 64, 64), (8, 32, 104), (8, 104, 32), (4, 80, 64), (12, 54, 64), (8, 84, 64)),
    )
}

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

# Ours: all of them with norms, and the five whose settings are chosen on fresh text and judged there.
TABLE3_NORMED = tuple(row.normed() for row in TABLE3)
TABLE3_BEST = tuple(TABLE3_NORMED[n] for n in (0, 1, 3, 5, 7))
