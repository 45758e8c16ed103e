"""Rung 12b. An attention tensor in orthonormal bases, and the Gram matrices of its unfoldings, small ones (PyTorch).

The slices of `factors_of` are W_h = P left_h right_h^T L^T. After a QR decomposition of P and L the unfoldings of W have the
singular values of those of T_h = left_h right_h^T in the new bases, and their Gram matrices are sums of small products: nothing
of size n_H x d x d appears. Gram matrices square the singular values, so those below `rounding_floor` are not resolved.

Under rotary embedding there is one basis L per class of key channels (`rope_classes`), and W_h is the average over all rotations.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from ..factors import Factors, factors_of, times_heads
from ..rotary import Rotary
from .moments import root_of
from .rope_classes import KeyClass, key_classes, merged

STRIP = 256  # rows of a Gram matrix that are made at once
FARTHEST = 240  # powers of two from one up to which float64 holds the fourth power of a number, with all its digits


@dataclass(frozen=True)
class Identity:
    """I (n, n) as a basis, never written out: that would take as much memory as a weight matrix."""

    n: int

    def __len__(self) -> int:
        return self.n

    def __matmul__(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
        return x


Basis = torch.Tensor | Identity


@dataclass(frozen=True)
class FactoredTensor:
    """W_h = Re(Q_1 left_h right_h^T Q_2^H), with orthonormal Q_1 and one Q_2 per class, summed; all float64.

    row_basis: Q_1 (D, s); left: (h, s, k); classes: what of the columns may be mixed; column_bases: Q_2 (D, c) per class,
    complex where it turns; rights: (h, c, k) per class. A basis may be `Identity`.
    """

    row_basis: Basis
    left: torch.Tensor
    classes: tuple[KeyClass, ...]
    column_bases: tuple[Basis, ...]
    rights: tuple[torch.Tensor, ...]

    def turns(self) -> bool:
        """Whether any column turns under a rotary embedding."""
        return any(group.turns() for group in self.classes)

    def stacked_right(self) -> torch.Tensor:
        """(h, t, k) real: all classes below each other, so that sums of squares count energy."""
        if not self.turns():
            return self.rights[0]
        real = (torch.cat([r.real, r.imag], dim=1) if r.is_complex() else r for r in self.rights)
        return torch.cat([group.energy() ** 0.5 * r for group, r in zip(self.classes, real)], dim=1)

    def head_gram(self) -> torch.Tensor:
        """(h, h) = W_(0) W_(0)^T, inner products of the slices: sums over (left_g^T left_h) * (right_g^T right_h)."""
        left, right = self.left, self.stacked_right()  # (h, s, k), (h, t, k)
        h, k = len(left), left.shape[2]
        rows, columns = _side_by_side(left), _side_by_side(right)  # (s, h k), (t, h k)
        gram, some = left.new_empty(h, h), max(1, STRIP // k)
        for first in range(0, h, some):  # a few heads with themselves and all after them
            a, b = slice(first * k, (first + some) * k), slice(first * k, None)
            products = (rows[:, a].T @ rows[:, b]) * (columns[:, a].T @ columns[:, b])  # (some k, (h - first) k)
            sums = products.unflatten(0, (-1, k)).unflatten(2, (-1, k)).sum((1, 3))  # (some, h - first)
            gram[first : first + some, first:], gram[first:, first : first + some] = sums, sums.T
        return gram

    def row_gram(self) -> torch.Tensor:
        """(s, s) = W_(1) W_(1)^T in the coordinates of row_basis."""
        right = self.stacked_right()
        return _gram(self.left, right.mT @ right)

    def column_grams(self) -> tuple[torch.Tensor, ...]:
        """Per class (c, c) = W_(2) W_(2)^H in the coordinates of its basis, Hermitian, energy included."""
        inner = self.left.mT @ self.left  # (h, k, k)
        return tuple(_gram(r.conj(), group.energy() * inner) for group, r in zip(self.classes, self.rights))

    def squared_norm(self) -> float:
        right = self.stacked_right()
        return ((self.left.mT @ self.left) * (right.mT @ right)).sum().item()

    def project(self, rows: torch.Tensor | None = None, columns: tuple[torch.Tensor, ...] | None = None) -> "FactoredTensor":
        """Onto orthonormal rows (s, r) and, per class, columns (c, r); the bases follow, so the result is a smaller tensor."""
        left, basis, rights, bases = self.left, self.row_basis, self.rights, self.column_bases
        if rows is not None:
            left, basis = rows.T @ left, basis @ rows
        if columns is not None:
            rights = tuple(v.T @ r for v, r in zip(columns, rights))
            bases = tuple(b @ v for v, b in zip(columns, bases))
        return replace(self, left=left, row_basis=basis, rights=rights, column_bases=bases)

    def latent(self) -> tuple[torch.Tensor, torch.Tensor, Rotary | None]:
        """As a layer holds it: U3 (D, t) and right (h, t, k), both real, with W_h = Q_1 left_h right_h^T U3^T, and U3's rotary.

        A turning class lays its real parts before its imaginary ones, one block of the rotary embedding.
        """
        factor, rights, frequencies, blocks = [], [], [], []
        for group, basis, right in zip(self.classes, self.column_bases, self.rights):
            assert isinstance(basis, torch.Tensor)  # `project` has made it one
            if group.turns():
                basis, right = torch.cat([basis.real, basis.imag], dim=1), torch.cat([right.real, right.imag], dim=1)
            elif self.turns():  # a turning latent has pairs only: an odd part is filled up with a channel of zeros
                odd = basis.shape[1] % 2
                basis, right = F.pad(basis, (0, odd)), F.pad(right, (0, 0, 0, odd))
            factor.append(basis)
            rights.append(right)
            blocks.append(basis.shape[1])
            frequencies += [group.frequency] * (basis.shape[1] // 2)
        rotary = Rotary(frequencies, "half", tuple(filter(None, blocks))).to(self.left.device) if self.turns() else None
        return torch.cat(factor, dim=1), torch.cat(rights, dim=1), rotary


def _side_by_side(heads: torch.Tensor) -> torch.Tensor:
    """(h, n, k) as (n, h k)."""
    return heads.transpose(0, 1).flatten(1)


def _gram(heads: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
    """Sum over heads of X_h S_h X_h^H, (n, n), from (h, n, k) and real symmetric (h, k, k); what is symmetric is computed once."""
    n, inner, whole = heads.shape[1], inner.to(heads.dtype), _side_by_side(heads)  # (n, h k)
    gram = heads.new_empty(n, n)
    for start in range(0, n, STRIP):
        strip = slice(start, start + STRIP)
        products = _side_by_side(heads[:, strip] @ inner) @ whole[start:].mH  # (strip, n - start)
        gram[strip, start:], gram[start:, strip] = products, products.mH
    return gram


@dataclass(frozen=True)
class Slices(Factors):
    """Factors, and classes: which of their columns may be mixed."""

    classes: tuple[KeyClass, ...]

    def whitened(self, row_root: torch.Tensor | None = None, column_root: torch.Tensor | None = None) -> FactoredTensor:
        """The same tensor in orthonormal bases.

        row_root, column_root: square roots (D, D) of the inputs' second moment. Errors then count as they act on such inputs,
        and the bases are orthonormal in that sense.
        """
        row_basis, r = whiten(self.rows.double(), row_root)
        left = times_heads(r, self.left)
        if not any(group.turns() for group in self.classes):  # one class: all columns as they are
            basis, r = whiten(self.columns.double(), column_root)
            return squarable(FactoredTensor(row_basis, left, self.classes, (basis,), (times_heads(r, self.right),)))
        bases, roots = zip(*(whiten(group.gather(self.columns.double()), column_root) for group in self.classes))
        right = self.dense().right.double().mT  # (h, k, t)
        # Logits are Re sum_c q_c conj(k_c): with k = y R the query's side becomes q R^H.
        rights = tuple(r.conj() @ group.gather(right).mT for group, r in zip(self.classes, roots))  # (h, c, k)
        return squarable(FactoredTensor(row_basis, left, self.classes, bases, rights))

    def beside(self, other: "Slices") -> tuple["Slices", "Slices"]:
        """Both tensors on the columns [L, L~]: each reads its own part, and zeros of the other's."""
        before, after = self.columns.shape[1], other.columns.shape[1]
        both, classes = torch.cat([self.columns, other.columns], dim=1), merged(self.classes, other.classes, before)
        return (
            replace(self, columns=both, right=F.pad(self.dense().right, (0, 0, 0, after)), classes=classes),
            replace(other, columns=both, right=F.pad(other.dense().right, (0, 0, before, 0)), classes=classes),
        )

    def minus(self, other: "Slices") -> "Slices":
        """The difference, exactly: both tensors' rows and columns side by side."""
        a, b = self.beside(other)
        left, other_left = a.dense().left, b.dense().left  # (h, s, k), (h, s~, l)
        return replace(
            a,
            rows=torch.cat([a.rows, b.rows], dim=1),
            left=torch.cat([F.pad(left, (0, other_left.shape[2])), F.pad(-other_left, (left.shape[2], 0))], dim=1),
            right=torch.cat([a.right, b.right], dim=2),
        )


