"""Rung 4: every backend means what "reference" means, in output and gradient."""

import collections
import contextlib
import inspect
import math
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import DIFFERENT, TOLERANCE, relative_error
from helpers import attention_inputs as inputs
from torch.nn.attention import SDPBackend

from tucker_ref import TuckerAttention, backends
from tucker_ref.attend import FORCED, attend

module = sys.modules["tucker_ref.attend"]  # its name in the package is the function's

BACKENDS = ("reference", "sdpa", "math")  # those that take every shape, mask and dtype on every device, with gradients

SHAPES = [  # b, h, g, n, m, k, v
    (1, 1, 1, 1, 1, 4, 4),
    (2, 3, 3, 7, 7, 5, 5),
    (1, 12, 4, 63, 63, 8, 8),
    (2, 12, 1, 7, 7, 6, 10),
    (2, 4, 2, 3, 9, 8, 4),
    (1, 6, 2, 1, 33, 8, 8),
    (2, 6, 2, 1, 9, 8, 4),
    (1, 4, 2, 8, 11, 8, 4),  # as many queries as a key is wide
    (1, 4, 2, 5, 8, 8, 4),  # as many sources
    (2, 4, 2, 2, 4, 8, 4),  # as many queries as groups, as many sources as heads
]


def run(qkv, **options):
    """Output and the three gradients, the leaves left clean."""
    y = attend(*qkv, **options)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad((y * direction).sum(), qkv)]


