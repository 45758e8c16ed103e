"""Time and memory of compressing one layer: from its factors, against forming both tensors and decomposing them with TensorLy.

Each measurement has a process of its own, whose peak memory is counted above what it held before. Both must find the same
truncated HOSVD before any ratio is shown.
"""

import ctypes
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from tucker_ref import MultiHeadAttention, compress

from ..store.records import append, new_record
from ..train.options import Options

HEAD_DIM, REPEATS = 64, 3
TAKES = ()
PRESETS = {"smoke": (128, 256), "paper": (256, 512, 1024, 2048)}  # d_model; the last one is LLaMA3-1B's layer
AGREEMENT = 1e-6  # relative, of the two approximations' norms


def run(options: Options) -> None:
    """Time both ways at every width of the preset; one record with all of them.

    Args:
        options: `preset` chooses the widths.

    Raises:
        ValueError: if TensorLy is missing, or the two ways do not find the same approximation.
    """
    try:
        import tensorly  # noqa: F401
    except ImportError:
        raise ValueError("compress_speed compares with TensorLy: pip install tensorly") from None
    started, sizes = time.perf_counter(), []
    for d_model in tqdm(PRESETS[options.preset], "compress_speed"):
        ours, dense = (measured(way, d_model) for way in (from_factors, from_tensors))
        if any(abs(a / b - 1) > AGREEMENT for a, b in zip(ours["norms"], dense["norms"])):
            raise ValueError(f"d = {d_model}: the norms {ours['norms']} and {dense['norms']} differ; no ratio is shown")
        sizes.append(
            {"d_model": d_model, "n_heads": d_model // HEAD_DIM, "ranks": ranks_of(d_model), "factors": ours, "tensors": dense}
        )
        tqdm.write(
            f"d {d_model}: {ratio(sizes[-1], 'seconds'):.0f} times faster, {ratio(sizes[-1], 'megabytes'):.0f} times less memory"
        )
    config = {"head_dim": HEAD_DIM, "sizes": PRESETS[options.preset], "repeats": REPEATS}
    metrics = {"sizes": sizes}
    wall = time.perf_counter() - started
    append(
        options.records,
        new_record("compress_speed", options.preset, "HOSVD", config, metrics, seed=0, wall_seconds=wall),
        replace=True,
    )


def ratio(size: dict, what: str) -> float:
    """How much more the tensors cost than the factors.

    Args:
        size: an entry of the record's `sizes`.
        what: "seconds" or "megabytes".
    """
    return size["tensors"][what] / size["factors"][what]


def ranks_of(d_model: int) -> tuple[int, int, int]:
    """Table 3's first Tucker row in proportion: all heads, a sixteenth of the width."""
    return (d_model // HEAD_DIM, d_model // 16, d_model // 16)


def measured(way, d_model: int) -> dict:
    """One way to compress, in a fresh process.

    Args:
        way: `from_factors` or `from_tensors`.
        d_model: d, a multiple of HEAD_DIM.

    Returns:
        Median `seconds`, peak `megabytes` (10^6 bytes) that the first call adds, `norms` of the two approximations, `repeats`.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure, (way, d_model, torch.get_num_threads()))


def _measure(way, d_model: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    layer = MultiHeadAttention(d_model, d_model // HEAD_DIM).double()
    way(MultiHeadAttention(HEAD_DIM, 1).double(), (1, 4, 4))  # what is loaded once does not count
    seconds, norms = [], []

    def timed() -> None:
        started = time.perf_counter()
        norms.append(way(layer, ranks_of(d_model)))
        seconds.append(time.perf_counter() - started)

    megabytes = added_megabytes(timed)
    while len(seconds) < REPEATS and seconds[0] <= 60:  # long runs need no median
        timed()
    return {"seconds": statistics.median(seconds), "megabytes": megabytes, "norms": norms[0], "repeats": len(seconds)}


def added_megabytes(call: Callable[[], object]) -> float:
    """By how many megabytes (10^6 bytes) the process's memory rises while a call runs.

    A system tells a process's peak alone, and imports or a parent had one that hides what comes later. So memory is filled up to the
    peak first. What was freed before goes back to the system, where there is a way (glibc), or the call would take it unseen.

    Args:
        call: without arguments.
    """
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    former, ballast = _peak_bytes(), []
    while _peak_bytes() == former:
        ballast.append(b"x" * 2**20)  # written to, since pages that were never touched take no memory
    held = _peak_bytes()
    call()
    return (_peak_bytes() - held) / 1e6


def from_factors(layer: MultiHeadAttention, ranks: tuple[int, int, int]) -> list[float]:
    """Our way: the truncated HOSVD of both tensors from the layer's weights.

    Args:
        layer: in float64.
        ranks: Tucker ranks of both tensors.

    Returns:
        Frobenius norms of the two approximations.
    """
    compressed = compress(layer, ranks)
    return [compressed.pre.core.norm().item(), compressed.post.core.norm().item()]  # factors are orthonormal


def from_tensors(layer: MultiHeadAttention, ranks: tuple[int, int, int]) -> list[float]:
    """TensorLy's way: both tensors are formed, (h, d, d) each, and decomposed. Arguments and result are those of `from_factors`."""
    from tensorly.decomposition import tucker

    norms = []
    for projections in ((layer.q_proj.weight, layer.k_proj.weight), (layer.o_proj.weight.T, layer.v_proj.weight)):
        left, right = (p.detach().unflatten(0, (layer.n_heads, -1)) for p in projections)  # (h, k, d)
        tensor = (left.mT @ right).numpy()  # (h, d, d)
        core, _ = tucker(tensor, rank=list(ranks), n_iter_max=0, init="svd")  # no sweeps: its HOSVD
        norms.append(float((core**2).sum() ** 0.5))
    return norms


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)  # elsewhere in KiB
