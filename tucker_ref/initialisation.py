"""Beside rungs 7 to 10. Where the mechanisms start: GPT-2's normal weights, and what is as large in the others (PyTorch).

MLA: normal weights. Latents get variance 1 from unit-variance tokens, and the up-projections bring it to d std^2.
Tucker, "orthonormal": factors with orthonormal columns, Gaussian cores. On unit-variance tokens a multi-head layer, with projections of
the given std and the residual scaled by output_gain, has logits of variance (d std^2)^2 and outputs of variance
d std^2 * d (std output_gain)^2; the core variances give the same two.
Tucker, "xavier": said to be the authors' choice; output_gain scales the post-softmax core.  Biases start at zero, norms at one.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .norms import LatentNorm


def initialise_heads(layer, std: float, output_gain: float) -> None:
    """Fill all weights of a MultiHeadAttention or GroupedQueryAttention.  std, output_gain: as in its `reset_parameters`."""
    for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
        gain = output_gain if projection is layer.o_proj else 1.0
        nn.init.normal_(projection.weight, std=std * gain)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
    for gains in (*layer.q_norm.parameters(), *layer.k_norm.parameters()):
        nn.init.ones_(gains)


def initialise_latent(layer, std: float, output_gain: float) -> None:
    """Fill all weights of a MultiHeadLatentAttention.  std, output_gain: as in its `reset_parameters`."""
    d = layer.d_model
    for down in (layer.q_a_proj, layer.kv_a_proj_with_mqa, *([] if layer.shared_kv else [layer.v_a_proj])):
        nn.init.normal_(down.weight, std=d**-0.5)
    nn.init.normal_(layer.kv_a_proj_with_mqa.weight[layer.kv_rank :], std=std)  # W^KR makes keys, not a latent
    for up in (layer.q_b_proj, layer.kv_b_proj):
        nn.init.normal_(up.weight, std=std * (d / up.in_features) ** 0.5)
    nn.init.normal_(layer.o_proj.weight, std=std * output_gain)
    for norm in (layer.q_a_layernorm, layer.kv_a_layernorm, *([] if layer.shared_kv else [layer.v_a_layernorm])):
        if isinstance(norm, nn.RMSNorm):
            norm.reset_parameters()


@torch.no_grad()
def initialise_tucker(layer, std: float, output_gain: float) -> None:
    """Fill all weights of a TuckerAttention.  std, output_gain: as in its `reset_parameters`."""
    fill = nn.init.xavier_uniform_ if layer.init == "xavier" else nn.init.orthogonal_
    for weights in (layer.pre, layer.post):
        for name, factor in weights.named_parameters():
            if name != "core":
                rows = len(factor) if name == "head" else layer.d_model
                at_least_float32 = torch.promote_types(factor.dtype, torch.float32)  # QR knows no bfloat16
                factor[:rows] = fill(torch.empty(rows, factor.shape[1], dtype=at_least_float32, device=factor.device))
                factor[rows:] = 0.0  # the bias row, where there is one
    if layer.output_bias is not None:
        layer.output_bias.zero_()
    for norm in (layer.query_norm, layer.key_norm, layer.value_norm):
        if isinstance(norm, LatentNorm):
            norm.weight.fill_(1.0)
    for gains in (*layer.q_norm.parameters(), *layer.k_norm.parameters()):
        gains.fill_(1.0)
    if layer.init == "xavier":
        fill(layer.pre.core)
        fill(layer.post.core).mul_(output_gain)
    else:
        _fill_cores(layer, std, output_gain)


def _fill_cores(layer, std: float, output_gain: float) -> None:
    """The cores of "orthonormal"."""
    d = layer.d_model
    logit_variance = (d * std**2) ** 2
    output_variance = d * std**2 * d * (std * output_gain) ** 2
    # Latents have variance 1, less where one without a norm is wider than the model and cannot be orthonormal.
    narrow, post_narrow = (1.0 if layer.latent_norm else min(1.0, d / r[2]) for r in (layer.ranks, layer.post_ranks))
    core_size, post_core_size = layer.pre.core.numel() * narrow, layer.post.core.numel() * post_narrow
    layer.pre.core.normal_(std=(logit_variance * layer.n_heads / layer.scale**2 / core_size) ** 0.5)
    layer.post.core.normal_(std=(output_variance * d / post_core_size) ** 0.5)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """What is built inside has shapes, but no memory and no numbers: it stands on the device "meta"."""
    with torch.device("meta"), _Unfilled():
        yield


class _Unfilled(TorchFunctionMode):
    """Nothing is drawn: for a normal number on that device PyTorch imports its compiler, which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") == "normal_":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))
