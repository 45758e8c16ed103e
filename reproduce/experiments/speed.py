"""Speed: layers forward and backward, decoding and whole training steps by backend, beside the device's own limits.

Every layer and every way to decode is compared with the reference before it is timed, and one that differs or is refused has no time.
Ratios are taken within one run. Times are medians over calls that find the L2 cache full of other, clean lines, as the layers before would
leave it. Layers and decoding run as CUDA graphs, so that a small layer's time is not that of launching its kernels; whole models
run as people run them, compiled block by block.
"""

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from tucker_ref.attend import attend

from ..models.decoding import captured
from ..models.gpt2 import GPT2
from ..models.llama import Llama
from ..models.rows import TABLE2, TABLE3, Row
from ..store.records import append, device_in_words, new_record
from ..train.options import Options
from ..train.runs import check_labels
from .table3 import ROPE_BASE

GATE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}  # relative error in output and input gradient that may still be timed


@dataclass(frozen=True)
class Shape:
    """One layer in training.

    Args:
        name: of the model that has it.
        batch: sequences.
        tokens: of each sequence.
        d_model, n_heads: of the layer.
        rows: those of its table.
        rope_base: of the rotary embedding, None without one.
    """

    name: str
    batch: int
    tokens: int
    d_model: int
    n_heads: int
    rows: tuple[Row, ...]
    rope_base: float | None = None


@dataclass(frozen=True)
class Preset:
    """What is timed.

    Args:
        shapes: layers in training.
        backends: of every layer.
        latent_backends: more of them, for Tucker Attention.
        contexts: lengths in tokens at which `context_rows` are timed.
        context_rows: of the last shape; stacks of them show how much memory training takes.
        stack: how many layers such a stack has.
        decode: pairs of context in tokens and batch.
        decode_heads: number and width of the heads that decode.
        decode_latents: widths of the latents that decode.
        vocab_size: of whole models.
        n_layers: of whole models, by the name of their shape.
        dtype: of everything that is timed.
        matmul: rows and columns of the matrices that give the device's rate.
        repeats: timings of each, of which the median counts.
    """

    shapes: tuple[Shape, ...]
    backends: tuple[str, ...]
    latent_backends: tuple[str, ...]
    contexts: tuple[int, ...]
    context_rows: tuple[Row, ...]
    stack: int
    decode: tuple[tuple[int, int], ...]
    decode_heads: tuple[int, int]
    decode_latents: tuple[int, ...]
    vocab_size: int
    n_layers: dict[str, int]
    dtype: torch.dtype
    matmul: int
    repeats: int


TAKES = ("device", "rows")
PRESETS = {
    "smoke": Preset(
        shapes=(Shape("GPT-2", 1, 64, 96, 12, tuple(row.narrowed(8) for row in TABLE2[::3])),),
        backends=("sdpa", "math"),
        latent_backends=(),
        contexts=(32, 64),
        context_rows=(TABLE2[0], TABLE2[6].narrowed(8)),
        stack=2,
        decode=((64, 2),),
        decode_heads=(4, 16),
        decode_latents=(32,),
        vocab_size=64,
        n_layers={"GPT-2": 2},
        dtype=torch.float32,
        matmul=256,
        repeats=3,
    ),
    "gpu": Preset(
        shapes=(
            Shape("GPT-2", 32, 1024, 768, 12, TABLE2),
            Shape("LLaMA", 4, 4096, 2048, 32, TABLE3, ROPE_BASE),
        ),
        backends=("cudnn", "flash"),
        latent_backends=("triton",),
        contexts=(1024, 2048, 4096, 8192, 16384),
        context_rows=(TABLE3[0], TABLE3[5], TABLE3[7]),
        stack=8,
        decode=((8192, 16), (131072, 1), (16384, 64)),
        decode_heads=(32, 64),
        decode_latents=(128, 64),
        vocab_size=50_304,
        n_layers={"GPT-2": 12, "LLaMA": 16},
        dtype=torch.bfloat16,
        matmul=8192,
        repeats=20,
    ),
}


