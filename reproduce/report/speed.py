"""The performance section of the report: a paragraph, tables, and every target with its verdict, all from one speed run."""

from ..store.records import Record
from .markdown import markdown
from .targets import TARGETS, Sections, decoding, layer
from .words import commit_of


def speed_tables(records: list[Record]) -> list[str]:
    """A paragraph, tables, and every target with its verdict.

    Args:
        records: one per section of `reproduce speed`, all of one run.

    Returns:
        Markdown, piece by piece.
    """
    sections = {r.method: r.metrics["rows"] for r in records}
    drawn = [
        ("layers", layer_table, "One attention layer, forward and backward, as a CUDA graph: milliseconds by backend."),
        ("decode", decode_table, "One new token against its cache, as a CUDA graph: microseconds by backend."),
        ("models", model_table, "One training step of a whole model, AdamW, bf16 autocast, compiled block by block."),
    ]
    parts = [f"**Speed.** {paragraph(records[0].device, sections)}"]
    for name, draw, title in drawn:
        if sections.get(name):
            parts += [f"**{title}**", draw(sections[name])]
    if judged := [(t, *verdict) for t in TARGETS if (verdict := t.verdict(sections))]:
        rows = [[t.what, measured, f"{'≥' if t.least else '≤'} {t.bound:g}", verdict] for t, measured, verdict in judged]
        parts += ["**Targets, set before they were measured.**", markdown(["target", "measured", "bound", "verdict"], rows)]
    first = records[0]
    config = ", ".join(f"{k} {v}" for k, v in first.config.items() if k != "device")
    source = f"{first.device}, torch {first.versions['torch']}, {config}; commit {commit_of(first)}; `{first.command}`"
    notes = "Medians, the L2 cache full of other lines before each call; —: our kernel was timed for Tucker Attention's latents alone"
    return [*parts, f"<sub>{notes}; {source}</sub>"]


def paragraph(device: str, sections: Sections) -> str:
    """What a reader wants to know first, in sentences.

    Args:
        device: in words.
        sections: rows of the run by section.

    Returns:
        Empty where no section was timed.
    """
    limits = {name: value for row in sections.get("limits", []) for name, value in row.items() if name != "what"}
    said = []
    if limits:
        said.append(
            f"On one {device} (measured in the same run: copies at {limits['gigabytes_per_second']:,.0f} GB/s, "
            f"matrix products at {limits['teraflops']:,.0f} TFLOP/s)"
        )
    for shape, row in (("GPT-2", "Tucker [8,64,64]"), ("LLaMA", "Tucker [32,64,64]"), ("LLaMA", "Tucker [32,128,128]")):
        ours, mha = (layer(sections, shape, label, "milliseconds") for label in (row, "MHA"))
        if ours and mha:
            said.append(
                f"a {shape} layer {row.removeprefix('Tucker ')} trains in {ours / mha:.2f} of multi-head attention's time"
            )
    case = ("latents 64/64", 16384, 64)
    ours, mha = decoding(sections, *case), decoding(sections, "MHA", *case[1:])
    if ours and mha:
        said.append(
            f"one token of {case[2]} sequences at context {case[1]:,} takes {ours['microseconds']:,.0f} µs with latents of width 64 "
            f"and {mha['microseconds']:,.0f} µs with multi-head attention, at {ours['share_of_copy']:.0%} of the copy's bandwidth"
        )
    verdicts = [verdict[1] for t in TARGETS if (verdict := t.verdict(sections))]
    if verdicts:
        said.append(f"{sum(v == 'met' for v in verdicts)} of {len(verdicts)} targets below are met")
    return "; ".join(said) + "." if said else ""


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
            ]
        )
    header = ["layer", *(f"ms, {b}" for b in backends), "best over MHA", "peak MB, PyTorch's kernels", "peak MB, ours"]
    return markdown(header, lines)


def decode_table(rows: list[dict]) -> str:
    """One line per case, one column per backend in microseconds, then what the best of them reads.

    Args:
        rows: of the section "decode".
    """
    backends = list(dict.fromkeys(r["backend"] for r in rows))
    lines = []
    for context, batch, side in dict.fromkeys((r["context"], r["batch"], r["side"]) for r in rows):
        timed = {r["backend"]: r for r in rows if (r["context"], r["batch"], r["side"]) == (context, batch, side)}
        best = decoding({"decode": rows}, side, context, batch)
        share = [f"{best['cache_megabytes']:,.0f}", f"{best['share_of_copy']:.0%}"] if best else ["", ""]
        lines.append(
            [f"{context:,} x {batch}, {side}", *(_cell(timed.get(b), "microseconds", ",.1f") for b in backends), *share]
        )
    return markdown(["context x batch", *(f"µs, {b}" for b in backends), "cache MB", "best: share of copy"], lines)


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
