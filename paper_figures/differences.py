"""How far every row ends from multi-head attention, as estimates with intervals."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from reproduce.report.judge import MARGIN, Estimate
from reproduce.report.pairs import paired_difference
from reproduce.report.query import BUDGETS, budget_of, diverged, grouped, method_and_rate, runs_of, settled
from reproduce.report.words import tokens_of
from reproduce.store.records import Record

from .style import COLOURS, INKS, MARKERS, SMALL, mechanism, panels, save
from .wording import quarter

REACH = 0.15  # nats on each side of the panels


def changed(records: list[Record], like: Record) -> dict[tuple[str, float], list[Record]]:
    """The ablations on the text and over the steps of a run, none of which diverged, by method and rate.

    Args:
        records: all that there are.
        like: the run.
    """
    runs = [r for r in runs_of(records, "ablations", "gpu") if budget_of(r) == budget_of(like)]
    return {key: group for key, group in grouped(runs, method_and_rate).items() if not diverged(group)}


def sections_of(records: list[Record]) -> dict[str, dict[str, Estimate]]:
    """Differences to multi-head attention by section and row, the lowest first; sections without any are left out.

    Args:
        records: all that there are.

    Returns:
        Estimates; that of one pair of runs is as wide as nothing.
    """
    sections = {}
    for experiment, budget in BUDGETS.items():
        rows = {label: group for label, group in settled(records, experiment).items() if not diverged(group)}
        if not (base := rows.pop("MHA", None)):
            continue
        reduced = "REDUCED BUDGET" if budget.narrower(base[0].config) == 1 else "REDUCED SCALE"
        others = {f"{quarter(method)}, {rate:g}": group for (method, rate), group in changed(records, base[0]).items()}
        for what, groups in (
            (f"{budget.title}, {reduced}: {tokens_of(base)}", rows),
            ("The same, trained otherwise (last: the rate)", others),
        ):
            estimates = {label: e for label, group in groups.items() if (e := paired_difference(group, base))}
            if estimates:
                sections[what] = dict(sorted(estimates.items(), key=lambda item: item[1].value))
    return sections


def differences(sections: dict[str, dict[str, Estimate]], path: Path) -> None:
    """A forest plot: a panel per section, a line per row.

    Args:
        sections: as `sections_of` gives them, at least one.
        path: of the file.
    """
    heights = [len(lines) + 1.6 for lines in sections.values()]
    figure, axes = panels(len(sections), 1, 1.6 + 0.21 * sum(heights), sharex=True, squeeze=False, height_ratios=heights)
    for ax, (what, lines) in zip(axes[:, 0], sections.items()):
        ax.axvspan(-MARGIN, MARGIN, color="#bbbbbb", alpha=0.4, linewidth=0)
        ax.axvline(0, color=COLOURS["MHA"], linewidth=0.8)
        for y, (label, e) in enumerate(lines.items()):
            draw_estimate(ax, y, label, e)
        ax.set(xlim=(-1.08 * REACH, 1.08 * REACH), ylim=(len(lines) - 0.4, -0.6), title=what)
        ax.set_yticks(range(len(lines)), lines, fontsize=SMALL)
        for tick, label in zip(ax.get_yticklabels(), lines):
            tick.set_color(INKS[mechanism(label)])
        ax.grid(axis="y", visible=False)
        ax.set_xticks([-0.1, -0.05, 0, 0.05, 0.1])
        ax.tick_params(axis="y", length=0, pad=7)
        ax.tick_params(axis="x", labelbottom=True)
    axes[-1, 0].set_xlabel("validation loss minus that of MHA (nats per token)")
    every = [e for lines in sections.values() for e in lines.values() if e.low < e.high]
    below, above = sum(e.high < 0 for e in every), sum(e.low > 0 for e in every)
    save(
        figure, path,
        f"Differences to multi-head attention: of {len(every)} intervals, {below} lie below zero and {above} above",
        "Differences within seeds, whose runs read the same batches: means, and 95 % intervals (Student's t) where there are two "
        f"seeds or more; hollow: one seed. Grey: the margin of {MARGIN:g} nats. Arrows: further out. Fewer than five seeds "
        "say little of other seeds.",
    )  # fmt: skip


def draw_estimate(ax: Axes, y: float, label: str, e: Estimate) -> None:
    """A marker with its interval, as far as the panel reaches, and the numbers to the right of it."""
    kind, several = mechanism(label), e.low < e.high
    colour = COLOURS[kind]
    if several:
        ax.plot(np.clip((e.low, e.high), -REACH, REACH), (y, y), color=colour, linewidth=1.4)
    for out, edge, arrow in ((e.low < -REACH, -REACH, "<"), (e.high > REACH, REACH, ">")):
        if out:
            ax.plot(edge, y, arrow, color=colour, markerfacecolor=colour if several else "white", markersize=5)
    if abs(e.value) <= REACH:
        ax.plot(e.value, y, MARKERS[kind], color=colour, markerfacecolor=colour if several else "white", markersize=5.5)
    words = f"{e.value:+.3f} [{e.low:+.3f}, {e.high:+.3f}], {e.over}" if several else f"{e.value:+.3f}, {e.over}"
    place = dict(xycoords=("axes fraction", "data"), va="center", fontsize=SMALL, color=INKS[kind])
    ax.annotate(words.replace("-", "\N{MINUS SIGN}"), (1.03, y), **place)
