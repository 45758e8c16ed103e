"""What the first page says came out: one table, and six verdicts of one sentence each."""

import statistics

from ..store.records import Record
from .cells import above_cell
from .claims import verdicts
from .exactness import comparisons, worst_error
from .findings import TIMED_BESIDE, best_vision_runs, decays, mode_ranks, of_a_tenth
from .judge import FAILED, REPRODUCED, UNRESOLVED, UNTESTED, together
from .ledger import SIZE_TOLERANCE, short
from .markdown import markdown
from .query import BUDGETS, complete, diverged, grouped, losses_of, mean_loss, megabytes, runs_of, settled, sizes_of, step_times
from .words import percent, tokens_of

SEEDS = 3  # a row with fewer has no place in the headline
WORDS = {REPRODUCED: "Holds.", FAILED: "Fails here.", UNRESOLVED: "Not resolved.", UNTESTED: "Not tested."}
PARTLY = "Partly."  # of several claims some are reproduced and the others are not
SPECIAL_CASES = (  # all that compare cells of `exactness`
    ("Thm B.2", "is a Tucker"), ("Thm B.3", "are Tucker"), ("Thm B.4", "is a Tucker"), ("Cor. 3.2.1", "second path"),
    ("beyond the paper", "with biases"), ("beyond the paper", "with norms"),
)  # fmt: skip
ROW, SMALL, SMALL_VIT = "Tucker [8,128,64]", "Tucker [32,64,64]", "Tucker [12,20,20]"
RIVAL_VIT = "GQA n_KV=6"


def headline(records: list[Record]) -> str:
    """Table 2's rows with enough seeds beside multi-head attention, from the largest to the smallest.

    Intervals alone: validation losses of three seeds judge nothing in the ledger, so they have no word here.

    Args:
        records: all that there are.

    Returns:
        A title and a table, empty without runs.
    """
    with complete("table2.gpu.json: a record lacks what the first page shows"):
        groups = {row: runs for row, runs in settled(records, "table2").items() if len(runs) >= SEEDS and not diverged(runs)}
        base = groups.get(BUDGETS["table2"].base)
        if not base:
            return ""
        parameters, (_, cache) = base[0].attention_parameters, megabytes(base[0])
        lines = []
        for row, runs in sorted(groups.items(), key=lambda item: (item[1] is not base, -item[1][0].attention_parameters)):
            shares = (runs[0].attention_parameters / parameters, megabytes(runs[0])[1] / cache)
            loss = f"{statistics.mean(losses_of(runs)):.3f}"
            lines.append([row, *(f"{100 * share:.0f}" for share in shares), loss, above_cell(runs, base)])
    title = f"**GPT-2 at the paper's shape, REDUCED BUDGET: {tokens_of(base)}, {SEEDS} seeds a row.** Each has its best rate."
    sizes = [f"attention, % of {parameters / 1e6:.1f}M", f"cache, % of {cache:.1f} MB"]
    header = ["row", *sizes, "loss", f"minus {BUDGETS['table2'].base}'s [95 % interval]"]
    return f"{title}\n\n{markdown(header, lines)}"


def six_verdicts(records: list[Record]) -> str:
    """What the paper claims and what came of it here, a line each; what is not on record has none.

    Args:
        records: all that there are.
    """
    judged = [(claim.where, claim.says, verdict) for claim, _, verdict in verdicts(records)]
    with complete("a record lacks what the first page says"):
        lines = [say(records, judged) for say in (_exact, _sizes, _competitive, _a_tenth, _faster, _heads)]
    return "\n".join(f"- {line}" for line in lines if line)


Judged = list[tuple[str, str, str]]  # where the paper says it, what it says, the verdict


def said_of(verdicts_found: list[str]) -> str:
    """The word for some claims together.

    Args:
        verdicts_found: of each of them, at least one.
    """
    return PARTLY if {*verdicts_found} == {REPRODUCED, FAILED} else WORDS[together(verdicts_found)]


def _found(judged: Judged, where: str, says: str) -> str:
    """The verdict on one claim, named by its place and words that it has in it."""
    (verdict,) = [verdict for place, words, verdict in judged if place == where and says in words]
    return verdict


def _word(judged: Judged, *claims: tuple[str, str]) -> str:
    return f"**{said_of([_found(judged, where, says) for where, says in claims])}**"


def _exact(records: list[Record], judged: Judged) -> str:
    runs = runs_of(records, "exactness", "float64")
    if not runs:
        return ""
    return (
        f"{_word(judged, *SPECIAL_CASES)} Multi-head, grouped-query and latent attention are exact special cases: worst of "
        f"{comparisons(runs):,} comparisons {worst_error(runs):.0e}."
    )


