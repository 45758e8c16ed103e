"""What the paper claims, what was measured, and the verdict: the ledger, and the page CLAIMS.md with the rules that judge it.

Values and sentences are those that readers of the paper quote; its tables were not available to us first-hand. Every rule is a
function of the records and of one row. So the page can say what a rule does to the row that a claim is about, and to every other row
that is on record: a rule that nothing fails shows nothing.
"""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..models.rows import TABLE2, TABLE3
from ..store.records import Record
from .judge import (
    ABOVE,
    BELOW,
    CONFIDENCE,
    FAILED,
    LEVEL,
    MARGIN,
    REPRODUCED,
    SEEDS,
    UNRESOLVED,
    UNTESTED,
    VERDICTS,
    Estimate,
    at_their_best,
    broken,
    loss_difference,
    metric_difference,
    on_test_text,
    together,
)
from .markdown import markdown
from .query import (
    BUDGETS,
    alike,
    attention_mb,
    cache_mb,
    complete,
    grouped,
    largest,
    of_one_budget,
    runs_of,
    settled,
    sizes_of,
    step_times,
)
from .results import OURS
from .words import difference

BEGIN, END = "<!-- claims: written by `python -m reproduce report --write README.md` -->", "<!-- end of claims -->"
SIZE_TOLERANCE = 0.005
CLASSES = 100  # of ten, five guesses by chance hold the right one every second time
POINT = 0.01  # of accuracy
TENTH = (0.08, 0.12)  # shares of parameters that are "almost 10x fewer"
CLEAR_DECAY = 0.9  # effective head rank over n_H
FASTER = (-0.25, -0.15)  # "up to 20 %"
SIZES, FINDINGS = "sizes", "findings"
Finding = tuple[str, str]  # what was measured, and the verdict
NO_RUN: Finding = ("no run at a scale that could tell", UNTESTED)

RULES = {
    "size": f"Reproduced within {100 * SIZE_TOLERANCE:g} % of the paper's number: wide enough for a last digit that was cut or "
    "rounded, narrow enough to see two digits exchanged.",
    "formula": "Reproduced where the module and its cache hold exactly as many numbers as the formula says.",
    "share": "Reproduced where the share of parameters rounds to the paper's number, or lies in its range.",
    "loss": f"Reproduced where the whole interval of the difference is at most {MARGIN:g} nats, not reproduced where the whole "
    "interval is above that, else not resolved.",
    "1-3 %": "Reproduced where the whole interval is within 1 to 3 % of the other row's loss. A lower loss is better, but not what "
    "the paper says.",
    "accuracy": f"Top-5 accuracy on images of at least {CLASSES} classes. Reproduced where the whole interval is above minus one "
    "point, not reproduced where it is below that, else not resolved. Every row with 8 to 12 % of the other's parameters is tried, and "
    "the best counts; each interval is wider by so much that all hold together (Bonferroni). It must hold against every rate of the "
    "other row.",
    "decay": f"Effective head rank over n_H, by the entropy of the singular values and of their squares, mean over layers. Reproduced "
    f"where both are at most {CLEAR_DECAY:g}, not reproduced where both are more, else not resolved: it depends on the measure.",
    "time": "Reproduced where the fastest of the three rows saves 15 to 25 % of a training step. Which row the paper compares with is "
    "not known to us: it must hold beside MHA and beside GQA-8, and fail beside both to be not reproduced.",
}


