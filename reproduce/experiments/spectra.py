"""Spectra: singular values of all six unfoldings of every layer of a trained model, beside the same layer before any training.

Public models come by name or folder through transformers or timm; with --text once more as they act on what they read. Without
--model, those that table2 trained.
"""

import copy
import json
import time
from collections.abc import Iterable, Sequence

import torch
from torch import nn
from tqdm import tqdm

from tucker_ref import energy_rank, entropy_rank, spectra
from tucker_ref.compression.moments import centred
from tucker_ref.compression.normed import between_norms
from tucker_ref.compression.spectra import Spectra, numerical_rank, rounding_floor

from ..models.public.opened import OpenModel
from ..models.rows import TABLE2
from ..store.records import append, new_record
from ..store.saved import read_metadata
from ..train.language import LanguagePreset, build_model, load_model, model_of
from ..train.options import Options
from ..train.public_models import open_model
from ..train.runs import selected
from .moments import moments
from .samples import spread
from .table2 import PAPER_SHAPE
from .table2 import PRESETS as LANGUAGE_PRESETS

TAKES = ("device", "rows", "seeds", "text", "model")
PRESETS = {name: preset for name, preset in LANGUAGE_PRESETS.items() if preset.keep_models}
MODES = {"pre": ("head", "query", "key"), "post": ("head", "output", "value")}
WINDOWS, WINDOW = 64, 256  # of the text that a named model reads
INITIAL_STD = 0.02  # of models that do not say how their weights started


def run(options: Options) -> None:
    """One record for the model that was named, or per model in the output folder.

    Args:
        options: `model` and maybe `text`, or `rows` and `seeds` of table2.

    Raises:
        ValueError: if there is no model, if one is of another preset, or for options that do not go together.
    """
    if options.model:
        if unused := [name for name in ("rows", "seeds") if getattr(options, name)]:
            raise ValueError(f"--{unused[0]} chooses among models of table2: it does not go with --model")
        return of_named(options)
    if options.text:
        raise ValueError("--text is what a model named with --model reads; those of table2 are looked at without")
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


def of_named(options: Options) -> None:
    """One record of a model by name: its layers as trained and as they started, and with a text as they act on it.

    Args:
        options: `model`, `text`, `trust_layers`, `device` and `records`.
    """
    opened, started = open_model(options.model or "", trust_layers=options.trust_layers), time.perf_counter()
    opened.check_trilinear(or_between_norms=True)
    trained, fresh, read = list(opened.layers.values()), as_they_started(opened), None
    metrics = {"trained": of_layers(trained, options.device), "initial": of_layers(fresh, options.device, values=False)}
    if options.text:
        read = spread(opened, options.text, WINDOWS, WINDOW)
        opened.model.to(options.device)
        known = list(moments(opened, opened.layers, list(read.tokens.to(options.device).split(1))).values())
        metrics["inputs"] = of_layers(trained, options.device, moments=known)
        metrics["initial_inputs"] = of_layers(fresh, options.device, values=False, moments=known)
        if all(getattr(layer, "bias", False) and layer.rotary is None for layer in trained):
            metrics["centred"] = of_layers(trained, options.device, moments=known, about_mean=True)
    metrics |= opened.measured()
    seconds = time.perf_counter() - started
    data = read and read.describe()
    record = new_record(
        "spectra", "models", opened.name, opened.config(), metrics, data=data, device=options.device, wall_seconds=seconds
    )
    append(options.records, record, replace=True)
    for way in ("trained", "inputs") if read else ("trained",):
        for side, modes in MODES.items():
            for mode in modes:
                print(f"{way}, {side} {mode}: {', '.join(in_words(layer[side][mode]) for layer in metrics[way])}")


def as_they_started(opened: OpenModel) -> list[nn.Module]:
    """Layers of the same shapes with the model's own initialisation, seed 0: normal weights, zero biases, gains of one.

    Args:
        opened: whose configuration may say the standard deviation (`initializer_range`).
    """
    std = getattr(getattr(opened.model, "config", None), "initializer_range", INITIAL_STD)
    fresh = [copy.deepcopy(layer) for layer in opened.layers.values()]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for layer in fresh:
            layer.reset_parameters(std)
    return fresh


def of_layers(
    layers: Iterable[nn.Module],
    device: str = "cpu",
    values: bool = True,
    moments: Sequence[torch.Tensor] | None = None,
    about_mean: bool = False,
) -> list[dict]:
    """Ranks and singular values of every unfolding; of layers with QK-norm those of what stands between their norms.

    Args:
        layers: attention of any mechanism without norms of latents.
        device: where they are computed.
        values: whether the singular values are kept too, over the largest of their mode; otherwise of the first layer alone.
        moments: (D, D) each, of what the layers read; none for the weights as they are.
        about_mean: the keys count about their mean, which the moment of a layer with biases holds.

    Returns:
        Per layer, by side and mode as in MODES, what `of_mode` gives.
    """
    measured: list[dict] = []
    for n, layer in enumerate(tqdm(list(layers), "layers", leave=False)):
        moment = None if moments is None else moments[n].to(device)
        keys = None
        if (
            about_mean and moment is not None
        ):  # with biases the last coordinate is a one, so the moment's last column is the mean
            keys = centred(moment, torch.cat([moment[:-1, -1], moment.new_ones(1)]))
        both = dict(zip(MODES, spectra(trilinear(layer.to(device), moment), moment, key_moment=keys)))
        kept = values or n == 0
        measured.append({side: {mode: of_mode(s, kept) for mode, s in zip(MODES[side], per_mode(both[side]))} for side in both})
    return measured


def trilinear(layer: nn.Module, moment: torch.Tensor | None) -> nn.Module:
    """The layer, or what stands between its norms of queries and keys."""
    return between_norms(layer, moment) if getattr(layer, "qk_norm", None) else layer


def in_words(mode: dict) -> str:
    """One mode's ranks, for the terminal."""
    ranks = f"entropy {mode['entropy_rank']:.1f}, of squares {mode['square_rank']:.1f}, 99 % energy {mode['energy_rank_99']}"
    return f"{mode['rank']} of {mode['size']} ({ranks})"


def per_mode(spectrum: Spectra) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three modes in the order of MODES."""
    return spectrum.head, spectrum.rows, spectrum.columns


def of_mode(singular_values: torch.Tensor, values: bool) -> dict:
    """The ranks of one unfolding.

    Args:
        singular_values: from the largest down.
        values: whether they are kept.

    Returns:
        `size`, numerical `rank`, `entropy_rank`, the same of their squares as `square_rank`, `energy_rank_99`, the rounding `floor`
        over the largest value, and maybe `values`.
    """
    largest = singular_values[0].item() or 1.0  # of a layer of zeros all values and the floor are zero
    summary = {
        "size": len(singular_values),
        "rank": numerical_rank(singular_values),
        "entropy_rank": round(entropy_rank(singular_values), 3),
        "square_rank": round(entropy_rank(singular_values**2), 3),
        "energy_rank_99": energy_rank(singular_values, 0.99),
        "floor": float(f"{rounding_floor(singular_values) / largest:.3g}"),
    }
    if values:
        summary["values"] = [float(f"{v:.4g}") for v in (singular_values / largest).tolist()]
    return summary
