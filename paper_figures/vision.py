"""Figure 3: accuracy of vision transformers whose attention was converted."""

import statistics
from pathlib import Path

import numpy as np
from matplotlib.lines import Line2D

from reproduce.report.query import by_row
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
        "Dotted: before it was converted."
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
        if start:
            before = statistics.mean(100 * r.metrics["top5" if "top-5" in name else "top1"] for r in start)
            ax.axhline(before, color=GREY, linewidth=1, linestyle=":")
        ax.set(xscale="log", xlabel="attention parameters", title=name)
        ax.margins(x=0.12, y=0.1)
        logarithmic(ax.xaxis, words=in_thousands)
    axes[0].set_ylabel("accuracy in %")
    handles = [Line2D([], [], marker=MARKERS[mechanism(line)], markersize=3.5, label=line, **styles[line]) for line in lines]
    axes[0].legend(handles=handles, loc="lower right", handlelength=2.4, handletextpad=0.5, borderaxespad=0, labelspacing=0.2)
    save(figure, path, title, caption)


def lines_by_head_rank(tuned: dict[str, list[Record]], value) -> dict[str, list[tuple[float, float, float]]]:
    """(parameters, mean, standard deviation) of each row, the rows of one mechanism and head rank together, MHA's first.

    Args:
        tuned: runs by row.
        value: metrics of a run -> accuracy, up to 1.
    """
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for label, group in tuned.items():
        values = [100 * value(r.metrics) for r in group]
        ranks = group[0].config["row"]["ranks"]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        line = f"Tucker, head rank {ranks[0]}" if ranks else mechanism(label)
        lines.setdefault(line, []).append((group[0].attention_parameters, statistics.mean(values), spread))
    order = sorted(lines, key=lambda line: (line != "MHA", "Tucker" in line, -int(line.split()[-1]) if "Tucker" in line else 0))
    return {line: sorted(lines[line]) for line in order}
