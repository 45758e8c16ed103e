"""Rung 12k: few eigenvectors of many by block Lanczos, against all of them, and what must be thrown away."""

import pytest
import torch

from tucker_ref import MultiHeadAttention, as_tucker, compress
from tucker_ref.compression import leading as module
from tucker_ref.compression.leading import TOLERANCE, by_lanczos, leading

N, RANK = 600, 60
KNOWN = {
    "down to 1e-8 as singular values": torch.logspace(0, -16, N, dtype=torch.float64),
    "half a plateau": torch.cat([torch.linspace(1, 0.9, RANK), torch.linspace(0.1, 0, N - RANK)]).double(),
    "a projector": (torch.arange(N) < 200).double(),
    "all equal": torch.ones(N, dtype=torch.float64),
    "fewer than are kept": torch.cat([torch.linspace(1, 0.5, RANK // 2), torch.zeros(N - RANK // 2)]).double(),
}
FLAT = torch.linspace(1, 0, N, dtype=torch.float64)  # no gap anywhere
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])


@pytest.fixture(autouse=True)
def small_matrices_too(monkeypatch):
    monkeypatch.setattr(module, "SMALLEST", 512)


def with_values(values: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(len(values), len(values), dtype=dtype, generator=generator)).Q
    gram = (q * values) @ q.mH
    return (gram + gram.mH) / 2


def lacks(gram: torch.Tensor, columns: torch.Tensor, values: torch.Tensor) -> float:
    """How much less these columns hold than the best ones, over what even those discard or, if that is nothing, the whole."""
    best, held = values.sort().values[-columns.shape[1] :].sum(), (columns.mH @ gram @ columns).diagonal().real.sum()
    rounding = len(gram) * torch.finfo(torch.float64).eps * values.sum()
    return max(0.0, (best - held - rounding).item()) / ((values.sum() - best).item() or values.sum().item())


@pytest.mark.no_cover
@DTYPES
@pytest.mark.parametrize("name", KNOWN)
def test_what_lanczos_finds_holds_as_much_as_the_best(name, dtype, monkeypatch):
    gram = with_values(KNOWN[name], dtype)
    monkeypatch.setattr(torch.linalg, "eigh", only_small(torch.linalg.eigh))  # found without all eigenvectors
    columns = leading(gram, RANK)
    assert (columns.mH @ columns - torch.eye(RANK)).norm() < 1e-12
    assert lacks(gram, columns, KNOWN[name]) <= TOLERANCE
    energies = (columns.mH @ gram @ columns).diagonal().real
    assert (energies.diff() < 1e-12).all()  # the largest first


def only_small(eigh):
    def checked(matrix):
        assert len(matrix) <= N // 2
        return eigh(matrix)

    return checked


def test_values_down_to_1e_16_are_found_to_the_rounding_of_the_largest():
    values = KNOWN["down to 1e-8 as singular values"]
    gram = with_values(values)
    columns = leading(gram, RANK)
    energies = (columns.mH @ gram @ columns).diagonal()
    floor = N * torch.finfo(torch.float64).eps
    assert (energies - values[:RANK]).abs().max() < floor
    alone = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :RANK]  # no worse than all eigenvectors
    left, least = (torch.trace(gram - c @ (c.mH @ gram)) for c in (columns, alone))
    assert left <= least + RANK * floor


@DTYPES
def test_a_flat_spectrum_is_given_up_and_solved_whole(dtype):
    gram = with_values(FLAT, dtype)
    assert by_lanczos(gram, RANK) is None
    assert lacks(gram, leading(gram, RANK), FLAT) <= TOLERANCE
    generator = torch.Generator().manual_seed(0)  # controls: a random range finder, plain and with one power iteration
    plain = torch.linalg.qr(gram @ torch.randn(N, RANK, dtype=dtype, generator=generator)).Q
    power = torch.linalg.qr(gram @ plain).Q
    assert lacks(gram, plain, FLAT) > lacks(gram, power, FLAT) > 1e4 * TOLERANCE


