"""Rung 14: the Triton kernels against the specification, in the interpreter on a CPU and compiled on a GPU."""

import functools
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import DIFFERENT, TOLERANCE, attention_inputs, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from tucker_ref import GroupedQueryAttention, MultiHeadAttention, MultiHeadLatentAttention, Rotary, TuckerAttention
from tucker_ref.attend import attend

pytest.importorskip("triton", reason="triton is not installed; on Linux it is in the dev extra")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from tucker_ref.kernels import decode, latent_attention  # noqa: E402
from tucker_ref.kernels.latent_attention import LOG2_E, constants, grid_of, load_tile  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BOUNDS = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: TOLERANCE[torch.bfloat16]}  # as in helpers; fp16: eps 1e-3
HALF = [
    torch.float16,
    pytest.param(
        torch.bfloat16,
        marks=pytest.mark.skipif(DEVICE == "cpu", reason="Triton's interpreter multiplies bfloat16 matrices as integers"),
    ),
]
# The interpreter takes twice as long where coverage is measured: one case of a kind is enough.
UNMEASURED = pytest.mark.no_cover


def unmeasured(*cases) -> list:
    """Each of these arguments of a parametrized test with this mark."""
    return [pytest.param(case, marks=UNMEASURED) for case in cases]


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["float32", "float16", "bfloat16"])
SHAPES = [  # b, h, g, n, m, k, v
    (2, 1, 1, 2, 2, 4, 4),
    (2, 3, 3, 7, 7, 5, 5),
    (2, 4, 1, 16, 33, 18, 10),
    *unmeasured((1, 4, 2, 37, 37, 8, 24), (1, 4, 1, 63, 63, 32, 16)),
]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Every buffer that is allocated without contents holds NaN: what a kernel forgets to write shows."""
    torch.utils._device._device_constructors()  # which it remembers: `with torch.device(...)` must know torch.empty as it is
    for place, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(place, name)

        def filled(*arguments, original=original, **options):
            result = original(*arguments, **options)
            return result.fill_(float("nan")) if result.is_floating_point() else result

        monkeypatch.setattr(place, name, filled)


def inputs(*shape_and_dtype) -> list[torch.Tensor]:
    return attention_inputs(*shape_and_dtype, device=DEVICE)


def direction_of(y: torch.Tensor) -> torch.Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)


def with_gradients(y: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    return [y.detach(), *torch.autograd.grad((y * direction_of(y)).sum(), leaves)]


@DTYPES
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_flash_attention_matches_reference_in_output_and_gradient(shape, causal, dtype):
    qkv = inputs(*shape, dtype)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    expected = with_gradients(attend(*exact, scale=0.3, causal=causal, backend="reference"), exact)
    actual = with_gradients(attend(*qkv, scale=0.3, causal=causal, backend="triton"), qkv)
    assert max(relative_error(a, e) for a, e in zip(actual, expected)) < BOUNDS[dtype]
    wrong = attend(*qkv, scale=0.3, causal=not causal, backend="triton")  # controls
    assert relative_error(wrong, expected[0]) > DIFFERENT
    assert relative_error(attend(*qkv, scale=0.4, causal=causal, backend="triton"), expected[0]) > DIFFERENT


def test_one_token_sees_itself():
    q, k, v = inputs(1, 2, 1, 1, 1, 4, 4, torch.float32)
    z = attend(q, k, v, scale=0.3, causal=True, backend="triton")
    assert torch.equal(z, v.expand_as(z))
    dq, dk, dv = torch.autograd.grad(z.sum(), (q, k, v))
    assert dq.abs().max() < 1e-6 and dk.abs().max() < 1e-6 and torch.equal(dv, torch.full_like(dv, 2.0))


TUCKER = {
    "plain": dict(ranks=(4, 9, 10), post_ranks=(3, 7, 5)),
    "wide": dict(ranks=(6, 20, 23), post_ranks=(5, 24, 17)),
    "bias": dict(ranks=(4, 9, 10), post_ranks=(3, 7, 5), bias=True),
    "norm": dict(ranks=(4, 9, 10), post_ranks=(3, 7, 5), latent_norm=True),
    "latent RoPE": dict(ranks=(4, 9, 10), post_ranks=(3, 7, 5), rotary=Rotary.latent(10, base=50.0)),
    "interleaved": dict(ranks=(4, 9, 10), post_ranks=(3, 7, 5), rotary=Rotary.latent(10, base=50.0, pairing="interleaved")),
    "groups": dict(ranks=(4, 9, 12), rotary=Rotary.groups(4, 3, base=50.0)),
    "decoupled, shared": dict(ranks=(4, 9, 14), shared_kv=True, rotary=Rotary.decoupled(8, 6, base=50.0)),
}
EVERY = pytest.mark.parametrize("name", TUCKER)


def layer_of(name: str, dtype: torch.dtype) -> TuckerAttention:
    torch.manual_seed(0)
    layer = TuckerAttention(24, 6, **TUCKER[name])
    with torch.no_grad():
        for parameter in layer.parameters():  # attention far from uniform, and biases that matter
            parameter.copy_(torch.randn(parameter.shape) * 1.5 / parameter.shape[-1] ** 0.5)
    return layer.to(DEVICE, dtype)


def tokens(n: int, dtype: torch.dtype) -> torch.Tensor:
    x = torch.randn(2, n, 24, generator=torch.Generator().manual_seed(3))
    return x.to(DEVICE, dtype).requires_grad_()


CASES = (
    [("plain", True, "default")]
    + [pytest.param(name, True, "default", marks=UNMEASURED) for name in TUCKER if name != "plain"]
    + [
        pytest.param(name, *case, marks=UNMEASURED)
        for name in ("latent RoPE", "decoupled, shared")
        for case in ((False, "default"), (True, "per token"), (False, "per sequence"))
    ]
)


@pytest.mark.parametrize("name, causal, positions", CASES)
def test_tucker_attention_matches_its_reference_in_output_and_every_gradient(name, causal, positions):
    layer, exact = layer_of(name, torch.float32), layer_of(name, torch.float64)
    x, x_exact = tokens(19, torch.float32), tokens(19, torch.float64)
    places = {"default": None, "per token": torch.arange(19) * 3 + 5, "per sequence": torch.arange(38).view(2, 19) * 2}[
        positions
    ]
    options = dict(causal=causal, positions=None if places is None else places.to(DEVICE))
    expected = with_gradients(exact(x_exact, backend="reference", **options), [x_exact, *exact.parameters()])
    actual = with_gradients(layer(x, backend="triton", **options), [x, *layer.parameters()])
    assert max(relative_error(a, e) for a, e in zip(actual, expected)) < BOUNDS[torch.float32]
    if "RoPE" in name and positions == "per token":  # control: other places
        assert (
            relative_error(layer(x, backend="triton", causal=causal, positions=places.to(DEVICE) ** 2), expected[0]) > DIFFERENT
        )


@UNMEASURED
@pytest.mark.parametrize("dtype", HALF, ids=["float16", "bfloat16"])
@EVERY
def test_in_half_precision_it_is_as_exact_as_the_stock_path(name, dtype):
    """Both round queries to the same precision; ours may err by twice as much as PyTorch's own kernel, plus one rounding."""
    layer, exact, x = layer_of(name, dtype), layer_of(name, torch.float64), tokens(19, dtype)
    x_exact = x.detach().double().requires_grad_()
    with torch.no_grad():
        for a, b in zip(exact.parameters(), layer.parameters()):
            a.copy_(b.double())
    expected = with_gradients(exact(x_exact, backend="reference"), [x_exact, *exact.parameters()])
    stock, ours = (with_gradients(layer(x, backend=backend), [x, *layer.parameters()]) for backend in ("sdpa", "triton"))
    for a, b, e in zip(ours, stock, expected):
        assert relative_error(a, e) < 2 * relative_error(b, e) + torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["wide", "latent RoPE", "decoupled, shared"])
