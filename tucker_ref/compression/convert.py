"""Rung 12h. The same trained layer as GQA or MLA: the conversions that a Tucker compression has to beat (PyTorch).

Grouped-query attention keeps one key and one value head per group: the mean of the group's (Ainslie et al. 2023), or the best one,
the leading singular vectors of the group's slices in the key and the value mode. Latent attention keeps one narrow subspace
of the query, the key and the value mode for all heads. Both leave the head mode as it is. All norms are those of the slices
W_h = W_h^Q W_h^K^T and W~_h, not of the projections, so that the numbers can be compared with `compress`.
"""

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import nn

from ..checks import check_flags
from ..factors import Factors, factors_of
from ..gqa import GroupedQueryAttention
from ..mha import MultiHeadAttention
from ..mla import MultiHeadLatentAttention
from ..rotary import Rotary
from .factored_tensor import FactoredTensor, Slices, check_weights, factored_tensors, with_classes
from .leading import leading
from .moments import root_of
from .ranks import check_tensor_ranks
from .rope_classes import KeyClass, key_classes
from .truncation import joint_columns, leading_columns, read_from


def to_gqa(
    layer: MultiHeadAttention, n_kv_heads: int, *, method: str = "svd", moment: torch.Tensor | None = None
) -> GroupedQueryAttention:
    """Grouped-query attention from a trained MHA, or GQA with more groups; exact where the heads of every group agree already.

    Args:
        layer: with its biases and rotary embedding.
        n_kv_heads: n_KV, the number of groups, a divisor of the layer's own.
        method: "svd" (per group the best key and value head, queries and outputs refitted to them; under rotary embedding the
            best pair per frequency), or "mean" (key and value heads of a group are averaged, queries and outputs stay:
            Ainslie et al. 2023).
        moment: (D, D), as in `compress`; for "svd" only.

    Returns:
        A layer of the same dtype, with weights of its own.

    Raises:
        ValueError: for another layer, method or number of groups, or a moment with "mean".
    """
    _check_source(layer, "to_gqa")
    if method not in ("svd", "mean"):
        raise ValueError(f"method is {method!r}; it must be 'svd' or 'mean'")
    if method == "mean" and moment is not None:
        raise ValueError("method is 'mean', which takes no moment: an average does not depend on the inputs")
    result = GroupedQueryAttention(
        layer.d_model, layer.n_heads, n_kv_heads, head_dim=layer.head_dim, bias=layer.bias, rotary=copy.deepcopy(layer.rotary)
    ).to(layer.k_proj.weight)
    sources, n_kv_heads = layer.k_proj.out_features // layer.head_dim, result.n_kv_heads
    if sources % n_kv_heads:
        raise ValueError(f"n_kv_heads is {n_kv_heads}; it must divide the layer's {sources} key/value heads")
    result.scale = layer.scale
    changed = _means(layer, n_kv_heads) if method == "mean" else _best_heads(layer, n_kv_heads, root_of(moment))
    result.load_state_dict(_state(layer) | changed)
    return result


def to_mla(
    layer: MultiHeadAttention, q_rank: int, kv_rank: int, *, shared_kv: bool = True, moment: torch.Tensor | None = None
) -> MultiHeadLatentAttention:
    """Multi-head latent attention from a trained MHA or GQA: the HOSVD of both tensors with the head and output modes whole.

    Under rotary embedding the latent itself is turned (the coupled form, Cor. 3.2.1), each kept channel pair at its own
    frequency, so that full rank is exact.

    Args:
        layer: without biases.
        q_rank: width of the query latent.
        kv_rank: width of the key and value latents; even under rotary embedding.
        shared_kv: keys and values from one latent, by the joint SVD of both unfoldings.
        moment: (D, D), as in `compress`.

    Returns:
        A layer of the same dtype, with weights of its own.

    Raises:
        ValueError: for another layer, a layer with biases (MLA has none), or ranks beyond the layer's own.
    """
    _check_source(layer, "to_mla")
    [shared_kv] = check_flags(shared_kv=shared_kv)
    if layer.bias:
        raise ValueError(f"layer has bias={layer.bias!r}; MLA has no biases, `compress` keeps them")
    pre, post = factored_tensors(layer, moment, joint=shared_kv)
    _, q_rank, kv_rank = check_tensor_ranks(
        pre, (layer.n_heads, q_rank, kv_rank), "(n_heads, q_rank, kv_rank)", uncapped=(0, 1, 2)
    )
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
        assert isinstance(small.row_basis, torch.Tensor)  # `project` has made it one
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
    if layer.qk_norm is not None:
        raise ValueError(f"layer has qk_norm={layer.qk_norm!r}; its logits are not trilinear, so it has no tensor to decompose")
    factors_of(layer)  # raises for what is more than its weights
    check_weights(layer)


