"""Rung 1: unfolding, the mode product written twice, and multilinear ranks."""

import numpy as np
import pytest
import tensorly
from helpers import EXACT, relative_error
from hypothesis import given, settings
from hypothesis import strategies as st

from tucker_ref import fold, mode_product, mode_product_einsum, multilinear_rank, unfold


@st.composite
def tensor_and_mode(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    seed = draw(st.integers(0, 2**16))
    return np.random.default_rng(seed).standard_normal(shape), draw(st.integers(0, len(shape) - 1))


@given(tensor_and_mode())
def test_fold_inverts_unfold_and_matches_tensorly(case):
    tensor, mode = case
    matrix = unfold(tensor, mode)
    assert matrix.shape == (tensor.shape[mode], tensor.size // tensor.shape[mode])
    np.testing.assert_array_equal(fold(matrix, mode, tensor.shape), tensor)
    np.testing.assert_array_equal(matrix, tensorly.unfold(tensor, mode))


def test_unfold_rows_are_slices():
    tensor = np.arange(24).reshape(2, 3, 4)
    np.testing.assert_array_equal(unfold(tensor, 1)[2], tensor[:, 2, :].ravel())
    assert not np.array_equal(unfold(tensor, 2)[2], tensor[:, 2, :].ravel()[:6])  # control: another mode, other rows


@given(tensor_and_mode(), st.integers(1, 6))
def test_mode_product_equals_einsum_and_tensorly(case, n_rows):
    tensor, mode = case
    matrix = np.random.default_rng(1).standard_normal((n_rows, tensor.shape[mode]))
    product = mode_product(tensor, matrix, mode)
    assert product.shape[mode] == n_rows
    np.testing.assert_allclose(product, mode_product_einsum(tensor, matrix, mode), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(product, tensorly.tenalg.mode_dot(tensor, matrix, mode), rtol=1e-12, atol=1e-12)


def test_mode_products_along_different_modes_commute_but_along_one_mode_compose():
    rng = np.random.default_rng(0)
    tensor, a, b, c = (rng.standard_normal(s) for s in [(3, 4, 5), (4, 4), (5, 5), (4, 4)])
    a_then_b, b_then_a = mode_product(mode_product(tensor, a, 1), b, 2), mode_product(mode_product(tensor, b, 2), a, 1)
    assert relative_error(a_then_b, b_then_a) < EXACT
    twice = mode_product(mode_product(tensor, a, 1), c, 1)
    assert relative_error(twice, mode_product(tensor, c @ a, 1)) < EXACT
    assert relative_error(twice, mode_product(tensor, a @ c, 1)) > 0.1  # control: the order matters within a mode


@pytest.mark.parametrize("ranks", [(1, 1, 1), (2, 3, 4), (2, 2, 3), (3, 5, 7)])
def test_multilinear_rank_finds_the_ranks_a_tensor_was_built_with(ranks):
    rng = np.random.default_rng(0)
    tensor = rng.standard_normal(ranks)
    for mode, (rank, size) in enumerate(zip(ranks, (6, 7, 8))):
        tensor = mode_product(tensor, rng.standard_normal((size, rank)), mode)
    assert multilinear_rank(tensor) == ranks
    noisy = tensor + 1e-6 * rng.standard_normal(tensor.shape)
    assert multilinear_rank(noisy) == (6, 7, 8)  # control: noise fills every mode,
    assert multilinear_rank(noisy, rtol=1e-3) == ranks  # unless told how much of it to ignore


def test_multilinear_rank_is_limited_by_the_product_of_the_others():
    assert multilinear_rank(np.random.default_rng(0).standard_normal((2, 3, 20))) == (2, 3, 6)
    assert multilinear_rank(np.zeros((2, 3, 4))) == (0, 0, 0)
    assert multilinear_rank(np.ones((1, 3)), rtol=0.0) == (1, 1)  # nothing counts as zero but zero


@settings(max_examples=20)
@given(st.integers(-3, 6).filter(lambda mode: not 0 <= mode < 3))
def test_a_mode_that_does_not_exist_is_named(mode):
    tensor = np.ones((2, 3, 4))
    for function, arguments in [(unfold, (mode,)), (mode_product, (np.ones((2, 2)), mode)), (fold, (mode, (2, 3, 4)))]:
        with pytest.raises(ValueError, match=f"mode is {mode}"):
            function(tensor, *arguments)


def test_other_bad_input_is_named():
    tensor = np.ones((2, 3, 4))
    with pytest.raises(ValueError, match=r"matrix has shape \(5, 2\).*\(any, 3\)"):
        mode_product(tensor, np.ones((5, 2)), 1)
    with pytest.raises(ValueError, match=r"folding mode 1 .* needs \(3, 8\)"):
        fold(np.ones((3, 7)), 1, (2, 3, 4))
    with pytest.raises(ValueError, match="NaN"):
        multilinear_rank(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="rtol is -1"):
        multilinear_rank(tensor, rtol=-1)


def test_half_precision_is_refused():
    with pytest.raises(ValueError, match="tensor is float16; it must be a NumPy array of real numbers, at least float32"):
        multilinear_rank(np.ones((2, 2, 2), np.float16))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_holds_no_numbers_has_no_ranks(value):
    tensor = np.ones((2, 3))
    assert multilinear_rank(tensor) == (1, 1)  # control
    tensor[1, 2] = value
    with pytest.raises(ValueError, match="^tensor holds NaN or infinity; its ranks are not defined$"):
        multilinear_rank(tensor)
