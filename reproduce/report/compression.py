"""Layers compressed without training: what is lost, and what the compression itself costs."""

import math

from ..store.records import Record
from .markdown import Table, markdown
from .query import by_model, model_names

SCORES = {"loss": "loss (nats/token)", "top1": "top-1", "agreement": "same first guess", "similarity": "cosine with before"}


def compress_runs(records: list[Record]) -> list[Table]:
    """A table for each model that was compressed."""
    names = {id(record): name for record, name in zip(records, model_names(records))}
    return [compress_table(group, names[id(group[0])]) for group in by_model(records)]


def compress_table(records: list[Record], name: str) -> Table:
    """Sizes and errors of each row of one model, truncated for the weights alone and knowing the inputs."""
    c, data, before = records[0].config, records[0].data, records[0].metrics["before"]
    score = next((name for name in ("loss", "top1") if name in before), "agreement")
    if "similarity" in records[0].metrics["ways"]["plain"]:
        score = "similarity"
    scale = "" if records[0].preset == "models" else ", REDUCED SCALE"
    title = (
        f"**{name}{scale}: trained layers compressed, not trained further.** Width {c['d_model']}, {c['n_heads']} heads, "
        f"{c['n_layers']} layers. In each cell: truncated for the weights alone / knowing the inputs. These are {data['calibration']:,} "
        f"{data['unit']} of {data['name']}; errors are measured on {data['test']:,} others. Errors are relative, means over layers."
        + (f" The {SCORES[score]} was {before[score]:.3f} before." if score in before else "")
    )
    header = ["row", "attention parameters", "cached per token and layer", "error of W", "of W~", "of logits", "of outputs"]
    rows = [line for r in records for line in _lines(r, score)]
    return Table(
        f"Compressed, {records[0].preset}", title, markdown([*header, SCORES[score]], rows), records, compress_note(records)
    )


def _lines(record: Record, score: str) -> list[list[str]]:
    """One for the truncation, and one for mean pooling where it was tried."""
    m, lines = record.metrics, []
    sizes = [f"{m['attention_parameters']:,}", f"{m['cache_per_token']:,}"]
    pooled = {"mean-pooled": ("mean",)} if "mean" in m["ways"] else {}
    for name, ways in ({"": ("plain", "aware")} | pooled).items():
        errors = [m["ways"][way] for way in ways]
        columns = [[e[of][i] for e in errors] for of in ("weights", "inputs") for i in (0, 1)] + [[e[score] for e in errors]]
        cells = (" / ".join(f"{v:.3f}" for v in column) for column in columns)
        lines.append([" ".join([record.method, name]).strip(), *sizes, *cells])
    return lines


def compress_note(records: list[Record]) -> str:
    """In how many cases it paid to know the inputs, and in which it did not."""
    counts, missed = [], []
    for name, value in (
        ("error of logits", lambda errors: errors["inputs"][0]),
        ("error of outputs", lambda errors: errors["inputs"][1]),
        ("loss", lambda errors: errors.get("loss")),
    ):
        pairs = {r.method: [value(r.metrics["ways"][way]) for way in ("aware", "plain")] for r in records}
        if None in (v for pair in pairs.values() for v in pair):
            continue
        counts.append(f"the {name} in {sum(aware < plain for aware, plain in pairs.values())} of {len(pairs)} rows")
        if name != "loss":
            missed += [f"{name} of {label}" for label, (aware, plain) in pairs.items() if aware >= plain]
    said = ". It lowered ".join(counts)
    return f"Knowing the inputs lowered {said}." + (f" It did not lower: {', '.join(missed)}." if missed else "")


def compress_speed_runs(records: list[Record]) -> list[Table]:
    """Seconds and megabytes of the HOSVD from factors and from tensors, with how they grow."""
    sizes = records[-1].metrics["sizes"]
    rows = []
    for size in sizes:
        ours, dense = size["factors"], size["tensors"]
        cells = [f"{size['d_model']:,}, {size['n_heads']}", f"[{','.join(map(str, size['ranks']))}]"]
        for what, form in (("seconds", ".2f"), ("megabytes", ",.0f")):
            cells += [format(ours[what], form), format(dense[what], form), f"{dense[what] / ours[what]:.1f}"]
        rows.append(cells)
    title = (
        "**The truncated HOSVD of one multi-head layer, from its factors and by forming both tensors, float64.** The former is "
        "`compress`, the latter TensorLy's Tucker without sweeps. Both find the same core norms before a ratio is taken."
    )
    header = ["d, heads", "ranks", "s, factors", "s, tensors", "ratio", "peak MB, factors", "peak MB, tensors", "ratio"]
    note = f"{_laws(sizes)}Peak memory is what the call adds to the layer itself."
    return [Table("Cost of compressing", title, markdown(header, rows), records[-1:], note)]


def _laws(sizes: list[dict]) -> str:
    """How seconds and megabytes grow, as sentences; none of a single size."""
    if len(sizes) < 2:
        return ""
    grown = {what: [f"{growth(sizes, way, what):.1f}" for way in ("factors", "tensors")] for what in ("seconds", "megabytes")}
    laws = (
        f"{what.capitalize()} grow as d to the {a} from factors, to the {b} from tensors." for what, (a, b) in grown.items()
    )
    return f"{' '.join(laws)} That is between the two largest sizes. "


def growth(sizes: list[dict], way: str, what: str) -> float:
    """The exponent of the width between the two largest sizes.

    Args:
        sizes: of the record, from small to large.
        way: "factors" or "tensors".
        what: "seconds" or "megabytes".
    """
    small, large = sizes[-2:]
    return math.log(large[way][what] / small[way][what]) / math.log(large["d_model"] / small["d_model"])
