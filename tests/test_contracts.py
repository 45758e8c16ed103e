"""Contracts: what every public function promises for any valid argument, and that anything else is a ValueError, tried on random input.

`make test` tries a few fixed inputs of each contract; `make fuzz` (HYPOTHESIS_PROFILE=long) tries thousands, others each time. Every
public name has a contract here or a reason why it needs none.
"""

import functools
import json
import math
import os
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import EXACT, with_large_weights
from hypothesis import assume, given
from hypothesis import strategies as st

import tucker_ref as tr

TRIED = Counter()
CONTRACTS: dict[str, list[str]] = {}
NO_CONTRACT = {"Spectra": "what `spectra` returns, whose contract looks at every field and method of it"}
SMALL = st.integers(1, 4)
SEEDS = st.integers(0, 2**32 - 1)


def contract(*names):
    """Register a test as the contract of these public names, and count its examples."""

    def register(test):
        for name in names:
            CONTRACTS.setdefault(name, []).append(test.__name__)

        @functools.wraps(test)
        def counted(*arguments, **options):
            TRIED[test.__name__] += 1
            return test(*arguments, **options)

        return counted

    return register


@pytest.fixture(scope="module", autouse=True)
def tell_how_many():
    """To the file $CONTRACTS_TRIED, for `python -m reproduce fuzz`."""
    yield
    if path := os.environ.get("CONTRACTS_TRIED"):
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"contracts": CONTRACTS, "tried": TRIED}, file)


def test_every_public_name_has_a_contract_or_a_reason():
    public = {name for name in tr.__all__}
    assert public == set(CONTRACTS) | set(NO_CONTRACT)
    assert not set(CONTRACTS) & set(NO_CONTRACT)


def numbers(draw, *shape):
    return np.random.default_rng(draw(SEEDS)).standard_normal(shape)


def close(actual, expected, bound=EXACT):
    """Within the bound, relative to the expected or, where that is nothing, absolute."""
    return np.linalg.norm(np.asarray(actual) - np.asarray(expected)) <= bound * max(1.0, np.linalg.norm(expected))


# Rungs 1 to 3, NumPy


@st.composite
def tensors(draw, smallest=0, orders=(1, 4)):
    return numbers(draw, *draw(st.lists(st.integers(smallest, 4), min_size=orders[0], max_size=orders[1])))


@given(tensors(), st.data())
@contract("unfold", "fold")
def test_unfold_and_fold_are_inverse_and_keep_every_number(tensor, data):
    mode = data.draw(st.integers(0, tensor.ndim - 1))
    matrix = tr.unfold(tensor, mode)
    rest = math.prod(size for other, size in enumerate(tensor.shape) if other != mode)
    assert matrix.shape == (tensor.shape[mode], rest)
    assert np.array_equal(tr.fold(matrix, mode, tensor.shape), tensor)
    for row, part in zip(matrix, np.moveaxis(tensor, mode, 0)):
        assert np.array_equal(row, part.ravel())


@given(tensors(), st.integers(0, 3), st.data())
@contract("mode_product", "mode_product_einsum", "multi_mode_product")
def test_mode_products_change_one_size_and_are_linear(tensor, n_rows, data):
    mode = data.draw(st.integers(0, tensor.ndim - 1))
    matrix = numbers(data.draw, n_rows, tensor.shape[mode])
    product = tr.mode_product(tensor, matrix, mode)
    assert product.shape == (*tensor.shape[:mode], n_rows, *tensor.shape[mode + 1 :])
    assert close(product, tr.mode_product_einsum(tensor, matrix, mode))
    assert close(product, np.moveaxis(np.tensordot(matrix, tensor, axes=(1, mode)), 0, mode))
    matrices = [numbers(data.draw, 2, size) for size in tensor.shape]
    expected = tensor
    for other in reversed(range(tensor.ndim)):
        expected = tr.mode_product_einsum(expected, matrices[other], other)
    assert close(tr.multi_mode_product(tensor, matrices), expected)
    with pytest.raises(ValueError, match="matrix has shape"):
        tr.mode_product(tensor, numbers(data.draw, n_rows, tensor.shape[mode] + 1), mode)


