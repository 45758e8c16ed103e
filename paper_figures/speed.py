"""Time and memory traffic of layers: against the context, while decoding, and under the limits of a GPU."""

from pathlib import Path

import numpy as np

from reproduce.report.targets import KERNEL
from reproduce.report.targets import decoding as fastest
from reproduce.store.records import Record

from .labels import name_ends, name_points
from .style import COLOURS, GREY, INKS, MARKERS, SMALL, describe, lines_of, logarithmic, mechanism, panels, save
from .wording import short

BACKENDS = {"cudnn": "cuDNN"}  # as they call themselves


def decoding(records: list[Record], path: Path) -> None:
    """Cache bytes per token, and time of one decoding step against the context."""
    figure, (left, right) = panels(1, 2, 3.9, width_ratios=(1, 1.3))
    rows = records[::-1]
    sizes = [r.metrics["cache_bytes_per_token"] for r in rows]
    title = "Decoding one more token: what is kept, and how long it takes"
    caption = (
        f"One layer of GPT-2's shape, float32, {records[0].device} of a shared machine; medians of {records[0].config['repeats']}, "
        "the rows in turns."
    )
    describe(figure, title, caption)
    bars = left.barh([r.method for r in rows], sizes, color=[COLOURS[mechanism(r.method)] for r in rows])
    left.bar_label(bars, [f"{size:,}" for size in sizes], padding=3, fontsize=SMALL)
    left.set(xlim=(0, 1.3 * max(sizes)), title="Cache bytes per token")
    left.xaxis.set_major_formatter("{x:,.0f}")
    left.grid(axis="y", visible=False)
    left.tick_params(axis="y", length=0)
    styles, ends = lines_of([r.method for r in records]), []
    for r in records:
        contexts, times = zip(*((int(c), t) for c, t in r.metrics["milliseconds"].items()))
        right.plot(contexts, times, marker=MARKERS[mechanism(r.method)], markersize=4, **styles[r.method])
        ends.append((contexts[-1], times[-1], r.method, INKS[mechanism(r.method)]))
    right.set(xscale="log", yscale="log", xlabel="cached tokens", title="Milliseconds")
    right.set_xticks(contexts, [f"{c / 1024:g}k" for c in contexts])
    logarithmic(right.yaxis)
    right.xaxis.minorticks_off()
    name_ends(right, ends)
    save(figure, path, title, caption)


def decoding_on_gpu(records: list[Record], path: Path) -> None:
    """Time to attend to a cache with one more token, beside multi-head attention's, and beside a copy of as many bytes.

    Args:
        records: the sections `limits` and `decode` of one run of speed.
        path: of the file.
    """
    sections = {r.method: r.metrics["rows"] for r in records}
    (copy,) = [row["gigabytes_per_second"] for row in sections["limits"] if "gigabytes_per_second" in row]
    timed = comparable(sections["decode"])
    sides = sorted(dict.fromkeys(r["side"] for r in timed), key=lambda side: side != "MHA")  # it stands first
    cases = sorted(dict.fromkeys((r["context"], r["batch"]) for r in timed))
    figure, axes = panels(len(cases), 1, 1.3 + 0.3 * len(cases) * (len(sides) + 1), sharex=True, squeeze=False)
    gains = []
    for ax, (context, batch) in zip(axes[:, 0], cases):
        base = fastest(sections, "MHA", context, batch)
        for y, side in enumerate(sides):
            kind = "MHA" if side == "MHA" else "Tucker"
            runs = [r for r in timed if (r["context"], r["batch"], r["side"]) == (context, batch, side)]
            if not (best := fastest(sections, side, context, batch)):  # not timed in this case
                continue
            ax.plot(1e3 * best["cache_megabytes"] / copy, y, "|", color=GREY, markersize=13, markeredgewidth=1.4)
            for ours, look in ((False, {"markersize": 6}), (True, {"markersize": 8.5, "markerfacecolor": "none"})):
                if times := [r["microseconds"] for r in runs if (r["backend"] == KERNEL) == ours]:
                    ax.plot(min(times), y, MARKERS[kind], color=COLOURS[kind], **look)
            words = f"{best['microseconds']:,.0f} µs"
            if side != "MHA" and base:
                gains.append(base["microseconds"] / best["microseconds"])
                words += f": {gains[-1]:.1f} times as fast"
            ax.annotate(words, (1.02, y), xycoords=("axes fraction", "data"), va="center", fontsize=SMALL, color=INKS[kind])
        ax.set(
            xscale="log", ylim=(len(sides) - 0.5, -0.5), title=f"{context:,} cached tokens, {batch} sequence{'s' * (batch > 1)}"
        )
        ax.set_yticks(range(len(sides)), sides)
        ax.tick_params(axis="y", length=0)
        logarithmic(ax.xaxis)
    axes[-1, 0].set_xlabel("microseconds")
    c = records[0].config
    beside = f": {min(gains):.2g} to {max(gains):.2g} times as fast from latents as from MHA's cache" if gains else ""
    save(
        figure, path,
        f"Decoding on {records[0].device}{beside}",
        f"One token more for one layer {shape_of(records[0])}, without its projections: {c['dtype']}, medians of "
        f"{c['repeats']}. Filled: the best of PyTorch's backends; hollow: our kernel; stroke: as many bytes at the copy's rate. "
        "Numbers: the best of all.",
    )  # fmt: skip


