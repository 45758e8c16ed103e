"""Beside rungs 7 to 10. Where the mechanisms start: GPT-2's normal weights, and what is as large in the others (PyTorch).

MLA: normal weights. Latents get variance 1 from unit-variance tokens, and the up-projections bring it to d std^2.
Tucker, "orthonormal": factors with orthonormal columns, Gaussian cores. On unit-variance tokens a multi-head layer, with projections of
the given std and the residual scaled by output_gain, has logits of variance (d std^2)^2 and outputs of variance
d std^2 * d (std output_gain)^2; the core variances give the same two.
Tucker, "xavier": said to be the authors' choice; output_gain scales the post-softmax core.  Biases start at zero, norms at one.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .checks import check_number
from .norms import LatentNorm


def initialise_heads(layer, std: float, output_gain: float) -> None:
    """Fill all weights of a MultiHeadAttention or GroupedQueryAttention.  std, output_gain: as in its `reset_parameters`."""
    std, output_gain = _numbers(std, output_gain)
    projections, spreads = (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj), (std, std, std, std * output_gain)
    _check_held(layer, std, output_gain, spreads)
    for projection, spread in zip(projections, spreads):
        nn.init.normal_(projection.weight, std=spread)
        if projection.bias is not None:
            nn.init.zeros_(projection.bias)
    for gains in (*layer.q_norm.parameters(), *layer.k_norm.parameters()):
        nn.init.ones_(gains)


def initialise_latent(layer, std: float, output_gain: float) -> None:
    """Fill all weights of a MultiHeadLatentAttention.  std, output_gain: as in its `reset_parameters`."""
    std, output_gain = _numbers(std, output_gain)
    d, downs = layer.d_model, [layer.q_a_proj, layer.kv_a_proj_with_mqa, *([] if layer.shared_kv else [layer.v_a_proj])]
    wanted = [(down.weight, d**-0.5) for down in downs]
    wanted.append((layer.kv_a_proj_with_mqa.weight[layer.kv_rank :], std))  # W^KR makes keys, not a latent
    wanted += [(up.weight, std * (d / up.in_features) ** 0.5) for up in (layer.q_b_proj, layer.kv_b_proj)]
    wanted.append((layer.o_proj.weight, std * output_gain))
    _check_held(layer, std, output_gain, [spread for _, spread in wanted])
    for weight, spread in wanted:
        nn.init.normal_(weight, std=spread)
    for norm in (layer.q_a_layernorm, layer.kv_a_layernorm, *([] if layer.shared_kv else [layer.v_a_layernorm])):
        if isinstance(norm, nn.RMSNorm):
            norm.reset_parameters()


@torch.no_grad()
def initialise_tucker(layer, std: float, output_gain: float) -> None:
    """Fill all weights of a TuckerAttention.  std, output_gain: as in its `reset_parameters`."""
    std, output_gain = _numbers(std, output_gain)
    spreads = [output_gain] if layer.init == "xavier" else _core_spreads(layer, std, output_gain)
    _check_held(layer, std, output_gain, spreads)
    fill = nn.init.xavier_uniform_ if layer.init == "xavier" else nn.init.orthogonal_
    for weights in (layer.pre, layer.post):
        for name, factor in weights.named_parameters():
            if name != "core":
                rows = len(factor) if name == "head" else layer.d_model
                at_least_float32 = torch.promote_types(factor.dtype, torch.float32)  # QR knows no bfloat16
                factor[:rows] = fill(factor.new_empty(rows, factor.shape[1], dtype=at_least_float32))
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
        for core, spread in zip((layer.pre.core, layer.post.core), spreads):
            nn.init.normal_(core, std=spread)


def _numbers(std: float, output_gain: float) -> tuple[float, float]:
    return check_number("std", std, 0.0), check_number("output_gain", output_gain, 0.0)


def _check_held(layer, std: float, output_gain: float, spreads: Sequence[float]) -> None:
    """Raise ValueError, before anything is drawn, unless the weights' dtype holds normal numbers of these standard deviations."""
    weight = next(layer.parameters())
    if weight.is_meta:  # nothing is drawn
        return
    limits = torch.finfo(weight.dtype)
    for spread in spreads:
        # No draw is nearly 16 standard deviations from zero.
        if not (limits.tiny <= spread <= limits.max / 16 or (spread == 0 and 0 in (std, output_gain))):
            scale = f", scale {layer.scale}" if hasattr(layer, "ranks") else ""  # its cores alone depend on it
            raise ValueError(
                f"std is {std}, output_gain {output_gain}{scale}: weights would have a standard deviation of {spread:.1e}; "
                f"for {weight.dtype} it must be from {limits.tiny:.1e} to {limits.max / 16:.1e}"
            )


def _core_spreads(layer, std: float, output_gain: float) -> list[float]:
    """Standard deviations of the cores of "orthonormal", infinite where they overflow."""
    d = layer.d_model
    # Latents have variance 1, less where one without a norm is wider than the model and cannot be orthonormal.
    narrow, post_narrow = (1.0 if layer.latent_norm else min(1.0, d / r[2]) for r in (layer.ranks, layer.post_ranks))
    core_size, post_core_size = layer.pre.core.numel() * narrow, layer.post.core.numel() * post_narrow
    # The roots of the two variances at the top, without squares, which leave float64 first; products do not raise.
    size = d * std * std
    return [size * (layer.n_heads / core_size) ** 0.5 / abs(layer.scale), size * output_gain * (d / post_core_size) ** 0.5]


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
