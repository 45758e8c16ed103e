"""Theorems: what the paper states about ranks, positions, sizes and kernels, on layers with random weights. Nothing is trained.

Each statement has controls: the same comparison with one thing wrong, which must be seen.
"""

import time

import numpy as np
import torch

from tucker_ref import (
    GroupedQueryAttention,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    as_tucker,
    multilinear_rank,
)
from tucker_ref.initialisation import shapes_alone

from ..models.rows import Row
from ..models.sizes import count_parameters
from ..store.records import append, new_record
from ..train.options import Options
from .exactness import relative, with_large_weights

TAKES = ()
POSITIONS = (0, 1, 2, 5, 9, 11, 40)
SHIFTS = (1, 7, 1000)

# By layer: how it is built, and the theorem's ranks, pre and post.
RANKS = {
    "MHA": (lambda: MultiHeadAttention(24, 3), (3, 24, 24), (3, 24, 24)),
    "MHA, many heads": (lambda: MultiHeadAttention(24, 12), (12, 24, 24), (12, 24, 24)),
    "GQA": (lambda: GroupedQueryAttention(24, 12, 4), (12, 24, 8), (12, 24, 8)),
    "MQA": (lambda: GroupedQueryAttention(24, 12, 1), (12, 24, 2), (12, 24, 2)),
    "MLA shared": (lambda: MultiHeadLatentAttention(24, 12, 7, 5), (12, 7, 5), (12, 24, 5)),
    "MLA separated": (lambda: MultiHeadLatentAttention(24, 12, 7, 5, shared_kv=False), (12, 7, 5), (12, 24, 5)),
    "MHA, narrow heads": (lambda: MultiHeadAttention(24, 3, head_dim=4), (3, 24, 24), (3, 24, 24)),
    "GQA, narrow heads": (lambda: GroupedQueryAttention(24, 6, 2, head_dim=2), (6, 24, 4), (6, 24, 4)),
    "MQA, narrow heads": (lambda: GroupedQueryAttention(24, 6, 1, head_dim=2), (6, 24, 2), (6, 24, 2)),
    "MLA shared, narrow latent": (lambda: MultiHeadLatentAttention(24, 3, 7, 5), (3, 7, 5), (3, 24, 5)),
    "MLA separated, narrow latent": (
        lambda: MultiHeadLatentAttention(24, 3, 7, 5, shared_kv=False), (3, 7, 5), (3, 24, 5),
    ),
}  # fmt: skip
TURNING = {
    "Tucker, latent RoPE": lambda: TuckerAttention(24, 6, (4, 9, 8), (3, 7, 5), rotary=Rotary.latent(8)),
    "Tucker shared, latent RoPE": lambda: TuckerAttention(24, 6, (4, 9, 8), shared_kv=True, rotary=Rotary.latent(8)),
    "MLA, coupled RoPE": lambda: MultiHeadLatentAttention(24, 3, 10, 8, rotary=Rotary.latent(8)),
    "MLA, decoupled RoPE": lambda: MultiHeadLatentAttention(24, 3, 10, 8, rope_dim=4, rotary=Rotary.heads(4)),
    "MHA, head-wide RoPE": lambda: MultiHeadAttention(24, 3, rotary=Rotary.heads(8)),
}
WIDTHS, LATENTS, HEAD_RANKS = (192, 768, 3072), (16, 64, 128), (4, 8, 12)


def ranks() -> list[dict]:
    """Per layer the ranks that its theorem states, those that its dense tensors have, and those with two heads made equal."""
    found = []
    for name, (make, pre, post) in RANKS.items():
        tucker = as_tucker(with_large_weights(make()))
        dense = [tensor.numpy().to_tensor() for tensor in (tucker.pre, tucker.post)]
        spoiled = [np.concatenate([tensor[:1], tensor[:1], tensor[2:]]) for tensor in dense]
        found.append(
            {
                "layer": name,
                "theorem": [*pre, *post],
                "found": [int(rank) for tensor in dense for rank in multilinear_rank(tensor)],
                "control": [int(rank) for tensor in spoiled for rank in multilinear_rank(tensor)],
            }
        )
    return found


def positions() -> list[dict]:
    """Per layer by how much its output changes if all positions move by the same, and, as a control, if distances double."""
    x = torch.randn(2, len(POSITIONS), 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for name, make in TURNING.items():
        layer, here = with_large_weights(make()), torch.tensor(POSITIONS)
        expected = layer(x, positions=here).detach()
        moved = [relative(layer(x, positions=here + shift), expected) for shift in SHIFTS]
        found.append({"layer": name, "error": max(moved), "control": relative(layer(x, positions=2 * here), expected)})
    return found


def flash() -> list[dict]:
    """PyTorch's flash kernel, forced, in float32: what it differs by from the reference in float64, and with its own scale."""
    x = torch.randn(2, 63, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for name, rotary in (("Tucker", None), ("Tucker, latent RoPE", Rotary.latent(8))):
        layer = with_large_weights(TuckerAttention(24, 6, (4, 9, 8), (3, 7, 8), rotary=rotary))
        with torch.no_grad():
            expected = layer(x, backend="reference")
            forced = layer.float()(x.float(), backend="flash")
            layer.scale = layer.ranks[2] ** -0.5  # of the latent's width, which the kernel would take by itself
            found.append(
                {
                    "layer": name,
                    "error": relative(forced.double(), expected),
                    "control": relative(layer(x.float(), backend="flash").double(), expected),
                }
            )
    return found


def growth() -> list[dict]:
    """How many parameters layers of several widths d and ranks (r1, r, r) have, and multi-head attention of these widths."""

    def counted(row: Row, d: int) -> int:
        with shapes_alone():
            return count_parameters([row.build(d, 12)])

    found = []
    for d in WIDTHS:
        found += [
            {"layer": "Tucker", "d": d, "r": r, "r1": r1, "parameters": counted(Row("Tucker", ranks=(r1, r, r)), d)}
            for r in LATENTS
            for r1 in HEAD_RANKS
        ]
        found.append({"layer": "MHA", "d": d, "parameters": counted(Row("MHA"), d)})
    return found


def run(options: Options) -> None:
    """One record with all statements."""
    started = time.perf_counter()
    metrics = {"ranks": ranks(), "positions": positions(), "flash": flash(), "growth": growth()}
    config = {"positions": list(POSITIONS), "shifts": list(SHIFTS)}
    seconds = time.perf_counter() - started
    append(options.records, new_record("theorems", "float64", "all", config, metrics, wall_seconds=seconds), replace=True)
