"""One new token's attention against a cache."""

import functools
from collections.abc import Iterator

import torch

from tucker_ref.attend import attend

from ...models.decoding import captured
from .presets import Preset, Side
from .sections import Limits
from .timing import Case, gated, median_ms

IN_A_ROW = 2**30  # bytes of all the caches that calls in a row read: more than L2 holds


@torch.no_grad()
def decode(preset: Preset, device: str, rates: Limits) -> Iterator[Case]:
    """One new token's attention against a cache, of all mechanisms.

    Args:
        preset: what is timed.
        device: as torch names it.
        rates: of which the copy's bandwidth counts.

    Yields:
        Rows of the record, timed by `timed_decode`.
    """
    heads = preset.decode_heads[0]
    for side, context, batch in preset.decode:
        q = torch.randn(batch, heads, 1, side.key, device=device, dtype=preset.dtype)
        caches = [drawn(side, context, batch, preset.dtype, device)]
        more = min(15, max(1, IN_A_ROW // cache_bytes(*caches[0]) - 1))
        caches += [drawn(side, context, batch, preset.dtype, device) for _ in range(more)]
        for backend in ("sdpa", *preset.backends, *preset.latent_backends):
            case = {"context": context, "batch": batch, "side": side.name, "backend": backend}
            yield case, functools.partial(timed_decode, q, caches, backend, rates.copy, preset, device)
        del caches


def drawn(side: Side, context: int, batch: int, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache full of random numbers: keys (b, g, m, k) and values (b, g, m, v)."""
    k = torch.randn(batch, side.groups, context, side.key, device=device, dtype=dtype)
    if side.shared:
        return k, k[..., : side.value]
    return k, torch.randn(batch, side.groups, context, side.value, device=device, dtype=dtype)


def cache_bytes(k: torch.Tensor, v: torch.Tensor) -> int:
    """Of keys and values together; values that are a view of the keys need none."""
    return k.nbytes + (0 if v.data_ptr() == k.data_ptr() else v.nbytes)


def copy_microseconds(size: int, preset: Preset, device: str) -> float:
    """Time of a copy, launched as decoding is, that reads half as many bytes as a cache has and writes the other half.

    A kernel makes it: what `copy_` becomes within a graph is slower from a gigabyte on.

    Args:
        size: bytes of the cache.
        preset, device: as in `timed_decode`.
    """
    source = torch.zeros(size // 8, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 1e3 * median_ms(captured(lambda: torch.neg(source, out=target), device), preset, device)


@torch.no_grad()
def timed_decode(q, caches, backend: str, copy: float, preset: Preset, device: str) -> dict:
    """One new token against its cache, or why it is not timed.

    Args:
        q: (b, h, 1, t).
        caches: pairs of keys (b, g, m, t) and values (b, g, m, v). The first is timed alone, then all are read one after the other,
            as the layers of a model would.
        backend: how it attends.
        copy: the device's bandwidth in gigabytes a second.
        preset: type, repeats and the heads' width.
        device: as torch names it.

    Returns:
        `microseconds`; `microseconds_in_a_row`, of one call of many in one graph; `copy_microseconds`, of a copy that moves as many
        bytes; `cache_megabytes`, `share_of_copy`, `flops`, `bytes` and `error`. Or `refused` with the reason.
    """
    scale = preset.decode_heads[1] ** -0.5  # of the heads, for latents too: the scale does not depend on ranks
    k, v = caches[0]

    def step() -> torch.Tensor:
        return attend(q, k, v, scale=scale, backend=backend)

    def steps() -> None:
        for keys, values in caches:
            attend(q, keys, values, scale=scale, backend=backend)

    def difference() -> float:
        one = (x[:1].double() for x in (q, k, v))  # the first sequence, all of it
        expected = attend(*one, scale=scale, backend="reference")
        return ((step()[:1] - expected).norm() / expected.norm()).item()

    if "refused" in (passed := gated(difference, preset)):
        return passed
    alone, in_a_row = (median_ms(captured(what, device), preset, device) for what in (step, steps))
    cache = cache_bytes(k, v)
    return {
        "microseconds": 1e3 * alone,
        "microseconds_in_a_row": 1e3 * in_a_row / len(caches),
        "copy_microseconds": copy_microseconds(cache, preset, device),
        "cache_megabytes": cache / 1e6,
        "share_of_copy": cache / alone / 1e6 / copy,
        "flops": 2 * q.shape[0] * q.shape[1] * k.shape[2] * (k.shape[3] + v.shape[3]),
        "bytes": cache,
        **passed,
    }
