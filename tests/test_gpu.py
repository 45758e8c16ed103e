"""Rung 4 on a GPU: every backend, forced, in half precision; and that a fast path is a fast path."""

import threading

import pytest
import torch
from helpers import DIFFERENT, attention_inputs, relative_error, tokens
from test_compress import CELLS

from tucker_ref import (
    MultiHeadAttention,
    Rotary,
    TuckerAttention,
    as_tucker,
    choose_ranks,
    compress,
    entropy_rank,
    relative_errors,
    second_moment,
    spectra,
    to_gqa,
    to_mla,
)
from tucker_ref.attend import BACKENDS, FORCED, attend
from tucker_ref.compression.truncation import METHODS

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

# Half of the operands' rounding, once in the weights and once in the output: eps is 8e-3 and 1e-3.
BOUNDS = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
EQUAL = [(2, 4, 1, 63, 63, 64, 64), (1, 4, 4, 257, 257, 64, 64), (2, 4, 2, 130, 130, 128, 128)]  # b, h, g, n, m, k, v
UNEQUAL = [(2, 4, 1, 63, 63, 128, 64), (1, 6, 1, 257, 257, 64, 128)]
NAMES = {  # what PyTorch calls the node of the gradient that each kernel leaves behind
    "flash": "ScaledDotProductFlashAttentionBackward0",
    "cudnn": "ScaledDotProductCudnnAttentionBackward0",
    "efficient": "ScaledDotProductEfficientAttentionBackward0",
}


@pytest.fixture(autouse=True)
def poisoned():
    """The allocator's free memory holds NaN: whatever a kernel forgets to write shows."""
    torch.compiler.reset()  # flex_attention compiles anew for every shape, up to a limit
    torch.cuda.empty_cache()
    sizes = (2**28, *[2**22] * 64, *[2**16] * 64)  # what `empty_cache` had to keep is filled as well
    blocks = [torch.full((size,), float("nan"), device="cuda") for size in sizes]
    del blocks


def results(qkv, **options) -> list[torch.Tensor]:
    y = attend(*qkv, **options)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    return [y.detach(), *torch.autograd.grad((y * direction).sum(), qkv)]


