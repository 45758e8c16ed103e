"""Spectra: singular values of all six unfoldings of every layer of a trained model, and before its training if we trained it.

Public models come by name or folder through transformers or timm; without --model, those that table2 trained.
"""

import json
import time
from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm

from tucker_ref import energy_rank, entropy_rank, spectra
from tucker_ref.compression.spectra import Spectra, numerical_rank, rounding_floor

from ..models.rows import TABLE2
from ..store.records import append, new_record
from ..store.saved import read_metadata
from ..train.language import LanguagePreset, build_model, load_model, model_of
from ..train.options import Options
from ..train.public_models import open_model
from ..train.runs import selected
from .table2 import PAPER_SHAPE
from .table2 import PRESETS as LANGUAGE_PRESETS

TAKES = ("device", "rows", "seeds", "model")
PRESETS = {name: preset for name, preset in LANGUAGE_PRESETS.items() if preset.keep_models}
MODES = {"pre": ("head", "query", "key"), "post": ("head", "output", "value")}


def run(options: Options) -> None:
    """One record for the model that was named, or per model in the output folder.

    Args:
        options: `model`, or `rows` and `seeds` of table2.

    Raises:
        ValueError: if there is no model, if one is of another preset, or if --rows or --seeds are given with a named model.
    """
    if options.model:
        if unused := [name for name in ("rows", "seeds") if getattr(options, name)]:
            raise ValueError(f"--{unused[0]} chooses among models of table2: it does not go with --model")
        opened, started = open_model(options.model, trust_layers=options.trust_layers), time.perf_counter()
        opened.check_trilinear()
        metrics = {"trained": of_layers(opened.layers.values(), options.device), **opened.measured()}
        seconds = time.perf_counter() - started
        record = new_record(
            "spectra", "models", opened.name, opened.config(), metrics, device=options.device, wall_seconds=seconds
        )
        append(options.records, record, replace=True)
        for side, modes in MODES.items():
            for mode in modes:
                print(f"{side} {mode}: {', '.join(in_words(layer[side][mode]) for layer in metrics['trained'])}")
        return
    preset: LanguagePreset = PRESETS[options.preset]
    models = {
        (row.label, seed): path
        for row in selected(TABLE2, options.rows)
        for seed in options.seeds or preset.seeds
        if (path := model_of(options.out, f"table2 {row.label} seed {seed}", options.preset))
    }
    if not models:
        command = f"python -m reproduce table2 --preset {options.preset}"
        raise ValueError(f"{options.out / 'models'} holds no model of table2; run `{command}` first")
    width = PAPER_SHAPE["d_model"] // preset.narrower
    for (label, seed), path in tqdm(models.items(), "spectra"):
        model, _, config = load_model(path)
        data = json.loads(read_metadata(path).get("data", "null"))
        if config["d_model"] != width:
            raise ValueError(f"{path} is not of the preset {options.preset}: d is {config['d_model']}, not {width}")
        torch.manual_seed(seed)
        fresh, started = build_model(config), time.perf_counter()
        trained, initial = ([block.attention for block in m.blocks] for m in (model, fresh))
        metrics = {
            "trained": of_layers(trained, options.device),
            "initial": of_layers(initial, options.device, values=False),
        }
        seconds = time.perf_counter() - started
        record = new_record(
            "spectra", options.preset, label, config, metrics, seed=seed, data=data, device=options.device, wall_seconds=seconds
        )
        append(options.records, record, replace=True)


def of_layers(layers: Iterable[nn.Module], device: str = "cpu", values: bool = True) -> list[dict]:
    """Ranks and singular values of every unfolding.

    Args:
        layers: attention of any mechanism.
        device: where they are computed.
        values: whether the singular values are kept too, over the largest of their mode.

    Returns:
        Per layer, by side and mode as in MODES, what `of_mode` gives.
    """
    measured = []
    for layer in tqdm(layers, "layers", leave=False):
        both = dict(zip(MODES, spectra(layer.to(device))))
        measured.append(
            {side: {mode: of_mode(s, values) for mode, s in zip(MODES[side], per_mode(both[side]))} for side in both}
        )
    return measured


def in_words(mode: dict) -> str:
    """One mode's ranks, for the terminal."""
    return f"{mode['rank']} of {mode['size']} (entropy {mode['entropy_rank']:.1f}, 99 % energy {mode['energy_rank_99']})"


def per_mode(spectrum: Spectra) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three modes in the order of MODES."""
    return spectrum.head, spectrum.rows, spectrum.columns


def of_mode(singular_values: torch.Tensor, values: bool) -> dict:
    """The ranks of one unfolding.

    Args:
        singular_values: from the largest down.
        values: whether they are kept.

    Returns:
        `size`, numerical `rank`, `entropy_rank`, `energy_rank_99`, the rounding `floor` over the largest value, and maybe `values`.
    """
    largest = singular_values[0].item() or 1.0  # of a layer of zeros all values and the floor are zero
    summary = {
        "size": len(singular_values),
        "rank": numerical_rank(singular_values),
        "entropy_rank": round(entropy_rank(singular_values), 3),
        "energy_rank_99": energy_rank(singular_values, 0.99),
        "floor": float(f"{rounding_floor(singular_values) / largest:.3g}"),
    }
    if values:
        summary["values"] = [float(f"{v:.4g}") for v in (singular_values / largest).tolist()]
    return summary
