"""The measured figures. Each function takes records and a path, and says in the figure itself when a scale is reduced."""

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from matplotlib.transforms import Bbox

from reproduce.models.rows import TABLE2
from reproduce.report.query import (
    BUDGETS,
    by_model,
    by_row,
    diverged,
    full_budget_runs,
    grouped,
    losses_of,
    megabytes,
    recipe_of,
    row_label,
    settled,
    sizes_of,
    slowed_runs,
    sweep_runs,
)
from reproduce.report.targets import KERNEL
from reproduce.report.words import change_of, epochs_of, scale_of, seeds_in_words, tokens_of
from reproduce.store.records import Record

from .style import COLOURS, MARKERS, lines_of, mechanism


def cache_against_context(records: list[Record], path: Path) -> None:
    """KV-cache bytes of a GPT-2 against the length of the context, BF16. Rows that cache equally much alternate in one line."""
    shape = records[0].config
    contexts = 2 ** np.arange(10, 18)
    groups: dict[int, list[str]] = {}
    for r in sizes_of(records):
        groups.setdefault(r["cache_per_token"] * shape["n_layers"] * 2, []).append(r["label"])  # bytes per token
    figure, ax = plt.subplots(figsize=(7.6, 4.0))
    for per_token, labels in groups.items():
        kinds = list(dict.fromkeys(mechanism(label) for label in labels))
        for i, kind in enumerate(kinds):
            dashes = "-" if len(kinds) == 1 else (5 * i, (5, 5 * (len(kinds) - 1)))
            ax.plot(contexts, contexts * per_token / 1e6, color=COLOURS[kind], linestyle=dashes, linewidth=2.4)
        text = ",\n".join(", ".join(labels[n : n + 2]) for n in range(0, len(labels), 2))
        end = (contexts[-1], contexts[-1] * per_token / 1e6)
        ax.annotate(text, end, (8, 0), textcoords="offset points", va="center", fontsize=8.5)
    ax.set(xscale="log", yscale="log", xlabel="context length in tokens", ylabel="KV cache in MB (BF16)")
    ax.set_xticks(contexts, [f"{n // 1024}k" for n in contexts])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.0f}"))
    ax.minorticks_off()
    ax.set_title("What decoding must keep: GPT-2, 12 layers, one sequence")
    save(figure, path)


