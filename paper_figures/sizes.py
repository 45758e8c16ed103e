"""What the rows weigh and keep, and the loss that they buy with it."""

import statistics
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from reproduce.report.best import BASE
from reproduce.report.judge import Best, test_losses
from reproduce.report.query import BUDGETS, diverged, losses_of, mean_loss, megabytes, row_label, settled, sizes_of
from reproduce.report.words import tokens_of
from reproduce.store.records import Record

from .differences import changed
from .labels import Point, name_ends, name_points
from .style import COLOURS, GREY, INKS, MARKERS, SMALL, describe, logarithmic, mechanism, panels, save
from .wording import seeds_each, setting, short


def cache_against_context(records: list[Record], path: Path) -> None:
    """KV-cache bytes of a GPT-2 against the length of the context, BF16. Rows that cache equally much alternate in one line."""
    shape = records[0].config
    contexts = 2 ** np.arange(10, 18)
    groups: dict[int, list[str]] = {}
    for r in sizes_of(records):
        groups.setdefault(r["cache_per_token"] * shape["n_layers"] * 2, []).append(r["label"])  # bytes per token
    figure, ax = panels(1, 1, 3.9)
    ends = []
    for per_token, labels in groups.items():
        kinds = list(dict.fromkeys(mechanism(label) for label in labels))
        for i, kind in enumerate(kinds):
            dashes = "-" if len(kinds) == 1 else (5 * i, (5, 5 * (len(kinds) - 1)))
            ax.plot(contexts, contexts * per_token / 1e6, color=COLOURS[kind], linestyle=dashes, linewidth=2.4)
        colour = INKS[kinds[0]] if len(kinds) == 1 else INKS["MHA"]
        ends.append((contexts[-1], contexts[-1] * per_token / 1e6, ",\n".join(labels), colour))
    ax.set(xscale="log", yscale="log", xlabel="context in tokens", ylabel="KV cache in MB (BF16)")
    ax.set_xticks(contexts, [f"{n // 1024}k" for n in contexts])
    logarithmic(ax.yaxis, (1,))
    ax.minorticks_off()
    least, most = min(groups), max(groups)
    title = f"GPT-2's cache: up to {most / least:.0f} times smaller than multi-head attention's, at every context"
    caption = f"Counted, not measured: {shape['n_layers']} layers, one sequence. A line of several colours: rows that keep equally much."
    describe(figure, title, caption)
    name_ends(ax, ends)
    save(figure, path, title, caption)


def attention_parameters(gpt2: list[Record], llama: list[Record], path: Path) -> None:
    """Attention parameters of every row of Tables 2 and 3, as a share of multi-head attention."""
    figure, axes = panels(1, 2, 3.4)
    for ax, records, n_layers, title in ((axes[0], gpt2, 12, "Table 2: GPT-2"), (axes[1], llama, 16, "Table 3: LLaMA3-1B")):
        rows = sizes_of(records)[::-1]
        millions = [r["parameters"] * n_layers / 1e6 for r in rows]
        bars = ax.barh([r["label"] for r in rows], millions, color=[COLOURS[mechanism(r["label"])] for r in rows])
        ax.bar_label(bars, [f"{m:.1f} ({m / millions[-1]:.0%})" for m in millions], padding=3, fontsize=SMALL)
        ax.set(xlim=(0, max(millions) * 1.5), xlabel=f"millions, {n_layers} layers", title=title)
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    save(
        figure,
        path,
        "Attention parameters of every row, and their share of multi-head attention's",
        "Counted in the layers as they are built at the paper's shapes; in brackets: of the parameters of MHA.",
    )


def loss_against_size(records: list[Record], experiment: str, what: str, path: Path) -> None:
    """Validation loss of the rows of "table2" or "table3" against their attention parameters or against their cache.

    A row that is more than 3 % above the one to compare with stands at the upper edge, with its loss.  Rows of one size are drawn side
    by side, 3 % apart.

    Args:
        records: all that there are.
        experiment: "table2" or "table3".
        what: "parameters" or "cache".
        path: of the file.
    """
    budget = BUDGETS[experiment]
    rows = {label: group for label, group in settled(records, experiment).items() if not diverged(group)}
    example = next(iter(rows.values()))[0]
    tried = changed(records, example)
    groups = rows | lower_than_as_they_are(rows, tried)
    means = {label: statistics.mean(losses_of(group)) for label, group in groups.items()}
    base = means.get(budget.base)
    edge = min(1.03 * (base or min(means.values())), max(means.values()))
    measure, name = {"parameters": (0, "attention parameters"), "cache": (1, "KV cache of one context")}[what]
    caption = (
        f"{setting(experiment, example.config)}: {tokens_of([example])}. Markers: means over seeds; dots: each seed; hollow: one "
        f"seed. Dotted: {budget.base}."
    )
    own = {label: megabytes(group[0])[measure] for label, group in groups.items()}
    if (places := side_by_side(own)) != own:
        caption += " Rows of one size are drawn side by side."
    if any(mean > edge for mean in means.values()):
        caption += " Arrows: above the panel."
    if len(groups) > len(rows):
        caption += f" Names of two lines: a row trained otherwise, where that ended lower; the lowest of its settings, {len(tried)} in all."
    figure, ax = panels(1, 1, 5.8)
    points = [draw_losses(ax, places[label], label, losses_of(group), edge) for label, group in groups.items()]
    if base:
        ax.axhline(base, color=GREY, linewidth=1, linestyle=":", zorder=1)
    ax.set(xlabel=f"{name} in MB (BF16)", ylabel="validation loss (nats per token)")
    on_sizes(ax, own.get(budget.base), budget.base)
    title = f"{budget.title}: validation loss against {name.replace('KV', 'the')}"
    save_named(figure, ax, points, path, title, caption)


