"""Training loss step by step, and as a difference to multi-head attention on the same batches."""

import statistics
from pathlib import Path

import numpy as np

from reproduce.report.query import BUDGETS, by_row, losses_of
from reproduce.report.words import passes_over, tokens_of
from reproduce.store.records import Record

from .labels import name_ends
from .style import COLOURS, INKS, describe, lines_of, logarithmic, mechanism, panels, save
from .wording import seeds_each, setting

SMOOTHED = 5  # entries of a curve that are averaged: in the preset gpu they stand 20 steps apart


def learning_curves(records: list[Record], experiment: str, path: Path) -> None:
    """Training loss against tokens seen, and the difference to multi-head attention of the same seed, which saw the same batches.

    Args:
        records: runs that may stand in one table; those that differ in seed alone become one line.
        experiment: "table2" or "table3".
        path: of the file.
    """
    groups, config = by_row(records), records[0].config
    styles = lines_of(list(groups))
    millions = records[0].train["batch_size"] * config["context"] / 1e6  # tokens of a step
    of_mha = {r.seed: smoothed(r)[1] for r in groups.get("MHA", ())}
    figure, (left, right) = panels(1, 2, 4.4, width_ratios=(1, 1.3))
    ends, later, alone = [], [], []
    for label, group in groups.items():
        tokens = smoothed(group[0])[0] * millions
        losses = np.mean([smoothed(r)[1] for r in group], axis=0)
        left.plot(tokens, losses, **styles[label] | {"linewidth": 1.2})
        name, ink = f"{label}: {statistics.mean(losses_of(group)):.3f}", INKS[mechanism(label)]
        alone.append((tokens[-1], losses[-1], name, ink))
        pairs = np.array([smoothed(r)[1] - of_mha[r.seed] for r in group if r.seed in of_mha])  # (seeds, entries)
        if not len(pairs):
            continue
        mean, colour = pairs.mean(axis=0), COLOURS[mechanism(label)]
        right.plot(tokens, mean, **styles[label])
        right.fill_between(tokens, pairs.min(axis=0), pairs.max(axis=0), color=colour, alpha=0.13, linewidth=0)
        later.append(pairs[:, tokens > tokens[-1] / 10])
        ends.append((tokens[-1], mean[-1], name, ink))
    left.set(xscale="log", xlabel="training tokens in millions", ylabel="nats per token", title="Training loss")
    right.set(xlabel="training tokens in millions", title="The same, minus that of MHA")
    logarithmic(left.xaxis)
    title = f"{BUDGETS[experiment].title}: training loss, and how far from multi-head attention's at every step"
    caption = (
        f"{setting(experiment, config)}: {tokens_of(records)}, {passes_over(records):.1f} for each of the text's, each row at its own "
        f"learning rate; {seeds_each(groups)}. Lines: means over seeds, smoothed over {SMOOTHED} entries of the log. Right: runs of "
        "one seed see the same batches; bands: lowest to highest seed; the first tenth may leave the panel. At the ends: validation loss, "
        "whose order may differ."
    )
    if ends:
        low, high = (f([f(values) for values in later]) for f in (np.min, np.max))
        if margin := (high - low) / 10:  # none where all curves are one: matplotlib's own limits then
            right.set(ylim=(low - margin, high + margin))
    else:  # nothing to compare with
        right.remove()
    describe(figure, title, caption)
    name_ends(right if ends else left, ends or alone)
    save(figure, path, title, caption)


def smoothed(record: Record) -> np.ndarray:
    """(2, entries): steps and training losses of a run, a running mean of both."""
    curve = np.array([entry[:2] for entry in record.metrics["curve"]])  # (entries, 2)
    window = min(SMOOTHED, len(curve))
    return np.stack([np.convolve(column, np.full(window, 1 / window), "valid") for column in curve.T])
