"""Rung 12: spectra and compression from the factored form, against the dense tensors that it never builds."""

import math

import numpy as np
import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, tokens, wide_awake
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reproduce.exactness import cells, error
from tucker_ref import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    as_tucker,
    compress,
    energy_rank,
    entropy_rank,
    hooi,
    hosvd,
    spectra,
    sthosvd,
    unfold,
)
from tucker_ref.compress import METHODS, squared_error, subspaces
from tucker_ref.ranks import factored_tensors

CELLS = {cell.name: cell for cell in cells() if not cell.norm and not cell.absorb}
PLAIN = {name: cell for name, cell in CELLS.items() if cell.rotary == "none"}
EVERY = pytest.mark.parametrize("name", CELLS)


def full_ranks(layer):
    return tuple((len(s.head), len(s.rows), len(s.columns)) for s in spectra(layer))


def dense(layer):
    tucker = as_tucker(layer)
    return tucker.pre.numpy().to_tensor(), tucker.post.numpy().to_tensor()


@pytest.mark.parametrize("method", METHODS)
@EVERY
def test_full_rank_is_exact_in_output_and_gradient(name, method):
    layer = CELLS[name].build()
    pre, post = full_ranks(layer)
    for mask in ("causal", "arbitrary"):
        assert error(layer, compress(layer, pre, post, method=method), mask, "whole sequence") < EXACT
    fewer = (pre[0], min(pre[1], pre[0] * (pre[2] - 2)), pre[2] - 2)  # control: one channel pair less
    assert error(layer, compress(layer, fewer, post, method=method), "causal", "whole sequence") > DIFFERENT


@EVERY
def test_errors_obey_the_bounds_at_every_rank_of_a_sweep(name):
    layer = CELLS[name].build()
    for tensor, spectrum in zip(factored_tensors(layer), spectra(layer)):
        assert tensor.squared_norm() == pytest.approx((spectrum.rows**2).sum().item(), rel=1e-10)
        n_heads, n_rows, n_columns = len(spectrum.head), len(spectrum.rows), len(spectrum.columns)
        previous = math.inf
        for share in (0.3, 0.5, 0.8, 1.0):
            ranks = (math.ceil(share * n_heads), math.ceil(share * n_rows), 2 * math.ceil(share * n_columns / 2))
            ranks = (ranks[0], min(ranks[1], ranks[0] * ranks[2]), ranks[2])
            plain, sequential, refitted = (squared_error(tensor, subspaces(tensor, ranks, method)) for method in METHODS)
            tails = spectrum.tails(ranks)
            slack = 1e-12 * tensor.squared_norm()
            for measured in (plain, sequential, refitted):
                assert tails.max() - slack <= measured <= tails.sum() + slack
            assert refitted <= plain + slack and plain <= previous + slack
            previous = plain


@pytest.mark.parametrize("name", PLAIN)
def test_it_is_the_decomposition_of_the_dense_tensor(name):
    layer = PLAIN[name].build()
    ranks = (3, 6, 4)
    for method, reference in zip(METHODS, (hosvd, sthosvd, hooi)):
        compressed = compress(layer, ranks, method=method)
        for weights, tensor, original in zip((compressed.pre, compressed.post), factored_tensors(layer), dense(layer)):
            assert weights.numpy().ranks == ranks
            ours = np.linalg.norm(original - weights.numpy().to_tensor())
            assert ours**2 == pytest.approx(squared_error(tensor, subspaces(tensor, ranks, method)), rel=1e-10)
            if method == "hosvd":
                assert relative_error(weights.numpy().to_tensor(), reference(original, ranks).to_tensor()) < 1e-8
            elif method == "hooi":  # a local optimum each
                assert ours == pytest.approx(np.linalg.norm(original - reference(original, ranks).to_tensor()), rel=1e-2)


@pytest.mark.parametrize("name", PLAIN)
def test_spectra_are_those_of_the_dense_unfoldings(name):
    layer = PLAIN[name].build()
    for spectrum, tensor in zip(spectra(layer), dense(layer)):
        for mode, ours in enumerate((spectrum.head, spectrum.rows, spectrum.columns)):
            theirs = np.linalg.svd(unfold(tensor, mode), compute_uv=False)[: len(ours)]
            assert np.abs(ours[: len(theirs)].numpy() - theirs).max() < 1e-7 * theirs[0]  # a Gram matrix halves the digits


def low_rank_(linear: nn.Linear, rank: int) -> None:
    """Overwrite a projection by a product of this rank."""
    out, width = linear.weight.shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((out, rank), (rank, width)))
    with torch.no_grad():
        linear.weight.copy_(a @ b)


def test_a_rank_deficient_layer_is_found_out():
    layer = wide_awake(MultiHeadAttention(24, 6))
    assert [s.ranks() for s in spectra(layer)] == [(6, 24, 24), (6, 24, 24)]
    low_rank_(layer.q_proj, 7)
    low_rank_(layer.v_proj, 5)
    with torch.no_grad():  # heads 4 and 5 repeat heads 0 and 1, before and after the softmax
        for projection in (layer.q_proj, layer.k_proj, layer.v_proj):
            projection.weight[16:] = projection.weight[:8]
        layer.o_proj.weight[:, 16:] = layer.o_proj.weight[:, :8]
    assert [s.ranks() for s in spectra(layer)] == [(4, 7, 16), (4, 16, 5)]
    compressed = compress(layer, (4, 7, 16), (4, 16, 5))
    assert error(layer, compressed, "causal", "whole sequence") < EXACT
    assert error(layer, compress(layer, (3, 7, 16), (4, 16, 5)), "causal", "whole sequence") > DIFFERENT  # control