@torch.no_grad()
def test_prefill_and_decode_through_the_cache(name):
    layer, x = layer_of(name, torch.float32), tokens(12, torch.float32)
    cache = layer.new_cache(2, 12)
    pieces = [layer(part, cache=cache, backend="triton") for part in x.split([5, 1, 4, 1, 1], dim=1)]
    assert relative_error(torch.cat(pieces, dim=1), layer(x, backend="reference")) < BOUNDS[torch.float32]


@pytest.mark.parametrize(
    "make",
    [
        lambda: MultiHeadAttention(24, 6, rotary=Rotary.heads(4)),
        lambda: GroupedQueryAttention(24, 6, 2, bias=True),
        lambda: MultiHeadLatentAttention(24, 6, 10, 8, rope_dim=4, rotary=Rotary.heads(4)),
        lambda: MultiHeadLatentAttention(24, 6, 10, 8, rope_dim=4, rotary=Rotary.heads(4), absorb=True),
    ],
    ids=["MHA", "GQA", "MLA", "MLA absorbed"],
)
@torch.no_grad()
def test_the_other_mechanisms_run_on_the_kernel_without_mixing(make):
    torch.manual_seed(0)
    layer, x = make().to(DEVICE), tokens(21, torch.float32)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 1.5 / parameter.shape[-1] ** 0.5)
    assert relative_error(layer(x, backend="triton"), layer(x, backend="reference")) < BOUNDS[torch.float32]