def attention_parameters(gpt2: list[Record], llama: list[Record], path: Path) -> None:
    """Attention parameters of every row of Tables 2 and 3, as a share of multi-head attention."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8))
    for ax, records, n_layers, title in ((axes[0], gpt2, 12, "Table 2: GPT-2"), (axes[1], llama, 16, "Table 3: LLaMA3-1B")):
        rows = sizes_of(records)[::-1]
        millions = [r["parameters"] * n_layers / 1e6 for r in rows]
        bars = ax.barh([r["label"] for r in rows], millions, color=[COLOURS[mechanism(r["label"])] for r in rows])
        ax.bar_label(bars, [f"{m:.1f}  ({m / millions[-1]:.0%})" for m in millions], padding=3, fontsize=8.5)
        ax.set(xlim=(0, max(millions) * 1.45), xlabel=f"attention parameters in millions, {n_layers} layers")
        ax.set_title(title)
        ax.grid(axis="y", visible=False)
    figure.tight_layout()
    save(figure, path)


def loss_curves(records: list[Record], experiment: str, path: Path) -> None:
    """Training loss against tokens seen, one line per row of "table2" or "table3" (mean over seeds), validation loss in the legend."""
    runs = by_row(records)
    figure, ax = plt.subplots(figsize=(7.2, 4.4))
    styles = lines_of(list(runs))
    c = next(iter(runs.values()))[0].config
    per_step = c["train"]["batch_size"] * c["context"]
    for label, group in runs.items():
        curves = np.array([[entry[:2] for entry in r.metrics["curve"]] for r in group])  # (seeds, entries, 2)
        mean = curves.mean(axis=0)
        final = statistics.mean(r.metrics["validation_loss"] for r in group)
        ax.plot(mean[:, 0] * per_step / 1e6, mean[:, 1], linewidth=1.4, label=f"{label}: {final:.3f}", **styles[label])
    ax.set(xlabel="training tokens in millions", ylabel="training loss (nats per token)")
    ax.set_title(
        f"{BUDGETS[experiment].title} rows at REDUCED SCALE: d {c['d_model']}, {c['n_layers']} layers, N {c['context']},\n"
        f"{seeds_in_words(records)}{narrowed(experiment, c)}",
        fontsize=10,
    )
    ax.legend(title="row, with its final validation loss")
    save(figure, path)


def narrowed(experiment: str, config: dict) -> str:
    """How rows of "table2" or "table3" are named where all but the head rank is smaller than the names say; otherwise nothing."""
    narrower = BUDGETS[experiment].narrower(config)
    return f"; rows as the paper names them, ranks but the head rank divided by {narrower}" if narrower > 1 else ""


def loss_against_size(records: list[Record], experiment: str, path: Path) -> None:
    """Validation loss of the rows of "table2" or "table3" against their attention parameters and against their cache.

    A row that is more than 4 % above the one to compare with stands at the upper edge, with its loss.  Rows of one size are drawn side
    by side, 3 % apart.
    """
    budget = BUDGETS[experiment]
    groups = {label: group for label, group in settled(records, experiment).items() if not diverged(group)}
    losses = {label: losses_of(group) for label, group in groups.items()}
    means = {label: statistics.mean(values) for label, values in losses.items()}
    spreads = {label: statistics.stdev(values) if len(values) > 1 else 0 for label, values in losses.items()}
    base = means.get(budget.base)
    edge = min(1.04 * (base or min(means.values())), max(means.values()))
    low = min(means[label] - spreads[label] for label in means)
    high = max(edge, *(means[label] + spreads[label] for label in means if means[label] <= edge))
    figure, axes = plt.subplots(2, 1, figsize=(8.8, 9.6))
    named = []  # points of each panel, whose names find their places once the axes have theirs
    for n, (ax, title) in enumerate(zip(axes, ("attention parameters in MB (BF16)", "KV cache of one context in MB (BF16)"))):
        points = []
        for label, x in side_by_side({label: megabytes(group[0])[n] for label, group in groups.items()}).items():
            kind, y = mechanism(label), min(means[label], edge)
            text = label.removeprefix("Tucker ").replace("n_KV=", "").replace(" d_c=", " ")
            one = len(losses[label]) == 1
            face = "white" if one else COLOURS[kind]
            bar = None if one or means[label] > edge else spreads[label]
            ax.errorbar(
                x, y, yerr=bar, color=COLOURS[kind], marker=MARKERS[kind], markerfacecolor=face, markersize=6, capsize=2.5, elinewidth=1.2
            )  # fmt: skip
            points.append((x, y, text if means[label] <= edge else f"{text}: {means[label]:.2f} ↑", COLOURS[kind]))
        if base:
            ax.axhline(base, color="#999999", linewidth=1, linestyle=":", zorder=1)
        ax.set(xscale="log", xlabel=title, ylim=(low - (high - low) / 12, high + (high - low) / 12))
        ax.set_ylabel("validation loss (nats per token)")
        ax.margins(x=0.15)
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.minorticks_off()
        named.append(points)
    handles = [plt.Line2D([], [], color=COLOURS[kind], marker=MARKERS[kind], linestyle="", label=kind) for kind in COLOURS]
    grey = dict(color="#777777", markerfacecolor="white")
    handles.append(plt.Line2D([], [], marker="o", linestyle="", label="hollow: one seed", **grey))
    handles.append(plt.Line2D([], [], linestyle=":", label=f"the loss of {budget.base}", **grey))
    figure.legend(handles=handles, loc="lower center", ncols=len(handles))
    c = next(iter(groups.values()))[0].config
    scale = "at the paper's shape, REDUCED BUDGET" if budget.preset.narrower == 1 else f"d {c['d_model']:,}, REDUCED SCALE"
    most = max(map(len, losses.values()))
    bars = f"bars: standard deviation over {most} seeds" if most > 1 else "one seed a row"
    headline(
        figure,
        f"{budget.title} {scale}: {tokens_of([r for group in groups.values() for r in group])}\n"
        f"{bars}{narrowed(experiment, c)}",
    )
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    for ax, points in zip(axes, named):
        name_points(ax, points)
    save(figure, path)


def side_by_side(places: dict[str, float]) -> dict[str, float]:
    """places: where each row stands on a logarithmic axis.  Those within 1 % of each other are moved apart, by 3 % each."""
    moved = {}
    for label, x in places.items():
        near = [other for other, y in places.items() if abs(y / x - 1) < 0.01]
        moved[label] = x * 1.03 ** (near.index(label) - (len(near) - 1) / 2)
    return moved


# Where a point's name may stand, in points from the marker, best first: beside it, above, below, then further off.
PLACES = [(7, 3), (7, -9), (-7, 3), (-7, -9), (0, 8), (0, -15), (7, 11), (-7, 11), (0, 18), (7, -18), (-7, -18), (0, -25)]


def name_points(ax: plt.Axes, points: list[tuple[float, float, str, str]]) -> None:
    """points: (x, y, name, colour).  Each name at the first place inside where it covers no marker, bar or name; axes as they will stay."""
    corners = ax.transData.transform([point[:2] for point in points])
    taken = [Bbox.from_bounds(x - 6, y - 6, 12, 12) for x, y in corners]
    taken += [line.get_window_extent().padded(2) for line in ax.lines if line.get_linestyle() == ":"]
    taken += [Bbox(ax.transData.transform(bar)).padded(3) for bars in ax.collections for bar in bars.get_segments()]
    for x, y, name, colour in sorted(points, key=lambda point: -len(point[2])):  # long ones fit in fewer places
        for place in PLACES:
            side = {1: "left", 0: "center", -1: "right"}[int(np.sign(place[0]))]
            note = ax.annotate(name, (x, y), place, textcoords="offset points", ha=side, fontsize=8, color=colour)
            box = note.get_window_extent()
            inside = ax.bbox.contains(*box.min) and ax.bbox.contains(*box.max)
            if place == PLACES[-1] or inside and not any(box.overlaps(other) for other in taken):
                break
            note.remove()
        taken.append(box)


SLOWED = "and factors (Tucker) or\nattention (others) at a quarter of the rate"


def sweep_panels(records: list[Record]) -> dict[str, list[Record]]:
    """records: all `unbroken` ones.  The sweep's runs by length of warm-up, and those whose attention learned slowly."""
    warmups = grouped(sweep_runs(records), lambda r: r.warmup)
    panels = {f"warm-up {n} of {warmups[n][0].steps:,} steps": warmups[n] for n in sorted(warmups)}
    return panels | ({f"warm-up {max(warmups)}, {SLOWED}": slowed_runs(records, "gpu-sweep")} if warmups else {})


