"""Where trained attention has room: spectra of models of ours and of others, and what fewer heads lose."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from reproduce.report.unfoldings import MODES, errors_without, layers_of, texts_read
from reproduce.store.records import Record

from .style import GREY, logarithmic, panels, save

COLOURS = ("#222222", "#D55E00", "#0072B2", "#CC79A7", "#56B4E9")  # Okabe & Ito's; models are no mechanisms
BAND = (0.25, 0.5, 0.75)
DECAY = "Singular values of trained attention: weights decay in query and key, heads hardly"
LOSS = "What fewer heads lose: before the softmax little on real inputs, after it much"


def median_spectra(models: dict[str, list[Record]], path: Path, title: str = DECAY) -> None:
    """Singular values of all six unfoldings over the largest, against their place in the spectrum, a colour for each model.

    Args:
        models: records of spectra by what the model is called.
        path: of the file.
        title: above it.
    """
    figure, axes = panels(2, 3, 5.9)
    for colour, runs in zip(COLOURS, models.values()):
        for line, (side, modes) in zip(axes, MODES.items()):
            for ax, mode in zip(line, modes):
                _spectrum(ax, [layer[side][mode] for layer in layers_of(runs, "trained")], colour, "-", band=True)
                _spectrum(ax, [layer[side][mode] for layer in layers_of(runs, "inputs")], colour, "--")
                _spectrum(ax, [x[side][mode] for x in layers_of(runs, "initial")], colour, ":")
    for line, (side, modes) in zip(axes, MODES.items()):
        for ax, mode in zip(line, modes):
            ax.set_title(f"{mode} mode, {'before' if side == 'pre' else 'after'} softmax")
            ax.set(xlim=(0, 1.02))
            if mode == "head":
                ax.set(ylim=(0, 1.05), ylabel="value over the largest")
            else:
                ax.set(yscale="log", ylim=(1e-4, 1.5))
                logarithmic(ax.yaxis, (1,))
    for ax in axes[1]:
        ax.set_xlabel("index over their number")
    axes[1, 0].legend(handles=_names(models), loc="lower left", handlelength=1.4)
    axes[0, 1].legend(handles=_ways(), loc="lower left", handlelength=2.4)
    save(figure, path, title, f"{_caption(models)} A line ends where a value of some layer is zero up to rounding.")


def head_mode_loss(models: dict[str, list[Record]], path: Path, title: str = LOSS) -> None:
    """The relative error of the tensor against the share of its head mode's vectors that are kept.

    Args:
        models, path, title: as in `median_spectra`.
    """
    figure, axes = panels(1, 2, 3.9, sharey=True)
    for ax, side in zip(axes, MODES):
        for colour, runs in zip(COLOURS, models.values()):
            for way, dashes in (("trained", "-"), ("inputs", "--"), ("centred", "-.")):
                if way == "centred" and side == "post":
                    continue  # values have no keys
                if layers := layers_of(runs, way):
                    curves = np.array([errors_without(layer[side]["head"]) for layer in layers])  # (layers, heads)
                    kept = (1 + np.arange(curves.shape[1])) / curves.shape[1]
                    low, middle, high = np.quantile(curves, BAND, axis=0)
                    ax.fill_between(kept, low, high, color=colour, alpha=0.13, linewidth=0)
                    ax.plot(kept, middle, color=colour, linestyle=dashes, marker="o", markersize=3)
        grid = np.linspace(0, 1, 200)
        ax.plot(grid, np.sqrt(1 - grid), color=GREY, linestyle=":", linewidth=1.3)
        ax.set(xlim=(0, 1.02), ylim=(0, 1), xlabel="share of the head mode that is kept")
        ax.set_title(f"{'before' if side == 'pre' else 'after'} the softmax")
    axes[0].set_ylabel("relative error of the tensor")
    about = Line2D([], [], color=GREY, linestyle="-.", label="on inputs, keys about their mean")
    bound = Line2D([], [], color=GREY, linestyle=":", label="nothing in common")
    axes[0].legend(handles=_names(models), loc="upper right")  # above "nothing in common" no curve runs
    axes[1].legend(handles=[*_ways()[:2], about, bound], loc="lower left")
    save(figure, path, title, _caption(models))


def _spectrum(ax: Axes, modes: list[dict], colour: str, dashes: str, band: bool = False) -> None:
    """Median over layers of what is above the rounding floor, where values are on record."""
    there = [m for m in modes if "values" in m]
    if not there:
        return
    values = np.array([np.where(np.array(m["values"]) > m["floor"], m["values"], np.nan) for m in there])  # (layers, values)
    kept = ~np.isnan(values).any(axis=0)
    place = (1 + np.arange(values.shape[1]))[kept] / values.shape[1]
    low, middle, high = np.quantile(values[:, kept], BAND, axis=0)
    if band:
        ax.fill_between(place, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.plot(place, middle, color=colour, linestyle=dashes, linewidth=1.4)


def _names(models: dict[str, list[Record]]) -> list[Line2D]:
    return [Line2D([], [], color=colour, label=name) for colour, name in zip(COLOURS, models)]


def _ways() -> list[Line2D]:
    return [
        Line2D([], [], color=GREY, linestyle=d, label=said)
        for d, said in (("-", "weights"), ("--", "on inputs"), (":", "as it starts"))
    ]


def _caption(models: dict[str, list[Record]]) -> str:
    configs = {name: runs[0].config for name, runs in models.items()}
    shapes = {name: f"d {c['d_model']}, {c['n_heads']} heads, {c['n_layers']} layers" for name, c in configs.items()}
    one = set(shapes.values())
    said = f"All of them: {one.pop()}" if len(shapes) > len(one) == 1 else "; ".join(f"{n}: {s}" for n, s in shapes.items())
    texts = texts_read([r for runs in models.values() for r in runs])
    inputs = f" On inputs: as the tensors act on what each layer reads in {texts}." if texts else ""
    return f"{said}. Medians over layers; bands: the middle half of them.{inputs}"
