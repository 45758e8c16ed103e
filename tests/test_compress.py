"""Rung 12: spectra and compression from the factored form, against the dense tensors that it never builds."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, tokens, with_large_weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reproduce.experiments.exactness import cells, error
from tucker_ref import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    as_tucker,
    choose_ranks,
    compress,
    energy_rank,
    entropy_rank,
    hooi,
    hosvd,
    relative_errors,
    second_moment,
    spectra,
    sthosvd,
    to_gqa,
    to_mla,
    unfold,
)
from tucker_ref.compression import factored_tensor, truncation
from tucker_ref.compression.factored_tensor import FARTHEST, FactoredTensor, Identity, factored_tensors, squarable
from tucker_ref.compression.model_ranks import choose_model_ranks
from tucker_ref.compression.ranks import _ranks_for
from tucker_ref.compression.rope_classes import key_classes
from tucker_ref.compression.spectra import Spectra, numerical_rank, rounding_floor
from tucker_ref.compression.truncation import METHODS

CELLS = {cell.name: cell for cell in cells() if not (cell.norm or cell.absorb or cell.qk_norm)}
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
    both = spectra(layer)
    for tensor, spectrum in zip(factored_tensors(layer), both):
        assert tensor.squared_norm() == pytest.approx((spectrum.rows**2).sum().item(), rel=1e-10)
    previous = (math.inf, math.inf)
    for share in (0.3, 0.5, 0.8, 1.0):
        ranks = []
        for spectrum in both:
            heads, rows, columns = (
                math.ceil(share * len(values)) for values in (spectrum.head, spectrum.rows, spectrum.columns)
            )
            columns += columns % 2
            ranks.append((heads, min(rows, heads * columns), columns))
        plain, sequential, refitted = (relative_errors(layer, compress(layer, *ranks, method=method)) for method in METHODS)
        for side, (spectrum, kept) in enumerate(zip(both, ranks)):
            tails = spectrum.tails(kept) / (spectrum.rows**2).sum()
            slack = 1e-12
            for measured in (plain, sequential, refitted):
                assert tails.max() - slack <= measured[side] ** 2 <= tails.sum() + slack
            assert refitted[side] ** 2 <= plain[side] ** 2 + slack and plain[side] ** 2 <= previous[side] ** 2 + slack
        previous = plain


@pytest.mark.parametrize("name", PLAIN)
def test_it_is_the_decomposition_of_the_dense_tensor(name):
    layer = PLAIN[name].build()
    ranks = (3, 6, 4)
    for method, reference in zip(METHODS, (hosvd, sthosvd, hooi)):
        compressed = compress(layer, ranks, method=method)
        measured = relative_errors(layer, compressed)
        for weights, relative, original in zip((compressed.pre, compressed.post), measured, dense(layer)):
            assert weights.numpy().ranks == ranks
            ours = np.linalg.norm(original - weights.numpy().to_tensor())
            assert ours == pytest.approx(relative * np.linalg.norm(original), rel=1e-10)
            if method == "hosvd":
                assert relative_error(weights.numpy().to_tensor(), reference(original, ranks).to_tensor()) < 1e-8
            elif method == "sthosvd":  # keys first, then queries, then heads
                backwards = reference(original.transpose(2, 1, 0), ranks[::-1]).to_tensor()
                assert relative_error(weights.numpy().to_tensor(), backwards.transpose(2, 1, 0)) < 1e-8
            elif method == "hooi":  # a local optimum each
                assert ours == pytest.approx(np.linalg.norm(original - reference(original, ranks).to_tensor()), rel=1e-2)


@pytest.mark.parametrize("name", PLAIN)
def test_spectra_are_those_of_the_dense_unfoldings(name):
    layer = PLAIN[name].build()
    for spectrum, tensor in zip(spectra(layer), dense(layer)):
        for mode, ours in enumerate((spectrum.head, spectrum.rows, spectrum.columns)):
            theirs = np.linalg.svd(unfold(tensor, mode), compute_uv=False)[: len(ours)]
            assert np.abs(ours[: len(theirs)].numpy() - theirs).max() < 1e-7 * theirs[0]  # a Gram matrix halves the digits


TURNING = {
    "MHA": lambda: MultiHeadAttention(12, 3, rotary=Rotary.heads(4)),
    "MHA, wide heads": lambda: MultiHeadAttention(6, 3, head_dim=4, rotary=Rotary.heads(4)),
    "GQA interleaved": lambda: GroupedQueryAttention(12, 6, 2, head_dim=4, rotary=Rotary.heads(4, pairing="interleaved")),
    "MLA decoupled": lambda: MultiHeadLatentAttention(12, 3, 7, 5, rope_dim=4, rotary=Rotary.heads(4)),
    "MLA coupled": lambda: MultiHeadLatentAttention(12, 3, 7, 6, rotary=Rotary.latent(6)),
}


@pytest.mark.parametrize("name", TURNING)
def test_under_rope_spectra_are_those_of_the_average_over_all_rotations(name):
    """W_h turned by one angle per frequency, formed and averaged over four angles each: exact for everything quadratic in W."""
    layer = with_large_weights(TURNING[name]())
    queries, keys = dense_queries_and_keys(layer)  # (h, d, w) each; the last layer.rotary.width of the w channels turn
    width, rotary = queries.shape[2], layer.rotary
    still = width - rotary.width
    first, second = (still + channels for channels in rotary.pairs(torch.arange(rotary.width)))
    turned = []
    for quarters in itertools.product(range(4), repeat=len(rotary.frequencies)):
        angle = torch.tensor(quarters, dtype=torch.float64) * math.pi / 2
        turn = torch.eye(width, dtype=torch.float64)
        turn[first, first] = turn[second, second] = angle.cos()
        turn[first, second], turn[second, first] = -angle.sin(), angle.sin()
        turned.append(queries @ turn @ keys.mT)
    tensors = torch.stack(turned)  # (angles, h, d, d)
    head, rows = (torch.linalg.svdvals(tensors.movedim(mode, 0).flatten(1)) / len(tensors) ** 0.5 for mode in (1, 2))
    columns = [torch.linalg.svdvals((queries[..., :still] @ keys[..., :still].mT).flatten(0, 1))]
    for a, b in zip(
        first, second
    ):  # per frequency the complex tensor, whose real part has half its energy, in two equal values
        q, k = (torch.complex(x[..., a], x[..., b]) for x in (queries, keys))  # (h, d)
        columns.append(torch.linalg.svdvals(torch.einsum("hd,he->hde", q, k.conj()).flatten(0, 1)).repeat_interleave(2) / 2)
    (ours, _), scale = spectra(layer), head[0]
    for mine, theirs in ((ours.head, head), (ours.rows, rows), (ours.columns, torch.cat(columns).sort(descending=True).values)):
        size = min(len(mine), len(theirs))
        assert (mine[:size] - theirs[:size]).abs().max() < 1e-7 * scale and theirs[size:].lt(1e-7 * scale).all()
        assert mine[size:].lt(1e-7 * scale).all()
    unturned = torch.linalg.svdvals((queries @ keys.mT).flatten(1))  # control: the tensor as it stands, at distance zero
    assert (ours.head - unturned).abs().max() > DIFFERENT * scale


def test_errors_under_rope_are_those_of_the_average_over_all_rotations():
    """A turned and an unturned tensor are orthogonal on average, so that their squared norms add up."""
    turning, still = (with_large_weights(MultiHeadAttention(12, 3, rotary=rotary)) for rotary in (Rotary.heads(4), None))
    assert torch.equal(turning.q_proj.weight, still.q_proj.weight)
    energy, other = ((spectra(layer)[0].rows ** 2).sum().item() for layer in (turning, still))
    before, after = relative_errors(turning, still)
    assert before == pytest.approx((1 + other / energy) ** 0.5, rel=1e-10) and after < 1e-7
    assert max(relative_errors(turning, turning)) < 1e-7  # control


def dense_queries_and_keys(layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Per head the matrices that make queries and keys, straight from the projections; turning channels last, (h, d, w) each."""
    h, k = layer.n_heads, layer.head_dim
    if not isinstance(layer, MultiHeadLatentAttention):
        q, keys = (p.weight.detach().unflatten(0, (-1, k)).mT for p in (layer.q_proj, layer.k_proj))
        return q, keys.repeat_interleave(h // len(keys), dim=0)
    q = (layer.q_b_proj.weight.detach() @ layer.q_a_proj.weight.detach()).unflatten(0, (h, -1)).mT  # (h, d, k + rope)
    down, up = layer.kv_a_proj_with_mqa.weight.detach(), layer.up_projections()[0].detach()  # (t + rope, d), (h, k, t)
    if not layer.rope_dim:  # coupled: the latent itself is the key
        return q @ up, down.T.expand(h, -1, -1)
    return q, torch.cat([(up @ down[: layer.kv_rank]).mT, down[layer.kv_rank :].T.expand(h, -1, -1)], dim=2)


def low_rank_(linear: nn.Linear, rank: int) -> None:
    """Overwrite a projection by a product of this rank."""
    out, width = linear.weight.shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((out, rank), (rank, width)))
    with torch.no_grad():
        linear.weight.copy_(a @ b)


