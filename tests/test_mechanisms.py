"""Rungs 7-10: each mechanism against an independent implementation, in output and gradient."""

import copy
import functools
import math
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers import DIFFERENT, EXACT, output_and_gradient, relative_error, tokens, with_large_weights, worst_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tucker_ref import (
    GroupedQueryAttention,
    LatentNorm,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    TuckerWeights,
    compress,
    tensor_attention,
)
from tucker_ref.initialisation import shapes_alone
from tucker_ref.tucker_weights import latent_factors

CAUSAL = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
LENGTHS = pytest.mark.parametrize("batch, n_tokens", [(1, 1), (2, 7), (1, 63)])


def torch_mha(layer: MultiHeadAttention, causal: bool):
    """nn.MultiheadAttention with the same weights, as a function of x."""
    oracle = nn.MultiheadAttention(layer.d_model, layer.n_heads, bias=False, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        oracle.in_proj_weight.copy_(torch.cat([layer.q_proj.weight, layer.k_proj.weight, layer.v_proj.weight]))
        oracle.out_proj.weight.copy_(layer.o_proj.weight)

    def forward(x):
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if causal else None
        return oracle(x, x, x, attn_mask=hidden, need_weights=False)[0]

    return forward


@CAUSAL
@LENGTHS
@pytest.mark.parametrize("d_model, n_heads", [(15, 3), (24, 12), (20, 1)])
def test_mha_matches_torch(d_model, n_heads, batch, n_tokens, causal):
    layer, x = with_large_weights(MultiHeadAttention(d_model, n_heads)), tokens(batch, n_tokens, d_model)
    expected = output_and_gradient(torch_mha(layer, causal), x)
    for backend in ("reference", "sdpa"):
        actual = output_and_gradient(layer, x, causal=causal, backend=backend)
        assert max(relative_error(a, e) for a, e in zip(actual, expected)) < EXACT
    if n_tokens > 1:
        assert relative_error(layer(x, causal=not causal), expected[0]) > DIFFERENT  # control
    if n_tokens > 1 and n_heads > 1:
        with torch.no_grad():
            layer.q_proj.weight.copy_(layer.q_proj.weight.unflatten(0, (n_heads, -1)).flip(0).flatten(0, 1))
        assert relative_error(layer(x, causal=causal), expected[0]) > DIFFERENT  # control: query heads in another order


@CAUSAL
@LENGTHS
@pytest.mark.parametrize("n_heads, n_kv_heads", [(12, 4), (12, 1), (6, 6), (3, 1)])
def test_gqa_is_mha_with_repeated_keys_and_values(n_heads, n_kv_heads, batch, n_tokens, causal):
    layer = with_large_weights(GroupedQueryAttention(24, n_heads, n_kv_heads, head_dim=5))
    x = tokens(batch, n_tokens, 24)

    def repeated(pattern):
        mha = MultiHeadAttention(24, n_heads, head_dim=5).double()
        with torch.no_grad():
            mha.q_proj.weight.copy_(layer.q_proj.weight)
            mha.o_proj.weight.copy_(layer.o_proj.weight)
            for name in ("k_proj", "v_proj"):
                heads = getattr(layer, name).weight.unflatten(0, (n_kv_heads, 5))[pattern]
                getattr(mha, name).weight.copy_(heads.flatten(0, 1))
        return mha

    groups = torch.arange(n_kv_heads).repeat_interleave(n_heads // n_kv_heads)
    assert worst_error(layer, repeated(groups), x, causal=causal) < EXACT
    if 1 < n_kv_heads < n_heads:  # control: heads dealt out to the groups in turn
        dealt = torch.arange(n_kv_heads).repeat(n_heads // n_kv_heads)
        assert relative_error(layer(x, causal=causal), repeated(dealt)(x, causal=causal)) > DIFFERENT


@pytest.mark.parametrize("bias", [False, True, "qkv"])
def test_grouped_heads_have_the_biases_asked_for_and_turn(bias):
    options = dict(bias=bias, rotary=Rotary.heads(4, base=50.0))
    layer, mha = with_large_weights(GroupedQueryAttention(24, 6, 2, **options)), MultiHeadAttention(24, 6, **options).double()
    for made in (layer, mha):
        assert made.bias == bias and made.rotary is options["rotary"]
        assert [(p.bias is not None) for p in (made.q_proj, made.k_proj, made.v_proj)] == [bool(bias)] * 3
        assert (made.o_proj.bias is not None) == (bias is True)
    with torch.no_grad():
        for name, theirs in mha.named_parameters():
            ours = layer.get_parameter(name)
            if name.startswith(("k_proj", "v_proj")):
                ours = ours.unflatten(0, (2, 4)).repeat_interleave(3, 0).flatten(0, 1)
            theirs.copy_(ours)
    x = tokens(2, 7, 24)
    assert worst_error(layer, mha, x) < EXACT
    mha.rotary = None
    assert relative_error(layer(x), mha(x)) > DIFFERENT  # control


def test_a_fresh_mha_starts_as_gpt2_does():
    torch.manual_seed(0)
    layer = MultiHeadAttention(256, 4, bias=True)
    stds = [p.weight.std().item() for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)]
    assert stds == pytest.approx([0.02] * 4, rel=0.03)
    assert not any(p.bias.any() for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj))
    layer.reset_parameters(std=0.1, output_gain=0.5)
    stds = [p.weight.std().item() for p in (layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)]
    assert stds == pytest.approx([0.1, 0.1, 0.1, 0.05], rel=0.03)


def mla_by_hand(layer: MultiHeadLatentAttention, x: torch.Tensor, causal: bool) -> torch.Tensor:
    """MLA as the DeepSeek-V2 paper writes it, one head at a time."""

    def norm(c, name):
        return c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt() * getattr(layer, name).weight if layer.latent_norm else c

    k, v = layer.head_dim, layer.v_head_dim
    c_q = norm(x @ layer.q_a_proj.weight.T, "q_a_layernorm")
    c_k = norm(x @ layer.kv_a_proj_with_mqa.weight.T, "kv_a_layernorm")
    c_v = c_k if layer.shared_kv else norm(x @ layer.v_a_proj.weight.T, "v_a_layernorm")
    y = torch.zeros_like(x)
    for h in range(layer.n_heads):
        w_uq = layer.q_b_proj.weight[h * k : (h + 1) * k]
        up = layer.kv_b_proj.weight[h * (k + v) : (h + 1) * (k + v)]
        logits = (c_q @ w_uq.T) @ (c_k @ up[:k].T).transpose(1, 2) / math.sqrt(k)
        if causal:
            logits = logits.masked_fill(torch.ones_like(logits, dtype=torch.bool).triu(1), -torch.inf)
        y = y + logits.softmax(-1) @ (c_v @ up[k:].T) @ layer.o_proj.weight[:, h * v : (h + 1) * v].T
    return y


@CAUSAL
@LENGTHS
@pytest.mark.parametrize("latent_norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("shared_kv", [True, False], ids=["shared", "separated"])
@pytest.mark.parametrize("sizes", [(24, 3, 7, 5, None, None), (24, 12, 10, 6, 4, 3)])
def test_mla_naive_and_absorbed_match_the_papers_formula(sizes, shared_kv, latent_norm, batch, n_tokens, causal):
    d, h, q_rank, kv_rank, k, v = sizes
    options = dict(head_dim=k, v_head_dim=v, shared_kv=shared_kv, latent_norm=latent_norm)
    naive = with_large_weights(MultiHeadLatentAttention(d, h, q_rank, kv_rank, **options))
    absorbed = MultiHeadLatentAttention(d, h, q_rank, kv_rank, absorb=True, **options).double()
    absorbed.load_state_dict(naive.state_dict())
    x = tokens(batch, n_tokens, d)
    expected = output_and_gradient(lambda x: mla_by_hand(naive, x, causal), x)
    for layer in (naive, absorbed):
        actual = output_and_gradient(layer, x, causal=causal)
        assert max(relative_error(a, e) for a, e in zip(actual, expected)) < EXACT
    if n_tokens > 1:  # control: the latent's width in the scale, SDPA's default on the absorbed path
        absorbed.scale = kv_rank**-0.5
        assert relative_error(absorbed(x, causal=causal), expected[0]) > DIFFERENT or kv_rank == naive.head_dim


TUCKER = [  # d, h, ranks, post_ranks, shared
    (15, 3, (2, 6, 5), None, False),
    (24, 12, (8, 8, 8), (5, 9, 4), False),  # r1 < n_H, r3 different from r~3
    (24, 12, (12, 24, 24), None, False),  # maximal ranks
    (24, 12, (3, 6, 7), (12, 9, 7), True),
    (20, 1, (1, 4, 4), None, False),
]


@CAUSAL
@LENGTHS
@pytest.mark.parametrize("d, h, ranks, post_ranks, shared_kv", TUCKER)
def test_def_2_1_tucker_attention_is_eq6_on_its_dense_tensors(d, h, ranks, post_ranks, shared_kv, batch, n_tokens, causal):
    layer = with_large_weights(TuckerAttention(d, h, ranks, post_ranks, shared_kv=shared_kv))
    x = tokens(batch, n_tokens, d)
    pre, post = layer.pre.numpy().to_tensor(), layer.post.numpy().to_tensor()
    assert relative_error(layer.pre.to_tensor(), pre) < EXACT and relative_error(layer.post.to_tensor(), post) < EXACT

    def specification(pre, post, scale=(d / h) ** -0.5):
        return np.stack([tensor_attention(sequence, pre, post, scale, causal) for sequence in x.numpy()])

    actual = layer(x, causal=causal)
    assert relative_error(actual, specification(pre, post)) < EXACT
    assert relative_error(layer(x, causal=causal, backend="reference"), specification(pre, post)) < EXACT
    assert relative_error(actual, specification(pre, post.transpose(0, 2, 1))) > DIFFERENT  # control: missing transpose
    if n_tokens > 1:
        assert relative_error(actual, specification(pre.transpose(0, 2, 1), post)) > DIFFERENT  # control
        assert relative_error(actual, specification(pre, post, ranks[2] ** -0.5)) > DIFFERENT or ranks[2] * h == d  # control


@pytest.mark.parametrize("d, h, ranks, post_ranks, shared_kv", TUCKER)
def test_tucker_gradients_are_those_of_the_reference_backend_and_of_finite_differences(d, h, ranks, post_ranks, shared_kv):
    layer = with_large_weights(TuckerAttention(d, h, ranks, post_ranks, shared_kv=shared_kv))
    x = tokens(2, 7, d)
    by_backend = []
    for backend in ("reference", "sdpa"):
        layer.zero_grad()
        layer(x, backend=backend).square().sum().backward()
        by_backend.append([p.grad.clone() for p in layer.parameters()])
    assert len(by_backend[0]) == (7 if shared_kv else 8)  # all eight factors are trainable; shared KV has one fewer
    assert max(relative_error(a, b) for a, b in zip(*by_backend)) < EXACT
    # One directional derivative by central differences: an oracle that shares no code with autograd.
    direction = tokens(2, 7, d, seed=1)
    value = lambda t: layer(x + t * direction).square().sum().item()  # noqa: E731
    _, gradient = output_and_gradient(layer, x)
    x_grad = torch.autograd.grad(layer(y := x.clone().requires_grad_()).square().sum(), y)[0]
    assert (x_grad * direction).sum().item() == pytest.approx((value(1e-6) - value(-1e-6)) / 2e-6, rel=1e-5)
    assert gradient.shape == x.shape


def test_tucker_is_gauge_invariant():
    """U_n -> U_n A with C -> C x_n A^-1 changes nothing, in any mode of either tensor."""
    layer, x = with_large_weights(TuckerAttention(24, 6, (4, 8, 7), (3, 6, 5))), tokens(2, 9, 24)
    expected = layer(x).detach()
    for weights in (layer.pre, layer.post):
        for mode, factor in enumerate(weights.factors):
            rank = factor.shape[1]
            a = torch.randn(rank, rank, generator=torch.Generator().manual_seed(mode), dtype=torch.float64) + 3 * torch.eye(
                rank
            )
            with torch.no_grad():
                factor.copy_(factor @ a)
                assert relative_error(layer(x), expected) > DIFFERENT  # control: the factor alone
                weights.core.copy_(torch.tensordot(torch.linalg.inv(a), weights.core, dims=([1], [mode])).movedim(0, mode))
            assert relative_error(layer(x), expected) < 1e-11  # the inverse costs a digit


def test_shared_kv_is_one_parameter_that_survives_copies_and_state_dicts():
    layer = TuckerAttention(24, 6, (4, 8, 7), (3, 6, 7), shared_kv=True).double()
    assert layer.post.value is layer.pre.key
    other = TuckerAttention(24, 6, (4, 8, 7), (3, 6, 7), shared_kv=True).double()
    other.load_state_dict(layer.state_dict())
    x = tokens(1, 5, 24)
    assert other.post.value is other.pre.key and torch.equal(other(x), layer(x))


@pytest.mark.parametrize("init", ["orthonormal", "xavier"])
def test_construction_is_reproducible(init):
    layers = []
    for _ in range(2):
        torch.manual_seed(3)
        layers.append(TuckerAttention(24, 6, (4, 8, 7), init=init))
    assert all(torch.equal(a, b) for a, b in zip(layers[0].parameters(), layers[1].parameters()))


def first_logits_and_outputs(layer, x):
    """Per head, the scaled logits of x and the output when every head reads another single token."""
    as_seen = {}

    def capture(q, k, v, *, scale, **_):
        as_seen["logits"] = torch.einsum("bhnk,bgmk->bhnm", q, k) * scale if k.shape[1] == 1 else q @ k.mT * scale
        h, n = q.shape[1:3]
        v = v.expand(-1, h, -1, -1)
        return torch.stack([v[:, i].roll(i + 1, dims=1) for i in range(h)], dim=1)

    module = __import__(type(layer).__module__, fromlist=["attend"])
    original, module.attend = module.attend, capture
    try:
        outputs = layer(x)
    finally:
        module.attend = original
    return as_seen["logits"], outputs


@pytest.mark.parametrize("gain", [1.0, 0.2], ids=["gain1", "gain0.2"])
@pytest.mark.parametrize(
    "make",
    [
        lambda d: MultiHeadAttention(d, 12),
        lambda d: MultiHeadLatentAttention(d, 12, 48, 32),
        lambda d: TuckerAttention(d, 12, (8, 32, 32)),
        lambda d: TuckerAttention(d, 12, (12, 64, 16), (3, 20, 48)),
        lambda d: TuckerAttention(d, 12, (8, 24, 32), (8, 48, 32), shared_kv=True),
        lambda d: TuckerAttention(d, 12, (8, 32, 32), scale=1.0),
    ],
    ids=["mha", "mla", "tucker", "tucker-unequal", "tucker-shared", "tucker-scale1"],
)
def test_initial_logits_and_outputs_have_the_promised_variance(make, gain):
    """All mechanisms start like an MHA of projection std 0.02: logits (d std^2)^2, outputs d std^2 * d (std gain)^2."""
    d, std = 192, 0.02
    logits, outputs = [], []
    torch.manual_seed(0)
    for _ in range(12):  # averaged over draws of the weights: one small core alone scatters by some ten per cent
        layer = make(d)
        layer.reset_parameters(std=std, output_gain=gain)
        a, b = first_logits_and_outputs(layer, torch.randn(2, 64, d))
        logits.append(a.var().item())
        outputs.append(b.var().item())
    assert np.mean(logits) == pytest.approx((d * std**2) ** 2, rel=0.15)
    assert np.mean(outputs) == pytest.approx(d * std**2 * d * (std * gain) ** 2, rel=0.15)


def test_a_rotated_latent_wider_than_the_model_starts_with_the_same_variance():
    torch.manual_seed(0)
    ratios = []
    for _ in range(40):
        layer = TuckerAttention(32, 4, (4, 32, 64), (4, 32, 32), rotary=Rotary.latent(64))
        logits, _ = first_logits_and_outputs(layer, torch.randn(2, 64, 32))
        ratios.append(logits.var().item() / (32 * 0.02**2) ** 2)
    assert np.mean(ratios) == pytest.approx(1.0, rel=0.15)


@pytest.mark.parametrize("init", ["orthonormal", "xavier"])
def test_layers_can_be_built_in_bfloat16_and_reset(init):
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer = TuckerAttention(24, 6, (4, 8, 7), bias=True, latent_norm=True, init=init)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(5.0)
    layer.reset_parameters()
    assert (layer.output_bias == 0).all() and (layer.key_norm.weight == 1).all() and (layer.pre.key[24] == 0).all()
    assert not (layer.pre.core == 5).any()


def test_xavier_starts_elsewhere():
    """Control for the test above: the authors' initialisation does not have those variances."""
    torch.manual_seed(0)
    logits, outputs = first_logits_and_outputs(TuckerAttention(192, 12, (8, 32, 32), init="xavier"), torch.randn(2, 64, 192))
    assert not 0.5 < logits.var().item() / (192 * 0.02**2) ** 2 < 2
    assert not 0.5 < outputs.var().item() / (192 * 0.02**2) ** 2 < 2


def test_orthonormal_factors_are_orthonormal():
    layer = TuckerAttention(24, 6, (4, 8, 7)).double()
    layer.reset_parameters()
    for factor in (*layer.pre.factors, *layer.post.factors):
        assert relative_error(factor.T @ factor, torch.eye(factor.shape[1], dtype=torch.float64)) < EXACT


LAYERS = {
    "mha": lambda **o: MultiHeadAttention(12, 3, **o),
    "gqa": lambda **o: GroupedQueryAttention(12, 6, 2, **o),
    "mla": lambda **o: MultiHeadLatentAttention(12, 3, 6, 5, **o),
    "tucker": lambda **o: TuckerAttention(12, 3, (2, 4, 5), **o),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("shape", [(2, 7, 11), (7, 12), (2, 3, 7, 12)])
def test_x_of_the_wrong_shape_is_named(name, shape):
    with pytest.raises(ValueError, match=r"x has shape .*d_model = 12"):
        LAYERS[name]()(torch.ones(shape))


@pytest.mark.parametrize("name", LAYERS)
def test_an_unknown_backend_is_named(name):
    with pytest.raises(ValueError, match="backend is 'fast'"):
        LAYERS[name]()(torch.ones(2, 7, 12), backend="fast")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MultiHeadAttention(10, 3), "n_heads is 3; it must divide d_model = 10"),
        (lambda: MultiHeadAttention(0, 3), "d_model is 0"),
        (lambda: MultiHeadAttention(12, -1), "n_heads is -1"),
        (lambda: MultiHeadAttention(12, 3, head_dim=0), "head_dim is 0"),
        (lambda: GroupedQueryAttention(12, 6, 4), "n_kv_heads is 4; it must divide n_heads = 6"),
        (lambda: GroupedQueryAttention(12, 6, 0), "n_kv_heads is 0"),
        (lambda: MultiHeadLatentAttention(12, 3, 13, 5), "q_rank is 13"),
        (lambda: MultiHeadLatentAttention(12, 3, 6, 0), "kv_rank is 0"),
        (lambda: MultiHeadLatentAttention(12, 3, 6, 5, v_head_dim=0), "v_head_dim is 0"),
        (lambda: TuckerAttention(12, 3, (4, 4, 4)), r"ranks\[0\] is 4.*at most 3.*mode's size 3"),
        (lambda: TuckerAttention(12, 3, (3, 13, 5)), r"ranks\[1\] is 13.*at most 12"),
        (lambda: TuckerAttention(12, 3, (2, 2, 5)), r"ranks\[2\] is 5.*at most 4.*product of the other ranks 4"),
        (lambda: TuckerAttention(12, 3, (3, 1, 2)), r"ranks\[0\] is 3.*at most 2"),
        (lambda: TuckerAttention(12, 3, (2, 4, 5), (2, 12, 5)), r"post_ranks\[1\] is 12.*at most 10"),
        (lambda: TuckerAttention(12, 3, (2, 4)), "ranks is .* 3 integers"),
        (lambda: TuckerAttention(12, 3, (2, 4, True)), r"ranks\[2\] is True"),
        (lambda: TuckerAttention(12, 3, (2, 4, 5), (2, 4, 4), shared_kv=True), r"post_ranks\[2\] is 4.*ranks\[2\] = 5"),
        (lambda: TuckerAttention(12, 3, (2, 4, 5), scale=float("nan")), "scale is nan"),
        (lambda: TuckerAttention(12, 3, (2, 4, 5), scale=float("inf")), "scale is inf"),
        (lambda: TuckerAttention(12, 3, (2, 4, 5), init="zeros"), "init is 'zeros'"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.no_cover  # of which the compiler would take twice as long
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_compiles_into_one_graph(name):
    torch.compiler.reset()
    layer = LAYERS[name]()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n_tokens in (7, 5):
        x = torch.randn(2, n_tokens, 12)
        torch.testing.assert_close(compiled(x), layer(x))
        positions = torch.arange(n_tokens) + 3
        torch.testing.assert_close(compiled(x, positions=positions), layer(x, positions=positions))


@pytest.mark.parametrize("name", LAYERS)
def test_attend_is_told_what_the_layer_is_told(name, monkeypatch):
    layer, told = LAYERS[name](), []
    module = __import__(MultiHeadAttention.__module__ if name == "gqa" else type(layer).__module__, fromlist=["attend"])
    attend = module.attend
    monkeypatch.setattr(module, "attend", lambda *qkv, **options: told.append(options) or attend(*qkv, **options))
    mask = torch.ones(3, 3, dtype=torch.bool)
    layer(torch.ones(1, 3, 12), causal=False, mask=mask, backend="math")
    assert told == [dict(scale=layer.scale, causal=False, mask=mask, backend="math")]


@pytest.mark.parametrize("name", LAYERS)
def test_positions_are_checked_even_where_nothing_turns(name):
    with pytest.raises(ValueError, match="positions is torch.float32"):
        LAYERS[name]()(torch.ones(1, 3, 12), positions=torch.ones(3))


@pytest.mark.parametrize("name", LAYERS)
def test_weights_start_at_std_0_02_without_a_gain(name):
    layers = LAYERS[name](), LAYERS[name]()
    for layer, arguments in zip(layers, ((), (0.02, 1.0))):
        torch.manual_seed(5)
        layer.reset_parameters(*arguments)
    assert all(torch.equal(a, b) for a, b in zip(layers[0].parameters(), layers[1].parameters()))


@pytest.mark.parametrize("shared_kv", [True, False])
def test_mla_fills_every_projection_with_its_own_spread(shared_kv):
    torch.manual_seed(0)
    rotary = Rotary.heads(16)
    layer = MultiHeadLatentAttention(256, 4, 64, 48, shared_kv=shared_kv, rope_dim=16, rotary=rotary)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(9.0)
    layer.reset_parameters(std=0.1, output_gain=0.5)
    down, key_rope = layer.kv_a_proj_with_mqa.weight.split([48, 16])
    expected = [(layer.q_a_proj.weight, 256**-0.5), (down, 256**-0.5), (key_rope, 0.1), (layer.q_b_proj.weight, 0.1 * 2)]
    expected += [(layer.kv_b_proj.weight, 0.1 * (256 / 48) ** 0.5), (layer.o_proj.weight, 0.05)]
    expected += [] if shared_kv else [(layer.v_a_proj.weight, 256**-0.5)]
    for weight, std in expected:
        assert weight.std().item() == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize("init", ["orthonormal", "xavier"])
@pytest.mark.parametrize("shared_kv", [True, False])
def test_tucker_fills_every_factor_and_the_bias_rows_with_zeros(init, shared_kv):
    torch.manual_seed(0)
    layer = TuckerAttention(40, 8, (4, 16, 12), shared_kv=shared_kv, bias=True, init=init)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(9.0)
    layer.reset_parameters()
    for weights in (layer.pre, layer.post):
        for name, factor in zip(weights.names, weights.factors):
            filled = factor if name in ("head", "output") else factor[:-1]
            assert (filled != 9).all() and filled.std() > 0
            assert name in ("head", "output") or not factor[-1].any()
            if init == "orthonormal":
                assert relative_error(filled.T @ filled, torch.eye(factor.shape[1])) < 1e-5
            else:  # uniform within sqrt(6 / (rows + columns))
                assert filled.abs().max().item() == pytest.approx((6 / sum(filled.shape)) ** 0.5, rel=0.1)
        assert (weights.core != 9).all()
    limit = (6 / ((16 + 4) * 12)) ** 0.5  # of a (4, 16, 12) core, as torch counts what goes in and out
    if init == "xavier":
        assert layer.pre.core.abs().max().item() == pytest.approx(limit, rel=0.05)
        layer.reset_parameters(output_gain=0.1)
        assert layer.post.core.abs().max().item() == pytest.approx(0.1 * limit, rel=0.05)


def test_a_value_latent_wider_than_the_model_starts_with_the_same_variance():
    torch.manual_seed(0)
    ratios = []
    for _ in range(40):
        layer = TuckerAttention(32, 4, (4, 32, 64), (4, 32, 64), shared_kv=True, rotary=Rotary.latent(64))
        _, outputs = first_logits_and_outputs(layer, torch.randn(2, 64, 32))
        ratios.append(outputs.var().item() / (32 * 0.02**2) ** 2)
    assert np.mean(ratios) == pytest.approx(1.0, rel=0.15)


def test_a_tucker_bias_reads_a_constant_one():
    layer = with_large_weights(TuckerAttention(12, 3, (2, 4, 5), bias=True))
    x = tokens(1, 4, 12)
    with torch.no_grad():
        keys = x @ layer.pre.key[:-1] + layer.pre.key[-1]
        values = x @ layer.post.value[:-1] + layer.post.value[-1]
        queries = x @ layer.pre.query[:-1] + layer.pre.query[-1]
        expected = layer.output_bias
        for before, after in zip(layer.pre.head_cores(), layer.post.head_cores()):
            weights = (queries @ before @ keys.mT * layer.scale).softmax(-1)
            expected = expected + weights @ values @ after.T @ layer.post.output.T
    assert relative_error(layer(x, causal=False), expected) < EXACT


def test_more_heads_than_channels_start_orthonormal_too():
    layer = TuckerAttention(2, 4, (3, 2, 2))
    for weights in (layer.pre, layer.post):
        assert relative_error(weights.head.T @ weights.head, torch.eye(3)) < 1e-5


def test_weights_are_kept_without_gaps():
    """Kernels and checkpoints read memory in order, however the tensors that were handed over lie in it."""
    factors = {"head": torch.randn(2, 4), "query": torch.randn(3, 8), "key": torch.randn(5, 8)}
    weights = TuckerWeights(torch.randn(5, 3, 2).permute(2, 1, 0), {name: factor.T for name, factor in factors.items()})
    assert all(p.is_contiguous() for p in weights.parameters()) and torch.equal(weights.key, factors["key"].T)


def test_a_layer_from_weights_knows_that_its_latents_are_normalised():
    norms = tuple(LatentNorm(width) for width in (4, 5, 5))
    for given in (None, norms):
        layer = TuckerAttention(12, 3, (2, 4, 5))
        made = TuckerAttention.from_weights(layer.pre, layer.post, scale=0.3, norms=given)
        assert made.latent_norm == (given is not None) and (made.key_norm is norms[1]) == (given is not None)


def test_what_is_moved_alone_leaves_its_parts_behind():
    layer = TuckerAttention(12, 3, (2, 4, 5), bias=True, shared_kv=True)
    layer.to_empty(device="meta", recurse=False)
    assert layer.output_bias.is_meta and not any(p.is_meta for p in (*layer.pre.parameters(), *layer.post.parameters()))
    layer.to_empty(device="meta")
    assert all(p.is_meta for p in layer.parameters()) and layer.post.value is layer.pre.key


@pytest.mark.parametrize(
    "layer",
    [
        TuckerAttention(12, 3, (2, 4, 4), rotary=Rotary.latent(4)),
        TuckerAttention(12, 3, (2, 4, 4), shared_kv=True, rotary=Rotary.latent(4)),
        MultiHeadLatentAttention(12, 3, 4, 4, rotary=Rotary.latent(4)),
        MultiHeadAttention(12, 3, rotary=Rotary.heads(4)),
    ],
)
def test_positions_are_made_where_the_tokens_are(layer):
    """On PyTorch's "meta" device, which refuses to meet a tensor of another one."""
    layer = layer.to("meta")
    cache, x = layer.new_cache(2, 5), torch.empty(2, 3, 12, device="meta")
    assert layer(x).is_meta and layer(x, cache=cache).is_meta and cache.length == 3


@CAUSAL
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("n_tokens", [1, 2, 3])
def test_our_kernel_takes_over_from_two_queries_on(monkeypatch, n_tokens, turned, causal):
    pytest.importorskip("triton", reason="triton is not installed; on Linux it is in the dev extra")
    from tucker_ref.kernels import latent_attention as kernels

    calls, real = [], kernels.latent_attention
    monkeypatch.setattr(kernels, "latent_attention", lambda *a, **o: calls.append(a) or real(*a, **o))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer = (
        with_large_weights(TuckerAttention(8, 2, (2, 4, 4), rotary=Rotary.latent(4, 3.0) if turned else None))
        .float()
        .to(device)
    )
    x = tokens(2, n_tokens, 8).float().to(device)
    positions = torch.tensor([1, 4, 9], device=device)[:n_tokens] if turned else None
    expected = layer(x, causal=causal, positions=positions, backend="reference")
    assert relative_error(layer(x, causal=causal, positions=positions, backend="triton"), expected) < 1e-5
    assert len(calls) == (n_tokens > 1)
    if turned and n_tokens > 1:  # control
        assert relative_error(layer(x, causal=causal, backend="triton"), expected) > 1e-3


def test_normalised_latents_wider_than_the_model_start_with_the_promised_variance():
    torch.manual_seed(0)
    x, places = torch.randn(8, 64, 32), torch.zeros(64, dtype=torch.long)
    deviations = []
    for norm in (True, False):
        layer = TuckerAttention(32, 4, (4, 16, 256), (4, 16, 16), rotary=Rotary.latent(256), latent_norm=norm)
        p, k = layer.query_norm(x @ layer.pre.query), layer.key_norm(x @ layer.pre.key)
        logits = torch.einsum("bns,hst,bmt->bhnm", p, layer.pre.head_cores(), layer.rotary(k, places)) * layer.scale
        deviations.append((logits.var() / (32 * 0.02**2) ** 2).item())
    assert deviations == pytest.approx([1, 1], rel=0.25)


def test_mla_resets_its_norms():
    layer = MultiHeadLatentAttention(24, 4, 10, 8, latent_norm=True, shared_kv=False)
    norms = (layer.q_a_layernorm, layer.kv_a_layernorm, layer.v_a_layernorm)
    with torch.no_grad():
        for norm in norms:
            norm.weight.fill_(5.0)
    layer.reset_parameters()
    assert all((norm.weight == 1).all() for norm in norms)


def test_two_latents_do_not_load_into_one():
    separate, shared = TuckerAttention(24, 4, (3, 8, 8)), TuckerAttention(24, 4, (3, 8, 8), shared_kv=True)
    with pytest.raises(RuntimeError, match="pre.key and post.value differ; this layer shares one latent"):
        shared.load_state_dict(separate.state_dict())
    other = TuckerAttention(24, 4, (3, 8, 8), shared_kv=True)
    other.load_state_dict(shared.state_dict())  # control: its own kind does
    assert torch.equal(other.pre.key, shared.pre.key) and other.post.value is other.pre.key
    with torch.device("meta"):
        empty = TuckerAttention(24, 4, (3, 8, 8), shared_kv=True)
    empty.load_state_dict(shared.state_dict(), assign=True)
    assert torch.equal(empty.pre.key, shared.pre.key)


def test_half_precision_becomes_numpy_in_single():
    layer = TuckerAttention(24, 4, (3, 8, 8)).bfloat16()
    assert layer.pre.numpy().core.dtype == np.float32


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("names", [("pre.key",), ("post.value",), ("pre.key", "post.value")])
def test_a_shared_latent_loads_under_either_name_and_under_both(names, assign):
    """Files from before hold it twice, and files that hold every tensor once may have kept the second name."""
    layer, other = (TuckerAttention(24, 4, (3, 8, 8), shared_kv=True) for _ in range(2))
    assert "post.value" not in layer.state_dict() and layer.get_parameter("post.value") is layer.pre.key
    state = {name: tensor for name, tensor in layer.state_dict().items() if name != "pre.key"}
    state |= {name: layer.pre.key.detach().clone() for name in names}
    wrapped = nn.Sequential(other)
    wrapped.load_state_dict({f"0.{name}": tensor for name, tensor in state.items()}, assign=assign)
    assert torch.equal(other.pre.key, layer.pre.key) and other.post.value is other.pre.key
    assert set(names) <= set(state)  # what was handed over stays as it was
    for name in names:
        del state[name]
    with pytest.raises(RuntimeError, match='Missing key.*"pre.key"'):  # control: under none
        other.load_state_dict(state)


def test_separate_latents_need_both_names():
    state = TuckerAttention(24, 4, (3, 8, 8)).state_dict()
    del state["post.value"]
    with pytest.raises(RuntimeError, match="Missing key"):
        TuckerAttention(24, 4, (3, 8, 8)).load_state_dict(state)


def test_a_shared_latent_of_a_run_that_diverged_can_be_loaded():
    layer, other = (TuckerAttention(24, 4, (3, 8, 8), shared_kv=True) for _ in range(2))
    with torch.no_grad():
        layer.pre.key[0, 0] = math.nan
    state = layer.state_dict()
    state["post.value"] = state["pre.key"].clone()
    other.load_state_dict(state)
    assert other.pre.key[0, 0].isnan() and torch.equal(other.pre.key[1:], layer.pre.key[1:])
    key = state["pre.key"]
    for different in (
        torch.zeros_like(key),
        key[:, :4],
        key.double(),
        key.view(torch.int32) ^ 1,
    ):  # the last by their last bits
        state["post.value"] = different.view(torch.float32) if different.dtype == torch.int32 else different
        with pytest.raises(RuntimeError, match="pre.key and post.value differ"):
            other.load_state_dict(state)


@pytest.mark.parametrize("shared_kv", [False, True])
def test_safetensors_saves_and_loads_whole_models(tmp_path, shared_kv):
    """Its own pair for models that share tensors, which is strict; and a file that kept the other name of the latent."""
    layer, x = TuckerAttention(24, 4, (3, 8, 8), shared_kv=shared_kv), torch.randn(2, 5, 24)
    safetensors.torch.save_model(layer, tmp_path / "layer.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "layer.safetensors")
    assert set(tensors) == set(layer.state_dict()) and ("post.value" in tensors) != shared_kv
    if shared_kv:
        tensors["post.value"] = tensors.pop("pre.key")
    safetensors.torch.save_file(tensors, tmp_path / "before.safetensors")
    for name in ("layer", "before"):
        other = TuckerAttention(24, 4, (3, 8, 8), shared_kv=shared_kv)
        assert not torch.equal(other(x), layer(x))  # control
        safetensors.torch.load_model(other, tmp_path / f"{name}.safetensors")
        assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_copies_share_their_own_latent(copied):
    layer, x = TuckerAttention(24, 4, (3, 8, 8), shared_kv=True), torch.randn(2, 5, 24)
    other = copied(layer)
    assert other.post.value is other.pre.key is not layer.pre.key and torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.pre.key += 1
    assert torch.equal(other.post.value, other.pre.key) and not torch.equal(other(x), layer(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_values_follow_whatever_replaces_the_shared_latent():
    replaced, parametrised = (TuckerAttention(24, 4, (3, 8, 8), shared_kv=True) for _ in range(2))
    replaced.pre.key = nn.Parameter(torch.randn(24, 8))
    nn.utils.parametrizations.orthogonal(parametrised.pre, "key")
    assert replaced.post.value is replaced.pre.key and torch.equal(parametrised.post.value, parametrised.pre.key)
    x = torch.randn(2, 5, 24)
    for layer in (replaced, parametrised):
        y = layer(x)
        layer.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer.to(torch.float64)(x.double()), y.double())
        torch.testing.assert_close(compress(layer, layer.ranks)(x.double()), y.double())
    with pytest.raises(KeyError, match="'value' already exists"):  # it is not the second tensor's to replace
        replaced.post.value = nn.Parameter(torch.randn(24, 8))


def test_weights_of_another_layer_bring_their_latent_along():
    """A tensor that read its value latent from another tensor holds it itself where that one is not there."""
    layer, other = (TuckerAttention(24, 4, (3, 8, 8), shared_kv=True) for _ in range(2))
    apart = TuckerAttention.from_weights(other.pre, layer.post, scale=layer.scale)
    assert not apart.shared_kv and apart.post.value is layer.pre.key and apart.pre.key is other.pre.key
    together = TuckerAttention.from_weights(layer.pre, layer.post, scale=layer.scale)
    assert together.shared_kv and together.post.value is together.pre.key is layer.pre.key
    x = torch.randn(2, 5, 24)
    assert torch.equal(together(x), layer(x)) and not torch.equal(apart(x), layer(x))
    read = latent_factors(layer.pre, layer.post)
    assert len(read) == 2 and read[0] is layer.pre.query and read[1] is layer.pre.key  # a shared latent is made once
    assert latent_factors(apart.pre, apart.post)[2] is apart.post.value


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda pre, post: (post, pre), "pre has the factors head, output, value; it must have head, query, key"),
        (lambda pre, post: (pre, pre), "post has the factors head, query, key; it must have head, output, value"),
        (lambda pre, post: (weights_like(pre, head=torch.ones(6, 5)), post), r"pre.head has shape \(6, 5\).*\(6, 4\)"),
        (lambda pre, post: (weights_like(pre, query=torch.ones(25, 9)), post), r"pre.query has shape \(25, 9\).*\(24, 9\)"),
        (lambda pre, post: (weights_like(pre, key=torch.ones(24, 7)), post), r"pre.key has shape \(24, 7\).*\(24, 8\)"),
        (lambda pre, post: (pre, weights_like(post, head=torch.ones(5, 3))), r"post.head has shape \(5, 3\).*\(6, 3\)"),
        (lambda pre, post: (pre, weights_like(post, output=torch.ones(24, 6))), r"post.output has shape \(24, 6\).*\(24, 7\)"),
        (lambda pre, post: (pre, weights_like(post, value=torch.ones(25, 5))), r"post.value has shape \(25, 5\).*\(24, 5\)"),
    ],
)
def test_weights_that_do_not_fit_together_make_no_layer(change, message):
    layer = TuckerAttention(24, 6, (4, 9, 8), (3, 7, 5))
    with pytest.raises(ValueError, match=f"^{message}"):
        TuckerAttention.from_weights(*change(layer.pre, layer.post), scale=1.0)
    made = TuckerAttention.from_weights(layer.pre, layer.post, scale=1.0)  # control
    assert made.pre is layer.pre and made.post is layer.post  # with whatever hangs on them


@pytest.mark.parametrize(
    "bias, output_bias, found",
    [
        (False, torch.zeros(24), r"pre.query has shape \(24, 9\)"),
        (True, None, r"pre.query has shape \(25, 9\)"),
        (True, torch.zeros(1), r"output_bias has shape \(1,\)"),
    ],
)
def test_biases_that_do_not_fit_the_factors_make_no_layer(bias, output_bias, found):
    layer = TuckerAttention(24, 6, (4, 9, 8), bias=bias)
    with pytest.raises(ValueError, match=f"^{found}; beside the others it must have"):
        TuckerAttention.from_weights(layer.pre, layer.post, scale=1.0, output_bias=output_bias)
    made = TuckerAttention.from_weights(layer.pre, layer.post, scale=1.0, output_bias=layer.output_bias)  # control
    assert made.bias == bias


def weights_like(weights: TuckerWeights, **other: torch.Tensor) -> TuckerWeights:
    return TuckerWeights(weights.core, {name: getattr(weights, name) for name in weights.names} | other)


class Dispatched(TorchDispatchMode):
    """Notes the name of all that PyTorch runs, to the tensors' own methods."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


FILLED = {
    "by a method": lambda x: x.normal_(),
    "by a function": lambda x: nn.init.normal_(x),
    "by a function, named": lambda x: nn.init.normal_(tensor=x),
}


@pytest.mark.parametrize("how", FILLED)
def test_where_shapes_are_all_that_is_wanted_no_number_is_drawn(how):
    with shapes_alone(), Dispatched() as ran:
        x = torch.empty(2, 3)
        assert FILLED[how](x) is x and x.is_meta
        x.zero_()
    assert ran.names == {"empty", "zero_"}  # what is no draw is done
    with Dispatched() as ran:  # control
        FILLED[how](torch.empty(2, 3))
    assert "normal_" in ran.names


def test_where_shapes_are_all_that_is_wanted_everything_else_is_done_as_it_is_asked_for():
    with shapes_alone():
        x = torch.full((2, 3), fill_value=1.0, dtype=torch.float64)
        assert x.is_meta and x.dtype == torch.float64
        nameless = functools.partial(torch.zeros, 2)  # what has no name is no draw
        assert torch.overrides._get_current_function_mode().__torch_function__(nameless, ()).shape == (2,)


@pytest.mark.parametrize("std, output_gain", [(0.02, 3.0), (1e-90, 3.0), (1e100, 0.5)])
def test_the_post_softmax_core_starts_as_large_as_it_should_where_its_square_is_no_float64(std, output_gain):
    """Outputs have a standard deviation of d std^2 output_gain, for which the core's is this times sqrt(d / its size)."""
    layer = TuckerAttention(24, 6, (6, 24, 24)).double()
    layer.reset_parameters(std, output_gain)
    core, largest = layer.post.core, layer.post.core.abs().max().item()
    spread = (core / largest).std().item() * largest
    assert 0.9 < spread / (24 * std * std * output_gain * (24 / core.numel()) ** 0.5) < 1.1