def test_under_rope_keys_that_are_turned_copies_of_each_other_are_found_out():
    """Group 1's keys are group 0's, every pair turned by an angle of its own: one complex rank per frequency, not two."""
    layer = wide_awake(GroupedQueryAttention(24, 6, 2, rotary=Rotary.heads(4)))
    assert spectra(layer)[0].ranks()[2] == 8
    with torch.no_grad():
        pairs = torch.complex(layer.k_proj.weight[[0, 1]], layer.k_proj.weight[[2, 3]])  # (2, d)
        turned = pairs * torch.exp(1j * torch.tensor([[0.3], [1.1]], dtype=torch.float64))
        layer.k_proj.weight[4:] = torch.cat([turned.real, turned.imag])
    assert spectra(layer)[0].ranks()[2] == 4
    pre, post = full_ranks(layer)
    compressed = compress(layer, (pre[0], pre[1], 4), post)
    assert compressed.rotary.width == 4 and sorted(compressed.rotary.frequencies.tolist()) == sorted(
        layer.rotary.frequencies.tolist()
    )
    assert error(layer, compressed, "causal", "whole sequence") < EXACT
    with torch.no_grad():  # control: turned by another angle in every row is no turned copy
        layer.k_proj.weight[4:] += 0.1
    assert spectra(layer)[0].ranks()[2] == 8


def test_a_tucker_layer_compresses_to_itself_at_its_own_ranks():
    layer = wide_awake(TuckerAttention(24, 6, (4, 9, 8), (3, 7, 5), rotary=Rotary.latent(8), bias=True))
    assert error(layer, compress(layer, (4, 9, 8), (3, 7, 5)), "padded", "whole sequence") < EXACT


def test_no_array_of_the_size_of_the_tensor_is_ever_made():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    Largest.size = max(Largest.size, tensor.untyped_storage().nbytes())
            return result

    n_heads, d = 16, 128
    layer = MultiHeadAttention(d, n_heads, rotary=Rotary.heads(8))
    for method in METHODS:
        with Largest():
            compress(layer, (4, 16, 16), method=method)
            spectra(layer)
    assert 0 < Largest.size <= n_heads * d * d * 8 / 4  # bytes, a quarter of the tensor in float64
    with Largest():  # control: the tensor itself would have been seen
        torch.ones(n_heads, d, d, dtype=torch.float64)
    assert Largest.size == n_heads * d * d * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_layer_are_left_as_they_are(dtype):
    layer = MultiHeadLatentAttention(24, 3, 10, 8).to(dtype)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    compressed = compress(layer, (3, 6, 4))
    assert {p.dtype for p in compressed.parameters()} == {dtype}
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert compressed(tokens(2, 5, 24).to(dtype)).shape == (2, 5, 24)


def test_effective_ranks_of_known_spectra():
    flat, single = torch.ones(7, dtype=torch.float64), torch.tensor([3.0, 0, 0], dtype=torch.float64)
    assert entropy_rank(flat) == pytest.approx(7) and entropy_rank(single) == pytest.approx(1)
    assert energy_rank(flat, 0.99) == 7 and energy_rank(flat, 0.5) == 4 and energy_rank(single) == 1
    assert energy_rank(torch.tensor([10.0, 1.0, 0.1]), 0.99) == 1 and energy_rank(torch.tensor([10.0, 1.1, 0.1]), 0.99) == 2


@pytest.mark.parametrize(
    "make, arguments, message",
    [
        (lambda: MultiHeadAttention(24, 6), dict(ranks=(7, 24, 24)), r"ranks\[0\] is 7.*at most 6"),
        (lambda: GroupedQueryAttention(24, 6, 2), dict(ranks=(6, 24, 9)), r"ranks\[2\] is 9.*at most 8"),
        (lambda: MultiHeadAttention(24, 6), dict(ranks=(6, 24, 24), post_ranks=(6, 25, 24)), r"post_ranks\[1\] is 25"),
        (
            lambda: MultiHeadAttention(24, 6, rotary=Rotary.heads(4)),
            dict(ranks=(6, 8, 7)),
            r"ranks\[2\] is 7; under rotary.*even",
        ),
        (lambda: MultiHeadAttention(24, 6), dict(ranks=(3, 4, 4), method="svd"), "method is 'svd'.*hosvd, sthosvd, hooi"),
        (lambda: MultiHeadLatentAttention(24, 3, 6, 5, latent_norm=True), dict(ranks=(3, 4, 4)), "latent_norm=True"),
        (lambda: nn.Linear(3, 3), dict(ranks=(1, 1, 1)), "layer is Linear"),
    ],
)
def test_bad_arguments_are_named(make, arguments, message):
    with pytest.raises(ValueError, match=message):
        compress(make(), **arguments)