@dataclass(frozen=True)
class Claim:
    """A sentence or number of the paper, and how records judge it.

    Args:
        where: its place in the paper.
        says: its value or sentence.
        rule: a key of RULES.
        judge: (records, row) -> what was measured of this row, and the verdict that the rule gives it.
        rows: records -> the rows that the claim is about.
        trial: what the rule is tried on beside the claim's own rows, in words; claims that share it are tried together.
        kind: SIZES or FINDINGS.
        every: whether it speaks of all of these rows; otherwise one that holds is enough.
        others: records -> all rows that the rule can be tried on; by default those of the claim alone.
        tried: as `judge`, where it needs more than is on record: the same rule on what there is.
        none_can: why no row on record fails the rule.
    """

    where: str
    says: str
    rule: str
    judge: Callable[[list[Record], str], Finding]
    rows: Callable[[list[Record]], Sequence[str]]
    trial: str
    kind: str = FINDINGS
    every: bool = True
    others: Callable[[list[Record]], Sequence[str]] | None = None
    tried: Callable[[list[Record], str], Finding] | None = None
    none_can: str = "none"

    def finding(self, records: list[Record]) -> Finding:
        """What was measured of all its rows, and the verdict."""
        found = {row: self.judge(records, row) for row in self.rows(records)}
        said = [f"{_short(row)} {measured}" if len(found) > 1 else measured for row, (measured, _) in found.items()]
        return "; ".join(said) or NO_RUN[0], together((verdict for _, verdict in found.values()), self.every)

    def on_every_row(self, records: list[Record]) -> dict[str, str]:
        """What the rule says to every row that it can be tried on."""
        judge = self.tried or self.judge
        return {row: judge(records, row)[1] for row in (self.others or self.rows)(records)}


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
        return [(claim, *claim.finding(records)) for claim in all_claims(records)]


# The page.


def claims_page(records: list[Record]) -> str:
    """CLAIMS.md: findings, sizes, the rules, and what each rule says to every row on record.

    Args:
        records: all that there are.

    Raises:
        ValueError: as `verdicts` does.
    """
    judged = verdicts(records)
    parts = [
        "# What the paper claims, and what we measured",
        "Each line is one claim. The paper's numbers are known to us through readers who quote them. " + _counts(judged) + ".",
        "## Findings",
        _table([j for j in judged if j[0].kind == FINDINGS]),
        "## Sizes",
        _table([j for j in judged if j[0].kind == SIZES]),
        "## The rules",
        HOW,
        "\n".join(f"- **{name}**. {text}" for name, text in RULES.items()),
        "## What each rule says to every row on record",
        "A rule that no row can fail shows nothing. Where a rule asks for more than is on record, it is tried here on what there is: "
        "the seeds that were run, and their validation loss. These are no verdicts.",
        power_table(records),
    ]
    if words := words_table(records):
        parts += ["The words that each row would have:", words]
    return "\n\n".join(parts)


HOW = (
    f"A difference in loss is an estimate with a {100 * CONFIDENCE:g} % interval. Two runs of one seed read the same text in the same "
    f"order, so they are paired. From {SEEDS} seeds on the interval is Student's, between seeds. With fewer it is taken over the articles "
    "of the test text, and says *these models*: another seed may differ by more. It is then the error of leaving out one article at a "
    "time, so it needs no random numbers.\n\n"
    f"*Below* and *above* mean that the interval excludes zero. *Level* means that it lies within {MARGIN:g} nats on both sides. "
    "Anything else is *not resolved*. Without any difference, *below* or *above* is said in 5 % of trials; a test simulates it.\n\n"
    "A row is judged at the setting that the validation text prefers, and the page says of how many. The result is read from the test "
    f"text, once. The seed that chose judges only where fewer than {SEEDS} others were run. A run that diverged counts against its row. "
    "Validation losses that chose a rate never judge."
)


def render(records: list[Record]) -> str:
    """The page, as the command `claims` prints it.

    Args:
        records: all that there are.
    """
    return claims_page(records)


def sentences(records: list[Record]) -> str:
    """The table of what the paper claims in words, and the count of all verdicts under it.

    Args:
        records: all that there are.
    """
    judged = verdicts(records)
    return f"{_table([j for j in judged if j[0].kind == FINDINGS])}\n\n{_counts(judged)}."


def power_table(records: list[Record]) -> str:
    """For each claim of a rule of its own, which rows on record the rule fails, leaves open and lets pass.

    Args:
        records: all that there are.
    """
    tried: dict[tuple[str, str], dict[str, str]] = {}
    why: dict[tuple[str, str], str] = {}
    for claim in all_claims(records):
        tried.setdefault((claim.rule, claim.trial), {}).update(claim.on_every_row(records))
        why[claim.rule, claim.trial] = claim.none_can
    rows = [
        [rule, trial, _names(said, FAILED) or why[rule, trial], _names(said, UNRESOLVED), _names(said, REPRODUCED)]
        for (rule, trial), said in tried.items()
        if said
    ]
    return markdown(["rule", "tried on", "would fail", "leaves open", "lets pass"], rows)


