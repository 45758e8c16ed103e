"""Rung 12b. Compress a trained layer into a Tucker Attention: truncated HOSVD of both tensors, which are never formed (PyTorch).

All the work is done on the small matrices of `ranks.FactoredTensor`. At full rank the result is the layer itself; below, the
HOSVD's bound holds: the squared error is at most the sum of the discarded squared singular values of the three modes.
Under rotary embedding the key mode keeps whole channel pairs, each a complex combination of the layer's pairs of one frequency
(see `ranks`), so the compressed layer turns with the layer's own frequencies and is as exact as without.
"""

import copy
import math
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn

from .cached_attention import CachedAttention
from .checks import check_ranks
from .ranks import FactoredTensor, Slices, Spectra, factored_tensors, root_of, slices_of, spectra_of
from .rotary import Rotary
from .special_cases import output_bias_of
from .tucker import TuckerAttention
from .tucker_weights import TuckerWeights

METHODS = ("hosvd", "sthosvd", "hooi")


def choose_ranks(
    layer: nn.Module,
    *,
    relative_error: float | None = None,
    max_parameters: int | None = None,
    max_cache: int | None = None,
    moment: torch.Tensor | None = None,
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Ranks before and after the softmax for a bound on exactly one thing.

    relative_error: of each tensor, by the HOSVD's bound, shared evenly by its modes; max_parameters: of the compressed layer,
    output bias included; max_cache: cached numbers a token, r3 + r~3 (bytes over the bytes of a number). The two budgets take the
    smallest error that fits.
    Raises ValueError unless exactly one bound is given, a number of at least 0, or if even the smallest layer exceeds a budget.
    """
    bounds = {"relative_error": relative_error, "max_parameters": max_parameters, "max_cache": max_cache}
    given = [(name, bound) for name, bound in bounds.items() if bound is not None]
    if len(given) != 1:
        raise ValueError("choose_ranks needs exactly one of relative_error, max_parameters and max_cache")
    [(name, bound)] = given
    if isinstance(bound, bool) or not isinstance(bound, Real) or not bound >= 0:
        raise ValueError(f"{name} is {bound!r}; it must be a number of at least 0")
    tensors = factored_tensors(layer, moment)
    both = [spectra_of(tensor) for tensor in tensors]

    def ranks_at(error: float):
        return tuple(_ranks_for(spectrum, error, even) for spectrum, even in zip(both, (t.turns for t in tensors)))

    if relative_error is not None:
        return ranks_at(relative_error)

    def fits(error: float) -> bool:
        pre, post = ranks_at(error)
        if max_cache is not None:
            return pre[2] + post[2] <= max_cache
        (query, key), (output, value) = ((len(t.row_basis), len(t.column_bases[0])) for t in tensors)
        biases = output if key > output else 0
        return max_parameters >= biases + sum(
            len(tensors[0].left) * r + rows * s + columns * t + r * s * t
            for (r, s, t), rows, columns in ((pre, query, key), (post, output, value))
        )

    low, high = 0.0, 3**0.5  # at the upper end every mode may be cut to one
    if not fits(high):
        raise ValueError(f"{name} = {bound}: even the smallest ranks, {ranks_at(high)}, exceed it")
    if fits(low):
        return ranks_at(low)
    for _ in range(60):  # bisection to the last bit
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return ranks_at(high)


def _ranks_for(spectrum: Spectra, relative_error: float, even: bool) -> tuple[int, int, int]:
    """The smallest ranks whose tails are each at most a third of the squared error allowed, within what ranks may be.

    even: of columns that turn in pairs, which no product of ranks bounds.
    """
    allowed = relative_error**2 / 3 * (spectrum.rows**2).sum()
    tails = [  # tails[mode][r]: what rank r discards, nothing at the end
        F.pad((values**2).flip(0).cumsum(0).flip(0), (0, 1)) for values in (spectrum.head, spectrum.rows, spectrum.columns)
    ]
    ranks = [max(1, int((tail > allowed).sum())) for tail in tails]
    if even:
        ranks[2] += ranks[2] % 2
    bounded = (0, 1) if even else (0, 1, 2)
    # No rank may exceed the product of the others. Cut down to it, it would discard more than was allowed; so less is allowed,
    # and ranks grow in the order of what they discard, at most to the tensor's own, which are within each other's product.
    while any(ranks[mode] ** 2 > math.prod(ranks) for mode in bounded):
        discarded = [tail[rank].item() for tail, rank in zip(tails, ranks)]
        mode = discarded.index(max(discarded))
        if discarded[mode] == 0:
            break  # the tensor's own ranks, but for singular values that are rounding errors
        ranks[mode] += 2 if even and mode == 2 else 1
    for mode in bounded:
        ranks[mode] = min(ranks[mode], math.prod(ranks) // ranks[mode])
    return ranks[0], ranks[1], ranks[2]


@dataclass(frozen=True)
class Subspaces:
    """Orthonormal columns in the coordinates of a FactoredTensor: head (h, r1), rows (s, r2), and per class columns (c, r)."""

    head: torch.Tensor
    rows: torch.Tensor
    columns: tuple[torch.Tensor, ...]


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
    """The Tucker Attention of the given ranks that approximates a trained MHA, GQA, MLA or Tucker layer, biases and RoPE included.

    ranks: (head, query, key); post_ranks: (head, output, value), by default `ranks`.
    method: "hosvd" (modes truncated independently), "sthosvd" (one after the other: key, query, head) or "hooi" (refitted in
    turns, never worse than the HOSVD).
    shared_kv: one latent for keys and values, from the leading vectors of both unfoldings side by side, each divided by its
    tensor's norm; values then read what that latent holds of them. By default each gets a latent of its own.
    rotary: a fresh embedding of width ranks[2] in place of the layer's own, the paper's way (Rotary.latent, Def. 3.1). The
    truncation then ignores that keys turn, and the result is another function than the layer until it is fine-tuned.
    moment: second moment of the layer's inputs, from `ranks.second_moment`; the truncation then keeps what matters for logits
    and outputs on such inputs instead of what is large in the weights.
    Which frequencies the latent turns with depends on the weights, and a state_dict holds none: keep the result's `rotary` with it.
    Raises ValueError for ranks beyond the layer's own, an odd key rank under rotary embedding, an unknown method, "hooi" with
    shared_kv, a rotary embedding of another width, or a layer that has no tensors (see `ranks.factored_tensors`).
    """
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(METHODS)}")
    if shared_kv and method == "hooi":
        raise ValueError("method is 'hooi', which refits one tensor alone; with shared_kv take 'hosvd' or 'sthosvd'")
    post_ranks = ranks if post_ranks is None else post_ranks
    if shared_kv:
        pre, post, turning = _shared(layer, ranks, post_ranks, method, rotary is None, moment)
    else:
        tensor, post_tensor = factored_tensors(layer, moment, turned=rotary is None)
        dtype = next(layer.parameters()).dtype
        pre, turning = _truncated(tensor, "ranks", ranks, method, ("query", "key"), dtype)
        post, _ = _truncated(post_tensor, "post_ranks", post_ranks, method, ("output", "value"), dtype)
    return TuckerAttention.from_weights(
        pre,
        post,
        scale=layer.scale,
        rotary=turning if rotary is None else copy.deepcopy(rotary),
        output_bias=output_bias_of(layer),
    )


def _truncated(tensor: FactoredTensor, name, ranks, method, names, dtype) -> tuple[TuckerWeights, Rotary | None]:
    """One tensor as core and factors, and the rotary embedding of the columns that were kept."""
    kept = subspaces(tensor, check_tensor_ranks(tensor, ranks, name), method)
    columns, right, turning = tensor.project(columns=kept.columns).latent()
    return _weights(tensor, kept, right, {names[0]: tensor.row_basis @ kept.rows, names[1]: columns}, dtype), turning


def _shared(layer, ranks, post_ranks, method, turned, moment) -> tuple[TuckerWeights, TuckerWeights, Rotary | None]:
    """Both tensors on one latent: `post.value` is `pre.key`."""
    pre, post = factored_tensors(layer, moment, turned=turned, joint=True)
    check_tensor_ranks(pre, ranks, uncapped=(2,))
    check_ranks("post_ranks", post_ranks, (len(post.left), post.left.shape[1], ranks[2]), uncapped=(2,))
    if post_ranks[2] != ranks[2]:
        raise ValueError(f"post_ranks[2] is {post_ranks[2]}; with shared_kv it must equal ranks[2] = {ranks[2]}")
    kept = subspaces(pre, ranks, method, columns=joint_columns(pre, post, ranks[2]))
    latent, right, turning = pre.project(columns=kept.columns).latent()
    post, post_right = read_from(post, latent, moment)
    post_kept = subspaces(post, post_ranks, method)
    dtype = next(layer.parameters()).dtype
    latent = nn.Parameter(latent.to(dtype))
    return (
        _weights(pre, kept, right, {"query": pre.row_basis @ kept.rows, "key": latent}, dtype),
        _weights(post, post_kept, post_right, {"output": post.row_basis @ post_kept.rows, "value": latent}, dtype),
        turning,
    )


def subspaces(
    tensor: FactoredTensor,
    ranks: tuple[int, int, int],
    method: str,
    columns: tuple[torch.Tensor, ...] | None = None,
) -> Subspaces:
    """The subspaces that `method` keeps, of columns that are given or the leading ones."""
    if columns is None:
        columns = leading_columns(tensor, tensor.column_grams(), ranks[2])
    if method == "sthosvd":
        partial = tensor.project(columns=columns)
        rows = leading(partial.row_gram(), ranks[1])
        return Subspaces(leading(partial.project(rows=rows).head_gram(), ranks[0]), rows, columns)
    found = Subspaces(leading(tensor.head_gram(), ranks[0]), leading(tensor.row_gram(), ranks[1]), columns)
    return found if method == "hosvd" else _refit(tensor, ranks, found)


def check_tensor_ranks(tensor: FactoredTensor, ranks, name: str = "ranks", uncapped=()) -> tuple[int, int, int]:
    """`ranks` as a tuple.  Raises ValueError for ranks beyond the tensor's, or an odd one for channels that turn in pairs.

    uncapped: modes that no product of the other ranks bounds, as in `check_ranks`; turning columns always are.
    """
    widths = [basis.shape[1] for basis in tensor.column_bases]
    channels = sum(c if group.second is None else 2 * c for c, group in zip(widths, tensor.classes))
    if tensor.turns:
        channels += channels % 2  # an odd unturned part is filled up with a channel of zeros
    sizes = (len(tensor.left), tensor.left.shape[1], channels)
    ranks = check_ranks(name, ranks, sizes, uncapped=(*uncapped, 2) if tensor.turns else uncapped)
    if tensor.turns and ranks[2] % 2:
        raise ValueError(f"{name}[2] is {ranks[2]}; under rotary embedding channels come in pairs, so it must be even")
    return ranks


def joint_columns(pre: FactoredTensor, post: FactoredTensor, rank: int) -> tuple[torch.Tensor, ...]:
    """Columns for keys and values at once: leading vectors of both unfoldings side by side, each over its tensor's norm.

    pre, post: with the same columns, from `factored_tensors(..., joint=True)`.
    """
    # A tensor of zeros has no share.
    shares = [[gram / (tensor.squared_norm() or 1.0) for gram in tensor.column_grams()] for tensor in (pre, post)]
    return leading_columns(pre, [a + b for a, b in zip(*shares)], rank)


def read_from(post: FactoredTensor, latent: torch.Tensor, moment: torch.Tensor | None) -> tuple[FactoredTensor, torch.Tensor]:
    """The nearest tensor whose values are read from this latent (D, t), and its right (h, t, k) on the latent's own channels."""
    root = root_of(moment)
    inverse = torch.linalg.pinv(latent if root is None else root @ latent)  # (t, D)
    [right] = [  # values do not turn: their part of the joint columns is the unturned one
        inverse @ (basis if root is None else root @ basis) @ r
        for group, basis, r in zip(post.classes, post.column_bases, post.rights)
        if group.second is None
    ]
    return Slices.of(post.row_basis, post.left, latent, right).whitened(None, root), right


def relative_errors(layer: nn.Module, approximation: nn.Module, moment: torch.Tensor | None = None) -> tuple[float, float]:
    """|W - W_hat| / |W| of the pre- and of the post-softmax tensor; with a moment, of logits and of outputs on such inputs.

    Measured on the difference of both layers' factors, which may be of any mechanism, down to about 1e-8.
    Raises ValueError for layers of different d_model, n_heads or scale, biases in one of them alone, a layer whose tensor is
    zero, and as `slices_of` does.
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
        if whole == 0:
            raise ValueError("layer has a tensor of zeros; no error can be relative to it")
        errors.append(math.sqrt(max(0.0, difference) / whole))
    return errors[0], errors[1]


def _weights(tensor, kept: Subspaces, right: torch.Tensor, factors: dict, dtype: torch.dtype) -> TuckerWeights:
    """With the core C = W x_1 U1^T x_2 U2^T on the columns that `right` (h, t, k) belongs to."""
    core = torch.einsum("hsk,htk,hr->rst", kept.rows.T @ tensor.left, right, kept.head)
    parts = {name: factor if isinstance(factor, nn.Parameter) else factor.to(dtype) for name, factor in factors.items()}
    return TuckerWeights(core.to(dtype), {"head": kept.head.to(dtype), **parts})


def _slices(tensor: FactoredTensor, n: int) -> torch.Tensor:
    """T_h of one class for all heads, (h, s, c); small only after projection."""
    right = tensor.rights[n]
    return tensor.left.to(right.dtype) @ right.mT


def _refit(tensor: FactoredTensor, ranks, found: Subspaces, max_sweeps: int = 20, rtol: float = 1e-10) -> Subspaces:
    """Higher-order orthogonal iteration: each mode again, for the tensor projected on the other two, until it settles."""
    energy = _energy(tensor, found)
    for _ in range(max_sweeps):
        rows = leading(_mixed_row_gram(tensor.project(columns=found.columns), found.head), ranks[1])
        partial = tensor.project(rows=rows)
        columns = leading_columns(tensor, _mixed_column_grams(partial, found.head), ranks[2])
        head = leading(partial.project(columns=columns).head_gram(), ranks[0])
        candidate = Subspaces(head, rows, columns)
        gained = _energy(tensor, candidate) - energy
        if gained <= 0:
            break
        found, energy = candidate, energy + gained
        if gained <= rtol * energy:
            break
    return found


def _mixed_row_gram(tensor: FactoredTensor, head: torch.Tensor) -> torch.Tensor:
    """(s, s), heads projected on `head`."""
    grams = []
    for n, w in enumerate(tensor.weights):
        mixed = torch.einsum("hst,hr->rst", _slices(tensor, n), head.to(tensor.rights[n].dtype))
        grams.append(w * torch.einsum("rst,rut->su", mixed, mixed.conj()).real)
    return torch.stack(grams).sum(0)


def _mixed_column_grams(tensor: FactoredTensor, head: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Per class (c, c), heads projected on `head`."""
    grams = []
    for n, w in enumerate(tensor.weights):
        mixed = torch.einsum("hst,hr->rst", _slices(tensor, n), head.to(tensor.rights[n].dtype))
        grams.append(w * torch.einsum("rsc,rsd->cd", mixed.conj(), mixed))
    return tuple(grams)


def _energy(tensor: FactoredTensor, kept: Subspaces) -> float:
    """|core|^2."""
    gram = tensor.project(kept.rows, kept.columns).head_gram()
    return (kept.head.T @ gram @ kept.head).diagonal().sum().item()


def leading(gram: torch.Tensor, rank: int) -> torch.Tensor:
    """The eigenvectors of the `rank` largest eigenvalues, as orthonormal columns."""
    return torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :rank]


def leading_columns(tensor: FactoredTensor, grams, rank: int) -> tuple[torch.Tensor, ...]:
    """Per class the eigenvectors to keep, `rank` real channels in all, wherever the energy is.

    A turning pair is one complex eigenvector; unturned channels are kept two at a time, since the latent's width stays even.
    """
    systems = [torch.linalg.eigh(gram) for gram in grams]
    values = [system.eigenvalues.flip(0) for system in systems]
    if not tensor.turns:
        counts = [rank]
    else:
        candidates = []  # (energy, class), a pair of channels each
        for n, (group, eigenvalues) in enumerate(zip(tensor.classes, values)):
            if group.second is None:  # an odd last channel counts as a pair of its own
                eigenvalues = F.pad(eigenvalues, (0, len(eigenvalues) % 2)).view(-1, 2).sum(1)
            candidates += [(energy, n) for energy in eigenvalues.tolist()]
        chosen = [n for _, n in sorted(candidates, reverse=True)[: rank // 2]]
        counts = [chosen.count(n) * (1 if group.second is not None else 2) for n, group in enumerate(tensor.classes)]
    return tuple(system.eigenvectors.flip(1)[:, :count] for system, count in zip(systems, counts))
