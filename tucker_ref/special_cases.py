"""Rung 11. The theorems as code: every mechanism of this ladder is a Tucker Attention, and `as_tucker` writes it down.

    Thm B.2   multi-head attention        pre (n_H, d, d)           post (n_H, d, d)
    Thm B.3   grouped-query attention     pre (n_H, d, n_KV d_H)    post (n_H, d, n_KV d_H)
              multi-query attention       pre (n_H, d, d_H)         post (n_H, d, d_H)
    Thm B.4   multi-head latent           pre (n_H, d_c^Q, d_c^K)   post (n_H, d, d_c^K)

None of them compresses the head mode: U1 is the identity in every one. The ranks are maxima; where the product of the other
two ranks is smaller (a narrow head, a narrow latent), `_within_limits` takes the smaller, actual rank.
"""

import copy
import math

import torch
from torch import nn

from .mha import MultiHeadAttention
from .mla import MultiHeadLatentAttention
from .tucker import TuckerAttention, TuckerWeights


def as_tucker(layer: nn.Module) -> TuckerAttention:
    """The Tucker Attention that computes exactly what `layer` computes, with weights of its own.

    layer: any mechanism of this package.
    Raises ValueError for another module, and for MLA with latent_norm, which is not linear in the latents (not Def. 2.1).
    """
    if isinstance(layer, TuckerAttention):
        return copy.deepcopy(layer)
    if isinstance(layer, MultiHeadAttention):  # and with it GroupedQueryAttention
        pre, post = _grouped(layer)
    elif isinstance(layer, MultiHeadLatentAttention):
        pre, post = _latent(layer)
    else:
        raise ValueError(
            f"layer is {type(layer).__name__}; it must be MultiHeadAttention, GroupedQueryAttention, "
            "MultiHeadLatentAttention or TuckerAttention"
        )
    return TuckerAttention.from_weights(pre, post, scale=layer.scale)


def _grouped(layer: MultiHeadAttention) -> tuple[TuckerWeights, TuckerWeights]:
    """Thms B.2 and B.3: the factors are the projections themselves, and one core of zeros and ones routes head to group."""
    w_q, w_k, w_v, w_o = (p.weight.detach() for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))
    h, k = layer.n_heads, layer.head_dim
    g = len(w_k) // k
    head_to_group = torch.eye(g).repeat_interleave(h // g, dim=0)  # (h, g)
    # Entry [h, (i, k), (g, l)] is 1 where i is head h, g its group, and k = l.
    routing = torch.einsum("hi,hg,kl->hikgl", torch.eye(h), head_to_group, torch.eye(k)).reshape(h, h * k, g * k)
    routing, heads = routing.to(w_q), torch.eye(h).to(w_q)
    pre = _within_limits(routing, {"head": heads, "query": w_q.T, "key": w_k.T})
    post = _within_limits(routing, {"head": heads, "output": w_o, "value": w_v.T})
    return pre, post


def _latent(layer: MultiHeadLatentAttention) -> tuple[TuckerWeights, TuckerWeights]:
    """Thm B.4: the factors are the down-projections, the core holds what is left of every head, C_h = W_h^UQ W_h^UK^T."""
    if layer.latent_norm:
        raise ValueError("layer has latent_norm=True; RMSNorm on the latents is not linear, so Def. 2.1 does not cover it")
    h, v = layer.n_heads, layer.v_head_dim
    w_dq, w_dk, w_o = (p.weight.detach() for p in (layer.q_a_proj, layer.kv_a_proj_with_mqa, layer.o_proj))
    w_uq = layer.q_b_proj.weight.detach().unflatten(0, (h, -1))  # (h, k, s)
    w_uk, w_uv = (w.detach() for w in layer.up_projections())  # (h, k, t), (h, v, t)
    heads = torch.eye(h).to(w_o)
    key = nn.Parameter(w_dk.T.clone())
    value = key if layer.shared_kv else layer.v_a_proj.weight.T
    core = torch.einsum("hks,hkt->hst", w_uq, w_uk)
    # Output channel (i, v) of head h: its value up-projection where i is h, else zero.
    post_core = torch.einsum("hi,hvt->hivt", heads, w_uv).reshape(h, h * v, -1)
    modes = (0, 1) if layer.shared_kv else (0, 1, 2)  # a shared latent must stay the same on both sides
    pre = _within_limits(core, {"head": heads, "query": w_dq.T, "key": key}, modes)
    post = _within_limits(post_core, {"head": heads, "output": w_o, "value": value}, modes)
    return pre, post


def _within_limits(core: torch.Tensor, factors: dict[str, torch.Tensor], modes=(0, 1, 2)) -> TuckerWeights:
    """The same tensor with no rank above its mode's size or above the product of the other two ranks.

    A factor wider than tall moves into the core; a core slice matrix taller than wide moves into the factor.
    """
    names = list(factors)
    for mode in modes:
        name = names[mode]
        factor = factors[name]  # (size, rank)
        if factor.shape[1] > factor.shape[0]:
            core = _mode_product(core, factor, mode)
            factors[name] = torch.eye(len(factor)).to(factor)
    for mode in modes:
        name = names[mode]
        unfolded = core.movedim(mode, 0).flatten(1)  # (rank, product of the others)
        if unfolded.shape[0] > unfolded.shape[1]:
            factors[name] = factors[name] @ unfolded
            others = [size for n, size in enumerate(core.shape) if n != mode]
            core = torch.eye(math.prod(others)).to(core).reshape(-1, *others).movedim(0, mode)
    return TuckerWeights(core, factors)


def _mode_product(tensor: torch.Tensor, matrix: torch.Tensor, mode: int) -> torch.Tensor:
    """T x_n M as in rung 1, in torch."""
    return torch.tensordot(matrix, tensor, dims=([1], [mode])).movedim(0, mode)
