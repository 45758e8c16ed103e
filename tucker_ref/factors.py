"""Rung 11a. What every mechanism is as core and factors, written down once (PyTorch).

Both attention tensors of every mechanism have slices

    W_h = P left_h right_h^T L^T          P (D, s), left_h (s, k), right_h (t, k), L (D, t)

P and L are the factors of the query or output mode and of the key or value mode; left_h right_h^T is the core's slice of head h:

                     P         left_h                    right_h                 L
    MHA, GQA  pre    W^Q       h's own columns           its group's columns     W^K
              post   W^O^T     h's own columns           its group's columns     W^V
    MLA       pre    W^DQ      W_h^UQ beside W_h^QR      W_h^UK^T, 1             W^DKV beside W^KR
              post   W^O^T     h's own columns           W_h^UV^T                W^DKV, or W^DV
    Tucker    pre    U2        slice h of C x_1 U1       1                       U3
              post   U~2       slice h of C~ x_1 U~1     1                       U~3

`as_tucker` multiplies left_h right_h^T out and has Theorems B.2-B.4. The spectra and the compression (rung 12) never do: where
a head takes columns as they are, only their number is kept. Biases are one more row of P and L, read by the constant 1 that is
appended to every token.
"""

from dataclasses import dataclass, replace
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import nn

from .cached_attention import plain_weight
from .gqa import GroupedQueryAttention
from .mha import MultiHeadAttention
from .mla import MultiHeadLatentAttention
from .norms import LatentNorm, QKNorm, side_by_side
from .rotary import Rotary
from .tucker import TuckerAttention
from .tucker_weights import SharedLatentWeights, TuckerWeights

Kinds = tuple[type[nn.Module], ...]
MECHANISMS = (MultiHeadAttention, GroupedQueryAttention, MultiHeadLatentAttention, TuckerAttention)
WEIGHTS: Kinds = (TuckerWeights, SharedLatentWeights)
# Methods that a subclass may have of its own: no number of a layer's output hangs on them.
COMPUTE_NOTHING = {
    "__init__", "reset_parameters", "extra_repr", "new_cache", "cache_streams", "check_call", "_example", "compile",
}  # fmt: skip


@dataclass(frozen=True)
class Factors:
    """One attention tensor as a layer holds it, W_h = P left_h right_h^T L^T.

    rows: P (D, s), where D is d, or d + 1 with biases; left: (h, s, k); columns: L (D, t); right: (h, t, k).
    Where head h takes a block of P's or L's columns as it is, left or right may be the (h,) block numbers.
    """

    rows: torch.Tensor
    left: torch.Tensor
    columns: torch.Tensor
    right: torch.Tensor

    def dense(self) -> "Factors":
        """Block numbers spelled out as zeros and ones: left (h, s, k), right (h, t, k)."""
        left, right = (
            heads if heads.ndim == 3 else times_heads(torch.eye(basis.shape[1]).to(basis), heads)
            for basis, heads in ((self.rows, self.left), (self.columns, self.right))
        )
        return replace(self, left=left, right=right)

    def head_cores(self) -> torch.Tensor:
        """left_h right_h^T, (h, s, t)."""
        dense = self.dense()
        return torch.einsum("hsk,htk->hst", dense.left, dense.right)


