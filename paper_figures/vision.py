"""Figure 3: accuracy of vision transformers whose attention was converted."""

import statistics
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from reproduce.report.judge import Estimate, accuracy, at_their_best
from reproduce.report.query import by_row, diverged
from reproduce.report.words import epochs_of
from reproduce.store.records import Record

from .style import GREY, MARKERS, in_thousands, lines_of, logarithmic, mechanism, panels, save


def accuracy_against_parameters(records: list[Record], path: Path) -> None:
    """Figure 3: accuracy against attention parameters, converted only and fine-tuned; a line per mechanism and head rank.

    Bars: standard deviation over seeds, each of which pretrains its own model; cut off at 100 %.
    """
    start = [r for r in records if not r.is_trained]
    tuned = by_row([r for r in records if r.is_trained])
    example, n_seeds = next(iter(tuned.values()))[0], max(map(len, tuned.values()))
    c, classes = example.config, example.data["classes"]
    title = "Figure 3: accuracy of a converted vision transformer against its attention parameters"
    caption = (
        f"ViT d {c['d_model']}, REDUCED SCALE, pretrained with MHA on {example.data['name']} ({classes} classes), converted, "
        f"fine-tuned for {epochs_of(example)}. Means and standard deviations over {n_seeds} seeds; the axes differ. "
        "Grey line: before it was converted."
    )
    if classes <= 10:
        caption += f" Of {classes} classes, top-5 tells little."
    figure, axes = panels(1, 3, 3.9)
    for ax, (name, value) in zip(
        axes,
        (
            ("top-1, converted only", lambda m: m["converted"]["top1"]),
            ("top-1, fine-tuned", lambda m: m["top1"]),
            ("top-5, fine-tuned", lambda m: m["top5"]),
        ),
    ):
        lines = lines_by_head_rank(tuned, value)
        styles = lines_of(list(lines))
        for line, points in lines.items():
            x, y, spread = (np.array(values) for values in zip(*points))
            ax.errorbar(
                x, y, yerr=(spread, np.minimum(spread, 100 - y)), marker=MARKERS[mechanism(line)], markersize=4.5, capsize=2,
                linewidth=1.1, zorder=3 if line == "MHA" else 2, **styles[line],
            )  # fmt: skip
        finish(ax, name, "top5" if "top-5" in name else "top1", start)
    name_the_lines(axes[0], styles)
    save(figure, path, title, caption)


def chosen_accuracy_against_parameters(records: list[Record], path: Path) -> None:
    """Figure 3 where rates were chosen on held-out images: top-5 first, with intervals over seeds and images.

    Rows whose ranks differ before and after the softmax are hollow marks, without a line.
    """
    start = [r for r in records if not r.is_trained]
    best = {row: own.runs for row, own in at_their_best([r for r in records if r.is_trained]).items() if not diverged(own.runs)}
    example, n_seeds = next(iter(best.values()))[0], max(map(len, best.values()))
    c, data = example.config, example.data
    title = "Figure 3: accuracy of a converted vision transformer against its attention parameters"
    caption = (
        f"ViT d {c['d_model']}, REDUCED SCALE, pretrained with MHA on {data['name']} ({data['classes']} classes), converted, fine-tuned "
        f"for {epochs_of(example)}. Each row at the rate that is best by held-out top-5. Means of up to {n_seeds} seeds on "
        f"{data['test_images']:,} images; bars: 95 % intervals over seeds and images. Hollow: as many parameters, but unequal ranks before "
        "and after the softmax. The axes differ. Grey line: before it was converted."
    )
    figure, axes = panels(1, 3, 3.9)
    for ax, (name, metric, converted) in zip(
        axes,
        (("top-5, fine-tuned", "top5", False), ("top-1, fine-tuned", "top1", False), ("top-5, converted only", "top5", True)),
    ):
        lines = grouped_lines({row: point_of(runs, metric, converted) for row, runs in best.items()}, best)
        styles = lines_of(list(dict.fromkeys(line.removesuffix(HOLLOW) for line in lines)))
        for line, its in lines.items():
            hollow, whole = line.endswith(HOLLOW), line.removesuffix(HOLLOW)
            x, y, below, above = (np.array(values) for values in zip(*its))
            look = styles[whole] | ({"linestyle": "none", "markerfacecolor": "white"} if hollow else {})
            ax.errorbar(
                x, y, yerr=(below, above), marker=MARKERS[mechanism(line)], markersize=4.5, capsize=2, linewidth=1.1, **look
            )
        finish(ax, name, metric, start)
    name_the_lines(axes[0], styles)
    save(figure, path, title, caption)


