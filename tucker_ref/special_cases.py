"""Rung 11. The theorems as code: every mechanism of this ladder is a Tucker Attention, and `as_tucker` writes it down.

    Thm B.2   multi-head attention        pre (n_H, d, d)           post (n_H, d, d)
    Thm B.3   grouped-query attention     pre (n_H, d, n_KV d_H)    post (n_H, d, n_KV d_H)
              multi-query attention       pre (n_H, d, d_H)         post (n_H, d, d_H)
    Thm B.4   multi-head latent           pre (n_H, d_c^Q, d_c^K)   post (n_H, d, d_c^K)

None of them compresses the head mode: U1 is the identity in every one. The ranks are maxima; where the product of the other
two ranks is smaller (a narrow head, a narrow latent), `_within_limits` takes the smaller, actual rank.

Beyond the paper, rotary embeddings and biases carry over exactly:

    MHA, GQA, MQA with RoPE       the keys of all groups side by side are the latent, so the head schedule repeats per group
    MLA with decoupled RoPE       U3 = [W^DKV, W^KR] and C_h = [W_h^UQ W_h^UK^T, W_h^QR]; frequency zero on the first d_c channels
    MLA with coupled RoPE         the latent is the key already (Cor. 3.2.1)
    query, key and value biases   one more row of U2, U3 and U~3, read by the constant 1 appended to every token

MHA, GQA and MQA with QK-norm become a Tucker Attention with QK-norm in blocks (see `norms`): equal, but no longer Def. 2.1.

MLA with RMSNorm on its latents becomes a Tucker Attention with the same norms: equal, but no longer Def. 2.1.
"""

import copy
import math

import torch
from torch import nn

from .mha import MultiHeadAttention
from .mla import MultiHeadLatentAttention
from .norms import LatentNorm, side_by_side
from .tucker import TuckerAttention
from .tucker_weights import TuckerWeights


def as_tucker(layer: nn.Module) -> TuckerAttention:
    """The Tucker Attention that computes exactly what `layer` computes, with weights of its own.

    layer: any mechanism of this package, with its rotary embedding, biases and norms.
    Raises ValueError for another module.
    """
    if isinstance(layer, TuckerAttention):
        return copy.deepcopy(layer)
    if isinstance(layer, MultiHeadAttention):  # and with it GroupedQueryAttention
        return _grouped(layer)
    if isinstance(layer, MultiHeadLatentAttention):
        return _latent(layer)
    raise ValueError(
        f"layer is {type(layer).__name__}; it must be MultiHeadAttention, GroupedQueryAttention, "
        "MultiHeadLatentAttention or TuckerAttention"
    )