def _sizes(records: list[Record], judged: Judged) -> str:
    cells = {where: verdict for where, _, verdict in judged if where.startswith("Table")}
    if not cells:
        return ""
    formulas, quoted = ([v for w, v in cells.items() if w.startswith("Table 1") == is_formula] for is_formula in (True, False))
    match, agree = (
        f"{'All' if all(v == REPRODUCED for v in found) else f'{found.count(REPRODUCED)} of'} {len(found)}"
        for found in (formulas, quoted)
    )
    rows = list(dict.fromkeys(where.split(", ")[1].split(" d_c")[0] for where, v in cells.items() if v == FAILED))
    missed = f", [not all](ERRATA.md) of {', '.join(rows) if len(rows) <= 3 else f'{len(rows)} rows'}" if rows else ""
    return (
        f"**{said_of(list(cells.values()))}** {match} formulas match the code. {agree} quoted sizes agree within "
        f"{percent(SIZE_TOLERANCE, 1)}{missed}."
    )


def _competitive(records: list[Record], judged: Judged) -> str:
    runs, base = (settled(records, "table2").get(row, []) for row in (ROW, "MHA"))
    if not (mean_loss(runs) and mean_loss(base)):
        return ""
    share = runs[0].attention_parameters / base[0].attention_parameters
    return (
        f"{_word(judged, ('Sec. 4.2, GPT-2', 'with MHA'))} [8,128,64] is “competitive” in GPT-2: loss {_above(runs, base)} "
        f"multi-head attention's, with {percent(share)} of its attention parameters."
    )


def _above(runs: list[Record], base: list[Record]) -> str:
    share = mean_loss(runs) / mean_loss(base) - 1
    return f"{percent(abs(share), 1)} {'above' if share >= 0 else 'below'}"


def _a_tenth(records: list[Record], judged: Judged) -> str:
    runs, base = (settled(records, "table3").get(row, []) for row in (SMALL, BUDGETS["table3"].base))
    sizes, vit = runs_of(records, "table3", "sizes"), _accuracies_at_a_tenth(records)
    if not (sizes and mean_loss(runs) and mean_loss(base) and vit):
        return ""
    parameters = {row["label"]: row["parameters"] for row in sizes_of(sizes)}
    share = percent(parameters[SMALL] / parameters[BUDGETS["table3"].base], 1)
    amiss = ", not “10-20 %”" if _found(judged, "LLaMA text", "10-20 %") == FAILED else ""
    metric, (ours, theirs) = vit
    return (
        f"{_word(judged, ('Abstract', 'to GQA'), ('Fig. 3, ViT', 'than GQA'))} {short(SMALL)} has {share} of GQA's parameters{amiss}. "
        f"Loss {_above(runs, base)}, a ViT's {metric} at a tenth {abs(theirs - ours):.1f} points "
        f"{'below' if ours < theirs else 'above'}."
    )


def _accuracies_at_a_tenth(records: list[Record]) -> tuple[str, list[float]] | None:
    """In per cent, of a Tucker row and of GQA-6: top-5 of the row that held-out images chose; without such images top-1 of one row."""
    vit, row, metric = grouped(runs_of(records, "figure3", "gpu"), lambda r: r.method), SMALL_VIT, "top1"
    if (best := best_vision_runs(records)) and (chosen := of_a_tenth(RIVAL_VIT)(records)):
        vit, row, metric = {label: own.runs for label, own in best.items()}, chosen[0], "top5"
    groups = [[r.metrics[metric] for r in vit.get(label, []) if metric in r.metrics] for label in (row, RIVAL_VIT)]
    return (f"{metric[:3]}-{metric[3:]}", [100 * statistics.mean(group) for group in groups]) if all(groups) else None


def _faster(records: list[Record], judged: Judged) -> str:
    times = step_times(records)
    tucker = sorted((row for row in times if row.startswith("Tucker")), key=times.__getitem__)
    if not tucker or not times.keys() >= {*TIMED_BESIDE}:
        return ""
    mha, gqa = (percent(1 - times[tucker[0]] / times[base]) for base in TIMED_BESIDE)
    return (
        f"{_word(judged, ('LLaMA text', 'iteration time'))} Steps “up to 20 % faster”: {short(tucker[0])}, best of {len(tucker)}, saves "
        f"{mha} beside MHA. Beside GQA-8 it saves {gqa}; {short(tucker[-1])} {percent(1 - times[tucker[-1]] / times[TIMED_BESIDE[1]])}."
    )


def _heads(records: list[Record], judged: Judged) -> str:
    ranks = mode_ranks(records)
    if not ranks:
        return ""
    heads = [shares for mode, shares in ranks.items() if mode.startswith("head")]
    values, squares = (percent(statistics.mean(measure)) for measure in zip(*heads))
    decayed = sum(decays(shares) == REPRODUCED for shares in ranks.values())
    return (
        f"{_word(judged, ('Spectra figure', 'head mode'))} “All unfoldings decay”: {decayed} of {len(ranks)} do. Heads have an effective "
        f"rank of {values} of their number, or of {squares} by squares."
    )
