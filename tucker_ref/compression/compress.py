"""Rung 12g. Compress a trained layer into a Tucker Attention: both tensors truncated, and never formed (PyTorch).

All the work is done on the small matrices of a FactoredTensor. At full rank the result is the layer itself; below, the HOSVD's
bound holds: the squared error is at most the sum of the tails of the three modes.
Under rotary embedding the key mode keeps whole channel pairs, each a complex combination of the layer's pairs of one frequency
(`rope_classes`), so the compressed layer turns with the layer's own frequencies and is as exact as without.
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import nn

from ..cached_attention import CachedAttention
from ..checks import check_flags, check_ranks
from ..factors import factors_of
from ..rotary import Rotary
from ..special_cases import Tucker, tucker_layer
from ..tucker import TuckerAttention
from .factored_tensor import FactoredTensor, factored_tensors, slices_of
from .moments import root_of
from .ranks import check_tensor_ranks
from .truncation import METHODS, Ranks, TruncatedFactors, joint_columns, read_from

Compressed = tuple[Tucker, Tucker, Rotary | None]  # both tensors, and the rotary embedding of the key columns that were kept


def compress(
    layer: CachedAttention,
    ranks: tuple[int, int, int],
    post_ranks: tuple[int, int, int] | None = None,
    *,
    method: str = "hosvd",
    shared_kv: bool = False,
    rotary: Rotary | None = None,
    moment: torch.Tensor | None = None,
) -> TuckerAttention:
    """The Tucker Attention of given ranks that approximates a trained layer, biases and RoPE included.

    Which frequencies the latent turns with depends on the weights, and a state_dict holds none: keep the result's `rotary` with it.

    Args:
        layer: MHA, GQA, MLA without latent norms, or Tucker.
        ranks: (head, query, key).
        post_ranks: (head, output, value), by default `ranks`.
        method: "hosvd" (modes truncated independently), "sthosvd" (one after the other: key, query, head) or "hooi" (refitted in
            turns, never worse than the HOSVD); rung 2 has the references.
        shared_kv: one latent for keys and values, from the leading vectors of both unfoldings side by side, each divided by its
            tensor's norm; values then read what that latent holds of them. By default each gets a latent of its own.
        rotary: a fresh embedding of width ranks[2] in place of the layer's own, the paper's way (Rotary.latent, Def. 3.1). The
            truncation then ignores that keys turn, and the result is another function than the layer until it is fine-tuned.
        moment: (D, D), second moment of the layer's inputs from `second_moment`; the truncation then keeps what matters for
            logits and outputs on such inputs instead of what is large in the weights.

    Returns:
        A layer of the same dtype, with weights of its own.

    Raises:
        ValueError: for ranks beyond the layer's own, an odd key rank under rotary embedding, an unknown method, "hooi" with
            shared_kv, a rotary embedding of another width, or a layer that has no tensors (as `spectra`).
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    [shared_kv] = check_flags(shared_kv=shared_kv)
    if shared_kv and method == "hooi":
        raise ValueError("method is 'hooi', which refits one tensor alone; with shared_kv take 'hosvd' or 'sthosvd'")
    post_ranks = ranks if post_ranks is None else post_ranks
    tensors = factored_tensors(layer, moment, turned=rotary is None, joint=shared_kv)
    if shared_kv:
        pre, post, kept_rotary = _with_one_latent(*tensors, ranks, post_ranks, METHODS[method], moment)
    else:
        pre, post, kept_rotary = _with_two_latents(*tensors, ranks, post_ranks, METHODS[method])
    dtype = next(layer.parameters()).dtype
    pre, post = ((core.to(dtype), {name: u.to(dtype) for name, u in factors.items()}) for core, factors in (pre, post))
    return tucker_layer(
        pre,
        post,
        scale=layer.scale,
        rotary=kept_rotary if rotary is None else copy.deepcopy(rotary),
        output_bias=factors_of(layer).output_bias,
    )


