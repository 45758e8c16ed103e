"""Rung 12d. What ranks do trained layers have? Singular values of all six unfoldings, and effective ranks (PyTorch)."""

from dataclasses import dataclass

import torch
from torch import nn

from ..checks import SMALLEST, as_spectrum, check_integer, check_number
from .factored_tensor import FactoredTensor, factored_tensors


@dataclass(frozen=True)
class Spectra:
    """Singular values of the three unfoldings of one attention tensor, descending; float64.

    Attributes:
        head: of the head mode, (h,).
        rows: of the query or output mode.
        columns: of the key or value mode. Under rotary embedding those of all frequencies together; a turning pair counts as two
            equal values.
    """

    head: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def tails(self, ranks: tuple[int, int, int]) -> torch.Tensor:
        """Rung 2's `tail_energies`: per mode the sum of squares beyond the rank.  Returns: (3,).  Raises ValueError for other ranks."""
        kept = [check_integer(f"ranks[{mode}]", rank, 0) for mode, rank in enumerate(ranks)]
        if len(kept) != 3:
            raise ValueError(f"ranks is {ranks!r}; it must be 3 integers")
        return torch.stack([(s[rank:] ** 2).sum() for s, rank in zip((self.head, self.rows, self.columns), kept)])

    def ranks(self) -> tuple[int, int, int]:
        """How many singular values stand above the rounding floor, per mode."""
        return numerical_rank(self.head), numerical_rank(self.rows), numerical_rank(self.columns)


def spectra(
    layer: nn.Module, moment: torch.Tensor | None = None, *, key_moment: torch.Tensor | None = None
) -> tuple[Spectra, Spectra]:
    """Singular values of both attention tensors of a layer, of all their unfoldings; no tensor is ever formed.

    Args:
        layer: any mechanism of this package without norms of latents, queries or keys.
        moment: (D, D), as in `compress`: squares then count as logits and outputs on such inputs do.
        key_moment: in its place for the keys, as `centred` makes it.

    Returns:
        The spectra of the pre-softmax (head, query, key) and of the post-softmax tensor (head, output, value). Under rotary
        embedding those of the average over all rotations.

    Raises:
        ValueError: for another module, normalised latents, or weights that hold NaN, infinity, nothing, or numbers whose
            squares float64 does not hold.
    """
    pre, post = factored_tensors(layer, moment, key_moment=key_moment)
    return spectra_of(pre), spectra_of(post)


def spectra_of(tensor: FactoredTensor) -> Spectra:
    """From the eigenvalues of the Gram matrices."""
    columns = []
    for gram, group in zip(tensor.column_grams(), tensor.classes):
        values = _roots(gram)
        columns.append((values / 2**0.5).repeat_interleave(2) if group.turns() else values)
    return Spectra(_roots(tensor.head_gram()), _roots(tensor.row_gram()), torch.cat(columns).sort(descending=True).values)


def _roots(gram: torch.Tensor) -> torch.Tensor:
    """Singular values from a Gram matrix, descending; rounding below zero is cut."""
    return torch.linalg.eigvalsh(gram).clamp(min=0).flip(0).sqrt()


def rounding_floor(singular_values: torch.Tensor) -> float:
    """Below this a singular value that was computed from a Gram matrix is noise: sqrt(n eps) times the largest."""
    return (len(singular_values) * torch.finfo(torch.float64).eps) ** 0.5 * singular_values.max().item()


def numerical_rank(singular_values: torch.Tensor) -> int:
    """How many stand above the rounding floor."""
    return int((singular_values > rounding_floor(singular_values)).sum())


def entropy_rank(singular_values: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007).

    Args:
        singular_values: (n,), not negative.

    Returns:
        n for n equal ones, 1 for a single one, 0 where all of them are zero.

    Raises:
        ValueError: for what is no list of finite numbers of at least 0.
    """
    values = as_spectrum(singular_values)
    if not values.any():
        return 0.0
    p = values / values.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum()).item()


def energy_rank(singular_values: torch.Tensor, share: float = 0.99) -> int:
    """The fewest singular values that hold a share of the sum of squares.

    Args:
        singular_values: (n,), not negative.
        share: of the sum of squares, in (0, 1].

    Returns:
        Their number, at least 1.

    Raises:
        ValueError: for a share outside (0, 1], or as `entropy_rank`.
    """
    share = check_number("share", share, SMALLEST, 1.0, "in (0, 1]")
    energy = (as_spectrum(singular_values) ** 2).cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1
