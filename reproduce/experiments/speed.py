"""Speed: layers forward and backward, decoding and whole training steps by backend, beside the device's own limits.

Every layer and every way to decode is compared with the reference before it is timed, and one that differs or is refused has no time.
Ratios are taken within one run. Times are medians over calls that find the L2 cache full of other, clean lines, as the layers before would
leave it. Layers and decoding run as CUDA graphs, so that a small layer's time is not that of launching its kernels; whole models
run as people run them, compiled block by block. A section that is stopped goes on with the row that it was at.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._functorch.config
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from tucker_ref.attend import attend

from ..models.decoding import captured
from ..models.gpt2 import GPT2
from ..models.llama import Llama
from ..models.rows import TABLE2, TABLE3, Row
from ..store.checked import Part, check, read_json
from ..store.files import write_atomically
from ..store.records import append, device_in_words, new_record
from ..train.options import Options
from ..train.runs import check_labels
from .table3 import ROPE_BASE

Case = tuple[dict, Callable[[], dict]]  # what a row is of, and how to get the rest of it
BUDGET = 0.6  # of what a compiled layer would keep
WAYS = ("plain", "queries again", f"budget {BUDGET}")  # how much a layer keeps for its backward pass
STEP_MEMORY = 80e9  # bytes, of which a whole training step may take all
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
class Curves:
    """One layer against its sizes, one of which is varied at a time.

    Args:
        shape: the layer from which they start, with the rows that are followed.
        values: what each of "d", "n_H" and "N" takes in its turn.
        decode_batch: sequences that decode one token.
    """

    shape: Shape
    values: dict[str, tuple[int, ...]]
    decode_batch: int


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
        curves: of one layer.
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
    curves: Curves


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
        curves=Curves(
            Shape("toy", 1, 16, 48, 4, (Row("MHA"), Row("Tucker", ranks=(2, 8, 8)))),
            {"d": (24, 48, 96), "n_H": (4, 8, 12), "N": (16, 32, 64)},
            decode_batch=1,
        ),
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
        # Heads stay between 16 and 128 wide, where every kernel takes them.
        curves=Curves(
            Shape("LLaMA", 2, 4096, 2048, 32, (Row("MHA"), Row("Tucker", ranks=(8, 64, 64))), ROPE_BASE),
            {"d": (512, 1024, 2048, 4096), "n_H": (16, 32, 64, 128), "N": (1024, 2048, 4096, 8192, 16384)},
            decode_batch=16,
        ),
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
        "step": steps,
        "curves": curves,
    }
    check_labels("section", options.rows, sections)
    rates = limits(preset, options.device)
    for name, section in sections.items():
        if options.rows and name not in options.rows:
            continue
        config = {"dtype": str(preset.dtype).removeprefix("torch."), "repeats": preset.repeats, "device": device}
        partial = options.out / f"speed-{options.preset}-{name.replace(' ', '-')}.json"
        rows, seconds = through(name, section(preset, options.device, rates), partial, config)
        record = new_record("speed", options.preset, name, config, {"rows": rows}, device=options.device, wall_seconds=seconds)
        append(options.records, record, replace=True)  # whole sections only: one that is broken off leaves what was there
        partial.unlink(missing_ok=True)


class Partial(Part):
    """What there is of a section that was stopped."""

    config: dict
    rows: list[dict]
    seconds: float


def through(name: str, cases: Iterator[Case], partial: Path, config: dict) -> tuple[list[dict], float]:
    """The rows of a section, each printed and kept in a file as soon as it is there.

    Args:
        name: of the section.
        cases: its rows.
        partial: the file. Rows that it holds of the same cases under the same config are not measured again.
        config: of the record.

    Returns:
        All rows, and the seconds that they took.

    Raises:
        ValueError: for a file that is damaged.
    """
    kept = _kept(partial, config)
    rows, started = [], time.perf_counter()
    for number, (case, measure) in enumerate(tqdm(cases, f"speed {name}")):
        known = number < len(kept.rows) and case.items() <= kept.rows[number].items()
        row = kept.rows[number] if known else {**case, **measure()}
        tqdm.write(f"{name}: " + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        rows.append(row)
        seconds = kept.seconds + time.perf_counter() - started
        state = json.dumps({"config": config, "rows": rows, "seconds": seconds})
        if not known:
            write_atomically(partial, lambda file, state=state: file.write(state.encode()))
    return rows, kept.seconds + time.perf_counter() - started


def _kept(partial: Path, config: dict) -> Partial:
    if partial.exists():
        where = f"{partial}: delete it to start this section again; it"
        kept = check(Partial, read_json(partial.read_text(encoding="utf-8"), where), where)
        if kept.config == config:
            return kept
    return Partial(config=config, rows=[], seconds=0.0)


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


def limit_rows(_preset: Preset, _device: str, rates: Limits) -> Iterator[Case]:
    """The limits as rows of the record, in the signature of the other sections."""
    yield {"what": "copy"}, lambda: {"gigabytes_per_second": rates.copy}
    yield {"what": "matmul"}, lambda: {"teraflops": rates.matmul}


def layers(preset: Preset, device: str, _rates: Limits) -> Iterator[Case]:
    """Forward and backward of one layer, every row with every backend.

    Args:
        preset: what is timed.
        device: as torch names it.

    Yields:
        Rows of the record: what `work` gives, and how to get what `timed_layer` does.
    """
    for shape in preset.shapes:
        for row in shape.rows:
            for backend in preset.backends + (preset.latent_backends if row.mechanism == "Tucker" else ()):
                case = {"shape": shape.name, "row": row.label, "backend": backend, **work(shape, row)}
                yield case, functools.partial(timed_layer, shape, row, backend, preset, device)


def contexts(preset: Preset, device: str, _rates: Limits) -> Iterator[Case]:
    """Some of the last shape's layers against the length of the context, as many tokens a batch as before.

    Args:
        preset: what is timed.
        device: as torch names it.

    Yields:
        Rows of the record, timed by `timed_layer`.
    """
    shape = preset.shapes[-1]
    for n in preset.contexts:
        longer = dataclasses.replace(shape, batch=max(1, shape.batch * shape.tokens // n), tokens=n)
        for row in preset.context_rows:
            for backend in preset.backends[:1] + (preset.latent_backends if row.mechanism == "Tucker" else ()):
                case = {"tokens": n, "batch": longer.batch, "row": row.label, "backend": backend}
                yield case, functools.partial(timed_layer, longer, row, backend, preset, device)


def memory(preset: Preset, device: str, _rates: Limits) -> Iterator[Case]:
    """Forward and backward of a stack of the last shape's layers: what they keep in between, and what it costs to keep less.

    Args:
        preset: what is timed.
        device: as torch names it.

    Yields:
        Rows of the record, `way` being one of WAYS, timed by `timed_stack`.
    """
    shape, stock = preset.shapes[-1], preset.backends[0]
    for row in preset.context_rows:
        ours = preset.latent_backends if row.mechanism == "Tucker" else ()
        for backend, way in [(stock, way) for way in WAYS] + [(kernel, "plain") for kernel in ours]:
            case = {"row": row.label, "backend": backend, "way": way, "layers": preset.stack}
            yield case, functools.partial(timed_stack, shape, row, backend, way, preset, device)


def timed_stack(shape: Shape, row: Row, backend: str, way: str, preset: Preset, device: str) -> dict:
    """Layers on top of one another, each compiled and added to what it read; or why they are not timed.

    Args:
        shape, row, backend: which layers, and how they attend.
        way: of WAYS.
        preset: type, repeats and number of layers.
        device: as torch names it.

    Returns:
        As `timed_layer`, and `kept_megabytes`, which are there between the passes (None on a CPU).
    """
    torch.manual_seed(0)
    layers = [row.build(shape.d_model, shape.n_heads, shape.rope_base).to(device) for _ in range(preset.stack)]
    for layer in layers:
        layer.recompute = way == WAYS[1]
    with torch._functorch.config.patch(activation_memory_budget=BUDGET if way == WAYS[2] else 1.0):
        # Compiled for the comparison too: what the backward pass makes again is decided there.
        if "refused" in (passed := gated(lambda: gate(layers[0], shape.d_model, backend, preset, device, compiled), preset)):
            return passed
        parameters = [p for layer in layers for p in layer.to(preset.dtype).parameters()]
        called = [compiled(layer, device) for layer in layers]
        x = torch.randn(shape.batch, shape.tokens, shape.d_model, device=device, dtype=preset.dtype, requires_grad=True)
        dy = torch.randn_like(x)

        def forward() -> torch.Tensor:
            y = x
            for layer in called:
                y = y + layer(y, backend=backend)
            return y

        def step() -> tuple[torch.Tensor, ...]:
            return torch.autograd.grad(forward(), [x, *parameters], dy)

        try:
            megabytes = peak_megabytes(step, device)
        except torch.OutOfMemoryError:
            return {"refused": "out of memory"}
        milliseconds = median_ms(step, preset, device, few=True)
        return {
            "milliseconds": milliseconds,
            "megabytes": megabytes,
            "kept_megabytes": kept_megabytes(forward, device),
            **passed,
        }


def compiled(layer: nn.Module, device: str) -> Callable[..., torch.Tensor]:
    """The layer compiled on a GPU, the first of its kind anew; on a CPU the layer itself."""
    if device.startswith("cuda"):
        return torch.compile(layer, fullgraph=True, dynamic=False)
    return layer


def curves(preset: Preset, device: str, rates: Limits) -> Iterator[Case]:
    """One layer's parameters, cache, training and decoding against d, n_H and N, each varied by itself.

    Args:
        preset: what is timed.
        device: as torch names it.
        rates: of which the copy's bandwidth counts.

    Yields:
        Rows of the record, counted, and timed by `timed_point`.
    """
    start = preset.curves.shape
    for along, values in preset.curves.values.items():
        for value in values:
            shape = dataclasses.replace(start, **{{"d": "d_model", "n_H": "n_heads", "N": "tokens"}[along]: value})
            for row in start.rows:
                case = {"along": along, "value": value, "row": row.label, **counted(shape, row, preset.dtype)}
                yield case, functools.partial(timed_point, shape, row, rates.copy, preset, device)


def counted(shape: Shape, row: Row, dtype: torch.dtype) -> dict:
    """`parameters` of a layer, and `cache_bytes` of one sequence, counted without memory for either."""
    with torch.device("meta"):
        layer = row.build(shape.d_model, shape.n_heads, shape.rope_base)
        cache = layer.new_cache(1, shape.tokens, dtype=dtype, device="meta")
    return {"parameters": sum(p.numel() for p in layer.parameters()), "cache_bytes": cache.nbytes}


def timed_point(shape: Shape, row: Row, copy: float, preset: Preset, device: str) -> dict:
    """Training and decoding of one layer, or why they are not timed.

    Args:
        shape, row: which layer.
        copy, preset, device: as in `timed_decode`.

    Returns:
        As `timed_layer`, with the `microseconds` of one token against a full cache.
    """
    trained = timed_layer(shape, row, preset.backends[0], preset, device)
    with torch.device("meta"):
        streams = row.build(shape.d_model, shape.n_heads).cache_streams()
    k, v = (
        torch.randn(preset.curves.decode_batch, groups, shape.tokens, width, device=device, dtype=preset.dtype)
        for groups, width in (streams["key"], streams["value"])
    )
    q = torch.randn(preset.curves.decode_batch, shape.n_heads, 1, k.shape[3], device=device, dtype=preset.dtype)
    decoded = timed_decode(q, k, v, (preset.latent_backends or preset.backends)[0], copy, preset, device)
    if "refused" in decoded:
        return decoded
    return trained if "refused" in trained else {**trained, "microseconds": decoded["microseconds"]}


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
    called = compiled(layer, device)
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


def gate(
    layer: nn.Module,
    d_model: int,
    backend: str,
    preset: Preset,
    device: str,
    prepared: Callable[[nn.Module, str], Callable[..., torch.Tensor]] = lambda layer, _: layer,
) -> float:
    """Compare a layer with the reference in float64, on a short sequence of odd length.

    Args:
        layer: left in float64.
        d_model: its width.
        backend: the one to compare.
        preset: whose type the backend runs in.
        device: as torch names it.
        prepared: (layer, device) -> what is called in its place with the backend.

    Returns:
        The worse relative error in output and input gradient.

    Raises:
        ValueError: if the backend refuses the layer.
    """
    x = torch.randn(2, 67, d_model, device=device, dtype=torch.float64)
    dy, results = torch.randn_like(x), []
    torch.compiler.reset()
    for dtype, chosen in ((preset.dtype, backend), (torch.float64, "reference")):
        leaf = x.to(preset.dtype).to(dtype).requires_grad_()
        layer = layer.to(preset.dtype).to(dtype)
        y = (layer if chosen == "reference" else prepared(layer, device))(leaf, backend=chosen)
        y.backward(dy.to(dtype))
        results.append((y.detach().double(), leaf.grad.double()))
        layer.zero_grad()
    torch.compiler.reset()
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(*results))


def decode(preset: Preset, device: str, rates: Limits) -> Iterator[Case]:
    """One new token's attention against a cache: multi-head, and one latent for all heads.

    Args:
        preset: what is timed.
        device: as torch names it.
        rates: of which the copy's bandwidth counts.

    Yields:
        Rows of the record, timed by `timed_decode`.
    """
    heads, width = preset.decode_heads
    sides = [("MHA", heads, width)] + [(f"latents {t}/{t}", 1, t) for t in preset.decode_latents]
    for context, batch in preset.decode:
        for name, groups, t in sides:
            k, v = (torch.randn(batch, groups, context, t, device=device, dtype=preset.dtype) for _ in range(2))
            q = torch.randn(batch, heads, 1, t, device=device, dtype=preset.dtype)
            for backend in ("sdpa", *preset.backends, *preset.latent_backends):
                case = {"context": context, "batch": batch, "side": name, "backend": backend}
                yield case, functools.partial(timed_decode, q, k, v, backend, rates.copy, preset, device)
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


def models(preset: Preset, device: str, rates: Limits) -> Iterator[Case]:
    """A whole training step with AdamW under autocast.

    Args:
        preset: what is timed.
        device: as torch names it.
        rates: of which the matrix product's counts.

    Yields:
        Rows of the record, timed by `timed_model`.
    """
    for shape in preset.shapes:
        if shape.name not in preset.n_layers:
            continue
        for row in shape.rows:
            yield (
                {"model": shape.name, "row": row.label},
                functools.partial(timed_model, shape, row, rates.matmul, preset, device),
            )


def steps(preset: Preset, device: str, rates: Limits) -> Iterator[Case]:
    """The last shape's whole training step at the largest batch that fits into STEP_MEMORY.

    Args:
        preset: what is timed.
        device: as torch names it.
        rates: of which the matrix product's counts.

    Yields:
        Rows of the record, `way` being one of the first two of WAYS, timed by `timed_step`.
    """
    shape = preset.shapes[-1]
    for row in preset.context_rows:
        for way in WAYS[:2]:
            case = {"model": shape.name, "row": row.label, "way": way, "tokens": shape.tokens}
            yield case, functools.partial(timed_step, shape, row, way == WAYS[1], rates.matmul, preset, device)


def timed_step(shape: Shape, row: Row, again: bool, rate: float, preset: Preset, device: str) -> dict:
    """The largest batch, and what `timed_model` says of it; or why it is not timed.

    Args:
        shape, row, again, rate, preset, device: as there; the shape's batch is the first that is tried.

    Returns:
        `batch`, and as `timed_model`.
    """
    tried: dict[int, dict] = {}

    def peak(batch: int) -> float | None:
        with at_most(STEP_MEMORY, device):
            tried[batch] = timed_model(dataclasses.replace(shape, batch=batch), row, rate, preset, device, again)
        megabytes = tried[batch].get("megabytes")
        tqdm.write(f"step: {row.label}, again {again}, batch {batch}: {megabytes or 'does not fit'} MB")
        return None if "refused" in tried[batch] else 1e6 * megabytes if megabytes else STEP_MEMORY

    first = peak(shape.batch)
    if first is None:
        return tried[shape.batch]
    weights = 16 * tried[shape.batch]["parameters"]  # float32: weights, gradients, two moments
    batch = largest_batch(peak, shape.batch, first, weights, STEP_MEMORY)
    return {"batch": batch, **tried[batch]}


def largest_batch(peak: Callable[[int], float | None], first: int, at_first: float, held: float, limit: float) -> int:
    """The largest batch that fits, the next being one that does not; tried near where a straight line leads.

    Args:
        peak: batch -> bytes, None where it does not fit.
        first: a batch that fits.
        at_first: its bytes.
        held: bytes without any batch.
        limit: bytes.
    """
    batch = max(first, int((limit - held) / (at_first - held) * first)) if at_first < limit else first
    if batch > first and peak(batch) is None:
        while (batch := batch - 1) > first and peak(batch) is None:
            pass
        return batch
    while at_first < limit and peak(batch + 1) is not None:
        batch += 1
    return batch


@contextlib.contextmanager
def at_most(size: float, device: str) -> Iterator[None]:
    """Inside, PyTorch takes no more than so many bytes of the GPU's memory; a CPU has no such limit."""
    if device.startswith("cuda"):
        torch.compiler.reset()  # the model before this one is let go
        gc.collect()
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, size / whole))
    try:
        yield
    finally:
        if device.startswith("cuda"):
            torch.cuda.set_per_process_memory_fraction(1.0)


def timed_model(shape: Shape, row: Row, rate: float, preset: Preset, device: str, again: bool = False) -> dict:
    """A whole training step, or why it is not timed.

    Args:
        shape, row: which model.
        rate: the device's in a matrix product, in teraflops.
        preset: type, repeats, layers and vocabulary.
        device: as torch names it.
        again: queries are made again in the backward pass.

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
    for block in model.blocks:
        block.attention.recompute = again
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
        milliseconds = median_ms(step, preset, device, few=True)
    except torch.OutOfMemoryError:
        return {"refused": "out of memory"}
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


def kept_megabytes(forward: Callable[[], torch.Tensor], device: str) -> float | None:
    """What a forward pass leaves behind for the backward pass, beside its output.

    Args:
        forward: the pass.
        device: as torch names it.

    Returns:
        Megabytes (10^6 bytes); None on a CPU, which does not count it.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        y = forward()
        torch.cuda.synchronize()
        return (torch.cuda.memory_allocated() - held - y.nbytes) / 1e6
    return None
