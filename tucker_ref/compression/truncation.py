"""Rung 12e. Rung 2's `hosvd`, `sthosvd` and `hooi` once more, of tensors that are never formed (PyTorch).

The algorithms are those of `tucker_ref/decomposition.py`, step by step, and tests compare the results. Two things differ. The
leading left singular vectors of an unfolding are the leading eigenvectors of its Gram matrix, and that is all a FactoredTensor
has. And the key mode has an unfolding per class of channels, of which the leading vectors of all classes together are kept.
The best core follows from the factors as in rung 2, C = W x_1 U1^T x_2 U2^T x_3 U3^T; `compress` takes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from .factored_tensor import FactoredTensor, whiten
from .leading import leading
from .moments import root_of
from .rope_classes import key_classes

Ranks = tuple[int, int, int]
Columns = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class TruncatedFactors:
    """What is kept of each mode, as orthonormal columns in a FactoredTensor's coordinates: head (h, r), rows (s, r), and per class
    columns (c, r).
    """

    head: torch.Tensor
    rows: torch.Tensor
    columns: Columns


def hosvd(tensor: FactoredTensor, ranks: Ranks, columns: Columns | None = None) -> TruncatedFactors:
    """Every mode's leading vectors, each of the whole tensor.  columns: given ones in place of the leading ones, here and below."""
    if columns is None:
        columns = leading_columns(tensor, tensor.column_grams(), ranks[2])
    return TruncatedFactors(leading(tensor.head_gram(), ranks[0]), leading(tensor.row_gram(), ranks[1]), columns)


def sthosvd(tensor: FactoredTensor, ranks: Ranks, columns: Columns | None = None) -> TruncatedFactors:
    """One mode after the other, each of what the ones before have left: keys or values first, heads last."""
    if columns is None:
        columns = leading_columns(tensor, tensor.column_grams(), ranks[2])
    partial = tensor.project(columns=columns)
    rows = leading(partial.row_gram(), ranks[1])
    return TruncatedFactors(leading(partial.project(rows=rows).head_gram(), ranks[0]), rows, columns)


def hooi(tensor: FactoredTensor, ranks: Ranks, max_sweeps: int = 20, rtol: float = 1e-10) -> TruncatedFactors:
    """From the HOSVD, each factor refitted to the tensor projected on the other two, until |core|^2 gains less than rtol of it."""
    best = hosvd(tensor, ranks)
    energy = _energy(tensor, best)
    for _ in range(max_sweeps):
        rows = leading(_projected_row_gram(tensor.project(columns=best.columns), best.head), ranks[1])
        partial = tensor.project(rows=rows)
        columns = leading_columns(tensor, _projected_column_grams(partial, best.head), ranks[2])
        candidate = TruncatedFactors(leading(partial.project(columns=columns).head_gram(), ranks[0]), rows, columns)
        gained = _energy(tensor, candidate) - energy
        if gained <= 0:
            break
        best, energy = candidate, energy + gained
        if gained <= rtol * energy:
            break
    return best


METHODS: dict[str, Callable[..., TruncatedFactors]] = {"hosvd": hosvd, "sthosvd": sthosvd, "hooi": hooi}


def leading_columns(tensor: FactoredTensor, grams: Sequence[torch.Tensor], rank: int) -> Columns:
    """Per class the eigenvectors to keep, `rank` real channels in all, wherever the energy is.

    A turning pair is one complex eigenvector; unturned channels are kept two at a time, since the latent's width stays even.
    """
    if not tensor.turns():
        return (leading(grams[0], rank),)
    systems = [torch.linalg.eigh(gram) for gram in grams]
    candidates = []  # (energy, class), a pair of channels each
    for n, (group, system) in enumerate(zip(tensor.classes, systems)):
        energies = system.eigenvalues.flip(0)
        if not group.turns():  # an odd last channel counts as a pair of its own
            energies = F.pad(energies, (0, len(energies) % 2)).view(-1, 2).sum(1)
        candidates += [(energy, n) for energy in energies.tolist()]
    chosen = [n for _, n in sorted(candidates, reverse=True)[: rank // 2]]
    counts = [chosen.count(n) * (1 if group.turns() else 2) for n, group in enumerate(tensor.classes)]
    return tuple(system.eigenvectors.flip(1)[:, :count] for system, count in zip(systems, counts))


def joint_columns(pre: FactoredTensor, post: FactoredTensor, rank: int) -> Columns:
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
        if not group.turns()
    ]
    basis, r = whiten(latent, root)
    classes = key_classes(latent.shape[1], None, latent.device)
    return replace(post, classes=classes, column_bases=(basis,), rights=(r @ right,)), right


def _times_head(tensor: FactoredTensor, head: torch.Tensor) -> list[torch.Tensor]:
    """T x_1 U1^T, (r, s, c) per class; small only after projection of another mode."""
    slices = [tensor.left.to(right.dtype) @ right.mT for right in tensor.rights]  # (h, s, c) each
    return [torch.einsum("hst,hr->rst", s, head.to(s.dtype)) for s in slices]


def _projected_row_gram(tensor: FactoredTensor, head: torch.Tensor) -> torch.Tensor:
    """`row_gram` of the tensor projected on `head`, (s, s)."""
    grams = [
        group.energy() * torch.einsum("rst,rut->su", mixed, mixed.conj()).real
        for group, mixed in zip(tensor.classes, _times_head(tensor, head))
    ]
    return torch.stack(grams).sum(0)


def _projected_column_grams(tensor: FactoredTensor, head: torch.Tensor) -> Columns:
    """`column_grams` of the tensor projected on `head`, (c, c) per class."""
    return tuple(
        group.energy() * torch.einsum("rsc,rsd->cd", mixed.conj(), mixed)
        for group, mixed in zip(tensor.classes, _times_head(tensor, head))
    )


def _energy(tensor: FactoredTensor, kept: TruncatedFactors) -> float:
    """|core|^2."""
    gram = tensor.project(kept.rows, kept.columns).head_gram()
    return (kept.head.T @ gram @ kept.head).diagonal().sum().item()