def _state(layer: MultiHeadAttention) -> dict[str, torch.Tensor]:
    """Weights and biases of its projections, those of parametrised ones as a call finds them."""
    names = itertools.product(("q_proj", "k_proj", "v_proj", "o_proj"), ("weight", "bias"))
    parts = {f"{name}.{kind}": getattr(getattr(layer, name), kind) for name, kind in names}
    return {name: tensor.detach() for name, tensor in parts.items() if tensor is not None}


def _means(layer: MultiHeadAttention, n_kv_heads: int) -> dict[str, torch.Tensor]:
    """Weights and biases of k_proj and v_proj, averaged over the heads of each group."""
    return {
        name: tensor.unflatten(0, (n_kv_heads, -1, layer.head_dim)).mean(1).flatten(0, 1)
        for name, tensor in _state(layer).items()
        if name.startswith(("k_proj", "v_proj"))
    }


def _best_heads(layer: MultiHeadAttention, n_kv_heads: int, root: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Weights and biases of all projections but the output bias."""
    both, state = factors_of(layer), {}
    for names, factors, rotary, row_root in (
        (("q_proj", "k_proj"), both.pre, layer.rotary, root), (("o_proj", "v_proj"), both.post, None, None),
    ):  # fmt: skip
        head = key_classes(layer.head_dim, rotary, factors.rows.device)
        groups = [_one_head(group.whitened(row_root, root), head) for group in _groups(factors, n_kv_heads, rotary)]
        for name, parts in zip(names, zip(*groups)):
            weight = torch.cat(parts, dim=1)  # (D, out)
            state[f"{name}.weight"] = weight if name == "o_proj" else weight[: layer.d_model].T
            if len(weight) > layer.d_model:
                state[f"{name}.bias"] = weight[-1]
    return state


def _groups(factors: Factors, n: int, rotary: Rotary | None) -> list[Slices]:
    """Each group's heads alone, whose block numbers are those of the first group.  rotary: that of one head."""
    heads = len(factors.left) // n
    left, right = factors.left[:heads], factors.right[:heads]
    turning = None if rotary is None else rotary.repeated(int(right.max()) + 1)
    both = zip(factors.rows.chunk(n, dim=1), factors.columns.chunk(n, dim=1))
    return [with_classes(Factors(rows, left, columns, right), turning) for rows, columns in both]


def _one_head(tensor: FactoredTensor, classes: tuple[KeyClass, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """One group's queries (D, c k) and its one key head (D, k), or outputs and the value head, in the head's channel order.

    classes: of the channels of a single head; of each class as many are kept as one head has.
    """
    counts = [group.channels.shape[1] for group in classes]
    # A head wider than the model has channels to spare: zeros.
    columns = tuple(
        F.pad(leading(gram, count), (0, max(0, count - len(gram)))) for gram, count in zip(tensor.column_grams(), counts)
    )
    small = tensor.project(columns=columns)
    shared, right, _ = small.latent()  # (D, k), (c, k, k)
    many = small.row_basis @ small.left @ right.mT  # (c, D, k)
    order = torch.cat([group.channels.flatten() for group in classes]).argsort()
    return many[..., order].transpose(0, 1).flatten(1), shared[..., order]
