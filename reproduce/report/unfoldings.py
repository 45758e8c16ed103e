"""Unfoldings of trained models in their records of spectra: which models there are, effective ranks, and what a head mode would lose."""

import math
import statistics
from collections.abc import Sequence

from ..experiments.spectra import MODES as MODES
from ..store.records import Record
from .query import model_names, runs_of

WAYS = {"trained": "weights", "inputs": "on inputs", "centred": "on inputs, keys about their mean"}
STARTS = {"trained": "initial", "inputs": "initial_inputs", "centred": "none"}
OURS = "GPT-2, ours"


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


def models_of(records: list[Record]) -> dict[str, list[Record]]:
    """GPT-2 with multi-head attention as it was trained here, then the models that were named.

    Args:
        records: all that there are.

    Returns:
        Records of spectra by what the model is called.
    """
    ours = [r for r in runs_of(records, "spectra", "gpu") if r.method == "MHA"]
    models = {OURS: ours} if ours else {}
    others = runs_of(records, "spectra", "models")
    for name, record in zip(model_names(others), others):
        models.setdefault(name, []).append(record)
    return models


def layers_of(runs: list[Record], way: str) -> list[dict]:
    """All layers of these records in one state; empty where it is not on record."""
    return [layer for r in runs for layer in r.metrics.get(way, ())]


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
