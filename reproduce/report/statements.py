"""What the paper states about equality, ranks, growth and sizes, and what the records say."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from ..models.rows import TABLE2, TABLE3
from ..store.records import Record
from .judge import FAILED, REPRODUCED, UNRESOLVED, UNTESTED, together
from .ledger import BFLOAT16, EXACT, FLOAT32, MISSES, OURS, SIZE_TOLERANCE, SIZES, STATEMENTS, Claim, Finding
from .query import BUDGETS, attention_mb, cache_mb, grouped, runs_of, sizes_of
from .sizes import OURS as DERIVED
from .words import difference

AS_IT_IS = "as it is"  # beside the controls, in each of which one thing is wrong
NOT_RUN: Finding = ("not on record", UNTESTED)


def all_statements(records: list[Record]) -> list[Claim]:
    """Equalities, ranks and growth; then one claim per size cell of Tables 1-3, and the shares of parameters that the text names.

    Args:
        records: all that there are.
    """
    return [*EQUALITIES, *_formula_claims(records), *_size_claims(records), *SHARES]


# Equal layers.

Measured = tuple[dict[str, float], dict[str, float], float]  # errors and controls by name, and what an error may be


def _equal(where: str, says: str, measured: Callable[[list[Record]], Measured | None], kind: str = STATEMENTS) -> Claim:
    """A claim that two things are the same, which no control may be."""

    def judge(records: list[Record], row: str) -> Finding:
        if (found := measured(records)) is None:
            return NOT_RUN
        errors, controls, bound = found
        if row != AS_IT_IS:  # the rule, tried on a control as if it were the layer
            return f"{controls[row]:.1g}", REPRODUCED if controls[row] <= bound else FAILED
        worst, least = max(errors.values()), min(controls.values())
        verdict = FAILED if worst > bound else REPRODUCED if least >= MISSES else UNRESOLVED
        return f"{worst:.0e} at most in {len(errors)} comparisons; controls {least:.1g} at least", verdict

    def rows(records: list[Record]) -> list[str]:
        return [AS_IT_IS, *found[1]] if (found := measured(records)) else []

    return Claim(where, says, "exact", judge, _as_it_is, f"controls: {says}", kind, others=rows)


def _as_it_is(records: list[Record]) -> list[str]:
    return [AS_IT_IS]


def _cells(chosen: Callable[[dict], bool]) -> Callable[[list[Record]], Measured | None]:
    """Of the experiment `exactness`, the comparisons of the cells that are chosen, and of each control the smallest error."""

    def measured(records: list[Record]) -> Measured | None:
        cells = [c for r in runs_of(records, "exactness", "float64")[-1:] for c in r.metrics["cells"] if chosen(c["cell"])]
        errors = {f"{c['name']}, {way}": error for c in cells for way, error in c["errors"].items()}
        controls: dict[str, float] = {}
        for name, error in (control for c in cells for control in c["controls"].items()):
            controls[name] = min(error, controls.get(name, error))
        return (errors, controls, EXACT) if cells else None

    return measured


def _theorems(records: list[Record], what: str) -> list[dict]:
    """One part of the record of `theorems`."""
    return [entry for r in runs_of(records, "theorems", "float64")[-1:] for entry in r.metrics[what]]


def _compared(what: str, control: str, bound: float) -> Callable[[list[Record]], Measured | None]:
    """A part of `theorems` that holds an error and a control per layer."""

    def measured(records: list[Record]) -> Measured | None:
        found = _theorems(records, what)
        errors = {entry["layer"]: entry["error"] for entry in found}
        return (errors, {control: min(entry["control"] for entry in found)}, bound) if found else None

    return measured


def _flash_claim() -> Claim:
    """In float32 where the theorems ran; in bfloat16 wherever a GPU timed Tucker layers on that kernel."""
    forced = _compared("flash", "the scale of the latent's width", FLOAT32)
    claim = _equal("Sec. 3.3", "it runs on PyTorch's flash kernel, with one key head for all heads", forced)

    def judge(records: list[Record], row: str) -> Finding:
        said, verdict = claim.judge(records, row)
        timed = [
            layer["error"]
            for r in runs_of(records, "speed", "gpu")
            if r.method == "layers"
            for layer in r.metrics["rows"]
            if layer["backend"] == "flash" and layer["row"].startswith("Tucker") and "error" in layer
        ]
        if row != AS_IT_IS or not timed:
            return said, verdict
        on_gpu = REPRODUCED if max(timed) <= BFLOAT16 else FAILED
        return f"{said}; bfloat16 on a GPU {max(timed):.0e} in {len(timed)} layers", together((verdict, on_gpu))

    return dataclasses.replace(claim, judge=judge)


# Ranks and growth.


def _rank_claim(where: str, says: str, *mechanisms: str) -> Claim:
    """Multilinear ranks of both dense tensors of these mechanisms' layers or, as a control, of the same with two heads made equal."""

    def judge(records: list[Record], row: str) -> Finding:
        layers = [entry for entry in _theorems(records, "ranks") if entry["layer"].split(",")[0] in mechanisms]
        if not layers:
            return NOT_RUN
        found = "found" if row == AS_IT_IS else "control"
        above = any(a > b for entry in layers for a, b in zip(entry[found], entry["theorem"]))
        wide, narrow = ([e for e in layers if ("narrow" in e["layer"]) == is_narrow] for is_narrow in (False, True))
        equal = [entry for entry in wide if entry[found] == entry["theorem"]]
        smaller = [f"{_ranks(e[found])} for {_ranks(e['theorem'])} with {e['layer'].split(', ')[1]}" for e in narrow]
        said = "; ".join([f"equal in {len(equal)} of {len(wide)} layers", *dict.fromkeys(smaller)])
        if above or len(equal) < len(wide):
            return said, FAILED
        return said, REPRODUCED if wide else UNTESTED

    def rows(records: list[Record]) -> list[str]:
        return [AS_IT_IS, "two heads alike"] if _theorems(records, "ranks") else []

    trial = f"ranks of {' and '.join(mechanisms)}"
    return Claim(where, f"{says}, at most", "ranks", judge, _as_it_is, trial, STATEMENTS, others=rows)