def test_a_rank_deficient_layer_is_found_out():
    layer = with_large_weights(MultiHeadAttention(24, 6))
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
    layer = with_large_weights(GroupedQueryAttention(24, 6, 2, rotary=Rotary.heads(4)))
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
    layer = with_large_weights(TuckerAttention(24, 6, (4, 9, 8), (3, 7, 5), rotary=Rotary.latent(8), bias=True))
    assert error(layer, compress(layer, (4, 9, 8), (3, 7, 5)), "padded", "whole sequence") < EXACT


def test_an_odd_unturned_part_is_filled_up_with_a_channel_of_zeros():
    """Seven latent channels that do not turn, four that do: the latent has twelve, and the layer is the same."""
    layer = with_large_weights(MultiHeadLatentAttention(24, 3, 10, 7, rope_dim=4, rotary=Rotary.heads(4)))
    query = full_ranks(layer)[0][1]
    compressed, smaller = (compress(layer, (3, query, key), (3, 21, 7)) for key in (12, 10))
    assert compressed.rotary.width == 12 and compressed.rotary.frequencies.count_nonzero() == 2
    assert error(layer, compressed, "causal", "whole sequence") < EXACT
    assert error(layer, smaller, "causal", "whole sequence") > 0.01  # control: one pair less


def test_an_odd_number_of_value_channels_beside_turning_keys_is_filled_up_too():
    """Nine channels of values, twelve of keys in pairs: a shared latent of twenty-two holds them all."""
    layer = with_large_weights(MultiHeadAttention(9, 3, head_dim=4, rotary=Rotary.heads(4)))
    compressed, smaller = (compress(layer, (3, 9, key), (3, 9, key), shared_kv=True) for key in (22, 10))
    assert compressed.rotary.width == 22 and compressed.pre.key.shape == (9, 22)
    assert compressed.rotary.frequencies.count_nonzero() == 6 and not compressed.rotary.frequencies[:5].any()
    assert not compressed.pre.key[:, 9].any()  # the channel of zeros, after the nine
    x = tokens(2, 7, 9)
    assert relative_error(compressed(x), layer(x)) < EXACT
    assert relative_error(smaller(x), layer(x)) > 0.01  # control: fewer channels than the keys alone have