def _grouped(layer: MultiHeadAttention) -> TuckerAttention:
    """Thms B.2 and B.3: the factors are the projections themselves, and one core of zeros and ones routes head to group."""
    w_q, w_k, w_v = (with_bias_row(p) for p in (layer.q_proj, layer.k_proj, layer.v_proj))  # (d, ...) or (d + 1, ...)
    w_o = layer.o_proj.weight.detach()
    h, k = layer.n_heads, layer.head_dim
    g = w_k.shape[1] // k
    head_to_group = torch.eye(g).repeat_interleave(h // g, dim=0)  # (h, g)
    # Entry [h, (i, k), (g, l)] is 1 where i is head h, g its group, and k = l.
    routing = torch.einsum("hi,hg,kl->hikgl", torch.eye(h), head_to_group, torch.eye(k)).reshape(h, h * k, g * k)
    routing, heads = routing.to(w_q), torch.eye(h).to(w_q)
    # Key coordinates that are turned or normalised may not be mixed.
    modes = (0, 1, 2) if layer.rotary is None and layer.qk_norm is None else (0, 1)
    return TuckerAttention.from_weights(
        _within_limits(routing, {"head": heads, "query": w_q, "key": w_k}, modes),
        _within_limits(routing, {"head": heads, "output": w_o, "value": w_v}),
        scale=layer.scale,
        rotary=None if layer.rotary is None else layer.rotary.repeated(g),
        output_bias=output_bias_of(layer),
        qk_norms=side_by_side(layer),
    )


def with_bias_row(projection: nn.Linear) -> torch.Tensor:
    """The weight as it multiplies a token from the right, (d, out), with the bias as a last row where there is one."""
    weight = projection.weight.detach().T
    return weight if projection.bias is None else torch.cat([weight, projection.bias.detach()[None]])


def output_bias_of(layer: nn.Module) -> torch.Tensor | None:
    """The output bias of the layer's Tucker form, (d,): zeros where only queries, keys and values have biases, None without any."""
    if isinstance(layer, TuckerAttention):
        return layer.output_bias
    if not isinstance(layer, MultiHeadAttention) or not layer.bias:
        return None
    return layer.o_proj.weight.new_zeros(layer.d_model) if layer.o_proj.bias is None else layer.o_proj.bias


def _latent(layer: MultiHeadLatentAttention) -> TuckerAttention:
    """Thm B.4: the factors are the down-projections, the core holds what is left of every head, C_h = W_h^UQ W_h^UK^T."""
    h, k, v, rope = layer.n_heads, layer.head_dim, layer.v_head_dim, layer.rope_dim
    w_dq, w_dk, w_o = (p.weight.detach() for p in (layer.q_a_proj, layer.kv_a_proj_with_mqa, layer.o_proj))
    w_uq, w_qr = layer.q_b_proj.weight.detach().unflatten(0, (h, -1)).split([k, rope], dim=1)  # (h, k, s), (h, rope, s)
    w_uk, w_uv = (w.detach() for w in layer.up_projections())  # (h, k, t), (h, v, t)
    heads = torch.eye(h).to(w_o)
    key = nn.Parameter(w_dk.T.clone(memory_format=torch.contiguous_format))  # (d, t + rope)
    core = torch.cat([torch.einsum("hks,hkt->hst", w_uq, w_uk), w_qr.mT], dim=2)  # (h, s, t + rope)
    t, rotary = layer.kv_rank, copy.deepcopy(layer.rotary)
    if rope:
        if t % 2:  # channels turn in pairs: an odd latent gets one more channel, of zeros, before the rotary ones
            key, core = nn.Parameter(widened(key, t)), widened(core, t)
        rotary = layer.rotary.after_unrotated(t + t % 2)
    # Output channel (i, v) of head h: its value up-projection where i is h, else zero.
    post_core = torch.einsum("hi,hvt->hivt", heads, w_uv).reshape(h, h * v, -1)
    if not layer.shared_kv:
        value = layer.v_a_proj.weight.T
    else:  # values ignore the rotary channels of the shared latent
        unused = key.shape[1] - layer.kv_rank
        value, post_core = key, torch.cat([post_core, post_core.new_zeros(h, h * v, unused)], dim=2)
    # A shared latent must stay the same on both sides, and neither turned nor normalised coordinates may be mixed.
    modes = [0] + [1] * (not layer.latent_norm) + [2] * (not (layer.latent_norm or layer.shared_kv or layer.rotary))
    post_modes = [0, 1] + [2] * (not (layer.latent_norm or layer.shared_kv))
    return TuckerAttention.from_weights(
        _within_limits(core, {"head": heads, "query": w_dq.T, "key": key}, modes),
        _within_limits(post_core, {"head": heads, "output": w_o, "value": value}, post_modes),
        scale=layer.scale,
        rotary=rotary,
        norms=_norms(layer) if layer.latent_norm else None,
    )


def widened(x: torch.Tensor, place: int) -> torch.Tensor:
    """x with one more channel of zeros at this place of its last axis."""
    return torch.cat([x[..., :place], torch.zeros_like(x[..., :1]), x[..., place:]], dim=-1)


def _norms(layer: MultiHeadLatentAttention) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The layer's RMSNorms for query, key and value latent; the rotary key stays as it is."""

    def copied(original) -> LatentNorm:
        weight = original.weight.detach()
        norm = LatentNorm(len(weight), eps=original.eps)
        norm.weight = nn.Parameter(weight.clone())
        return norm

    value = nn.Identity() if layer.shared_kv else copied(layer.v_a_layernorm)
    return copied(layer.q_a_layernorm), copied(layer.kv_a_layernorm), value


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