@pytest.mark.filterwarnings("ignore:.*(TensorFloat32|cuBLAS):UserWarning")  # PyTorch's advice for a GPU
@pytest.mark.parametrize("name", ["plain", *unmeasured("latent RoPE", "decoupled, shared")])
def test_the_layer_compiles_into_one_graph_with_the_kernel(name):
    torch.compiler.reset()
    layer, x = layer_of(name, torch.float32), tokens(19, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    expected, actual = (with_gradients(f(x, backend="triton"), [x, *layer.parameters()]) for f in (layer, compiled))
    assert max(relative_error(a, e) for a, e in zip(actual, expected)) < BOUNDS[torch.float32]


def test_no_tensor_of_all_heads_queries_is_made():
    class Seen(TorchDispatchMode):
        sizes: set = set()

        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            for tensor in result if isinstance(result, (tuple, list)) else [result]:
                if isinstance(tensor, torch.Tensor):
                    Seen.sizes.add(tensor.numel())
            return result

    layer, x = layer_of("latent RoPE", torch.float32), tokens(21, torch.float32)
    all_queries = 2 * 6 * 21 * 10  # b h n t
    with Seen():
        with_gradients(layer(x, backend="triton"), [x, *layer.parameters()])
    assert all_queries not in Seen.sizes and 2 * 6 * 21 * 5 in Seen.sizes  # z, (b, h, n, v), is there
    with Seen():  # control
        layer(x, backend="sdpa")
    assert all_queries in Seen.sizes


@pytest.mark.no_cover
@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    "shape", [(2, 6, 1, 1, 37, 10, 7), (1, 4, 4, 1, 50, 8, 8), (2, 4, 2, 1, 1, 16, 16), (1, 20, 1, 1, 130, 4, 4)]
)
@torch.no_grad()
def test_decoding_in_parts_matches_reference_on_views_of_a_cache(shape, dtype):
    q, k, v = (t.detach() for t in inputs(*shape, dtype))
    longer = [torch.cat([x, torch.full_like(x, float("nan"))], dim=2)[:, :, : x.shape[2]] for x in (k, v)]  # room behind them
    expected = attend(q.double(), k.double(), v.double(), scale=0.3, backend="reference")
    assert relative_error(attend(q, *longer, scale=0.3, backend="triton"), expected) < BOUNDS[dtype]
    if shape[4] > 1:  # controls
        assert relative_error(attend(q, *longer, scale=0.5, backend="triton"), expected) > DIFFERENT
        assert relative_error(attend(q, k[:, :, 1:], v[:, :, 1:], scale=0.3, backend="triton"), expected) > DIFFERENT


class Launched:
    """In place of a kernel: notes how it is launched, and launches it."""

    def __init__(self, monkeypatch, name: str, run: bool = True):
        self.kernel, self.grids, self.known, self.run = getattr(decode, name), [], [], run
        monkeypatch.setattr(decode, name, self)

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.grids.append(grid)
            self.known += [x for x in arguments if isinstance(x, decode.Known)]
            return self.kernel[grid](*arguments, **options) if self.run else None

        return launch


