"""Sizes of attention: what Tables 1-3 count, by formula and by counting the parameters of the real module."""

from collections.abc import Iterable

from torch import nn

from tucker_ref.initialisation import shapes_alone

from .rows import Row


def count_parameters(layers: Iterable[nn.Module]) -> int:
    """Parameters of these layers, or models, together."""
    return sum(p.numel() for layer in layers for p in layer.parameters())


def count_cached(layers: Iterable[nn.Module]) -> int:
    """Numbers that they cache for one token."""
    return sum(stream.numel() for layer in layers for stream in layer.new_cache(1, 1).streams.values())


def measure(row: Row, d_model: int, n_heads: int) -> dict:
    """What one layer of this row holds, by formula and counted.

    Args:
        row: which attention.
        d_model: d.
        n_heads: n_H.

    Returns:
        `label`; `parameters` and `cache_per_token` by Table 1's formula; both as module and cache hold them, named
        `counted_...`; and what the `paper` prints. Counts of numbers, not bytes.
    """
    with shapes_alone():
        layer = row.build(d_model, n_heads)
        counted, cached = count_parameters([layer]), count_cached([layer])
    cost = row.cost(d_model, n_heads)
    return {
        "label": row.label,
        "parameters": cost.parameters,
        "counted_parameters": counted,
        "cache_per_token": cost.cache_per_token,
        "counted_cache_per_token": cached,
        "paper": row.paper,
    }