def words_table(records: list[Record]) -> str:
    """Which word each row of Tables 2 and 3 would have beside the table's base, from the seeds that were run; empty without runs.

    Args:
        records: all that there are.
    """
    words = (BELOW, LEVEL, ABOVE, UNRESOLVED)
    rows = []
    for experiment, budget in BUDGETS.items():
        runs = _judged_runs(records, experiment)
        said = {
            row: estimate.word if (estimate := _estimate(own, runs[budget.base][0])) else UNRESOLVED
            for row, (own, _) in runs.items()
            if row != budget.base and budget.base in runs
        }
        if said:
            rows.append([f"{budget.title}, beside {budget.base}", *(_names(said, word) for word in words)])
    return markdown(["rows", *words], rows) if rows else ""


def _names(said: dict[str, str], verdict: str) -> str:
    """The rows with this verdict; of more than ten how many there are."""
    rows = [row for row, its in said.items() if its == verdict]
    return f"{len(rows)} of {len(said)}" if len(rows) > 10 else "; ".join(rows)


def _short(row: str) -> str:
    return row.removeprefix("Tucker ")


def _table(judged: list[tuple[Claim, str, str]]) -> str:
    rows = [[c.where, c.says, measured, verdict, c.rule] for c, measured, verdict in judged]
    return markdown(["claim", "paper", "measured", "verdict", "rule"], rows)


def _counts(judged: list[tuple[Claim, str, str]]) -> str:
    """ "30 of 33 sizes reproduced (3 not reproduced), 3 of 6 findings ..."."""
    said = []
    for kind in (SIZES, FINDINGS):
        found = [verdict for claim, _, verdict in judged if claim.kind == kind]
        rest = ", ".join(f"{found.count(verdict)} {verdict}" for verdict in VERDICTS[1:] if verdict in found)
        said.append(f"{found.count(REPRODUCED)} of {len(found)} {kind} reproduced" + (f" ({rest})" if rest else ""))
    return "; ".join(said)


# Sizes.


def _formula_claims(records: list[Record]) -> list[Claim]:
    """Table 1: module and cache must hold exactly as many numbers as the formulas say."""
    table1 = _sizes(records, "table1")

    def claim(row: dict, what: str, formula: int, counted: int) -> Claim:
        found = f"{counted:,} counted", REPRODUCED if formula == counted else FAILED
        return _cell_claim(f"Table 1, {row['label']}, {what}", f"{formula:,} by formula", "formula", found)

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
                paper, ours = row["paper"][column], measure(row, recorded[0].config)
                verdict = REPRODUCED if abs(ours / paper - 1) <= SIZE_TOLERANCE else FAILED
                where = f"Table {experiment[-1]}, {row['label']}, {title}"
                claims.append(_cell_claim(where, f"{paper:g}", "size", (f"{ours:.2f} ({difference(ours, paper)})", verdict)))
    return claims


def _cell_claim(where: str, says: str, rule: str, found: Finding) -> Claim:
    none_can = (
        "none can: formula and module agree in all of them; a layer with biases would fail" if rule == "formula" else "none"
    )
    return Claim(
        where, says, rule, lambda records, row: found, lambda records: [where], "cells of Tables 1-3", SIZES, none_can=none_can
    )


def _sizes(records: list[Record], experiment: str) -> list[Record]:
    return [r for r in records if r.experiment == experiment and r.preset == "sizes"]


def _labels(experiment: str) -> Callable[[list[Record]], Sequence[str]]:
    """The rows whose sizes are on record."""
    return lambda records: [row["label"] for r in _sizes(records, experiment)[-1:] for row in sizes_of([r])]


def _share(experiment: str, of: str, low: float, high: float) -> Callable[[list[Record], str], Finding]:
    """Judge: a row's attention parameters as a share of those of `of`, in per cent, in [low, high]."""

    def judge(records: list[Record], row: str) -> Finding:
        recorded = _sizes(records, experiment)
        if not recorded:
            return "no record", UNTESTED
        parameters = {r["label"]: r["parameters"] for r in sizes_of(recorded)}
        share = 100 * parameters[row] / parameters[of]
        return f"{share:.1f} %", REPRODUCED if low <= share <= high else FAILED

    return judge


