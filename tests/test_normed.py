"""Layers with QK-norm: the tensor between their norms, and fewer ranks with the norms kept."""

import copy

import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, tokens, with_large_weights

from tucker_ref import GroupedQueryAttention, MultiHeadAttention, Rotary, compress, second_moment, spectra
from tucker_ref.compression.moments import centred
from tucker_ref.compression.normed import _sizes, between_norms, compress_normed
from tucker_ref.factors import factors_of


def gemma(bias=False, heads=4, groups=1, qk_norm="head"):
    """Small, with gains of both signs, some of them zero as in Gemma 3."""
    torch.manual_seed(0)
    layer = GroupedQueryAttention(24, heads, groups, head_dim=8, rotary=Rotary.heads(8), bias=bias, qk_norm=qk_norm).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
        layer.q_norm.weight[2] = layer.k_norm.weight[5] = 0.0
    layer.scale = 0.7
    return layer


def uneven(layer, count=60):
    """The moment of inputs some of whose channels are far larger than others, and these inputs."""
    x = torch.randn(count, 24).double() * torch.linspace(0.1, 3, 24)
    return second_moment(layer, x, damping=0.0), x


@pytest.mark.parametrize("aware", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("method", ["hosvd", "sthosvd", "hooi"])
def test_full_rank_is_the_layer_itself_with_its_norms(method, bias, aware):
    layer, x = gemma(bias), tokens(2, 7, 24).double()
    moment = uneven(layer)[0] if aware else None
    whole = (4, 25 if bias else 24, 8), (4, 24, 8)
    small = compress_normed(layer, *whole, method=method, moment=moment)
    assert small.qk_norm == "head" and relative_error(small(x), layer(x)) < EXACT
    for fewer in ((3, 24, 8), (4, 12, 8), (4, 24, 6)):  # controls
        assert relative_error(compress_normed(layer, fewer, whole[1], moment=moment)(x), layer(x)) > DIFFERENT
    assert relative_error(compress_normed(layer, whole[0], (4, 24, 6), moment=moment)(x), layer(x)) > DIFFERENT
    frozen = compress(between_norms(layer, moment), *whole)  # control: norms frozen at their average are another model
    assert relative_error(frozen(x), layer(x)) > DIFFERENT


@pytest.mark.parametrize("kind", ["head", "all"])
def test_queries_and_keys_between_norms_have_a_mean_square_of_their_gains(kind):
    layer = gemma(bias=True, groups=2, qk_norm=kind)
    with torch.no_grad():
        layer.q_norm.weight.fill_(1.0)
        layer.k_norm.weight.fill_(2.0)
    moment, x = uneven(layer)
    plain = between_norms(layer, moment)
    assert plain.qk_norm is None and type(plain) is GroupedQueryAttention and layer.qk_norm == kind
    for projection, before, gain in ((plain.q_proj, layer.q_proj, 1.0), (plain.k_proj, layer.k_proj, 4.0)):
        squares = projection(x).unflatten(1, (-1, 8)).square().mean((0, 2))
        assert (squares if kind == "head" else squares.mean()).sub(gain).abs().max() < 1e-10
        assert before(x).unflatten(1, (-1, 8)).square().mean((0, 2)).sub(gain).abs().max() > 0.1  # control
    spectra(plain, moment)  # which it has
    with torch.no_grad():
        layer.q_proj.weight.zero_(), layer.q_proj.bias.zero_()
    assert between_norms(layer).q_proj.weight.abs().max() == 0  # and no NaN


def test_gains_make_up_for_channels_that_are_gone():
    """Where a dropped pair holds most of every key, the logits of the others keep their size."""
    layer = gemma()
    with torch.no_grad():
        layer.k_norm.weight.fill_(1.0), layer.q_norm.weight.fill_(1.0)
        layer.k_norm.weight[[0, 4]] = 0.0  # a pair that adds nothing to logits, but much to the norm
        layer.k_proj.weight[[0, 4]] *= 10
    x = tokens(2, 7, 24).double()
    small = compress_normed(layer, (4, 24, 6), (4, 24, 8))
    assert small.k_norm.weight.abs().max() < 0.5
    rough = relative_error(small(x), layer(x))
    with torch.no_grad():
        small.k_norm.weight.fill_(1.0)
    assert rough < 0.5 * relative_error(small(x), layer(x))  # control: without them


def test_what_is_refused():
    plain = MultiHeadAttention(24, 3)
    for made in (between_norms, lambda layer: compress_normed(layer, (3, 8, 8))):
        with pytest.raises(ValueError, match="layer is MultiHeadAttention"):
            made(plain)
    with pytest.raises(ValueError, match="layer has 2 key heads with norms of their own"):
        compress_normed(gemma(groups=2), (4, 8, 8))
    with pytest.raises(ValueError, match="it must be multi-query attention"):
        compress_normed(gemma(qk_norm="all"), (4, 8, 8))
    shared = gemma()
    shared.rotary = Rotary([1.0, 0.5, 0.5, 0.1]).double()
    with pytest.raises(ValueError, match="pairs of the layer share a frequency"):
        compress_normed(shared, (4, 8, 8))
    with pytest.raises(ValueError, match="method is 'svd'"):
        compress_normed(gemma(), (4, 8, 8), method="svd")
    with pytest.raises(ValueError, match="must be even"):
        compress_normed(gemma(), (4, 8, 5))
    spoiled = gemma()
    spoiled.q_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="holds NaN or infinity"):
        between_norms(spoiled)