def _with_two_latents(
    pre: FactoredTensor, post: FactoredTensor, ranks: Ranks, post_ranks: Ranks, truncate: Callable[..., TruncatedFactors]
) -> Compressed:
    """Each tensor for itself."""
    kept = truncate(pre, check_tensor_ranks(pre, ranks))
    post_kept = truncate(post, check_tensor_ranks(post, post_ranks, "post_ranks"))
    key, right, rotary = pre.project(columns=kept.columns).latent()  # (D, t), (h, t, k)
    value, post_right, _ = post.project(columns=post_kept.columns).latent()  # (D, v), (h, v, k)
    first = with_best_core(pre, kept, right, "query", key=key)
    return first, with_best_core(post, post_kept, post_right, "output", value=value), rotary


def _with_one_latent(
    pre: FactoredTensor,
    post: FactoredTensor,
    ranks: Ranks,
    post_ranks: Ranks,
    truncate: Callable[..., TruncatedFactors],
    moment,
) -> Compressed:
    """The keys' latent is that of both tensors; what values read of it is then truncated in the other two modes."""
    ranks = check_tensor_ranks(pre, ranks, uncapped=(2,))
    heads, rows, columns = check_ranks("post_ranks", post_ranks, (len(post.left), post.left.shape[1], ranks[2]), uncapped=(2,))
    post_ranks = (heads, rows, columns)
    if post_ranks[2] != ranks[2]:
        raise ValueError(f"post_ranks[2] is {post_ranks[2]}; with shared_kv it must equal ranks[2] = {ranks[2]}")
    kept = truncate(pre, ranks, joint_columns(pre, post, ranks[2]))
    key, right, rotary = pre.project(columns=kept.columns).latent()  # (D, t), (h, t, k)
    post, post_right = read_from(post, key, moment)
    post_kept = truncate(post, post_ranks)
    return with_best_core(pre, kept, right, "query", key=key), with_best_core(post, post_kept, post_right, "output"), rotary


def with_best_core(
    tensor: FactoredTensor, kept: TruncatedFactors, right: torch.Tensor, rows: str, **columns: torch.Tensor
) -> Tucker:
    """The best core, C = W x_1 U1^T x_2 U2^T on the columns that `right` (h, t, k) belongs to, and the factors."""
    core = torch.einsum("hsk,htk,hr->rst", kept.rows.T @ tensor.left, right, kept.head)
    return core, {"head": kept.head, rows: tensor.row_basis @ kept.rows, **columns}


def relative_errors(layer: nn.Module, approximation: nn.Module, moment: torch.Tensor | None = None) -> tuple[float, float]:
    """|W - W_hat| / |W| of both attention tensors, measured on the difference of both layers' factors, down to about 1e-8.

    Args:
        layer: any mechanism of this package without latent norms.
        approximation: likewise, and of any other mechanism.
        moment: (D, D), as in `compress`; errors are then those of logits and of outputs on such inputs.

    Returns:
        The errors of the pre- and of the post-softmax tensor; 0 where both layers' tensors are zero.

    Raises:
        ValueError: for layers of different d_model, n_heads or scale, biases in one of them alone, a tensor that is zero in
            `layer` alone, and layers that have no tensors (as `spectra`).
    """
    root, errors = root_of(moment), []
    pairs = list(zip(slices_of(layer), slices_of(approximation), (root, None)))
    for name in ("d_model", "n_heads", "scale"):
        if getattr(layer, name) != getattr(approximation, name):
            raise ValueError(
                f"{name} is {getattr(layer, name)} in layer and {getattr(approximation, name)} in its approximation"
            )
    for exact, ours, row_root in pairs:
        if len(exact.columns) != len(ours.columns):
            raise ValueError("biases are in one of layer and its approximation alone; they must be in both or in neither")
        difference, whole = (tensor.whitened(row_root, root).squared_norm() for tensor in (exact.minus(ours), exact))
        if whole == 0 and difference > 0:
            raise ValueError("layer has a tensor of zeros; no error can be relative to it")
        errors.append(math.sqrt(max(0.0, difference) / (whole or 1.0)))
    return errors[0], errors[1]
