"""Rung 12i. Layers with QK-norm: the tensor between their norms, and the same layer with its norms and fewer ranks (PyTorch).

QK-norm divides every query and every key by its own root mean square. Logits are then x^T W_h y over two numbers that hang on the
tokens, so they have no tensor; but W_h, which stands between the norms, has ranks. How large one head's W_h is says nothing, since
the norm takes it away. Here each is as large as the norm makes it on average: its queries and keys have a mean square of one.

To freeze the norms at that average gives another model. So `compress_normed` cuts the tensor and keeps the norms, which then
run over the channels that are left.
"""

import copy

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from ..factors import factors_of
from ..mha import MultiHeadAttention
from ..norms import QKNorm
from ..rotary import Rotary
from ..special_cases import tucker_layer
from ..tucker import TuckerAttention
from .compress import with_best_core
from .factored_tensor import check_weights, factored_tensors
from .ranks import check_tensor_ranks
from .truncation import METHODS


def between_norms(layer: MultiHeadAttention, moment: torch.Tensor | None = None) -> MultiHeadAttention:
    """The layer without its QK-norm: gains go into the weights, and queries and keys get a mean square of one on average.

    Args:
        layer: MHA or GQA with QK-norm.
        moment: (D, D) of the inputs, as in `compress`, over which the average is; by default inputs are white.

    Returns:
        A layer of the same kind and dtype, with weights of its own. It has tensors; it is not the same function.

    Raises:
        ValueError: for a layer without QK-norm, or weights that hold NaN, infinity or nothing.
    """
    if not isinstance(layer, MultiHeadAttention) or layer.qk_norm is None:
        raise ValueError(f"layer is {type(layer).__name__} without QK-norm: it has no norms to look between")
    check_weights(layer)
    result = copy.deepcopy(layer)
    result.qk_norm, result.q_norm, result.k_norm = None, nn.Identity(), nn.Identity()
    with torch.no_grad():
        for projection, size, norm in zip((result.q_proj, result.k_proj), _sizes(layer, moment), _norms(layer)):
            if is_parametrized(projection):
                raise ValueError("a projection of the layer is parametrised; between norms it is written to: remove that first")
            factor = norm.weight.view(-1, layer.head_dim) / size[:, None]  # (heads, k)
            for parameter in projection.parameters():
                whole = factor.flatten().view(-1, *[1] * (parameter.ndim - 1))  # (heads k, 1), or (heads k,) of a bias
                parameter.copy_(parameter * whole)
    return result


def _norms(layer: MultiHeadAttention) -> tuple[QKNorm, QKNorm]:
    """Of its queries and keys."""
    assert isinstance(layer.q_norm, QKNorm) and isinstance(layer.k_norm, QKNorm)
    return layer.q_norm, layer.k_norm


def _sizes(layer: MultiHeadAttention, moment: torch.Tensor | None) -> list[torch.Tensor]:
    """What the norms divide queries (h,) and keys (g,) by, on average: root mean squares, float64."""
    found = []
    pre = factors_of(layer).pre
    for weight, norm in zip((pre.rows, pre.columns), _norms(layer)):
        heads = weight.double().unflatten(1, (-1, layer.head_dim))  # (D, heads, k)
        seen = heads if moment is None else torch.einsum("de,ehk->dhk", moment.double(), heads)
        squares = (heads * seen).sum((0, 2)) / layer.head_dim  # (heads,)
        if norm.heads is not None:  # one mean square over all heads
            squares = squares.mean().expand(len(squares))
        found.append(torch.where(squares > 0, squares, 1.0).sqrt())  # a head of zeros stays one
    return found