def by_hand(q, k, v, scale, causal, mask):
    """Attention with loops over batch, head and query: independent of every line in attend.py."""
    b, h, n, _ = q.shape
    m, group = k.shape[2], h // k.shape[1]
    y = torch.zeros(b, h, n, v.shape[3], dtype=q.dtype)
    for i in range(b):
        for j in range(h):
            for t in range(n):
                seen = [s for s in range(m) if (not causal or s <= t + m - n) and (mask is None or mask[i, j, t, s])]
                if seen:
                    weights = torch.stack([q[i, j, t] @ k[i, j // group, s] * scale for s in seen]).softmax(0)
                    y[i, j, t] = sum(w * v[i, j // group, s] for w, s in zip(weights, seen))
    return y


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_attention_written_with_loops(shape, causal, masked):
    q, k, v = inputs(*shape)
    b, h, _, n, m, *_ = shape
    mask = torch.rand(b, h, n, m, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    expected = by_hand(q, k, v, 0.3, causal, mask)
    y = attend(q, k, v, scale=0.3, causal=causal, mask=mask, backend="reference")
    assert torch.linalg.norm(y - expected) <= 1e-12 * max(1.0, torch.linalg.norm(expected))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b != "reference"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backend_matches_reference_in_output_and_gradient(backend, shape, causal, masked, dtype):
    n, m = shape[3:5]
    mask = torch.rand(n, m, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    if masked:
        mask[:, 0] = True  # every query sees something; rows that see nothing have their own test
    options = dict(scale=0.3, causal=causal, mask=mask)
    qkv = inputs(*shape, dtype)
    expected = run([t.detach().double().requires_grad_() for t in qkv], backend="reference", **options)
    for actual, wanted in zip(run(qkv, backend=backend, **options), expected):
        assert actual.shape == wanted.shape
        # A single visible source has softmax 1: its query and key gradients are exactly zero, so compare on the output's scale.
        assert torch.linalg.norm(actual.double() - wanted) <= TOLERANCE[dtype] * (torch.linalg.norm(wanted) + 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_options_are_far_off(backend):
    """Negative controls for the test above."""
    q, k, v = (t.detach() for t in inputs(2, 12, 4, 9, 9, 5, 5))
    expected = attend(q, k, v, scale=0.3, causal=True, backend="reference")

    def error(*qkv, **options):
        return relative_error(attend(*qkv, backend=backend, **{"scale": 0.3, "causal": True, **options}), expected)

    assert error(q, k, v) < TOLERANCE[torch.float64]
    assert error(q, k, v, causal=False) > DIFFERENT
    assert error(q, k, v, scale=5**-0.5) > DIFFERENT  # SDPA's own default
    assert error(q, k.flip(1), v.flip(1)) > DIFFERENT  # groups in the wrong order
    assert error(q.unflatten(1, (3, 4)).transpose(1, 2).flatten(1, 2), k, v) > DIFFERENT  # interleaved heads


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (9,), (1, 9), (9, 9), (4, 1, 9), (2, 1, 1, 9)])
def test_masks_broadcast(backend, shape):
    q, k, v = (t.detach() for t in inputs(2, 4, 2, 9, 9, 5, 5))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.7
    full = attend(q, k, v, scale=0.3, mask=mask.broadcast_to(2, 4, 9, 9), backend="reference")
    assert torch.allclose(attend(q, k, v, scale=0.3, mask=mask, backend=backend), full, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [12, 4, 1])
def test_the_flash_kernel_matches_reference_where_it_runs(groups, causal, dtype):
    qkv = inputs(2, 12, groups, 63, 63, 8, 8, dtype)
    expected = run([t.detach().double().requires_grad_() for t in qkv], backend="reference", scale=0.3, causal=causal)
    for actual, wanted in zip(run(qkv, backend="flash", scale=0.3, causal=causal), expected):
        assert relative_error(actual, wanted) < TOLERANCE[dtype]


def test_the_flash_kernel_takes_tucker_attention_with_equal_widths_only():
    """Sec. 3.3, with the kernel forced: one key/value head for all heads; key and value latents must be equally wide."""

    def forced(ranks, post_ranks):
        layer, x = TuckerAttention(24, 6, ranks, post_ranks).double(), torch.randn(1, 9, 24, dtype=torch.float64)
        with torch.no_grad():
            return relative_error(layer(x, backend="flash"), layer(x, backend="reference"))

    assert forced((4, 9, 8), (3, 7, 8)) < TOLERANCE[torch.float64]
    with pytest.raises(ValueError, match="backend 'flash' refuses q .*: \\w+"):
        forced((4, 9, 8), (3, 7, 5))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_flex_matches_reference_in_output(shape, causal, masked):
    """Its gradient is tested on a GPU; elsewhere it has none, and says so."""
    n, m = shape[3:5]
    mask = torch.rand(n, m, generator=torch.Generator().manual_seed(3)) < 0.7 if masked else None
    q, k, v = (t.detach() for t in inputs(*shape))
    options = dict(scale=0.3, causal=causal, mask=mask)
    expected = attend(q, k, v, backend="reference", **options)
    assert torch.allclose(attend(q, k, v, backend="flex", **options), expected, rtol=1e-10, atol=1e-12)
    if n > 1 and m > 1:
        assert not torch.allclose(attend(q, k, v, backend="flex", scale=0.3, causal=not causal), expected, rtol=1e-3)  # control


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU flex_attention has a gradient")
def test_flex_refuses_gradients_on_the_cpu():
    with pytest.raises(ValueError, match="backend 'flex' refuses torch.float64 on cpu: .*backward"):
        attend(*inputs(2, 4, 1, 5, 5, 8, 8), scale=1.0, backend="flex")


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU these kernels run")
@pytest.mark.parametrize("backend", sorted(set(FORCED) - {"math", "flash"}))
def test_a_kernel_that_refuses_says_why(backend):
    with pytest.raises(ValueError, match=rf"backend '{backend}' refuses q \(2, 4, 5, 8\), .* torch.float64 on cpu: \w+"):
        attend(*inputs(2, 4, 1, 5, 5, 8, 8), scale=1.0, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("widths", [(8, 8), (8, 5)])
def test_a_query_that_may_look_nowhere_yields_zeros_and_finite_gradients(backend, widths):
    qkv = inputs(2, 4, 2, 5, 5, *widths)
    mask = torch.ones(5, 5, dtype=torch.bool)
    mask[2] = False
    y, *gradients = run(qkv, scale=0.3, mask=mask, backend=backend)
    assert (y[:, :, 2] == 0).all() and (y[:, :, 1] != 0).any()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_aligns_the_last_query_with_the_last_source(backend):
    q, k, v = (t.detach() for t in inputs(1, 2, 2, 9, 9, 5, 5))
    full = attend(q, k, v, scale=0.3, causal=True, backend=backend)
    last = attend(q[:, :, 6:], k, v, scale=0.3, causal=True, backend=backend)
    assert relative_error(last, full[:, :, 6:]) < TOLERANCE[torch.float64]
    assert relative_error(last, attend(q[:, :, 6:], k, v, scale=0.3, backend=backend)) > DIFFERENT  # control


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(backend="flashy"), "backend is 'flashy'.*reference, sdpa, flash, cudnn, efficient, math, flex, triton"),
        (dict(backend="triton", mask=torch.ones(5, 5, dtype=torch.bool)), "'triton' takes no mask"),
        (dict(scale=math.nan), "scale is nan"),
        (dict(scale=math.inf), "scale is inf"),
        (dict(scale=0.0), "scale is 0.0"),
        (dict(scale=None), "scale is None"),
        (dict(q=torch.ones(4, 5, 3)), "q \\(4, 5, 3\\), k .*must be \\(batch, heads, tokens, width\\)"),
        (dict(q=torch.ones(2, 3, 5, 8)), "3 query heads cannot be shared out evenly to 2"),
        (dict(k=torch.ones(2, 2, 5, 7)), "width must agree"),
        (dict(v=torch.ones(2, 2, 4, 8)), "source tokens"),
        (dict(q=torch.ones(2, 4, 6, 8), causal=True), "at least as many source tokens"),
        (dict(mask=torch.ones(5, 5)), "must be boolean"),
        (dict(mask=torch.ones(5, 4, dtype=torch.bool)), "broadcastable to"),
        (dict(mask=torch.ones(3, 2, 4, 5, 5, dtype=torch.bool)), "broadcastable to"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = dict(q=torch.ones(2, 4, 5, 8), k=torch.ones(2, 2, 5, 8), v=torch.ones(2, 2, 5, 8), scale=1.0) | change
    with pytest.raises(ValueError, match=message):
        attend(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


@pytest.fixture
def calls(monkeypatch):
    """What PyTorch's attention is called with."""
    seen, real = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **o: seen.append((q, k, v, o)) or real(q, k, v, **o))
    return seen


def test_no_key_is_repeated_for_the_heads_that_share_it(calls):
    """Sec. 3.3: to PyTorch's kernels Tucker Attention is one key and value for all heads, and stays so in memory."""
    for groups in (1, 2, 4):
        q, k, v = inputs(2, 4, groups, 5, 5, 8, 8)
        attend(q, k, v, scale=0.3, causal=True)
        (_, seen_k, seen_v, options) = calls.pop()
        assert seen_k is k and seen_v is v
        assert options["is_causal"] and options["attn_mask"] is None and options["enable_gqa"] == (groups < 4)


@pytest.mark.parametrize("shape", [None, (), (9,), (1, 9), (1, 1, 9), (2, 1, 1, 9), (6, 1, 9), (2, 6, 1, 9)])
def test_while_decoding_the_heads_of_a_group_stand_where_queries_stand(calls, shape):
    """Unless a mask tells heads apart."""
    q, k, v = inputs(2, 6, 2, 1, 9, 8, 4)
    mask = None if shape is None else torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.7
    expected = attend(q, k, v, scale=0.3, mask=mask, backend="reference")
    torch.testing.assert_close(attend(q, k, v, scale=0.3, mask=mask), expected, rtol=1e-12, atol=1e-12)
    (seen_q, seen_k, _, options) = calls.pop()
    alike = shape is None or 6 not in shape
    assert seen_q.shape == ((2, 2, 3, 8) if alike else q.shape) and seen_k is k and options.get("enable_gqa", False) != alike


def test_the_reference_and_empty_input_call_no_kernel(calls):
    attend(*inputs(1, 2, 1, 3, 3, 4, 4), scale=0.3, backend="reference")
    for shape in ((0, 2, 1, 3, 3, 4, 4), (1, 2, 1, 0, 3, 4, 4), (1, 2, 1, 3, 0, 4, 4)):
        attend(*inputs(*shape), scale=0.3)
    assert not calls
    attend(*inputs(1, 2, 1, 3, 3, 4, 4), scale=0.3)
    assert len(calls) == 1  # control


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_kernel_that_knows_no_groups_sees_each_key_as_often_as_it_is_used(calls, monkeypatch, shape, causal, compiling):
    """PyTorch's "efficient" kernel needs a GPU: here another stands in its place. While it compiles, no warnings are caught."""
    monkeypatch.setitem(FORCED, "efficient", SDPBackend.MATH)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: compiling)
    q, k, v = inputs(*shape)
    for mask in (None, torch.ones(shape[3:5], dtype=torch.bool).tril(1)):
        options = dict(scale=0.3, causal=causal, mask=mask)
        expected = run((q, k, v), backend="reference", **options)
        for backend, heads in (("math", k.shape[1]), ("efficient", q.shape[1])):
            calls.clear()
            for actual, wanted in zip(run((q, k, v), backend=backend, **options), expected):
                assert actual.shape == wanted.shape
                assert torch.linalg.norm(actual - wanted) <= TOLERANCE[torch.float64] * (torch.linalg.norm(wanted) + 1)
            if shape[3] > 1:  # decoding needs no groups
                assert calls[0][1].shape[1] == heads and calls[0][3]["enable_gqa"] == (heads < q.shape[1])


def test_what_is_compiled_takes_no_turn(monkeypatch):
    """torch.compile knows no locks."""
    options = dict(scale=0.3, causal=True, mask=torch.rand(5, 5, generator=torch.Generator().manual_seed(3)) < 0.7)
    qkv = inputs(2, 4, 2, 5, 5, 8, 4)
    monkeypatch.setattr(backends, "turns", None)
    with pytest.raises((TypeError, AttributeError)):  # control: what is not compiled takes one
        attend(*qkv, **options)
    monkeypatch.setattr(torch.compiler, "is_dynamo_compiling", lambda: True)
    for actual, wanted in zip(run(qkv, **options), run(qkv, backend="reference", **options)):
        assert relative_error(actual, wanted) < TOLERANCE[torch.float64]


def test_a_refusal_repeats_each_of_pytorch_s_reasons_once(monkeypatch):
    def refuse(*_):
        for text in (
            "Too wide. (Triggered internally at a.cpp:1.)",
            "Too wide. (Triggered internally at b.cpp:2.)",
            "Too old.",
        ):
            warnings.warn(text, stacklevel=2)
        raise RuntimeError("No available kernel.")

    def refuse_without_a_word(*_):
        raise RuntimeError("No available kernel.")

    for refusal, reasons in ((refuse, "Too wide.; Too old."), (refuse_without_a_word, "No available kernel.")):
        monkeypatch.setattr(module, "_sdpa", refusal)
        with pytest.raises(ValueError) as error:
            attend(*inputs(2, 4, 1, 5, 6, 8, 3), scale=1.0, backend="math")
        shapes = "q (2, 4, 5, 8), k (2, 1, 6, 8), v (2, 1, 6, 3), torch.float64 on cpu"
        assert str(error.value) == f"backend 'math' refuses {shapes}: {reasons}"


def test_a_gradient_comes_back_in_the_layout_of_the_output():
    for device in ("cpu", "meta"):
        z = torch.randn(2, 3, 4, 5, dtype=torch.float64, device=device).transpose(1, 2).requires_grad_()
        dz = torch.randn(2, 4, 3, 5, dtype=torch.float64, device=device)
        y = backends.same_layout_back(z)
        (back,) = torch.autograd.grad(y, z, dz)
        assert dz.stride() != z.stride() == back.stride() and back.dtype == dz.dtype and back.device == dz.device
        if device == "cpu":
            assert torch.equal(back, dz) and torch.equal(y, z)
        same = torch.empty_like(z)
        assert (
            backends.SameLayoutBack.backward(SimpleNamespace(strides=z.stride()), same) is same
        )  # no copy where none is needed


def test_what_another_thread_compiles_changes_no_refusal(monkeypatch):
    """PyTorch (2.13) says of the whole process that it compiles: who is not compiled then left the locks and the words of a refusal out."""
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert torch.compiler.is_compiling()  # control
    with pytest.raises(ValueError, match="backend 'flash' refuses"):
        attend(*inputs(1, 4, 1, 7, 7, 8, 5), scale=0.3, causal=True, backend="flash")


@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by torch.compile itself
@pytest.mark.parametrize(
    "call, copies", [(backends.same_layout_back, 0), (backends.SameLayoutBack.apply, 2)], ids=["ours", "control"]
)
def test_what_compiles_does_not_copy_a_gradient_that_lies_as_the_output(call, copies):
    """Heads of one token side by side, forward and backward, as in a layer."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    called = []

    def keep(graph, _):
        called.extend(node.target for node in graph.graph.nodes)
        return make_boxed_func(graph)

    torch.compiler.reset()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64, requires_grad=True)  # (b, n, h, v)
    compiled = torch.compile(
        lambda x: call(x.sin().transpose(1, 2)).transpose(1, 2).cos(), backend=aot_autograd(fw_compiler=keep)
    )
    dy = torch.randn_like(x)
    (dx,) = torch.autograd.grad(compiled(x), x, dy)
    assert torch.allclose(dx, -dy * x.sin().sin() * x.cos(), rtol=1e-13)
    aten = torch.ops.aten
    assert sum(target in (aten.clone.default, aten.copy.default, aten.copy_.default) for target in called) == copies


class OnGPU(torch.Tensor):
    """A tensor that says it is on a GPU."""

    is_cuda = True


def first_ancestors(y: torch.Tensor) -> list[str]:
    """Names of the nodes of its gradient's graph, along the first argument of each."""
    node, found = y.grad_fn, []
    while node is not None:
        found.append(node.name())
        node = node.next_functions[0][0] if node.next_functions else None
    return found


def test_on_a_gpu_gradients_are_laid_out_as_outputs(monkeypatch):
    qkv, real = inputs(2, 4, 1, 5, 5, 8, 8), F.scaled_dot_product_attention
    assert "SameLayoutBackBackward" not in first_ancestors(attend(*qkv, scale=0.3))
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **o: real(*a, **o).as_subclass(OnGPU))
    y = attend(*qkv, scale=0.3)
    assert "SameLayoutBackBackward" in first_ancestors(y)
    assert relative_error(y.as_subclass(torch.Tensor), attend(*qkv, scale=0.3, backend="reference")) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("backend", ["reference", "math"])
def test_masks_are_made_where_the_tokens_are(backend):
    """On PyTorch's "meta" device, which refuses to meet a tensor of another one."""
    q, k, v = (t.to("meta") for t in inputs(1, 2, 2, 3, 5, 4, 4))
    assert attend(q, k, v, scale=0.3, causal=True, backend=backend).device == q.device


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("shape", [(2, 4, 2, 1, 5, 1, 1), (2, 4, 1, 1, 5, 8, 4), (1, 4, 2, 2, 5, 1, 4), (2, 4, 2, 5, 5, 8, 8)])
def test_triton_decodes_where_one_query_needs_no_gradient(monkeypatch, shape, trained):
    pytest.importorskip("triton", reason="triton is not installed; on Linux it is in the dev extra")
    from tucker_ref.kernels import decode, latent_attention

    called = []
    for kernels, name in ((decode, "decode_attention"), (latent_attention, "flash_attention")):
        real = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, name=name, real=real, **o: called.append(name) or real(*a, **o))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    qkv = [t.detach().to(device).requires_grad_(trained and n == 2) for n, t in enumerate(inputs(*shape, torch.float32))]
    decodes = shape[3] == 1
    mask = torch.arange(shape[4], device=device) % 2 == 0 if decodes and not trained else None
    for causal in (False, True):
        options = dict(scale=0.3, causal=causal, mask=mask)
        expected = attend(*qkv, **options, backend="reference")
        assert relative_error(attend(*qkv, **options, backend="triton"), expected) < 1e-5
        with torch.no_grad():
            attend(*qkv, **options, backend="triton")
    once = "flash_attention" if trained or not decodes else "decode_attention"
    assert called == 2 * [once, "decode_attention" if decodes else "flash_attention"]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_on_a_gpu_flex_attention_is_compiled_or_an_error(monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention

    compiled, codes, real = [], set(), torch.compile

    def compile(function, **options):
        if inspect.unwrap(function) is not flex_attention:  # which compiles parts of its own
            return real(function, **options)
        compiled.append(options)
        codes.add(id(function.__code__))
        return lambda *qkv, **how: function(*(t.as_subclass(torch.Tensor) for t in qkv), **how)

    monkeypatch.setattr(torch, "compile", compile)
    backends._compiled.cache_clear()
    q, k, v = (t.detach() for t in inputs(2, 4, 2, 9, 9, 8, 8))
    try:
        for mask in (None, torch.rand(2, 4, 9, 9, generator=torch.Generator().manual_seed(3)) < 0.7):
            expected = attend(q, k, v, scale=0.3, causal=True, mask=mask, backend="reference")
            y = attend(q.as_subclass(OnGPU), k, v, scale=0.3, causal=True, mask=mask, backend="flex")
            assert relative_error(y, expected) < TOLERANCE[torch.float64]
        assert compiled == [{"dynamic": False, "fullgraph": True}]  # once, and never plain unseen
        for n in range(1, 10):  # each of nine shapes apart, or the ninth would be one too many
            attend(q[:, :, :n].as_subclass(OnGPU), k, v, scale=0.3, backend="flex")
        assert len(compiled) == len(codes) == 9
        attend(q.as_subclass(OnGPU), k[:, :, 1:], v[:, :, 1:], scale=0.3, backend="flex")
        attend(q.as_subclass(OnGPU), k, v[..., 1:], scale=0.3, backend="flex")
        assert len(compiled) == len(codes) == 11
    finally:
        backends._compiled.cache_clear()


@pytest.mark.parametrize("backend", ["sdpa", "flash", "math", "efficient"])
def test_a_negative_scale_hides_the_future_all_the_same(backend):
    q, k, v = inputs(2, 4, 2, 6, 6, 5, 5, dtype=torch.float32)
    try:
        z = attend(q, k, v, scale=-0.3, causal=True, backend=backend)
    except ValueError as error:
        pytest.skip(f"no such kernel here: {error}")
    expected = attend(q, k, v, scale=-0.3, causal=True, backend="reference")
    torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-5)
    assert relative_error(attend(q, k, v, scale=0.3, causal=True), expected) > 0.01  # control: the sign counts


@pytest.mark.parametrize("backend", ["reference", "sdpa", "math", "flash", "flex"])
def test_in_half_precision_products_that_are_too_large_before_they_are_scaled_do_no_harm(backend):
    q = torch.full((1, 1, 2, 64), 40.0).half()  # q k is 102,400, beyond float16's 65,504; times 1/8 it is 12,800
    v = torch.randn(1, 1, 2, 64, generator=torch.Generator().manual_seed(0)).half()
    expected = attend(q.double(), q.double(), v.double(), scale=0.125, backend="reference")
    assert relative_error(attend(q, q, v, scale=0.125, backend=backend), expected) < 1e-3
    assert (q @ q.mT).isinf().all()  # control: it is not the kernel that has room


SWITCHES = ("flash", "mem_efficient", "math", "cudnn")


def switches() -> dict[str, bool]:
    """Which of its kernels PyTorch may choose now, in the whole process."""
    return {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in SWITCHES}


def only(name: str) -> dict[str, bool]:
    return dict.fromkeys(SWITCHES, False) | {name: True}


def a_thread(target, *args) -> threading.Thread:
    """One that does not keep the process alive: a thread that waits for ever is a fault to be shown, not a test that hangs."""
    return threading.Thread(target=target, args=args, daemon=True)


def ended(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive(), "waits for ever"


class Unguarded:
    """No turns: every thread comes in at once."""

    alone = contextlib.nullcontext
    __enter__ = __exit__ = lambda *_: None


@pytest.fixture
def as_before():
    """The switches and the filters of warnings after a test that leaves them wrong."""
    before = switches()
    with warnings.catch_warnings():
        yield before
    for name, enabled in before.items():
        getattr(torch.backends.cuda, f"enable_{name}_sdp")(enabled)


def meeting(monkeypatch, first: str, second: str) -> tuple[dict, dict, bool]:
    """Two threads attend: the second comes in while the first is inside PyTorch's attention, if it may, and leaves after it.

    Returns: the switches that each finds there, and whether they met.
    """
    qkv = [t.detach() for t in inputs(1, 4, 1, 9, 9, 8, 8)]
    expected, real = attend(*qkv, scale=0.3, backend="reference"), F.scaled_dot_product_attention
    inside, together, seen, met, right = threading.Event(), threading.Event(), {}, [], []

    def attention(*arguments, **options):
        me = threading.current_thread()
        if me is threads[0]:
            inside.set()
            met.append(together.wait(0.3))
        else:
            together.set()
        seen[me] = switches()
        if me is threads[1]:
            ended(threads[0])
        return real(*arguments, **options)

    def work(backend):
        right.append(relative_error(attend(*qkv, scale=0.3, backend=backend), expected) < TOLERANCE[torch.float64])

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    threads = [a_thread(work, backend) for backend in (first, second)]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    ended(threads[1])
    assert right == [True, True]
    return seen[threads[0]], seen[threads[1]], met == [True]


@pytest.mark.parametrize("first, second", [("math", "flash"), ("flash", "math"), ("math", "sdpa"), ("sdpa", "math")])
def test_a_kernel_is_forced_on_no_other_thread(monkeypatch, as_before, first, second):
    filters = len(warnings.filters)
    seen = meeting(monkeypatch, first, second)[:2]
    assert seen == tuple(as_before if backend == "sdpa" else only(backend) for backend in (first, second))
    assert switches() == as_before and len(warnings.filters) == filters
    monkeypatch.undo()
    monkeypatch.setattr(backends, "turns", Unguarded())  # control
    *seen, met = meeting(monkeypatch, first, second)
    assert met
    if "sdpa" in (first, second):
        assert seen == [only("math"), only("math")]
    else:  # each puts back what was there when it came: for the second, the first's
        assert switches() == only(first) and len(warnings.filters) == filters + 1


def test_threads_that_let_pytorch_choose_do_not_wait_for_each_other(monkeypatch, as_before):
    assert meeting(monkeypatch, "sdpa", "sdpa") == (as_before, as_before, True)


def test_many_threads_with_kernels_of_their_own_choice_are_right_and_leave_everything_as_it_was(as_before):
    """Of unequal widths: "flash" refuses each time, and while it is forced, PyTorch's own choice would find no kernel at all."""
    before, filters, failed = switches(), list(warnings.filters), collections.Counter()
    qkv = [t.detach() for t in inputs(1, 4, 1, 7, 7, 8, 5)]
    expected = attend(*qkv, scale=0.3, causal=True, backend="reference")

    def work(backend):
        for _ in range(30):
            try:
                z = attend(*qkv, scale=0.3, causal=True, backend=backend)
            except Exception as error:
                failed[backend, type(error)] += 1
            else:
                failed[backend] += not torch.allclose(z, expected, rtol=1e-12, atol=1e-12)

    threads = [a_thread(work, backend) for backend in ("math", "flash", "math", "flash", "sdpa", "sdpa")]
    threads.append(a_thread(lambda: attend(*qkv, scale=0.3, causal=True, backend="flex")))
    for thread in threads:
        thread.start()
    ended(*threads)
    assert +failed == {("flash", ValueError): 60}
    assert switches() == before and warnings.filters == filters


def test_a_thread_that_waits_to_be_alone_is_not_kept_waiting_by_others_that_come():
    turns, order = backends.Turns(), []

    def come(turn, name):
        with turn:
            order.append(name)

    threads = [a_thread(come, *case) for case in ((turns.alone(), "alone"), (turns, "one of many"))]
    with turns:
        for thread in threads:
            thread.start()
            thread.join(0.1)
        assert not order
    ended(*threads)
    assert order == ["alone", "one of many"]


def test_a_refusal_ends_the_turn():
    for _ in range(2):
        with pytest.raises(ValueError, match="backend 'flash' refuses"):
            attend(*inputs(1, 4, 1, 7, 7, 8, 5), scale=0.3, backend="flash")
    turns = backends.Turns()
    for enter in (turns.alone, lambda: turns):
        with pytest.raises(ZeroDivisionError), enter():
            raise ZeroDivisionError
    assert not any(lock.locked() for lock in (turns._door, turns._room, turns._count))


@pytest.mark.no_cover  # of which the compiler would take twice as long
@pytest.mark.parametrize("backend", ["flash", "math"])
def test_a_layer_compiles_into_one_graph_with_a_kernel_forced(backend):
    from torch._dynamo.backends.common import aot_autograd

    called, before = set(), switches()

    def keep(graph, _):
        called.update(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compiler.reset()
    layer, x = TuckerAttention(24, 6, (4, 9, 8), (3, 7, 8)).double(), torch.randn(1, 9, 24, dtype=torch.float64)
    compiled = torch.compile(layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    assert relative_error(compiled(x, backend=backend), layer(x, backend="reference")) < TOLERANCE[torch.float64]
    assert any("flash_attention" in name for name in called) == (backend == "flash")
    assert switches() == before
