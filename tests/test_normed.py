"""Layers with QK-norm: the tensor between their norms, and fewer ranks with the norms kept."""

import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, tokens

from tucker_ref import GroupedQueryAttention, MultiHeadAttention, Rotary, compress, second_moment, spectra
from tucker_ref.compression.moments import centred
from tucker_ref.compression.normed import between_norms, compress_normed


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
    layer = MultiHeadAttention(24, 3, bias=True).double()
    x = torch.randn(200, 24).double() + 5
    moment, ones = second_moment(layer, x), torch.ones(200, 1).double()
    about = centred(moment, torch.cat([x, ones], dim=1).mean(0), damping=0.0)
    expected = torch.cat([x - x.mean(0), 0 * ones], dim=1)
    assert (
        (about - moment.diagonal().mean() * 0 - expected.T @ expected / 200).abs().max() < 1e-4 < (about - moment).abs().max()
    )
    whole, part = (
        spectra(layer, moment),
        spectra(layer, moment, key_moment=centred(moment, torch.cat([x, ones], 1).mean(0), 1e-3)),
    )
    assert part[0].rows.norm() < 0.5 * whole[0].rows.norm() and torch.equal(part[1].rows, whole[1].rows)
