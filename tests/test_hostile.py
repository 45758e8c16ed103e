"""Hostile input to the library: each is refused with a message that names what, where and what is allowed, or has one defined result.

Cases are data, "kind: case" is their id, and `python -m reproduce hostile` counts them. Whatever was cached before a refused call
is there afterwards, and the cache goes on as if the call had not been made.
"""

import math
import re

import numpy as np
import pytest
import torch
from helpers import DIFFERENT, EXACT, relative_error, tokens, with_large_weights

from tucker_ref import (
    GroupedQueryAttention,
    LatentNorm,
    Llama3Scaling,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    TuckerTensor,
    as_tucker,
    choose_ranks,
    compress,
    energy_rank,
    entropy_rank,
    fold,
    gqa_cost,
    hooi,
    hosvd,
    mha_cost,
    mla_cost,
    mode_product,
    mode_product_einsum,
    multi_head_attention,
    multi_mode_product,
    multilinear_rank,
    post_softmax_tensor,
    pre_softmax_tensor,
    relative_errors,
    second_moment,
    spectra,
    sthosvd,
    tail_energies,
    tensor_attention,
    to_gqa,
    to_mla,
    tucker_cost,
    unfold,
)
from tucker_ref.attend import attend
from tucker_ref.attention_tensors import softmax
from tucker_ref.checks import check_angles
from tucker_ref.norms import QKNorm

NAN, INF, HUGE = math.nan, math.inf, 10**400
LAYERS = {
    "MHA": lambda: MultiHeadAttention(24, 6, rotary=Rotary.heads(4)),
    "GQA": lambda: GroupedQueryAttention(24, 6, 2, bias=True),
    "MLA": lambda: MultiHeadLatentAttention(24, 6, 10, 8, rope_dim=4, rotary=Rotary.heads(4)),
    "MLA coupled": lambda: MultiHeadLatentAttention(24, 6, 10, 8, rotary=Rotary.latent(8)),
    "Tucker": lambda: TuckerAttention(24, 6, (4, 9, 8), (3, 7, 5), rotary=Rotary.latent(8)),
    "Tucker shared": lambda: TuckerAttention(24, 6, (4, 9, 8), shared_kv=True, bias=True),
}
EVERY_LAYER = pytest.mark.parametrize("name", LAYERS)
X = tokens(2, 5, 24)


def table(*cases):
    """pytest.param per (id, ...) case."""
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


def layer_of(name):
    return with_large_weights(LAYERS[name]())


def ones(*shape, **options):
    return torch.ones(*shape, dtype=torch.bool, **options)


# Arguments of a call on two sequences of five tokens, after two tokens were cached.
CALLS = table(
    ("shape: x of one sequence", dict(x=X[0]), r"x has shape \(5, 24\); it must be \(batch, tokens, d_model\)"),
    ("shape: x of four sizes", dict(x=X[None]), r"x has shape \(1, 2, 5, 24\)"),
    ("shape: x too narrow", dict(x=X[..., :23]), r"x has shape \(2, 5, 23\).*d_model = 24"),
    ("shape: x without width", dict(x=X[..., :0]), r"x has shape \(2, 5, 0\)"),
    ("shape: another batch than the cache's", dict(x=X[:1]), "this cache was made for .*batch first"),
    ("dtype: x in float32", dict(x=X.float()), "x is torch.float32 on cpu; here it must be torch.float64 on cpu"),
    ("dtype: x in bfloat16", dict(x=X.bfloat16()), "x is torch.bfloat16"),
    ("dtype: x of integers", dict(x=X.long()), "x is torch.int64; it must be a tensor of floating-point numbers"),
    ("dtype: x of booleans", dict(x=X > 0), "x is torch.bool; it must be"),
    ("dtype: x complex", dict(x=X.to(torch.complex128)), "x is torch.complex128; it must be"),
    ("dtype: x a NumPy array", dict(x=X.numpy()), "x is ndarray; it must be a tensor"),
    ("dtype: x a list", dict(x=[[1.0]]), "x is list; it must be a tensor"),
    ("dtype: x None", dict(x=None), "x is NoneType; it must be a tensor"),
    ("device: x elsewhere", dict(x=X.to("meta")), "x is torch.float64 on meta; here it must be torch.float64 on cpu"),
    ("device: mask elsewhere", dict(mask=ones(5, 7, device="meta")), "mask is on meta; the tokens are on cpu"),
    (
        "device: positions elsewhere",
        dict(positions=torch.arange(5, device="meta")),
        "positions is on meta; the tokens are on cpu",
    ),
    ("mask: floating point", dict(mask=torch.ones(5, 7)), r"mask is torch.float32 \(5, 7\); it must be boolean"),
    ("mask: integers", dict(mask=torch.ones(5, 7, dtype=torch.int8)), "mask is torch.int8"),
    ("mask: a NumPy array", dict(mask=np.ones((5, 7), bool)), "mask is ndarray; it must be a boolean tensor"),
    ("mask: a list", dict(mask=[[True]]), "mask is list"),
    ("mask: forgets the cache", dict(mask=ones(5, 5)), r"broadcastable to \(2, 6, 5, 7\)"),
    ("mask: five sizes", dict(mask=ones(1, 1, 1, 5, 7)), "broadcastable to"),
    ("mask: no rows", dict(mask=ones(0, 7)), "broadcastable to"),
    (
        "positions: floating point",
        dict(positions=torch.arange(5.0)),
        "positions is torch.float32 .* it must be integers of shape",
    ),
    ("positions: booleans", dict(positions=ones(5)), "positions is torch.bool"),
    ("positions: complex", dict(positions=torch.arange(5) + 0j), "positions is torch.complex64"),
    ("positions: too few", dict(positions=torch.arange(4)), r"\(4,\); it must be integers of shape \(5,\) or \(2, 5\)"),
    ("positions: of another batch", dict(positions=torch.zeros(3, 5, dtype=torch.long)), r"\(3, 5\); it must be"),
    ("positions: a list", dict(positions=[0, 1, 2, 3, 4]), "positions is list; it must be a tensor of integers"),
    ("positions: a number", dict(positions=3), "positions is int"),
    ("rules: an unknown backend", dict(backend="fast"), "backend is 'fast'; it must be one of reference, sdpa"),
    ("rules: no backend", dict(backend=None), "backend is None"),
    ("rules: a list of backends", dict(backend=["sdpa"]), r"backend is \['sdpa'\]"),
    ("rules: a word for causal", dict(causal="yes"), "causal is 'yes'; it must be True or False"),
    ("rules: no causal", dict(causal=None), "causal is None"),
    ("rules: a kernel that refuses", dict(backend="cudnn"), "backend 'cudnn' refuses"),
    ("rules: a mask that no kernel of ours takes", dict(backend="triton", mask=ones(5, 7)), "backend 'triton' takes no mask"),
    ("cache: overflow in the middle of a batch", dict(x=tokens(2, 7, 24)), "7 more tokens after 2 overflow .* max_tokens = 8"),
    ("cache: a list", dict(cache=[1]), "cache is list; it must come from this layer's new_cache"),
    ("cache: a dictionary", dict(cache={}), "cache is dict"),
    ("cache: True", dict(cache=True), "cache is bool"),
)


@EVERY_LAYER
@pytest.mark.parametrize("bad, message", CALLS)
def test_a_refused_call_names_its_argument_and_leaves_the_cache_as_it_was(name, bad, message):
    if bad.get("backend") == "cudnn" and torch.cuda.is_available():
        pytest.skip("on a GPU this kernel runs")
    layer = layer_of(name)
    cache = layer.new_cache(2, 8)
    layer(tokens(2, 2, 24, seed=1), cache=cache)
    before = {stream: t.clone() for stream, t in cache.streams.items()}
    good = dict(x=X, cache=cache)
    with pytest.raises(ValueError, match=message):
        layer(**(good | bad))
    assert cache.length == 2 and all(torch.equal(before[s][:, :, :2], t[:, :, :2]) for s, t in cache.streams.items())
    expected = layer(torch.cat([tokens(2, 2, 24, seed=1), X], dim=1))[:, 2:]
    assert relative_error(layer(**good), expected) < EXACT