def correlated(batch: int, n_tokens: int, seed: int, width: int = 24) -> torch.Tensor:
    """Tokens that mostly lie in a few directions, with an offset, as the inputs of trained layers do."""
    mixing = torch.linalg.qr(tokens(1, width, width, seed=77)[0]).Q * 0.75 ** torch.arange(width)
    return 3 * (tokens(batch, n_tokens, width, seed) + 0.3) @ mixing.T


def errors_on(layer, compressed, x) -> tuple[float, float]:
    """Relative errors of logits, x~ W_h x~^T, and of values sent to the output, W~_h x~, over all tokens of x."""
    flat = x.flatten(0, 1)
    if as_tucker(layer).bias:
        flat = torch.cat([flat, torch.ones(len(flat), 1, dtype=flat.dtype)], dim=1)
    pairs = []
    for a, b in ((layer, compressed), (layer, layer)):
        exact, ours = as_tucker(a), as_tucker(b)
        pairs.append((
            torch.einsum("nd,hde,me->hnm", flat, ours.pre.to_tensor() - (0 if a is b else exact.pre.to_tensor()), flat).norm(),
            torch.einsum("hde,me->hmd", ours.post.to_tensor() - (0 if a is b else exact.post.to_tensor()), flat).norm(),
        ))  # fmt: skip
    (logits, outputs), (all_logits, all_outputs) = pairs
    return (logits / all_logits).item(), (outputs / all_outputs).item()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PLAIN)
def test_knowing_the_inputs_lowers_the_error_on_them(name, method):
    layer = PLAIN[name].build()
    moment = second_moment(layer, correlated(8, 200, seed=0))
    unseen = correlated(2, 30, seed=5)
    for ranks in ((4, 8, 4), (3, 5, 3)):
        plain, aware = (compress(layer, ranks, method=method, moment=m) for m in (None, moment))
        for ours, theirs in zip(errors_on(layer, aware, unseen), errors_on(layer, plain, unseen)):
            assert ours < theirs
    # Control: on inputs that are equally spread the knowledge is wrong, and costs.
    spread = tokens(2, 30, 24, seed=9)
    assert sum(errors_on(layer, aware, spread)) > sum(errors_on(layer, plain, spread))


@pytest.mark.parametrize("name", PLAIN)
def test_relative_errors_on_inputs_are_those_of_logits_and_outputs(name):
    layer, x = PLAIN[name].build(), correlated(2, 30, seed=5)
    compressed = compress(layer, (4, 8, 4))
    measured = relative_errors(layer, compressed, second_moment(layer, x, damping=0.0))
    assert measured == pytest.approx(errors_on(layer, compressed, x), rel=1e-9)
    assert max(abs(a - b) for a, b in zip(measured, relative_errors(layer, compressed))) > DIFFERENT  # control


@EVERY
def test_knowing_the_inputs_changes_nothing_at_full_rank(name):
    layer = CELLS[name].build()
    pre, post = full_ranks(layer)
    moment = second_moment(layer, correlated(4, 100, seed=0))
    assert error(layer, compress(layer, pre, post, moment=moment), "causal", "whole sequence") < 1e-10  # its root costs digits


