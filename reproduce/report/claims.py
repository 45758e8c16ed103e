"""What the paper claims, with what would count against it, and the verdict that the records give.

Values and sentences are those that readers of the paper quote; its tables were not available to us first-hand. A size is
reproduced if it lies within SIZE_TOLERANCE of the paper's figure: wide enough for a last digit that was cut or rounded,
narrow enough to see two exchanged digits. A sentence about quality or speed is refuted by what stands beside it, and has no
verdict before there is a run at a scale that could tell.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from ..models.rows import TABLE2, TABLE3, labels_of
from ..store.records import Record
from .markdown import markdown
from .query import (
    BUDGETS,
    alike,
    attention_mb,
    cache_mb,
    complete,
    diverged,
    grouped,
    largest,
    mean_loss,
    settled,
    sizes_of,
    step_times,
)
from .results import OURS
from .words import difference, tokens_seen

BEGIN, END = "<!-- claims: written by `python -m reproduce report --write README.md` -->", "<!-- end of claims -->"
SIZE_TOLERANCE = 0.005
REPRODUCED, FAILED, UNTESTED = "reproduced", "not reproduced", "not tested at this scale"


@dataclass(frozen=True)
class Claim:
    """A sentence or number of the paper, and how records judge it.

    Args:
        where: its place in the paper.
        says: its value or sentence.
        refuted_if: what would count against it.
        judge: records -> (what we measured, verdict).
    """

    where: str
    says: str
    refuted_if: str
    judge: Callable[[list[Record]], tuple[str, str]]


def all_claims(records: list[Record]) -> list[Claim]:
    """One claim per size cell of Tables 1-3, then the sentences.

    Args:
        records: all that there are.
    """
    return [*_formula_claims(records), *_size_claims(records), *SENTENCES]


def verdicts(records: list[Record]) -> list[tuple[Claim, str, str]]:
    """Every claim with what was measured and the verdict.

    Args:
        records: all that there are.

    Raises:
        ValueError: if a record lacks what is asked of it.
    """
    with complete("a record lacks what the claims are judged by"):
        return [(claim, *claim.judge(records)) for claim in all_claims(records)]


def render(records: list[Record]) -> str:
    """The table of claims, and the count of verdicts under it.

    Args:
        records: all that there are.
    """
    judged = verdicts(records)
    return f"{_table(judged)}\n\n{_count(judged)}."


def sentences(records: list[Record]) -> str:
    """The table of what the paper claims in words, and the count of all verdicts under it.

    Args:
        records: all that there are.
    """
    judged = verdicts(records)
    return f"{_table([j for j in judged if j[0] in SENTENCES])}\n\nWith the sizes of Tables 1-3, {_count(judged)}."


def _table(judged: list[tuple[Claim, str, str]]) -> str:
    rows = [[c.where, c.says, measured, c.refuted_if, verdict] for c, measured, verdict in judged]
    return markdown(["claim", "paper", "measured", "refuted if", "verdict"], rows)


def _count(judged: list[tuple[Claim, str, str]]) -> str:
    counts = ", ".join(f"{sum(v == verdict for *_, v in judged)} {verdict}" for verdict in (REPRODUCED, FAILED, UNTESTED))
    return f"{len(judged)} claims: {counts}"


def _formula_claims(records: list[Record]) -> list[Claim]:
    """Table 1: module and cache must hold exactly as many numbers as the formulas say."""
    table1 = _sizes(records, "table1")

    def claim(row: dict, what: str, formula: int, counted: int) -> Claim:
        verdict = REPRODUCED if formula == counted else FAILED
        judge = lambda _: (f"{counted:,} counted", verdict)  # noqa: E731
        return Claim(f"Table 1, {row['label']}, {what}", f"{formula:,} by formula", "any difference", judge)

    claims = []
    for row in sizes_of(table1) if table1 else []:
        ours = OURS.get(row["label"], set())
        if "parameters" not in ours:  # formulas that we derived are no claims of the paper
            claims.append(claim(row, "parameters", row["parameters"], row["counted_parameters"]))
        if "cache" not in ours:
            claims.append(claim(row, "cache per token", row["cache_per_token"], row["counted_cache_per_token"]))
    return claims


def _size_claims(records: list[Record]) -> list[Claim]:
    claims = []
    for experiment, columns in (
        ("table2", {"attention_mb": ("attention MB", attention_mb), "cache_mb": ("KV cache MB", cache_mb)}),
        ("table3", {"size": ("size", lambda row, shape: row["parameters"] * 16 / 1e6)}),
    ):
        recorded = _sizes(records, experiment)
        for row in sizes_of(recorded) if recorded else []:
            for column, (title, measure) in columns.items():
                where = f"Table {experiment[-1]}, {row['label']}, {title}"
                claims.append(_size_claim(where, row["paper"][column], measure(row, recorded[0].config)))
    return claims


def _size_claim(where: str, paper: float, ours: float) -> Claim:
    verdict = REPRODUCED if abs(ours / paper - 1) <= SIZE_TOLERANCE else FAILED
    measured = f"{ours:.2f} ({difference(ours, paper)})"
    return Claim(where, f"{paper:g}", f"off by over {100 * SIZE_TOLERANCE:g} %", lambda _: (measured, verdict))


def _sizes(records: list[Record], experiment: str) -> list[Record]:
    return [r for r in records if r.experiment == experiment and r.preset == "sizes"]


def _share(experiment: str, rows: tuple[str, ...], of: str, low: float, high: float):
    """Judge: the attention parameters of `rows` as shares of those of `of`, in per cent: all of them in [low, high]."""

    def judge(records):
        recorded = _sizes(records, experiment)
        if not recorded:
            return "no record", UNTESTED
        parameters = {r["label"]: r["parameters"] for r in sizes_of(recorded)}
        shares = [100 * parameters[row] / parameters[of] for row in rows]
        inside = all(low <= share <= high for share in shares)
        return ", ".join(f"{share:.1f} %" for share in shares), REPRODUCED if inside else FAILED

    return judge


def _competitive(records: list[Record]) -> tuple[str, str]:
    """Table 2's rows at the full budget of the preset `gpu`; where the row in question has not run, what its fellows show."""
    runs, broken, asked = _chosen(records, "table2"), _broken(records, "table2"), "Tucker [8,128,64]"
    if asked in broken:
        return f"{asked} diverged", FAILED
    if "MHA" not in runs or "MHA" in broken:
        return "MHA diverged" if "MHA" in broken else "no run at a scale that could tell", UNTESTED
    base = mean_loss(runs["MHA"])
    said = [
        f"{label} diverged" if label in broken else f"{label} {difference(mean_loss(runs[label]), base)}"
        for label in labels_of(TABLE2, "Tucker")
        if label in runs
    ]
    if asked not in runs:
        return f"not run yet; {'; '.join(said)} against MHA" if said else "not run yet", UNTESTED
    verdict = REPRODUCED if mean_loss(runs[asked]) <= 1.02 * base else FAILED
    return f"{'; '.join(said)} against MHA, {tokens_seen(runs['MHA']) / 1e6:.0f}M tokens", verdict