def cache_of(layout: str, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of two sequences as a mechanism has them."""
    shapes = {  # h, g, k, v
        "MHA": (3, 3, 8, 8), "GQA": (6, 2, 8, 8), "MQA": (6, 1, 8, 8), "unequal latents": (5, 1, 18, 10), "by token": (6, 3, 8, 5),
        "MLA": (6, 1, 24, 18), "MLA, no key of its own": (6, 1, 10, 10), "MLA, two blocks of heads": (70, 1, 12, 8),
    }  # fmt: skip
    h, g, t, width = shapes[layout]
    q, k, v = (x.detach() for x in inputs(2, h, g, 1, m, t, width, torch.float32))
    if layout == "by token":  # (b, m, g, k) in memory
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    return q, k, k[..., :width] if "MLA" in layout else v


@pytest.mark.parametrize("m", [1, 130, *unmeasured(37)])
@pytest.mark.parametrize(
    "layout",
    [
        *["MLA", "by token"],
        *unmeasured("MHA", "GQA", "MQA", "unequal latents", "MLA, no key of its own", "MLA, two blocks of heads"),
    ],
)
@torch.no_grad()
def test_every_mechanism_decodes_as_the_reference(layout, m, monkeypatch):
    q, k, v = cache_of(layout, m)
    part, join = Launched(monkeypatch, "part_kernel"), Launched(monkeypatch, "join_kernel")
    y = attend(q, k, v, scale=0.3, backend="triton")
    expected = attend(q.double(), k.double(), v.double(), scale=0.3, backend="reference")
    assert relative_error(y, expected) < BOUNDS[torch.float32]
    ((programs, parts, _),) = part.grids
    assert (parts > 1) == (m >= {2: 37, 4: 130, 6: 999}[programs]) and len(join.grids) == (parts > 1)  # one part is the result
    if m > 1:  # controls: values of other tokens, and keys whose channels are others
        assert relative_error(attend(q, k, v.flip(2), scale=0.3, backend="triton"), expected) > DIFFERENT
        assert relative_error(attend(q, k.roll(1, 3), v, scale=0.3, backend="triton"), expected) > DIFFERENT


@torch.no_grad()
def test_values_that_are_a_view_of_their_keys_are_read_once_and_others_are_not_taken_for_such(monkeypatch):
    """Of a key the kernel then reads only what is no value."""
    memory = torch.randn(2 * 40 * 24, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    k, part = memory.view(2, 1, 40, 24), Launched(monkeypatch, "part_kernel")
    q = torch.randn(2, 6, 1, 24, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    views = {
        "first channels": (k[..., :18], 6), "all": (k, 0), "last channels": (k[..., 6:], 24), "a copy": (k[..., :18].clone(), 24),
        "other rows": (memory.as_strided((2, 1, 40, 18), (960, 960, 18, 1)), 24),
    }  # fmt: skip
    for name, (v, own) in views.items():
        expected = attend(q.double(), k.double(), v.double(), scale=0.3, backend="reference")
        assert relative_error(attend(q, k, v, scale=0.3, backend="triton"), expected) < BOUNDS[torch.float32], name
        assert own == part.known[-1].OWN, name
    monkeypatch.setattr(decode, "_begin_with", lambda k, v: True)  # control: the last view, taken for the first one
    assert relative_error(attend(q, k, v, scale=0.3, backend="triton"), expected) > DIFFERENT


@torch.no_grad()
def test_decoding_reads_the_cache_where_it_lies(monkeypatch):
    """Neither K nor V is copied, be they longer, in another order or one the other's view: contiguous() is called on the query alone."""
    copied, contiguous = [], torch.Tensor.contiguous
    q, k, v = (t.detach() for t in inputs(2, 6, 2, 1, 64, 8, 8, torch.float32))
    by_token, gaps = k.transpose(1, 2).contiguous().transpose(1, 2), k.transpose(2, 3).contiguous().transpose(2, 3)
    monkeypatch.setattr(torch.Tensor, "contiguous", lambda x: copied.append(tuple(x.shape)) or contiguous(x))
    for keys, values in ((k[:, :, :33], v[:, :, :33]), (by_token, v), (k, k[..., :5])):
        attend(q, keys, values, scale=0.3, backend="triton")
    assert set(copied) == {(2, 6, 1, 8)}
    attend(q, gaps, v, scale=0.3, backend="triton")
    assert (2, 2, 64, 8) in copied  # control: a key whose numbers do not lie side by side must be


def test_a_mask_is_refused_before_the_cache_is_touched():
    layer, x = layer_of("plain", torch.float32), tokens(5, torch.float32)
    cache = layer.new_cache(2, 5)
    with pytest.raises(ValueError, match="'triton' takes no mask"):
        layer(x, backend="triton", mask=torch.ones(5, 5, dtype=torch.bool, device=DEVICE), cache=cache)
    assert cache.length == 0


@pytest.mark.skipif(DEVICE == "cuda", reason="compiled kernels take bfloat16")
def test_bfloat16_is_refused_where_the_interpreter_would_be_wrong():
    with pytest.raises(ValueError, match="interpreter multiplies bfloat16 matrices as integers"):
        layer_of("plain", torch.bfloat16)(tokens(5, torch.bfloat16), backend="triton")


def test_the_wrong_device_is_named(monkeypatch):
    monkeypatch.setattr(latent_attention, "interpreted", lambda: DEVICE == "cuda")
    with pytest.raises(ValueError, match=f"backend 'triton' got tensors on {DEVICE}.*TRITON_INTERPRET=1"):
        layer_of("plain", torch.float32)(tokens(5, torch.float32), backend="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter's view; test_gpu.py captures it in a graph")
def test_a_compiler_knows_the_shape_of_what_decoding_returns():
    q, k, v = (t.detach() for t in inputs(2, 6, 1, 1, 9, 8, 4, torch.float32))
    torch.library.opcheck(decode.decode, (q, k, v, 0.3), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter's view")
@pytest.mark.parametrize("name", ["latent RoPE", "one matrix of queries"])
def test_a_compiler_knows_the_shapes_of_what_training_returns(name, monkeypatch):
    given = {}

    def called(operator, *arguments):
        given[operator] = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
        return operator(*arguments)

    for operator in ("flash", "flash_backward"):
        monkeypatch.setattr(latent_attention, operator, functools.partial(called, getattr(latent_attention, operator)))
    if name == "latent RoPE":
        y = layer_of(name, torch.float32)(tokens(3, torch.float32), backend="triton")
    else:
        y = attend(*inputs(2, 4, 2, 3, 3, 8, 4, torch.float32), scale=0.3, causal=True, backend="triton")
    y.sum().backward()
    assert len(given) == 2
    for operator, arguments in given.items():
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


def test_no_sequences_with_positions_of_their_own_give_none():
    layer = TuckerAttention(24, 6, (4, 9, 8), rotary=Rotary.latent(8)).to(DEVICE)
    x, places = torch.randn(0, 5, 24, device=DEVICE), torch.zeros(0, 5, dtype=torch.long, device=DEVICE)
    assert layer(x, positions=places, backend="triton").shape == (0, 5, 24)


def test_one_token_in_double_precision_is_exact():
    if DEVICE != "cpu":
        pytest.skip("double precision is for the interpreter")
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in ((1, 4, 1, 8), (1, 1, 40, 8), (1, 1, 40, 8)))
    z, expected = (attend(q, k, v, scale=0.5, backend=backend) for backend in ("triton", "reference"))
    assert relative_error(z, expected) < 1e-12


@triton.jit
def copy_kernel(base, out, first, STRIDE: tl.constexpr, WIDE: tl.constexpr):
    """16 rows of 16 numbers, from row `first` on of a matrix whose rows lie STRIDE apart."""
    rows, columns = first + tl.arange(0, 16), tl.arange(0, 16)
    if WIDE:
        copied = load_tile(base, rows, first + 16, STRIDE, columns, 16)
    else:
        copied = tl.load(base + rows[:, None] * STRIDE + columns[None, :])
    tl.store(out + tl.arange(0, 16)[:, None] * 16 + columns[None, :], copied)


@pytest.mark.parametrize("first", [2**15 - 16, 2**15])
def test_tiles_beyond_two_to_the_31_numbers_are_read_where_they_lie(first):
    """Rows of DeepSeek-V3's absorbed attention: 128 heads with values of 512. Hardly a page of the 4 GB becomes real on a CPU."""
    stride = 128 * 512
    memory = torch.empty(2**32 + 2**21, dtype=torch.uint8, device=DEVICE)
    base = memory[2**31 :]  # what is counted in 32 bits lands before it, and is ours too
    memory[: 2**21] = 7
    rows = base.as_strided((16, 16), (stride, 1), 2**31 + first * stride)
    rows.copy_(torch.arange(256, dtype=torch.uint8).view(16, 16))
    out = torch.zeros(16, 16, dtype=torch.uint8, device=DEVICE)
    copy_kernel[(1,)](base, out, first, stride, True)
    assert torch.equal(out, rows)
    if first * stride >= 2**31:  # control
        copy_kernel[(1,)](base, out, first, stride, False)
        assert (out == 7).all()


def untouched(*shape: int) -> torch.Tensor:
    """Numbers in float16 of which only those that are read or written take memory."""
    return torch.empty(2 * math.prod(shape), dtype=torch.uint8).view(torch.float16).view(shape)


@UNMEASURED
@pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu.py runs all programs of this size")
def test_the_last_tile_beyond_two_to_the_31_numbers_is_stored_and_read_back(monkeypatch):
    """One program of each kernel, the last: 1,024 heads with values of 64 take as much room a token as above."""
    h, n, t, v, last, scale = 2**10, 2**15 + 16, 16, 64, slice(2**15, None), 0.3
    head = h - 1
    random = torch.Generator().manual_seed(0)
    q, z, dz, dq = untouched(1, h, n, t), untouched(1, n, h, v), untouched(1, n, h, v), untouched(1, h, n, t)
    assert (n - 1) * h * v >= 2**31
    lse, delta = torch.zeros(1, h, n), torch.zeros(1, h, n)
    key, value = (torch.randn(1, 1, n, width, generator=random).half() for width in (t, v))
    q[:, head, last], dz[:, last, head] = torch.randn(1, 16, t, generator=random), torch.randn(1, 16, v, generator=random)
    monkeypatch.setattr(latent_attention, "program_tile", lambda HEADS: (2**15 // 16, 0, HEADS - 1))
    monkeypatch.setattr(latent_attention, "program_tile_from_the_end", latent_attention.program_tile)
    exact = [x.detach().double().requires_grad_() for x in (q[:, head:, last], key, value)]
    for m in (32, n):  # the last queries see all of a few sources, then the last sources are seen by the last queries alone
        few = [exact[0], *(x[:, :, :m] for x in exact[1:])]
        expected = attend(*few, scale=scale, causal=m == n, backend="reference")
        gradients = torch.autograd.grad((expected * dz[:, last, head].double()).sum(), exact)
        k, w = (x[:, :, :m].contiguous() for x in (key, value))
        known = constants(q, None, None, k, w, h, m == n)
        given = (q, None, None, None, k, w)
        if m < n:
            latent_attention.forward_kernel[(1, 1, 1)](*given, z, lse, n, m, scale * LOG2_E, known, QUERIES=16, SOURCES=32)
            assert relative_error(z[:, last, head], expected[0, 0][None]) < BOUNDS[torch.float16]
            latent_attention.queries_backward_kernel[(1, 1, 1)](
                *given, z, dz, lse, delta, dq, None, n, m, scale * LOG2_E, scale, known, QUERIES=16, SOURCES=32
            )
            assert relative_error(dq[:, head, last], gradients[0][:, 0]) < BOUNDS[torch.float16]
            continue
        logits = few[0] @ few[1].mT * scale
        hidden = torch.ones(16, n, dtype=torch.bool).triu(n - 15)
        lse[0, head, last] = (logits.masked_fill(hidden, -math.inf)[0, 0].logsumexp(-1) * LOG2_E).float()
        delta[0, head, last] = (expected[0, 0] * dz[0, last, head]).sum(-1).float()
        dk, dv = torch.zeros(1, 1, n, t), torch.zeros(1, 1, n, v)
        latent_attention.sources_backward_kernel[(1, 1, 1)](
            *given, dz, lse, delta, dk, dv, n, m, scale * LOG2_E, h, known, QUERIES=32, SOURCES=16
        )
        for actual, wanted in zip((dk, dv), gradients[1:]):
            assert relative_error(actual[:, :, last], wanted[:, :, last]) < BOUNDS[torch.float16]
            assert relative_error(actual[:, :, last], wanted[:, :, -32:-16]) > DIFFERENT  # control: other rows


def test_tiles_beyond_a_grids_second_dimension_go_into_its_third(monkeypatch):
    """As with more than 65,535 tiles, which would take minutes: three deep, and with programs that have no rows."""
    qkv = inputs(1, 2, 1, 69, 69, 8, 8, torch.float32)
    exact = [t.detach().double().requires_grad_() for t in qkv]
    expected = with_gradients(attend(*exact, scale=0.3, causal=True, backend="reference"), exact)
    grids = []

    def deep(each, tiles, split=True):
        grids.append((each, triton.cdiv(tiles, 3), 3 if split else 1))
        return grids[-1]

    monkeypatch.setattr(latent_attention, "grid_of", deep)
    actual = with_gradients(attend(*qkv, scale=0.3, causal=True, backend="triton"), qkv)
    assert max(relative_error(a, e) for a, e in zip(actual, expected)) < BOUNDS[torch.float32]
    assert len(grids) == 3 and (DEVICE == "cuda" or all(grid[1:] == (2, 3) for grid in grids))  # five tiles
    monkeypatch.setattr(latent_attention, "grid_of", lambda each, tiles: deep(each, tiles, split=False))
    wrong = with_gradients(attend(*qkv, scale=0.3, causal=True, backend="triton"), qkv)  # control: tiles are missing
    assert max(relative_error(a, e) for a, e in zip(wrong, expected)) > DIFFERENT


def test_a_grid_is_as_long_as_cuda_allows_or_refused():
    assert grid_of(7, 65535) == (7, 65535, 1) and grid_of(7, 65536) == (7, 32768, 2) and grid_of(1, 200001) == (1, 50001, 4)
    assert grid_of(2**31 - 1, 1) == (2**31 - 1, 1, 1)
    for many in ((2**31, 1), (2**15, 2**16)):
        with pytest.raises(ValueError, match="would start 2,147,483,648 programs and may start 2,147,483,647"):
            grid_of(*many)


@pytest.mark.parametrize("n", [1, 2])
def test_too_many_programs_are_refused_before_anything_is_made(n):
    q, k = torch.zeros(1, device=DEVICE).expand(2**16, 2**15, n, 1), torch.zeros(1, device=DEVICE).expand(2**16, 1, n, 1)
    with pytest.raises(
        ValueError, match="backend 'triton' would start 2,147,483,648 programs.*fewer sequences, heads or tokens"
    ):
        attend(q, k, k, scale=1.0, backend="triton")


@torch.no_grad()
def test_decoding_many_sequences_with_many_keys_fits_into_a_grid(monkeypatch):
    """1,024 sequences with 64 key heads: CUDA takes 65,535 in a second dimension. test_gpu.py computes them."""
    part, join = (Launched(monkeypatch, name, run=False) for name in ("part_kernel", "join_kernel"))
    q, k = torch.zeros(1024, 64, 1, 16, device=DEVICE), torch.zeros(1024, 64, 4, 16, device=DEVICE)
    assert attend(q, k, k, scale=0.25, backend="triton").shape == q.shape
    assert part.grids == [(65536, 1, 1)] and join.grids == []
    monkeypatch.setattr(decode, "split", lambda *_: (2, 2))
    attend(q, k, k, scale=0.25, backend="triton")
    assert part.grids[1:] == [(65536, 2, 1)] and join.grids == [(65536, 1, 1)]


@pytest.mark.parametrize("slots", [6, 132, 264])
@pytest.mark.parametrize("groups", [1, 7, 16, 100, 512, 65536])
def test_sources_are_cut_so_that_all_programs_end_early(groups, slots):
    def time(parts, each):
        return math.ceil(groups * parts / slots) * (each + 1)

    for m in (1, 127, 128, 129, 8192, 131071):
        parts, part = decode.split(groups, m, 128, slots)
        assert (
            1 <= parts <= 256 and part % 128 == 0 and (parts - 1) * part < m <= parts * part
        )  # none is empty, nothing is left
        tiles = math.ceil(m / 128)
        assert time(parts, part // 128) <= min(time(p, math.ceil(tiles / p)) for p in range(1, min(tiles, 256) + 1))
    if groups < slots:  # control: a sequence that is not cut leaves most of the GPU idle
        assert time(parts, part // 128) < time(1, tiles) / min(4, slots // groups)


FOR_HOPPER = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from tucker_ref.kernels import decode

def compiled(kernel, constants, **options):
    names = kernel.arg_names
    bf16, single = ("q_ptr", "k_ptr", "v_ptr", "mask_ptr", "out_ptr"), ("z_ptr", "lse_ptr")
    types = {n: "constexpr" if n in constants else "*bf16" if n in bf16 else "*fp32" if n in single else "i32" for n in names}
    types |= {"scale": "fp32"} if "scale" in names else {}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n not in constants and n not in ("scale", "parts")}
    source = ASTSource(kernel, types, {(names.index(n),): value for n, value in constants.items()}, aligned)
    return compile(source, GPUTarget("cuda", 90, 32), options)

def known(heads, t, own, width):
    return decode.Known(
        HEADS=heads, GROUPS=1, T=t, V=width, OWN=own, K_ROW=t, V_ROW=t if own < t else width, BLOCKS=1, HEADS_PAD=heads,
        V_PAD=decode.pad(width), OWN_PAD=decode.pad(own), MASKED=False, EARLY=True,
    )
"""


def printed_for_hopper(program: str) -> str:
    """What a program prints that compiles kernels for a GPU which need not be here; the interpreter has no two kernels at once."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", FOR_HOPPER + program]
    ran = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@UNMEASURED
@pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu.py runs them")
def test_compiled_for_hopper_the_second_kernel_waits_before_it_reads_and_caches_are_read_in_pieces_of_16_bytes():
    part, early, late, _ = printed_for_hopper(
        """
join = dict(HEADS=32, V=128, WIDTH=128, PARTS_PAD=8)
for kernel, constants in (
    (decode.part_kernel, dict(known=known(32, 128, 128, 128), SOURCES=64)),
    (decode.join_kernel, dict(join, EARLY=True)),
    (decode.join_kernel, dict(join, EARLY=False)),
):
    print(compiled(kernel, constants, num_warps=4, num_stages=3).asm["ptx"], "END")
"""
    ).split("END")
    assert "griddepcontrol.launch_dependents" in part
    before, _, after = early.partition("griddepcontrol.wait")
    assert "ld.global" not in before and "ld.global" in after
    assert "ld.global" in late and "griddepcontrol" not in late  # control
    assert set(re.findall(r"cp\.async\.c\w\.\S+ \[[^,]*\], \[[^,]*\], (\w+)", part)) == {"0x10"}


@UNMEASURED
@pytest.mark.skipif(DEVICE == "cuda", reason="test_gpu.py runs them")
def test_tiles_of_decoding_fit_on_chip():
    used, control, *others = map(
        int,
        printed_for_hopper(
            """
def shared(heads, t, own, width, SOURCES, **options):
    return compiled(decode.part_kernel, dict(known=known(heads, t, own, width), SOURCES=SOURCES), **options).metadata.shared

for heads, t, own, width in (
    (32, 576, 64, 512), (32, 512, 512, 128), (64, 256, 256, 256), (64, 384, 384, 256), (32, 320, 320, 320), (16, 192, 192, 64),
    (16, 64, 64, 64),
):
    on_chip = 2 * (decode.pad(own) + decode.pad(width))
    print(shared(heads, t, own, width, **decode.tiling(2 * (own + width), on_chip, heads, decode.pad(width))))
    if t == 576:
        print(shared(heads, t, own, width, SOURCES=128, num_warps=8, num_stages=4))
"""
        ).split(),
    )
    assert max(used, *others) <= 232_448 < control  # bytes that one program may have on Hopper


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 1, 1, 40), (3, 1, 1, 40), (40,)], ids=str)
def test_one_query_s_mask_hides_sources_from_all_heads(shape):
    """Parts and whole sequences of which nothing is seen are among them."""
    q, k, v = (t.detach() for t in inputs(3, 6, 2, 1, 40, 8, 5, torch.float32))
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.3
    mask[..., :17] = False
    if len(mask) == 3:
        mask[1] = False
    y = attend(q, k, v, scale=0.3, causal=True, mask=mask, backend="triton")
    expected = attend(q.double(), k.double(), v.double(), scale=0.3, mask=mask, backend="reference")
    assert relative_error(y, expected) < BOUNDS[torch.float32] and (y[1] == 0).all() == (len(mask) == 3)
    assert relative_error(attend(q, k, v, scale=0.3, backend="triton"), expected) > DIFFERENT  # control