def full_budget_panels(records: list[Record]) -> dict[str, list[Record]]:
    """records: all `unbroken` ones.  The same at Table 2's full budget, of the paper's rows that were trained at several rates."""
    by_row = grouped(full_budget_runs(records), lambda r: r.method)
    swept = [row.label for row in TABLE2 if len({r.rate for r in by_row.get(row.label, ())}) > 1]
    if not swept:
        return {}
    t = by_row[swept[0]][0].train
    runs = [r for label in swept for r in by_row[label]]
    return {f"warm-up {t['warmup_steps']} of {t['steps']:,} steps": runs, f"the same, {SLOWED}": slowed_runs(records, "gpu")}


def learning_rates(panels: dict[str, list[Record]], highest: float, path: Path) -> None:
    """Validation loss against peak learning rate, one line per row; dotted is the best of MHA.

    panels: runs by title, empty ones are left out; highest: loss at the upper edge, over the lowest of all.
    """
    panels = {title: runs for title, runs in panels.items() if runs}
    records = [r for runs in panels.values() for r in runs]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 5.4), sharex=True, sharey=True, squeeze=False)
    styles = lines_of(list(dict.fromkeys(r.method for r in records)))
    rates, losses = sorted({r.rate for r in records}), losses_of(records)
    several, best, worst = len({r.seed for r in records}) > 1, min(losses), max(losses)
    groups = [grouped(runs, lambda r: (r.method, r.rate)) for runs in panels.values()]
    of_mha = [
        statistics.mean(losses_of(group)) for settings in groups for (label, _), group in settings.items() if label == "MHA"
    ]
    for ax, title, settings in zip(axes[0], panels, groups):
        for label, style in styles.items():
            at = {rate: losses_of(settings[label, rate]) for rate in rates if (label, rate) in settings}
            rate_line(ax, at, label, style, several)
        if of_mha:
            ax.axhline(min(of_mha), color="#999999", linestyle=":", linewidth=1, zorder=1, label="the best of MHA")
        ax.set(xscale="log", ylim=((1 - (highest - 1) / 16) * best, highest * best), xlabel="peak learning rate", title=title)
        ax.set_xticks(rates, [f"{rate:g}" for rate in rates])
        ax.minorticks_off()
    axes[0, 0].set_ylabel("validation loss (nats per token)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="lower center", ncols=4)
    dots = " (dots; hollow: one)" if several else ""
    left = f"lines that leave the panel end higher, up to {worst:.1f}; " if worst > highest * best else ""
    headline(
        figure,
        f"GPT-2 at the paper's shape, REDUCED BUDGET: {tokens_of(records)}, {seeds_in_words(records)}{dots}\n"
        f"{left}a row without a point at a rate was not tried there",
    )
    figure.tight_layout(rect=(0, 0.11, 1, 1))
    save(figure, path)


def rate_line(ax: plt.Axes, losses: dict[float, list[float]], label: str, style: dict, several: bool) -> None:
    """losses: of each seed by rate.  A line through their means; where a figure has several seeds, each is a dot and one alone hollow."""
    means = {rate: statistics.mean(seeds) for rate, seeds in losses.items()}
    marker = {"marker": MARKERS[mechanism(label)], "markersize": 4.5, "linewidth": 1.3}
    ax.plot(list(means), list(means.values()), label=label, **marker, **style)
    if several:
        dots = [(rate, loss) for rate, seeds in losses.items() for loss in seeds]
        ax.plot([rate for rate, _ in dots], [loss for _, loss in dots], ".", color=style["color"], markersize=3.5, alpha=0.5)
        once = {rate: mean for rate, mean in means.items() if len(losses[rate]) == 1}
        hollow = marker | {"markerfacecolor": "white", "linestyle": ""}
        ax.plot(list(once), list(once.values()), color=style["color"], **hollow)


def breaking_down(records: list[Record], path: Path) -> None:
    """Runs of one row that are trained differently, at one rate: largest logit, loss; in the first run, what grows, part by part."""
    figure, ((logits, losses), (weights, gradients)) = plt.subplots(2, 2, figsize=(9.6, 9.6))
    changes = [beside_warmup(r) for r in records]
    colours = [change for n, change in enumerate(changes) if change not in changes[:n]]
    for r, change in zip(records, changes):
        seen, curve = r.metrics["observations"], r.metrics["curve"]
        colour = plt.get_cmap("tab10")(colours.index(change))
        style = {"color": colour, "linestyle": "-" if change == recipe_of(r) else "--", "linewidth": 1.5}
        logits.plot([o["step"] for o in seen], [o["largest_logit"] for o in seen], **style)
        label = f"{change_of(r)}: {r.metrics['validation_loss']:.3f}"
        losses.plot(*zip(*[point[:2] for point in curve]), label=label, **style)
    logits.set(yscale="log", ylabel="largest |logit| of all layers, heads, tokens", title="attention logits")
    losses.set(ylabel="nats per token", title="training loss", ylim=(4.2, 7.8))
    first, name = records[0].metrics["observations"], change_of(records[0])
    for part, colour in zip(("core", "head", "query", "key", "output", "value"), plt.get_cmap("Dark2").colors):
        for side, line in (("pre", "-"), ("post", "--")):
            if (part_of := f"{side}.{part}") in first[0]["weights"]:
                style = {"color": colour, "linestyle": line, "linewidth": 1.5, "label": part_of}
                steps, start = [o["step"] for o in first], first[0]["weights"][part_of]
                weights.plot(steps, [o["weights"][part_of] / start for o in first], **style)
                gradients.plot(steps, [o["gradients"][part_of] for o in first], **style)
    weights.set(ylabel="Frobenius norm over that at the start", title=f"{name}: cores and factors")
    gradients.set(yscale="log", ylabel="Frobenius norm, all layers", title=f"{name}: their gradients")
    for ax in (logits, losses, weights, gradients):
        ax.set(xlabel="step")
    figure.tight_layout(rect=(0, 0.19, 1, 1))
    both = dict(loc="upper left", fontsize=8, alignment="left")
    figure.legend(
        *losses.get_legend_handles_labels(), title="above, with the final validation loss", bbox_to_anchor=(0.01, 0.19), **both
    )
    figure.legend(*gradients.get_legend_handles_labels(), title="below", bbox_to_anchor=(0.6, 0.19), ncols=2, **both)
    rate, tokens = records[0].rate, tokens_of(records)
    headline(
        figure,
        f"How {row_label(records[0])} breaks down at the rate {rate:g}, and what prevents it\n"
        f"GPT-2's shape, REDUCED BUDGET: {tokens}, {seeds_in_words(records)}; changes of the training that did not diverge",
        y=1.035,
    )
    save(figure, path)


def beside_warmup(record: Record) -> dict:
    """What was changed in how a row is trained beside the length of its warm-up; if that alone was, that."""
    recipe = recipe_of(record)
    return {name: value for name, value in recipe.items() if name != "warmup"} or recipe


def singular_values(records: list[Record], path: Path) -> None:
    """Singular values of all six unfoldings, over the largest; one line per row and layer, down to the rounding floor.

    The head mode, whose few values decay little, has a linear axis of its own.
    """
    figure, axes = plt.subplots(2, 3, figsize=(10.4, 6.6))
    runs = {r.method: r for r in records}
    labels = {row.mechanism: row.label for row in reversed(TABLE2)}.values()  # each mechanism's first row, MHA on top
    chosen = [runs[label] for label in labels if label in runs]
    for line, (side, name) in zip(axes, (("pre", "before the softmax: $W$"), ("post", "after it: $\\tilde W$"))):
        for ax, mode in zip(line, chosen[0].metrics["trained"][0][side]):
            for r in chosen:
                for n, layer in enumerate(r.metrics["trained"]):
                    values = np.array(layer[side][mode]["values"])
                    shown = values > layer[side][mode]["floor"]
                    label = r.method if n == 0 else None
                    marker = MARKERS[mechanism(r.method)] if mode == "head" else None
                    ax.plot(
                        1 + np.flatnonzero(shown), values[shown], color=COLOURS[mechanism(r.method)], label=label,
                        alpha=0.8, linewidth=1.0, marker=marker, markersize=3,
                    )  # fmt: skip
            ax.set(xlabel="index", **({"ylim": (0, 1.05)} if mode == "head" else {"yscale": "log", "ylim": (1e-4, 1.5)}))
            ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            ax.set_title(f"{mode} mode, {name}")
        line[0].set_ylabel("singular value over the largest")
    axes[0, 2].legend()
    c = records[0].config
    headline(
        figure,
        f"Spectra of trained layers {scale_of(c)}: d {c['d_model']}, {c['n_heads']} heads, {c['n_layers']} layers (a line each),\n"
        f"{c['train']['steps']:,} steps, one model of a row{narrowed('table2', c)}",
    )
    figure.tight_layout()
    save(figure, path)


def compression(records: list[Record], path: Path) -> None:
    """Error of logits and of outputs, and loss, against attention parameters, for trained layers that were only compressed."""
    groups = by_model(records)
    figure, axes = plt.subplots(len(groups), 3, figsize=(12.6, 3.9 * len(groups)), squeeze=False)
    panels = (
        ("relative error of logits", lambda errors: errors["inputs"][0]),
        ("relative error of outputs", lambda errors: errors["inputs"][1]),
        ("loss (nats per token)", lambda errors: errors["loss"]),
    )
    drawn = {"aware": ("-", "knowing the inputs"), "plain": ("--", "for the weights alone"), "mean": (":", "mean-pooled")}
    for line, group in zip(axes, groups):
        for ax, (title, value) in zip(line, panels):
            for kind in dict.fromkeys(family(r.method) for r in group):
                for way, (dashes, _) in drawn.items():
                    points = sorted(
                        (r.attention_parameters, value(r.metrics["ways"][way]))
                        for r in group
                        if family(r.method) == kind and way in r.metrics["ways"]
                    )
                    if points:
                        colour, marker = COLOURS[mechanism(kind)], MARKERS[mechanism(kind)]
                        fill = "white" if "shared" in kind else colour
                        label = kind if way == "aware" else None
                        ax.plot(
                            *zip(*points),
                            color=colour,
                            linestyle=dashes,
                            marker=marker,
                            markerfacecolor=fill,
                            markersize=5,
                            label=label,
                        )
            before = group[0].metrics["before"]
            ax.axvline(before["attention_parameters"], color="#999999", linewidth=1, zorder=1)
            if "loss" in title:
                ax.axhline(before["loss"], color="#999999", linewidth=1, zorder=1)
                others = [value(errors) for r in group for way, errors in r.metrics["ways"].items() if way != "mean"]
                room = (max(others) - before["loss"]) / 12  # mean-pooled rows leave the panel
                ax.set_ylim(before["loss"] - room, max(others) + room)
            ax.set(xscale="log", xlabel="attention parameters", ylabel=title)
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1000:g}k"))
            ax.minorticks_off()
        c = group[0].config
        line[0].set_title(f"{c['model']}: d {c['d_model']}, {c['n_heads']} heads" + (", rotary" if c["rotary"] else ""))
    handles = [plt.Line2D([], [], color="#555555", linestyle=dashes) for dashes, _ in drawn.values()]
    axes[0, 0].legend()
    axes[0, 1].legend(handles, [name for _, name in drawn.values()])
    headline(
        figure,
        "Trained layers at REDUCED SCALE, compressed and not trained further; grey: the layers before, on the same part of the text.\n"
        "Where mean-pooled heads leave a panel of losses, they end above it",
    )
    figure.tight_layout()
    save(figure, path)