@EVERY_LAYER
@pytest.mark.parametrize(
    "options, message",
    table(
        ("cache: no sequences", dict(batch=0), "batch is 0; it must be an integer of at least 1"),
        ("cache: a negative length", dict(max_tokens=-1), "max_tokens is -1"),
        ("cache: a fraction", dict(batch=2.0), "batch is 2.0"),
        ("cache: a word", dict(max_tokens="9"), "max_tokens is '9'"),
        ("cache: True sequences", dict(batch=True), "batch is True"),
        ("cache: of integers", dict(dtype=torch.int64), "dtype is torch.int64; it must be a floating-point dtype"),
        ("cache: dtype a word", dict(dtype="float32"), "dtype is 'float32'"),
    ),
)
def test_a_cache_that_cannot_be_is_not_made(name, options, message):
    with pytest.raises(ValueError, match=message):
        layer_of(name).new_cache(**(dict(batch=2, max_tokens=9) | options))


@EVERY_LAYER
@pytest.mark.parametrize(
    "options, message",
    table(
        ("cache: of another dtype", dict(dtype=torch.float32), "is torch.float64; this cache holds torch.float32"),
        ("cache: of another device", dict(device="meta"), "is on cpu; this cache is on meta"),
        ("cache: of another batch", dict(batch=3), "this cache was made for"),
    ),
)
def test_a_cache_made_otherwise_is_refused_and_stays_empty(name, options, message):
    layer = layer_of(name)
    cache = layer.new_cache(**(dict(batch=2, max_tokens=9) | options))
    with pytest.raises(ValueError, match=message):
        layer(X, cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize("name, other", table(*((f"cache: of {b} for {a}", a, b) for a in LAYERS for b in LAYERS if a != b)))
def test_a_cache_of_another_layer_is_refused(name, other):
    """MLA's decoupled key and Tucker's latents have other widths or streams here; only caches of equal form cannot be told apart."""
    layer, cache = layer_of(name), layer_of(other).new_cache(2, 9)
    if {s: t.shape for s, t in cache.streams.items()} == {s: t.shape for s, t in layer.new_cache(2, 9).streams.items()}:
        pytest.skip("both layers keep the same streams")
    with pytest.raises(ValueError, match="was made for"):
        layer(X, cache=cache)
    assert cache.length == 0


EMPTY = table(
    ("empty: no sequence", (0, 5)),
    ("empty: no token", (2, 0)),
    ("empty: neither", (0, 0)),
)


@pytest.mark.no_cover
@EVERY_LAYER
@pytest.mark.parametrize("backend", ("reference", "sdpa", "math", "efficient", "flex", "triton"))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("size", EMPTY)
def test_nothing_in_gives_nothing_out(name, backend, causal, size):
    layer, x = layer_of(name).float(), torch.zeros(*size, 24, requires_grad=True)
    y = layer(x, backend=backend, causal=causal)
    assert y.shape == x.shape
    if backend in ("reference", "sdpa", "math"):
        y.sum().backward()
        assert x.grad.shape == x.shape
        assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())  # a sum over nothing; NaN would be any


@pytest.mark.no_cover
@EVERY_LAYER
@pytest.mark.parametrize("backend", ("reference", "sdpa", "math", "flex"))
@torch.no_grad()
def test_no_token_leaves_a_cache_as_it_was(name, backend):
    layer, expected = layer_of(name), layer_of(name)(X)
    cache = layer.new_cache(2, 5)
    pieces = [layer(part, cache=cache, backend=backend) for part in X.split([3, 0, 2], dim=1)]
    assert [piece.shape[1] for piece in pieces] == [3, 0, 2] and cache.length == 5
    assert relative_error(torch.cat(pieces, dim=1), expected) < EXACT
    assert relative_error(layer(X[:, 3:]), expected[:, 3:]) > DIFFERENT  # control: what was cached matters


@pytest.mark.no_cover
@EVERY_LAYER
@pytest.mark.parametrize(
    "value", table(("not finite: NaN", NAN), ("not finite: infinity", INF), ("not finite: -infinity", -INF))
)
@pytest.mark.parametrize("backend", ("reference", "sdpa", "math", "flex", "triton"))
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, in Triton's interpreter
def test_what_is_not_finite_stays_in_its_own_sequence(name, value, backend):
    layer, x = layer_of(name).float(), X.float()
    spoiled = x.clone()
    spoiled[1, 2, 3] = value
    with torch.no_grad():
        y, expected = layer(spoiled, backend=backend), layer(x)
    assert relative_error(y[0], expected[0]) < 1e-5
    assert not y[1, 2:].isfinite().any(dim=-1).any()  # control: it is not hidden either


@EVERY_LAYER
@pytest.mark.parametrize("value", table(("not finite: a weight NaN", NAN)))
def test_a_weight_that_is_nan_shows_in_every_output(name, value):
    layer = layer_of(name)
    with torch.no_grad():
        next(layer.parameters()).flatten()[0] = value
    for backend in ("reference", "math"):
        assert not layer(X, backend=backend).isfinite().all(dim=-1).any()


@pytest.mark.skipif(torch.cuda.is_available(), reason="what PyTorch's CPU kernel does")
def test_pytorchs_cpu_kernel_takes_nan_logits_for_hidden_ones():
    """As the docstring of `attend` warns: such a query gets zeros from "sdpa", and NaN from the specification."""
    q, k, v = torch.full((1, 1, 5, 4), NAN), torch.ones(1, 1, 5, 4), torch.ones(1, 1, 5, 4)
    assert torch.equal(attend(q, k, v, scale=1.0), torch.zeros(1, 1, 5, 4))
    assert attend(q, k, v, scale=1.0, backend="reference").isnan().all()


@pytest.mark.no_cover
@EVERY_LAYER
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize(
    "mask",
    table(
        ("mask: hides all from one query", torch.arange(5)[:, None] != 3),
        ("mask: hides all from all", torch.zeros(5, 5, dtype=torch.bool)),
        ("mask: of no size", torch.tensor(False)),
        ("mask: hides one sequence", torch.tensor([True, False])[:, None, None, None]),
    ),
)
@pytest.mark.parametrize("backend", ("reference", "sdpa", "math", "flex"))
def test_a_query_that_may_look_nowhere_gets_zeros(name, causal, mask, backend):
    layer = layer_of(name)
    if backend == "flex":  # which else is compiled for masks in any layout at once, and that takes half as long again
        torch.compiler.reset()
    with torch.no_grad():
        y = layer(X, causal=causal, mask=mask, backend=backend)
    nothing = layer(torch.zeros_like(X[:, :1]), mask=torch.tensor(False))  # the output bias alone, where there is one
    hidden = ~mask.expand(2, 1, 5, 5).any(dim=-1).squeeze(1)  # (b, n)
    assert hidden.any() and torch.allclose(y[hidden], nothing[0, 0].expand_as(y[hidden]), rtol=0, atol=1e-12)


POSITIONS = pytest.mark.parametrize(
    "positions",
    table(
        ("positions: negative", torch.arange(5) - 1000),
        ("positions: of eight bits", torch.arange(5, dtype=torch.uint8)),
        ("positions: of sixteen bits", torch.arange(5, dtype=torch.int16) + 300),
        ("positions: above a billion", torch.arange(5) + 2**30),
    ),
)


@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name]().rotary is not None])
@POSITIONS
def test_only_differences_of_positions_count(name, positions):
    layer, largest = layer_of(name), positions.long().abs().max().item()
    expected = layer(X)
    assert relative_error(layer(X, positions=positions), expected) < 64 * largest * 2**-53  # what angles in float64 resolve
    apart = positions + torch.arange(5).to(positions)
    assert relative_error(layer(X, positions=apart), expected) > DIFFERENT  # control: twice as far from each other


@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name]().rotary is None])
@POSITIONS
def test_without_a_rotary_embedding_positions_change_nothing(name, positions):
    layer = layer_of(name)
    assert torch.equal(layer(X, positions=positions.flip(0)), layer(X))
    assert relative_error(layer(X.flip(1)).flip(1), layer(X)) > DIFFERENT  # control: order does, for later tokens are hidden


