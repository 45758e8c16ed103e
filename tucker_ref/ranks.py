"""Rung 12a. What ranks do trained layers have? Singular values of all six unfoldings, without ever forming a tensor (PyTorch).

Both attention tensors of every mechanism have slices that factor through two narrow bases,

    W_h = P T_h L^T,   T_h = left_h right_h^T         P (D, s), L (D, t), left_h (s, k), right_h (t, k)

with P, L the query and key projections of all heads (or the down-projections of MLA) side by side. After a QR decomposition of
P and L the unfoldings of W have the singular values of those of T, and their Gram matrices are sums of small products: nothing
of size n_H x d x d appears. Gram matrices square the singular values, so those below `rounding_floor` are not resolved.

Under rotary embedding the key mode is special. Channels may only be mixed with others of the same frequency, and only as
complex numbers, because U3 -> U3 A must commute with every rotation. The key mode then has one small complex unfolding per
frequency; a pair counts half its energy, the average over all rotations.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from .cached_attention import CachedAttention
from .mha import MultiHeadAttention
from .mla import MultiHeadLatentAttention
from .rotary import Rotary
from .special_cases import widened, with_bias_row
from .tucker import TuckerAttention


@dataclass(frozen=True)
class KeyClass:
    """Key channels that may be mixed: those of one frequency as complex numbers, or unturned ones as they are.

    first, second: channel numbers of the real and imaginary parts; second is None for unturned channels.
    """

    frequency: float
    first: torch.Tensor
    second: torch.Tensor | None

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The class's channels of the last axis, complex where they turn."""
        return x[..., self.first] if self.second is None else torch.complex(x[..., self.first], x[..., self.second])