def _ranks(both: Sequence[int]) -> str:
    """ "(3,7,5) and (3,15,5)"; of two that are the same one."""
    return " and ".join(dict.fromkeys(f"({','.join(map(str, part))})" for part in (both[:3], both[3:])))


def _growth(records: list[Record], row: str) -> Finding:
    """Judge: parameters of Tucker layers, or of multi-head attention, over r d + r1 r^2, as width and ranks grow."""
    layers = _theorems(records, "growth")
    if not layers:
        return NOT_RUN
    tucker, mha = [e for e in layers if e["layer"] == "Tucker"], {e["d"]: e for e in layers if e["layer"] == "MHA"}
    counted = {(e["d"], e["r"], e["r1"]): (mha[e["d"]] if row == "MHA" else e)["parameters"] for e in tucker}
    ratios = [parameters / (r * d + r1 * r**2) for (d, r, r1), parameters in counted.items()]
    wider = _added(counted, 0, lambda d, r, r1: r * d)
    more_heads = _added(counted, 2, lambda d, r, r1: r1 * r**2)
    said = (
        f"{_range(ratios)} times that in {len(tucker)} layers, d {min(mha)} to {max(mha):,}; d alone adds {_range(wider)} times r d, "
        f"r1 alone {_range(more_heads)} times r1 r²"
    )
    held = all(found and 0 < max(found) <= 3 * min(found) for found in (ratios, wider, more_heads))
    return said, REPRODUCED if held else FAILED


def _added(counted: dict[tuple, int], which: int, term: Callable[[int, int, int], int]) -> list[float]:
    """What parameters grow by when one of (d, r, r1) alone grows, over what the term grows by."""
    pairs = [(a, b) for a in counted for b in counted if a[which] < b[which] and _but(a, which) == _but(b, which)]
    return [(counted[b] - counted[a]) / (term(*b) - term(*a)) for a, b in pairs]