def squarable(tensor: FactoredTensor) -> FactoredTensor:
    """The tensor itself.  Raises ValueError where its Gram matrices, or their squares, would leave float64."""
    left, right = _exponent(tensor.left), _exponent(*tensor.rights)
    if max(abs(left), abs(right), abs(left + right)) > FARTHEST:
        raise ValueError(
            f"layer has a tensor of factors near 2^{left} and 2^{right}, whose Gram matrices leave float64: multiply its weights, or the "
            "moment, by a power of two first"
        )
    return tensor


def _exponent(*parts: torch.Tensor) -> int:
    """Of the power of two above the largest number, or a few more; 0 of zeros, 1025 where one is infinite or NaN."""
    reals = (torch.view_as_real(part) if part.is_complex() else part for part in parts)
    size = sum(abs(end.item()) for real in reals for end in real.aminmax())  # one pass, and no copy
    return math.frexp(size)[1] if size < math.inf else 1025


def whiten(basis: torch.Tensor, root: torch.Tensor | None) -> tuple[Basis, torch.Tensor]:
    """basis = Q R with Q orthonormal, or with root Q orthonormal where a root of the second moment is given.

    A basis as wide as tall, or wider, is left as it is, with Q = I: a QR decomposition would not make it smaller.
    Raises ValueError where basis and root have different heights.
    """
    if root is not None and len(root) != len(basis):
        raise ValueError(
            f"moment is {len(root)} x {len(root)}; this layer's inputs, with a 1 where it has biases, are {len(basis)} wide"
        )
    r = basis if root is None else root.to(basis.dtype) @ basis
    if r.shape[1] >= r.shape[0]:
        if root is None:
            return Identity(len(r)), r
        q = torch.eye(len(r), dtype=r.dtype, device=r.device)
    else:
        q, r = torch.linalg.qr(r)
    return (q if root is None else torch.linalg.solve_triangular(root.to(q.dtype), q, upper=True)), r


