"""Speed on a GPU: in short, layer by layer, one token at a time, whole models, and every target with its verdict, of one speed run.

Targets of what a CPU does stand in the same table, from the records of other experiments.
"""

from collections.abc import Sequence

from ..store.records import Record
from .markdown import Table, markdown
from .powers import COSTS, fitted_power, in_words, points_of
from .query import by_device, runs_of
from .since import measured, of_older_code
from .targets import HOW_SET, TARGETS, Sections, decoding, layer

TITLES = {
    "layers": "**One attention layer, forward and backward, as a CUDA graph: milliseconds by backend.**",
    "contexts": "**One attention layer of LLaMA3-1B's shape by context, forward and backward: milliseconds, and the ratio to MHA's.**",
    "memory": "**A stack of layers of LLaMA3-1B's shape, forward and backward, compiled: what it keeps in between, and its peak.**",
    "decode": "**One new token against its cache, as a CUDA graph: microseconds by backend.**",
    "models": "**One training step of a whole model, AdamW, bf16 autocast, compiled block by block.**",
    "curves": "**One layer against its sizes: values at both ends, and the exponent of the power law that fits best.**",
    "step": "**The same at the largest batch that fits into 80 GB, each batch tried.**",
}
NOTES = {
    "layers": "Medians, the L2 cache full of other lines before each call. —: our kernel was timed for Tucker Attention's latents alone.",
    "contexts": "The batch shrinks as the context grows, so that every line has as many tokens.",
    "decode": "Medians, the L2 cache full of other lines before each call, and before a copy of as many bytes. In a row: one graph "
    "calls the kernel on many caches, as the layers of a model do, which spares it most of the time of starting.",
    "memory": "In brackets the ratio to the first line of the same row, which keeps all, in the same run.",
    "curves": "Exponents of d, n_H and N, fitted to logarithms, one size varied at a time from LLaMA3-1B's layer. Parameters and the "
    "cache of one sequence are counted. Decoding is the kernel's time on full caches.",
    "step": "In brackets the ratio to multi-head attention that keeps all.",
    "models": "MFU is the share of the rate at which matrix products ran in the same process.",
}


def speed_tables(records: list[Record], on_a_cpu: Sequence[Record] = ()) -> list[Table]:
    """What a reader wants to know first, then each section, then the targets.

    Args:
        records: one per section of `reproduce speed`, all of one run.
        on_a_cpu: of other experiments, for the targets alone: `compress_speed` and `coverage`.
    """
    sections = {r.method: r.metrics["rows"] for r in records}
    aims = sections | {r.experiment: r.metrics.get("sizes", [{"minutes": r.wall_seconds / 60}]) for r in on_a_cpu}
    drawn = {
        "layers": layer_table,
        "contexts": context_table,
        "memory": memory_table,
        "decode": decode_table,
        "models": model_table,
        "step": step_table,
        "curves": curve_table,
    }
    tables = [short_table(records, sections), targets_table([*records, *on_a_cpu], aims)]
    for name, draw in drawn.items():
        if sections.get(name):
            runs = [r for r in records if r.method == name]
            tables.append(
                Table(f"Speed, {name}", TITLES[name], draw(sections[name]), runs, f"{NOTES[name]} {measured(runs[-1])}")
            )
    return [table for table in tables if table]


def gpu_tables(records: list[Record]) -> list[Table]:
    """The same of every GPU, with the targets of a CPU.

    Args:
        records: all that there are.
    """
    beside = (("compress_speed", "paper"), ("coverage", "tests"))
    on_a_cpu = [run for experiment, preset in beside for run in runs_of(records, experiment, preset)[-1:]]
    return [table for own in by_device(runs_of(records, "speed", "gpu")) for table in speed_tables(own, on_a_cpu)]


def short_table(records: list[Record], sections: Sections) -> Table | None:
    """Three layers and one case of decoding, ours beside multi-head attention's; None where none of them was measured."""
    lines = []
    for shape, row in (("GPT-2", "Tucker [8,128,128]"), ("LLaMA", "Tucker [32,64,64]"), ("LLaMA", "Tucker [32,128,128]")):
        ours, mha = (layer(sections, shape, label, "milliseconds") for label in (row, "MHA"))
        if ours and mha:
            ranks = row.removeprefix("Tucker ")
            lines.append(
                [f"a {shape} layer {ranks}, forward and backward", f"{ours:.2f} ms", f"{mha:.2f} ms", f"{ours / mha:.2f}"]
            )
    context, batch = 16384, 64
    ours, mha = (decoding(sections, side, context, batch) for side in ("latents 128/128", "MHA"))
    if ours and mha:
        what = f"one token of {batch} sequences at context {context:,}, latents of width 128"
        times = [r["microseconds"] for r in (ours, mha)]
        lines.append([what, *(f"{t:,.0f} µs" for t in times), f"{times[0] / times[1]:.2f}"])
    if not lines:
        return None
    older = (
        " Layers: [older code](docs/speed.md#one-layer)." if of_older_code(r for r in records if r.method == "layers") else ""
    )
    title = f"**The best kernel of each side, one {records[0].device}.**{_limits(sections)}{older}"
    return Table("Speed, in short", title, markdown(["what", "Tucker Attention", "MHA", "ratio"], lines), records)


