"""Rung 11b. The theorems as code: every mechanism of this ladder is a Tucker Attention, and `as_tucker` writes it down.

    Thm B.2   multi-head attention        pre (n_H, d, d)           post (n_H, d, d)
    Thm B.3   grouped-query attention     pre (n_H, d, n_KV d_H)    post (n_H, d, n_KV d_H)
              multi-query attention       pre (n_H, d, d_H)         post (n_H, d, d_H)
    Thm B.4   multi-head latent           pre (n_H, d_c^Q, d_c^K)   post (n_H, d, d_c^K)

None of them compresses the head mode: U1 is the identity in every one. The ranks are maxima; where the product of the other
two ranks is smaller (a narrow head, a narrow latent), `_within_limits` takes the smaller, actual rank.

Beyond the paper, rotary embeddings and biases carry over exactly; `factors_of` says how.
MHA, GQA and MQA with QK-norm become a Tucker Attention with QK-norm in blocks (see `norms`): equal, but no longer Def. 2.1.
MLA with RMSNorm on its latents becomes a Tucker Attention with the same norms: equal, but no longer Def. 2.1.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from .factors import factors_of
from .tucker import TuckerAttention
from .tucker_weights import TuckerWeights

Tucker = tuple[torch.Tensor, dict[str, torch.Tensor]]  # a core, and its factors by name in mode order


def as_tucker(layer: nn.Module) -> TuckerAttention:
    """The Tucker Attention that computes exactly what a layer computes (Thms B.2-B.4).

    Args:
        layer: any mechanism of this package, with its rotary embedding, biases and norms.

    Returns:
        A layer with weights of its own.

    Raises:
        ValueError: for another module, or where a part of it was replaced by what computes more than its weight, as an adapter does.
    """
    if isinstance(layer, TuckerAttention):
        return copy.deepcopy(layer)
    both = factors_of(layer)
    pre, post, normed = both.pre, both.post, both.norms is not None
    fixed = normed or both.shared_kv or both.rotary or both.qk_norms  # key coordinates that may not be mixed
    core, post_core = pre.head_cores(), post.head_cores()  # (h, s, t), (h, o, v)
    heads = torch.eye(len(core)).to(core)
    outputs = {"head": heads, "output": post.rows}
    if both.shared_kv:  # values ignore the rotary channels of the shared latent
        post_core = F.pad(post_core, (0, core.shape[2] - post_core.shape[2]))
    else:
        outputs["value"] = post.columns
    # A shared latent must stay the same on both sides, and neither turned nor normalised coordinates may be mixed.
    modes = [0] + [1] * (not normed) + [2] * (not fixed)
    post_modes = [0, 1] + [2] * (not (normed or both.shared_kv))
    return tucker_layer(
        _within_limits(core, {"head": heads, "query": pre.rows, "key": pre.columns}, modes),
        _within_limits(post_core, outputs, post_modes),
        scale=layer.scale,
        rotary=copy.deepcopy(both.rotary),
        output_bias=both.output_bias,
        norms=both.norms,
        qk_norms=both.qk_norms,
    )


def tucker_layer(pre: Tucker, post: Tucker, **options) -> TuckerAttention:
    """The layer with these cores and factors; without a factor "value" keys and values share one latent, the key's.

    options: as in TuckerAttention.from_weights.
    """
    (core, factors), (post_core, post_factors) = pre, post
    if "value" not in post_factors:
        key = nn.Parameter(factors["key"].clone(memory_format=torch.contiguous_format))
        factors, post_factors = factors | {"key": key}, post_factors | {"value": key}
    return TuckerAttention.from_weights(TuckerWeights(core, factors), TuckerWeights(post_core, post_factors), **options)


def _within_limits(core: torch.Tensor, factors: dict[str, torch.Tensor], modes: list[int]) -> Tucker:
    """The same tensor with no rank above its mode's size or above the product of the other two ranks.

    A factor wider than tall moves into the core; a core slice matrix taller than wide moves into the factor.
    """
    names = list(factors)
    for mode in modes:
        name = names[mode]
        factor = factors[name]  # (size, rank)
        if factor.shape[1] > factor.shape[0]:
            core = (core.movedim(mode, -1) @ factor.T).movedim(-1, mode)
            factors[name] = torch.eye(len(factor)).to(factor)
    for mode in modes:
        name = names[mode]
        unfolded = core.movedim(mode, 0).flatten(1)  # (rank, product of the others)
        if unfolded.shape[0] > unfolded.shape[1]:
            factors[name] = factors[name] @ unfolded
            others = [size for n, size in enumerate(core.shape) if n != mode]
            core = torch.eye(math.prod(others)).to(core).reshape(-1, *others).movedim(0, mode)
    return core, factors