FAR = table(
    ("positions: of sixty-two bits", torch.arange(5) + 2**62),
    ("positions: the most negative", torch.arange(5) - 2**63),
    ("positions: beyond what float64 counts", torch.arange(5) + 2**53),
    ("positions: beyond 2^32", torch.arange(5) + 2**32),
    ("positions: one of them", torch.tensor([0, 1, 2, 3, 2**40])),
)


@pytest.mark.parametrize("name", [name for name in LAYERS if LAYERS[name]().rotary is not None])
@pytest.mark.parametrize("positions", FAR)
def test_positions_so_far_that_angles_lose_their_digits_are_refused(name, positions):
    layer = layer_of(name)
    cache = layer.new_cache(2, 8)
    layer(X[:, :2], cache=cache)
    for places in (positions, positions.expand(2, 5)):
        with pytest.raises(ValueError, match="positions times frequencies give angles of up to .* let them begin nearer to 0"):
            layer(X, positions=places, cache=cache)
    assert cache.length == 2
    near = (positions - positions[0]).clamp(max=2**30)  # control: the same from a nearer place
    assert layer(X, positions=near, cache=cache).isfinite().all()


def test_far_positions_may_turn_slowly():
    """What is refused is an angle, not a number of tokens."""
    slow, far = Rotary([2.0**-40, 0.0]), torch.arange(5) * 2**40
    assert relative_error(slow(X[..., :4], far), Rotary([1.0, 0.0])(X[..., :4], torch.arange(5))) < EXACT
    with pytest.raises(ValueError, match="angles of up to"):  # control
        Rotary([1.0, 0.0])(X[..., :4], far)


def test_on_a_gpu_where_values_are_not_read_such_angles_are_nan():
    class OnGPU(torch.Tensor):
        is_cuda = True

    near, far = torch.tensor([0.0, -1e-300, 0.1, 2.0**32, -(2.0**32)]).double(), torch.tensor([2.0**34, -(2.0**62)]).double()
    assert torch.equal(check_angles(near.as_subclass(OnGPU)).as_subclass(torch.Tensor), near)
    assert check_angles(far.as_subclass(OnGPU)).as_subclass(torch.Tensor).cos().isnan().all()