@EVERY
def test_what_channels_are_measured_in_counts_for_nothing_where_inputs_are_known(name):
    """Inputs times A, and weights that read them over A, have the spectra that they had."""
    layer, scales = CELLS[name].build(), torch.logspace(-0.5, 0.5, 24, dtype=torch.float64)
    layer = as_tucker(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for factor in {other.pre.query, other.pre.key, other.post.value}:
            factor[:24].div_(scales[:, None])
    x = correlated(4, 100, seed=0)
    ours, theirs = (spectra(one, second_moment(one, inputs)) for one, inputs in ((layer, x), (other, x * scales)))
    blind, control = spectra(layer), spectra(other)
    for n in range(2):
        for mode in ("head", "rows", "columns"):
            assert (
                relative_error(getattr(theirs[n], mode), getattr(ours[n], mode)) < 1e-4
            )  # damping is a share of other squares
            assert relative_error(getattr(control[n], mode), getattr(blind[n], mode)) > 1e-2


@pytest.mark.parametrize(
    "make, kind",
    [(lambda x: x.to(torch.complex64), "torch.complex64"), (lambda x: x.tolist(), "list"), (lambda x: x.numpy(), "ndarray")],
)
def test_a_moment_is_one_of_real_numbers(make, kind):
    layer, x = MultiHeadAttention(24, 4), torch.randn(50, 24)
    for real in (x, x.half(), (9 * x).long(), x > 0):  # control
        assert second_moment(layer, real).dtype == torch.float64
    with pytest.raises(ValueError, match=f"x is {kind}; it must be a tensor of real numbers"):
        second_moment(layer, make(x))


def test_damping_is_a_share_of_the_mean_square():
    layer, x = MultiHeadAttention(24, 6), correlated(2, 30, seed=5)
    plain, damped = (second_moment(layer, x, damping=damping) for damping in (0.0, 0.5))
    assert relative_error(damped - plain, 0.5 * plain.diagonal().mean() * torch.eye(24, dtype=torch.float64)) < EXACT


def test_spread_inputs_are_the_plain_case():
    layer = with_large_weights(MultiHeadAttention(24, 6))
    plain, aware = compress(layer, (4, 8, 6)), compress(layer, (4, 8, 6), moment=2.0 * torch.eye(24, dtype=torch.float64))
    assert relative_error(aware.pre.to_tensor(), plain.pre.to_tensor()) < 1e-10


@EVERY
def test_ranks_can_be_chosen_by_error(name):
    layer = CELLS[name].build()
    assert choose_ranks(layer, relative_error=0.0) is not None
    previous = None
    for bound in (0.6, 0.3, 0.1, 0.01):
        pre, post = choose_ranks(layer, relative_error=bound)
        assert max(relative_errors(layer, compress(layer, pre, post, method="sthosvd"))) <= bound
        assert previous is None or all(a >= b for a, b in zip(pre + post, previous))
        previous = pre + post
    assert previous > choose_ranks(layer, relative_error=0.6)[0]  # control: a tighter bound takes larger ranks


def by_hand(head, rows, columns, error=0.0, even=False):
    return _ranks_for(Spectra(*(torch.tensor(values, dtype=torch.float64) for values in (head, rows, columns))), error, even)


@pytest.mark.parametrize(
    "spectrum, options, ranks",
    [
        (([2, 1, 0], [2, 1, 0, 0], [2, 1, 0, 0]), {}, (2, 2, 2)),  # zeros are never kept
        (([2, 1, 0], [2, 1, 0, 0], [2, 1, 0, 0]), {"error": 0.7**0.5}, (1, 1, 1)),  # 1 <= 0.7 / 3 * 5
        (([2, 1, 0], [2, 1, 0, 0], [2, 1, 0, 0]), {"error": 0.5**0.5}, (2, 2, 2)),
        (([2, 1, 0], [2, 1, 0, 0], [2, 1, 0, 0]), {"error": 9.0}, (1, 1, 1)),  # one is the least
        (([3, 0, 0], [1, 2, 2], [2, 2, 1]), {}, (1, 3, 3)),
        (([1, 1, 1], [3**0.5, 0], [3**0.5, 0]), {}, (1, 1, 1)),  # within the product of the others, each mode
        (([3**0.5, 0], [1, 1, 1], [3**0.5, 0]), {}, (1, 1, 1)),
        (([3**0.5, 0], [3**0.5, 0], [1, 1, 1]), {}, (1, 1, 1)),
        (([3**0.5, 0], [3**0.5, 0], [1, 1, 1]), {"even": True}, (1, 1, 4)),  # pairs, which nothing bounds
        (([1, 1, 1], [3**0.5, 0], [3**0.5, 0]), {"even": True}, (2, 1, 2)),  # they bound the others
        (([3**0.5, 0], [1, 1, 1], [3**0.5, 0]), {"even": True}, (1, 2, 2)),
        # What may be discarded is 1/2 of 3. Where one rank is beyond the product of the others, the mode that discards most grows.
        (([1, 1, 1], [3**0.5, 0], [2.6**0.5, *4 * [0.1**0.5]]), {"error": 0.5**0.5, "even": True}, (3, 1, 4)),
        (([1, 1, 1], [3**0.5, 0], [2.6**0.5, *4 * [0.1**0.5]]), {"error": 0.5**0.5}, (3, 1, 3)),
        (([2.8**0.5, 0.1**0.5, 0.1**0.5], [1, 1, 1], [3**0.5, 0]), {"error": 0.5**0.5, "even": True}, (2, 3, 2)),
    ],
)
def test_ranks_for_an_error_are_the_least_that_keep_it(spectrum, options, ranks):
    assert by_hand(*spectrum, **options) == ranks


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("error", [0.05, 0.2, 0.5, 0.8, 1.2])
def test_a_budget_that_ranks_just_fill_gives_those_ranks(error, bias):
    layer = with_large_weights(MultiHeadAttention(24, 6, bias=bias))
    ranks = choose_ranks(layer, relative_error=error)
    size, cache = sum(p.numel() for p in compress(layer, *ranks).parameters()), ranks[0][2] + ranks[1][2]
    assert choose_ranks(layer, max_parameters=size) == ranks
    assert sum(p.numel() for p in compress(layer, *choose_ranks(layer, max_parameters=size - 1)).parameters()) < size
    pre, post = choose_ranks(layer, max_cache=cache)
    assert pre[2] + post[2] == cache and all(a >= b for a, b in zip(pre + post, ranks[0] + ranks[1]))


def test_a_budget_takes_the_smallest_error_that_fits():
    layer, errors = with_large_weights(MultiHeadAttention(24, 6)), [0.0]
    with torch.no_grad():  # both tensors are almost the same one: their ranks change at almost the same errors
        layer.v_proj.weight.copy_(layer.k_proj.weight * (1 + 1e-6 * torch.randn(24, 24)))
        layer.o_proj.weight.copy_(layer.q_proj.weight.T)
    for spectrum in spectra(layer):  # ranks change where a third of the squared error allowed passes a tail
        for values in (spectrum.head, spectrum.rows, spectrum.columns):
            tails = (values**2).flip(0).cumsum(0) / (spectrum.rows**2).sum()
            errors += (3 * tails).sqrt().mul(1 + 1e-12).tolist()
    choices = [choose_ranks(layer, relative_error=error) for error in sorted(errors)]
    sizes = [sum(p.numel() for p in TuckerAttention(24, 6, *ranks).parameters()) for ranks in choices]
    assert len(set(sizes)) > 40  # control: budgets of many kinds
    for budget in sizes:
        assert choose_ranks(layer, max_parameters=budget) == choices[next(n for n, size in enumerate(sizes) if size <= budget)]


def test_the_least_budget_is_one_channel_each():
    layer = with_large_weights(
        MultiHeadAttention(24, 6)
    )  # spectra so flat that no smaller error than the largest cuts all but one
    assert choose_ranks(layer, max_cache=2) == ((1, 1, 1), (1, 1, 1))
    with pytest.raises(ValueError, match="max_cache = 1: even the smallest ranks"):
        choose_ranks(layer, max_cache=1)


def test_ranks_that_know_the_inputs_keep_the_error_on_them():
    layer = with_large_weights(MultiHeadAttention(24, 6))
    moment = second_moment(layer, correlated(8, 200, seed=0))
    for chosen in ({"relative_error": 0.3}, {"max_parameters": 1500}):
        plain, aware = (choose_ranks(layer, **chosen, moment=m) for m in (None, moment))
        assert plain != aware
    pre, post = choose_ranks(layer, relative_error=0.3, moment=moment)
    assert max(relative_errors(layer, compress(layer, pre, post, moment=moment), moment)) <= 0.3


def span(columns: torch.Tensor) -> torch.Tensor:
    """The projector on what these columns span: the same for every basis of it."""
    q, _ = torch.linalg.qr(columns.detach().double())
    return q @ q.T


def leading_span(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    return span(torch.linalg.svd(matrix, full_matrices=False).U[:, :rank])


@pytest.mark.parametrize("aware", [False, True])
def test_a_shared_latent_holds_what_leads_in_both_tensors(aware):
    """Of the key unfolding of W and the value unfolding of W~, each over its norm, side by side."""
    layer = with_large_weights(MultiHeadAttention(12, 3))
    with torch.no_grad():
        layer.v_proj.weight.mul_(7)  # norms of their own
    moment = second_moment(layer, correlated(8, 200, seed=0, width=12)) if aware else None
    root = torch.linalg.cholesky(moment).mT if aware else torch.eye(12, dtype=torch.float64)
    pre, post = (torch.from_numpy(tensor) for tensor in dense(layer))  # (h, d, d) each: queries x keys, outputs x values
    whitened = torch.einsum("ds,hst,et->hde", root, pre, root), torch.einsum("hst,et->hse", post, root)
    both = torch.cat([t.flatten(0, 1).T / t.norm() for t in whitened], dim=1)  # (d, 2 h d)
    ranks, post_ranks = (2, 5, 4), (2, 3, 4)
    small = compress(layer, ranks, post_ranks, shared_kv=True, moment=moment)
    assert small.post.value is small.pre.key
    latent = root @ small.pre.key.detach().double()
    assert relative_error(span(latent), leading_span(both, 4)) < 1e-6
    # HOSVD: each mode for itself, of the whole tensor before the softmax ...
    assert relative_error(span(small.pre.head), leading_span(whitened[0].flatten(1), 2)) < 1e-6
    assert relative_error(span(root @ small.pre.query), leading_span(whitened[0].transpose(0, 1).flatten(1), 5)) < 1e-6
    # ... and of what the latent holds of the values after it.
    read = whitened[1] @ span(latent)
    assert relative_error(span(small.post.output), leading_span(read.transpose(0, 1).flatten(1), 3)) < 1e-6
    assert relative_error(span(small.post.head), leading_span(read.flatten(1), 2)) < 1e-6
    whole = compress(
        layer, (3, 12, 4), (3, 12, 4), shared_kv=True, moment=moment
    )  # nothing else is cut: read as well as can be
    assert relative_error(whole.post.to_tensor() @ root.T, read) < 1e-6


def test_a_latent_that_two_tensors_read_is_bounded_by_no_product_of_ranks():
    layer = with_large_weights(MultiHeadAttention(12, 3))
    assert compress(layer, (1, 1, 3), shared_kv=True).ranks == (1, 1, 3)
    with pytest.raises(ValueError, match="ranks"):
        compress(layer, (1, 1, 3))
    turning = with_large_weights(MultiHeadAttention(12, 3, rotary=Rotary.heads(4)))
    assert compress(turning, (1, 1, 4), (1, 2, 2)).ranks == (1, 1, 4)
    with pytest.raises(ValueError, match=r"^ranks\[2\] is 14"):
        compress(turning, (3, 12, 14), (3, 12, 12))
    for ranks, post_ranks, named in (((4, 9, 4), (2, 4, 4), "ranks"), ((2, 4, 4), (4, 4, 4), "post_ranks")):
        with pytest.raises(ValueError, match=rf"^{named}\[0\] is 4"):
            compress(layer, ranks, post_ranks, shared_kv=True)


@pytest.mark.parametrize("shared", [False, True])
def test_with_a_fresh_rotary_embedding_the_old_one_is_forgotten(shared):
    turning, still = (with_large_weights(MultiHeadAttention(12, 3, rotary=r)) for r in (Rotary.heads(4), None))
    still.load_state_dict(turning.state_dict())
    fresh = Rotary.latent(4)
    ours = compress(turning, (2, 5, 4), shared_kv=shared, rotary=fresh)
    plain = compress(still, (2, 5, 4), shared_kv=shared)
    for a, b in zip((ours.pre, ours.post), (plain.pre, plain.post)):
        assert relative_error(a.to_tensor(), b.to_tensor()) < EXACT
    assert ours.rotary is not fresh and torch.equal(ours.rotary.frequencies, fresh.frequencies)
    assert ours.rotary.frequencies.data_ptr() != fresh.frequencies.data_ptr()  # its own, to change or to move


def test_sweeps_end_when_they_gain_nothing_more(monkeypatch):
    measure, energies = truncation._energy, []
    monkeypatch.setattr(truncation, "_energy", lambda *a: energies.append(measure(*a)) or energies[-1])
    layer = with_large_weights(MultiHeadAttention(12, 3))
    counts = []
    for scale in (1.0, 1e-6):  # energies far from one
        with torch.no_grad():
            layer.q_proj.weight.mul_(scale)
        for ranks in ((3, 12, 12), (2, 5, 4), (2, 3, 3), (1, 2, 2), (3, 4, 3)):
            (tensor, _), energies[:] = factored_tensors(layer), []
            truncation.hooi(tensor, ranks)
            gains = [after - before for before, after in zip(energies, energies[1:])]
            assert all(gain > 1e-10 * before for gain, before in zip(gains[:-1], energies))
            assert gains[-1] <= 1e-10 * energies[-2] or len(gains) == 20
            counts.append(len(gains))
    assert min(counts) == 1 and max(counts) == 20  # exact at once at full rank; some never settle


@EVERY
def test_ranks_can_be_chosen_by_budget(name):
    layer = CELLS[name].build()
    for budget in (500, 1000, 2000):
        ranks = choose_ranks(layer, max_parameters=budget)
        assert sum(p.numel() for p in compress(layer, *ranks).parameters()) <= budget
    for budget in (6, 10):
        cache = compress(layer, *choose_ranks(layer, max_cache=budget)).new_cache(1, 1)
        assert sum(stream.numel() for stream in cache.streams.values()) <= budget
    everything = choose_ranks(layer, max_parameters=10**9)
    assert everything == choose_ranks(layer, relative_error=0.0)


@pytest.mark.parametrize(
    "bounds, message",
    [
        (dict(), "exactly one of relative_error, max_parameters and max_cache"),
        (dict(relative_error=0.1, max_cache=8), "exactly one"),
        (dict(relative_error=-1.0), "relative_error is -1.0"),
        (dict(relative_error=float("nan")), "relative_error is nan"),
        (dict(max_parameters="100"), "max_parameters is '100'; it must be a number of at least 0"),
        (dict(max_parameters=float("nan")), "max_parameters is nan"),
        (dict(relative_error=True), "relative_error is True"),
        (dict(max_parameters=3), "^max_parameters = 3: even the smallest ranks"),
        (dict(max_cache=1), "^max_cache = 1: even the smallest ranks"),
    ],
)
def test_bad_bounds_are_named(bounds, message):
    with pytest.raises(ValueError, match=message):
        choose_ranks(MultiHeadAttention(24, 6), **bounds)


@pytest.mark.parametrize("x", [torch.ones(3, 23), torch.full((3, 24), float("nan"))])
def test_bad_samples_are_named(x):
    with pytest.raises(ValueError, match="x has shape .*d_model = 24"):
        second_moment(MultiHeadAttention(24, 6), x)


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


@pytest.mark.parametrize(
    "strip, heads, rows", [(1, 6 * [4], 24 * [1]), (8, 3 * [8], 3 * [8]), (9, 3 * [8], [9, 9, 6]), (256, [24], [24])]
)
def test_gram_matrices_are_made_in_strips(strip, heads, rows, monkeypatch):
    """Heads of four channels, of which at least one is made at once, on 24 inputs."""

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if function is torch.ops.aten.mm.default:
                made.append(len(result))
            return result

    monkeypatch.setattr(factored_tensor, "STRIP", strip)
    tensor = factored_tensors(with_large_weights(MultiHeadAttention(24, 6)))[0]
    slices = tensor.left @ tensor.rights[0].mT  # (h, s, t)
    for gram, expected, heights in (
        (tensor.head_gram, torch.einsum("hst,gst->hg", slices, slices), [n for n in heads for _ in range(2)]),
        (tensor.row_gram, torch.einsum("hst,hut->su", slices, slices), rows),
    ):
        made = []
        with Products():
            ours = gram()
        assert relative_error(ours, expected) < EXACT and made == heights


READERS = {
    "compress": lambda layer: compress(layer, (3, 8, 8)).post.to_tensor(),
    "compress by hooi": lambda layer: compress(layer, (3, 8, 8), method="hooi").post.to_tensor(),
    "compress shared": lambda layer: compress(layer, (3, 8, 8), shared_kv=True).post.to_tensor(),
    "spectra": lambda layer: torch.cat([tensor.rows for tensor in spectra(layer)]),
    "choose_ranks": lambda layer: choose_ranks(layer, relative_error=0.3),
    "choose_model_ranks": lambda layer: choose_model_ranks([layer], max_cache=8),
    "relative_errors": lambda layer: relative_errors(layer, layer),
    "to_gqa": lambda layer: as_tucker(to_gqa(layer, 1)).post.to_tensor(),
    "to_mla": lambda layer: as_tucker(to_mla(layer, 8, 8)).post.to_tensor(),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
@pytest.mark.parametrize("rotary", [None, Rotary.heads(4)], ids=["plain", "rotary"])
def test_weights_whose_squares_float64_does_not_hold_are_refused_and_others_scale(rotary, read):
    def scaled(factor: float) -> GroupedQueryAttention:
        layer = with_large_weights(GroupedQueryAttention(24, 6, 2, rotary=rotary))
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.mul_(factor)
        return layer

    expected = read(scaled(1.0))
    for factor in (2.0**-110, 2.0**110):  # controls
        found = read(scaled(factor))
        if isinstance(found, torch.Tensor):
            assert relative_error(found / factor**2, expected) < 1e-10
        else:
            assert found == expected
    for factor in (1e-80, 1e80, 1e-200, 1e200):
        with pytest.raises(
            ValueError, match=r"^layer has a tensor of factors near 2\^-?\d+ and 2\^-?\d+, whose Gram matrices leave float64"
        ):
            read(scaled(factor))


@pytest.mark.parametrize("turns", [False, True])
def test_how_far_from_one_both_sides_of_a_tensor_may_lie_alone_and_together(turns):
    assert FARTHEST == 240
    classes = key_classes(2, Rotary([1.0]) if turns else None, "cpu")

    def tensor(left: int, right: int) -> FactoredTensor:
        """Of the largest numbers below these powers of two; what the other parts hold is far smaller."""
        columns = torch.tensor([0.0, -(0.75 * 2.0**right)], dtype=torch.float64).expand(3, 2).mT[None]  # (1, c, k)
        columns = torch.complex(torch.zeros_like(columns), columns) if turns else columns
        rows = torch.tensor([0.0, 0.75 * 2.0**left], dtype=torch.float64).expand(3, 2).mT[None]  # (1, s, k)
        return FactoredTensor(Identity(2), rows, classes, (Identity(2),), (columns,))

    for left, right in ((240, 0), (-240, 0), (0, 240), (0, -240), (120, 120), (-120, -120), (240, -240)):
        fits = tensor(left, right)
        assert squarable(fits) is fits
    for left, right in ((241, -1), (-241, 1), (-1, 241), (1, -241), (121, 120), (-120, -121)):
        with pytest.raises(
            ValueError, match=rf"near 2\^{left} and 2\^{right}, whose Gram matrices leave float64: multiply its weights"
        ):
            squarable(tensor(left, right))
    for value in (math.inf, math.nan):
        broken = tensor(0, 0)
        broken.left[0, 1, 0] = value
        with pytest.raises(ValueError, match=r"near 2\^1025 and 2\^0"):
            squarable(broken)


def test_a_basis_as_wide_as_tall_is_never_written_out():
    layer, narrow = (with_large_weights(MultiHeadAttention(12, 3, head_dim=width)) for width in (4, 2))
    x = torch.ones(12, 2, dtype=torch.float64)
    for tensor, original in zip(factored_tensors(layer), dense(layer)):
        for basis in (tensor.row_basis, *tensor.column_bases):
            assert isinstance(basis, Identity) and len(basis) == 12
            assert (basis @ x) is x and (x.T @ basis).shape == (2, 12)
        assert relative_error(tensor.left @ tensor.rights[0].mT, torch.from_numpy(original)) < EXACT
    moment = 2 * torch.eye(12, dtype=torch.float64)
    weighed, plain = factored_tensors(layer, moment), factored_tensors(narrow)  # controls: these are not the identity
    for basis in (weighed[0].row_basis, *weighed[0].column_bases, plain[0].row_basis, *plain[0].column_bases):
        assert isinstance(basis, torch.Tensor) and not torch.equal(basis, torch.eye(*basis.shape).double())


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
    assert entropy_rank(torch.zeros(3)) == 0.0
    assert energy_rank(flat, 0.99) == 7 and energy_rank(flat, 0.5) == 4 and energy_rank(single) == 1
    assert energy_rank(flat, 1.0) == 7 and energy_rank(torch.ones(2), 0.5) == 1  # all of it; exactly the share is enough
    floor = rounding_floor(torch.tensor([1.0, 0.0]))
    assert numerical_rank(torch.tensor([1.0, floor], dtype=torch.float64)) == 1  # above the floor, not on it
    assert numerical_rank(torch.tensor([1.0, 2 * floor], dtype=torch.float64)) == 2
    assert energy_rank(torch.tensor([10.0, 1.0, 0.1]), 0.99) == 1 and energy_rank(torch.tensor([10.0, 1.1, 0.1]), 0.99) == 2


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 1, 0, 2)])
def test_effective_ranks_know_neither_order_nor_size(size, order):
    """In single precision the squares are infinite, or zero, and the fewest values that hold a share are the largest ones."""
    values = size * torch.tensor([4.0, 2.0, 2.0, 1.0])[list(order)]
    for given in (values, values.numpy()):
        assert [energy_rank(given, share) for share in (0.5, 0.75, 0.9, 0.99)] == [1, 2, 3, 4]  # 16, 20, 24 and 25 of 25
        assert entropy_rank(given) == pytest.approx(9 * 2 ** (-4 / 3), rel=1e-6)  # exp(-sum p log p) of 4, 2, 2 and 1 of 9
    assert entropy_rank(torch.full((9,), 3e4, dtype=torch.float16)) == pytest.approx(9)  # whose sum is infinite
    assert energy_rank(torch.ones(5000, dtype=torch.float16), 0.5) == 2500  # which counts to 2,048
    for extreme in (1e-200, 1e200):  # the squares of which double precision does not hold
        assert energy_rank(extreme * torch.tensor([2.0, 1.0], dtype=torch.float64), 0.9) == 2
    assert entropy_rank(torch.tensor([1e-200], dtype=torch.float64)) == 1


