"""QK-clip (Kimi K2, 2025): after a step, heads whose largest logit has passed a limit get smaller query and key weights.

A head's logits are linear in its own share of the weights, so they come back to the limit exactly, and the layer stays as trilinear
as it was, which QK-norm does not leave it. What a head owns differs from mechanism to mechanism: `scale_logits` knows it.
"""

import torch
from torch import nn

from tucker_ref import MultiHeadAttention, MultiHeadLatentAttention, TuckerAttention

from .observe import largest_logits, watch

EVERY = 10  # steps between two looks at the logits


def logits_of(model: nn.Module, tokens: torch.Tensor) -> list[torch.Tensor]:
    """The largest |logit| of every head on some tokens.

    Args:
        model: a language model.
        tokens: (1, n) integers.

    Returns:
        (h,) float32 per block.
    """
    largest: list[torch.Tensor] = []
    watch(model, tokens, lambda q, k, v, z, scale: largest.append(largest_logits(q, k, scale)))
    return largest


def clip_heads(model: nn.Module, tokens: torch.Tensor, limit: float) -> int:
    """Bring every head of a model back to the limit.

    Args:
        model: a language model.
        tokens: (1, n) integers, those that the limit is checked on.
        limit: as in `clip`.

    Returns:
        How many heads were clipped.
    """
    return clip([block.attention for block in model.blocks], logits_of(model, tokens), limit)


@torch.no_grad()
def clip(layers: list[nn.Module], largest: list[torch.Tensor], limit: float) -> int:
    """Bring every head back to the limit.

    Args:
        layers: attention layers.
        largest: per layer and head the largest |logit| on some tokens, (h,) each.
        limit: what no logit on these tokens may exceed.

    Returns:
        How many heads were clipped.
    """
    factors = [limit / logits.clamp(min=limit) for logits in largest]  # (h,) each, 1 where nothing is to be done
    for layer, share in zip(layers, factors):
        scale_logits(layer, share)
    return sum(int((share < 1).sum()) for share in factors)


@torch.no_grad()
def scale_logits(layer: nn.Module, factors: torch.Tensor) -> None:
    """Multiply the logits of head h by factors[h], in the layer's weights.

    Multi-head attention and MLA divide the factor between the query and the key of a head, as Kimi K2 does. Where heads share
    their keys, as in GQA and Tucker Attention, the head's own side takes it all: its query weights, or its row of U1.

    Args:
        layer: any mechanism of tucker_ref, without norms on queries and keys.
        factors: (h,), positive.

    Raises:
        ValueError: for another module, or queries and keys that are normalised, whose logits do not depend on how large weights are.
    """
    if getattr(layer, "qk_norm", None):
        raise ValueError(f"layer has qk_norm={layer.qk_norm!r}; its logits are bounded already and cannot be clipped")
    if isinstance(layer, TuckerAttention):
        layer.pre.head.mul_(factors.to(layer.pre.head)[:, None])  # (h, r)
    elif isinstance(layer, MultiHeadAttention):
        factors, shared = factors.to(layer.q_proj.weight), layer.k_proj.out_features < layer.q_proj.out_features
        per_channel = (factors if shared else factors.sqrt()).repeat_interleave(layer.head_dim)  # (h k,)
        for projection in (layer.q_proj,) if shared else (layer.q_proj, layer.k_proj):
            projection.weight.mul_(per_channel[:, None])
            if projection.bias is not None:
                projection.bias.mul_(per_channel)
    elif isinstance(layer, MultiHeadLatentAttention):
        root = factors.to(layer.q_b_proj.weight).sqrt()[:, None, None]
        queries = layer.q_b_proj.weight.unflatten(0, (layer.n_heads, -1))  # (h, k + rope, s), a view
        queries[:, : layer.head_dim].mul_(root)
        queries[:, layer.head_dim :].mul_(root**2)  # the rotary key is shared
        layer.up_projections()[0].mul_(root)  # (h, k, t), a view too
    else:
        raise ValueError(f"layer is {type(layer).__name__}; it must be an attention of tucker_ref")
