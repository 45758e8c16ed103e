"""Unfoldings of trained models in their records of spectra: which models there are, effective ranks, and what a head mode would lose."""

import math
import statistics
from collections.abc import Sequence

from ..experiments.spectra import MODES as MODES
from ..store.records import Record
from .query import grouped, model_names, of_one_budget, optimizer_of, runs_of

WAYS = {"trained": "weights", "inputs": "on inputs", "centred": "on inputs, keys about their mean"}
STARTS = {"trained": "initial", "inputs": "initial_inputs", "centred": "none"}
BY_OPTIMIZER = "gpu-fresh-optimizers"  # the preset whose models differ in their optimiser
OPTIMIZERS = {"adamw": "AdamW", "muon": "Muon"}


def effective_rank(values: Sequence[float], power: int) -> float:
    """exp of the entropy of singular values to a power, made to sum to one: 1 where they give the usual measure, 2 for their energy.

    Args:
        values: singular values, in any unit.
        power: 1 or 2.
    """
    weights = [value**power for value in values]
    whole = sum(weights)  # once: of hundreds of values in thousands of unfoldings
    shares = [weight / whole for weight in weights]
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


def name_of(record: Record) -> str:
    """What a multi-head model that was trained here is called: "GPT-2, Muon, QK-norm, 65M tokens"."""
    tokens = record.steps * record.train["batch_size"] * record.config["context"]
    return f"GPT-2, {short_name_of(record)}, {tokens / 1e6:.0f}M tokens"


def short_name_of(record: Record) -> str:
    """The same beside others of its kind: "Muon, QK-norm"."""
    return ", ".join([OPTIMIZERS[optimizer_of(record)], *record.method.split()[1:]])


def models_of(records: list[Record]) -> dict[str, list[Record]]:
    """GPT-2 with multi-head attention as it was trained here at the preset `gpu`, then the models that were named.

    Args:
        records: all that there are.

    Returns:
        Records of spectra by what the model is called.
    """
    ours = [r for r in runs_of(records, "spectra", "gpu") if r.method == "MHA"]
    return grouped(ours, name_of) | others_of(records)


def others_of(records: list[Record]) -> dict[str, list[Record]]:
    """Models that were named, which others trained.

    Args:
        records: all that there are.

    Returns:
        Records of spectra by what the model is called.
    """
    others = runs_of(records, "spectra", "models")
    models: dict[str, list[Record]] = {}
    for name, record in zip(model_names(others), others):
        models.setdefault(name, []).append(record)
    return models


def of_optimizers(records: list[Record]) -> list[Record]:
    """Models that differ in optimiser, rate and QK-norm, of one budget; without those that say no validation loss."""
    return [r for r in of_one_budget(runs_of(records, "spectra", BY_OPTIMIZER)) if "validation_loss" in r.metrics]


def by_optimizer(records: list[Record]) -> dict[str, list[Record]]:
    """Of each row and optimiser the model that validation text prefers, by what it is called; where its singular values are on record.

    Args:
        records: all that there are.
    """
    best: dict[str, Record] = {}
    for record in of_optimizers(records):
        known = best.setdefault(name_of(record), record)
        if record.metrics["validation_loss"] < known.metrics["validation_loss"]:
            best[name_of(record)] = record
    in_order = sorted(best.items(), key=lambda item: (item[1].method, optimizer_of(item[1])))
    return {name: [record] for name, record in in_order if has_values(record)}


def has_values(record: Record) -> bool:
    """Whether the singular values of all layers are kept, in every state of the trained model that is on record."""
    layers = [layer for way in WAYS for layer in record.metrics.get(way, ())]
    return all("values" in layer[side][mode] for layer in layers for side, modes in MODES.items() for mode in modes)


def layers_of(runs: list[Record], way: str) -> list[dict]:
    """All layers of these records in one state; empty where it is not on record."""
    return [layer for r in runs for layer in r.metrics.get(way, ())]


def texts_read(runs: list[Record]) -> str:
    """ "enwiki_val": the texts that layers were looked at on, each once; empty where none was.

    Args:
        runs: records of spectra. One of a model of ours also has the data that it was trained on.
    """
    reads = [r.metrics.get("read") or r.data for r in runs if "inputs" in r.metrics]
    return ", ".join(dict.fromkeys(read["name"].split(".")[0] for read in reads if read))


def share(mode: dict, power: int) -> float | None:
    """Effective rank over size, by the values (power 1) or by their squares (2); None where an older record does not say."""
    if power == 1:
        return mode["entropy_rank"] / mode["size"]
    if "square_rank" in mode:
        return mode["square_rank"] / mode["size"]
    return effective_rank(mode["values"], 2) / mode["size"] if "values" in mode else None


def shares(layers: list[dict], side: str, mode: str) -> list[float | None]:
    """Means over layers, by the values and by their squares."""
    found = [[share(layer[side][mode], power) for layer in layers] for power in (1, 2)]
    return [statistics.mean(x for x in each if x is not None) if None not in each and each else None for each in found]


def errors_without(mode: dict) -> list[float]:
    """Relative errors of a tensor whose head mode keeps 1, 2, ... of its vectors.

    Args:
        mode: with its singular `values`.
    """
    squares = [value**2 for value in mode["values"]]
    return [math.sqrt(max(0.0, sum(squares[r:])) / (sum(squares) or 1.0)) for r in range(1, len(squares) + 1)]


def errors_with(layers: list[dict], side: str, kept: float) -> list[float]:
    """The relative error of each layer's tensor whose head mode keeps a share of its vectors.

    Args:
        layers: with the singular values of their head modes.
        side: "pre" or "post".
        kept: the share; at least one vector is.
    """
    curves = [errors_without(layer[side]["head"]) for layer in layers]
    return [curve[max(1, round(kept * len(curve))) - 1] for curve in curves]