def _limits(sections: Sections) -> str:
    limits = {name: value for row in sections.get("limits", []) for name, value in row.items() if name != "what"}
    if not limits:
        return ""
    return (
        f" It copies at {limits['gigabytes_per_second']:,.0f} GB/s and makes matrix products at "
        f"{limits['teraflops']:,.0f} TFLOP/s."
    )


def targets_table(records: list[Record], sections: Sections) -> Table | None:
    """What should have been reached, what was, and why where it was not; None where nothing was measured."""
    judged = [(t, *verdict) for t in TARGETS if (verdict := t.verdict(sections))]
    if not judged:
        return None
    rows = [
        [t.what, measured, f"{'≥' if t.least else '≤'} {t.bound:g}", said.partition(": ")[0]] for t, measured, said in judged
    ]
    met = sum(said == "met" for *_, said in judged)
    reasons = dict.fromkeys(reason for *_, said in judged if (reason := said.partition(": ")[2]))
    why = "\n".join(f"- {reason}." for reason in reasons)
    older = [r.method for r in records if r.method in ("layers", "memory") and of_older_code([r])]
    note = f"{met} of {len(judged)} are met." + (f" Of older code, as their tables say: {', '.join(older)}." if older else "")
    note += f" What the missed ones hang on, as far as profiling showed:\n\n{why}" if why else ""
    return Table(
        "Speed, targets", f"**Targets.** {HOW_SET}", markdown(["target", "measured", "bound", "verdict"], rows), records, note
    )


def layer_table(rows: list[dict]) -> str:
    """One line per shape and row, one column per backend, the best against MHA's best.

    Args:
        rows: of the section "layers".
    """
    backends = list(dict.fromkeys(r["backend"] for r in rows))
    kinds = list(dict.fromkeys((r["shape"], r["row"]) for r in rows))
    sections = {"layers": rows}
    lines = []
    for shape, label in kinds:
        timed = {r["backend"]: r for r in rows if (r["shape"], r["row"]) == (shape, label)}
        best, mha = layer(sections, shape, label, "milliseconds"), layer(sections, shape, "MHA", "milliseconds")
        stock, ours = (layer(sections, shape, label, "megabytes", kernel) for kernel in (False, True))
        lines.append(
            [
                f"{shape} {label}",
                *(_cell(timed.get(backend), "milliseconds", ".2f") for backend in backends),
                f"{best / mha:.2f}" if best and mha else "",
                f"{stock:,.0f}" if stock else "",
                f"{ours:,.0f}" if ours else "—",
                _ours_over_stock(sections, shape, label),
            ]
        )
    header = ["layer", *(f"ms, {b}" for b in backends), "best over MHA", "peak MB, PyTorch's kernels", "peak MB, ours"]
    return markdown([*header, "ours over PyTorch's: time, memory"], lines)


def _ours_over_stock(sections: Sections, shape: str, label: str) -> str:
    sides = [
        [layer(sections, shape, label, what, kernel) for kernel in (True, False)] for what in ("milliseconds", "megabytes")
    ]
    ratios = [f"{ours / stock:.2f}" for ours, stock in sides if ours and stock]
    return ", ".join(ratios) or "—"


def context_table(rows: list[dict]) -> str:
    """One line per context, one column per row and backend."""
    kinds = list(dict.fromkeys((r["row"], r["backend"]) for r in rows))
    lines = []
    for tokens, batch in dict.fromkeys((r["tokens"], r["batch"]) for r in rows):
        timed = {(r["row"], r["backend"]): r for r in rows if (r["tokens"], r["batch"]) == (tokens, batch)}
        mha = min((r["milliseconds"] for (row, _), r in timed.items() if row == "MHA" and "milliseconds" in r), default=None)
        cells = [_cell(timed.get(kind), "milliseconds", ".2f") for kind in kinds]
        ratios = [
            f" ({timed[kind]['milliseconds'] / mha:.2f})" if mha and cell[0].isdigit() else ""
            for kind, cell in zip(kinds, cells)
        ]
        lines.append([f"{tokens:,} x {batch}", *(cell + ratio for cell, ratio in zip(cells, ratios))])
    return markdown(["context x batch", *(f"{row}, {backend}" for row, backend in kinds)], lines)


def memory_table(rows: list[dict]) -> str:
    """One line per row, backend and way: milliseconds, kept and peak megabytes, each against the first line of that row.

    Args:
        rows: of the section "memory".
    """
    lines = []
    for r in rows:
        plain = next(other for other in rows if other["row"] == r["row"])
        cells = [_against(r, plain, what, form) for what, form in (("milliseconds", ".1f"), *MEGABYTES)]
        lines.append([f"{r['layers']} x {r['row']}", r["backend"], r["way"], *cells])
    return markdown(["layers", "backend", "way", "ms", "kept MB", "peak MB"], lines)