def time_against_context(record: Record, path: Path) -> None:
    """A layer's forward and backward time per million tokens against the length of the context, by row and backend.

    Args:
        record: the section `contexts` of speed.
        path: of the file.
    """
    rows = [r for r in record.metrics["rows"] if "milliseconds" in r]
    styles = lines_of(list(dict.fromkeys(r["row"] for r in rows)))
    title = f"One attention layer {shape_of(record)}: forward and backward, per million tokens"
    caption = (
        f"{record.device}, {record.config['dtype']}, medians of {record.config['repeats']}; as many tokens at every context."
    )
    figure, ax = panels(1, 1, 4.2)
    describe(figure, title, caption)
    ends = []
    for label, backend in dict.fromkeys((r["row"], r["backend"]) for r in rows):
        timed = [r for r in rows if (r["row"], r["backend"]) == (label, backend)]
        x, y = [r["tokens"] for r in timed], [1e6 * r["milliseconds"] / r["batch"] / r["tokens"] for r in timed]
        ours, kind = backend == KERNEL, mechanism(label)
        face = "white" if ours else COLOURS[kind]
        ax.plot(x, y, marker=MARKERS[kind], markerfacecolor=face, markersize=5, **styles[label])
        ends.append((x[-1], y[-1], f"{label},\n{'our kernel' if ours else BACKENDS.get(backend, backend)}", INKS[kind]))
    contexts = sorted({r["tokens"] for r in rows})
    ax.set(xscale="log", yscale="log", xlabel="context in tokens", ylabel="milliseconds")
    ax.set_xticks(contexts, [f"{n / 1024:g}k" for n in contexts])
    logarithmic(ax.yaxis)
    ax.minorticks_off()
    name_ends(ax, ends)
    save(figure, path, title, caption)