@pytest.mark.parametrize("dtype", list(BOUNDS), ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("shape", EQUAL + UNEQUAL, ids=lambda s: "-".join(map(str, s)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_matches_float64_in_output_and_gradient(backend, shape, causal, dtype):
    qkv = attention_inputs(*shape, dtype, device="cuda")
    options = dict(scale=0.1, causal=causal)
    if backend == "flash" and shape in UNEQUAL:
        with pytest.raises(ValueError, match="backend 'flash' refuses q .*: \\w+"):
            attend(*qkv, backend=backend, **options)
        return
    expected = results([x.detach().double().requires_grad_() for x in qkv], backend="reference", **options)
    actual = results(qkv, backend=backend, **options)
    assert max(relative_error(a, e) for a, e in zip(actual, expected)) < BOUNDS[dtype]
    assert relative_error(attend(*qkv, scale=0.1, causal=not causal, backend=backend), expected[0]) > DIFFERENT  # control


@pytest.mark.parametrize("backend", ["sdpa", "cudnn"])
def test_the_layout_in_which_a_gradient_comes_back_does_not_matter(backend):
    """See backends.SameLayoutBack: with the second layout, a plan kept from the first must not be used as it is."""
    qkv = attention_inputs(2, 32, 1, 67, 67, 128, 128, torch.bfloat16, device="cuda")
    dz = torch.randn(2, 32, 67, 128, device="cuda", dtype=torch.bfloat16)
    other = dz.transpose(1, 2).contiguous().transpose(1, 2)
    assert other.stride() != dz.stride() and torch.equal(other, dz)
    first, second = (
        torch.autograd.grad(attend(*qkv, scale=0.1, causal=True, backend=backend), qkv, back) for back in (dz, other)
    )
    assert max(relative_error(a, b) for a, b in zip(second, first)) < 1e-3


def test_the_poison_is_seen():
    """Control: memory that nobody wrote is NaN, large and small."""
    buffers = [torch.empty(size, device="cuda") for size in (2**6, 2**12, 2**18, 2**22)]
    assert [buffer.isnan().all().item() for buffer in buffers] == [True] * 4


def nodes(y: torch.Tensor) -> set[str]:
    """The names of all nodes of the gradient's graph that are attention kernels of PyTorch's."""
    found, waiting = set(), [y.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [parent for parent, _ in node.next_functions]
    return {node.name() for node in found if "ScaledDotProduct" in node.name()}


@pytest.mark.parametrize("backend", sorted(FORCED))
@pytest.mark.parametrize("post_width", [64, 128])
def test_a_forced_kernel_is_the_one_that_ran(backend, post_width):
    layer = TuckerAttention(128, 4, (4, 64, 64), (4, 64, post_width), rotary=Rotary.latent(64)).to("cuda", torch.bfloat16)
    x = torch.randn(2, 65, 128, device="cuda", dtype=torch.bfloat16)
    if backend == "flash" and post_width != 64:
        with pytest.raises(ValueError, match="backend 'flash' refuses"):
            layer(x, backend=backend)
        return
    assert nodes(layer(x, backend=backend)) == ({NAMES[backend]} if backend in NAMES else set())


@pytest.mark.parametrize("post_width", [64, 128])
def test_pytorchs_own_choice_does_not_fall_back_to_math(post_width):
    """Tucker Attention in half precision, equal and unequal widths: one fused kernel. In float32 grouped heads have none."""
    for dtype in (torch.bfloat16, torch.float16):
        layer = TuckerAttention(128, 4, (4, 64, 64), (4, 64, post_width)).to("cuda", dtype)
        assert nodes(layer(torch.randn(2, 65, 128, device="cuda", dtype=dtype))) & set(NAMES.values())
    layer = TuckerAttention(128, 4, (4, 64, 64), (4, 64, post_width)).to("cuda")  # control: what falling back looks like
    assert not nodes(layer(torch.randn(2, 65, 128, device="cuda")))


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"reference", "math"}))
def test_one_shared_key_is_never_repeated_in_memory(backend):
    b, h, n, m, t = 2, 32, 256, 4096, 64  # from 128 queries on, or flex_attention splits the sources and keeps partial sums
    q, k, v = (x.detach() for x in attention_inputs(b, h, 1, n, m, t, t, torch.bfloat16, device="cuda"))
    attend(q, k, v, scale=0.1, backend=backend)  # compiles, and takes its workspace
    held = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attend(q, k, v, scale=0.1, backend=backend)
    assert torch.cuda.max_memory_allocated() - held < h * k.nbytes / 2
    torch.cuda.reset_peak_memory_stats()
    attend(q, k.repeat(1, h, 1, 1), v.repeat(1, h, 1, 1), scale=0.1, backend=backend)  # control
    assert torch.cuda.max_memory_allocated() - held > h * k.nbytes


def test_a_layer_may_be_built_on_the_gpu():
    with torch.device("cuda"):
        layer = TuckerAttention(24, 6, (4, 9, 8), rotary=Rotary.latent(8))
    x = torch.randn(2, 7, 24, device="cuda")
    assert layer.rotary.frequencies.is_cuda and relative_error(layer(x).cpu(), layer.cpu()(x.cpu())) < 1e-5


@pytest.mark.parametrize("backend", ["cudnn", "triton"])
@torch.no_grad()
def test_decoding_can_be_captured_in_a_graph_and_replayed(backend):
    q, k, v = (x.detach() for x in attention_inputs(2, 8, 1, 1, 513, 64, 64, torch.bfloat16, device="cuda"))
    attend(q, k, v, scale=0.1, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = attend(q, k, v, scale=0.1, backend=backend)
    q.normal_()
    k.normal_()
    graph.replay()
    expected = attend(q.double(), k.double(), v.double(), scale=0.1, backend="reference")
    assert relative_error(z, expected) < BOUNDS[torch.bfloat16]


def test_threads_that_force_kernels_are_right_and_leave_pytorchs_switches_as_they_were():
    qkv = [x.detach() for x in attention_inputs(1, 4, 4, 65, 65, 64, 64, torch.bfloat16, device="cuda")]
    expected = attend(*(x.double() for x in qkv), scale=0.1, causal=True, backend="reference")
    flags = [getattr(torch.backends.cuda, f"{name}_sdp_enabled") for name in ("flash", "mem_efficient", "math", "cudnn")]
    before, errors = [flag() for flag in flags], []

    def work(backend):
        for _ in range(50):
            errors.append(relative_error(attend(*qkv, scale=0.1, causal=True, backend=backend), expected))

    threads = [threading.Thread(target=work, args=(backend,)) for backend in (*FORCED, *FORCED, "sdpa", "sdpa")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(errors) == 50 * len(threads) and max(errors) < BOUNDS[torch.bfloat16]
    assert [flag() for flag in flags] == before


def test_our_kernel_reads_and_writes_beyond_two_to_the_31_numbers():
    """DeepSeek-V3's absorbed attention, 128 heads on one key of 64 and value of 512: 32,832 tokens of output. 15 GB, and some seconds.

    Only the last queries of the first two heads get a gradient from above: the keys' and values' come from them alone.
    """
    n, h, t, v, last, scale = 2**15 + 64, 128, 64, 512, slice(-32, None), 0.125
    assert (n - 1) * h * v > 2**31
    random = torch.Generator("cuda").manual_seed(0)
    draw = lambda *shape: torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=random)  # noqa: E731
    qkv = [x.requires_grad_() for x in (draw(1, h, n, t), draw(1, 1, n, t), draw(1, 1, n, v))]
    exact = [x.detach().float().requires_grad_() for x in (qkv[0][:, :2, last], *qkv[1:])]
    dz = torch.zeros(1, n, h, v, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    dz[:, :2, last] = draw(1, 2, 32, v)
    expected = attend(*exact, scale=scale, causal=True, backend="reference")
    gradients = torch.autograd.grad(expected, exact, dz[:, :2, last].float())
    z = attend(*qkv, scale=scale, causal=True, backend="triton")
    dq, dk, dv = torch.autograd.grad(z, qkv, dz)
    for actual, wanted in zip((z[:, :2, last], dq[:, :2, last], dk, dv), (expected, *gradients)):
        assert relative_error(actual, wanted) < BOUNDS[torch.bfloat16]
    assert not dq[:, 2:].any() and not dq[:, :, : n - 32].any()
    assert relative_error(z[:, 2:4, last], expected) > DIFFERENT  # control: other heads


@torch.no_grad()
def test_our_kernel_decodes_more_sequences_and_keys_than_a_grid_has_second_dimensions():
    q, k = (torch.randn(1024, 64, m, 16, device="cuda", dtype=torch.bfloat16) for m in (1, 4))
    z, expected = (
        attend(*x, scale=0.25, backend=name)
        for x, name in (((q, k, k), "triton"), ((q.float(), k.float(), k.float()), "reference"))
    )
    assert relative_error(z, expected) < BOUNDS[torch.bfloat16]
    assert relative_error(z.flip(0), expected) > DIFFERENT  # control: other sequences


DECODED = {  # b, h, g, m, k, v; "MLA": values are the first channels of their keys
    "one long sequence": (1, 32, 1, 70_001, 128, 128), "many": (64, 32, 1, 515, 64, 64), "MHA": (3, 32, 32, 1025, 64, 64),
    "GQA": (3, 32, 8, 3000, 64, 64), "unequal latents": (2, 12, 1, 4099, 128, 64), "MLA": (2, 32, 1, 4099, 576, 512),
    "MLA, 128 heads": (1, 128, 1, 9001, 576, 512), "MLA, no key of its own": (2, 16, 1, 4099, 128, 128),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODED)
@torch.no_grad()
def test_decoding_replayed_again_and_again_joins_what_it_has_just_computed(name):
    """The kernel that joins starts before the parts are there. Had it not waited, it would read the last replay's: queries are new."""
    b, h, g, m, t, width = DECODED[name]
    q, k, v = (x.detach() for x in attention_inputs(b, h, g, 1, m, t, width, torch.bfloat16, device="cuda"))
    v = k[..., :width] if "MLA" in name else v
    attend(q, k, v, scale=0.1, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        z = attend(q, k, v, scale=0.1, backend="triton")
    held = [x.double() for x in (k, v)]
    for _ in range(20):
        last = z.clone()
        q.normal_()
        graph.replay()
        expected = attend(q.double(), *held, scale=0.1, backend="reference")
        assert relative_error(z, expected) < BOUNDS[torch.bfloat16]
        assert relative_error(last, expected) > DIFFERENT  # control
    eager = [
        attend(q, k, v, scale=0.1, backend="triton") for _ in range(20)
    ]  # one after the other, without waiting between them
    assert all(torch.equal(y, z) for y in eager)


def test_our_kernel_takes_more_tiles_than_a_grid_has_second_dimensions():
    """Four million queries on few sources: 65,536 tiles of 64 and one more."""
    n, m = 2**22 + 5, 33
    q, k, v = (x.detach() for x in attention_inputs(1, 1, 1, n, m, 16, 16, torch.bfloat16, device="cuda"))
    expected = attend(q.float(), k.float(), v.float(), scale=0.25, backend="reference")
    z = attend(q, k, v, scale=0.25, backend="triton")
    assert relative_error(z, expected) < BOUNDS[torch.bfloat16]
    assert relative_error(z[:, :, -5:], expected[:, :, -5:]) < BOUNDS[torch.bfloat16]
    assert relative_error(z[:, :, -5:], expected[:, :, :5]) > DIFFERENT  # control: other queries


@pytest.mark.parametrize("name", CELLS)
def test_a_layer_is_taken_apart_there_as_on_a_cpu(name):
    """Spectra, ranks, compressed and converted layers: made on the layer's own device, with the same numbers."""
    layer = CELLS[name].build()

    def numbers(layer, x) -> list[float]:
        moment = second_moment(layer, x)
        pre, post = ranks = choose_ranks(layer, relative_error=0.4, moment=moment)
        width = min(pre[2], post[2]) // 2 * 2  # of the latent that both share; channels that turn come in pairs
        both = (pre[0], min(pre[1], width), width), (post[0], min(post[1], width), width)
        made = [compress(layer, *ranks, method=method, moment=moment) for method in METHODS]
        made += [compress(layer, *both, shared_kv=True, moment=moment), as_tucker(layer)]
        if isinstance(layer, MultiHeadAttention):
            made += [to_gqa(layer, 1, moment=moment), to_gqa(layer, 1, method="mean")]
        if isinstance(layer, MultiHeadAttention) and not layer.bias:
            made += [to_mla(layer, 6, 4, shared_kv=shared, moment=moment) for shared in (False, True)]
        assert all(p.device == x.device for other in made for p in (*other.parameters(), *other.buffers()))
        found = [value for other in made[:-1] for value in relative_errors(layer, other, moment)]
        found += [value for spectrum in spectra(layer) for value in (*spectrum.head.tolist(), entropy_rank(spectrum.rows))]
        return [*pre, *post, *found, *(other(x).square().sum().item() for other in made)]

    x = tokens(2, 30, layer.d_model)
    expected = numbers(layer, x)
    assert numbers(layer.to("cuda"), x.to("cuda")) == pytest.approx(expected, rel=1e-6, abs=1e-6)