@pytest.mark.parametrize("ranks", [(), (1, 1), (1, 1, 1, 1)])
def test_the_tails_are_those_of_three_modes(ranks):
    with pytest.raises(ValueError, match="^ranks is .*; it must be 3 integers$"):
        spectra(MultiHeadAttention(24, 3))[0].tails(ranks)


BAD_SPECTRA = {
    "NaN": (torch.tensor([math.nan, 1.0]), "finite real numbers of at least 0"),
    "infinity": (torch.tensor([math.inf, 1.0]), "finite real numbers of at least 0"),
    "a negative one": (torch.tensor([2.0, -1.0]), "finite real numbers of at least 0"),
    "complex ones": (torch.tensor([2.0, 1.0j]), "finite real numbers of at least 0"),
    "no values": (torch.ones(2, device="meta"), "finite real numbers of at least 0"),
    "none": (torch.ones(0), "a tensor or an array of one size, of at least 1"),
    "a matrix": (torch.ones(2, 2), "a tensor or an array of one size, of at least 1"),
    "a list": ([2.0, 1.0], "a tensor or an array of one size, of at least 1"),
}


@pytest.mark.parametrize("spectrum, message", BAD_SPECTRA.values(), ids=BAD_SPECTRA)
@pytest.mark.parametrize("effective", [entropy_rank, energy_rank])
def test_effective_ranks_are_those_of_singular_values(effective, spectrum, message):
    """Of NaN the energy rank was 1."""
    with pytest.raises(ValueError, match=f"^singular_values must be {message}$"):
        effective(spectrum)


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


