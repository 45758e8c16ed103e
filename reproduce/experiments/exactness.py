"""Exactness: every mechanism written as a Tucker Attention, under every rotary embedding, bias and mask, in float64.

One cell is one layer with random weights. Its error is the larger of the relative errors in output and in input gradient
between the layer and `as_tucker(layer)`; its control is the same comparison with one thing wrong, and must be large.
"""

import dataclasses
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from tucker_ref import (
    GroupedQueryAttention,
    Llama3Scaling,
    MultiHeadAttention,
    MultiHeadLatentAttention,
    Rotary,
    TuckerAttention,
    as_tucker,
)

from ..store.records import append, new_record
from ..train.options import Options

TAKES = ()
D_MODEL, N_HEADS, HEAD_DIM, N_TOKENS = 24, 6, 4, 9
Q_RANK, KV_RANK, ROPE_DIM = 10, 8, 4
HEAD_ROTARIES = {
    "none": lambda: None,
    "head-width": lambda: Rotary.heads(HEAD_DIM, base=100.0),
    "head-width interleaved": lambda: Rotary.heads(HEAD_DIM, base=100.0, pairing="interleaved"),
    "head-width Llama-3": lambda: Rotary.heads(HEAD_DIM, base=100.0, scaling=Llama3Scaling(original_context=64)),
}
LATENT_ROTARIES = {
    "none": lambda: {},
    "decoupled": lambda: {"rope_dim": ROPE_DIM, "rotary": Rotary.heads(ROPE_DIM, base=100.0)},
    "coupled": lambda: {"rotary": Rotary.latent(KV_RANK, base=100.0)},
}
GROUPS = {"MHA": 6, "GQA": 2, "MQA": 1}
BIASES = {"no bias": False, "q,k,v bias": "qkv", "all biases": True}
MASKS = ("full", "causal", "padded", "arbitrary")
PATHS = ("whole sequence", "prefill + decode")


@dataclass(frozen=True)
class Cell:
    """One layer to be written as Tucker Attention.

    Args:
        mechanism: a key of GROUPS, "MLA shared" or "MLA separated".
        rotary: a key of HEAD_ROTARIES, for MLA of LATENT_ROTARIES.
        bias: a key of BIASES; MLA has none.
        norm: RMSNorm on MLA's latents.
        absorb: MLA's other path.
        qk_norm: None, "head" or "all", for all but MLA.
    """

    mechanism: str
    rotary: str = "none"
    bias: str = "no bias"
    norm: bool = False
    absorb: bool = False
    qk_norm: str | None = None

    @property
    def name(self) -> str:
        """What tells it from the other cells, in words."""
        details = [self.bias] * (self.bias != "no bias") + ["latent norm"] * self.norm + ["absorbed"] * self.absorb
        details += [f"QK-norm {self.qk_norm}"] * (self.qk_norm is not None)
        return ", ".join([self.mechanism, f"RoPE {self.rotary}", *details])

    def build(self) -> nn.Module:
        """The layer, in float64, `with_large_weights`."""
        if self.mechanism in GROUPS:
            options = dict(head_dim=HEAD_DIM, bias=BIASES[self.bias], rotary=HEAD_ROTARIES[self.rotary](), qk_norm=self.qk_norm)
            if self.mechanism == "MHA":
                layer = MultiHeadAttention(D_MODEL, N_HEADS, **options)
            else:
                layer = GroupedQueryAttention(D_MODEL, N_HEADS, GROUPS[self.mechanism], **options)
        else:
            options = LATENT_ROTARIES[self.rotary]() | dict(latent_norm=self.norm, absorb=self.absorb)
            shared = self.mechanism == "MLA shared"
            layer = MultiHeadLatentAttention(D_MODEL, N_HEADS, Q_RANK, KV_RANK, shared_kv=shared, **options)
        return with_large_weights(layer)


def with_large_weights(layer: nn.Module, seed: int = 0) -> nn.Module:
    """The layer in float64, its parameters drawn anew, so large that attention is far from uniform: a wrong logit then shows.

    Args:
        layer: any module; changed in place.
        seed: of the normal weights, of standard deviation 1.5 / sqrt(fan-in).
    """
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 1.5 / fan_in**0.5)
    return layer


def cells() -> list[Cell]:
    """Every mechanism with every rotary embedding, every bias and every norm it may have."""
    grouped = [
        Cell(m, r, b, qk_norm=norm) for norm, m, r, b in itertools.product((None, "head", "all"), GROUPS, HEAD_ROTARIES, BIASES)
    ]
    latent = [
        Cell(m, r, norm=norm, absorb=absorb)
        for m, r, norm, absorb in itertools.product(
            ("MLA shared", "MLA separated"), LATENT_ROTARIES, (False, True), (False, True)
        )
        if not (r == "coupled" and absorb)  # coupled rotary has only the absorbed form
    ]
    return grouped + latent


def mask_of(kind: str) -> dict:
    """Arguments `causal` and `mask` for two sequences of N_TOKENS.

    Args:
        kind: one of MASKS. "padded": the first sequence starts two tokens late; "arbitrary": a mask per head, not causal.
    """
    if kind in ("full", "causal"):
        return {"causal": kind == "causal"}
    if kind == "padded":
        seen = torch.ones(2, 1, 1, N_TOKENS, dtype=torch.bool)
        seen[0, ..., :2] = False
        return {"causal": True, "mask": seen}
    mask = torch.rand(2, N_HEADS, N_TOKENS, N_TOKENS, generator=torch.Generator().manual_seed(5)) < 0.6
    return {"causal": False, "mask": mask}