def compression_cost(records: list[Record], path: Path) -> None:
    """Seconds and peak memory of the HOSVD of one layer, from its factors and from its tensors, against the width."""
    sizes = records[0].metrics["sizes"]
    widths = [size["d_model"] for size in sizes]
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.8))
    for ax, (what, title) in zip(axes, (("seconds", "seconds"), ("megabytes", "peak memory in MB"))):
        for way, label, colour, marker in (
            ("tensors", "tensors formed, TensorLy", COLOURS["MHA"], "s"),
            ("factors", "from the factors, compress()", COLOURS["Tucker"], "D"),
        ):
            ax.plot(widths, [size[way][what] for size in sizes], color=colour, marker=marker, markersize=5, label=label)
        ax.set(xscale="log", yscale="log", xlabel="model width d, with d / 64 heads", ylabel=title)
        ax.set_xticks(widths, [f"{w:,}" for w in widths])
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        ax.minorticks_off()
    axes[0].legend()
    headline(figure, f"Truncated HOSVD of one multi-head layer: {records[0].device}")
    figure.tight_layout()
    save(figure, path)


def family(label: str) -> str:
    """The rows that make one line: "MLA shared" for "MLA shared d_c=128"."""
    return " ".join(word for word in label.split() if word in ("MLA", "shared", "separated")) or mechanism(label)