def test_ranks_that_the_product_of_the_others_bounds_keep_the_error_too():
    tensor = torch.zeros(3, 3, 3)  # its tails allow ranks (3, 1, 2), of which the first is more than the product of the others
    tensor[0, 0, 0], tensor[1, 0, 1], tensor[2, 1, 0], tensor[2, 0, 2] = 10, 1.4, 1, 1
    layer = MultiHeadAttention(3, 3, head_dim=3)
    with torch.no_grad():
        layer.k_proj.weight.copy_(torch.eye(3).repeat(3, 1))
        layer.q_proj.weight.copy_(tensor.mT.flatten(0, 1))
    pre, post = choose_ranks(layer, relative_error=0.17)
    assert max(relative_errors(layer, compress(layer, pre, post))) <= 0.17
    assert relative_errors(layer, compress(layer, (2, 1, 2), post))[0] > 0.17  # control: the first rank cut down instead
    assert choose_ranks(layer, max_parameters=1000)[0] >= pre  # a budget that holds all of it


def test_ranks_by_error_hold_for_every_method_on_skewed_tensors():
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):
        layer = MultiHeadAttention(6, 6, head_dim=2)
        with torch.no_grad():
            for p in layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * torch.rand(p.shape[0], 1, generator=generator) ** 6)
        for bound in (0.1, 0.3, 0.6):
            ranks = choose_ranks(layer, relative_error=bound)
            for method in METHODS:
                assert max(relative_errors(layer, compress(layer, *ranks, method=method))) <= bound * (1 + 1e-6)


