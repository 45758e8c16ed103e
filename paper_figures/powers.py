"""What one layer costs against its sizes, every point of it, with the power laws that fit best."""

from pathlib import Path

from matplotlib.axes import Axes

from reproduce.report.powers import COSTS, fitted_power, in_words, points_of
from reproduce.store.records import Record

from .speed import shape_of
from .style import MARKERS, lines_of, logarithmic, mechanism, panels, save
from .wording import short

SIZES = {"d": "width d", "n_H": "heads n_H", "N": "context N"}


def costs_against_sizes(record: Record, path: Path) -> None:
    """A panel for each cost that was measured and each size.

    Args:
        record: the section `curves` of speed.
        path: of the file.
    """
    rows = record.metrics["rows"]
    costs = [cost for cost in COSTS if any(r.get(cost) for r in rows)]
    figure, axes = panels(len(costs), len(SIZES), 0.8 + 1.4 * len(costs), sharex="col", sharey="row", squeeze=False)
    for along, column in zip(SIZES, axes.T):
        for cost, ax in zip(costs, column):
            draw(ax, rows, along, cost)
        column[0].set_title(f"against the {SIZES[along]}")
        sizes = sorted({r["value"] for r in rows if r["along"] == along})
        column[-1].set_xticks(sizes, [f"{size:,}" for size in sizes])
        column[-1].minorticks_off()
    for cost, ax in zip(costs, axes[:, 0]):
        ax.set_ylabel(COSTS[cost][0].replace(", ", ",\n"))
        logarithmic(ax.yaxis, (1,))
    figure.align_ylabels()
    save(
        figure, path,
        "One layer against its sizes: what it weighs, keeps and takes",
        f"{record.device}, {record.config['dtype']}, medians of {record.config['repeats']}; one size varied at a time from a layer "
        f"{shape_of(record)}. Lines: the power laws that fit best, and their exponents; in brackets: ranks of Tucker Attention. "
        "Parameters and caches are counted.",
    )  # fmt: skip


def draw(ax: Axes, rows: list[dict], along: str, cost: str) -> None:
    """One panel: a cost of every row against one size, and the exponents in a legend."""
    ax.set(xscale="log", yscale="log")
    ax.margins(y=0.3)
    laws = []
    for row, style in lines_of(list(dict.fromkeys(r["row"] for r in rows))).items():
        sizes, values = points_of(rows, along, row, cost)
        ax.plot(sizes, values, MARKERS[mechanism(row)], color=style["color"], markersize=4.5)
        if fitted := fitted_power(sizes, values):
            exponent, factor = fitted
            law = [factor * size**exponent for size in sizes]
            laws += ax.plot(sizes, law, linewidth=1.1, label=f"{short(row)}: {in_words(exponent)}", **style)
    ax.legend(handles=laws, loc="best", handlelength=1.2, borderaxespad=0.2, labelspacing=0.2)
