"""QK-norm: queries and keys normalised before they are turned, literally, as a Tucker Attention, and what it rules out."""

import copy

import pytest
import torch
from helpers import DIFFERENT, EXACT, TOLERANCE, relative_error, tokens, with_large_weights

from reproduce.experiments.exactness import GROUPS, HEAD_ROTARIES, MASKS, Cell, error, mask_of
from tucker_ref import (
    GroupedQueryAttention,
    MultiHeadAttention,
    Rotary,
    TuckerAttention,
    as_tucker,
    choose_ranks,
    compress,
    relative_errors,
    spectra,
    to_gqa,
    to_mla,
)
from tucker_ref.norms import LatentNorm, QKNorm

KINDS = pytest.mark.parametrize("kind", ["head", "all"])
MASKED = pytest.mark.parametrize("mask", MASKS)


def grouped(name, kind, rotary="none", bias="no bias"):
    """The layers of the exactness matrix, with QK-norm and an eps that shows."""
    return with_eps(Cell(name, rotary, bias, qk_norm=kind).build())


TUCKER = {
    "plain": dict(post_ranks=(3, 7, 5)),
    "RoPE": dict(post_ranks=(3, 7, 5), rotary=True, bias=True),
    "shared": dict(shared_kv=True),
    "shared RoPE": dict(shared_kv=True, rotary=True, bias=True),
    "beside latent norms": dict(rotary=True, latent_norm=True),
}


def tucker(name, kind):
    options = dict(TUCKER[name])
    options["rotary"] = Rotary.latent(8, base=50.0) if options.get("rotary") else None
    return with_eps(TuckerAttention(24, 6, (4, 9, 8), qk_norm=kind, **options))


def with_eps(layer, eps=0.1):
    layer = with_large_weights(layer)
    layer.q_norm.eps, layer.k_norm.eps = eps, eps / 2
    return layer


def rms(x, dims, eps):
    """x: (b, n, h, c), divided by the root of its mean square over these axes."""
    return x / (x.square().mean(dims, keepdim=True) + eps).sqrt()


def normed(x, norm, kind, heads):
    """(b, n, h, c) -> (b, n, h, c), straight from the definition."""
    if kind == "head":
        return torch.einsum("bnhc,c->bnhc", rms(x, -1, norm.eps), norm.weight)
    return torch.einsum("bnhc,hc->bnhc", rms(x, (-2, -1), norm.eps), norm.weight.reshape(heads, -1))


def turned(x, rotary):
    return x if rotary is None else rotary(x.transpose(1, 2), torch.arange(x.shape[1])).transpose(1, 2)


def attended(q, k, v, scale, causal, mask=None):
    """q (b, n, h, c), k and v (b, m, h, c) -> (b, n, h, c)."""
    allowed = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
    allowed = allowed.tril() if causal else allowed
    allowed = (allowed if mask is None else allowed & mask).expand(len(q), q.shape[2], -1, -1)
    hidden = ~allowed & allowed.any(-1, keepdim=True)
    weights = (torch.einsum("bnhc,bmhc->bhnm", q, k) * scale).masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("bhnm,bmhc->bnhc", weights * allowed.any(-1, keepdim=True), v)