def decoding(records: list[Record], path: Path) -> None:
    """Cache bytes per token, and time of one decoding step against the context."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.4, 4.0), width_ratios=(1, 1.25))
    rows = records[::-1]
    sizes = [r.metrics["cache_bytes_per_token"] for r in rows]
    bars = left.barh([r.method for r in rows], sizes, color=[COLOURS[mechanism(r.method)] for r in rows])
    left.bar_label(bars, [f"{size:,}" for size in sizes], padding=3, fontsize=8.5)
    left.set(xlim=(0, 1.2 * max(sizes)), xlabel="cache bytes per token, one layer, float32")
    left.grid(axis="y", visible=False)
    left.set_title("What is kept")
    styles = lines_of([r.method for r in records])
    for r in records:
        contexts, times = zip(*((int(c), t) for c, t in r.metrics["milliseconds"].items()))
        right.plot(contexts, times, marker=MARKERS[mechanism(r.method)], markersize=4, label=r.method, **styles[r.method])
    right.set(xscale="log", yscale="log", xlabel="cached tokens", ylabel="milliseconds for one more token")
    right.set_xticks(contexts, [f"{c / 1024:g}k" for c in contexts])
    right.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    right.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    right.minorticks_off()
    right.set_title("What it costs")
    right.legend(fontsize=8)
    headline(figure, f"Decoding with one layer of GPT-2's shape, float32: {records[0].device}; medians on a shared machine")
    figure.tight_layout()
    save(figure, path)


def accuracy_against_parameters(records: list[Record], path: Path) -> None:
    """Figure 3: accuracy against attention parameters, converted only and fine-tuned; a line per mechanism and head rank.

    Bars: standard deviation over seeds, each of which pretrains its own model; cut off at 100 %.
    """
    start = [r for r in records if not r.is_trained]
    tuned = by_row([r for r in records if r.is_trained])
    figure, axes = plt.subplots(1, 3, figsize=(12.6, 4.3))
    panels = (
        ("top-1, converted only", lambda m: m["converted"]["top1"]),
        ("top-1, fine-tuned", lambda m: m["top1"]),
        ("top-5, fine-tuned", lambda m: m["top5"]),
    )
    for ax, (title, value) in zip(axes, panels):
        points: dict[str, list] = {}
        for label, group in tuned.items():
            values = [100 * value(r.metrics) for r in group]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            ranks = group[0].config["row"]["ranks"]
            line = f"Tucker, head rank {ranks[0]}" if ranks else mechanism(label)
            points.setdefault(line, []).append((group[0].attention_parameters, statistics.mean(values), spread))
        order = sorted(
            points, key=lambda line: (line != "MHA", "Tucker" in line, -int(line.split()[-1]) if "Tucker" in line else 0)
        )
        styles = lines_of(order)
        for line in order:
            x, y, spread = (np.array(values) for values in zip(*sorted(points[line])))
            ax.errorbar(
                x, y, yerr=(spread, np.minimum(spread, 100 - y)), label=line, marker=MARKERS[mechanism(line)], markersize=5,
                markerfacecolor="white" if line == "MHA" else None, capsize=2.5, linewidth=1.1, zorder=3 if line == "MHA" else 2,
                **styles[line],
            )  # fmt: skip
        if start:
            metric = "top5" if "top-5" in title else "top1"
            before = statistics.mean(100 * r.metrics[metric] for r in start)
            ax.axhline(before, color=COLOURS["MHA"], linewidth=1, linestyle=":", label="MHA as pretrained")
        ax.set(xscale="log", xlabel="attention parameters")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1e6:g}M" if x >= 1e6 else f"{x / 1000:g}k"))
        ax.minorticks_off()
        ax.set_title(title)
    axes[0].set_ylabel("accuracy in %")
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="lower center", ncols=len(names))
    example, n_seeds = next(iter(tuned.values()))[0], max(map(len, tuned.values()))
    c = example.config
    headline(
        figure,
        f"Figure 3 at REDUCED SCALE: ViT d {c['d_model']} pretrained with MHA on {records[0].data['name']}, converted,\n"
        f"fine-tuned for {epochs_of(example)}; bars: standard deviation over {n_seeds} seeds",
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    save(figure, path)


def time_against_context(records: list[Record], path: Path) -> None:
    """A layer's forward and backward time per million tokens against the length of the context, by row and backend."""
    (record,) = [r for r in records if r.method == "contexts"]
    rows = [r for r in record.metrics["rows"] if "milliseconds" in r]
    styles = lines_of(list(dict.fromkeys(r["row"] for r in rows)))
    figure, ax = plt.subplots(figsize=(7.2, 4.4))
    for label, backend in dict.fromkeys((r["row"], r["backend"]) for r in rows):
        timed = [r for r in rows if (r["row"], r["backend"]) == (label, backend)]
        ours = backend == KERNEL
        ax.plot(
            [r["tokens"] for r in timed],
            [1e6 * r["milliseconds"] / r["batch"] / r["tokens"] for r in timed],
            label=f"{label}, {'our kernel' if ours else backend}",
            marker=MARKERS[mechanism(label)],
            markerfacecolor="white" if ours else None,
            markersize=5,
            **styles[label],
        )
    contexts = sorted({r["tokens"] for r in rows})
    ax.set(xscale="log", yscale="log", xlabel="context length in tokens", ylabel="ms per million tokens, forward and backward")
    ax.set_xticks(contexts, [f"{n / 1024:g}k" for n in contexts])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.minorticks_off()
    ax.legend()
    ax.set_title(f"One attention layer of LLaMA3-1B's shape: {record.device}, {record.config['dtype']}")
    save(figure, path)


