"""Rung 12c. The same trained layer as GQA or MLA: the conversions that a Tucker compression has to beat (PyTorch).

Grouped-query attention keeps one key and one value head per group: the mean of the group's (Ainslie et al. 2023), or the best one,
the leading singular vectors of the group's slices in the key and the value mode. Latent attention keeps one narrow subspace
of the query, the key and the value mode for all heads. Both leave the head mode as it is. All norms are those of the slices
W_h = W_h^Q W_h^K^T and W~_h, not of the projections, so that the numbers can be compared with `compress`.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from .compress import check_tensor_ranks, joint_columns, leading, leading_columns, read_from
from .gqa import GroupedQueryAttention
from .mha import MultiHeadAttention
from .mla import MultiHeadLatentAttention
from .ranks import FactoredTensor, check_weights, factored_tensors, key_classes, root_of, slices_of


def to_gqa(
    layer: MultiHeadAttention, n_kv_heads: int, *, method: str = "svd", moment: torch.Tensor | None = None
) -> GroupedQueryAttention:
    """Grouped-query attention with n_kv_heads groups from a trained MHA (or GQA with more groups), biases and RoPE included.

    method: "svd" (per group the best key and value head, queries and outputs refitted to them; under rotary embedding the best
    pair per frequency), or "mean" (key and value heads of a group are averaged, queries and outputs stay).
    moment: second moment of the inputs, as in `compress`; for "svd" only.
    Exact where the heads of every group agree already.  Raises ValueError for another layer, method or number of groups.
    """
    _check_source(layer, "to_gqa")
    if method not in ("svd", "mean"):
        raise ValueError(f"method is {method!r}; it must be 'svd' or 'mean'")
    if method == "mean" and moment is not None:
        raise ValueError("method is 'mean', which takes no moment: an average does not depend on the inputs")
    k = layer.head_dim
    n_sources = layer.k_proj.out_features // k
    result = GroupedQueryAttention(
        layer.d_model, layer.n_heads, n_kv_heads, head_dim=k, bias=layer.bias, rotary=copy.deepcopy(layer.rotary)
    ).to(layer.k_proj.weight)
    if n_sources % n_kv_heads:
        raise ValueError(f"n_kv_heads is {n_kv_heads}; it must divide the layer's {n_sources} key/value heads")
    result.scale = layer.scale
    with torch.no_grad():
        if method == "mean":
            result.load_state_dict(layer.state_dict() | _means(layer, n_kv_heads))
            return result
        heads, root = layer.n_heads // n_kv_heads, root_of(moment)
        found: tuple[list[torch.Tensor], ...] = ([], [], [], [])
        queries, keys, outputs, values = found
        for g in range(n_kv_heads):
            pre, post = slices_of(_group(layer, g, heads, n_sources // n_kv_heads))
            for tensor, rotary, many, one in (
                (pre.whitened(root, root), layer.rotary, queries, keys),
                (post.whitened(None, root), None, outputs, values),
            ):
                by_head, shared = _one_head(tensor, key_classes(k, rotary, pre.rows.device))
                many.append(by_head)
                one.append(shared)
        _fill(result.q_proj, torch.cat(queries, dim=1))
        _fill(result.k_proj, torch.cat(keys, dim=1))
        _fill(result.v_proj, torch.cat(values, dim=1))
        result.o_proj.weight.copy_(torch.cat(outputs, dim=1))
        if layer.o_proj.bias is not None:
            result.o_proj.bias.copy_(layer.o_proj.bias)
    return result


def to_mla(
    layer: MultiHeadAttention, q_rank: int, kv_rank: int, *, shared_kv: bool = True, moment: torch.Tensor | None = None
) -> MultiHeadLatentAttention:
    """Multi-head latent attention from a trained MHA or GQA: the HOSVD of both tensors with the head and output modes whole.

    q_rank, kv_rank: widths of the latents; shared_kv: keys and values from one latent, by the joint SVD of both unfoldings.
    Under rotary embedding the latent itself is turned (the coupled form), each kept channel pair at its own frequency, so that
    full rank is exact. moment: as in `compress`.
    Raises ValueError for another layer, a layer with biases (MLA has none), or ranks beyond the layer's own.
    """
    _check_source(layer, "to_mla")
    if layer.bias:
        raise ValueError(f"layer has bias={layer.bias!r}; MLA has no biases, `compress` keeps them")
    pre, post = factored_tensors(layer, moment, joint=shared_kv)
    check_tensor_ranks(pre, (layer.n_heads, q_rank, kv_rank), "(n_heads, q_rank, kv_rank)", uncapped=(0, 1, 2))
    columns = joint_columns(pre, post, kv_rank) if shared_kv else leading_columns(pre, pre.column_grams(), kv_rank)
    small = pre.project(leading(pre.row_gram(), q_rank), columns)
    key, up_key, rotary = small.latent()  # (d, t), (h, t, k)
    if shared_kv:
        value, up_value = key, read_from(post, key, moment)[1]  # (d, t), (h, t, v)
    else:
        value, up_value, _ = post.project(columns=leading_columns(post, post.column_grams(), kv_rank)).latent()
    result = MultiHeadLatentAttention(
        layer.d_model, layer.n_heads, q_rank, kv_rank, head_dim=layer.head_dim, shared_kv=shared_kv, rotary=rotary
    ).to(layer.k_proj.weight)
    result.scale = layer.scale
    with torch.no_grad():
        result.q_a_proj.weight.copy_(small.row_basis.T)
        result.q_b_proj.weight.copy_(small.left.mT.flatten(0, 1))  # (h k, s)
        result.kv_a_proj_with_mqa.weight.copy_(key.T)
        if not shared_kv:
            result.v_a_proj.weight.copy_(value.T)
        result.kv_b_proj.weight.copy_(torch.cat([up_key, up_value], dim=2).mT.flatten(0, 1))  # (h (k + v), t)
        result.o_proj.weight.copy_(layer.o_proj.weight)
    return result


def _check_source(layer: nn.Module, name: str) -> None:
    if not isinstance(layer, MultiHeadAttention):
        raise ValueError(f"layer is {type(layer).__name__}; {name} converts MultiHeadAttention and GroupedQueryAttention")
    check_weights(layer)


def _means(layer: MultiHeadAttention, n_kv_heads: int) -> dict[str, torch.Tensor]:
    """Weights and biases of k_proj and v_proj, averaged over the heads of each group."""
    return {
        name: tensor.unflatten(0, (n_kv_heads, -1, layer.head_dim)).mean(1).flatten(0, 1)
        for name, tensor in layer.state_dict().items()
        if name.startswith(("k_proj", "v_proj"))
    }


def _group(layer: MultiHeadAttention, g: int, heads: int, sources: int) -> GroupedQueryAttention:
    """Group g of a layer alone: `heads` query heads on `sources` key/value heads."""
    k = layer.head_dim
    group = GroupedQueryAttention(layer.d_model, heads, sources, head_dim=k, bias=layer.bias, rotary=layer.rotary)
    group = group.to(layer.k_proj.weight)
    for ours, theirs, width in (
        (group.q_proj, layer.q_proj, heads * k), (group.k_proj, layer.k_proj, sources * k), (group.v_proj, layer.v_proj, sources * k)
    ):  # fmt: skip
        own = slice(g * width, (g + 1) * width)
        ours.weight.copy_(theirs.weight[own])
        if ours.bias is not None:
            ours.bias.copy_(theirs.bias[own])
    group.o_proj.weight.copy_(layer.o_proj.weight[:, g * heads * k : (g + 1) * heads * k])
    return group


def _one_head(tensor: FactoredTensor, head: tuple) -> tuple[torch.Tensor, torch.Tensor]:
    """One group's queries (D, c k) and its one key head (D, k), or outputs and the value head, in the head's channel order.

    head: the key classes of a single head; of each class as many channels are kept as one head has.
    """
    counts = [len(group.first) for group in head]
    # A head wider than the model has channels to spare: zeros.
    columns = tuple(
        F.pad(leading(gram, count), (0, max(0, count - len(gram)))) for gram, count in zip(tensor.column_grams(), counts)
    )
    small = tensor.project(columns=columns)
    shared, right, _ = small.latent()  # (D, k), (c, k, k)
    many = small.row_basis @ small.left @ right.mT  # (c, D, k)
    places = torch.cat([torch.cat([c.first] if c.second is None else [c.first, c.second]) for c in head]).argsort()
    return many[..., places].transpose(0, 1).flatten(1), shared[..., places]


def _fill(projection: nn.Linear, weight: torch.Tensor) -> None:
    """weight: (d, out), or (d + 1, out) with the bias as its last row, where the projection has one."""
    if projection.bias is not None:
        projection.bias.copy_(weight[-1])
        weight = weight[:-1]
    projection.weight.copy_(weight.T)