def literal_grouped(layer, x, causal, mask=None, kind=None, norm_last=False):
    """MHA and GQA with QK-norm written out; `norm_last` is the fault of normalising what is turned already."""
    kind, heads = kind or layer.qk_norm, layer.n_heads
    q, k, v = (p(x).unflatten(-1, (-1, layer.head_dim)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    groups = k.shape[2]
    steps = [
        lambda q, k: (normed(q, layer.q_norm, kind, heads), normed(k, layer.k_norm, kind, groups)),
        lambda q, k: (turned(q, layer.rotary), turned(k, layer.rotary)),
    ]
    for step in reversed(steps) if norm_last else steps:
        q, k = step(q, k)
    k, v = (y.repeat_interleave(heads // groups, dim=2) for y in (k, v))
    return layer.o_proj(attended(q, k, v, layer.scale, causal, mask).flatten(2))


def literal_tucker(layer, x, causal, mask=None, kind=None, norm_last=False, normed_values=False):
    """Def. 2.1 with QK-norm written out; values read the latent as it is."""
    kind, heads = kind or layer.qk_norm, layer.n_heads
    x = torch.cat([x, torch.ones_like(x[..., :1])], dim=-1) if layer.bias else x
    p = layer.query_norm(torch.einsum("bnd,ds->bns", x, layer.pre.query))
    latent = layer.key_norm(torch.einsum("bmd,dt->bmt", x, layer.pre.key))
    v = latent if layer.shared_kv else layer.value_norm(torch.einsum("bmd,dv->bmv", x, layer.post.value))
    q = torch.einsum("bns,rst,hr->bnht", p, layer.pre.core, layer.pre.head)
    k = latent.unsqueeze(2)  # (b, m, 1, t)
    steps = [
        lambda q, k: (normed(q, layer.q_norm, kind, heads), normed(k, layer.k_norm, kind, 1)),
        lambda q, k: (turned(q, layer.rotary), turned(k, layer.rotary)),
    ]
    for step in reversed(steps) if norm_last else steps:
        q, k = step(q, k)
    v = normed(latent.unsqueeze(2), layer.k_norm, kind, 1) if normed_values else v.unsqueeze(2)
    k, v = (y.expand(-1, -1, heads, -1) for y in (k, v))
    z = attended(q, k, v, layer.scale, causal, mask)
    y = torch.einsum("bnhv,uov,hu,do->bnd", z, layer.post.core, layer.post.head, layer.post.output)
    return y if layer.output_bias is None else y + layer.output_bias


def output_and_gradients(function, layer, x):
    x = x.detach().clone().requires_grad_()
    y = function(x)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [y, *torch.autograd.grad((y * direction).sum(), [x, *layer.parameters()])]


def errors(layer, literal, x, options, **faults):
    """Of the output and of every gradient; one that vanishes, as that of a key bias under a full softmax may, by the largest."""
    fast = output_and_gradients(lambda x: layer(x, **options), layer, x)
    slow = output_and_gradients(lambda x: literal(layer, x, **options, **faults), layer, x)
    largest = max(b.norm().item() for b in slow)
    return [((a - b).norm() / max(b.norm().item(), 1e-3 * largest)).item() for a, b in zip(fast, slow)]


@pytest.mark.no_cover
@KINDS
@MASKED
@pytest.mark.parametrize("rotary", HEAD_ROTARIES)
@pytest.mark.parametrize("name, bias", [("MHA", "all biases"), ("GQA", "q,k,v bias"), ("MQA", "no bias")])
def test_multi_head_and_grouped_attention_are_the_literal_formula_in_output_and_gradient(name, bias, rotary, mask, kind):
    layer, x, options = grouped(name, kind, rotary, bias), tokens(2, 9, 24), mask_of(mask)
    assert max(errors(layer, literal_grouped, x, options)) < EXACT
    if rotary != "none":  # control: gains and turns do not commute
        assert errors(layer, literal_grouped, x, options, norm_last=True)[0] > DIFFERENT
    if kind == "all":  # control: each head by itself, with the gains of the first group for all
        other = copy.deepcopy(layer)
        other.q_norm, other.k_norm = (QKNorm.of("head", 4, 1).double() for _ in range(2))
        layer.q_norm.weight.data.fill_(1.0), layer.k_norm.weight.data.fill_(1.0)
        assert relative_error(other(x, **options), layer(x, **options)) > DIFFERENT


@KINDS
@MASKED
@pytest.mark.parametrize("name", TUCKER)
def test_tucker_attention_is_the_literal_formula_in_output_and_gradient(name, mask, kind):
    layer, x, options = tucker(name, kind), tokens(2, 9, 24), mask_of(mask)
    assert max(errors(layer, literal_tucker, x, options)) < EXACT
    if layer.rotary is not None:
        assert errors(layer, literal_tucker, x, options, norm_last=True)[0] > DIFFERENT  # control
    if layer.shared_kv:
        assert (
            errors(layer, literal_tucker, x, options, normed_values=True)[0] > DIFFERENT
        )  # control: values are not normalised
    if kind == "all":
        other = copy.deepcopy(layer)
        other.q_norm = QKNorm.of("head", 8, 1).double()
        layer.q_norm.weight.data.fill_(1.0)
        assert relative_error(other(x, **options), layer(x, **options)) > DIFFERENT  # control: each head by itself


def other_key_gains(tucker):
    """In another order."""
    tucker.k_norm.weight.data = tucker.k_norm.weight.data.flip(0)


def other_query_gains(tucker):
    """Of another channel, or another head."""
    tucker.q_norm.weight.data = tucker.q_norm.weight.data.roll(tucker.ranks[2] if tucker.qk_norm == "all" else 1)


def mean_over_the_latent(tucker):
    """The mean square over all channels of the latent, those outside a head's block too."""
    tucker.q_norm.count, tucker.q_norm.blocks = (tucker.q_norm.heads or 1) * tucker.ranks[2], 1


def one_block(tucker):
    """Keys of all groups with one mean square."""
    tucker.k_norm.blocks, tucker.k_norm.count = 1, tucker.ranks[2]


@pytest.mark.no_cover
@KINDS
@pytest.mark.parametrize("rotary", HEAD_ROTARIES)
@pytest.mark.parametrize("name", GROUPS)
def test_thms_b_2_and_b_3_survive_qk_norm_in_blocks(name, rotary, kind):
    """What tests/test_exactness.py shows in its matrix, here with an eps that counts; the controls are wrong norms."""
    layer = grouped(name, kind, rotary)
    twin = as_tucker(layer)
    assert twin.qk_norm == kind and twin.ranks[2] == 4 * GROUPS[name]
    faults = [other_key_gains, other_query_gains]
    if GROUPS[name] > 1:
        faults += [mean_over_the_latent, one_block] if kind == "head" else [mean_over_the_latent]
    for mask in MASKS:
        assert error(layer, twin, mask, "whole sequence") < EXACT
        for spoil in faults:
            spoiled = as_tucker(layer)
            spoil(spoiled)
            assert error(layer, spoiled, mask, "whole sequence") > DIFFERENT, spoil.__name__


@KINDS
def test_heads_wider_than_the_model_keep_their_key_latent(kind):
    """Normalised coordinates may not be mixed, so the key rank may exceed d and the product of the other two ranks."""
    layer = with_eps(MultiHeadAttention(10, 3, head_dim=6, qk_norm=kind))
    twin, x = as_tucker(layer), tokens(2, 5, 10)
    assert twin.ranks == (3, 10, 18) and relative_error(twin(x), layer(x)) < EXACT
    assert TuckerAttention(10, 2, (1, 2, 30), (2, 3, 3), qk_norm=kind).ranks[2] == 30
    with pytest.raises(ValueError, match=r"ranks\[2\] is 30"):  # control
        TuckerAttention(10, 2, (1, 2, 30), (2, 3, 3))


def test_it_is_not_trilinear():
    """A key that doubles with its weights stays where it is: no logit of Def. 2.1 does."""
    for kind, scaled in (("head", 1.0), ("all", 1.0), (None, 2.0)):
        layer, x = with_large_weights(TuckerAttention(24, 6, (4, 9, 8), qk_norm=kind)), tokens(2, 5, 24)
        layer.k_norm.eps = layer.q_norm.eps = 0.0
        y = layer(x)
        layer.pre.key.data *= 2
        same = relative_error(layer(x), y)
        assert same < EXACT if scaled == 1.0 else same > DIFFERENT


def test_gains_have_the_shapes_of_qwen_3_and_olmo_2():
    shapes = lambda layer: tuple(tuple(norm.weight.shape) for norm in (layer.q_norm, layer.k_norm))  # noqa: E731
    assert shapes(MultiHeadAttention(24, 6, qk_norm="head")) == ((4,), (4,))
    assert shapes(MultiHeadAttention(24, 6, qk_norm="all")) == ((24,), (24,))
    assert shapes(GroupedQueryAttention(24, 6, 2, qk_norm="head")) == ((4,), (4,))
    assert shapes(GroupedQueryAttention(24, 6, 2, qk_norm="all")) == ((24,), (8,))
    assert shapes(TuckerAttention(24, 6, (4, 9, 8), qk_norm="head")) == ((8,), (8,))
    assert shapes(TuckerAttention(24, 6, (4, 9, 8), qk_norm="all")) == ((48,), (8,))
    for layer in (MultiHeadAttention(24, 6), GroupedQueryAttention(24, 6, 2), TuckerAttention(24, 6, (4, 9, 8))):
        assert layer.qk_norm is None and not any("_norm" in name for name in layer.state_dict())


LAYERS = {
    "MHA": lambda kind: MultiHeadAttention(24, 6, rotary=Rotary.heads(4), qk_norm=kind),
    "GQA": lambda kind: GroupedQueryAttention(24, 6, 2, bias=True, qk_norm=kind),
    "Tucker": lambda kind: TuckerAttention(24, 6, (4, 9, 8), rotary=Rotary.latent(8), qk_norm=kind),
    "Tucker shared": lambda kind: TuckerAttention(24, 6, (4, 9, 8), shared_kv=True, bias=True, qk_norm=kind),
    "Tucker in blocks": lambda kind: as_tucker(GroupedQueryAttention(24, 6, 2, qk_norm=kind)),
}
EVERY = pytest.mark.parametrize("name", LAYERS)


@EVERY
@KINDS
def test_gains_start_at_one_and_eps_is_that_of_the_models(name, kind):
    layer = with_large_weights(LAYERS[name](kind))
    layer.reset_parameters()
    for norm in (layer.q_norm, layer.k_norm):
        assert (norm.weight == 1).all() and norm.eps == 1e-6


@pytest.mark.no_cover
@EVERY
@KINDS
@pytest.mark.parametrize("backend", ["sdpa", "math", "flash", "flex", "triton"])
@pytest.mark.parametrize("n", [1, 5])
def test_every_backend_computes_the_same(name, kind, backend, n):
    """Our own kernel cannot norm between the mixing and the logits: it gets queries that are ready."""
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed; on Linux it is in the dev extra")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    layer, x = with_large_weights(LAYERS[name](kind)).float().to(device), tokens(2, n, 24).float().to(device)
    with torch.no_grad():
        expected = layer(x, backend="reference")
        if backend == "flash" and device == "cuda":  # which it knows in half precision only
            layer, x = layer.bfloat16(), x.bfloat16()
        y = layer(x, backend=backend)
        assert relative_error(y, expected) < TOLERANCE[y.dtype]
        plain = LAYERS[name](None).load_state_dict(layer.state_dict(), strict=False)
    assert {key.split(".")[0] for key in plain.unexpected_keys} == {"q_norm", "k_norm"}


@EVERY
@KINDS
def test_state_dicts_copies_and_half_precision(name, kind):
    layer, x = with_large_weights(LAYERS[name](kind)), tokens(2, 5, 24)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x))
    other.reset_parameters()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    half = other.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and relative_error(half, layer(x)) < 0.2  # softmax of such large logits, eight bits
    large = torch.full((1, 6, 1, layer.q_norm.width), 1e4, dtype=torch.float16)  # whose squares half precision does not hold
    expected = layer.q_norm(large.double())
    assert relative_error(layer.half().q_norm(large), expected) < 1e-2 < expected.abs().max()


@pytest.mark.no_cover  # of which the compiler would take twice as long
@pytest.mark.parametrize("name", ["GQA", "Tucker shared"])
@KINDS
def test_it_compiles_into_one_graph(name, kind):
    torch.compiler.reset()
    layer, x = with_large_weights(LAYERS[name](kind)), tokens(2, 5, 24)
    assert relative_error(torch.compile(layer, fullgraph=True, backend="eager")(x), layer(x)) < EXACT


@pytest.mark.parametrize("kind", ["heads", "", True, 1, ["head"], torch.ones(2)])
@EVERY
def test_other_kinds_are_refused(name, kind):
    with pytest.raises(ValueError, match="qk_norm is .*; it must be None, 'head' or 'all'"):
        LAYERS[name](kind)


APPROXIMATIONS = {
    "spectra": spectra,
    "compress": lambda layer: compress(layer, (4, 8, 8)),
    "compress shared": lambda layer: compress(layer, (4, 8, 8), shared_kv=True),
    "choose_ranks": lambda layer: choose_ranks(layer, relative_error=0.1),
    "relative_errors": lambda layer: relative_errors(MultiHeadAttention(24, 6).double(), layer),
    "to_gqa": lambda layer: to_gqa(layer, 1),
    "to_gqa by means": lambda layer: to_gqa(layer, 1, method="mean"),
    "to_mla": lambda layer: to_mla(layer, 8, 8),
}


@KINDS
@pytest.mark.parametrize("what", APPROXIMATIONS)
def test_what_has_no_tensor_is_not_compressed(what, kind):
    for name in ("MHA",) if what.startswith("to_") else LAYERS:
        refusal = f"layer has qk_norm='{kind}'; its logits are not trilinear, so it has no tensor to decompose"
        with pytest.raises(ValueError, match=refusal):
            APPROXIMATIONS[what](with_large_weights(LAYERS[name](kind)))


@pytest.mark.parametrize(
    "q, k, message",
    [
        (QKNorm(7), QKNorm(8), "q_norm is for any heads of width 7; here it must be for 6 of 8"),
        (QKNorm(8), QKNorm(9), "k_norm is for any heads of width 9; here it must be for 1 of 8"),
        (QKNorm(8, 5), QKNorm(8), "q_norm is for 5 heads of width 8; here it must be for 6 of 8"),
        (QKNorm(8, 6), QKNorm(8, 6), "k_norm is for 6 heads of width 8; here it must be for 1 of 8"),
    ],
)
def test_norms_that_do_not_fit_make_no_layer(q, k, message):
    layer = TuckerAttention(24, 6, (4, 9, 8))
    with pytest.raises(ValueError, match=message):
        TuckerAttention.from_weights(layer.pre, layer.post, scale=1.0, qk_norms=(q, k))
    for heads, kind in ((None, "head"), (6, "all")):  # control
        norms = QKNorm(8, heads), QKNorm(8)
        made = TuckerAttention.from_weights(layer.pre, layer.post, scale=1.0, qk_norms=norms)
        assert made.qk_norm == kind and (made.q_norm, made.k_norm) == norms


@pytest.mark.parametrize(
    "name, make",
    [
        ("width", lambda size: LatentNorm(size)),
        ("normalised", lambda size: LatentNorm(8, size)),
        ("width", lambda size: QKNorm(size)),
        ("heads", lambda size: QKNorm(8, size)),
        ("blocks", lambda size: QKNorm(8, blocks=size)),
        ("count", lambda size: QKNorm(8, count=size)),
    ],
)
def test_a_size_of_a_norm_that_is_none_is_named(name, make):
    with pytest.raises(ValueError, match=f"^{name} is 0; it must be an integer of at least 1"):
        make(0)
    make(1)  # control