def tokens() -> torch.Tensor:
    """The input of every cell, (2, N_TOKENS, D_MODEL) in float64."""
    return torch.randn(2, N_TOKENS, D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def whole_sequence(layer: nn.Module, x: torch.Tensor, options: dict) -> torch.Tensor:
    """What the layer makes of x at once, (b, n, d)."""
    return layer(x, **options)


def prefill_and_decode(layer: nn.Module, x: torch.Tensor, options: dict) -> torch.Tensor:
    """Five tokens at once, three more, then one by one, from a cache.

    Args:
        layer: any mechanism.
        x: (b, N_TOKENS, d).
        options: of `mask_of`, for a causal order: no other can be decoded.

    Returns:
        (b, N_TOKENS, d).
    """
    cache, pieces = layer.new_cache(len(x), N_TOKENS), []
    for start, end in ((0, 5), (5, 8), (8, 9)):
        step = dict(options)
        if "mask" in options:
            step["mask"] = options["mask"][..., :end]
        pieces.append(layer(x[:, start:end], cache=cache, **step))
    return torch.cat(pieces, dim=1)


def error(layer: nn.Module, other: nn.Module, mask: str, path: str) -> float:
    """How far two layers are apart on the same input.

    Args:
        layer: what is right.
        other: what is compared with it.
        mask: one of MASKS.
        path: one of PATHS. A cache carries no gradients, so decoding compares outputs alone.

    Returns:
        The larger of the relative errors in output and in input gradient.
    """
    x, options = tokens(), mask_of(mask)
    if path == "prefill + decode":
        return relative(prefill_and_decode(other, x, options), whole_sequence(layer, x, options))
    results = []
    for module in (layer, other):
        inputs = x.clone().requires_grad_()
        y = whole_sequence(module, inputs, options)
        direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        results.append((y, torch.autograd.grad((y * direction).sum(), inputs)[0]))
    return max(relative(b, a) for a, b in zip(*results))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """||actual - expected|| / ||expected||, in the Frobenius norm."""
    return (torch.linalg.norm(actual - expected) / torch.linalg.norm(expected)).item()


def wrong_heads(tucker: TuckerAttention) -> None:
    """Heads in another order before the softmax only."""
    tucker.pre.head = nn.Parameter(tucker.pre.head.detach().roll(1, dims=0))


def latent_schedule(tucker: TuckerAttention) -> None:
    """The paper's latent RoPE, one schedule over all of r3, in place of the layer's own frequencies."""
    tucker.rotary = Rotary.latent(tucker.ranks[2], base=100.0, pairing=tucker.rotary.pairing)


def wrong_groups(tucker: TuckerAttention) -> None:
    """Frequencies of every second key/value head in reverse order."""
    frequencies = tucker.rotary.frequencies.unflatten(0, (len(tucker.rotary.blocks), -1)).clone()
    frequencies[1::2] = frequencies[1::2].flip(1)
    tucker.rotary = Rotary(frequencies.flatten(), tucker.rotary.pairing, tucker.rotary.blocks)


def one_side_off(tucker: TuckerAttention) -> None:
    """Query positions off by one, key positions right."""

    class QueriesOneOff(nn.Module):
        def __init__(self, rotary):
            super().__init__()
            self.rotary, self.width = rotary, rotary.width

        def forward(self, x, positions):
            return self.rotary(x, positions + (x.shape[1] == N_HEADS))  # queries have N_HEADS heads, the latent key has one

    tucker.rotary = QueriesOneOff(tucker.rotary)


def controls(cell: Cell) -> dict[str, Callable[[TuckerAttention], None]]:
    """What can go wrong in this cell.

    Returns:
        By name a function that spoils a Tucker layer in place.
    """
    faults = {"heads in another order": wrong_heads}
    if cell.rotary != "none":
        faults["query positions off by one"] = one_side_off
    if cell.rotary == "decoupled" or (cell.rotary.startswith("head-width") and GROUPS[cell.mechanism] > 1):
        faults["the paper's latent schedule"] = latent_schedule
    if cell.rotary.startswith("head-width") and GROUPS[cell.mechanism] > 1:
        faults["frequencies in the wrong order in a group"] = wrong_groups
    return faults


def measure(cell: Cell) -> dict:
    """The error under every mask and path, and per control its smallest error over them.

    Returns:
        The entry of the record: `cell`, `name`, `errors` by path and mask, `controls` by name.
    """
    layer = cell.build()
    tucker = as_tucker(layer)
    errors = {
        f"{path}, {mask}": error(layer, tucker, mask, path)
        for path in PATHS
        for mask in MASKS
        if path == "whole sequence" or mask in ("causal", "padded")
    }
    missed = {}
    for name, spoil in controls(cell).items():
        spoiled = as_tucker(layer)
        spoil(spoiled)
        missed[name] = min(error(layer, spoiled, mask, path) for path, mask in (key.split(", ") for key in errors))
    return {"cell": dataclasses.asdict(cell), "name": cell.name, "errors": errors, "controls": missed}


def run(options: Options) -> None:
    """One record with all cells; nothing is trained.

    Args:
        options: where the record goes.
    """
    config = {
        "d_model": D_MODEL,
        "n_heads": N_HEADS,
        "head_dim": HEAD_DIM,
        "q_rank": Q_RANK,
        "kv_rank": KV_RANK,
        "rope_dim": ROPE_DIM,
    }
    started = time.perf_counter()
    measured = [measure(cell) for cell in tqdm(cells(), "exactness")]
    seconds = time.perf_counter() - started
    record = new_record("exactness", "float64", "all cells", config, {"cells": measured}, wall_seconds=seconds)
    append(options.records, record, replace=True)