@DTYPES
def test_a_missed_eigenvalue_is_noticed(dtype, monkeypatch):
    """Of a hundred equal ones 48 found and 12 of the next ones in place of the others: no residual tells of that."""
    values = torch.tensor([1.0, 0.5], dtype=torch.float64).repeat_interleave(N // 2)
    gram, slack = with_values(values, dtype), torch.tensor(1e-9)
    both = torch.linalg.eigh(gram).eigenvectors  # the halves first
    missed, whole = torch.cat([both[:, :12], both[:, -48:]], dim=1), both[:, -RANK:]
    theta = torch.tensor([0.5] * 12 + [1.0] * 48, dtype=torch.float64)
    assert (gram @ missed - missed * theta).norm() < 1e-12 and lacks(gram, missed, values) > 1e-2
    assert not module._nothing_missed(gram, missed, theta, slack)
    assert module._nothing_missed(gram, whole, torch.ones_like(theta), slack)  # control
    monkeypatch.setattr(module, "by_lanczos", lambda *_: (missed, theta, slack))
    assert lacks(gram, leading(gram, RANK), values) <= TOLERANCE


def test_one_missed_eigenvalue_between_the_least_two_is_noticed():
    """0.7 was passed over, with 0.5 found in its place: the least value found is the measure, not the next."""
    values = torch.zeros(N, dtype=torch.float64)
    values[:4] = torch.tensor([0.5, 0.7, 0.9, 1.0])
    unit, slack = torch.eye(N, dtype=torch.float64), torch.tensor(1e-9)
    assert not module._nothing_missed(values.diag(), unit[:, [0, 2, 3]], values[[0, 2, 3]], slack)
    assert module._nothing_missed(values.diag(), unit[:, [1, 2, 3]], values[[1, 2, 3]], slack)  # control


@pytest.mark.parametrize("name", ["half a plateau", "fewer than are kept"])
def test_the_slack_is_a_millionth_of_what_is_discarded_and_the_rounding(name):
    values, gram = KNOWN[name], with_values(KNOWN[name])
    _, theta, slack = by_lanczos(gram, RANK)
    rounding = 4 * N * torch.finfo(torch.float64).eps * RANK * values.max()
    allowed = TOLERANCE * (values.sum() - theta.sum()).clamp(min=0) + rounding
    passed_over = (theta[0] + 2 * slack - theta).clamp(min=0).sum()
    assert abs(2 * passed_over / allowed - 1) < 1e-3


@pytest.mark.parametrize("allowed", [1e-3, 0.1, 1.0, 100.0])
def test_the_slack_counts_only_values_that_are_so_near(allowed):
    values = torch.tensor([0.5, 0.5, 0.52, 0.7, 3.0], dtype=torch.float64)
    slack = module.slack_of(values, torch.tensor(allowed, dtype=torch.float64))
    assert abs((0.5 + 2 * slack - values).clamp(min=0).sum() - allowed) < 1e-14 * (1 + allowed)
    assert slack > 1.5 * allowed / (2 * len(values)) or allowed == 100.0  # control: if all values counted whole


@pytest.mark.parametrize("base, rank", [(0.9762, 8), (0.9768, 8)])
def test_the_first_look_with_small_residuals_ends_the_search(base, rank, monkeypatch):
    """The residuals of each look are computed anew from what is held; two spectra are a little above the bound and below it."""
    gram, eigh, orthonormal = (
        with_values(base ** torch.arange(512, dtype=torch.float64)),
        torch.linalg.eigh,
        module._orthonormal,
    )
    helds, shares = [], []

    def looked(matrix):
        values, vectors = (x[..., -rank:] for x in eigh(helds[-1] @ gram @ helds[-1].T))
        columns = helds[-1].T @ vectors
        rounding = 4 * 512 * torch.finfo(torch.float64).eps * rank * values.max()
        half = (TOLERANCE * (gram.trace() - values.sum()) + rounding) / 2
        shares.append((gram @ columns - columns * values).norm() / (half * module.slack_of(values, half)) ** 0.5)
        return eigh(matrix)

    monkeypatch.setattr(module, "_orthonormal", lambda rows, held: helds.append(held) or orthonormal(rows, held))
    monkeypatch.setattr(torch.linalg, "eigh", looked)
    assert by_lanczos(gram, rank) is not None
    assert shares[-1] <= 1 and all(share > 1 for share in shares[:-1])
    assert any(1 < share < 1.2 or 0.8 < share <= 1 for share in shares)  # control: another bound ends it elsewhere


def test_the_search_is_the_same_each_time_and_draws_nothing_from_the_callers_generator():
    gram = with_values(KNOWN["half a plateau"])
    torch.manual_seed(3)
    first, drawn = by_lanczos(gram, RANK)[0], torch.rand(1)
    assert torch.equal(first, by_lanczos(gram, RANK)[0])
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_columns_that_are_not_orthonormal_prove_nothing():
    gram = with_values(KNOWN["half a plateau"])
    columns, values, slack = by_lanczos(gram, RANK)
    assert module._nothing_missed(gram, columns, values, slack)
    assert not module._nothing_missed(gram, columns * (1 + 1e-9), values, slack)
    assert not module._nothing_missed(gram, columns, values * 0.1, slack)  # values that are too small leave more than the least


def test_zeros_have_leading_vectors_too():
    gram = torch.zeros(N, N, dtype=torch.float64)
    columns = leading(gram, 3)
    assert torch.equal(columns.T @ columns, torch.eye(3, dtype=torch.float64))
    assert by_lanczos(gram, 3) is not None  # residuals of zero are no larger than a slack of zero


@pytest.mark.parametrize("n, rank, searched", [(511, 8, False), (512, 8, True), (N, N // 8 + 1, False), (N, N // 8, True)])
def test_small_matrices_and_large_ranks_are_solved_whole(n, rank, searched, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "by_lanczos", lambda *_: asked.append(rank))  # and finds nothing
    assert leading(torch.eye(n, dtype=torch.float64), rank).shape == (n, rank)
    assert len(asked) == searched


@DTYPES
def test_what_is_kept_does_not_hold_all_eigenvectors_in_memory(dtype):
    gram = with_values(FLAT[:40], dtype)
    kept, whole = leading(gram, 3), torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :3]
    assert torch.equal(kept, whole)
    assert kept.untyped_storage().nbytes() == 40 * 3 * dtype.itemsize
    assert whole.untyped_storage().nbytes() == 40 * 40 * dtype.itemsize  # control


@pytest.mark.no_cover
def test_a_layer_compressed_either_way_is_the_same_layer(monkeypatch):
    torch.manual_seed(0)
    layer = MultiHeadAttention(512, 8).double()
    with torch.no_grad():
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj):
            projection.weight.mul_(torch.logspace(0, -3, 512)[:, None])
    looked = []
    monkeypatch.setattr(module, "by_lanczos", lambda *a: looked.append(by_lanczos(*a)) or looked[-1])
    ours = compress(layer, (8, 32, 32))
    assert len(looked) == 4 and all(found is not None for found in looked)
    monkeypatch.setattr(module, "SMALLEST", 513)
    exact = compress(layer, (8, 32, 32))
    assert len(looked) == 4
    for weights, reference, tensor in zip((ours.pre, ours.post), (exact.pre, exact.post), both_tensors(layer)):
        mine, best = ((tensor - w.to_tensor()).square().sum() for w in (weights, reference))
        assert mine <= (1 + 3 * TOLERANCE) * best
        fewer = compress(layer, (8, 31, 32))  # control
        assert (tensor - fewer.pre.to_tensor()).square().sum() > (1 + 3 * TOLERANCE) * best


def both_tensors(layer):
    tucker = as_tucker(layer)
    return tucker.pre.to_tensor(), tucker.post.to_tensor()


def test_a_block_of_zeros_is_tried_twice_and_then_left_to_the_proof(monkeypatch):
    """QR makes unit vectors of zeros; these may be held already, and rounding that would lead elsewhere is not there."""
    tried, qr = [], torch.linalg.qr
    monkeypatch.setattr(torch.linalg, "qr", lambda matrix: tried.append(matrix) or qr(matrix))
    held = torch.eye(N, dtype=torch.float64)[: module.BLOCK]
    block, coupling = module._orthonormal(torch.zeros_like(held), held)
    assert not coupling.any() and (block @ held.T).abs().max() > 0.5 and len(tried) == 3
    tried.clear()
    block, _ = module._orthonormal(held.roll(module.BLOCK, dims=1) + held, held)  # control: something is new
    assert (block @ held.T).abs().max() < 1e-15 and len(tried) == 2


def test_the_last_look_is_at_half_of_all_dimensions():
    """A search that is not done a little before the end is looked at once more, there."""
    gram, sizes, eigh = with_values(0.9888 ** torch.arange(512, dtype=torch.float64)), [], torch.linalg.eigh
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", lambda matrix: sizes.append(len(matrix)) or eigh(matrix))
        assert by_lanczos(gram, 32) is not None
    assert sizes[0] == 2 * 32  # the first look: as many again as are wanted
    assert sizes == [64, 80, 112, 144, 192, 240, 256]  # each at the first block beyond a quarter more, but for the last