# Losses.


def _judged_runs(records: list[Record], experiment: str) -> dict[str, tuple[list[Record], str]]:
    """The runs that judge each row of a table, and in words which they are: those that read a test text, else none but what there is."""
    fresh = of_one_budget(runs_of(records, experiment, "gpu-fresh"))
    if any(on_test_text(r) for r in fresh):
        best = at_their_best(fresh)
        return {row: (own.runs, f"best of {own.settings} settings") for row, own in best.items()}
    return {row: (runs, "") for row, runs in settled(records, experiment).items()}


def _loss(experiment: str, base: str, allowed: Callable[[float], tuple[float, float]], tried: bool = False):
    """Judge: a row's loss minus that of `base`, in nats.

    allowed: loss of the base -> the least and the largest difference that the claim allows;
    tried: on validation text and on as many seeds as there are, where the rule itself asks for more.
    """

    def judge(records: list[Record], row: str) -> Finding:
        runs = _judged_runs(records, experiment)
        if row not in runs or base not in runs:
            return NO_RUN
        (own, settings), (other, _) = runs[row], runs[base]
        if verdict := broken(own, other):
            return f"{base if verdict == UNRESOLVED else row} diverged", verdict
        share = own[0].attention_parameters / other[0].attention_parameters
        with_share = f"with {share:.0%} of its parameters"
        if (estimate := _estimate(own, other)) is None:
            return f"one seed, {with_share}", UNRESOLVED
        said = ", ".join(filter(None, (f"{_interval(estimate)} nats {with_share}", estimate.over, settings)))
        level = statistics.mean((on_test_text(r) or {"loss": r.metrics["validation_loss"]})["loss"] for r in other)
        return said, estimate.verdict(*allowed(level)) if tried or loss_difference(own, other) else UNRESOLVED

    return judge


def _estimate(own: list[Record], other: list[Record]) -> Estimate | None:
    """From test text where there is enough; else from the seeds that there are, on the validation text that chose their rates."""
    if estimate := loss_difference(own, other):
        return estimate
    estimate = None if broken(own, other) else metric_difference(own, other, "validation_loss", seeds=2)
    return estimate and replace(estimate, over=f"{estimate.over}, validation text")


