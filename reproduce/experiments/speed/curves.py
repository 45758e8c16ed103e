"""One layer against its width, its heads and the context, each varied by itself."""

import dataclasses
import functools
from collections.abc import Iterator

import torch

from tucker_ref.initialisation import shapes_alone

from ...models.rows import Row
from .decoding import timed_decode
from .layers import timed_layer
from .presets import Preset, Shape
from .sections import Limits
from .timing import Case


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
    with shapes_alone():
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
    with shapes_alone():
        streams = row.build(shape.d_model, shape.n_heads).cache_streams()
    k, v = (
        torch.randn(preset.curves.decode_batch, groups, shape.tokens, width, device=device, dtype=preset.dtype)
        for groups, width in (streams["key"], streams["value"])
    )
    q = torch.randn(preset.curves.decode_batch, shape.n_heads, 1, k.shape[3], device=device, dtype=preset.dtype)
    decoded = timed_decode(q, [(k, v)], (preset.latent_backends or preset.backends)[0], copy, preset, device)
    if "refused" in decoded:
        return decoded
    return trained if "refused" in trained else {**trained, "microseconds": decoded["microseconds"]}