def test_errors_of_layers_that_cannot_be_compared_are_refused():
    layer = with_large_weights(MultiHeadAttention(24, 6))
    louder = copy.deepcopy(layer)
    louder.scale *= 2
    with pytest.raises(ValueError, match="scale is .* in layer and .* in its approximation"):
        relative_errors(layer, louder)
    with pytest.raises(ValueError, match="biases are in one of layer and its approximation alone"):
        relative_errors(MultiHeadAttention(24, 6, bias=True), layer)


@pytest.mark.parametrize("rotary", [None, Rotary.heads(4)], ids=["plain", "RoPE"])
def test_a_tensor_of_zeros_is_approximated_without_an_error_by_zeros_alone(rotary):
    layer = with_large_weights(MultiHeadAttention(24, 6, bias=True, rotary=rotary))
    whole = copy.deepcopy(layer)
    nn.init.zeros_(layer.o_proj.weight)  # a layer that was pruned, or put in as an identity
    approximations = [compress(layer, (3, 8, 8)), compress(layer, (3, 8, 8), shared_kv=True), to_gqa(layer, 2)]
    for approximation in (layer, *approximations):
        pre, post = relative_errors(layer, approximation)
        assert post == 0 and (approximation is layer or pre > DIFFERENT)
    nn.init.zeros_(layer.k_proj.weight)
    nn.init.zeros_(layer.k_proj.bias)
    assert relative_errors(layer, layer) == (0, 0)
    with pytest.raises(ValueError, match="layer has a tensor of zeros"):  # control
        relative_errors(layer, whole)


@pytest.mark.parametrize(
    "moment, message", [(torch.ones(3, 4), "is not square"), (torch.ones(24, 24), "not positive definite")]
)
def test_a_matrix_that_is_no_moment_is_refused(moment, message):
    with pytest.raises(ValueError, match=message):
        compress(with_large_weights(MultiHeadAttention(24, 6)), (4, 8, 8), moment=moment)


def test_a_moment_in_half_precision_is_as_good_as_its_values():
    layer, moment = with_large_weights(MultiHeadAttention(24, 6)), torch.diag(torch.arange(1.0, 25.0))
    a, b = (compress(layer, (4, 8, 8), moment=m) for m in (moment.bfloat16(), moment.double()))
    assert relative_errors(a, b)[0] < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_of_low_precision_has_the_head_ranks_that_it_was_given(dtype):
    for seed in range(20):
        torch.manual_seed(seed)
        layer = TuckerAttention(48, 12, (4, 16, 16)).to(dtype)
        assert [s.ranks() for s in spectra(layer)] == [(4, 16, 16)] * 2