def finish(ax: Axes, name: str, metric: str, start: list[Record]) -> None:
    """One panel's title and axis, and in grey what the models reached from which all others were made."""
    if start:
        ax.axhline(statistics.mean(100 * r.metrics[metric] for r in start), color=GREY, linewidth=1.4)
    ax.set(xscale="log", xlabel="attention parameters", title=name)
    ax.margins(x=0.12, y=0.1)
    logarithmic(ax.xaxis, words=in_thousands)


def name_the_lines(ax: Axes, styles: dict[str, dict]) -> None:
    """The first panel's vertical axis, and a legend of all lines."""
    ax.set_ylabel("accuracy in %")
    handles = [
        Line2D([], [], marker=MARKERS[mechanism(line)], markersize=3.5, label=line, **look) for line, look in styles.items()
    ]
    ax.legend(handles=handles, loc="lower right", handlelength=2.4, handletextpad=0.5, borderaxespad=0, labelspacing=0.2)


HOLLOW = ", unequal ranks"  # behind the name of the line that such rows belong to


def point_of(runs: list[Record], metric: str, converted: bool) -> tuple[float, float, float, float]:
    """Attention parameters, accuracy in %, and how far its interval reaches below and above; not at all where there is one seed."""
    mean = statistics.mean((r.metrics["converted"] if converted else r.metrics)[metric] for r in runs)
    e = accuracy(runs, metric, converted=converted) or Estimate(mean, mean, mean, "one seed")
    return runs[0].attention_parameters, 100 * e.value, 100 * (e.value - e.low), 100 * (e.high - e.value)


def grouped_lines(points: dict[str, tuple], best: dict[str, list[Record]]) -> dict[str, list[tuple]]:
    """The points of one mechanism and head rank together, sorted by parameters; MHA first, and the most heads."""
    lines: dict[str, list[tuple]] = {}
    for row, point in points.items():
        config = best[row][0].config["row"]
        line = f"Tucker, head rank {config['ranks'][0]}" if config.get("ranks") else mechanism(row)
        lines.setdefault(line + (HOLLOW if config.get("post_ranks") else ""), []).append(point)
    return {line: sorted(lines[line]) for line in sorted(lines, key=place_of)}


def place_of(line: str) -> tuple:
    """Where a line stands in the legend."""
    return (
        line != "MHA",
        "Tucker" in line,
        HOLLOW in line,
        -int(line.removesuffix(HOLLOW).split()[-1]) if "Tucker" in line else 0,
    )


def lines_by_head_rank(tuned: dict[str, list[Record]], value) -> dict[str, list[tuple[float, float, float]]]:
    """(parameters, mean, standard deviation) of each row, the rows of one mechanism and head rank together, MHA's first.

    Args:
        tuned: runs by row.
        value: metrics of a run -> accuracy, up to 1.
    """
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for label, group in tuned.items():
        values = [100 * value(r.metrics) for r in group]
        ranks = group[0].config["row"].get("ranks")
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        line = f"Tucker, head rank {ranks[0]}" if ranks else mechanism(label)
        lines.setdefault(line, []).append((group[0].attention_parameters, statistics.mean(values), spread))
    return {line: sorted(lines[line]) for line in sorted(lines, key=place_of)}
