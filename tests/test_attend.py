"""Rung 4: every backend means what "reference" means, in output and gradient."""

import math

import pytest
import torch
from helpers import DIFFERENT, TOLERANCE, relative_error
from helpers import attention_inputs as inputs

from tucker_ref import TuckerAttention
from tucker_ref.attend import FORCED, attend

BACKENDS = ("reference", "sdpa", "math")  # those that take every shape, mask and dtype on every device, with gradients

SHAPES = [  # b, h, g, n, m, k, v
    (1, 1, 1, 1, 1, 4, 4),
    (2, 3, 3, 7, 7, 5, 5),
    (1, 12, 4, 63, 63, 8, 8),
    (2, 12, 1, 7, 7, 6, 10),
    (2, 4, 2, 3, 9, 8, 4),
    (1, 6, 2, 1, 33, 8, 8),
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
        (dict(q=torch.ones(4, 5, 3)), "must be \\(batch, heads, tokens, width\\)"),
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