MEGABYTES = (("kept_megabytes", ",.0f"), ("megabytes", ",.0f"))


def step_table(rows: list[dict]) -> str:
    """One line per row and way: the largest batch, and tokens a second against the first line.

    Args:
        rows: of the section "step".
    """
    columns = (("batch", "d"), ("milliseconds", ",.0f"), ("tokens_per_second", ",.0f"), ("megabytes", ",.0f"))
    lines = [
        [f"{r['model']} {r['row']}", r["way"], *(_against(r, rows[0], what, form) for what, form in columns)] for r in rows
    ]
    return markdown(["model", "way", f"sequences of {rows[0]['tokens']:,}", "ms a step", "tokens/s", "peak MB"], lines)


def curve_table(rows: list[dict]) -> str:
    """One line per size and row, one column per cost: its first and last value, and its exponent.

    Args:
        rows: of the section "curves".
    """
    lines = []
    for along, row in dict.fromkeys((r["along"], r["row"]) for r in rows):
        values = [r["value"] for r in rows if r["along"] == along]
        lines.append([f"{along} {values[0]:,} to {values[-1]:,}", row, *(_power(rows, along, row, cost) for cost in COSTS)])
    return markdown(["size", "row", *(title for title, *_ in COSTS.values())], lines)


def _power(rows: list[dict], along: str, row: str, cost: str) -> str:
    sizes, values = points_of(rows, along, row, cost)
    fitted = fitted_power(sizes, values)
    if fitted is None:
        return "—"
    first, last = (format(value, COSTS[cost][2]) for value in (values[0], values[-1]))
    return f"{first} to {last}: {in_words(fitted[0])}"


def _against(row: dict, first: dict, what: str, form: str) -> str:
    """A cell, and in brackets what it is of another row's."""
    if row.get(what) is None:
        return "refused" if "refused" in row else "—"
    ratio = f" ({row[what] / first[what]:.2f})" if first.get(what) else ""
    return format(row[what], form) + ratio


def decode_table(rows: list[dict]) -> str:
    """One line per case, one column per backend in microseconds, then what the best of them reads.

    Args:
        rows: of the section "decode".
    """
    backends = list(dict.fromkeys(r["backend"] for r in rows))
    lines = []
    for context, batch, side in dict.fromkeys((r["context"], r["batch"], r["side"]) for r in rows):
        timed = {r["backend"]: r for r in rows if (r["context"], r["batch"], r["side"]) == (context, batch, side)}
        times = [_cell(timed.get(b), "microseconds", ",.1f") for b in backends]
        best = decoding({"decode": rows}, side, context, batch)
        lines.append([f"{context:,} x {batch}, {side}", *times, *(_reads(best) if best else [""] * 4)])
    header = ["context x batch", *(f"µs, {b}" for b in backends), "cache MB", "best: share of copy", "in a row", "µs, a copy"]
    shown = len(header) if any("microseconds_in_a_row" in r for r in rows) else -2  # the first records have no such columns
    return markdown(header[:shown], [line[:shown] for line in lines])


def _reads(row: dict) -> list[str]:
    """What a kernel reads, the share of the copy's bandwidth alone and in a row, and what a copy of as many bytes takes."""
    in_a_row, copied = row.get("microseconds_in_a_row"), row.get("copy_microseconds")
    share = f"{row['share_of_copy'] * row['microseconds'] / in_a_row:.0%}" if in_a_row else "—"
    return [f"{row['cache_megabytes']:,.0f}", f"{row['share_of_copy']:.0%}", share, f"{copied:,.1f}" if copied else "—"]


def model_table(rows: list[dict]) -> str:
    """One line per model and row: parameters, milliseconds of a step, tokens a second, share of the measured matrix products.

    Args:
        rows: of the section "models".
    """
    lines = []
    for r in rows:
        if "refused" in r:
            lines.append([f"{r['model']} {r['row']}", r["refused"], *[""] * 5])
            continue
        mha = next((m for m in rows if m["model"] == r["model"] and m["row"] == "MHA" and "milliseconds" in m), None)
        lines.append(
            [
                f"{r['model']} {r['row']}",
                f"{r['parameters'] / 1e6:,.1f}",
                f"{r['milliseconds']:,.1f}",
                f"{r['milliseconds'] / mha['milliseconds']:.2f}" if mha else "",
                f"{r['tokens_per_second'] / 1e3:,.1f}",
                f"{r['share_of_matmul']:.0%}",
                f"{r['megabytes'] / 1e3:,.1f}" if r["megabytes"] else "",
            ]
        )
    header = [
        "model",
        "parameters (M)",
        "ms a step",
        "over MHA",
        "1,000 tokens/s",
        "MFU (of the measured matmul rate)",
        "peak GB",
    ]
    return markdown(header, lines)


def _cell(row: dict | None, what: str, form: str) -> str:
    if row is None:
        return "—"
    return format(row[what], form) if what in row else "refused"