def _but(case: tuple, which: int) -> tuple:
    return case[:which] + case[which + 1 :]


def _range(values: Sequence[float]) -> str:
    return f"{min(values, default=0):.1f} to {max(values, default=0):.1f}"


def _without_norms(cell: dict) -> bool:
    return not cell["norm"] and not cell.get("qk_norm")


def _plain(cell: dict) -> bool:
    """A layer as the theorems have it: no norms, biases or positions."""
    return _without_norms(cell) and cell["rotary"] == "none" and cell["bias"] == "no bias"


def _coupled(cell: dict) -> bool:
    return _without_norms(cell) and cell["rotary"] == "coupled"


EQUALITIES = (
    _equal("Thm B.2", "MHA is a Tucker Attention", _cells(lambda cell: _plain(cell) and cell["mechanism"] == "MHA")),
    _equal("Thm B.3", "GQA and MQA are Tucker Attentions", _cells(lambda cell: _plain(cell) and cell["mechanism"] in ("GQA", "MQA"))),
    _equal(
        "Thm B.4", "MLA is a Tucker Attention, its latents shared or separated",
        _cells(lambda cell: _plain(cell) and cell["mechanism"].startswith("MLA")),
    ),
    _rank_claim("Thm B.2", "MHA has ranks (n_H, d, d)", "MHA"),
    _rank_claim("Thm B.3", "GQA has ranks (n_H, d, n_KV d_H)", "GQA", "MQA"),
    _rank_claim("Thm B.4", "MLA has ranks (n_H, d_c^Q, d_c^K) and (n_H, d, d_c^K)", "MLA shared", "MLA separated"),
    _equal(
        "Def. 3.1, Lemma B.5", "with RoPE only distances between positions matter", _compared("positions", "distances doubled", EXACT)
    ),
    _equal("Cor. 3.2.1", "MLA with RoPE on its latent needs no second path and fuses its query side", _cells(_coupled)),
    _flash_claim(),
    Claim(
        "place not known to us", "parameters grow as r d + r1 r²", "growth", _growth, _as_it_is,
        "parameters over r d + r1 r², and with d or r1 alone", STATEMENTS,
        others=lambda records: [AS_IT_IS, "MHA"] if _theorems(records, "growth") else [],
    ),
    _equal(
        "beyond the paper", "the same with biases, and with head-wide and decoupled RoPE",
        _cells(lambda cell: _without_norms(cell) and not _plain(cell) and not _coupled(cell)), OURS,
    ),
    _equal(
        "beyond the paper", "the same with norms of latents, queries and keys, though no longer trilinear",
        _cells(lambda cell: not _without_norms(cell)), OURS,
    ),
)  # fmt: skip


# Sizes.


def _formula_claims(records: list[Record]) -> list[Claim]:
    """Table 1: module and cache must hold exactly as many numbers as the formulas say."""

    cells = {}

    def add(row: dict, what: str, formula: int, counted: int) -> None:
        found = f"{counted:,} counted", REPRODUCED if formula == counted else FAILED
        cells[f"Table 1, {row['label']}, {what}"] = f"{formula:,} by formula", found

    for row in _rows(records, "table1"):
        ours = DERIVED.get(row["label"], set())
        if "parameters" not in ours:  # formulas that we derived are no claims of the paper
            add(row, "parameters", row["parameters"], row["counted_parameters"])
        if "cache" not in ours:
            add(row, "cache per token", row["cache_per_token"], row["counted_cache_per_token"])
    return _cell_claims(cells, "formula", "none can: formula and module agree in all of them; a layer with biases would fail")