def times_heads(matrix: torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
    """matrix (c, s) times every head's (s, k), or the block of the matrix's columns that the head takes.  Returns: (h, c, k)."""
    if heads.ndim == 3:
        return matrix @ heads.to(matrix.dtype)
    blocks = matrix.unflatten(1, (int(heads.max()) + 1, -1)).transpose(0, 1)
    each_its_own = len(heads) == len(blocks) and bool((heads.diff() == 1).all())  # as in MHA: no copy is needed
    return blocks if each_its_own else blocks[heads]


@dataclass(frozen=True)
class LayerFactors:
    """Both tensors of a layer, and what stands beside them.

    pre: rows make queries, columns keys; post: rows make outputs, columns values; rotary: turns the columns of pre;
    shared_kv: the columns of post are the first ones of pre; norms: RMSNorms of the query, key and value latents;
    qk_norms: RMSNorms of the latent queries and keys before they are turned.
    output_bias: (d,), zeros where only queries, keys and values have biases, None without any.
    """

    pre: Factors
    post: Factors
    rotary: Rotary | None
    shared_kv: bool = False
    norms: tuple[nn.Module, nn.Module, nn.Module] | None = None
    qk_norms: tuple[QKNorm, QKNorm] | None = None
    output_bias: torch.Tensor | None = None


def factors_of(layer: nn.Module) -> LayerFactors:
    """Both attention tensors of any mechanism as core and factors: Thms B.2-B.4, Def. 2.1.

    Args:
        layer: any mechanism of this package, with its rotary embedding, biases and norms.

    Returns:
        Tensors without gradient that share memory with the layer's weights wherever they are those weights.

    Raises:
        ValueError: for another module, a subclass that computes by code of its own, or where a part of a layer has a hook, or was
            replaced by what computes something else.
    """
    if not isinstance(layer, MECHANISMS):
        raise ValueError(
            f"layer is {type(layer).__name__}; it must be MultiHeadAttention, GroupedQueryAttention, "
            "MultiHeadLatentAttention or TuckerAttention"
        )
    check_parts(layer)
    if isinstance(layer, TuckerAttention):
        return _of_tucker(layer)
    return _of_latent(layer) if isinstance(layer, MultiHeadLatentAttention) else _of_grouped(layer)


def check_parts(layer: nn.Module) -> None:
    """Raise ValueError for what a call runs and nobody reads here: hooks, and parts of another kind than the layer was made with."""
    made = vars(layer)
    of_heads: Kinds = (QKNorm if made.get("qk_norm") else nn.Identity,)
    of_latents: Kinds = (nn.Identity, *((nn.RMSNorm, LatentNorm) if made.get("latent_norm") else ()))
    for name, part in (("layer", layer), *layer.named_children()):
        for what, there in (
            ("hook", part._forward_hooks), ("pre-hook", part._forward_pre_hooks), ("method of its own", "forward" in vars(part)),
        ):  # fmt: skip
            if there:
                raise ValueError(f"{name} has a forward {what}, which is not read here and would be left out: remove it first")
        if name.endswith("norm") and _own_code(part, of_heads if name in ("q_norm", "k_norm") else of_latents):
            raise ValueError(
                f"{name} is {type(part).__name__}, a norm that this layer was not made with, and that is not known here"
            )
    if layer.rotary is not None and _own_code(layer.rotary, (Rotary,)):
        raise ValueError(f"rotary is {type(layer.rotary).__name__}, which turns by code of its own that is not known here")
    weights = ((name, getattr(layer, name), WEIGHTS) for name in ("pre", "post") if isinstance(layer, TuckerAttention))
    for name, part, kinds in (("layer", layer, MECHANISMS), *weights):
        if method := _own_code(part, kinds):
            raise ValueError(
                f"{name} is {type(part).__name__}, whose {method} is code of its own that is not read here; only those of "
                f"{', '.join(kind.__name__ for kind in kinds)} are"
            )


def _own_code(part: object, kinds: Kinds) -> str | None:
    """The first method in which a part is not the nearest of these classes; None where it is, as parametrised parts are."""
    known = next((kind for kind in type(part).__mro__ if kind in kinds), None)
    if known is None:
        return "forward"
    theirs = known.__mro__[: known.__mro__.index(nn.Module)]
    methods = {name for kind in theirs for name, method in vars(kind).items() if isinstance(method, (FunctionType, property))}
    computing = sorted(methods - COMPUTE_NOTHING) + ["__call__"]
    return next((m for m in computing if m in vars(part) or getattr(type(part), m) is not getattr(known, m)), None)


def _of_grouped(layer: MultiHeadAttention) -> LayerFactors:
    """The keys of all groups side by side are the latent, so the head schedule repeats per group."""
    w_q, w_k, w_v = (_with_bias_row(layer, name) for name in ("q_proj", "k_proj", "v_proj"))  # (D, heads * k)
    groups = w_k.shape[1] // layer.head_dim
    for name, heads in (("q_norm", layer.n_heads), ("k_norm", groups)):
        norm, made = vars(getattr(layer, name)), vars(QKNorm.of(layer.qk_norm, layer.head_dim, heads))
        if any(norm.get(option) != made.get(option) for option in ("heads", "blocks", "count")):
            raise ValueError(f"{name} takes mean squares of other channels than a layer with qk_norm={layer.qk_norm!r} does")
    head = torch.arange(layer.n_heads, device=w_q.device)  # (h,)
    group = head // (layer.n_heads // groups)  # (h,)
    w_o, output_bias = plain_weight(layer, "o_proj").detach(), layer.o_proj.bias
    if output_bias is None and layer.bias:
        output_bias = w_o.new_zeros(layer.d_model)
    return LayerFactors(
        Factors(w_q, head, w_k, group),
        Factors(w_o, head, w_v, group),
        rotary=None if layer.rotary is None else layer.rotary.repeated(groups),
        qk_norms=side_by_side(layer),
        output_bias=output_bias,
    )


def _with_bias_row(layer: nn.Module, name: str) -> torch.Tensor:
    """A projection's weight as it multiplies a token from the right, (d, out), with the bias as a last row where there is one."""
    weight, bias = plain_weight(layer, name).detach().T, getattr(layer, name).bias
    return weight if bias is None else torch.cat([weight, bias.detach()[None]])


def _of_latent(layer: MultiHeadLatentAttention) -> LayerFactors:
    """Decoupled: U3 = [W^DKV, W^KR], frequency zero on the first d_c channels. Coupled: the latent is the key (Cor. 3.2.1)."""
    h, t, rope = layer.n_heads, layer.kv_rank, layer.rope_dim
    names = ("q_a_proj", "kv_a_proj_with_mqa", "o_proj", "q_b_proj")
    w_dq, w_dk, w_o, w_uq = (plain_weight(layer, name).detach() for name in names)
    w_uk, w_uv = (w.detach() for w in layer.up_projections())  # (h, k, t), (h, v, t)
    value = w_dk[:t] if layer.shared_kv else plain_weight(layer, "v_a_proj").detach()  # (t, d)
    odd = t % 2 if rope else 0  # channels turn in pairs: an odd latent gets one more, of zeros, before the rotary ones
    key = torch.cat([F.pad(w_dk[:t], (0, 0, 0, odd)), w_dk[t:]])  # (t + odd + rope, d)
    left = w_uq.unflatten(0, (h, -1)).mT  # (h, s, k + rope)
    right = F.pad(w_uk.mT, (0, rope, 0, odd + rope))  # (h, t + odd + rope, k + rope)
    right[:, t + odd :, layer.head_dim :] = torch.eye(rope)
    return LayerFactors(
        Factors(w_dq.T, left, key.T, right),
        Factors(w_o, torch.arange(h, device=w_o.device), value.T, w_uv.mT),
        rotary=layer.rotary.after_unrotated(t + odd) if rope else layer.rotary if layer.coupled else None,
        shared_kv=layer.shared_kv,
        norms=_norms(layer) if layer.latent_norm else None,
    )


def _norms(layer: MultiHeadLatentAttention) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Copies of the layer's RMSNorms for query, key and value latent; the rotary key stays as it is."""

    def copied(original) -> nn.Module:
        if isinstance(original, nn.Identity):  # queries that read the token itself have no latent to normalise
            return original
        gains = original.weight
        if gains is None:  # elementwise_affine=False: all are one
            gains = layer.o_proj.weight.new_ones(original.normalized_shape)
        norm = LatentNorm(len(gains), eps=original.eps)
        norm.weight = nn.Parameter(gains.detach().clone())
        return norm

    value = nn.Identity() if layer.shared_kv else copied(layer.v_a_layernorm)
    return copied(layer.q_a_layernorm), copied(layer.kv_a_layernorm), value


def _of_tucker(layer: TuckerAttention) -> LayerFactors:
    def factors(weights: TuckerWeights) -> Factors:
        core, head = weights.core.detach().double(), weights.factors[0].detach().double()  # mixed in less, it would gain ranks
        cores = torch.einsum("rst,hr->hst", core, head)  # (h, s, t)
        identity = torch.eye(cores.shape[2]).to(cores).expand(len(cores), -1, -1)  # (h, t, t)
        return Factors(weights.factors[1].detach(), cores, weights.factors[2].detach(), identity)

    pre, post = factors(layer.pre), factors(layer.post)
    return LayerFactors(
        pre,
        replace(post, columns=pre.columns) if layer.shared_kv else post,  # `pre` may have been replaced since
        rotary=layer.rotary,
        shared_kv=layer.shared_kv,
        norms=(layer.query_norm, layer.key_norm, layer.value_norm) if layer.latent_norm else None,
        qk_norms=(layer.q_norm, layer.k_norm) if layer.qk_norm else None,  # type: ignore[arg-type]
        output_bias=layer.output_bias,
    )