def roofline(records: list[Record], path: Path) -> None:
    """Operations per second against operations per byte, under the measured limits: layers in training, and decoding."""
    sections = {r.method: r.metrics["rows"] for r in records}
    limits = {name: value for row in sections["limits"] for name, value in row.items() if name != "what"}
    copy, matmul = limits["gigabytes_per_second"] / 1e3, limits["teraflops"]  # both in 10^12 a second
    figure, ax = plt.subplots(figsize=(7.6, 4.8))
    intensity = np.geomspace(0.5, 1e4, 200)
    ax.plot(intensity, np.minimum(copy * intensity, matmul), color="#888888", linewidth=1.4)
    note = dict(textcoords="offset points", color="#666666", fontsize=9)
    ax.annotate(f"a copy, measured: {copy:.2f} TB/s\n(decoding mostly reads)", (4, 4 * copy), (9, -16), **note)
    ax.annotate(f"a matrix product, measured: {matmul:.0f} TFLOP/s", (1e4, matmul), (0, 5), ha="right", **note)
    for section, seconds in (("layers", "milliseconds"), ("decode", "microseconds")):
        best: dict[tuple, dict] = {}
        for r in sections.get(section, []):
            key = (r["shape"], r["row"]) if section == "layers" else (r["context"], r["batch"], r["side"])
            if seconds in r and (key not in best or r[seconds] < best[key][seconds]):
                best[key] = r
        for r in best.values():
            kind = mechanism(r["row"]) if section == "layers" else ("MHA" if r["side"] == "MHA" else "Tucker")
            rate = r["flops"] / r[seconds] / (1e9 if section == "layers" else 1e6)
            face = "white" if section == "decode" else None
            ax.plot(r["flops"] / r["bytes"], rate, MARKERS[kind], color=COLOURS[kind], markerfacecolor=face, markersize=6)
    for kind in MARKERS:
        ax.plot([], [], MARKERS[kind], color=COLOURS[kind], label=kind)
    ax.plot([], [], "o", color="#888888", label="filled: a layer, forward and backward")
    ax.plot([], [], "o", color="#888888", markerfacecolor="white", label="hollow: decoding one token")
    ax.set(xscale="log", yscale="log", ylim=(None, 2 * matmul))
    ax.set(xlabel="operations per byte that must move", ylabel="10¹² operations a second")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    ax.minorticks_off()
    ax.legend(loc="upper left")
    ax.set_title(f"Roofline: {records[0].device}, {records[0].config['dtype']}, best backend of each")
    save(figure, path)


def headline(figure, text: str, **place) -> None:
    """The title of a whole figure, as bold and as far left as those of its panels."""
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, fontweight="bold", **place)


def save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})  # the same records give the same bytes
    plt.close(figure)
