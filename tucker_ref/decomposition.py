"""Rung 2. The Tucker decomposition: a small core times one matrix per mode, and three ways to compute it (NumPy).

    T  =  C x_0 U_0 x_1 U_1 x_2 U_2 ...          C: (r_0, r_1, ...),  U_n: (I_n, r_n)

`hosvd` truncates every unfolding of T independently, `sthosvd` truncates one mode after the other and so works on ever
smaller tensors, `hooi` starts from the HOSVD and refits one factor at a time. The bounds that the tests hold them to:

    HOSVD     error^2 <= sum of the tails, and for any tensor of these ranks error^2 >= the largest tail
    ST-HOSVD  error^2 == sum of the tails discarded on the way
    HOOI      error   <= the HOSVD's, never rising

where a mode's tail is the sum of its discarded squared singular values (`tail_energies`).
"""

from dataclasses import dataclass

import numpy as np

from .checks import check_decomposable, check_factors, check_settling
from .tensor_algebra import mode_product, unfold


@dataclass(frozen=True)
class TuckerTensor:
    """A tensor held as a core and one factor per mode.

    Args:
        core: (r_0, ..., r_{D-1}).
        factors: one per mode, (I_n, r_n).

    Raises:
        ValueError: if their widths disagree.
    """

    core: np.ndarray
    factors: tuple[np.ndarray, ...]

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))
        check_factors(self.core, self.factors)

    @property
    def ranks(self) -> tuple[int, ...]:
        """(r_0, ..., r_{D-1})."""
        return self.core.shape

    @property
    def shape(self) -> tuple[int, ...]:
        """(I_0, ..., I_{D-1})."""
        return tuple(len(factor) for factor in self.factors)

    @property
    def size(self) -> int:
        """How many numbers are stored."""
        return self.core.size + sum(factor.size for factor in self.factors)

    def to_tensor(self) -> np.ndarray:
        """The full tensor (I_0, ..., I_{D-1}): the core multiplied by every factor."""
        return multi_mode_product(self.core, self.factors)


def multi_mode_product(tensor: np.ndarray, matrices) -> np.ndarray:
    """tensor x_0 matrices[0] x_1 matrices[1] ...; the order does not matter, since the modes are different.

    Args:
        tensor: (I_0, ..., I_{D-1}).
        matrices: one per mode, (J_n, I_n).

    Returns:
        (J_0, ..., J_{D-1}).
    """
    for mode, matrix in enumerate(matrices):
        tensor = mode_product(tensor, matrix, mode)
    return tensor


def hosvd(tensor: np.ndarray, ranks) -> TuckerTensor:
    """Truncated higher-order SVD: U_n holds the r_n leading left singular vectors of the mode-n unfolding.

    De Lathauwer, De Moor & Vandewalle 2000.

    Args:
        tensor: (I_0, ..., I_{D-1}).
        ranks: one per mode, r_n <= min(I_n, product of the others).

    Returns:
        The core (r_0, ..., r_{D-1}) and factors (I_n, r_n) with orthonormal columns.

    Raises:
        ValueError: on other ranks, complex numbers, NaN, infinity, or numbers whose squares have no sum.
    """
    ranks = check_decomposable(tensor, ranks)
    factors = [_leading(unfold(tensor, mode), rank) for mode, rank in enumerate(ranks)]
    return _project(tensor, factors)


def sthosvd(tensor: np.ndarray, ranks) -> TuckerTensor:
    """Sequentially truncated HOSVD: each mode is compressed before the next is looked at.

    Vannieuwenhoven, Vandebril & Meerbergen 2012.

    Args:
        tensor, ranks: as in `hosvd`, whose errors are raised here too.
    """
    ranks = check_decomposable(tensor, ranks)
    core, factors = tensor, []
    for mode, rank in enumerate(ranks):
        factors.append(_leading(unfold(core, mode), rank))
        core = mode_product(core, factors[mode].T, mode)
    return TuckerTensor(core, tuple(factors))


def hooi(tensor: np.ndarray, ranks, max_sweeps: int = 50, rtol: float = 1e-12) -> TuckerTensor:
    """Higher-order orthogonal iteration: refit each factor to the tensor projected on all the others, until it settles.

    The result of `hosvd` is the start, and a sweep that does not lower the error is dropped, so the error never rises.
    It is measured as |T - T_hat| itself: sqrt(|T|^2 - |C|^2) would lose half of the digits near exactness.
    De Lathauwer et al. 2000b; Kolda & Bader 2009, Fig. 4.4.

    Args:
        tensor, ranks: as in `hosvd`, whose errors are raised here too.
        max_sweeps: the most that are made.
        rtol: stop as soon as a sweep lowers the error by less than rtol * |T|.
    """
    max_sweeps, rtol = check_settling(max_sweeps, rtol)
    best = hosvd(tensor, ranks)
    error, norm = np.linalg.norm(tensor - best.to_tensor()), np.linalg.norm(tensor)
    for _ in range(max_sweeps):
        factors = list(best.factors)
        for mode, rank in enumerate(best.ranks):
            projected = tensor
            for other, factor in enumerate(factors):
                if other != mode:
                    projected = mode_product(projected, factor.T, other)
            factors[mode] = _leading(unfold(projected, mode), rank)
        candidate = _project(tensor, factors)
        improved = error - np.linalg.norm(tensor - candidate.to_tensor())
        if improved <= 0:
            break
        best, error = candidate, error - improved
        if improved <= rtol * norm:
            break
    return best


def tail_energies(tensor: np.ndarray, ranks) -> np.ndarray:
    """Per mode, the sum of the squared singular values of the unfolding beyond the first r_n: (D,).

    Args:
        tensor, ranks: as in `hosvd`, whose errors are raised here too.
    """
    ranks = check_decomposable(tensor, ranks)
    spectra = [np.linalg.svd(unfold(tensor, mode), compute_uv=False) for mode in range(tensor.ndim)]
    return np.array([(sigma[rank:] ** 2).sum() for sigma, rank in zip(spectra, ranks)])


def _leading(matrix: np.ndarray, rank: int) -> np.ndarray:
    """The `rank` leading left singular vectors, as orthonormal columns."""
    return np.linalg.svd(matrix, full_matrices=False)[0][:, :rank]


def _project(tensor: np.ndarray, factors) -> TuckerTensor:
    """The best core for given orthonormal factors: C = T x_0 U_0^T x_1 U_1^T ..."""
    return TuckerTensor(multi_mode_product(tensor, [u.T for u in factors]), factors)