def compress_normed(
    layer: MultiHeadAttention,
    ranks: tuple[int, int, int],
    post_ranks: tuple[int, int, int] | None = None,
    *,
    method: str = "hosvd",
    moment: torch.Tensor | None = None,
) -> TuckerAttention:
    """`compress` for a layer with QK-norm and one rotary key head (Gemma 3): the tensor between the norms cut, the norms kept.

    A norm fixes its channels, and so do gains and rotary embedding: of the key mode whole channel pairs are kept as they are. The norms
    run over these. Their gains make up for what the others held on average.

    Args:
        layer: multi-query attention with QK-norm per head, each of whose channel pairs has a frequency of its own.
        ranks, post_ranks, method, moment: as in `compress`.

    Returns:
        A Tucker Attention with QK-norm; at full rank the layer itself.

    Raises:
        ValueError: for another layer, ranks beyond the layer's own, an odd key rank, or an unknown method.
    """
    _check_normed(layer)
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    both, (q_size, k_size) = factors_of(layer), _sizes(layer, moment)
    pre, post = factored_tensors(between_norms(layer, moment), moment)
    kept = METHODS[method](pre, check_tensor_ranks(pre, ranks))
    post_kept = METHODS[method](post, check_tensor_ranks(post, ranks if post_ranks is None else post_ranks, "post_ranks"))
    pairs = [group for group, columns in zip(pre.classes, kept.columns) if columns.shape[1]]
    channels = torch.cat([group.channels for group in pairs], dim=1).flatten()  # (t,): first channels of all pairs, then second
    queries = both.pre.rows.double().unflatten(1, (layer.n_heads, -1))[..., channels] / q_size[:, None]  # (D, h, t)
    keys = both.pre.columns.double()[:, channels]  # (D, t)
    rows = pre.row_basis @ kept.rows  # (D, s), orthonormal as the moment measures
    dual, key_dual = (rows, keys) if moment is None else (moment.double() @ rows, moment.double() @ keys)
    core = torch.einsum("ds,dht,hr->rst", dual, queries, kept.head)
    queries_kept = torch.einsum("rst,hr->hst", core, kept.head).square().sum((1, 2)).mean()  # of k, the mean over heads
    keys_kept = (keys * key_dual).sum() / k_size**2  # of k
    dtype, (q_norm, k_norm) = layer.q_proj.weight.dtype, _norms(layer)
    value, right, _ = post.project(columns=post_kept.columns).latent()  # (D, v), (h, v, k)
    factors = {"head": kept.head * q_size[:, None], "query": rows, "key": keys}
    tensors = ((core, factors), with_best_core(post, post_kept, right, "output", value=value))
    return tucker_layer(
        *((core.to(dtype), {name: u.to(dtype) for name, u in factors.items()}) for core, factors in tensors),
        scale=layer.scale,
        rotary=Rotary([group.frequency for group in pairs]).to(keys.device),
        output_bias=both.output_bias,
        qk_norms=(_over(q_norm, channels, queries_kept), _over(k_norm, channels, keys_kept)),
    )


def _check_normed(layer: nn.Module) -> None:
    if not isinstance(layer, MultiHeadAttention) or layer.qk_norm != "head" or layer.rotary is None:
        raise ValueError(f"layer is {type(layer).__name__}; it must be multi-query attention with rotary embedding and QK-norm")
    if layer.k_proj.out_features != layer.head_dim:
        heads = layer.k_proj.out_features // layer.head_dim
        raise ValueError(f"layer has {heads} key heads with norms of their own; only one can be cut without mixing norms")
    if len(layer.rotary.frequencies.unique()) < len(layer.rotary.frequencies):
        raise ValueError("channel pairs of the layer share a frequency; gains would be mixed with them")


def _over(norm: QKNorm, channels: torch.Tensor, kept: torch.Tensor) -> QKNorm:
    """The norm over these channels alone, with gains that bring back the mean square they had among all.

    kept: the sum of squares over these channels, where that over all is their number.
    """
    result = QKNorm(len(channels), eps=norm.eps)
    result.weight = nn.Parameter(norm.weight.detach()[channels] * (kept / len(channels)).sqrt().to(norm.weight))
    return result
