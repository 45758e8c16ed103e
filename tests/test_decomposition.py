"""Rung 2: HOSVD, ST-HOSVD and HOOI hold the bounds that their theorems promise, and agree with TensorLy."""

import numpy as np
import pytest
import tensorly
from helpers import EXACT, relative_error
from tensorly.decomposition import tucker as tensorly_tucker

from tucker_ref import TuckerTensor, decomposition, hooi, hosvd, mode_product, multilinear_rank, sthosvd, tail_energies, unfold

SHAPES_AND_RANKS = [
    ((4, 5, 6), (2, 3, 3)),
    ((12, 9, 7), (3, 7, 5)),
    ((3, 10, 10), (2, 4, 6)),
    ((5, 4), (2, 2)),
    ((3, 4, 2, 5), (2, 3, 2, 3)),
    ((6, 1, 7), (3, 1, 3)),
]
METHODS = [hosvd, sthosvd, hooi]
NAMES = [m.__name__ for m in METHODS]


def decaying(shape, seed=0):
    """Noise whose unfoldings have clearly decaying spectra, as trained weights do."""
    rng = np.random.default_rng(seed)
    tensor = rng.standard_normal(shape)
    for mode, size in enumerate(shape):
        rotation = np.linalg.qr(rng.standard_normal((size, size)))[0]
        tensor = mode_product(tensor, np.diag(0.7 ** np.arange(size)) @ rotation, mode)
    return tensor


def squared_error(tensor, approximation: TuckerTensor) -> float:
    return np.linalg.norm(tensor - approximation.to_tensor()) ** 2


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("shape, ranks", SHAPES_AND_RANKS)
def test_error_stays_between_the_largest_tail_and_the_sum_of_tails(method, shape, ranks):
    tensor = decaying(shape)
    approximation = method(tensor, ranks)
    tails = tail_energies(tensor, ranks)
    assert approximation.ranks == ranks and approximation.shape == shape
    error = squared_error(tensor, approximation)
    assert tails.max() * (1 - 1e-10) <= error <= tails.sum() * (1 + 1e-10)
    for factor in approximation.factors:
        np.testing.assert_allclose(factor.T @ factor, np.eye(factor.shape[1]), atol=1e-12)
    # Control: a random subspace of the same ranks is far outside the bound.
    rng = np.random.default_rng(1)
    bases = [np.linalg.qr(rng.standard_normal((n, r)))[0] for n, r in zip(shape, ranks)]
    projected = tensor
    for mode, basis in enumerate(bases):
        projected = mode_product(projected, basis @ basis.T, mode)
    assert np.linalg.norm(tensor - projected) ** 2 > tails.sum() * 1.01


@pytest.mark.parametrize("shape, ranks", SHAPES_AND_RANKS)
def test_sthosvd_error_equals_the_tails_discarded_on_the_way(shape, ranks):
    tensor = decaying(shape)
    approximation = sthosvd(tensor, ranks)
    discarded, partial = 0.0, tensor
    for mode, (rank, factor) in enumerate(zip(ranks, approximation.factors)):
        discarded += (np.linalg.svd(unfold(partial, mode), compute_uv=False)[rank:] ** 2).sum()
        partial = mode_product(partial, factor.T, mode)
    assert squared_error(tensor, approximation) == pytest.approx(discarded, rel=1e-10)
    if len(shape) > 2:  # control: for the HOSVD the same equality is only a bound
        assert squared_error(tensor, hosvd(tensor, ranks)) < tail_energies(tensor, ranks).sum() * (1 - 1e-6)


@pytest.mark.parametrize("shape, ranks", SHAPES_AND_RANKS)
def test_hooi_is_never_worse_than_its_hosvd_start_and_never_rises(shape, ranks):
    tensor = decaying(shape)
    errors = [squared_error(tensor, hosvd(tensor, ranks))]
    errors += [squared_error(tensor, hooi(tensor, ranks, max_sweeps=n)) for n in (0, 1, 2, 5, 50)]
    assert errors[1] == errors[0]  # without a sweep it is the HOSVD
    assert all(later <= earlier for earlier, later in zip(errors, errors[1:]))