def test_a_mask_that_the_kernel_does_not_take_is_refused():
    q, k, v = inputs(2, 4, 2, 1, 9, 8, 5, torch.float32)
    for mask in (torch.ones(2, 4, 1, 9, dtype=torch.bool, device=DEVICE), torch.ones(9, dtype=torch.bool, device=DEVICE)):
        with pytest.raises(ValueError, match="backend 'triton' takes no mask"):  # one per head; and q wants a gradient
            attend(q, k, v, scale=0.3, mask=mask, backend="triton")
    with torch.no_grad():
        assert attend(q, k, v, scale=0.3, mask=mask, backend="triton").shape == (2, 4, 1, 5)  # control


@pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter's view")
def test_a_compiler_knows_the_shape_of_masked_decoding():
    q, k, v = (t.detach() for t in inputs(2, 6, 1, 1, 9, 8, 4, torch.float32))
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool)
    torch.library.opcheck(decode.decode, (q, k, v, 0.3, mask), test_utils=("test_schema", "test_faketensor"))


@torch.no_grad()
def test_decoding_reads_one_group_whatever_its_stride_says():
    q, k, v = (t.detach() for t in inputs(3, 6, 1, 1, 40, 8, 5, torch.float32))
    by_token = k[:, 0].unsqueeze(2).transpose(1, 2)  # contiguous as well, but from group to group it says 8
    assert by_token.is_contiguous() and by_token.stride(1) == 8 and k.stride(1) == 8 * 40
    assert torch.equal(*(attend(q, keys, v, scale=0.3, backend="triton") for keys in (k, by_token)))
