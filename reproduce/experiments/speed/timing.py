"""How time and memory are measured, and what may be timed at all."""

import gc
import statistics
import time
from collections.abc import Callable

import torch

from .presets import Preset

Case = tuple[dict, Callable[[], dict]]  # what a row is of, and how to get the rest of it
GATE = {torch.bfloat16: 3e-2, torch.float32: 1e-4}  # relative error in output and input gradient that may still be timed


def let_memory_go(device: str) -> None:
    """Give back what models before this one held.

    Args:
        device: as torch names it.
    """
    torch.compiler.reset()  # with its graphs goes their memory
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def refused_for_memory(error: RuntimeError) -> dict:
    """What a row says where memory did not suffice; any other error is raised again.  error: of a measurement."""
    if not is_out_of_memory(error):
        raise error
    return {"refused": "out of memory"}


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory did not suffice, also where that broke off a compilation or a capture, which raise errors of their own."""
    return error is not None and (
        any(words in str(error) for words in ("out of memory", "can't allocate memory")) or is_out_of_memory(error.__context__)
    )


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