def _broken(records: list[Record], experiment: str) -> set[str]:
    """Rows of the preset `gpu` of which a run broke off: what the others reached is not what the row reaches."""
    return {row for row, runs in _chosen(records, experiment).items() if diverged(runs)}


def _chosen(records: list[Record], experiment: str) -> dict[str, list[Record]]:
    """Runs of the preset `gpu` by row; of a table, those at its present settings, in its order, else the most that are alike."""
    if experiment in BUDGETS:
        groups = settled(records, experiment)
        return {row.label: groups[row.label] for row in BUDGETS[experiment].rows if row.label in groups}
    runs = largest(alike([r for r in records if (r.experiment, r.preset) == (experiment, "gpu")]))
    return grouped(runs, lambda r: r.method)


def _llama_loss(records: list[Record]) -> tuple[str, str]:
    """Every Tucker row of Table 3 against GQA-8, in a smaller model."""
    runs, broken, base = _chosen(records, "table3"), _broken(records, "table3"), BUDGETS["table3"].base
    tucker = labels_of(TABLE3, "Tucker")
    if gone := broken.intersection(tucker):
        return f"{', '.join(sorted(gone))} diverged", FAILED
    if not runs.keys() >= {base, *tucker} or base in broken:
        return f"{base} diverged" if base in broken else "no run at a scale that could tell", UNTESTED
    mean = {label: mean_loss(runs[label]) for label in (base, *tucker)}
    said = "; ".join(f"{label} {difference(mean[label], mean[base])}" for label in tucker)
    return f"{said}, a smaller model", REPRODUCED if max(mean[label] for label in tucker) <= 1.03 * mean[base] else FAILED