SIZES = ((0, "0"), (-1, "-1"), (True, "True"), (2.0, "2.0"), ("2", "'2'"), (NAN, "nan"))
CONSTRUCTORS = table(
    *(
        (f"size: {where} {shown}", lambda make=make, value=value: make(value), f"{argument} is {shown}; it must be an integer")
        for where, argument, make in (
            ("d_model", "d_model", lambda v: MultiHeadAttention(v, 6)),
            ("n_heads", "n_heads", lambda v: MultiHeadAttention(24, v)),
            ("head_dim", "head_dim", lambda v: MultiHeadAttention(24, 6, head_dim=v)),
            ("n_kv_heads", "n_kv_heads", lambda v: GroupedQueryAttention(24, 6, v)),
            ("q_rank", "q_rank", lambda v: MultiHeadLatentAttention(24, 6, v, 8)),
            ("kv_rank", "kv_rank", lambda v: MultiHeadLatentAttention(24, 6, 8, v)),
            ("v_head_dim", "v_head_dim", lambda v: MultiHeadLatentAttention(24, 6, 8, 8, v_head_dim=v)),
            ("Tucker d_model", "d_model", lambda v: TuckerAttention(v, 6, (4, 8, 8))),
            ("Tucker n_heads", "n_heads", lambda v: TuckerAttention(24, v, (4, 8, 8))),
            *((f"rank {m}", rf"ranks\[{m}\]", lambda v, m=m: TuckerAttention(24, 6, [v if i == m else 4 for i in range(3)]))
              for m in range(3)),
            ("post rank", r"post_ranks\[2\]", lambda v: TuckerAttention(24, 6, (4, 8, 8), (4, 8, v))),
            ("head rotary", "rotary width", lambda v: Rotary.heads(v)),
            ("latent rotary", "rotary width", lambda v: Rotary.latent(v)),
            ("rotary groups", "n_kv_heads", lambda v: Rotary.groups(4, v)),
        )
        for value, shown in SIZES
    ),
    ("size: heads that do not divide", lambda: MultiHeadAttention(24, 5), "n_heads is 5; it must divide d_model = 24"),
    ("size: groups that do not divide", lambda: GroupedQueryAttention(24, 6, 4), "n_kv_heads is 4; it must divide n_heads = 6"),
    ("size: more groups than heads", lambda: GroupedQueryAttention(24, 6, 12), "n_kv_heads is 12"),
    ("size: a latent wider than the model", lambda: MultiHeadLatentAttention(24, 6, 8, 25), "kv_rank is 25; a latent wider"),
    ("size: decoupled channels without rotary", lambda: MultiHeadLatentAttention(24, 6, 8, 8, rope_dim=4), "rope_dim is 4; .* need"),
    ("rank: head above the heads", lambda: TuckerAttention(24, 6, (7, 8, 8)), r"ranks\[0\] is 7; .* at most 6"),
    ("rank: query above the width", lambda: TuckerAttention(24, 6, (6, 25, 8)), r"ranks\[1\] is 25; .* at most 24"),
    ("rank: key above the width", lambda: TuckerAttention(24, 6, (6, 8, 25)), r"ranks\[2\] is 25; .* at most 24"),
    ("rank: above the product of the others", lambda: TuckerAttention(24, 6, (1, 3, 4)), r"ranks\[2\] is 4; .* at most 3"),
    ("rank: a word", lambda: TuckerAttention(24, 6, "4,8,8"), "ranks is .*it must be 3 integers"),
    ("rank: too few", lambda: TuckerAttention(24, 6, (4, 8)), r"ranks is \(4, 8\); it must be 3 integers"),
    ("rank: too many", lambda: TuckerAttention(24, 6, (4, 8, 8, 8)), "it must be 3 integers"),
    ("rank: none", lambda: TuckerAttention(24, 6, None), "ranks is None; it must be 3 integers"),
    ("rank: a tensor", lambda: TuckerAttention(24, 6, torch.tensor([4.0, 8, 8])), r"ranks\[0\] is tensor\(4.\)"),
    ("rank: unequal with shared values", lambda: TuckerAttention(24, 6, (4, 8, 8), (4, 8, 7), shared_kv=True), r"post_ranks\[2\] is 7"),
    ("option: scale NaN", lambda: TuckerAttention(24, 6, (4, 8, 8), scale=NAN), "scale is nan; it must be finite"),
    ("option: scale zero", lambda: TuckerAttention(24, 6, (4, 8, 8), scale=0), "scale is 0"),
    ("option: scale a word", lambda: TuckerAttention(24, 6, (4, 8, 8), scale="1"), "scale is '1'"),
    ("option: scale True", lambda: TuckerAttention(24, 6, (4, 8, 8), scale=True), "scale is True"),
    ("option: scale complex", lambda: TuckerAttention(24, 6, (4, 8, 8), scale=1j), "scale is 1j"),
    ("option: bias a word", lambda: MultiHeadAttention(24, 6, bias="yes"), "bias is 'yes'; it must be False, True or 'qkv'"),
    ("option: bias of other layers", lambda: TuckerAttention(24, 6, (3, 4, 4), bias="qkv"), "bias is 'qkv'; it must be False or True"),
    ("option: init unknown", lambda: TuckerAttention(24, 6, (4, 8, 8), init="zeros"), "init is 'zeros'; it must be 'orthonormal'"),
    *((f"option: {name} {bad!r}", lambda make=make, name=name, bad=bad: make(**{name: bad}),
       f"{name} is {re.escape(repr(bad))}; it must be True or False")
      for make, names in (
          (lambda **flag: MultiHeadLatentAttention(24, 6, 8, 8, **flag), ("shared_kv", "latent_norm", "absorb")),
          (lambda **flag: TuckerAttention(24, 6, (4, 8, 8), **flag), ("shared_kv", "latent_norm")),
          (lambda **flag: mla_cost(24, 6, 8, 8, **flag), ("shared_kv",)),
          (lambda **flag: tucker_cost(24, 6, (4, 8, 8), **flag), ("shared_kv",)),
          (lambda **flag: compress(MHA, RANKS, **flag), ("shared_kv",)),
          (lambda **flag: to_mla(MHA, 8, 8, **flag), ("shared_kv",)),
      ) for name in names for bad in ("no", None, 1)),
    ("option: rotary a word", lambda: MultiHeadAttention(24, 6, rotary="yes"), "rotary is 'yes'; it must be a Rotary or None"),
    ("rotary: of another width", lambda: MultiHeadAttention(24, 6, rotary=Rotary.heads(6)), "rotary turns 6 channels; .* head_dim = 4"),
    ("rotary: odd", lambda: Rotary.heads(3), "rotary width is 3; .* must be even"),
    ("rotary: odd latent", lambda: TuckerAttention(24, 6, (4, 9, 7), rotary=Rotary.latent(7)), "rotary width is 7"),
    ("rotary: odd before the decoupled part", lambda: Rotary.decoupled(5, 4), "kv_rank is 5; .* must be even"),
    ("rotary: odd blocks", lambda: Rotary([1.0, 2.0], blocks=(3, 1)), "a block's width is 3"),
    ("rotary: blocks that do not add up", lambda: Rotary([1.0, 2.0], blocks=(2,)), "add up to 2; 2 frequencies need 4"),
    *((f"rotary: base {base!r}", lambda base=base: Rotary.heads(4, base), 
       f"base is {base!r}; it must be a number from 2.23e-308 to 1.8e\\+308")
      for base in (0, -1.0, NAN, INF, 5e-324, "x", None, True)),
    *((f"rotary: frequencies {f!r}", lambda f=f: Rotary(f), "frequencies .*it must be a list of finite numbers")
      for f in ([], [NAN], [INF], [[1.0]], "abc", None, [1j])),
    ("rotary: pairing unknown", lambda: Rotary.heads(4, pairing="odd"), "pairing is 'odd'; it must be one of half, interleaved"),
    *((f"rotary: scaling {bad}", lambda bad=bad: Llama3Scaling(**bad), "must be positive")
      for bad in (dict(factor=0), dict(factor=NAN), dict(original_context=-1), dict(low_frequency_factor=4.0, high_frequency_factor=4.0))),
    *((f"rotary: scaling {name} {bad!r}", lambda name=name, bad=bad: Llama3Scaling(**{name: bad}),
       f"{name} is {bad!r}; it must be positive and finite in Llama3Scaling")
      for name in ("factor", "low_frequency_factor", "high_frequency_factor", "original_context")
      for bad in (INF, "8", None, True, 5e-324)),
    *((f"number: {name} beyond float64", make, f"^{name} is an integer of 1329 binary digits; float64 holds 1024")
      for name, make in (
          ("base", lambda: Rotary.heads(4, HUGE)),
          ("factor", lambda: Llama3Scaling(HUGE)),
          ("original_context", lambda: Llama3Scaling(original_context=HUGE)),
          ("std", lambda: MultiHeadAttention(24, 6).reset_parameters(HUGE)),
          ("output_gain", lambda: MultiHeadLatentAttention(24, 6, 8, 8).reset_parameters(output_gain=HUGE)),
          ("eps", lambda: LatentNorm(8, eps=HUGE)),
          ("share", lambda: energy_rank(torch.ones(3), HUGE)),
          ("damping", lambda: second_moment(MultiHeadAttention(24, 6), X, HUGE)),
      )),
    ("number: frequencies beyond float64", lambda: Rotary([HUGE, 1.0]), "it must be a list of finite numbers"),
    ("number: frequencies that overflow",
     lambda: Rotary.heads(64, 1e-10, scaling=Llama3Scaling(1e-307, original_context=1e-300)), "NaN or infinity among them"),
    ("number: a scale beyond float64", lambda: TuckerAttention(24, 6, (4, 8, 8), scale=HUGE), "scale is 10+; it must be finite"),
    ("number: a scale of the specification beyond float64",
     lambda: tensor_attention(np.ones((2, 3)), np.ones((1, 3, 3)), np.ones((1, 3, 3)), HUGE), "scale is 10+; it must be finite"),
    *((f"number: {where} of {digits} digits", lambda make=make, digits=digits: make(10**digits - 1),
       f"^{name} has .* binary digits; it must be at most")
      for digits in (10, 30, 5000)
      for where, name, make in (
          ("d_model", "d_model", lambda v: MultiHeadAttention(v, 6)),
          ("heads", "n_heads", lambda v: MultiHeadAttention(24, v, head_dim=4)),
          ("head_dim", "head_dim", lambda v: GroupedQueryAttention(24, 6, 2, head_dim=v)),
          ("a rank", r"ranks\[1\]", lambda v: TuckerAttention(24, 6, (4, v, 8))),
          ("a cost", "d_model", lambda v: mha_cost(v, 6)),
          ("a cache", "max_tokens", lambda v: MultiHeadAttention(24, 6).new_cache(1, v)),
          ("rotary width", "rotary width", lambda v: Rotary.heads(v)),
          ("repeated", "times", lambda v: Rotary.heads(4).repeated(v)),
      )),
    *((f"number: eps {bad!r}", lambda kind=kind, bad=bad: kind(8, eps=bad), f"^eps is {re.escape(repr(bad))}; .* number from .* to 3.4e")
      for kind in (LatentNorm, QKNorm) for bad in (1e308, INF, NAN, -1.0, 1e-300, "x", True)),
    *((f"number: normalised {bad!r} of eight", lambda bad=bad: LatentNorm(8, bad), "^normalised ") for bad in (0, -1, 9, 2.0, True)),
    ("rotary: positions too few", lambda: Rotary.heads(4)(X[..., :4], torch.arange(4)), r"positions has shape \(4,\)"),
    ("rotary: one position for all", lambda: Rotary.heads(4)(X[..., :4], torch.arange(1)), r"positions has shape \(1,\)"),
    ("rotary: positions elsewhere", lambda: Rotary.heads(4)(X[..., :4], torch.arange(5, device="meta")), "on meta"),
    ("rotary: x of another width", lambda: Rotary.heads(4)(X, torch.arange(5)), "x has width 24; this rotary embedding turns 4"),
    ("rotary: positions in a list", lambda: Rotary.heads(24)(X, [0] * 5), "^positions is list; it must be a tensor of real numbers"),
    ("rotary: complex positions", lambda: Rotary.heads(24)(X, torch.arange(5) * 1j), "^positions is torch.complex64"),
    ("rotary: x in a list", lambda: Rotary.heads(24)([X], torch.arange(5)), "^x is list; it must be a tensor of real numbers"),
    ("rotary: x of integers", lambda: Rotary.heads(24)(X.long(), torch.arange(5)), "^x is torch.int64 .*must be floating-point"),
    ("rotary: x of one token", lambda: Rotary.heads(24)(X[0, 0], torch.arange(5)), r"^x is .* \(24,\); it must be floating-point"),
    ("rotary: x of five sizes", lambda: Rotary.heads(24)(X[None, None], torch.arange(5)), r"^x is .*\(b, h, n, width\)"),
    *((f"rotary: scaling {bad!r}", lambda bad=bad: Rotary.heads(4, scaling=bad), "scaling is .*must be a Llama3Scaling or None")
      for bad in ("llama3", {"factor": 8.0})),
)  # fmt: skip


@pytest.mark.parametrize("make, message", CONSTRUCTORS)
def test_a_layer_that_cannot_be_is_not_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


STARTED = {
    "MHA": lambda: MultiHeadAttention(24, 6),
    "GQA": lambda: GroupedQueryAttention(24, 6, 2, bias=True),
    "MLA": lambda: MultiHeadLatentAttention(24, 6, 10, 8, shared_kv=False),
    "Tucker": lambda: TuckerAttention(24, 6, (4, 9, 8)),
    "Tucker xavier": lambda: TuckerAttention(24, 6, (4, 9, 8), init="xavier"),
}