def roofline(records: list[Record], path: Path) -> None:
    """Operations per second against operations per byte, under the measured limits: decoding, and layers in training.

    Args:
        records: the sections `limits`, `layers` and `decode` of one run of speed.
        path: of the file.
    """
    sections = {r.method: r.metrics["rows"] for r in records}
    limits = {name: value for row in sections["limits"] for name, value in row.items() if name != "what"}
    copy, matmul = limits["gigabytes_per_second"] / 1e3, limits["teraflops"]  # both in 10^12 a second
    figure, (left, right) = panels(1, 2, 4.8)
    title = "Roofline: operations a second against operations per byte, under the measured limits"
    smaller, larger = (sections["layers"][n]["shape"] for n in (0, -1))
    caption = (
        f"{records[0].device}, {records[0].config['dtype']}, best backend of each. Lines: the measured limits, a copy at "
        f"{copy:.2f} TB/s and a matrix product at {matmul:.0f} TFLOP/s. Left: cached tokens × sequences, one token more; 128/128 and "
        f"64/64 are latents of keys/values. Right: forward and backward of one layer of {larger}'s shape (filled) and of {smaller}'s "
        "(hollow)."
    )
    describe(figure, title, caption)
    decoded, layers = decode_points(comparable(sections["decode"])), layer_points(sections["layers"])
    for ax, points, wider in ((left, decoded, 1000), (right, layers, 4)):
        for x, y, _, kind, face in points:
            ax.plot(x, y, MARKERS[kind], color=COLOURS[kind], markerfacecolor=face, markersize=5.5)
        reach = np.geomspace(min(p[0] for p in points) / 2, max(p[0] for p in points) * wider, 400)
        ax.plot(reach, np.minimum(copy * reach, matmul), color=GREY, linewidth=1.4, zorder=1)
        ax.set(xscale="log", yscale="log", xlabel="operations per byte that must move")
        logarithmic(ax.yaxis, (1, 2, 3, 5))
    logarithmic(left.xaxis, (1,))
    logarithmic(right.xaxis)
    left.set(ylabel="10¹² operations a second", title="Decoding one token")
    right.set(title="Training a layer")
    figure.draw_without_rendering()
    for ax, points in ((left, decoded), (right, layers)):
        name_points(ax, [(x, y, name, INKS[kind]) for x, y, name, kind, _ in points])
    save(figure, path, title, caption)


def shape_of(record: Record) -> str:
    """Of the layers that speed times, but for those of the section `layers`, which name theirs."""
    return "of LLaMA3-1B's shape" if record.preset == "gpu" else "at REDUCED SCALE"


def comparable(rows: list[dict]) -> list[dict]:
    """What was timed after as many tokens of as many sequences, of multi-head attention and of latents.

    Args:
        rows: of the section `decode`.
    """
    timed = [r for r in rows if "microseconds" in r and (r["side"] == "MHA" or r["side"].startswith("latents"))]
    sides: dict[tuple[int, int], set[str]] = {}
    for r in timed:
        sides.setdefault((r["context"], r["batch"]), set()).add(r["side"])
    return [r for r in timed if sides[r["context"], r["batch"]] >= {other["side"] for other in timed}]


def decode_points(rows: list[dict]) -> list[tuple[float, float, str, str, str]]:
    """(operations per byte, 10^12 operations a second, name, mechanism, face) of each case of decoding, best backend.

    Cases of one side that are within 5 % of each other are one point.
    """
    points: list[tuple[float, float, str, str, str]] = []
    for r in sorted(best_of(rows, ("side", "context", "batch"), "microseconds"), key=lambda r: r["flops"] / r["microseconds"]):
        kind, case = "MHA" if r["side"] == "MHA" else "Tucker", f"{r['context'] / 1024:g}k × {r['batch']}"
        x, y, side = r["flops"] / r["bytes"], r["flops"] / r["microseconds"] / 1e6, r["side"].removeprefix("latents ")
        known = next((p for p in points if p[2].split(":")[0] == side and abs(p[1] / y - 1) < 0.05), None)
        if known:
            points.remove(known)
            x, y, case = known[0], known[1], f"{known[2].split(': ')[1]}, {case}"
        points.append((x, y, f"{side}: {case}", kind, COLOURS[kind]))
    return points


def layer_points(rows: list[dict]) -> list[tuple[float, float, str, str, str]]:
    """The same of each layer's training: filled for the shape that comes last, the larger one."""
    best = best_of(rows, ("shape", "row"), "milliseconds")
    points = []
    for r in best:
        kind = mechanism(r["row"])
        face = COLOURS[kind] if r["shape"] == best[-1]["shape"] else "white"
        points.append((r["flops"] / r["bytes"], r["flops"] / r["milliseconds"] / 1e9, short(r["row"]), kind, face))
    return points


def best_of(rows: list[dict], names: tuple[str, ...], time: str) -> list[dict]:
    """The fastest row of each case.

    Args:
        rows: of a section of speed.
        names: of what tells cases apart.
        time: of what counts.
    """
    best: dict[tuple, dict] = {}
    for r in rows:
        key = tuple(r[name] for name in names)
        if time in r and (key not in best or r[time] < best[key][time]):
            best[key] = r
    return list(best.values())
