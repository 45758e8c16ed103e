"""Spectra: singular values of all six unfoldings of every layer of a trained model, beside the same layer before any training.

Public models come by name or folder through transformers or timm. Without --model it looks at all those that table2 trained and kept at
this preset. With --text every layer is looked at once more, as it acts on what it reads there.
"""

import copy
import json
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from tucker_ref import energy_rank, entropy_rank, second_moment, spectra
from tucker_ref.compression.moments import centred
from tucker_ref.compression.normed import between_norms
from tucker_ref.compression.spectra import Spectra, numerical_rank, rounding_floor

from ..data.text import read_documents
from ..models.public.opened import OpenModel
from ..models.rows import TABLE2
from ..store.checked import Amount, Part, check, read_json
from ..store.records import append, new_record
from ..store.saved import read_metadata
from ..store.schema import Data
from ..train.language import LanguagePreset, build_model, models_of
from ..train.options import Options
from ..train.public_models import open_model
from ..train.runs import selected
from .moments import received
from .samples import Windows, check_reads_text, spread
from .table2 import PAPER_SHAPE, ROWS
from .table2 import PRESETS as LANGUAGE_PRESETS

TAKES = ("device", "rows", "seeds", "text", "model")
PRESETS = {name: preset for name, preset in LANGUAGE_PRESETS.items() if preset.keep_models}
MODES = {"pre": ("head", "query", "key"), "post": ("head", "output", "value")}
WINDOWS, WINDOW = 64, 256  # of the text that a named model reads
MANY = "gpu-fresh-optimizers"  # the preset of which several models of a row are looked at, not all with their singular values
INITIAL_STD = 0.02  # of models that do not say how their weights started


def run(options: Options) -> None:
    """One record for the model that was named, or per model in the output folder.

    Args:
        options: `model`, or `rows` and `seeds` of table2; and maybe `text`.

    Raises:
        ValueError: if there is no model, if one is of another preset, or for options that do not go together.
    """
    if options.model:
        if unused := [name for name in ("rows", "seeds") if getattr(options, name)]:
            raise ValueError(f"--{unused[0]} chooses among models of table2: it does not go with --model")
        return of_named(options)
    preset: LanguagePreset = PRESETS[options.preset]
    models = [
        (row.label, seed, path)
        for row in selected(ROWS.get(options.preset, TABLE2), options.rows)
        for seed in options.seeds or preset.seeds
        for path in models_of(options.out, f"table2 {row.label} seed {seed}", options.preset)
    ]
    if not models:
        command = f"python -m reproduce table2 --preset {options.preset}"
        raise ValueError(f"{options.out / 'models'} holds no model of table2; run `{command}` first")
    width, whole = PAPER_SHAPE["d_model"] // preset.narrower, [path for *_, path in models]
    if options.preset == MANY:
        whole = preferred(models)
    for label, seed, path in tqdm(models, "spectra"):
        of_trained(label, seed, path, width, path in whole, options)


def preferred(models: list[tuple[str, int, Path]]) -> list[Path]:
    """Of each row, seed and optimiser the model with the lowest validation loss.

    Args:
        models: label, seed and file of each, which says its loss.
    """
    best: dict[tuple, tuple[float, Path]] = {}
    for label, seed, path in models:
        metadata = read_metadata(path)
        optimizer = json.loads(metadata["config"])["train"].get("optimizer")
        found = (of_its_run(path, metadata).get("validation_loss", math.inf), path)
        best[label, seed, optimizer] = min(best.get((label, seed, optimizer), found), found)
    return [path for _, path in best.values()]


class OfItsRun(Part):
    """What a file of table2 says of the run that trained it, for a record; older ones say less."""

    validation_loss: Amount = 0.0
    data: Data | None = None


def of_its_run(path: Path, metadata: dict[str, str]) -> dict:
    """The same, as JSON has it, of a file's metadata.  Raises ValueError for what no record could hold."""
    said = {name: read_json(metadata[name], f"{path}: its {name}") for name in OfItsRun.model_fields if name in metadata}
    check(OfItsRun, said, f"{path}: what it says of its run")
    return said