def test_hooi_improves_where_there_is_something_to_improve():
    tensor = np.random.default_rng(0).standard_normal((8, 8, 8))
    assert squared_error(tensor, hooi(tensor, (2, 2, 2))) < 0.99 * squared_error(tensor, hosvd(tensor, (2, 2, 2)))


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES_AND_RANKS if len(shape) > 2 and 1 not in shape])
def test_full_rank_is_exact_and_one_less_is_not(method, shape):
    tensor = np.random.default_rng(0).standard_normal(shape)
    full = tuple(min(n, tensor.size // n) for n in shape)
    assert relative_error(method(tensor, full).to_tensor(), tensor) < EXACT
    mode = int(np.argmax(full))
    fewer = tuple(r - (n == mode) for n, r in enumerate(full))
    assert relative_error(method(tensor, fewer).to_tensor(), tensor) > 1e-3  # control


@pytest.mark.parametrize("shape, ranks", [(s, r) for s, r in SHAPES_AND_RANKS if len(s) > 2])
def test_hooi_reaches_tensorlys_error(shape, ranks):
    tensor = decaying(shape)
    core, factors = tensorly_tucker(tensor, list(ranks), n_iter_max=200, tol=1e-12)
    theirs = np.linalg.norm(tensor - tensorly.tucker_to_tensor((core, factors)))
    ours = np.linalg.norm(tensor - hooi(tensor, ranks, max_sweeps=200).to_tensor())
    assert ours == pytest.approx(theirs, rel=1e-6)


def projector(factor):
    """What a factor spans; singular vectors themselves are free in sign."""
    return factor @ factor.T


@pytest.mark.parametrize("shape, ranks", SHAPES_AND_RANKS)
def test_hosvd_and_sthosvd_factors_span_what_tensorly_finds(shape, ranks):
    tensor = decaying(shape)
    partial = tensor
    both = zip(hosvd(tensor, ranks).factors, sthosvd(tensor, ranks).factors)
    for mode, (rank, (plain, sequential)) in enumerate(zip(ranks, both)):
        theirs = tensorly.tenalg.svd_interface(tensorly.unfold(tensor, mode), n_eigenvecs=rank)[0]
        assert relative_error(projector(plain), projector(theirs)) < 1e-10
        theirs = tensorly.tenalg.svd_interface(tensorly.unfold(partial, mode), n_eigenvecs=rank)[0]
        assert relative_error(projector(sequential), projector(theirs)) < 1e-10
        partial = tensorly.tenalg.mode_dot(partial, theirs.T, mode)
        trailing = np.linalg.svd(unfold(tensor, mode))[0][:, -rank:]
        assert rank == shape[mode] or relative_error(projector(trailing), projector(plain)) > 0.1  # control


@pytest.mark.parametrize("shape, ranks", SHAPES_AND_RANKS)
def test_tucker_to_tensor_matches_tensorly(shape, ranks):
    rng = np.random.default_rng(0)
    core, factors = rng.standard_normal(ranks), [rng.standard_normal((n, r)) for n, r in zip(shape, ranks)]
    ours = TuckerTensor(core, factors)
    assert relative_error(ours.to_tensor(), tensorly.tucker_to_tensor((core, factors))) < EXACT
    assert ours.size == core.size + sum(f.size for f in factors)
    flipped = TuckerTensor(core, [f[::-1] for f in factors])
    assert relative_error(flipped.to_tensor(), ours.to_tensor()) > 0.1 or shape[0] == 1  # control


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize(
    "ranks, message",
    [
        ((0, 2, 2), r"ranks\[0\] is 0"),
        ((5, 2, 2), r"ranks\[0\] is 5.*at most 4"),
        ((1, 2, 3), r"ranks\[2\] is 3.*at most 2"),
        ((2, 2), r"ranks is \(2, 2\).*3 integers"),
        ((2.0, 2, 2), r"ranks\[0\] is 2.0"),
        (3, r"ranks is 3.*3 integers"),
    ],
)
def test_bad_ranks_are_named(method, ranks, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        method(np.ones((4, 5, 6)), ranks)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_non_finite_tensors_are_refused(method, poison):
    with pytest.raises(ValueError, match="^tensor holds NaN or infinity; it has no Tucker decomposition$"):
        method(np.full((2, 2, 2), poison), (1, 1, 1))


def test_a_core_and_factors_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"factors\[1\] has shape \(4, 3\)"):
        TuckerTensor(np.ones((2, 2)), (np.ones((3, 2)), np.ones((4, 3))))
    with pytest.raises(ValueError, match="1 factors given"):
        TuckerTensor(np.ones((2, 2)), (np.ones((3, 2)),))


def sweeps(monkeypatch, tensor, ranks, **options):
    """How often `hooi` refits, and what it returns."""
    calls = []
    project = decomposition._project
    monkeypatch.setattr(decomposition, "_project", lambda *a: calls.append(1) or project(*a))
    found = hooi(tensor, ranks, **options)
    monkeypatch.undo()
    return len(calls) - 1, found  # the first call is the HOSVD's


def test_hooi_stops_where_a_sweep_no_longer_helps(monkeypatch):
    tensor = decaying((6, 7, 8))
    exact = hosvd(tensor, (2, 3, 4)).to_tensor()
    assert sweeps(monkeypatch, exact, (2, 3, 4))[0] == 1  # nothing to gain
    noise = np.random.default_rng(0).standard_normal((6, 7, 8))
    n, _ = sweeps(monkeypatch, noise, (2, 2, 2), rtol=1e-6)
    assert 1 < n < 50
    for scale in (2.0**-40, 2.0**40):  # rtol is relative: the tensor's size does not matter
        assert sweeps(monkeypatch, scale * noise, (2, 2, 2), rtol=1e-6)[0] == n
    assert sweeps(monkeypatch, noise, (2, 2, 2), max_sweeps=3, rtol=0.0)[0] == 3


def test_hooi_takes_fifty_sweeps_at_most(monkeypatch):
    noise = np.random.default_rng(3).standard_normal((7, 8, 9))
    assert sweeps(monkeypatch, noise, (2, 2, 2), rtol=0.0)[0] <= 50
    norms = iter(range(10_000, 0, -1))
    monkeypatch.setattr(decomposition.np.linalg, "norm", lambda _: next(norms))  # ever better
    assert sweeps(monkeypatch, noise, (2, 2, 2))[0] == 50


def test_factors_may_be_a_list_and_are_kept_as_a_tuple():
    factors = [np.ones((3, 2)), np.ones((4, 2))]
    held = TuckerTensor(np.ones((2, 2)), factors).factors
    assert isinstance(held, tuple) and all(a is b for a, b in zip(held, factors))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_only_numbers_whose_squares_have_sums_are_decomposed(dtype):
    limits = np.finfo(dtype)
    bound = (float(limits.max) * float(limits.eps)) ** 0.5
    least, most = dtype(float(limits.tiny) ** 0.5), dtype(bound if dtype == np.float64 else 0.9999 * bound)
    tensor = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(dtype)
    tensor /= np.abs(tensor).max()
    ones = np.ones((2, 3, 2), dtype)
    error = lambda scale: np.linalg.norm((tensor * scale - hooi(tensor * scale, (2, 2, 2)).to_tensor()) / scale)  # noqa: E731
    for scale in (least, dtype(1), most):
        assert multilinear_rank(ones * scale) == (1, 1, 1)
        assert error(scale) == pytest.approx(error(dtype(1)), rel=2e-5)
    assert multilinear_rank(0 * ones) == (0, 0, 0) and multilinear_rank(ones[:0]) == (0, 0, 0)
    for kind in (np.int64, np.uint8, bool):
        assert multilinear_rank(ones.astype(kind)) == (1, 1, 1)
    for scale in (least * dtype(0.999), most * dtype(1.1)):
        for decompose in (hosvd, sthosvd, hooi, tail_energies):
            with pytest.raises(ValueError, match="^the largest entry of tensor is .*, or it has no Tucker decomposition$"):
                decompose(tensor * scale, (2, 2, 2))
        with pytest.raises(ValueError, match=r"it must be .*e-\d+ to .*e\+\d+, or its ranks are not defined$"):
            multilinear_rank(-ones * scale)