def best_against_size(best: dict[str, Best], path: Path) -> None:
    """Test loss of the rows at their best against their attention parameters.

    Args:
        best: the rows as `reproduce.report.best.judged_at_best` gives them, multi-head attention first.
        path: of the file.
    """
    runs = {row: own.runs for row, own in best.items()}
    own = {row: megabytes(group[0])[0] for row, group in runs.items()}
    places = side_by_side(own)
    figure, ax = panels(1, 1, 4.6)
    points = [draw_losses(ax, places[row], row, test_losses(group), float("inf")) for row, group in runs.items()]
    ax.axhline(statistics.mean(test_losses(runs[BASE])), color=GREY, linewidth=1, linestyle=":", zorder=1)
    ax.set(xlabel="attention parameters in MB (BF16)", ylabel="test loss (nats per token)")
    on_sizes(ax, own[BASE], BASE)
    title = "GPT-2 with Muon on fresh text: test loss against attention parameters"
    caption = (
        f"The paper's shape, REDUCED BUDGET: {tokens_of(runs[BASE])}, read once; {seeds_each(runs)}. Each row at the rate and with the "
        f"norms that validation text prefers. Markers: means over seeds; dots: each seed. Dotted: {BASE}."
    )
    save_named(figure, ax, points, path, title, caption)


def save_named(figure: Figure, ax: Axes, points: list[Point], path: Path, title: str, caption: str) -> None:
    """Write it with a name beside every point, which are placed when all else has its place.

    Args:
        figure, path, title, caption: as in `save`.
        ax, points: as in `name_points`.
    """
    describe(figure, title, caption)
    figure.draw_without_rendering()
    name_points(ax, points)
    save(figure, path, title, caption)


def on_sizes(ax: Axes, whole: float | None, name: str) -> None:
    """A logarithmic axis of sizes, per cent of the whole on top, and a legend of the mechanisms.

    Args:
        ax: with the rows drawn.
        whole, name: MB of the row that others are compared with, where it is there, and its name.
    """
    ax.set_xscale("log")
    ax.margins(x=0.15, y=0.12)
    logarithmic(ax.xaxis)
    if whole:
        share_axis(ax, whole, name)
    handles = [Line2D([], [], color=COLOURS[k], marker=MARKERS[k], linestyle="", label=k) for k in COLOURS]
    ax.legend(handles=handles, loc="upper right", handlelength=1)


def share_axis(ax: Axes, whole: float, name: str) -> None:
    """A second axis on top: per cent of the size of one row.

    Args:
        ax: whose logarithmic x-axis is in MB.
        whole: MB of that row.
        name: of that row.
    """
    top = ax.secondary_xaxis("top", functions=(lambda x: 100 * x / whole, lambda share: share * whole / 100))
    top.set_xlabel(f"the same, % of {name}'s")
    logarithmic(top.xaxis)


def lower_than_as_they_are(
    rows: dict[str, list[Record]], tried: dict[tuple[str, float], list[Record]]
) -> dict[str, list[Record]]:
    """Of each row the changed setting that ended lowest, if it ended below the row as it is.

    Args:
        rows: runs of each as it is.
        tried: those of every changed setting by method and rate, as `changed` gives them.
    """
    lowest = {}
    for group in sorted(tried.values(), key=mean_loss, reverse=True):
        row = row_label(group[0])
        if row in rows and mean_loss(group) < mean_loss(rows[row]):
            lowest[row] = group
    return {group[0].method: group for group in lowest.values()}


def draw_losses(ax: Axes, x: float, label: str, losses: list[float], edge: float) -> tuple[float, float, str, str]:
    """A row's marker at the mean of its losses, each with a dot, or at the edge; what `name_points` takes is returned."""
    kind, mean = mechanism(label), statistics.mean(losses)
    colour, several, inside = COLOURS[kind], len(losses) > 1, mean <= edge
    if several and inside:
        ax.plot([x] * len(losses), losses, ".", color=colour, markersize=5.5, markeredgewidth=0)
    ax.plot(x, min(mean, edge), MARKERS[kind], color=colour, markerfacecolor=colour if several else "white", markersize=6)
    return x, min(mean, edge), short(label) if inside else f"{short(label)}: {mean:.2f} ↑", INKS[kind]


def side_by_side(places: dict[str, float]) -> dict[str, float]:
    """places: where each row stands on a logarithmic axis.  Those within 1 % of each other are moved apart, by 3 % each."""
    moved = {}
    for label, x in places.items():
        near = [other for other, y in places.items() if abs(y / x - 1) < 0.01]
        moved[label] = x * 1.03 ** (near.index(label) - (len(near) - 1) / 2)
    return moved
