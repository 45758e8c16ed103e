"""Sizes of attention: what Tables 1-3 count, by formula and by counting the parameters of the real module."""

import torch

from .rows import Row


def measure(row: Row, d_model: int, n_heads: int) -> dict:
    """Per layer: parameters by Table 1's formula and as the module holds them, cached numbers and multiply-adds a token."""
    with torch.device("meta"):  # counts without memory
        counted = sum(p.numel() for p in row.build(d_model, n_heads).parameters())
    cost = row.cost(d_model, n_heads)
    return {
        "label": row.label,
        "parameters": cost.parameters,
        "counted_parameters": counted,
        "cache_per_token": cost.cache_per_token,
        "projections_per_token": cost.projections,
        "paper": row.paper,
    }
