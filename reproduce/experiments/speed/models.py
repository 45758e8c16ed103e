"""Whole training steps: at the preset's batch, and at the largest one that fits."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ...models.gpt2 import GPT2
from ...models.llama import Llama
from ...models.rows import Row
from .layers import WAYS
from .presets import Preset, Shape
from .sections import Limits
from .timing import Case, let_memory_go, median_ms, peak_megabytes, refused_for_memory

STEP_MEMORY = 80e9  # bytes, of which a whole training step may take all


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
    """The largest batch that fits, the next being one that does not; tried where straight lines through the last ones lead.

    Args:
        peak: batch -> bytes, None where it does not fit; each costs a compilation.
        first: a batch that fits.
        at_first: its bytes.
        held: bytes without any batch.
        limit: bytes.
    """
    fits, too_many = [(0, held), (first, at_first)], math.inf
    while at_first < limit and fits[-1][0] + 1 < too_many:
        (before, less), (most, bytes_of_most) = fits[-2:]
        more = int((limit - bytes_of_most) * (most - before) / (bytes_of_most - less))
        batch = int(min(most + max(1, more), too_many - 1))
        if (size := peak(batch)) is None:
            too_many = batch
        else:
            fits.append((batch, size))
    return fits[-1][0]


@contextlib.contextmanager
def at_most(size: float, device: str) -> Iterator[None]:
    """Inside, PyTorch takes no more than so many bytes of the GPU's memory; a CPU has no such limit."""
    if device.startswith("cuda"):
        let_memory_go(device)
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
    except RuntimeError as error:
        return refused_for_memory(error)
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