def test_what_keys_have_in_common_counts_for_nothing():
    torch.manual_seed(0)
    layer = with_large_weights(MultiHeadAttention(24, 3, bias=True))
    x, ones = torch.randn(200, 24).double() + 5, torch.ones(200, 1).double()
    moment, mean = second_moment(layer, x, damping=0.0), torch.cat([x, ones], dim=1).mean(0)
    about = centred(moment, mean, damping=0.0)
    expected = torch.cat([x - x.mean(0), 0 * ones], dim=1)
    assert (about - expected.T @ expected / 200).abs().max() < 1e-10 < (about - moment).abs().max()
    damped = centred(moment, mean)
    assert (damped - about - 1e-6 * moment.diagonal().mean() * torch.eye(25)).abs().max() < 1e-12
    whole, part = spectra(layer, moment), spectra(layer, moment, key_moment=damped)
    assert part[0].rows.norm() < 0.5 * whole[0].rows.norm() and torch.equal(part[1].rows, whole[1].rows)
    rows, columns = torch.linalg.cholesky(moment), torch.linalg.cholesky(damped)
    pre = factors_of(layer).pre
    unfolded = (rows.T @ pre.rows @ pre.head_cores() @ pre.columns.T @ columns).transpose(0, 1).flatten(1)  # (D, h D)
    assert relative_error(part[0].rows, torch.linalg.svdvals(unfolded)[: len(part[0].rows)]) < 1e-6


def test_what_channels_are_measured_in_counts_for_nothing_where_inputs_are_known():
    """Inputs times A and weights over A are the same layer, and the same one when compressed."""
    layer, scales = gemma(bias=True), torch.logspace(-1, 1, 24).double()
    moment, x = uneven(layer)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for projection in (other.q_proj, other.k_proj, other.v_proj):
            projection.weight.div_(scales)
    x, known = x.view(3, 20, 24), torch.cat([scales, scales.new_ones(1)])
    assert relative_error(other(x * scales), layer(x)) < EXACT
    ranks = (3, 9, 6), (3, 9, 5)
    ours, theirs = (
        compress_normed(layer, *ranks, moment=moment),
        compress_normed(other, *ranks, moment=known * moment * known[:, None]),
    )
    assert relative_error(theirs(x * scales), ours(x)) < 1e-6
    blind = compress_normed(other, *ranks)  # control
    assert relative_error(blind(x * scales), compress_normed(layer, *ranks)(x)) > DIFFERENT


def test_ranks_dtype_and_eps_are_those_asked_for_and_the_layers_own():
    layer = gemma(bias=True).float()
    layer.q_norm.eps, layer.k_norm.eps = 1e-3, 1e-4
    small = compress_normed(layer, (3, 8, 6))
    assert tuple(small.pre.core.shape) == tuple(small.post.core.shape) == (3, 8, 6)
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    assert (small.q_norm.eps, small.k_norm.eps, small.scale) == (1e-3, 1e-4, 0.7)
    assert {p.dtype for p in between_norms(layer).parameters()} == {torch.float32}
    with pytest.raises(ValueError, match=r"^post_ranks\[1\] is 30"):
        compress_normed(layer, (4, 8, 8), (4, 30, 8))


def test_small_heads_have_their_own_size_and_heads_of_zeros_have_one():
    layer = gemma()
    before = _sizes(layer, None)[0]
    with torch.no_grad():
        layer.q_proj.weight[:8].mul_(1e-3)
        layer.q_proj.weight[8:16].zero_()
    after = _sizes(layer, None)[0]
    assert after[0] == pytest.approx(1e-3 * before[0].item(), rel=1e-12) and after[1] == 1.0 != before[1]
    assert torch.equal(after[2:], before[2:])