def _no_worse(experiment: str, rows: tuple[str, ...], rivals: tuple[str, ...], metric: str, sign: int) -> Callable:
    """Any of several rows that have about a tenth of the rivals' attention parameters: not worse than each by more than seeds spread.

    sign: 1 where more is better, -1 where less is.
    """

    def judge(records):
        runs, broken = _chosen(records, experiment), _broken(records, experiment)
        if gone := broken.intersection(rows):
            return f"{', '.join(sorted(gone))} diverged", FAILED
        if gone := broken.intersection(rivals):
            return f"{', '.join(sorted(gone))} diverged", UNTESTED
        values = {label: [r.metrics[metric] for r in runs[label]] for label in runs if label in (*rows, *rivals)}
        enough = {label for label in values if len(values[label]) >= 2}
        candidates = [row for row in rows if row in enough]
        if not candidates or not enough.issuperset(rivals):
            return "no two seeds at a scale that could tell", UNTESTED
        row = max(candidates, key=lambda label: sign * statistics.mean(values[label]))
        said, held = [], True
        for rival in rivals:
            gap = sign * (statistics.mean(values[row]) - statistics.mean(values[rival]))
            spread = math.hypot(statistics.stdev(values[row]), statistics.stdev(values[rival]))
            held &= gap >= -spread
            share = runs[row][0].attention_parameters / runs[rival][0].attention_parameters
            said.append(f"{gap:+.3f} (spread {spread:.3f}) against {rival} with {share:.0%} of its parameters")
        return f"{metric}, better is positive: {row} {'; '.join(said)}", REPRODUCED if held else FAILED

    return judge


def _head_redundancy(records: list[Record]) -> tuple[str, str]:
    """Effective ranks of the head modes of multi-head GPT-2s at the paper's shape and Table 2's budget, means over layers and seeds."""
    steps = BUDGETS["table2"].preset.train.steps
    layers = [
        layer
        for r in records
        if (r.experiment, r.preset, r.method) == ("spectra", "gpu", "MHA") and r.steps == steps
        for layer in r.metrics["trained"]
    ]
    if not layers:
        return "no run at a scale that could tell", UNTESTED
    shares = [statistics.mean(x[side]["head"]["entropy_rank"] / x[side]["head"]["size"] for x in layers) for side in layers[0]]
    said = " and ".join(f"{share:.0%}" for share in shares)
    return f"{said} of n_H before and after the softmax", REPRODUCED if max(shares) <= 0.9 else FAILED


def _iteration_time(records: list[Record]) -> tuple[str, str]:
    """A training step of the true 1B shape: every Tucker row's time against multi-head attention's and GQA-8's."""
    times = step_times(records)
    tucker = [times[label] for label in labels_of(TABLE3, "Tucker") if label in times]
    if not tucker or "MHA" not in times:
        return "no run at a scale that could tell", UNTESTED
    against = [
        f"{difference(max(tucker), times[base])} to {difference(min(tucker), times[base])} against {base}"
        for base in ("MHA", "GQA n_KV=8")
        if base in times
    ]
    return "; ".join(against) + ", one GPU", REPRODUCED if min(tucker) < times["MHA"] else FAILED


SENTENCES = (
    Claim(
        "Sec. 4.2, parameters of [8,128,64]", "about 18 % of MHA's", "outside 17.5-18.5 %",
        _share("table2", ("Tucker [8,128,64]",), "MHA", 17.5, 18.5),
    ),
    Claim(
        "Sec. 4.2, parameters of [8,128,64]", "about 39 % of MLA's", "outside 38.5-39.5 %",
        _share("table2", ("Tucker [8,128,64]",), "MLA shared d_c=128", 38.5, 39.5),
    ),
    Claim(
        "Sec. 4.2, largest reduction", "up to 9x (we read: against MHA)", "outside 10.5-11.8 % (8.5-9.5x)",
        _share("table2", ("Tucker [8,64,64]",), "MHA", 10.5, 11.8),
    ),
    Claim(
        "LLaMA text, the three Tucker rows against GQA-8", "about 10-20 % of the attention parameters",
        "any of the rows outside 9.5-20.5 %",
        _share("table3", labels_of(TABLE3, "Tucker"), "GQA n_KV=8", 9.5, 20.5),
    ),
    Claim(
        "Abstract, all models", "comparable metrics with an order of magnitude fewer attention parameters than GQA and MLA",
        "worse at a tenth of the parameters by more than seeds spread",
        _no_worse("table3", ("Tucker [32,64,64]",), ("GQA n_KV=8", "MLA shared d_c=128"), "validation_loss", -1),
    ),
    Claim("Sec. 4.2, GPT-2", "[8,128,64] is competitive in validation metrics", "loss over 2 % above MHA's", _competitive),
    Claim("LLaMA text", "validation loss only 1-3 % above GQA-8's", "more than 3 % above", _llama_loss),
    Claim("LLaMA text", "training iteration time down by up to 20 %", "no row faster than MHA", _iteration_time),
    Claim(
        "Fig. 3, ViT", "comparable accuracy with almost 10x fewer attention parameters than GQA and MLA",
        "worse at a tenth of the parameters by more than seeds spread",
        _no_worse("figure3", ("Tucker [8,24,24]", "Tucker [12,20,20]"), ("GQA n_KV=6", "MLA shared d_c=128"), "top1", 1),
    ),
    Claim(
        "Spectra figure", "singular values of all unfoldings of a trained GPT-2 decay clearly, head mode included",
        "effective head rank over 0.9 n_H", _head_redundancy,
    ),
)  # fmt: skip