NO_SPREADS = (-1.0, NAN, INF, "x", None, True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("make", table(*((f"number: start of {name}", make) for name, make in STARTED.items())))
def test_weights_start_as_large_as_is_said_or_not_at_all(make, dtype):
    layer = make().to(dtype)
    before = {name: p.clone() for name, p in layer.named_parameters()}
    xavier = getattr(layer, "init", "") == "xavier"  # takes no std
    for option in ("std", "output_gain"):
        bads = [(bad, f"^{option} is {bad!r}; it must be a number from 0 to") for bad in NO_SPREADS]
        if not (xavier and option == "std"):
            tiny = [] if dtype == torch.float64 else [1e-300]
            bads += [
                (bad, f"{option} (is )?{bad!r}.*weights would have a standard deviation of") for bad in (1e308, 5e-324, *tiny)
            ]
        for bad, message in bads:
            with pytest.raises(ValueError, match=message.replace("+", r"\+")):
                layer.reset_parameters(**({"std": 0.5} | {option: bad}))
            assert all(
                torch.equal(before[name], p) for name, p in layer.named_parameters()
            )  # nothing was drawn before the refusal
    layer.reset_parameters(0.5, 0)
    last = layer.post.core if hasattr(layer, "post") else layer.o_proj.weight
    assert not last.any() and all(p.isfinite().all() for p in layer.parameters())
    layer.reset_parameters(1e-300 if xavier else np.float32(0.5), 2)  # control
    assert last.any() and last.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_the_least_and_the_largest_weights_that_start(dtype):
    """Normal numbers, of which no draw is infinite."""
    layer, limits = MultiHeadAttention(24, 6).to(dtype), torch.finfo(dtype)
    for spread, beyond in ((limits.tiny, 0.0), (limits.max / 16, INF)):
        layer.reset_parameters(spread)
        assert all(p.any() and p.isfinite().all() for p in layer.parameters())
        refused = math.nextafter(spread, beyond)
        message = f"std is {refused}, output_gain 1.0: weights would have a standard deviation of {refused:.1e}; for {dtype}"
        with pytest.raises(ValueError, match=re.escape(message)):
            layer.reset_parameters(refused)


@pytest.mark.parametrize(
    "scale", table(*((f"number: scale {s!r} at the start", s) for s in (1e308, -1e308, 1e200, 1e-300, -1e-200, 5e-324)))
)
def test_a_scale_for_which_no_weights_start_is_refused_before_any(scale):
    with pytest.raises(
        ValueError, match=f"std is 0.02, output_gain 1.0, scale {scale}: weights would have".replace("+", r"\+")
    ):
        TuckerAttention(24, 6, (4, 8, 8), scale=scale)


@pytest.mark.parametrize("std, scale", [(0.02, 1e200), (0.02, -1e-200), (1e-100, 0.5), (1e100, 1.0), (1e-90, 1e-170)])
def test_what_float64_holds_only_without_its_square_starts_as_it_should(std, scale):
    """The logits of a multi-head layer have a standard deviation of d std^2."""
    layer = TuckerAttention(24, 6, (6, 24, 24), scale=0.5).double()
    layer.scale = scale
    layer.reset_parameters(std, 0.0)
    core, largest = layer.pre.core, layer.pre.core.abs().max().item()  # whose squares float64 does not hold
    logits = (core / largest).std().item() * largest * abs(scale) * (core.numel() / 6) ** 0.5
    assert 0.8 < logits / (24 * std * std) < 1.2


def test_where_nothing_is_drawn_a_scale_may_be_any():
    with torch.device("meta"):
        layer = TuckerAttention(24, 6, (4, 8, 8), scale=1e-200)
    assert layer.pre.core.is_meta and layer.scale == 1e-200


@EVERY_LAYER
@pytest.mark.parametrize("scale", [1e-300, -1e39])
def test_a_layers_scale_that_its_dtype_does_not_hold_is_refused_before_anything_is_cached(name, scale):
    layer = layer_of(name).float()
    cache, layer.scale = layer.new_cache(2, 5), scale
    with pytest.raises(ValueError, match="scale is .*; for torch.float32 it must be from"):
        layer(X.float(), cache=cache)
    assert cache.length == 0


def qkv(**changes):
    made = dict(q=torch.ones(2, 6, 5, 4), k=torch.ones(2, 2, 5, 4), v=torch.ones(2, 2, 5, 3))
    return {name: changes.get(name, lambda t: t)(tensor) for name, tensor in made.items()}


ATTEND = table(
    ("attend: q of three sizes", qkv(q=lambda q: q[0]), {}, r"each must be \(batch, heads, tokens, width\)"),
    ("attend: no query heads", qkv(q=lambda q: q[:, :0]), {}, "at least one head"),
    ("attend: no key heads", qkv(k=lambda k: k[:, :0], v=lambda v: v[:, :0]), {}, "at least one head"),
    ("attend: heads that do not divide", qkv(q=lambda q: q[:, :5]), {}, "5 query heads cannot be shared out evenly to 2"),
    ("attend: key of another batch", qkv(k=lambda k: k[:1]), {}, "batch, key/value heads, source tokens"),
    ("attend: value of other length", qkv(v=lambda v: v[:, :, :4]), {}, "must agree"),
    ("attend: key of other width", qkv(k=lambda k: k[..., :3]), {}, "must agree"),
    ("attend: key in float64", qkv(k=lambda k: k.double()), {}, "k is torch.float64 on cpu; here it must be torch.float32"),
    ("attend: value in float64", qkv(v=lambda v: v.double()), {}, "v is torch.float64"),
    ("attend: integers", qkv(q=lambda q: q.long(), k=lambda k: k.long(), v=lambda v: v.long()), {}, "q is torch.int64"),
    ("attend: complex", qkv(q=lambda q: q + 0j), {}, "q is torch.complex64"),
    ("attend: key elsewhere", qkv(k=lambda k: k.to("meta")), {}, "k is torch.float32 on meta"),
    ("attend: a NumPy array", qkv(q=lambda q: q.numpy()), {}, "q is ndarray"),
    ("attend: scale NaN", qkv(), dict(scale=NAN), "scale is nan"),
    ("attend: scale zero", qkv(), dict(scale=0.0), "scale is 0.0"),
    ("attend: scale infinite", qkv(), dict(scale=-INF), "scale is -inf"),
    ("attend: scale none", qkv(), dict(scale=None), "scale is None"),
    ("attend: scale a tensor", qkv(), dict(scale=torch.tensor(1.0)), "scale is tensor"),
    ("attend: more queries than sources", qkv(k=lambda k: k[:, :, :4], v=lambda v: v[:, :, :4]), dict(causal=True),
     "at least as many source tokens"),
)  # fmt: skip


@pytest.mark.parametrize("backend", ("reference", "sdpa", "math", "flex", "triton"))
@pytest.mark.parametrize("inputs, options, message", ATTEND)
def test_every_backend_refuses_the_same(backend, inputs, options, message):
    with pytest.raises(ValueError, match=message):
        attend(**inputs, **(dict(scale=1.0) | options), backend=backend)


ALL_BACKENDS = ("reference", "sdpa", "math", "flash", "flex", "triton")


@pytest.mark.parametrize("backend", ALL_BACKENDS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "scale",
    table(
        *((f"attend: scale {s!r}", s) for s in (1e-300, -1e-300, 5e-324, 1e-39, 1e39, -1e300)),
        ("attend: scale a large integer", 10**60),
        ("attend: scale an integer beyond float64", -(10**400)),
    ),
)
def test_a_scale_that_single_precision_does_not_hold_is_refused(backend, dtype, scale):
    x = torch.ones(1, 2, 5, 16).to(dtype)
    with pytest.raises(
        ValueError, match=f"scale is {re.escape(str(scale))}; for {dtype} it must be from 1.2e-38 to 3.4e\\+38 in size"
    ):
        attend(x, x, x, scale=scale, causal=True, backend=backend)


@pytest.mark.parametrize("backend", ("reference", "sdpa", "math", "flash", "flex"))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize(
    "scale", table(*((f"attend: scale {s!r}", s) for s in (1e-300, 1.2e-38, -1e-30, 1e-6, 1e5, -1e10, 1e30, 1e300)))
)
def test_every_scale_that_is_taken_gives_what_it_means(backend, dtype, scale):
    """Of tiny ones an average, of huge ones the one value whose key fits best, in no precision NaN."""
    if dtype != torch.float64 and not 1e-38 < abs(scale) < 1e38:
        pytest.skip("refused, see above")
    q, k, v = (torch.randn(1, 2, 5, 4, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(3))
    logits = (q.double() @ k.double().mT) * scale  # (b, h, n, m)
    weights = logits.masked_fill(~torch.ones(5, 5).bool().tril(), -INF).softmax(-1)
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    z = attend(q, k, v, scale=scale, causal=True, backend=backend)
    assert relative_error(z, weights @ v.double()) < bound
    assert relative_error(attend(q, k, v, scale=0.7, causal=True, backend=backend), weights @ v.double()) > DIFFERENT  # control


@pytest.mark.parametrize("backend", ("reference", "sdpa", "math", "efficient", "flex", "triton"))
@pytest.mark.parametrize("n", (1, 5))
def test_without_sources_every_backend_gives_zeros(backend, n):
    q, k, v = torch.ones(2, 6, n, 4), torch.ones(2, 2, 0, 4), torch.ones(2, 2, 0, 3)
    assert torch.equal(attend(q, k, v, scale=1.0, backend=backend), torch.zeros(2, 6, n, 3))


MHA = MultiHeadAttention(24, 6)
RANKS = (4, 8, 8)
APPROXIMATIONS = {
    "spectra": spectra,
    "compress": lambda layer: compress(layer, RANKS),
    "compress by hooi": lambda layer: compress(layer, RANKS, method="hooi"),
    "compress shared": lambda layer: compress(layer, RANKS, shared_kv=True),
    "choose_ranks": lambda layer: choose_ranks(layer, relative_error=0.1),
    "relative_errors": lambda layer: relative_errors(MHA.double(), layer),
    "to_gqa": lambda layer: to_gqa(layer, 1),
    "to_gqa by means": lambda layer: to_gqa(layer, 1, method="mean"),
    "to_mla": lambda layer: to_mla(layer, 8, 8),
}
ONLY_GROUPED = ("to_gqa", "to_gqa by means", "to_mla")
SPOILED = [
    (f"weights: {value} in {layer}, {what}", layer, what, value)
    for layer in LAYERS
    for what in APPROXIMATIONS
    for value in (NAN, INF)
    if not (what in ONLY_GROUPED and layer not in ("MHA", "GQA"))
]


@pytest.mark.parametrize("name, what, value", table(*SPOILED))
def test_layers_with_weights_that_are_not_finite_have_no_approximation(name, what, value):
    layer = layer_of(name)
    last, parameter = list(layer.named_parameters())[-1]
    with torch.no_grad():
        parameter.flatten()[-1] = value
    with pytest.raises(ValueError, match=f"layer's {re.escape(last)} holds NaN or infinity"):
        APPROXIMATIONS[what](layer)


def zero_layer():
    layer = MultiHeadAttention(24, 6)
    for parameter in layer.parameters():
        torch.nn.init.zeros_(parameter)
    return layer


COMPRESSION = table(
    ("compress: no layer", lambda: compress(None, RANKS), "layer is NoneType"),
    ("compress: another module", lambda: spectra(torch.nn.Linear(2, 2)), "layer is Linear"),
    ("compress: as_tucker of another module", lambda: as_tucker(torch.nn.Linear(2, 2)), "layer is Linear"),
    ("compress: to_mla of Tucker", lambda: to_mla(TuckerAttention(24, 6, RANKS), 8, 8), "layer is TuckerAttention"),
    ("compress: a layer without values", lambda: spectra(MultiHeadAttention(24, 6).to("meta")), "holds no values"),
    ("compress: a layer with latent norms", lambda: compress(MultiHeadLatentAttention(24, 6, 8, 8, latent_norm=True), RANKS),
     "latent_norm=True"),
    ("compress: rank above the heads", lambda: compress(MHA, (7, 8, 8)), r"ranks\[0\] is 7"),
    ("compress: rank a fraction", lambda: compress(MHA, (4, 8, 8.0)), r"ranks\[2\] is 8.0"),
    ("compress: rank True", lambda: compress(MHA, (True, 1, 1)), r"ranks\[0\] is True"),
    ("compress: ranks a word", lambda: compress(MHA, "abc"), r"ranks\[0\] is 'a'"),
    ("compress: no ranks", lambda: compress(MHA, None), "ranks is None"),
    ("compress: post rank zero", lambda: compress(MHA, RANKS, (4, 0, 8)), r"post_ranks\[1\] is 0"),
    ("compress: odd rank that turns", lambda: compress(MultiHeadAttention(24, 6, rotary=Rotary.heads(4)), (4, 8, 7)),
     r"ranks\[2\] is 7; .* must be even"),
    ("compress: method unknown", lambda: compress(MHA, RANKS, method="svd"), "method is 'svd'; it must be one of hosvd, sthosvd, hooi"),
    ("compress: rotary of another width", lambda: compress(MHA, RANKS, rotary=Rotary.latent(6)), "rotary turns 6 channels"),
    ("compress: groups that do not divide", lambda: to_gqa(MHA, 5), "n_kv_heads is 5"),
    ("compress: no groups", lambda: to_gqa(MHA, 0), "n_kv_heads is 0"),
    ("compress: latent above the width", lambda: to_mla(MHA, 25, 8), "is 25"),
    ("compress: layers of other widths", lambda: relative_errors(MHA, MultiHeadAttention(12, 6)), "d_model is 24 in layer and 12"),
    ("compress: layers of other heads", lambda: relative_errors(MHA, MultiHeadAttention(24, 3)), "n_heads is 6 in layer and 3"),
    ("compress: errors relative to zero", lambda: relative_errors(zero_layer(), MHA.float()), "a tensor of zeros"),
    *((f"compress: choose_ranks {bad}", lambda bad=bad: choose_ranks(MHA, **bad), message) for bad, message in (
        (dict(), "exactly one of"),
        (dict(relative_error=0.1, max_cache=3), "exactly one of"),
        (dict(relative_error=NAN), "relative_error is nan"),
        (dict(relative_error=-1), "relative_error is -1"),
        (dict(max_parameters=0), "max_parameters = 0:"),
        (dict(max_cache=-1), "max_cache is -1"),
    )),
    *((f"moment: {what}", lambda bad=bad: compress(MHA, RANKS, moment=bad), message) for what, bad, message in (
        ("of another width", torch.eye(23), "moment is 23 x 23; this layer's inputs.* are 24 wide"),
        ("NaN", torch.eye(24) * NAN, "not positive definite"),
        ("negative", -torch.eye(24), "not positive definite"),
        ("singular", torch.zeros(24, 24), "not positive definite"),
        ("a vector", torch.ones(24), "no floating-point matrix"),
        ("integers", torch.eye(24).long(), "no floating-point matrix"),
        ("a list", [1.0], "no floating-point matrix"),
    )),
    *((f"moment: of x {what}", lambda bad=bad: second_moment(MHA, bad), "x has shape") for what, bad in (
        ("without tokens", X[:0]), ("NaN", X * NAN), ("too narrow", X[..., :3]), ("a number", torch.tensor(1.0)),
    )),
    ("moment: damping NaN", lambda: second_moment(MHA, X, damping=NAN), "damping is nan; it must be finite and at least 0"),
    ("moment: damping infinite", lambda: second_moment(MHA, X, damping=float("inf")), "damping is inf"),
    ("moment: damping negative", lambda: second_moment(MHA, X, damping=-1), "damping is -1"),
    *((f"ranks: share {share}", lambda share=share: energy_rank(torch.ones(3), share), f"share is {share}; it must be in \\(0, 1\\]")
      for share in (0, 2, -1, NAN)),
)  # fmt: skip


@pytest.mark.parametrize("make, message", COMPRESSION)
def test_what_cannot_be_compressed_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_layer_of_zeros_has_rank_one_and_no_effective_rank():
    zero = zero_layer()
    assert choose_ranks(zero, relative_error=0.1) == ((1, 1, 1), (1, 1, 1))
    for layer in (compress(zero, RANKS), compress(zero, RANKS, shared_kv=True), to_gqa(zero, 2), to_mla(zero, 8, 8)):
        assert torch.equal(layer(X.float()), torch.zeros(2, 5, 24))
    assert entropy_rank(spectra(zero)[0].head) == 0.0 and energy_rank(spectra(zero)[0].head) == 1


TENSOR = np.random.default_rng(0).normal(size=(3, 4, 5))
NUMBER = np.array(3.0)  # a tensor of order 0


def unfolded():
    return unfold(NUMBER, 0)


def folded():
    return fold(np.ones((1, 1)), 0, ())


def multiplied():
    return mode_product(NUMBER, np.ones((1, 1)), 0)


def summed():
    return mode_product_einsum(NUMBER, np.ones((1, 1)), 0)


def multiplied_often():
    return multi_mode_product(NUMBER, [np.ones((1, 1))])


NO_MODES = (unfolded, folded, multiplied, summed, multiplied_often)


def test_a_number_is_a_tensor_of_no_modes_and_its_own_core():
    assert multilinear_rank(NUMBER) == () and tail_energies(NUMBER, ()).shape == (0,)
    assert multi_mode_product(NUMBER, []) == 3.0
    for f in (hosvd, sthosvd, hooi):
        found = f(NUMBER, ())
        assert found.ranks == () and found.to_tensor() == 3.0
        with pytest.raises(ValueError, match=r"ranks is \(1,\); it must be 0 integers"):
            f(NUMBER, (1,))


NUMPY = table(
    *((f"numpy: {f.__name__} of {what}", lambda f=f, bad=bad: f(bad, (2, 2, 2)), message)
      for f in (hosvd, sthosvd, hooi, tail_energies)
      for what, bad, message in (
          ("NaN", TENSOR * NAN, "NaN or infinity"),
          ("infinity", TENSOR * INF, "NaN or infinity"),
          ("complex numbers", TENSOR + 1j, "tensor is complex128; it must be a NumPy array of real numbers"),
          ("objects", TENSOR.astype(object), "tensor is object"),
          ("words", TENSOR.astype(str), "tensor is <U"),
          ("a torch tensor", torch.from_numpy(TENSOR), "tensor is Tensor"),
          ("a list", TENSOR.tolist(), "tensor is list"),
          ("nothing", None, "tensor is NoneType"),
          ("no rows", TENSOR[:0], "ranks"),
      )),
    *((f"numpy: ranks {bad!r}", lambda bad=bad: hosvd(TENSOR, bad), "ranks") for bad in (
        (0, 1, 1), (4, 1, 1), (3, 1, 1), (2, 2), (2, 2, 2, 2), "abc", 2, None, (2.0, 2, 2), (True, 2, 2), (-1, 2, 2),
    )),
    *((f"numpy: mode {bad!r} of {f.__name__}", lambda f=f, bad=bad: f(bad), f"mode is {bad!r}; a tensor of order 3 has modes 0 to 2")
      for f in (
          lambda mode: unfold(TENSOR, mode),
          lambda mode: fold(np.ones((3, 20)), mode, (3, 4, 5)),
          lambda mode: mode_product(TENSOR, np.ones((2, 4)), mode),
          lambda mode: mode_product_einsum(TENSOR, np.ones((2, 4)), mode),
      )
      for bad in (-1, 3, 1.0, "0", None, True)),
    ("numpy: fold to another size", lambda: fold(np.ones((3, 19)), 0, (3, 4, 5)), r"matrix has shape \(3, 19\); .* needs \(3, 20\)"),
    ("numpy: product of other widths", lambda: mode_product(TENSOR, np.ones((2, 3)), 1), r"needs \(any, 4\)"),
    ("numpy: product with a vector", lambda: mode_product(TENSOR, np.ones(4), 1), r"matrix has shape \(4,\)"),
    *((f"numpy: {f.__name__} of no modes", f, "^mode is 0; a tensor of order 0 has no modes$") for f in NO_MODES),
    ("numpy: shape of no sizes", lambda: fold(np.ones((1, 1)), 0, None), "shape is None; it must be integers"),
    ("numpy: shape of fractions", lambda: fold(np.ones((2, 3)), 0, (2.0, 3)), r"shape\[0\] is 2.0; it must be an integer"),
    ("numpy: negative shape", lambda: fold(np.ones((2, 3)), 0, (-2, -3)), r"shape\[0\] is -2; it must be an integer"),
    *((f"numpy: sweeps {bad!r}", lambda bad=bad: hooi(TENSOR, (2, 2, 2), bad), "^max_sweeps ")
      for bad in (-1, 2.0, NAN, "2", None, True)),
    ("numpy: sweeps without end", lambda: hooi(TENSOR, (2, 2, 2), HUGE), "^max_sweeps has 1329 binary digits"),
    *((f"numpy: rtol {bad!r}", lambda bad=bad: hooi(TENSOR, (2, 2, 2), rtol=bad), "^rtol is ") for bad in (-1, NAN, "2", None, True)),
    ("numpy: rtol NaN", lambda: multilinear_rank(TENSOR, NAN), "rtol is nan"),
    ("numpy: rank of NaN", lambda: multilinear_rank(TENSOR * NAN), "NaN or infinity"),
    ("numpy: rank of complex numbers", lambda: multilinear_rank(TENSOR + 1j), "tensor is complex128"),
    ("numpy: too few factors", lambda: TuckerTensor(np.ones((2, 2)), [np.ones((3, 2))]), "1 factors given"),
    ("numpy: factors of other widths", lambda: TuckerTensor(np.ones((2, 2)), [np.ones((3, 2)), np.ones((3, 3))]), r"factors\[1\]"),
    ("numpy: heads of pre-softmax weights", lambda: pre_softmax_tensor(np.ones((2, 5, 3)), np.ones((3, 5, 3))), "numbers of heads"),
    ("numpy: heads of post-softmax weights", lambda: post_softmax_tensor(np.ones((2, 5, 3)), np.ones((1, 3, 5))), "numbers of heads"),
    *((f"cost: {name} {bad}", lambda f=f, bad=bad: f(*bad), message) for name, f, bad, message in (
        ("mha", mha_cost, (0, 1), "d_model is 0"), ("mha", mha_cost, (-4, 2), "d_model is -4"), ("mha", mha_cost, (24, 0), "n_heads is 0"),
        ("mha", mha_cost, (24, 5), "n_heads is 5; it must divide"), ("mha", mha_cost, (24.0, 6), "d_model is 24.0"),
        ("mha", mha_cost, ("24", 6), "d_model is '24'"), ("gqa", gqa_cost, (24, 6, 5), "n_kv_heads is 5"),
        ("gqa", gqa_cost, (24, 6, 0), "n_kv_heads is 0"),
        ("mla", mla_cost, (24, 6, -1, 8), "q_rank is -1"), ("mla", mla_cost, (24, 6, 8, 0), "kv_rank is 0"),
        ("tucker", tucker_cost, (24, 6, (4, 8)), "it must be 3 integers"), ("tucker", tucker_cost, (24, 6, (4, 0, 8)), r"ranks\[1\] is 0"),
    )),
)  # fmt: skip


SQUARE = np.random.default_rng(1).normal(size=(3, 5, 5))  # weights of three heads, and tensors
TOKENS = np.random.default_rng(2).normal(size=(4, 5))
NUMPY_RUNGS = {  # each public function of one array; the others are as they should be
    "unfold": (TENSOR, lambda t: unfold(t, 1)),
    "fold": (unfold(TENSOR, 1), lambda m: fold(m, 1, TENSOR.shape)),
    "mode_product tensor": (TENSOR, lambda t: mode_product(t, np.ones((2, 4)), 1)),
    "mode_product matrix": (np.ones((2, 4)), lambda m: mode_product(TENSOR, m, 1)),
    "mode_product_einsum tensor": (TENSOR, lambda t: mode_product_einsum(t, np.ones((2, 4)), 1)),
    "mode_product_einsum matrix": (np.ones((2, 4)), lambda m: mode_product_einsum(TENSOR, m, 1)),
    "multi_mode_product": (TENSOR, lambda t: multi_mode_product(t, [np.eye(3), np.eye(4), np.eye(5)])),
    "multilinear_rank": (TENSOR, multilinear_rank),
    "hosvd": (TENSOR, lambda t: hosvd(t, (2, 2, 2)).to_tensor()),
    "sthosvd": (TENSOR, lambda t: sthosvd(t, (2, 2, 2)).to_tensor()),
    "hooi": (TENSOR, lambda t: hooi(t, (2, 2, 2)).to_tensor()),
    "tail_energies": (TENSOR, lambda t: tail_energies(t, (2, 2, 2))),
    "core": (TENSOR, lambda t: TuckerTensor(t, [np.eye(3), np.eye(4), np.eye(5)]).to_tensor()),
    "factor": (np.ones((2, 4)), lambda m: TuckerTensor(TENSOR, [np.eye(3), m, np.eye(5)]).to_tensor()),
    "pre_softmax_tensor": (SQUARE, lambda w: pre_softmax_tensor(w, SQUARE)),
    "post_softmax_tensor": (SQUARE, lambda w: post_softmax_tensor(SQUARE, w)),
    "tensor_attention x": (TOKENS, lambda x: tensor_attention(x, SQUARE, SQUARE, 0.4)),
    "tensor_attention pre": (SQUARE, lambda w: tensor_attention(TOKENS, w, SQUARE, 0.4)),
    "tensor_attention post": (SQUARE, lambda w: tensor_attention(TOKENS, SQUARE, w, 0.4)),
    "multi_head_attention x": (TOKENS, lambda x: multi_head_attention(x, SQUARE, SQUARE, SQUARE, SQUARE)),
    "multi_head_attention w_q": (SQUARE, lambda w: multi_head_attention(TOKENS, w, SQUARE, SQUARE, SQUARE)),
    "multi_head_attention w_o": (SQUARE, lambda w: multi_head_attention(TOKENS, SQUARE, SQUARE, SQUARE, w)),
    "softmax": (TENSOR, softmax),
}
EXTENDED = np.dtype(np.longdouble).itemsize > 8  # elsewhere it is float64 by another name
KINDS = {  # what an array becomes, and whether one that holds the same numbers may be taken
    "longdouble": (lambda a: a.astype(np.longdouble), not EXTENDED),
    "float16": (lambda a: a.astype(np.float16), True),
    "float32": (lambda a: a.astype(np.float32), True),
    "other bytes": (lambda a: a.astype(">f8"), True),
    "eight bits": (lambda a: (20 * a).astype(np.int8), True),
    "unsigned": (lambda a: (np.abs(20 * a)).astype(np.uint8), True),
    "sixty-four bits": (lambda a: (20 * a).astype(np.int64), True),
    "booleans": (lambda a: a > 0, True),
    "a mask": (lambda a: np.ma.masked_greater(a, 0.5), False),
    "a mask of nothing": (np.ma.masked_array, False),
    "NaN under a mask": (lambda a: np.ma.masked_invalid(np.where(a > 0.5, NAN, a)), False),
    "objects": (lambda a: a.astype(object), False),
    "complex": (lambda a: a + 1j, False),
    "words": (lambda a: a.astype(str), False),
    "a record": (lambda a: a.astype([("x", float)]), False),
    "a subclass": (lambda a: a.view(type("Named", (np.ndarray,), {})), False),
    "a list": (lambda a: a.tolist(), False),
    "a tensor": (lambda a: torch.from_numpy(a), False),
    "nothing": (lambda a: None, False),
}


@pytest.mark.parametrize(
    "name, kind", table(*((f"numpy: {kind} in {name}", name, kind) for name in NUMPY_RUNGS for kind in KINDS))
)
def test_every_kind_of_array_is_taken_as_the_numbers_it_holds_or_refused(name, kind):
    array, function = NUMPY_RUNGS[name]
    made, exact = KINDS[kind][0](array), KINDS[kind][1]
    try:
        found = function(made)
    except ValueError as refusal:
        assert re.match(r"\w+(\[\d\])? is \S.*; it must be a NumPy array of real numbers", str(refusal))
        assert not exact or (kind == "float16" and "float16; " in str(refusal))
    else:  # unfolded and folded, numbers of any kind stay what they are
        assert exact or (name in ("unfold", "fold") and kind in ("longdouble", "objects", "complex", "words", "a record"))
        if kind not in ("objects", "words", "a record"):
            expected = function(made.astype(complex if kind == "complex" else float))
            bound = 1e-5 if kind in ("float16", "float32") else EXACT
            bound = 1e-2 if (name, kind) == ("hooi", "float32") else bound  # whose sweeps end earlier
            np.testing.assert_allclose(
                np.asarray(found, expected.dtype) if name != "multilinear_rank" else found, expected, bound, bound
            )


def test_a_matrix_of_numpys_own_kind_is_refused():
    with pytest.warns(PendingDeprecationWarning):
        matrix = np.matrix(np.ones((2, 4)))
    for function in (lambda: mode_product(TENSOR, matrix, 1), lambda: unfold(matrix, 0), lambda: softmax(matrix)):
        with pytest.raises(
            ValueError, match="is matrix; it must be a NumPy array of real numbers, at least float32, and of no subclass"
        ):
            function()


def test_arrays_that_lie_in_a_file_are_read(tmp_path):
    np.save(tmp_path / "tensor.npy", TENSOR)
    mapped = np.load(tmp_path / "tensor.npy", mmap_mode="r")
    assert isinstance(mapped, np.memmap)
    assert np.array_equal(hosvd(mapped, (2, 2, 2)).to_tensor(), hosvd(TENSOR, (2, 2, 2)).to_tensor())


@pytest.mark.parametrize("product", [mode_product, mode_product_einsum])
def test_products_of_integers_are_exact_or_refused(product):
    for dtype in (np.int8, np.uint8, np.int32, np.int64, np.uint64):
        large = np.full((3, 4), 100, dtype)
        found = product(large, np.full((2, 4), 100, dtype), 1)
        assert found.dtype == np.int64 and np.array_equal(found, np.full((3, 2), 40_000))
    assert np.array_equal(
        np.full((3, 4), 100, np.int8) @ np.full((4, 2), 100, np.int8), np.full((3, 2), 64)
    )  # control: NumPy's own
    edge = np.full((3, 4), 2**60 - 1)
    assert np.array_equal(product(edge, np.ones((2, 4), int), 1), np.full((3, 2), 2**62 - 4))
    assert product(np.full((1, 2), 2**62 - 1), np.ones((1, 2), int), 1).tolist() == [[2**63 - 2]]
    for tensor, matrix in (
        (np.full((1, 2), 2**62), np.ones((1, 2), int)),  # 2^63 itself is one too many
        (edge, np.full((2, 4), 3)),
        (np.full((3, 4), -(2**63)), np.ones((2, 4), int)),
        (edge.astype(np.uint64) * 8, edge[:2]),
    ):
        with pytest.raises(
            ValueError, match=f"tensor is {tensor.dtype} and matrix int64; integers this large must be given as float64"
        ):
            product(tensor, matrix, 1)
    assert product(edge, np.full((2, 4), 3.0), 1)[0, 0] == pytest.approx(12 * 2**60)
    assert product(np.zeros((3, 0), int), np.zeros((2, 0), int), 1).tolist() == [[0, 0]] * 3
    assert product(np.zeros((0, 4), int), np.full((2, 4), 2**62), 1).shape == (0, 2)  # of nothing nothing is large


@pytest.mark.parametrize("scale", [NAN, INF, 0, True, "1", None, 1j])
def test_the_specification_refuses_the_same_scales(scale):
    with pytest.raises(ValueError, match="scale is"):
        tensor_attention(TOKENS, SQUARE, SQUARE, scale)


@pytest.mark.parametrize("rtol", ["1", True, 1j, [0.1], np.ones(2), -1e-3, NAN])
def test_a_tolerance_is_a_number_of_at_least_zero(rtol):
    with pytest.raises(ValueError, match="rtol is"):
        multilinear_rank(TENSOR, rtol)
    assert multilinear_rank(TENSOR, np.float32(1e-6)) == multilinear_rank(TENSOR, 0) == (3, 4, 5)


def test_weights_of_heads_have_three_sizes():
    with pytest.raises(ValueError, match=r"w_q \(5, 3\), w_k \(5, 3\): each must have three sizes, heads first"):
        pre_softmax_tensor(np.ones((5, 3)), np.ones((5, 3)))


@pytest.mark.parametrize("make, message", NUMPY)
def test_tensors_and_sizes_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