def of_trained(label: str, seed: int, path: Path, width: int, values: bool, options: Options) -> None:
    """One record of a model of table2, whose config says how it was trained: with which optimiser, at which rate.

    Args:
        label, seed: of its run.
        path: its file.
        width: d of the preset's models.
        values: whether the singular values of all layers are kept: a record with them takes a megabyte.
        options: `text`, `device` and `records`.

    Raises:
        ValueError: for a model of another width.
    """
    opened, started = open_model(str(path)), time.perf_counter()
    config, said = json.loads(opened.metadata["config"]), of_its_run(path, read_metadata(path))
    if config["d_model"] != width:
        raise ValueError(f"{path} is not of the preset {options.preset}: d is {config['d_model']}, not {width}")
    torch.manual_seed(seed)
    fresh = [block.attention for block in build_model(config).blocks]
    metrics, read = measured(opened, fresh, options, values)
    metrics |= {"read": read.describe()} if read else {}
    metrics |= {"validation_loss": said["validation_loss"]} if "validation_loss" in said else {}
    data, seconds = said.get("data"), time.perf_counter() - started
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
    metrics, read = measured(opened, as_they_started(opened), options)
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


def measured(opened: OpenModel, fresh: list[nn.Module], options: Options, values: bool = True) -> tuple[dict, Windows | None]:
    """What a record says of a model's layers: as trained and as they started, and with a text as they act on it.

    Args:
        opened: the model; with a text it is taken to the device.
        fresh: its layers as they started.
        options: `text` and `device`.
        values: as in `of_layers`, of the layers as trained.

    Returns:
        The metrics, and the text's windows where there is one.

    Raises:
        ValueError: for layers that normalise latents, and as `spread` does.
    """
    opened.check_trilinear(or_between_norms=True)
    trained, read = list(opened.layers.values()), None
    metrics = {"trained": of_layers(trained, options.device, values), "initial": of_layers(fresh, options.device, values=False)}
    if options.text:
        check_reads_text(opened)
        read = spread(opened, read_documents(options.text), WINDOWS, WINDOW)
        opened.model.to(options.device)
        inputs = list(received(opened, opened.layers, list(read.tokens.to(options.device).split(1))).values())
        known = [second_moment(layer, x) for layer, x in zip(trained, inputs)]
        metrics["inputs"] = of_layers(trained, options.device, values, known)
        metrics["initial_inputs"] = of_layers(fresh, options.device, values=False, moments=known)
        if not any(layer.rotary or getattr(layer, "qk_norm", None) for layer in trained):
            about = [centred(moment, mean_of(layer, x)) for layer, moment, x in zip(trained, known, inputs)]
            metrics["centred"] = of_layers(trained, options.device, values, known, about)
    return metrics, read


def mean_of(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """(D,), the mean of what a layer reads, with a one behind it where the layer has biases.  x: (tokens, d)."""
    mean = x.double().mean(0)
    return torch.cat([mean, mean.new_ones(1)]) if getattr(layer, "bias", False) else mean


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
    key_moments: Sequence[torch.Tensor] | None = None,
) -> list[dict]:
    """Ranks and singular values of every unfolding; of layers with QK-norm those of what stands between their norms.

    Args:
        layers: attention of any mechanism without norms of latents.
        device: where they are computed.
        values: whether the singular values are kept too, over the largest of their mode; otherwise of the first layer alone.
        moments: (D, D) each, of what the layers read; none for the weights as they are.
        key_moments: (D, D) each, of what the keys read, where that counts otherwise: about its mean.

    Returns:
        Per layer, by side and mode as in MODES, what `of_mode` gives.
    """
    found: list[dict] = []
    for n, layer in enumerate(tqdm(list(layers), "layers", leave=False)):
        moment, keys = (None if known is None else known[n].to(device) for known in (moments, key_moments))
        both = dict(zip(MODES, spectra(trilinear(layer.to(device), moment), moment, key_moment=keys)))
        kept = values or n == 0
        found.append({side: {mode: of_mode(s, kept) for mode, s in zip(MODES[side], per_mode(both[side]))} for side in both})
    return found


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
