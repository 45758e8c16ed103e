"""How the training of a row breaks down at a high rate, what prevents it, and which part of the layer grows."""

import textwrap
from pathlib import Path

from reproduce.report.query import recipe_of, row_label
from reproduce.report.words import change_of, seeds_in_words, tokens_of
from reproduce.store.records import Record

from .labels import name_ends
from .style import COLOURS, GREY, INKS, SMALL, describe, logarithmic, panels, save
from .wording import quarter

PARTS = {"core": "-", "head": "--", "query": "-.", "output": "-.", "key": ":", "value": ":"}
SIDES = {"pre": COLOURS["Tucker"], "post": "#D55E00"}


def beside_warmup(record: Record) -> dict:
    """What was changed in how a row is trained, but for the length of its warm-up."""
    return {name: value for name, value in recipe_of(record).items() if name != "warmup"}


def breaking_down(records: list[Record], path: Path) -> None:
    """Largest logits above, training losses below; a column per change of the training, with the short and with the long warm-up.

    Args:
        records: runs of one row at one rate, the row as it is first.
        path: of the file.
    """
    changes: list[dict] = []
    for r in records:
        if beside_warmup(r) not in changes:
            changes.append(beside_warmup(r))
    figure, axes = panels(2, len(changes), 5.2, sharex=True, sharey="row", squeeze=False)
    for (logits, losses), change in zip(axes.T, changes):
        runs = [r for r in records if beside_warmup(r) == change]
        for r in ([] if records[0] in runs else records[:1]) + runs:
            grey, dashes = r not in runs, "--" if "warmup" in recipe_of(r) else "-"
            look = {"color": GREY if grey else COLOURS["Tucker"], "linewidth": 0.9 if grey else 1.5, "linestyle": dashes}
            logits.plot(*zip(*[(o["step"], o["largest_logit"]) for o in r.metrics["observations"]]), **look)
            label = None if grey else f"{r.metrics['validation_loss']:.3f}"
            losses.plot(*zip(*[point[:2] for point in r.metrics["curve"]]), label=label, **look)
        name = change_of(min(runs, key=lambda r: len(recipe_of(r))))
        logits.set_title(textwrap.fill(quarter(name), 17), fontsize=SMALL, loc="left")
        logits.set_yscale("log")
        logarithmic(logits.yaxis, (1,))
        losses.set(ylim=(4.0, 7.8), xlabel="step")
        losses.set_xticks([0, max(point[0] for point in records[0].metrics["curve"])])
        losses.legend(loc="lower left", handlelength=1.6, borderaxespad=0.1)
    axes[0, 0].set_ylabel("largest |logit|")
    axes[1, 0].set_ylabel("training loss (nats)")
    warmups = sorted({r.warmup for r in records})
    also = f"; dashed: of {warmups[-1]}" if len(warmups) > 1 else ""
    save(
        figure, path,
        f"{row_label(records[0])} at the rate {records[0].rate:g}: its logits run away; what holds them back",
        f"GPT-2's shape, REDUCED BUDGET: {tokens_of(records)}, {seeds_in_words(records)}, changes of the training that did not diverge. "
        f"Solid: warm-up of {warmups[0]} steps{also}. Grey: the row as it is. Logits: of all layers, heads and tokens of a batch. "
        "Numbers: final validation loss.",
    )  # fmt: skip


def what_grows(record: Record, path: Path) -> None:
    """Norms of the cores and factors of a run, and of their gradients, part by part.

    Args:
        record: a run of a Tucker Attention that was observed.
        path: of the file.
    """
    seen = record.metrics["observations"]
    parts = [f"{side}.{part}" for side in SIDES for part in PARTS if f"{side}.{part}" in seen[0]["weights"]]
    figure, axes = panels(1, 2, 4.0)
    title = f"{row_label(record)} breaking down: norms of its parts and of their gradients"
    caption = (
        f"GPT-2's shape, REDUCED BUDGET: {tokens_of([record])}, one seed, rate {record.rate:g}. Frobenius norms over all layers. "
        "Green: before the softmax; red: after it."
    )
    describe(figure, title, caption)
    for ax, what in zip(axes, ("weights", "gradients")):
        ends = []
        for name in parts:
            side, part = name.split(".")
            start = seen[0][what][name] if what == "weights" else 1
            steps, norms = [o["step"] for o in seen], [o[what][name] / start for o in seen]
            ax.plot(steps, norms, color=SIDES[side], linestyle=PARTS[part])
            ends.append((steps[-1], norms[-1], f"{side} {part}", INKS["Tucker"] if side == "pre" else "#A84A00"))
        ax.set(xlabel="step", title="Norm over that at the start" if what == "weights" else "Norm of the gradient")
        if what == "gradients":
            ax.set_yscale("log")
            logarithmic(ax.yaxis, (1,))
        name_ends(ax, ends)
    save(figure, path, title, caption)
