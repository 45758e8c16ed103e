"""Sizes of attention: what Tables 1-3 count, by formula and by counting the parameters of the real module."""

from collections.abc import Iterable

import torch

from .options import Options
from .records import append, new_record
from .rows import Row


def record_sizes(experiment: str, rows: Iterable[Row], shape: dict, options: Options) -> None:
    """One record with the sizes of all rows at the paper's shape; nothing is trained."""
    sizes = [measure(row, shape["d_model"], shape["n_heads"]) for row in rows]
    append(options.records, new_record(experiment, "sizes", "all rows", shape, {"rows": sizes}), replace=True)


def measure(row: Row, d_model: int, n_heads: int) -> dict:
    """Per layer: parameters and cached numbers a token, by Table 1's formula and as module and cache hold them."""
    with torch.device("meta"):  # counts without memory
        layer = row.build(d_model, n_heads)
        counted = sum(p.numel() for p in layer.parameters())
        cached = sum(stream.numel() for stream in layer.new_cache(batch=1, max_tokens=1).streams.values())
    cost = row.cost(d_model, n_heads)
    return {
        "label": row.label,
        "parameters": cost.parameters,
        "counted_parameters": counted,
        "cache_per_token": cost.cache_per_token,
        "counted_cache_per_token": cached,
        "paper": row.paper,
    }
