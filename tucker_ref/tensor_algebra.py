"""Rung 1. Unfold a tensor into a matrix, multiply it along one mode, and count its ranks (NumPy).

Modes count from 0 here; the paper, like Kolda & Bader (2009), counts them from 1, so its x_1 is our mode 0.
`unfold` puts the chosen mode first and keeps the others in order, row-major, as NumPy and TensorLy do. Kolda & Bader
order the columns the other way round; no rank, norm or product depends on that order.
"""

import math

import numpy as np


def unfold(tensor: np.ndarray, mode: int) -> np.ndarray:
    """The mode-n unfolding: one row per index of `mode`, one column per combination of all the other indices.

    tensor: (I_0, ..., I_{D-1}).  Returns: (I_mode, product of the other sizes).
    Raises ValueError if the tensor has no such mode.  Kolda & Bader 2009, Sec. 2.4.
    """
    _check_mode(tensor.ndim, mode)
    return np.moveaxis(tensor, mode, 0).reshape(tensor.shape[mode], math.prod(_without(tensor.shape, mode)))


def fold(matrix: np.ndarray, mode: int, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `unfold`: fold(unfold(T, n), n, T.shape) is T.

    matrix: (shape[mode], product of the other sizes).  Returns: a tensor of the given shape.
    Raises ValueError if the matrix does not have that form.
    """
    _check_mode(len(shape), mode)
    expected = (shape[mode], math.prod(_without(shape, mode)))
    if matrix.shape != expected:
        raise ValueError(f"matrix has shape {matrix.shape}; folding mode {mode} of {tuple(shape)} needs {expected}")
    return np.moveaxis(matrix.reshape(shape[mode], *_without(shape, mode)), 0, mode)


def mode_product(tensor: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    """The mode-n product T x_n M: apply the matrix to every mode-n fibre, (T x_n M)_(n) = M T_(n).

    tensor: (I_0, ..., I_{D-1}), matrix: (J, I_mode).  Returns: the tensor with I_mode replaced by J.
    Raises ValueError if the widths differ.  Kolda & Bader 2009, Sec. 2.5; paper, Sec. 2.
    """
    _check_product(tensor, matrix, mode)
    shape = (*tensor.shape[:mode], matrix.shape[0], *tensor.shape[mode + 1 :])
    return fold(matrix @ unfold(tensor, mode), mode, shape)


def mode_product_einsum(tensor: np.ndarray, matrix: np.ndarray, mode: int) -> np.ndarray:
    """The same product as `mode_product`, written as the sum that defines it: sum over i_n of T[..., i_n, ...] M[j, i_n]."""
    _check_product(tensor, matrix, mode)
    indices = list(range(tensor.ndim))
    replaced = tensor.ndim  # a fresh letter for the row index j of the matrix
    output = [replaced if index == mode else index for index in indices]
    return np.einsum(tensor, indices, matrix, [replaced, mode], output)


def multilinear_rank(tensor: np.ndarray, rtol: float | None = None) -> tuple[int, ...]:
    """The ranks of all unfoldings: the smallest Tucker ranks that represent the tensor exactly.

    rtol: singular values up to rtol times the largest count as zero; by default the unfolding's longer side times the
    machine epsilon of its dtype, as numpy.linalg.matrix_rank has it.
    Raises ValueError if the tensor holds NaN or infinity, or rtol is negative.
    """
    check_array("tensor", tensor)
    if not np.isfinite(tensor).all():
        raise ValueError("tensor holds NaN or infinity; its ranks are not defined")
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"rtol is {rtol!r}; it must be at least 0")
    return tuple(int(np.linalg.matrix_rank(unfold(tensor, mode), rtol=rtol)) for mode in range(tensor.ndim))


def _without(shape: tuple[int, ...], mode: int) -> tuple[int, ...]:
    return (*shape[:mode], *shape[mode + 1 :])


def check_array(name: str, array: np.ndarray) -> None:
    """Raise ValueError unless this is a NumPy array of real numbers, of a dtype in which NumPy decomposes matrices."""
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub" or array.dtype == np.float16:
        kind = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name} is {kind}; it must be a NumPy array of real numbers, at least float32")


def _check_mode(order: int, mode: int) -> None:
    if isinstance(mode, bool) or not isinstance(mode, int) or not 0 <= mode < order:
        raise ValueError(f"mode is {mode!r}; a tensor of order {order} has modes 0 to {order - 1}")


def _check_product(tensor: np.ndarray, matrix: np.ndarray, mode: int) -> None:
    _check_mode(tensor.ndim, mode)
    if matrix.ndim != 2 or matrix.shape[1] != tensor.shape[mode]:
        raise ValueError(
            f"matrix has shape {matrix.shape}; mode {mode} of a tensor {tensor.shape} needs (any, {tensor.shape[mode]})"
        )
