"""Validation loss against the peak learning rate, a panel per row."""

import statistics
import textwrap
from pathlib import Path

from matplotlib.axes import Axes

from reproduce.models.rows import TABLE2
from reproduce.report.query import full_budget_runs, grouped, losses_of, slowed_runs, sweep_runs
from reproduce.report.words import seeds_in_words, tokens_of
from reproduce.store.records import Record

from .style import COLOURS, GREY, INKS, MARKERS, SMALL, describe, mechanism, panels, save

SLOWED = "and factors (Tucker) or attention (others) at ¼ of the rate"
BARE = dict(facecolor="white", edgecolor="none", pad=0.6)  # behind a number, over grid and lines
DASHES = ("-", "--", ":")  # of the ways to train, the plainest first


def sweep_ways(records: list[Record]) -> dict[str, list[Record]]:
    """The sweep's runs by length of warm-up, the longest first, and those whose attention learned slowly.

    Args:
        records: all `unbroken` ones.
    """
    warmups = grouped(sweep_runs(records), lambda r: r.warmup)
    ways = {f"warm-up {n} of {warmups[n][0].steps:,} steps": warmups[n] for n in sorted(warmups, reverse=True)}
    return ways | ({f"warm-up {max(warmups)}, {SLOWED}": slowed_runs(records, "gpu-sweep")} if warmups else {})


def full_budget_ways(records: list[Record]) -> dict[str, list[Record]]:
    """The same at Table 2's full budget, of the paper's rows that were trained at several rates.

    Args:
        records: all `unbroken` ones.
    """
    by_row = grouped(full_budget_runs(records), lambda r: r.method)
    swept = [row.label for row in TABLE2 if len({r.rate for r in by_row.get(row.label, ())}) > 1]
    if not swept:
        return {}
    t = by_row[swept[0]][0].train
    runs = [r for label in swept for r in by_row[label]]
    return {f"warm-up {t['warmup_steps']} of {t['steps']:,} steps": runs, f"the same, {SLOWED}": slowed_runs(records, "gpu")}


def learning_rates(ways: dict[str, list[Record]], highest: float, path: Path) -> None:
    """A panel per row, a line per way to train it; dotted across all panels is the best of MHA.

    Args:
        ways: runs by what the way is called; empty ones are left out.
        highest: loss at the upper edge, over the lowest of all.
        path: of the file.
    """
    ways = {name: runs for name, runs in ways.items() if runs}
    records = [r for runs in ways.values() for r in runs]
    labels = list(dict.fromkeys(r.method for r in records))
    columns = min(4, len(labels) + 1)  # the last place is the key's
    lines = -(-(len(labels) + 1) // columns)
    figure, axes = panels(lines, columns, 0.9 + 2.2 * lines, sharex=True, sharey=True, squeeze=False)
    losses, rates = losses_of(records), sorted({r.rate for r in records})
    best, worst, several = min(losses), max(losses), len({r.seed for r in records}) > 1
    settings = [grouped(runs, lambda r: (r.method, r.rate)) for runs in ways.values()]
    of_mha = [statistics.mean(losses_of(group)) for way in settings for (label, _), group in way.items() if label == "MHA"]
    for ax, label in zip(axes.flat, labels):
        for way, dashes in zip(settings, DASHES):
            draw_line(ax, {rate: losses_of(way[label, rate]) for rate in rates if (label, rate) in way}, label, dashes, several)
        if of_mha:
            ax.axhline(min(of_mha), color=GREY, linestyle=":", linewidth=1, zorder=1)
        ax.set(xscale="log", ylim=((1 - (highest - 1) / 6) * best, highest * best))
        ax.set_title(label, color=INKS[mechanism(label)], fontsize=9)
        ax.set_xticks(rates, [f"{1000 * rate:g}" for rate in rates])
        ax.minorticks_off()
        ax.tick_params(labelbottom=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("nats per token")
    for ax in axes.flat[max(len(labels) - columns, 0) : len(labels)]:
        ax.set_xlabel("peak rate × 1,000")
    draw_key(axes.flat[len(labels)], list(ways), bool(of_mha))
    for ax in axes.flat[len(labels) :]:
        ax.axis("off")
    left = f" Lines that leave a panel end higher, up to {worst:.1f}." if worst > highest * best else ""
    dots = " Dots: each seed; hollow: one." if several else ""
    title = f"GPT-2, {tokens_of(records)}: validation loss against the peak learning rate"
    caption = (
        f"The paper's shape, REDUCED BUDGET, {seeds_in_words(records)}. A number at each row's lowest. A row without "
        f"a point at a rate was not tried there.{left}{dots}"
    )
    describe(figure, title, caption)
    figure.draw_without_rendering()
    for ax, label in zip(axes.flat, labels):
        points = [(rate, losses_of(group)) for way in settings for (name, rate), group in way.items() if name == label]
        write_lowest(ax, *min(points, key=lambda point: statistics.mean(point[1])), min(of_mha, default=None))
    save(figure, path, title, caption)


def write_lowest(ax: Axes, rate: float, losses: list[float], dotted: float | None) -> None:
    """The mean below a point and its seeds, and not on the dotted line.

    Args:
        ax: as it will stay: the layout of its figure is settled.
        rate, losses: the point's, one of each seed.
        dotted: loss at which the line runs, None if there is none.
    """
    mean = statistics.mean(losses)
    height = {
        loss: ax.transData.transform((rate, loss))[1] * 72 / ax.figure.dpi for loss in (mean, min(losses), dotted or mean)
    }
    down = 14 + height[mean] - height[min(losses)]  # in points, to the foot of the digits
    line = height[mean] - height[dotted or mean]
    if down - 10 < line < down + 1:
        down = line + 10
    look = dict(textcoords="offset points", ha="center", fontsize=SMALL, bbox=BARE)
    ax.annotate(f"{mean:.3f}", (rate, mean), (0, -down), **look)


def draw_line(ax: Axes, losses: dict[float, list[float]], label: str, dashes: str, several: bool) -> None:
    """A line through means over seeds.

    Args:
        ax: where.
        losses: of each seed by rate.
        label, dashes: whose, and which way.
        several: whether the figure has several seeds: each is a dot then, and one alone hollow.
    """
    means = {rate: statistics.mean(seeds) for rate, seeds in losses.items()}
    colour, marker = COLOURS[mechanism(label)], MARKERS[mechanism(label)]
    ax.plot(list(means), list(means.values()), color=colour, linestyle=dashes, linewidth=1.3)
    for rate, mean in means.items():
        face = "white" if several and len(losses[rate]) == 1 else colour
        ax.plot(rate, mean, marker, color=colour, markerfacecolor=face, markersize=4)
        if len(losses[rate]) > 1:
            ax.plot([rate] * len(losses[rate]), losses[rate], ".", color=colour, markersize=3, alpha=0.6)


def draw_key(ax: Axes, names: list[str], of_mha: bool) -> None:
    """What the lines are, in an empty panel."""
    for name, dashes in zip(names, DASHES):
        ax.plot([], [], color="#333333", linestyle=dashes, linewidth=1.3, label=textwrap.fill(name, 20))
    if of_mha:
        ax.plot([], [], color=GREY, linestyle=":", linewidth=1, label="the best of MHA")
    ax.legend(loc="center left", handlelength=2, borderaxespad=0, labelspacing=0.8).set_in_layout(False)