@st.composite
def tensors_and_ranks(draw):
    tensor = draw(tensors(smallest=1, orders=(2, 4)))
    return tensor, tuple(draw(st.integers(1, size)) for size in tensor.shape)


def may_be(ranks, sizes):
    return all(r <= min(size, math.prod(ranks) // r) for r, size in zip(ranks, sizes))


@given(tensors_and_ranks())
@contract("TuckerTensor", "hosvd", "sthosvd", "hooi", "tail_energies", "multilinear_rank")
def test_decompositions_have_the_ranks_asked_for_and_obey_their_bounds(case):
    tensor, ranks = case
    if not may_be(ranks, tensor.shape):
        for function in (tr.hosvd, tr.sthosvd, tr.hooi, tr.tail_energies):
            with pytest.raises(ValueError, match=r"ranks\[\d\] is"):
                function(tensor, ranks)
        return
    tails, errors = tr.tail_energies(tensor, ranks), []
    norm = np.linalg.norm(tensor)
    assert tails.shape == (tensor.ndim,) and (tails >= 0).all()
    for function in (tr.hosvd, tr.sthosvd, tr.hooi):
        found = function(tensor, ranks)
        assert isinstance(found, tr.TuckerTensor) and found.ranks == ranks and found.shape == tensor.shape
        assert found.size == math.prod(ranks) + sum(size * rank for size, rank in zip(tensor.shape, ranks))
        assert all(close(factor.T @ factor, np.eye(rank)) for factor, rank in zip(found.factors, ranks))
        full = found.to_tensor()
        assert all(have <= asked for have, asked in zip(tr.multilinear_rank(full, rtol=1e-9), ranks))
        errors.append(np.linalg.norm(tensor - full))
        assert errors[-1] ** 2 <= tails.sum() + 1e-12 * norm**2
        assert errors[-1] ** 2 >= tails.max() - 1e-12 * norm**2
    assert errors[2] <= errors[0] + 1e-12 * norm
    assert tr.multilinear_rank(tensor) == tuple(np.linalg.matrix_rank(tr.unfold(tensor, m)) for m in range(tensor.ndim))


@given(st.integers(1, 5), SMALL, SMALL, st.integers(1, 5), st.booleans(), st.data())
@contract("pre_softmax_tensor", "post_softmax_tensor", "tensor_attention", "multi_head_attention")
def test_attention_of_heads_is_attention_of_their_two_tensors(d, h, k, n, causal, data):
    x, w_q, w_k, w_v = (numbers(data.draw, *shape) for shape in ((n, d), (h, d, k), (h, d, k), (h, d, k)))
    w_o = numbers(data.draw, h, k, d)
    pre, post = tr.pre_softmax_tensor(w_q, w_k), tr.post_softmax_tensor(w_v, w_o)
    assert pre.shape == post.shape == (h, d, d)
    y = tr.tensor_attention(x, pre, post, k**-0.5, causal)
    assert y.shape == x.shape
    assert close(y, tr.multi_head_attention(x, w_q, w_k, w_v, w_o, causal), 1e-10)
    if causal and n > 1:  # later tokens change nothing before them
        later = np.concatenate([x[:-1], numbers(data.draw, 1, d)])
        assert close(tr.tensor_attention(later, pre, post, k**-0.5, causal)[:-1], y[:-1])


# Rungs 4 to 6, PyTorch


def random_tensor(draw, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(draw(SEEDS)), dtype=torch.float64)


@st.composite
def masks(draw, *full):
    """None, or a boolean tensor that broadcasts to these sizes, of any rank up to four."""
    if draw(st.booleans()):
        return None
    shape = [draw(st.sampled_from((1, size))) for size in full][draw(st.integers(0, 4)) :]
    return torch.rand(shape, generator=torch.Generator().manual_seed(draw(SEEDS))) < draw(st.sampled_from((0.2, 0.6)))


@given(st.integers(0, 3), SMALL, SMALL, SMALL, SMALL, st.integers(0, 6), st.integers(0, 3), st.booleans(), st.data())
@contract("attend")
def test_attend_averages_the_values_that_a_query_may_see(b, g, per_group, k, v, n, before, causal, data):
    m, h = n + before, g * per_group
    q, key, value = (random_tensor(data.draw, *s) for s in ((b, h, n, k), (b, g, m, k), (b, g, m, v)))
    mask = data.draw(masks(b, h, n, m))
    options = dict(scale=data.draw(st.floats(0.1, 3.0)), causal=causal, mask=mask)
    z = tr.attend(q, key, value, **options, backend="reference")
    assert z.shape == (b, h, n, v) and z.isfinite().all()
    assert close(tr.attend(q, key, value, **options, backend=data.draw(st.sampled_from(("sdpa", "math")))), z)
    allowed = torch.ones(b, h, n, m, dtype=torch.bool) if mask is None else mask.expand(b, h, n, m)
    if causal:
        allowed = allowed & torch.ones(n, m, dtype=torch.bool).tril(m - n)
    assert not z[~allowed.any(-1)].any()
    if z.numel() and m:
        top, low = value.amax(), value.amin()
        seen = z[allowed.any(-1)]
        assert ((seen <= top + 1e-9) & (seen >= low - 1e-9)).all()
        source = data.draw(st.integers(0, m - 1))
        other = value.clone()
        other[:, :, source] += 100
        moved = (tr.attend(q, key, other, **options) - z).abs().amax(-1) > 1e-9
        assert not moved[~allowed[..., source]].any()


@st.composite
def rotaries(draw, width):
    """Any embedding of this even width."""
    pairing, base = draw(st.sampled_from(("half", "interleaved"))), draw(st.floats(2.0, 1e6))
    scaling = draw(st.none() | st.builds(tr.Llama3Scaling, st.floats(1.0, 64.0), original_context=st.integers(1, 9000)))
    kind = draw(st.sampled_from(("heads", "groups", "latent", "decoupled", "free")))
    pairs = width // 2
    if kind == "groups":
        groups = draw(st.sampled_from([g for g in range(1, pairs + 1) if pairs % g == 0]))
        return tr.Rotary.groups(width // groups, groups, base, pairing, scaling)
    if kind == "decoupled" and pairs > 1:
        still = 2 * draw(st.integers(1, pairs - 1))
        return tr.Rotary.decoupled(still, width - still, base, pairing, scaling)
    if kind == "free":
        return tr.Rotary(draw(st.lists(st.floats(-4.0, 4.0), min_size=pairs, max_size=pairs)), pairing)
    return (tr.Rotary.heads if kind == "heads" else tr.Rotary.latent)(width, base, pairing, scaling)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(0, 5), st.booleans(), st.data())
@contract("Rotary", "Llama3Scaling")
def test_rotary_keeps_lengths_and_sees_distances_only(pairs, b, h, n, per_sequence, data):
    rotary = data.draw(rotaries(2 * pairs))
    assert rotary.width == 2 * pairs and rotary.frequencies.shape == (pairs,)
    shape = (b, h, n, 2 * pairs) if h else (b, n, 2 * pairs)
    q, k = (random_tensor(data.draw, *shape) for _ in range(2))
    places = torch.tensor(np.random.default_rng(data.draw(SEEDS)).integers(-50, 5000, (b, n) if per_sequence else n))
    turned = rotary(q, places)
    assert turned.shape == q.shape and close(turned.norm(dim=-1), q.norm(dim=-1))
    assert close(rotary.unpaired(*rotary.pairs(q)), q, 0)
    shift = data.draw(st.integers(-30, 30))
    assert close((rotary(q, places + shift) * rotary(k, places + shift)).sum(-1), (turned * rotary(k, places)).sum(-1), 1e-9)
    assert rotary(q.float(), places).dtype == torch.float32
    with pytest.raises(ValueError, match="positions has shape"):
        rotary(q, torch.arange(n + 1))


@given(st.floats(1.0, 100.0), st.floats(0.1, 4.0), st.floats(0.1, 4.0), st.integers(1, 10_000), st.floats(1e-6, 10.0))
@contract("Llama3Scaling")
def test_scaling_slows_down_by_at_most_its_factor(factor, low, apart, context, frequency):
    scaling = tr.Llama3Scaling(factor, low, low + apart, context)
    before = torch.tensor([frequency], dtype=torch.float64)
    ratio, turns = (scaling.apply(before) / before).item(), context * frequency / (2 * math.pi)
    assert 1 / factor - 1e-12 <= ratio <= 1 + 1e-12
    if turns < low:
        assert ratio == pytest.approx(1 / factor)
    if turns > low + apart:
        assert ratio == pytest.approx(1.0)


@given(st.integers(1, 3), SMALL, SMALL, st.lists(st.integers(1, 4), min_size=1, max_size=5), st.integers(0, 3), st.data())
@contract("Cache")
def test_a_cache_returns_what_was_put_in_whatever_the_pieces(b, g, width, pieces, room, data):
    n = sum(pieces)
    cache = tr.Cache({"key": (g, width), "value": (1, 3)}, b, n + room, dtype=torch.float64, device="cpu")
    assert cache.nbytes == 8 * b * (n + room) * (g * width + 3)
    key, value = random_tensor(data.draw, b, g, n, width), random_tensor(data.draw, b, 1, n, 3)
    start = 0
    for size in pieces:
        end = start + size
        found = cache.append(key=key[:, :, start:end], value=value[:, :, start:end])
        assert cache.length == end and torch.equal(found[0], key[:, :, :end]) and torch.equal(found[1], value[:, :, :end])
        start = end
    assert torch.equal(cache.positions(torch.device("cpu")), torch.arange(n))
    with pytest.raises(ValueError, match="overflow"):
        cache.append(key=torch.zeros(b, g, room + 1, width).double(), value=torch.zeros(b, 1, room + 1, 3).double())
    assert cache.length == n and torch.equal(cache.streams["key"][:, :, :n], key)


# Rungs 7 to 10: layers


@st.composite
def ranks_for(draw, sizes, free=()):
    """Ranks that a Tucker tensor of these sizes may have; `free` modes have no limit by the others."""
    ranks = [draw(st.integers(1, size)) for size in sizes]
    for mode in (0, 1, 2) * 3:
        if mode not in free:
            ranks[mode] = min(ranks[mode], math.prod(ranks) // ranks[mode])
    assume(all(mode in free or rank <= math.prod(ranks) // rank for mode, rank in enumerate(ranks)))
    return tuple(ranks)


EVEN = st.sampled_from((2, 4))
QK_NORMS = st.sampled_from((None, "head", "all"))


@st.composite
def grouped(draw, norms=False):
    """MHA or GQA."""
    per_group, groups, width = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(EVEN)
    h, fits = per_group * groups, draw(st.booleans())
    options = dict(bias=draw(st.sampled_from((False, True, "qkv"))), rotary=draw(st.none() | rotaries(width)))
    options["qk_norm"] = draw(QK_NORMS) if norms else None
    d = h * width if fits else draw(st.integers(1, 10))
    options |= {} if fits else {"head_dim": width}
    if draw(st.booleans()):
        return tr.MultiHeadAttention(d, h, **options)
    return tr.GroupedQueryAttention(d, h, groups, **options)


@st.composite
def latent(draw, norms=True):
    """MLA."""
    h, d = draw(SMALL), draw(st.integers(1, 10))
    options = dict(head_dim=draw(SMALL), v_head_dim=draw(SMALL), shared_kv=draw(st.booleans()), absorb=draw(st.booleans()))
    kv_rank, kind = draw(st.integers(1, d)), draw(st.sampled_from(("none", "decoupled", "coupled")))
    if kind == "decoupled":
        options["rope_dim"] = draw(EVEN)
        options["rotary"] = draw(rotaries(options["rope_dim"]))
    elif kind == "coupled" and kv_rank % 2 == 0:
        options["rotary"] = draw(rotaries(kv_rank))
    return tr.MultiHeadLatentAttention(
        d, h, draw(st.integers(1, d)), kv_rank, latent_norm=norms and draw(st.booleans()), **options
    )


@st.composite
def tucker(draw, norms=True):
    h, d = draw(SMALL), draw(st.integers(2, 10))
    shared, norm, bias, turned = draw(st.booleans()), norms and draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    free = {1: norm, 2: norm or shared or turned}
    r, s, t = draw(ranks_for((h, d, d), [mode for mode in free if free[mode]]))
    if turned:
        t += t % 2
    post = draw(ranks_for((h, d, d), [2] if norm or shared else []))
    if shared:
        post = (post[0], min(post[1], post[0] * t), t)
        assume(post[0] <= post[1] * t)
    return tr.TuckerAttention(
        d,
        h,
        (r, s, t),
        post,
        shared_kv=shared,
        latent_norm=norm,
        bias=bias,
        rotary=draw(rotaries(t)) if turned else None,
        scale=draw(st.none() | st.floats(0.1, 2.0)),
        qk_norm=draw(QK_NORMS) if norms else None,
        init=draw(st.sampled_from(("orthonormal", "xavier"))),
    )


def layers(norms=True):
    """Any layer of the four mechanisms, in float64, with weights that show a wrong logit."""
    return st.builds(with_large_weights, grouped(norms) | latent(norms) | tucker(norms), st.integers(0, 99))


@given(layers(), st.integers(1, 3), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.booleans(), st.data())
@contract("MultiHeadAttention", "GroupedQueryAttention", "MultiHeadLatentAttention", "TuckerAttention", "Cache")
def test_a_layer_keeps_shapes_and_decodes_what_it_computes_at_once(layer, b, pieces, own_positions, data):
    n = sum(pieces)
    x = random_tensor(data.draw, b, n, layer.d_model)
    mask = data.draw(masks(b, layer.n_heads, n, n))
    places = np.random.default_rng(data.draw(SEEDS)).integers(-9, 999, data.draw(st.sampled_from(((n,), (b, n)))))
    positions = torch.tensor(places) if own_positions else None
    with torch.no_grad():
        y = layer(x, mask=mask, positions=positions)
        assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
        assert close(layer(x, mask=mask, positions=positions, backend="reference"), y, 1e-11)
        cache, parts, start = layer.new_cache(b, n), [], 0
        for size in pieces:
            end = start + size
            part = None if mask is None else part_of(mask, start, end, n)
            given_places = None if positions is None else positions[..., start:end]
            parts.append(layer(x[:, start:end], cache=cache, mask=part, positions=given_places))
            start = end
        assert cache.length == n and close(torch.cat(parts, dim=1), y, 1e-11)
        with pytest.raises(ValueError, match="overflow"):
            layer(x[:, :1], cache=cache)
        assert cache.length == n


def part_of(mask, start, end, n):
    """What a mask for n tokens says to those from start to end, which see the tokens up to end."""
    if mask.ndim > 1 and mask.shape[-2] == n:
        mask = mask[..., start:end, :]
    return mask[..., :end] if mask.ndim and mask.shape[-1] == n else mask


@given(layers(), st.integers(1, 2), st.integers(1, 5), st.data())
@contract("MultiHeadAttention", "GroupedQueryAttention", "MultiHeadLatentAttention", "TuckerAttention", "as_tucker")
def test_later_tokens_and_other_sequences_change_nothing_and_as_tucker_agrees(layer, b, n, data):
    x = random_tensor(data.draw, b, n, layer.d_model)
    place = data.draw(st.integers(0, n - 1))
    other = x.clone()
    other[-1, place] += 1
    with torch.no_grad():
        y, changed = layer(x), layer(other)
        assert torch.equal(changed[:-1], y[:-1]) and close(changed[-1, :place], y[-1, :place])
        twin, before = tr.as_tucker(layer), [p.clone() for p in layer.parameters()]
        assert isinstance(twin, tr.TuckerAttention) and (twin.d_model, twin.n_heads) == (layer.d_model, layer.n_heads)
        causal = data.draw(st.booleans())
        assert close(twin(x, causal=causal), layer(x, causal=causal), 1e-10)
        for parameter in twin.parameters():
            parameter.zero_()
        assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters()))  # weights of its own


@given(st.lists(SMALL, min_size=3, max_size=3), st.integers(1, 5), SMALL, st.data())
@contract("TuckerWeights")
def test_weights_are_core_times_factors(ranks, d, h, data):
    core = random_tensor(data.draw, *ranks)
    factors = {
        name: random_tensor(data.draw, size, rank) for name, size, rank in zip(("head", "query", "key"), (h, d, d), ranks)
    }
    weights = tr.TuckerWeights(core, factors)
    expected = tr.multi_mode_product(core.numpy(), [factor.numpy() for factor in factors.values()])
    assert weights.head_cores().shape == (h, *ranks[1:]) and weights.to_tensor().shape == (h, d, d)
    assert close(weights.to_tensor().detach(), expected) and close(weights.numpy().to_tensor(), expected)
    assert all(torch.equal(a, b) for a, b in zip(weights.factors, factors.values()))


@given(st.integers(1, 6), st.integers(0, 3), st.data())
@contract("LatentNorm")
def test_the_norm_scales_its_channels_to_mean_square_one_and_passes_the_rest(normalised, rest, data):
    norm, x = tr.LatentNorm(normalised + rest, normalised).double(), random_tensor(data.draw, 2, 3, normalised + rest)
    y = norm(x)
    mean_square = x[..., :normalised].square().mean(-1)
    assert close(y[..., :normalised].square().mean(-1).detach(), mean_square / (mean_square + 1e-6))
    assert torch.equal(y[..., normalised:], x[..., normalised:])
    assert torch.equal(tr.LatentNorm(normalised).double()(x[..., :normalised]), y[..., :normalised])


# Rungs 12 and 13


@given(layers(norms=False))
@contract("spectra", "entropy_rank", "energy_rank")
def test_spectra_agree_on_the_norm_and_bound_the_ranks(layer):
    for spectrum in tr.spectra(layer):
        squares = [(values**2).sum().item() for values in (spectrum.head, spectrum.rows, spectrum.columns)]
        assert squares == pytest.approx([squares[0]] * 3, rel=1e-9)
        assert len(spectrum.head) == layer.n_heads
        for values, rank in zip((spectrum.head, spectrum.rows, spectrum.columns), spectrum.ranks()):
            assert (values >= 0).all() and (values.diff() <= 0).all() and 1 <= rank <= len(values)
            assert 1 - 1e-9 <= tr.entropy_rank(values) <= len(values) + 1e-9
            assert 1 <= tr.energy_rank(values, 0.5) <= tr.energy_rank(values, 0.99) <= len(values)
        assert close(spectrum.tails((0, 0, 0)), squares) and not spectrum.tails((99, 99, 99)).any()


@given(layers(norms=False), st.integers(1, 9), st.data())
@contract("second_moment")
def test_the_second_moment_is_symmetric_and_positive(layer, n, data):
    x = random_tensor(data.draw, n, layer.d_model)
    moment = tr.second_moment(layer, x)
    d = layer.d_model
    assert moment.shape == (d + bool(getattr(layer, "bias", False)),) * 2 and moment.dtype == torch.float64
    assert close(moment, moment.T) and (torch.linalg.eigvalsh(moment) > 0).all()
    assert close(tr.second_moment(layer, x, damping=0)[:d, :d], x.T @ x / n)


def channels(layer, post=False):
    """Sizes of a layer's tensor as it holds it: heads, and how many channels its query or output and its key or value side have."""
    tensor = tr.spectra(layer)[post]
    return len(tensor.head), len(tensor.rows), len(tensor.columns)


@given(layers(norms=False), st.sampled_from(("hosvd", "sthosvd", "hooi")), st.booleans(), st.data())
@contract("compress", "relative_errors", "choose_ranks")
def test_compression_has_the_ranks_asked_for_and_the_error_promised(layer, method, informed, data):
    moment = None
    if informed:
        moment = tr.second_moment(layer, random_tensor(data.draw, 30, layer.d_model))
    allowed = data.draw(st.floats(0.0, 1.2))
    ranks, post_ranks = tr.choose_ranks(layer, relative_error=allowed, moment=moment)
    small = tr.compress(layer, ranks, post_ranks, method=method, moment=moment)
    assert small.ranks == ranks and small.post_ranks == post_ranks and small.scale == layer.scale
    assert (small.d_model, small.n_heads) == (layer.d_model, layer.n_heads)
    if may_be(ranks, (99, 99, 99)) and may_be(post_ranks, (99, 99, 99)):  # else a rank was cut to what the others allow
        assert max(tr.relative_errors(layer, small, moment)) <= allowed + 1e-6
    assert small(random_tensor(data.draw, 1, 3, layer.d_model)).shape == (1, 3, layer.d_model)
    assert tr.relative_errors(layer, layer) == pytest.approx(
        (0, 0), abs=1e-6
    )  # factors that cancel lose two digits of the 1e-8
    budget = data.draw(st.integers(1, 60))
    try:
        ranks, post_ranks = tr.choose_ranks(layer, max_cache=budget)
    except ValueError as error:
        assert f"max_cache = {budget}: even the smallest ranks" in str(error)
    else:
        assert ranks[2] + post_ranks[2] <= budget


@given(st.builds(with_large_weights, grouped(), st.integers(0, 99)), st.sampled_from(("svd", "mean")), st.booleans(), st.data())
@contract("to_gqa", "to_mla")
def test_conversions_have_the_sizes_asked_for_and_are_exact_where_nothing_is_lost(layer, method, shared, data):
    x = random_tensor(data.draw, 2, 4, layer.d_model)
    sources = layer.k_proj.out_features // layer.head_dim
    groups = data.draw(st.sampled_from([g for g in range(1, sources + 1) if sources % g == 0]))
    small = tr.to_gqa(layer, groups, method=method)
    assert small.n_kv_heads == groups and small(x).shape == x.shape
    if groups == sources:
        assert close(small(x).detach(), layer(x).detach(), 1e-8)
    if layer.bias:
        with pytest.raises(ValueError, match="MLA has no biases"):
            tr.to_mla(layer, 1, 1)
        return
    widest = min(layer.d_model, sources * layer.head_dim)
    q_rank, kv_rank = (
        data.draw(st.integers(1, min(layer.d_model, layer.n_heads * layer.head_dim))),
        data.draw(st.integers(1, widest)),
    )
    assume(layer.rotary is None or kv_rank % 2 == 0)
    try:
        small = tr.to_mla(layer, q_rank, kv_rank, shared_kv=shared)
    except ValueError as error:
        assert "at most" in str(error) or "latent wider" in str(error)
        return
    assert (small.q_rank, small.kv_rank, small.shared_kv) == (q_rank, kv_rank, shared) and small(x).shape == x.shape


@given(grouped() | latent() | tucker(), st.integers(1, 5))
@contract("Cost", "mha_cost", "gqa_cost", "mla_cost", "tucker_cost")
def test_costs_are_those_of_the_layer(layer, n):
    if isinstance(layer, tr.GroupedQueryAttention):
        cost = tr.gqa_cost(layer.d_model, layer.n_heads, layer.n_kv_heads, layer.head_dim)
    elif isinstance(layer, tr.MultiHeadAttention):
        cost = tr.mha_cost(layer.d_model, layer.n_heads, layer.head_dim)
    elif isinstance(layer, tr.MultiHeadLatentAttention):
        sizes = (layer.d_model, layer.n_heads, layer.q_rank, layer.kv_rank, layer.head_dim, layer.v_head_dim)
        cost = tr.mla_cost(*sizes, layer.shared_kv, layer.rope_dim)
    else:
        cost = tr.tucker_cost(layer.d_model, layer.n_heads, layer.ranks, layer.post_ranks, layer.shared_kv)
    counted = sum(p.numel() for name, p in layer.named_parameters() if "bias" not in name and "norm" not in name)
    if isinstance(layer, tr.TuckerAttention) and layer.bias:
        s, t, v = layer.ranks[1], layer.ranks[2], 0 if layer.shared_kv else layer.post_ranks[2]
        counted -= s + t + v  # the bias rows
    assert cost.parameters == counted and cost.parameter_bytes(3) == 6 * counted
    assert layer.float().new_cache(1, n).nbytes == cost.cache_bytes(n, bytes_per_number=4)
    assert cost.flops(n) == 2 * (cost.once + n * cost.projections + n * n * cost.attention)


# Anything at all: a layer that works, or a ValueError, and no other error


ANY = st.integers(-1, 6) | st.sampled_from((None, True, 2.0, "2", math.nan, (1, 2, 2)))
RANKS = st.lists(ANY, min_size=0, max_size=4) | ANY
MAKERS = {
    "MultiHeadAttention": lambda a: tr.MultiHeadAttention(a(), a(), head_dim=a(), bias=a()),
    "GroupedQueryAttention": lambda a: tr.GroupedQueryAttention(a(), a(), a(), head_dim=a(), bias=a()),
    "MultiHeadLatentAttention": lambda a: tr.MultiHeadLatentAttention(
        a(), a(), a(), a(), head_dim=a(), v_head_dim=a(), rope_dim=a()
    ),
    "TuckerAttention": lambda a: tr.TuckerAttention(a(), a(), a(RANKS), a(RANKS), scale=a(), init=a()),
    "Rotary": lambda a: tr.Rotary.heads(a(), a(), a()),
    "Cache": lambda a: tr.Cache({"key": (1, 2)}, a(), a(), dtype=torch.float32, device="cpu"),
    "mha_cost": lambda a: tr.mha_cost(a(), a(), a()),
    "gqa_cost": lambda a: tr.gqa_cost(a(), a(), a(), a()),
    "mla_cost": lambda a: tr.mla_cost(a(), a(), a(), a(), a(), a()),
    "tucker_cost": lambda a: tr.tucker_cost(a(), a(), a(RANKS), a(RANKS)),
    "unfold": lambda a: tr.unfold(np.ones((2, 3)), a()),
    "fold": lambda a: tr.fold(np.ones((2, 3)), a(), (2, 3)),
    "mode_product": lambda a: tr.mode_product(np.ones((2, 3)), np.ones((2, 2)), a()),
    "hosvd": lambda a: tr.hosvd(np.ones((2, 3, 4)), a(RANKS)),
    "sthosvd": lambda a: tr.sthosvd(np.ones((2, 3, 4)), a(RANKS)),
    "hooi": lambda a: tr.hooi(np.ones((2, 3, 4)), a(RANKS)),
    "compress": lambda a: tr.compress(tr.MultiHeadAttention(4, 2), a(RANKS), a(RANKS)),
    "to_gqa": lambda a: tr.to_gqa(tr.MultiHeadAttention(4, 4), a()),
    "to_mla": lambda a: tr.to_mla(tr.MultiHeadAttention(4, 2), a(), a()),
}


@pytest.mark.parametrize("name", MAKERS)
@given(st.data())
def test_any_argument_works_or_is_a_value_error(name, data):
    TRIED[f"any argument of {name}"] += 1
    try:
        made = MAKERS[name](lambda strategy=ANY: data.draw(strategy))
    except ValueError as error:
        assert str(error)
        return
    if isinstance(made, torch.nn.Module) and hasattr(made, "d_model"):
        assert made(torch.zeros(1, 2, made.d_model)).shape == (1, 2, made.d_model)
