"""Decoding: what each mechanism caches, and how long one more token takes against the length of the context (one layer)."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from tqdm import tqdm

from ..models.rows import TABLE2, Row
from ..store.records import append, device_in_words, new_record
from ..train.options import Options
from ..train.runs import selected

SHAPE = {"d_model": 768, "n_heads": 12}
GATE = 1e-4  # decoded tokens must equal the full forward pass this well (float32) before anything is timed


@dataclass(frozen=True)
class Preset:
    """What is timed.

    Args:
        contexts: numbers of cached tokens before the timed one.
        batch: sequences that are decoded together.
        repeats: timings of each, of which the median counts.
    """

    contexts: tuple[int, ...]
    batch: int
    repeats: int


TAKES = ("device", "rows")
PRESETS = {"smoke": Preset(contexts=(512, 1024, 2048, 4096, 8192, 16384), batch=1, repeats=15)}


def run(options: Options) -> None:
    """One record per row. The rows are timed in turns, so that a noisy minute hits them all.

    Args:
        options: `rows` are labels of Table 2, all if empty.

    Raises:
        ValueError: for a label that no row has, or a layer whose cache does not give the full forward pass.
    """
    preset, rows, started = PRESETS[options.preset], selected(TABLE2, options.rows), time.perf_counter()
    torch.manual_seed(0)
    layers = {row.label: build(row, options.device) for row in rows}
    for label, layer in layers.items():
        check(label, layer)
    times = {label: {} for label in layers}
    for context in tqdm(preset.contexts, "decode"):
        for label, milliseconds in time_in_turns(layers, context, preset, options.device).items():
            times[label][context] = milliseconds
    for row in rows:
        cache = layers[row.label].new_cache(1, 1)
        metrics = {
            "cache_bytes_per_token": cache.nbytes,
            "milliseconds": {str(context): round(median, 4) for context, median in times[row.label].items()},
        }
        config = {
            **SHAPE,
            "row": row.config(),
            "batch": preset.batch,
            "repeats": preset.repeats,
            "precision": "float32",
            "device": device_in_words(options.device),
        }
        seconds = time.perf_counter() - started
        record = new_record("decode", options.preset, row.label, config, metrics, device=options.device, wall_seconds=seconds)
        append(options.records, record, replace=True)


def build(row: Row, device: str) -> nn.Module:
    """A row's layer at SHAPE, in the form that decodes best."""
    layer = row.build(**SHAPE).to(device)
    if row.mechanism == "MLA":
        layer.absorb = True  # attention on the latent: the form for decoding
    return layer


@torch.no_grad()
def check(label: str, layer: nn.Module) -> None:
    """Refuse to time a layer whose cache does not give the full forward pass.

    Args:
        label: what the message calls it.
        layer: of width SHAPE["d_model"].

    Raises:
        ValueError: if the relative error is not below GATE.
    """
    x = torch.randn(2, 40, SHAPE["d_model"], device=next(layer.parameters()).device)
    cache = layer.new_cache(2, 40)
    decoded = torch.cat([layer(part, cache=cache) for part in x.split([30] + [1] * 10, dim=1)], dim=1)
    full = layer(x)
    error = (torch.linalg.norm(decoded - full) / torch.linalg.norm(full)).item()
    if not error < GATE:
        raise ValueError(f"{label}: decoding differs from the full forward pass by {error:.1e}; it is not timed")


@torch.no_grad()
def time_in_turns(layers: dict[str, nn.Module], context: int, preset: Preset, device: str) -> dict[str, float]:
    """One decoding step of every layer after a context.

    Args:
        layers: by label.
        context: how many tokens are cached before.
        preset: batch and repeats.
        device: as torch names it.

    Returns:
        Median milliseconds by label.
    """
    caches = {label: layer.new_cache(preset.batch, context + 1) for label, layer in layers.items()}
    for cache in caches.values():
        cache.append(**{name: torch.randn_like(stream[:, :, :context]) for name, stream in cache.streams.items()})
    x = torch.randn(preset.batch, 1, SHAPE["d_model"], device=device)
    samples = {label: [] for label in layers}
    for repeat in range(preset.repeats + 2):
        for label, layer in layers.items():
            caches[label].truncate(context)
            synchronize(x)
            start = time.perf_counter()
            layer(x, cache=caches[label])
            synchronize(x)
            if repeat >= 2:  # the first two warm up
                samples[label].append(1e3 * (time.perf_counter() - start))
    return {label: statistics.median(values) for label, values in samples.items()}


def synchronize(x: torch.Tensor) -> None:
    """Wait until the device of x has done what it was given."""
    if x.is_cuda:
        torch.cuda.synchronize()