def _size_claims(records: list[Record]) -> list[Claim]:
    cells = {}
    for experiment, columns in (
        ("table2", {"attention_mb": ("attention MB", attention_mb), "cache_mb": ("KV cache MB", cache_mb)}),
        ("table3", {"size": ("size", lambda row, shape: row["parameters"] * 16 / 1e6)}),
    ):
        for printed, readings in grouped(_rows(records, experiment), functools.partial(_printed, experiment)).items():
            shape = runs_of(records, experiment, "sizes")[-1].config
            for column, (title, measure) in columns.items():
                where, paper = f"Table {experiment[-1]}, {printed}, {title}", readings[0]["paper"][column]
                cells[where] = f"{paper:g}", _size(paper, {row["label"]: measure(row, shape) for row in readings})
    return _cell_claims(cells, "size", "none")


def _printed(experiment: str, row: dict) -> str:
    """The row of the paper's table: Table 3 has one of MLA, which does not say whether its latents are shared."""
    label = row["label"]
    return label.replace(" separated", "").replace(" shared", "") if experiment == "table3" else label


def _size(paper: float, readings: dict[str, float]) -> Finding:
    """A size of the paper beside ours by row; where it can be read as several rows, one that agrees is enough."""
    said = [f"{ours:.2f} ({difference(ours, paper)})" for ours in readings.values()]
    if len(readings) > 1:
        said = [f"{label.split()[1]} {size}" for label, size in zip(readings, said)]
    near = any(abs(ours / paper - 1) <= SIZE_TOLERANCE for ours in readings.values())
    return ", ".join(said), REPRODUCED if near else FAILED


def _rows(records: list[Record], experiment: str) -> list[dict]:
    """Sizes of a table's rows, none where they are not on record."""
    recorded = runs_of(records, experiment, "sizes")
    return sizes_of(recorded) if recorded else []


def _cell_claims(cells: dict[str, tuple[str, Finding]], rule: str, none_can: str) -> list[Claim]:
    """By place, what the paper says and what was found: a claim each, whose rule is tried on all of them."""

    def judge(records: list[Record], where: str) -> Finding:
        return cells[where][1]

    def claim(where: str, says: str) -> Claim:
        return Claim(
            where, says, rule, judge, lambda records: [where], "cells of Tables 1-3", SIZES, others=lambda records: list(cells),
            none_can=none_can,
        )  # fmt: skip

    return [claim(where, says) for where, (says, _) in cells.items()]


def _share_claim(where: str, says: str, experiment: str, rows: Sequence[str], of: str, low: float, high: float) -> Claim:
    """A row's attention parameters as a share of those of `of`, in per cent, in [low, high]."""

    def judge(records: list[Record], row: str) -> Finding:
        parameters = {r["label"]: r["parameters"] for r in _rows(records, experiment)}
        if not {row, of} <= parameters.keys():
            return NOT_RUN
        share = 100 * parameters[row] / parameters[of]
        return f"{share:.1f} %", REPRODUCED if low <= share <= high else FAILED

    def every_row(records: list[Record]) -> list[str]:
        return [row["label"] for row in _rows(records, experiment)]

    trial = f"rows of {BUDGETS[experiment].title}: {low:g}-{high:g} % of {of}'s"
    return Claim(where, says, "share", judge, lambda records: rows, trial, SIZES, others=every_row)


TUCKER3 = [row.label for row in TABLE3 if row.mechanism == "Tucker"]
TUCKER2 = [row.label for row in TABLE2 if row.mechanism == "Tucker"]
SHARES = (
    _share_claim("Sec. 4.2, [8,128,64]", "about 18 % of MHA's parameters", "table2", TUCKER2[1:2], "MHA", 17.5, 18.5),
    _share_claim("Sec. 4.2, [8,128,64]", "about 39 % of MLA's parameters", "table2", TUCKER2[1:2], "MLA shared d_c=128", 38.5, 39.5),
    _share_claim("Sec. 4.2, [8,64,64]", "up to 9x fewer (we read: than MHA), 10.5-11.8 %", "table2", TUCKER2[2:], "MHA", 10.5, 11.8),
    _share_claim("LLaMA text", "about 10-20 % of GQA-8's parameters (9.5-20.5 %)", "table3", TUCKER3, "GQA n_KV=8", 9.5, 20.5),
)  # fmt: skip