def _interval(estimate: Estimate, factor: float = 1, digits: int = 3) -> str:
    """ "+0.020 (-0.022 to +0.062)"."""
    value, low, high = (f"{factor * x:+.{digits}f}" for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def _no_worse(level: float) -> tuple[float, float]:
    return -math.inf, MARGIN


def _one_to_three_per_cent(level: float) -> tuple[float, float]:
    return 0.01 * level, 0.03 * level


def _loss_claim(where: str, says: str, experiment: str, row: str, base: str, rule: str = "loss", **more) -> Claim:
    allowed = _no_worse if rule == "loss" else _one_to_three_per_cent
    return Claim(
        where,
        says,
        rule,
        _loss(experiment, base, allowed),
        lambda records: [row],
        f"rows of {BUDGETS[experiment].title}, beside {base}",
        others=lambda records: [label for label in _judged_runs(records, experiment) if label != base],
        tried=_loss(experiment, base, allowed, tried=True),
        **more,
    )


# Accuracies.


def _vision_runs(records: list[Record]) -> dict[str, list[Record]]:
    """Fine-tuned models by row and, where there are several, rate, on the images with the most classes."""
    runs = [r for r in records if r.experiment == "figure3" and r.preset.startswith("gpu") and r.is_trained]
    most = max((r.data["classes"] for r in runs), default=0)
    runs = largest(alike([r for r in runs if r.data["classes"] == most]))
    rates = {r.rate for r in runs}
    return grouped(runs, lambda r: f"{r.method} at {r.rate:g}" if len(rates) > 1 else r.method)


def _of_a_tenth(rival: str) -> Callable[[list[Record]], Sequence[str]]:
    """Tucker rows with about a tenth of the rival's attention parameters."""

    def rows(records: list[Record]) -> list[str]:
        runs = _vision_runs(records)
        size = next((group[0].attention_parameters for group in runs.values() if group[0].method == rival), math.inf)
        shares = {
            row: group[0].attention_parameters / size for row, group in runs.items() if group[0].method.startswith("Tucker")
        }
        return [row for row, share in shares.items() if TENTH[0] <= share <= TENTH[1]]

    return rows


def _accuracy(rival: str, metric: str, tried: bool = False) -> Callable[[list[Record], str], Finding]:
    """Judge: a row's accuracy minus the rival's, at every rate of the rival.

    tried: on images of however few classes.
    """

    def judge(records: list[Record], row: str) -> Finding:
        runs, tries = _vision_runs(records), max(1, len(_of_a_tenth(rival)(records)))
        found = [_accuracies(runs[row], other, metric, tries, tried) for other in runs.values() if other[0].method == rival]
        return "; ".join(said for said, _ in found), together(verdict for _, verdict in found)

    return judge


def _accuracies(own: list[Record], other: list[Record], metric: str, tries: int, tried: bool) -> Finding:
    if verdict := broken(own, other):
        return f"{other[0].method if verdict == UNRESOLVED else own[0].method} diverged", verdict
    share, classes = own[0].attention_parameters / other[0].attention_parameters, own[0].data["classes"]
    top5, top1 = (metric_difference(own, other, name, tries) for name in ("top5", "top1"))
    if top5 is None or top1 is None:
        return f"fewer than {SEEDS} seeds", UNTESTED
    judged = (top5 if metric == "top5" else top1).verdict(-POINT, math.inf)
    said = f"top-5 {_interval(top5, 100, 1)}, top-1 {_interval(top1, 100, 1)} points with {share:.0%} of its parameters"
    return f"{said}, {top5.over}, {classes} classes", judged if classes >= CLASSES or tried else UNRESOLVED


def _accuracy_claim(rival: str) -> Claim:
    return Claim(
        "Fig. 3, ViT",
        f"comparable accuracy with almost 10x fewer attention parameters than {rival}",
        "accuracy",
        _accuracy(rival, "top5"),
        _of_a_tenth(rival),
        f"top-1 of ten classes, beside {rival}",
        every=False,
        others=lambda records: [row for row, runs in _vision_runs(records).items() if runs[0].method != rival],
        tried=_accuracy(rival, "top1", tried=True),
    )


# Spectra.


def effective_rank(values: Sequence[float], power: int) -> float:
    """exp of the entropy of singular values to a power, made to sum to one: 1 where they give the usual measure, 2 for their energy.

    Args:
        values: singular values, in any unit.
        power: 1 or 2.
    """
    weights = [value**power for value in values]
    shares = [weight / sum(weights) for weight in weights]
    return math.exp(-sum(share * math.log(share) for share in shares if share > 0))


def _spectra(records: list[Record], tried: bool = False) -> dict[str, list[dict]]:
    """Layers of trained models by row: those of Table 2's budget or, to try the rule, all of them."""
    steps = BUDGETS["table2"].preset.train.steps
    layers: dict[str, list[dict]] = {}
    for r in records:
        if r.experiment == "spectra" and r.is_trained and (tried or (r.preset, r.steps) == ("gpu", steps)):
            layers.setdefault(r.method + (f" ({r.preset})" if tried else ""), []).extend(r.metrics["trained"])
    return layers


def _decay(records: list[Record], row: str, tried: bool = False) -> Finding:
    """Judge: effective ranks of the head modes of both tensors over n_H, means over layers and seeds, by both measures."""
    layers = _spectra(records, tried).get(row)
    if not layers:
        return NO_RUN
    said, found = [], []
    for side in layers[0]:
        heads = [layer[side]["head"] for layer in layers]
        shares = [sum(effective_rank(h["values"], power) / h["size"] for h in heads) / len(heads) for power in (1, 2)]
        said.append(f"{shares[0]:.0%} and {shares[1]:.0%} of n_H {'before' if side == 'pre' else 'after'} the softmax")
        below = [share <= CLEAR_DECAY for share in shares]
        found.append(REPRODUCED if all(below) else UNRESOLVED if any(below) else FAILED)
    return f"{', '.join(said)} (from the values, from their squares)", together(found)


# Times.


def _step_time(records: list[Record], row: str) -> Finding:
    """Judge: a training step of the true 1B shape beside multi-head attention's and GQA-8's."""
    times = step_times(records)
    bases = [base for base in ("MHA", "GQA n_KV=8") if base in times and base != row]
    if row not in times or not bases:
        return NO_RUN
    changes = {base: times[row] / times[base] - 1 for base in bases}
    held = [FASTER[0] <= change <= FASTER[1] for change in changes.values()]
    verdict = REPRODUCED if all(held) else UNRESOLVED if any(held) else FAILED
    said = ", ".join(f"{100 * change:+.1f} % beside {base}" for base, change in changes.items())
    return f"{_short(row)} {said}, one GPU", verdict


def _fastest(records: list[Record]) -> list[str]:
    """Of Table 3's Tucker rows, the one with the shortest step."""
    times = step_times(records)
    return sorted((row for row in TUCKER3 if row in times), key=times.__getitem__)[:1]


TUCKER2 = tuple(row.label for row in TABLE2 if row.mechanism == "Tucker")
TUCKER3 = tuple(row.label for row in TABLE3 if row.mechanism == "Tucker")


def _share_claim(where: str, says: str, experiment: str, rows: tuple[str, ...], of: str, low: float, high: float) -> Claim:
    trial = f"rows of {BUDGETS[experiment].title}: {low:g}-{high:g} % of {of}'s"
    judge = _share(experiment, of, low, high)
    return Claim(where, says, "share", judge, lambda records: rows, trial, SIZES, others=_labels(experiment))


SENTENCES = (
    _share_claim("Sec. 4.2, [8,128,64]", "about 18 % of MHA's parameters", "table2", TUCKER2[1:2], "MHA", 17.5, 18.5),
    _share_claim("Sec. 4.2, [8,128,64]", "about 39 % of MLA's parameters", "table2", TUCKER2[1:2], "MLA shared d_c=128", 38.5, 39.5),
    _share_claim("Sec. 4.2, [8,64,64]", "up to 9x fewer (we read: than MHA), 10.5-11.8 %", "table2", TUCKER2[2:], "MHA", 10.5, 11.8),
    _share_claim("LLaMA text", "about 10-20 % of GQA-8's parameters (9.5-20.5 %)", "table3", TUCKER3, "GQA n_KV=8", 9.5, 20.5),
    _loss_claim("Abstract", "[32,64,64]: comparable to GQA, with a tenth of the parameters", "table3", TUCKER3[2], "GQA n_KV=8"),
    _loss_claim("Abstract", "[32,64,64]: comparable to MLA, with a tenth", "table3", TUCKER3[2], "MLA separated d_c=128"),
    _loss_claim(
        "Abstract", "[32,64,64]: comparable to MLA with a shared latent, with a tenth", "table3", TUCKER3[2], "MLA shared d_c=128",
        none_can="none: of these rows it has the highest loss on record",
    ),
    _loss_claim("Sec. 4.2, GPT-2", "[8,128,64]: competitive with MHA", "table2", TUCKER2[1], "MHA"),
    _loss_claim(
        "Sec. 4.2, GPT-2", "[8,128,64]: competitive with MLA", "table2", TUCKER2[1], "MLA shared d_c=128",
        none_can="none: the rows that end far above MLA were run with one seed, which gives no interval",
    ),
    *(
        _loss_claim("LLaMA text", f"{_short(row)}: loss only 1-3 % above GQA-8's", "table3", row, "GQA n_KV=8", "1-3 %")
        for row in TUCKER3
    ),
    Claim(
        "LLaMA text", "training iteration time down by up to 20 %", "time", _step_time, _fastest,
        "rows of Table 3, beside MHA and GQA n_KV=8",
        others=lambda records: [row for row in step_times(records) if row != "MHA"],
    ),
    _accuracy_claim("GQA n_KV=6"),
    _accuracy_claim("MLA shared d_c=128"),
    Claim(
        "Spectra figure", "singular values of all unfoldings of a trained GPT-2 decay clearly, head mode included", "decay",
        _decay, lambda records: ["MHA"], "all trained layers on record", others=lambda records: list(_spectra(records, tried=True)),
        tried=functools.partial(_decay, tried=True),
    ),
)  # fmt: skip