@dataclass(frozen=True)
class Slices:
    """An attention tensor as a layer holds it, W_h = P left_h right_h^T L^T.

    rows: P (D, s); left: (h, s, k); columns: L (D, t); right: (h, t, k); classes: which of the t columns may be mixed.
    Where head h just takes a block of k columns of its own or its group's, left or right may be the (h,) block numbers.
    """

    rows: torch.Tensor
    left: torch.Tensor
    columns: torch.Tensor
    right: torch.Tensor
    classes: tuple[KeyClass, ...]

    @staticmethod
    def of(rows, left, columns, right, rotary: Rotary | None = None) -> "Slices":
        """rotary: turns the columns."""
        return Slices(rows, left, columns, right, key_classes(columns.shape[1], rotary, columns.device))

    def whitened(self, row_root: torch.Tensor | None = None, column_root: torch.Tensor | None = None) -> "FactoredTensor":
        """The same tensor in orthonormal bases.

        row_root, column_root: square roots (D, D) of the inputs' second moment. Errors then count as they act on such inputs,
        and the bases are orthonormal in that sense.
        """
        row_basis, r = _whiten(self.rows.double(), row_root)
        left = _times(r, self.left)
        bases, rights = [], []
        for group in self.classes:
            basis, r = _whiten(group.gather(self.columns.double()), column_root)
            bases.append(basis)
            # Logits are Re sum_c q_c conj(k_c): with k = y R the query's side becomes q R^H.
            if len(self.classes) == 1 and group.second is None:
                rights.append(_times(r, self.right))
            else:
                channels = group.gather(_dense(self.right, self.columns).double().mT).mT  # (h, c, k)
                rights.append(r.conj() @ channels)
        return FactoredTensor(row_basis, left, self.classes, tuple(bases), tuple(rights))

    def minus(self, other: "Slices") -> "Slices":
        """The difference, exactly: both tensors' rows and columns side by side."""

        def diagonal(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:  # (h, x, k), (h, y, l) -> (h, x + y, k + l)
            return torch.cat([F.pad(a, (0, b.shape[2])), F.pad(b, (a.shape[2], 0))], dim=1)

        return Slices(
            torch.cat([self.rows, other.rows], dim=1),
            diagonal(_dense(self.left, self.rows), -_dense(other.left, other.rows)),
            torch.cat([self.columns, other.columns], dim=1),
            diagonal(_dense(self.right, self.columns), _dense(other.right, other.columns)),
            merged(self.classes, other.classes, self.columns.shape[1]),
        )

    def beside(self, other: "Slices") -> tuple["Slices", "Slices"]:
        """Both tensors on the columns [L, L~]: each reads its own part, and zeros of the other's."""
        before, after = self.columns.shape[1], other.columns.shape[1]
        both, classes = torch.cat([self.columns, other.columns], dim=1), merged(self.classes, other.classes, before)
        right, other_right = _dense(self.right, self.columns), _dense(other.right, other.columns)
        return (
            Slices(self.rows, self.left, both, F.pad(right, (0, 0, 0, after)), classes),
            Slices(other.rows, other.left, both, F.pad(other_right, (0, 0, before, 0)), classes),
        )


def _times(r: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """r (c, s) times every head's (s, k), or the block of r's columns that it owns.  Returns: (h, c, k)."""
    if blocks.ndim == 3:
        return r @ blocks.double()
    return r.unflatten(1, (int(blocks.max()) + 1, -1)).transpose(0, 1)[blocks]


def _dense(blocks: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(h, s, k), zeros and ones where block numbers are given."""
    return blocks if blocks.ndim == 3 else _times(torch.eye(columns.shape[1]).to(columns), blocks)


@dataclass(frozen=True)
class FactoredTensor:
    """The same in whitened coordinates: W_h = Re(Q_1 left_h right_h^T Q_2^H), with orthonormal Q_1 and one Q_2 per class, summed.

    row_basis: Q_1 (D, s); left: (h, s, k); classes: what of mode 2 may be mixed; column_bases: Q_2 (D, c) per class, complex
    where it turns; rights: (h, c, k) per class.  All float64.
    """

    row_basis: torch.Tensor
    left: torch.Tensor
    classes: tuple[KeyClass, ...]
    column_bases: tuple[torch.Tensor, ...]
    rights: tuple[torch.Tensor, ...]

    @property
    def turns(self) -> bool:
        """Whether any column turns under a rotary embedding."""
        return any(group.second is not None for group in self.classes)

    @property
    def weights(self) -> tuple[float, ...]:
        """Energy of a class in the average over all rotations: Re z e^(i phi) has half the square of z."""
        return tuple(1.0 if group.second is None else 0.5 for group in self.classes)

    def stacked_right(self) -> torch.Tensor:
        """(h, t, k) real: all classes below each other, so that sums of squares count energy."""
        real = (torch.cat([r.real, r.imag], dim=1) if r.is_complex() else r for r in self.rights)
        return torch.cat([w**0.5 * r for w, r in zip(self.weights, real)], dim=1)

    def row_gram(self) -> torch.Tensor:
        """(s, s) = W_(1) W_(1)^T in the coordinates of row_basis."""
        right = self.stacked_right()
        return torch.einsum("hsk,hkl,htl->st", self.left, right.mT @ right, self.left)

    def column_grams(self) -> tuple[torch.Tensor, ...]:
        """Per class (c, c), Hermitian, energy included."""
        inner = self.left.mT @ self.left  # (h, k, k)
        return tuple(
            w * torch.einsum("hck,hkl,hdl->cd", r.conj(), inner.to(r.dtype), r) for w, r in zip(self.weights, self.rights)
        )

    def head_gram(self) -> torch.Tensor:
        """(h, h): inner products of the slices."""
        h, _, k = self.left.shape
        right = self.stacked_right()
        rows, columns = (x.transpose(0, 1).flatten(1) for x in (self.left, right))  # (s, h k), (t, h k)
        products = (rows.T @ rows) * (columns.T @ columns)  # (h k, h k)
        return products.view(h, k, h, k).sum((1, 3))

    def project(self, rows: torch.Tensor | None = None, columns: tuple[torch.Tensor, ...] | None = None) -> "FactoredTensor":
        """Onto orthonormal rows (s, r) and, per class, columns (c, r); the bases follow, so the result is a smaller tensor."""
        left, basis, rights, bases = self.left, self.row_basis, self.rights, self.column_bases
        if rows is not None:
            left, basis = rows.T @ left, basis @ rows
        if columns is not None:
            rights = tuple(v.T @ r for v, r in zip(columns, rights))
            bases = tuple(b @ v for v, b in zip(columns, bases))
        return replace(self, left=left, row_basis=basis, rights=rights, column_bases=bases)

    def squared_norm(self) -> float:
        right = self.stacked_right()
        return ((self.left.mT @ self.left) * (right.mT @ right)).sum().item()

    def latent(self) -> tuple[torch.Tensor, torch.Tensor, Rotary | None]:
        """As a layer holds it: U3 (D, t) and right (h, t, k), both real, with W_h = Q_1 left_h right_h^T U3^T, and U3's rotary.

        A turning class lays its real parts before its imaginary ones, one block of the rotary embedding.
        """
        factor, right, frequencies, blocks = [], [], [], []
        for group, basis, r in zip(self.classes, self.column_bases, self.rights):
            width = basis.shape[1]
            if width == 0:
                continue
            if group.second is not None:
                factor += [basis.real, basis.imag]
                right += [r.real, r.imag]
                blocks.append(2 * width)
                frequencies += [group.frequency] * width
                continue
            if self.turns and width % 2:  # a turning latent has pairs only: fill up with a channel of zeros
                basis, r, width = F.pad(basis, (0, 1)), F.pad(r, (0, 0, 0, 1)), width + 1
            factor.append(basis)
            right.append(r)
            blocks.append(width)
            frequencies += [0.0] * (width // 2)
        rotary = Rotary(frequencies, "half", tuple(blocks)).to(self.left.device) if self.turns else None
        return torch.cat(factor, dim=1), torch.cat(right, dim=1), rotary


def key_classes(width: int, rotary: Rotary | None, device) -> tuple[KeyClass, ...]:
    """Which of `width` channels may be mixed: all of them without rotary embedding, else those of equal frequency."""
    if rotary is None:
        return (KeyClass(0.0, torch.arange(width, device=device), None),)
    first, second = rotary.pairs(torch.arange(width, device=device))
    classes = []
    for frequency in rotary.frequencies.unique().tolist():
        chosen = rotary.frequencies == frequency
        a, b = first[chosen], second[chosen]
        classes.append(KeyClass(0.0, torch.cat([a, b]).sort().values, None) if frequency == 0 else KeyClass(frequency, a, b))
    return tuple(classes)


def merged(classes: tuple[KeyClass, ...], others: tuple[KeyClass, ...], width: int) -> tuple[KeyClass, ...]:
    """The classes of two sets of columns side by side; the first set is `width` wide."""
    by_frequency: dict[float, list[KeyClass]] = {}
    for group in classes:
        by_frequency.setdefault(group.frequency, []).append(group)
    for group in others:
        second = None if group.second is None else group.second + width
        by_frequency.setdefault(group.frequency, []).append(KeyClass(group.frequency, group.first + width, second))
    result = []
    for frequency, found in sorted(by_frequency.items()):
        seconds = [group.second for group in found if group.second is not None]
        first = torch.cat([group.first for group in found])
        result.append(KeyClass(frequency, first, torch.cat(seconds) if seconds else None))
    return tuple(result)


def root_of(moment: torch.Tensor | None) -> torch.Tensor | None:
    """R with R^T R = moment, upper triangular; None for none.  Raises ValueError for a matrix that has no such root."""
    if moment is None:
        return None
    if not isinstance(moment, torch.Tensor) or moment.ndim != 2 or not moment.is_floating_point():
        raise ValueError("moment is no floating-point matrix; it must come from second_moment")
    if moment.shape[0] != moment.shape[1]:
        raise ValueError(f"moment {tuple(moment.shape)} is not square; it must come from second_moment")
    root, failed = torch.linalg.cholesky_ex(moment.double())
    if failed or not root.isfinite().all():
        raise ValueError(
            f"moment {tuple(moment.shape)} is not positive definite; it must come from second_moment, of inputs that are not all "
            "zeros and, with fewer tokens than channels, with some damping"
        )
    return root.mT


def _whiten(basis: torch.Tensor, root: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """basis = Q R with Q orthonormal, or with root Q orthonormal where a root of the second moment is given.

    A basis as wide as tall is left as it is, with Q = I: a QR decomposition would not make it smaller.
    Raises ValueError where basis and root have different heights.
    """
    if root is not None and len(root) != len(basis):
        raise ValueError(
            f"moment is {len(root)} x {len(root)}; this layer's inputs, with a 1 where it has biases, are {len(basis)} wide"
        )
    r = basis if root is None else root.to(basis.dtype) @ basis
    if r.shape[1] >= r.shape[0]:
        q = torch.eye(len(r)).to(r)
    else:
        q, r = torch.linalg.qr(r)
    return (q if root is None else torch.linalg.solve_triangular(root.to(q.dtype), q, upper=True)), r


def second_moment(layer: CachedAttention, x: torch.Tensor, damping: float = 1e-6) -> torch.Tensor:
    """Mean of x~ x~^T over tokens, (D, D) float64, where x~ is [x, 1] for a layer with biases; see `compress`.

    x: (..., d), what the layer receives on typical data; damping: added to the diagonal, as a share of its mean, so that
    directions which the sample lacks still count a little.  Raises ValueError for another width, no tokens, NaN or infinity.
    """
    if x.ndim == 0 or x.shape[-1] != layer.d_model or x.numel() == 0 or not x.isfinite().all():
        raise ValueError(
            f"x has shape {tuple(x.shape)}; it must be finite and not empty, with d_model = {layer.d_model} as its last size"
        )
    if not 0 <= damping < float("inf"):
        raise ValueError(f"damping is {damping}; it must be finite and at least 0")
    x = x.detach().reshape(-1, layer.d_model).double()
    if getattr(layer, "bias", False):
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    moment = x.T @ x / len(x)
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment)).to(moment)


def factored_tensors(
    layer: nn.Module, moment: torch.Tensor | None = None, *, turned: bool = True, joint: bool = False
) -> tuple[FactoredTensor, FactoredTensor]:
    """The pre- and the post-softmax tensor of a layer, whitened.

    moment: (D, D) from `second_moment`. Norms are then those of logits and outputs on such inputs instead of those of weights:
    queries, keys and values are weighed by it, the output mode is not.
    turned: False forgets the layer's rotary embedding. joint: both tensors get the same columns, keys and values side by side.
    Raises ValueError as `slices_of` does.
    """
    pre, post = slices_of(layer, turned=turned)
    if joint:
        pre, post = pre.beside(post)
    root = root_of(moment)
    return pre.whitened(root, root), post.whitened(None, root)


def slices_of(layer: nn.Module, *, turned: bool = True) -> tuple[Slices, Slices]:
    """The pre- and the post-softmax tensor of a layer; biases are one more row of the bases.

    Raises ValueError for another module, for normalised latents, whose bases may not be mixed, and for NaN or infinite weights.
    """
    if getattr(layer, "latent_norm", False):
        raise ValueError("layer has latent_norm=True; RMSNorm fixes the latents' coordinates, so it has no tensor to decompose")
    for kind, parts_of in (
        (TuckerAttention, _of_weights),
        (MultiHeadAttention, _of_projections),
        (MultiHeadLatentAttention, _of_latents),
    ):
        if isinstance(layer, kind):
            check_weights(layer)
            pre, rotary, post = parts_of(layer)
            return Slices.of(*pre, rotary if turned else None), Slices.of(*post)
    raise ValueError(f"layer is {type(layer).__name__}; it must be one of this package's four mechanisms")


def check_weights(layer: nn.Module) -> None:
    """Raise ValueError if queries and keys are normalised, or a parameter holds NaN, infinity, or no values (on the meta device)."""
    if getattr(layer, "qk_norm", None):
        raise ValueError(f"layer has qk_norm={layer.qk_norm!r}; its logits are not trilinear, so it has no tensor to decompose")
    for name, parameter in layer.named_parameters():
        if parameter.is_meta or not parameter.isfinite().all():
            held = "no values" if parameter.is_meta else "NaN or infinity"
            raise ValueError(f"layer's {name} holds {held}; such a layer has no spectrum and no approximation")


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _of_weights(layer) -> tuple[Parts, Rotary | None, Parts]:
    """P, left, L, right before the softmax, the rotary embedding, and P, left, L, right after it; so too below."""

    def parts(weights):
        core, head = weights.core.detach().double(), weights.factors[0].detach().double()  # mixed in less, it would gain ranks
        cores = torch.einsum("rst,hr->hst", core, head)  # (h, s, t)
        identity = torch.eye(cores.shape[2]).to(cores).expand(len(cores), -1, -1)
        return weights.factors[1].detach(), cores, weights.factors[2].detach(), identity

    return parts(layer.pre), layer.rotary, parts(layer.post)


def _of_projections(layer) -> tuple[Parts, Rotary | None, Parts]:
    w_q, w_k, w_v = (with_bias_row(p) for p in (layer.q_proj, layer.k_proj, layer.v_proj))  # (D, heads * k)
    h, k = layer.n_heads, layer.head_dim
    g = w_k.shape[1] // k

    own = torch.arange(h, device=w_q.device)
    group = own // (h // g)
    rotary = None if layer.rotary is None else layer.rotary.repeated(g)
    return (w_q, own, w_k, group), rotary, (layer.o_proj.weight.detach(), own, w_v, group)


def _of_latents(layer) -> tuple[Parts, Rotary | None, Parts]:
    h, rope = layer.n_heads, layer.rope_dim
    w_dq, w_dk, w_o = (p.weight.detach() for p in (layer.q_a_proj, layer.kv_a_proj_with_mqa, layer.o_proj))
    left = layer.q_b_proj.weight.detach().unflatten(0, (h, -1)).mT  # (h, s, k + rope)
    w_uk, w_uv = (w.detach() for w in layer.up_projections())  # (h, k, t), (h, v, t)
    right = torch.stack([torch.block_diag(up.T, torch.eye(rope).to(up)) for up in w_uk])  # (h, t + rope, k + rope)
    rotary = layer.rotary
    if rope:
        t = layer.kv_rank
        if t % 2:  # as in `as_tucker`: an odd latent gets one more channel, of zeros
            w_dk, right = widened(w_dk.T, t).T, widened(right.mT, t).mT
        rotary = layer.rotary.after_unrotated(t + t % 2)
    own = torch.arange(h, device=w_o.device)
    value = w_dk[: layer.kv_rank] if layer.shared_kv else layer.v_a_proj.weight.detach()
    return (w_dq.T, left, w_dk.T, right), rotary, (w_o, own, value.T, w_uv.mT)


@dataclass(frozen=True)
class Spectra:
    """Singular values of the three unfoldings of one attention tensor, descending; float64.

    Under rotary embedding `columns` lists those of all frequencies together; a turning pair counts as two equal values.
    """

    head: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    def tails(self, ranks: tuple[int, int, int]) -> torch.Tensor:
        """Per mode the sum of squares beyond the rank: the terms of the HOSVD error bound.  Returns: (3,)."""
        return torch.stack([(s[rank:] ** 2).sum() for s, rank in zip((self.head, self.rows, self.columns), ranks)])

    def ranks(self) -> tuple[int, int, int]:
        """How many singular values stand above the rounding floor, per mode."""
        return numerical_rank(self.head), numerical_rank(self.rows), numerical_rank(self.columns)


def spectra(layer: nn.Module) -> tuple[Spectra, Spectra]:
    """Spectra of the pre-softmax (head, query, key) and the post-softmax tensor (head, output, value) of any layer."""
    pre, post = factored_tensors(layer)
    return spectra_of(pre), spectra_of(post)


def spectra_of(tensor: FactoredTensor) -> Spectra:
    """From the eigenvalues of the Gram matrices."""
    columns = []
    for gram, group in zip(tensor.column_grams(), tensor.classes):
        values = _roots(gram)
        columns.append(values if group.second is None else (values / 2**0.5).repeat_interleave(2))
    return Spectra(_roots(tensor.head_gram()), _roots(tensor.row_gram()), torch.cat(columns).sort(descending=True).values)


def rounding_floor(singular_values: torch.Tensor) -> float:
    """Below this a singular value that was computed from a Gram matrix is noise: sqrt(n eps) times the largest."""
    return (len(singular_values) * torch.finfo(torch.float64).eps) ** 0.5 * singular_values.max().item()


def numerical_rank(singular_values: torch.Tensor) -> int:
    """How many stand above the rounding floor."""
    return int((singular_values > rounding_floor(singular_values)).sum())


def entropy_rank(singular_values: torch.Tensor) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007): n for n equal ones, 1 for a single one.

    0 where all of them are zero.
    """
    if not singular_values.any():
        return 0.0
    p = singular_values / singular_values.sum()
    return torch.exp(-torch.special.xlogy(p, p).sum()).item()


def energy_rank(singular_values: torch.Tensor, share: float = 0.99) -> int:
    """The fewest singular values that hold `share` of the sum of squares.  Raises ValueError for a share outside (0, 1]."""
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}; it must be in (0, 1]")
    energy = (singular_values**2).cumsum(0)
    return int((energy < share * energy[-1]).sum()) + 1


def _roots(gram: torch.Tensor) -> torch.Tensor:
    """Singular values from a Gram matrix, descending; rounding below zero is cut."""
    return torch.linalg.eigvalsh(gram).clamp(min=0).flip(0).sqrt()