def slices_of(layer: nn.Module, *, turned: bool = True) -> tuple[Slices, Slices]:
    """The pre- and the post-softmax tensor of a layer; turned: False forgets its rotary embedding.

    Raises ValueError as `factors_of` does, for normalised latents, queries or keys, and as `check_weights` does.
    """
    both = factors_of(layer)
    if both.norms is not None:
        raise ValueError("layer has latent_norm=True; RMSNorm fixes the latents' coordinates, so it has no tensor to decompose")
    if both.qk_norms is not None:
        raise ValueError(f"layer has qk_norm={layer.qk_norm!r}; its logits are not trilinear, so it has no tensor to decompose")
    check_weights(layer)
    return with_classes(both.pre, both.rotary if turned else None), with_classes(both.post)


def with_classes(factors: Factors, rotary: Rotary | None = None) -> Slices:
    """rotary: turns the columns."""
    return Slices(**vars(factors), classes=key_classes(factors.columns.shape[1], rotary, factors.columns.device))


def check_weights(layer: nn.Module) -> None:
    """Raise ValueError if a parameter holds NaN or infinity, or no values at all (on the meta device)."""
    for name, parameter in layer.named_parameters():
        if parameter.is_meta or not all(x.isfinite() for x in parameter.aminmax()):  # one pass, and no copy
            held = "no values" if parameter.is_meta else "NaN or infinity"
            raise ValueError(f"layer's {name} holds {held}; such a layer has no spectrum and no approximation")


def factored_tensors(
    layer: nn.Module,
    moment: torch.Tensor | None = None,
    *,
    key_moment: torch.Tensor | None = None,
    turned: bool = True,
    joint: bool = False,
) -> tuple[FactoredTensor, FactoredTensor]:
    """The pre- and the post-softmax tensor of a layer, whitened.

    moment: (D, D) from `second_moment`. Norms are then those of logits and outputs on such inputs instead of those of weights:
    queries, keys and values are weighed by it, the output mode is not. key_moment: in its place for the keys.
    turned: False forgets the layer's rotary embedding. joint: both tensors get the same columns, keys and values side by side.
    Raises ValueError as `slices_of` does.
    """
    pre, post = slices_of(layer, turned=turned)
    if joint:
        pre, post = pre.beside(post)
    root = root_of(moment)
    return pre.whitened(root, root if key_moment is None else root_of(key_moment)), post.whitened(None, root)