def run(options: Options) -> None:
    """One record per section and device.

    Args:
        options: `rows` are names of sections, all if empty.

    Raises:
        ValueError: for a section that is not there.
    """
    preset, device = PRESETS[options.preset], device_in_words(options.device)
    sections = {
        "limits": limit_rows,
        "layers": layers,
        "contexts": contexts,
        "memory": memory,
        "decode": decode,
        "models": models,
    }
    check_labels("section", options.rows, sections)
    rates = limits(preset, options.device)
    for name, section in sections.items():
        if options.rows and name not in options.rows:
            continue
        rows, started = [], time.perf_counter()
        config = {"dtype": str(preset.dtype).removeprefix("torch."), "repeats": preset.repeats, "device": device}
        for row in tqdm(section(preset, options.device, rates), f"speed {name}"):
            tqdm.write(f"{name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
            rows.append(row)
        seconds = time.perf_counter() - started
        record = new_record("speed", options.preset, name, config, {"rows": rows}, device=options.device, wall_seconds=seconds)
        append(options.records, record, replace=True)  # whole sections only: one that is broken off leaves what was there


@dataclass(frozen=True)
class Limits:
    """What the device can do at most.

    Args:
        copy: gigabytes (10^9 bytes) a second, read and written.
        matmul: teraflops (10^12 operations a second) in a matrix product.
    """

    copy: float
    matmul: float


def limits(preset: Preset, device: str) -> Limits:
    """Measure a copy and a matrix product.

    Args:
        preset: size and type of the matrices.
        device: as torch names it.
    """
    n = preset.matmul
    source = torch.empty(16 * n * n, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / median_ms(lambda: target.copy_(source), preset, device) / 1e6
    a, b = (torch.randn(n, n, device=device, dtype=preset.dtype) for _ in range(2))
    return Limits(copy, 2 * n**3 / median_ms(lambda: a @ b, preset, device) / 1e9)


def limit_rows(_preset: Preset, _device: str, rates: Limits) -> Iterator[dict]:
    """The limits as rows of the record, in the signature of the other sections."""
    yield {"what": "copy", "gigabytes_per_second": rates.copy}
    yield {"what": "matmul", "teraflops": rates.matmul}


def layers(preset: Preset, device: str, _rates: Limits) -> Iterator[dict]:
    """Forward and backward of one layer, every row with every backend.

    Args:
        preset: what is timed.
        device: as torch names it.

    Yields:
        Rows of the record: what `timed_layer` and `work` give.
    """
    for shape in preset.shapes:
        for row in shape.rows:
            for backend in preset.backends + (preset.latent_backends if row.mechanism == "Tucker" else ()):
                yield {
                    "shape": shape.name,
                    "row": row.label,
                    "backend": backend,
                    **timed_layer(shape, row, backend, preset, device),
                    **work(shape, row),
                }


def contexts(preset: Preset, device: str, _rates: Limits) -> Iterator[dict]:
    """Some of the last shape's layers against the length of the context, as many tokens a batch as before.

    Args:
        preset: what is timed.
        device: as torch names it.

    Yields:
        Rows of the record: what `timed_layer` gives.
    """
    shape = preset.shapes[-1]
    for n in preset.contexts:
        longer = dataclasses.replace(shape, batch=max(1, shape.batch * shape.tokens // n), tokens=n)
        for row in preset.context_rows:
            for backend in preset.backends[:1] + (preset.latent_backends if row.mechanism == "Tucker" else ()):
                timed = timed_layer(longer, row, backend, preset, device)
                yield {"tokens": n, "batch": longer.batch, "row": row.label, "backend": backend, **timed}


def memory(preset: Preset, device: str, _rates: Limits) -> Iterator[dict]:
    """Forward and backward of a stack of the last shape's layers: what they keep in between, and what it costs to keep less.

    Args:
        preset: what is timed.
        device: as torch names it.

    Yields:
        Rows of the record: `row`, `backend`, `again` where queries are made again, and what `timed_stack` gives.
    """
    shape = preset.shapes[-1]
    for row in preset.context_rows:
        tucker = row.mechanism == "Tucker"
        ways = [(preset.backends[0], False), *([(preset.backends[0], True)] if tucker else [])]
        for backend, again in ways + [(b, False) for b in preset.latent_backends if tucker]:
            timed = timed_stack(shape, row, backend, again, preset, device)
            yield {"row": row.label, "backend": backend, "again": again, "layers": preset.stack, **timed}


def timed_stack(shape: Shape, row: Row, backend: str, again: bool, preset: Preset, device: str) -> dict:
    """Layers on top of one another, each compiled and added to what it read; or why they are not timed.

    Args:
        shape, row, backend: which layers, and how they attend.
        again: make the queries again in the backward pass.
        preset: type, repeats and number of layers.
        device: as torch names it.

    Returns:
        As `timed_layer`.
    """
    torch.manual_seed(0)
    layers = [row.build(shape.d_model, shape.n_heads, shape.rope_base).to(device) for _ in range(preset.stack)]
    for layer in layers:
        layer.recompute = again
    if "refused" in (passed := gated(lambda: gate(layers[0], shape.d_model, backend, preset, device), preset)):
        return passed
    torch.compiler.reset()
    parameters = [p for layer in layers for p in layer.to(preset.dtype).parameters()]
    called = [torch.compile(layer, fullgraph=True) if device.startswith("cuda") else layer for layer in layers]
    x = torch.randn(shape.batch, shape.tokens, shape.d_model, device=device, dtype=preset.dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def step() -> tuple[torch.Tensor, ...]:
        y = x
        for layer in called:
            y = y + layer(y, backend=backend)
        return torch.autograd.grad(y, [x, *parameters], dy)

    megabytes = peak_megabytes(step, device)
    return {"milliseconds": median_ms(step, preset, device, few=True), "megabytes": megabytes, **passed}


def work(shape: Shape, row: Row) -> dict:
    """What a layer must do at least, forward and backward, under a causal mask.

    Returns:
        `flops`, floating-point operations, and `bytes` that cannot stay unmoved in 16 bits: x, y and their gradients once,
        parameters twice and their gradients once.
    """
    cost, tokens = row.cost(shape.d_model, shape.n_heads), shape.batch * shape.tokens
    flops = 3 * 2 * (cost.projections * tokens + cost.attention * tokens * shape.tokens // 2)
    return {"flops": flops, "bytes": 2 * (4 * tokens * shape.d_model + 3 * cost.parameters)}


def timed_layer(shape: Shape, row: Row, backend: str, preset: Preset, device: str) -> dict:
    """Forward and backward of one layer, or why it is not timed.

    Args:
        shape, row, backend: which layer, and how it attends.
        preset: type and repeats.
        device: as torch names it.

    Returns:
        `milliseconds`, `megabytes` (10^6 bytes, None on a CPU) and relative `error`; or `refused` with the reason.
    """
    torch.manual_seed(0)
    layer = row.build(shape.d_model, shape.n_heads, shape.rope_base).to(device)
    if "refused" in (passed := gated(lambda: gate(layer, shape.d_model, backend, preset, device), preset)):
        return passed
    layer = layer.to(preset.dtype)
    torch.compiler.reset()
    called = torch.compile(layer, fullgraph=True) if device.startswith("cuda") else layer
    x = torch.randn(shape.batch, shape.tokens, shape.d_model, device=device, dtype=preset.dtype, requires_grad=True)
    dy = torch.randn_like(x)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(called(x, backend=backend), [x, *layer.parameters()], dy)

    megabytes = peak_megabytes(step, device)
    return {"milliseconds": median_ms(captured(step, device), preset, device), "megabytes": megabytes, **passed}


def gated(compare: Callable[[], float], preset: Preset) -> dict:
    """Whether something may be timed.

    Args:
        compare: gives its relative error, or raises ValueError where a backend refuses.
        preset: whose type bounds the error.

    Returns:
        `error`, or `refused` with the reason.
    """
    try:
        error = compare()
    except ValueError as refusal:
        return {"refused": str(refusal)}
    return {"error": error} if error < GATE[preset.dtype] else {"refused": f"differs from the reference by {error:.1e}"}


def gate(layer: nn.Module, d_model: int, backend: str, preset: Preset, device: str) -> float:
    """Compare a layer with the reference in float64, on a short sequence of odd length.

    Args:
        layer: left in float64.
        d_model: its width.
        backend: the one to compare.
        preset: whose type the backend runs in.
        device: as torch names it.

    Returns:
        The worse relative error in output and input gradient.

    Raises:
        ValueError: if the backend refuses the layer.
    """
    x = torch.randn(2, 67, d_model, device=device, dtype=torch.float64)
    dy, results = torch.randn_like(x), []
    for dtype, chosen in ((preset.dtype, backend), (torch.float64, "reference")):
        leaf = x.to(preset.dtype).to(dtype).requires_grad_()
        y = layer.to(preset.dtype).to(dtype)(leaf, backend=chosen)
        y.backward(dy.to(dtype))
        results.append((y.detach().double(), leaf.grad.double()))
        layer.zero_grad()
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results))


def decode(preset: Preset, device: str, rates: Limits) -> Iterator[dict]:
    """One new token's attention against a cache: multi-head, and one latent for all heads.

    Args:
        preset: what is timed.
        device: as torch names it.
        rates: of which the copy's bandwidth counts.

    Yields:
        Rows of the record: what `timed_decode` gives.
    """
    heads, width = preset.decode_heads
    sides = [("MHA", heads, width)] + [(f"latents {t}/{t}", 1, t) for t in preset.decode_latents]
    for context, batch in preset.decode:
        for name, groups, t in sides:
            k, v = (torch.randn(batch, groups, context, t, device=device, dtype=preset.dtype) for _ in range(2))
            q = torch.randn(batch, heads, 1, t, device=device, dtype=preset.dtype)
            for backend in ("sdpa", *preset.backends, *preset.latent_backends):
                yield {
                    "context": context,
                    "batch": batch,
                    "side": name,
                    "backend": backend,
                    **timed_decode(q, k, v, backend, rates.copy, preset, device),
                }
            del k, v


@torch.no_grad()
def timed_decode(q, k, v, backend: str, copy: float, preset: Preset, device: str) -> dict:
    """One new token against its cache, or why it is not timed.

    Args:
        q: (b, h, 1, t).
        k, v: (b, g, m, t).
        backend: how it attends.
        copy: the device's bandwidth in gigabytes a second.
        preset: type, repeats and the heads' width.
        device: as torch names it.

    Returns:
        `microseconds`, `cache_megabytes`, `share_of_copy`, `flops`, `bytes` and `error`; or `refused` with the reason.
    """
    scale = preset.decode_heads[1] ** -0.5  # of the heads, for latents too: the scale does not depend on ranks

    def step() -> torch.Tensor:
        return attend(q, k, v, scale=scale, backend=backend)

    def difference() -> float:
        few = [x[:1, :, :257] for x in (k, v)]
        expected = attend(q[:1].double(), *(x.double() for x in few), scale=scale, backend="reference")
        step()  # the whole cache may be refused where a part of it is not
        return ((attend(q[:1], *few, scale=scale, backend=backend) - expected).norm() / expected.norm()).item()

    if "refused" in (passed := gated(difference, preset)):
        return passed
    milliseconds = median_ms(captured(step, device), preset, device)
    cache = k.nbytes + v.nbytes
    return {
        "microseconds": 1e3 * milliseconds,
        "cache_megabytes": cache / 1e6,
        "share_of_copy": cache / milliseconds / 1e6 / copy,
        "flops": 2 * q.shape[0] * q.shape[1] * k.shape[2] * (k.shape[3] + v.shape[3]),
        "bytes": cache,
        **passed,
    }


def models(preset: Preset, device: str, rates: Limits) -> Iterator[dict]:
    """A whole training step with AdamW under autocast.

    Args:
        preset: what is timed.
        device: as torch names it.
        rates: of which the matrix product's counts.

    Yields:
        Rows of the record: what `timed_model` gives.
    """
    for shape in preset.shapes:
        if shape.name not in preset.n_layers:
            continue
        for row in shape.rows:
            yield {"model": shape.name, "row": row.label, **timed_model(shape, row, rates.matmul, preset, device)}


def timed_model(shape: Shape, row: Row, rate: float, preset: Preset, device: str) -> dict:
    """A whole training step, or why it is not timed.

    Args:
        shape, row: which model.
        rate: the device's in a matrix product, in teraflops.
        preset: type, repeats, layers and vocabulary.
        device: as torch names it.

    Returns:
        `milliseconds`, `tokens_per_second`, `share_of_matmul`, peak `megabytes` (None on a CPU) and `parameters`; or `refused`
        with the reason.
    """
    torch.manual_seed(0)
    n_layers = preset.n_layers[shape.name]
    build = lambda d, h: row.build(d, h, shape.rope_base)  # noqa: E731
    with torch.device(device):
        if shape.rope_base is None:
            model = GPT2(preset.vocab_size, shape.tokens, shape.d_model, shape.n_heads, n_layers, build)
        else:
            model = Llama(preset.vocab_size, shape.d_model, shape.n_heads, n_layers, build)
    on_gpu = device.startswith("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=on_gpu)
    torch.compiler.reset()
    if on_gpu:
        model.compile_parts()
    windows = torch.randint(0, preset.vocab_size, (shape.batch, shape.tokens + 1), device=device)

    def step() -> None:
        # cuDNN's kernel is the fastest for every row here, and PyTorch takes it first on some GPUs only.
        fused = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if on_gpu else contextlib.nullcontext()
        with fused, torch.autocast(device.split(":")[0], dtype=torch.bfloat16, enabled=preset.dtype == torch.bfloat16):
            loss = model.loss(windows)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    try:
        megabytes = peak_megabytes(step, device, above=False)
    except torch.OutOfMemoryError:
        return {"refused": "out of memory"}
    milliseconds = median_ms(step, preset, device, few=True)
    tokens = shape.batch * shape.tokens
    matrices = sum(p.numel() for p in model.parameters() if p.ndim >= 2)
    attention = (
        n_layers * row.cost(shape.d_model, shape.n_heads).attention * tokens * shape.tokens / 2
    )  # causal: half the pairs
    flops = 6 * (matrices * tokens + attention)
    return {
        "milliseconds": milliseconds,
        "tokens_per_second": 1e3 * tokens / milliseconds,
        "share_of_matmul": flops / milliseconds / 1e9 / rate,
        "megabytes": megabytes,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def median_ms(step: Callable, preset: Preset, device: str, few: bool = False) -> float:
    """Median milliseconds of a call that finds other lines in the L2 cache.

    Args:
        step: what is timed.
        preset: how often.
        device: as torch names it.
        few: a quarter of the repeats, at least three.
    """
    repeats = max(3, preset.repeats // 4) if few else preset.repeats
    others = torch.zeros(64 * 2**20 if device.startswith("cuda") else 1, device=device)  # 256 MB
    times = []
    for repeat in range(repeats + 2):
        others.sum()  # reads them: had it written, the call would pay for bringing them to memory
        if device.startswith("cuda"):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            step()
            end.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            began = time.perf_counter()
            step()
            elapsed = 1e3 * (time.perf_counter() - began)
        if repeat >= 2:  # the first two warm up
            times.append(elapsed)
    return statistics.median(times)


def peak_megabytes(step: Callable, device: str, above: bool = True) -> float | None:
    """Peak memory of a call.

    Args:
        step: what is called.
        device: as torch names it.
        above: leave out what was held before.

    Returns:
        Megabytes (10^6 bytes); None on a CPU, which does not count it.
    """
    if not device.startswith("cuda"):
        return None
    step()  # compiles, and takes what it keeps
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if above else 0
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 1e6
