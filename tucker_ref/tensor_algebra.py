"""Rung 1. Unfold a tensor into a matrix, multiply it along one mode, and count its ranks (NumPy).

Modes count from 0 here; the paper, like Kolda & Bader (2009), counts them from 1, so its x_1 is our mode 0.
`unfold` puts the chosen mode first and keeps the others in order, row-major, as NumPy and TensorLy do. Kolda & Bader
order the columns the other way round; no rank, norm or product depends on that order.
"""

import math

import numpy as np

from .checks import check_finite, check_folded, check_product, check_rtol, check_unfolded


def unfold(tensor: np.ndarray, mode: int) -> np.ndarray:
    """The mode-n unfolding: one row per index of `mode`, one column per combination of all the other indices.

    Kolda & Bader 2009, Sec. 2.4.

    Args:
        tensor: (I_0, ..., I_{D-1}).
        mode: 0 to D - 1.

    Returns:
        (I_mode, product of the other sizes).

    Raises:
        ValueError: if the tensor has no such mode.
    """
    mode = check_unfolded(tensor, mode)
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], math.prod(_without(tensor.shape, mode)))


def fold(matrix: np.ndarray, mode: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `unfold`: fold(unfold(T, n), n, T.shape) is T.

    Args:
        matrix: (shape[mode], product of the other sizes).
        mode: 0 to D - 1.
        shape: of the tensor.

    Returns:
        A tensor of the given shape.

    Raises:
        ValueError: if the matrix does not have that form.
    """
    mode, shape = check_folded(matrix, mode, shape)
    return np.moveaxis(matrix.reshape(shape[mode], *_without(shape, mode)), 0, mode)


def mode_product(tensor: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    """The mode-n product T x_n M: apply the matrix to every mode-n fibre, (T x_n M)_(n) = M T_(n).

    Kolda & Bader 2009, Sec. 2.5; paper, Sec. 2.

    Args:
        tensor: (I_0, ..., I_{D-1}).
        matrix: (J, I_mode).
        mode: 0 to D - 1.

    Returns:
        The tensor with I_mode replaced by J.

    Raises:
        ValueError: if the widths differ.
    """
    tensor, matrix, mode = check_product(tensor, matrix, mode)
    shape = (*tensor.shape[:mode], matrix.shape[0], *tensor.shape[mode + 1 :])
    return fold(matrix @ unfold(tensor, mode), mode, shape)


def mode_product_einsum(tensor: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    """The same product, written as the sum that defines it: sum over i_n of T[..., i_n, ...] M[j, i_n].

    Args:
        tensor, matrix, mode: as in `mode_product`, whose errors are raised here too.
    """
    tensor, matrix, mode = check_product(tensor, matrix, mode)
    indices = list(range(tensor.ndim))
    replaced = tensor.ndim  # a fresh letter for the row index j of the matrix
    output = [replaced if index == mode else index for index in indices]
    return np.einsum(tensor, indices, matrix, [replaced, mode], output)


def multilinear_rank(tensor: np.ndarray, rtol: float | None = None) -> tuple[int, ...]:
    """The ranks of all unfoldings: the smallest Tucker ranks that represent the tensor exactly.

    Args:
        tensor: (I_0, ..., I_{D-1}).
        rtol: singular values up to rtol times the largest count as zero; by default the unfolding's longer side times the
            machine epsilon of its dtype, as numpy.linalg.matrix_rank has it.

    Returns:
        One rank per mode.

    Raises:
        ValueError: if the tensor holds NaN, infinity or numbers whose squares have no sum, or rtol is negative.
    """
    check_finite(tensor, "its ranks are not defined")
    rtol = None if rtol is None else check_rtol(rtol)
    return tuple(int(np.linalg.matrix_rank(unfold(tensor, mode), rtol=rtol)) for mode in range(tensor.ndim))


def _without(shape: tuple[int, ...], mode: int) -> tuple[int, ...]:
    return (*shape[:mode], *shape[mode + 1 :])
