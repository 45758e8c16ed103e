"""One new token's attention against a cache."""

import functools
from collections.abc import Iterator

import torch

from tucker_ref.attend import attend

from ...models.decoding import captured
from .presets import Preset
from .sections import Limits
from .timing import Case, gated, median_ms


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
