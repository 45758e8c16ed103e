"""What trained layers hold: their singular values, and what is lost when they are compressed."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from reproduce.models.block import Block
from reproduce.models.rows import TABLE2, row_of
from reproduce.report.query import by_model
from reproduce.report.words import scale_of
from reproduce.store.records import Record
from tucker_ref import spectra
from tucker_ref.compression.spectra import rounding_floor

from .labels import name_ends
from .style import COLOURS, GREY, INKS, MARKERS, describe, logarithmic, mechanism, panels, save

SHOWN = tuple({row.mechanism: row.label for row in reversed(TABLE2)}.values())[::-1]  # each mechanism's first row
LEVEL = 0.01  # nats: losses within it are level


def singular_values(records: list[Record], path: Path) -> None:
    """Singular values of all six unfoldings, over the largest: median and band over the layers, and how a layer starts.

    The head mode, whose few values decay little, has a linear axis of its own.

    Args:
        records: one model of a row each.
        path: of the file.
    """
    runs = {r.method: r for r in records}
    chosen = [runs[label] for label in SHOWN if label in runs]
    figure, axes = panels(2, 3, 5.9)
    for r in chosen:
        start = initial(r.config)
        for n, side in enumerate(("pre", "post")):
            for ax, mode, fresh in zip(axes[n], r.metrics["trained"][0][side], start[n]):
                draw_spectrum(ax, [layer[side][mode] for layer in r.metrics["trained"]], fresh, r.method, mode == "head")
                ax.set_title(f"{mode} mode, {'before' if n == 0 else 'after'} softmax")
                if n == 1:
                    ax.set_xlabel("index of the singular value")
    for ax in axes[:, 0]:
        ax.set(ylim=(0, 1.05), ylabel="value over the largest")
    for ax in axes[:, 1:].flat:
        ax.set(yscale="log", ylim=(1e-4, 1.5))
        logarithmic(ax.yaxis, (1,))
    c = records[0].config
    for ax in axes.flat:
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    handles = [axes[0, 0].plot([], [], color=COLOURS[mechanism(r.method)], label=r.method)[0] for r in chosen]
    handles.append(axes[0, 0].plot([], [], color=GREY, linestyle=":", label="as it starts")[0])
    axes[0, 2].legend(handles=handles, loc="lower left", handlelength=1.6)
    save(
        figure, path,
        "Singular values of attention layers: solid as trained, dotted as they start",
        f"GPT-2 {scale_of(c)}: d {c['d_model']}, {c['n_heads']} heads, {c['train']['steps']:,} steps, one model of a row. Solid: median "
        f"over {c['n_layers']} layers; bands: the middle half of them. Dotted: one layer, initialised as in the run.",
    )  # fmt: skip


def initial(config: dict) -> tuple[tuple[np.ndarray, ...], ...]:
    """Singular values of one layer of the model that a run's config describes, over the largest, before it is trained.

    Returns:
        ((head, query, key), (head, output, value)): those above the rounding floor.
    """
    build = row_of(config["attention"]).build
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = Block(config["d_model"], config["n_heads"], config["n_layers"], build, causal=True).attention
    sides = ((s.head, s.rows, s.columns) for s in spectra(layer))
    return tuple(tuple((v[v > rounding_floor(v)] / v[0]).numpy() for v in side) for side in sides)


def draw_spectrum(ax: Axes, layers: list[dict], fresh: np.ndarray, label: str, marked: bool) -> None:
    """One mode of one row.

    Args:
        ax: where.
        layers: of each layer `values` over the largest, and their `floor`.
        fresh: values of a layer before training.
        label: the row.
        marked: with markers.
    """
    colour = COLOURS[mechanism(label)]
    values = np.array([np.where(np.array(m["values"]) > m["floor"], m["values"], np.nan) for m in layers])  # (layers, values)
    values = values[:, ~np.isnan(values).any(axis=0)]
    index = 1 + np.arange(values.shape[1])
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
    ax.fill_between(index, low, high, color=colour, alpha=0.15, linewidth=0)
    ax.plot(index, middle, color=colour, marker=MARKERS[mechanism(label)] if marked else None, markersize=3.5)
    ax.plot(1 + np.arange(len(fresh)), fresh, color=colour, linestyle=":", linewidth=1.3)


def compression(records: list[Record], path: Path) -> None:
    """Error of logits and of outputs, and loss, against the share of attention parameters, for layers that were only compressed."""
    groups = by_model(records)
    figure, axes = panels(len(groups), 3, 1.3 + 2.5 * len(groups), squeeze=False, sharex=True, sharey="col")
    measures = (
        ("error of logits", lambda way, before: way["inputs"][0]),
        ("error of outputs", lambda way, before: way["inputs"][1]),
        ("loss, above that before", lambda way, before: max(way["loss"] - before["loss"], LEVEL / 20)),
    )
    for line, group in zip(axes, groups):
        c = group[0].config
        shape = f"d {c['d_model']}, {c['n_heads']} heads" + (", rotary" if c["rotary"] else "")
        for ax, (title, measure) in zip(line, measures):
            for kind in dict.fromkeys(family(r.method) for r in group):
                draw_ways(ax, [r for r in group if family(r.method) == kind], kind, measure)
            ax.set(xscale="log", title=title)
            logarithmic(ax.xaxis, words=lambda x: f"{100 * x:g} %")
        line[2].axhspan(LEVEL / 20, LEVEL, color="#bbbbbb", alpha=0.4, linewidth=0)
        line[0].set_ylabel(f"{shape}\nrelative error")
        line[2].set(yscale="log", ylabel="nats per token")
        logarithmic(line[2].yaxis, (1,))
    axes[0, 2].set_ylim(bottom=LEVEL / 20)
    for ax in axes[-1]:
        ax.set_xlabel("attention parameters kept")
    data = records[0].data
    title = "Layers of trained models, compressed and not trained further"
    caption = (
        f"Small models at REDUCED SCALE, briefly trained; one of each, tested on {data['test']:,} {data['unit']}. Solid: compressed "
        "knowing the inputs; dashed: for the weights alone; dotted: mean-pooled heads. Grey: within 0.01 nats of the model before; one "
        "model and so few tokens cannot order what lies there."
    )
    axes[0, 0].legend(loc="upper left", handlelength=1.8, borderaxespad=0.2, labelspacing=0.3)
    save(figure, path, title, caption)


def draw_ways(ax: Axes, records: list[Record], kind: str, measure: Callable[[dict, dict], float]) -> None:
    """A line for each way to compress.

    Args:
        ax: where.
        records: of the rows of one family.
        kind: the family.
        measure: what a way reached and what was before -> the value to draw.
    """
    colour, marker = COLOURS[mechanism(kind)], MARKERS[mechanism(kind)]
    look = {"color": colour, "marker": marker, "markersize": 4, "markerfacecolor": "white" if "shared" in kind else colour}
    for way, dashes in (("aware", "-"), ("plain", "--"), ("mean", ":")):
        points = sorted(
            (
                r.attention_parameters / r.metrics["before"]["attention_parameters"],
                measure(r.metrics["ways"][way], r.metrics["before"]),
            )
            for r in records
            if way in r.metrics["ways"]
        )
        if points:
            ax.plot(*zip(*points), linestyle=dashes, linewidth=1.2, label=kind if way == "aware" else None, **look)


def family(label: str) -> str:
    """The rows that make one line: "MLA shared" for "MLA shared d_c=128"."""
    return " ".join(word for word in label.split() if word in ("MLA", "shared", "separated")) or mechanism(label)


def compression_cost(records: list[Record], path: Path) -> None:
    """Seconds and peak memory of the HOSVD of one layer, from its factors and from its tensors, against the width."""
    sizes = records[0].metrics["sizes"]
    widths = [size["d_model"] for size in sizes]
    last = sizes[-1]
    times, bytes_ = (last["tensors"][what] / last["factors"][what] for what in ("seconds", "megabytes"))
    title = f"HOSVD from the factors: {times:.0f} times as fast at d {widths[-1]:,}, in 1/{bytes_:.0f} of the memory"
    caption = (
        f"Truncated HOSVD of one multi-head layer with d / {records[0].config['head_dim']} heads; {records[0].device}; medians of up to "
        f"{records[0].config['repeats']}."
    )
    figure, axes = panels(1, 2, 3.6)
    describe(figure, title, caption)
    for ax, what, unit in zip(axes, ("seconds", "megabytes"), ("Seconds", "Peak memory in MB")):
        ends = []
        for way, name, colour, ink, marker in (
            ("tensors", "tensors formed\n(TensorLy)", GREY, GREY, "o"),
            ("factors", "from the factors\n(compress)", COLOURS["Tucker"], INKS["Tucker"], MARKERS["Tucker"]),
        ):
            values = [size[way][what] for size in sizes]
            ax.plot(widths, values, color=colour, marker=marker, markersize=5)
            ends.append((widths[-1], values[-1], name, ink))
        ax.set(xscale="log", yscale="log", xlabel="model width d", title=unit)
        ax.set_xticks(widths, [f"{w:,}" for w in widths])
        logarithmic(ax.yaxis, (1,))
        ax.minorticks_off()
        if what == "megabytes":
            name_ends(ax, ends)
    save(figure, path, title, caption)
