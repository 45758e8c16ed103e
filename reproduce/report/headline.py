"""What the first page says came out: one table, and six verdicts of one sentence each."""

import statistics

from ..store.records import Record
from .best import BASE, judged_at_best, judged_narrower, tokens_per_parameter
from .cells import above_cell, difference_cells
from .claims import verdicts
from .exactness import comparisons, worst_error
from .findings import TIMED_BESIDE, Pair, beside, best_vision_runs, decayed, decays, mode_ranks, of_a_tenth
from .fresh import test_loss_cell
from .judge import FAILED, MARGIN, REPRODUCED, UNRESOLVED, UNTESTED, Best, test_losses, together
from .ledger import SIZE_TOLERANCE, short
from .markdown import markdown
from .query import (
    BUDGETS,
    diverged,
    grouped,
    losses_of,
    megabytes,
    rates_of,
    runs_of,
    settled,
    sizes_of,
    step_times,
    timed_steps,
)
from .since import of_older_code
from .words import percent, tokens_of

SEEDS = 3  # a row with fewer has no place in the headline
WORDS = {REPRODUCED: "Holds.", FAILED: "Fails here.", UNRESOLVED: "Not resolved.", UNTESTED: "Not tested."}
PARTLY = "Partly."  # of several claims some are reproduced and the others are not
SPECIAL_CASES = (  # all that compare cells of `exactness`
    ("Thm B.2", "is a Tucker"), ("Thm B.3", "are Tucker"), ("Thm B.4", "is a Tucker"), ("Cor. 3.2.1", "second path"),
    ("beyond the paper", "with biases"), ("beyond the paper", "with norms"),
)  # fmt: skip
LEAST = "Tucker [8,128,128]"  # of the Tucker rows it ends lowest
ROW, SMALL, LARGE = "Tucker [8,128,64]", "Tucker [32,64,64]", "GQA n_KV=8"
SMALL_VIT, RIVAL_VIT = "Tucker [12,20,20]", "GQA n_KV=6"


def headline(records: list[Record]) -> str:
    """Table 2's rows with enough seeds beside multi-head attention, from the largest to the smallest.

    Each at its best on a test text, where enough seeds read one. Else at the preset `gpu`, with intervals alone: validation losses of
    three seeds judge nothing in the ledger, so they have no word here.

    Args:
        records: all that there are.

    Returns:
        A title and a table, empty without runs.
    """
    if best := judged_at_best(records):
        return _at_best(best, judged_narrower(records))
    groups = {row: runs for row, runs in settled(records, "table2").items() if len(runs) >= SEEDS and not diverged(runs)}
    base = groups.get(BUDGETS["table2"].base)
    if not base:
        return ""
    lines = []
    for row, runs in sorted(groups.items(), key=lambda item: (item[1] is not base, -item[1][0].attention_parameters)):
        lines.append([row, *_shares(runs[0], base[0]), f"{statistics.mean(losses_of(runs)):.3f}", above_cell(runs, base)])
    rates = rates_of(records, "table2")
    counts = sorted(len(rates[row]) for row in groups)
    title = (
        f"**GPT-2 at the paper's shape, REDUCED BUDGET: {tokens_of(base)}, {SEEDS} seeds a row.** Each row at the best of {counts[0]} to "
        f"{counts[-1]} rates."
    )
    header = ["row", *_whole(base[0]), "loss", f"minus {BUDGETS['table2'].base}'s [95 % interval]"]
    return f"{title}\n\n{markdown(header, lines)}"


def _at_best(best: dict[str, Best], narrower: dict[str, Best]) -> str:
    base = best[BASE].runs
    lines = [
        [row, *_shares(own.runs[0], base[0]), test_loss_cell(own.runs), *difference_cells(own.runs, base)]
        for row, own in best.items()
    ]
    title = (
        f"**GPT-2 with Muon, each row at the best of {_tried(best)}, REDUCED BUDGET: {tokens_of(base)}, read once.** Test loss, nats per "
        "token."
    )
    header = ["row", *_whole(base[0]), "loss", f"minus {BASE}'s [95 %]", "that is"]
    if narrower:
        few, many = (tokens_per_parameter(rows[BASE].runs[0]) for rows in (best, narrower))
        title += (
            f"\nNarrower: a quarter of the width, {many:.2g} tokens for each of {BASE}'s parameters but the embedding's, not {few:.2g}. "
            f"Best of {_tried(narrower)}, {len(narrower[BASE].runs)} seeds."
        )
        header += [f"narrower: minus {BASE}'s", "that is"]
        for line in lines:
            line += difference_cells(narrower[line[0]].runs, narrower[BASE].runs) if line[0] in narrower else ["", ""]
    own, rivals = best[LEAST].runs, [row for row in best if row.startswith(("GQA", "MLA"))]
    beside = " ".join(f"{LEAST} minus {row}: {difference_cells(own, best[row].runs)[0]}." for row in rivals)
    return f"{title}\n\n{markdown(header, lines)}\n\n{beside}"


def _tried(best: dict[str, Best]) -> str:
    """How many settings the rows were tried at: "8 settings", "3 to 8 settings"."""
    return f"{' to '.join(map(str, sorted({own.settings for own in best.values()})))} settings"


def _whole(base: Record) -> list[str]:
    """Above the columns of `_shares`: what they are shares of."""
    return [f"attention parameters, % of {base.attention_parameters / 1e6:.1f}M", f"cache, % of {megabytes(base)[1]:.1f} MB"]


def _shares(run: Record, base: Record) -> list[str]:
    """Attention parameters and cache of a run, per cent of the base's."""
    shares = run.attention_parameters / base.attention_parameters, megabytes(run)[1] / megabytes(base)[1]
    return [f"{100 * share:.0f}" for share in shares]


def six_verdicts(records: list[Record]) -> str:
    """What the paper claims and what came of it here, a line each; what is not on record has none.

    Args:
        records: all that there are.
    """
    judged = [(claim.where, claim.says, verdict) for claim, _, verdict in verdicts(records)]
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
        f"{_word(judged, *SPECIAL_CASES)} MHA, GQA and MLA are [exact special cases](docs/exactness.md), "
        f"with biases, norms and RoPE too: {comparisons(runs):,} relative errors of at most {worst_error(runs):.0e}."
    )


def _sizes(records: list[Record], judged: Judged) -> str:
    cells = {where: verdict for where, _, verdict in judged if where.startswith("Table")}
    if not cells:
        return ""
    formulas, quoted = ([v for w, v in cells.items() if w.startswith("Table 1") == is_formula] for is_formula in (True, False))
    match = "All" if set(formulas) == {REPRODUCED} else f"{formulas.count(REPRODUCED)} of"
    agree = f"All {len(quoted)} [quoted sizes](CLAIMS.md#sizes) agree within"
    if FAILED in quoted:
        agree = f"Of {len(quoted)} [quoted sizes](CLAIMS.md#sizes) [{quoted.count(FAILED)} differ](ERRATA.md) by over"
    share = _found(judged, "LLaMA text", "10-20 %")
    parameters = {row["label"]: row["parameters"] for r in runs_of(records, "table3", "sizes") for row in sizes_of([r])}
    amiss = ""
    if share == FAILED and parameters.keys() >= {SMALL, LARGE}:
        amiss = f" {short(SMALL)}: {percent(parameters[SMALL] / parameters[LARGE], 1)} of GQA's, not “about 10-20 %”."
    return (
        f"**{said_of([*cells.values(), share])}** {match} {len(formulas)} formulas fit the code. {agree} {percent(SIZE_TOLERANCE, 1)}."
        f"{amiss}"
    )


def _competitive(records: list[Record], judged: Judged) -> str:
    pair = beside(records, "table2", BASE).get(ROW)
    own, level, where = _losses(pair, "muon-on-fresh-text", "table-2-gpt-2") if pair else ([], [], "")
    if not (pair and own and level):
        return ""
    share = pair.own[0].attention_parameters / pair.other[0].attention_parameters
    return (
        f"{_word(judged, ('Sec. 4.2, GPT-2', 'with MHA'))} [8,128,64] “competitive” with MHA: its [loss]({where}) is "
        f"{_above(own, level)}, with {percent(share)} of the parameters (our limit: {percent(MARGIN / statistics.mean(level), 1)})."
    )


def _losses(pair: Pair, judged: str, shown: str) -> tuple[list[float], list[float], str]:
    """Those by which a row and the one beside it are judged, and where they stand: on a test text if both read one.

    judged, shown: sections of test losses, and of validation losses.
    """
    own, level = test_losses(pair.own), test_losses(pair.other)
    if own and level:
        return own, level, f"docs/training.md#{judged}"
    return losses_of(pair.own), losses_of(pair.other), f"RESULTS.md#{shown}"


def _above(own: list[float], base: list[float]) -> str:
    share = statistics.mean(own) / statistics.mean(base) - 1
    return f"{percent(abs(share), 1)} {'above' if share >= 0 else 'below'}"


def _a_tenth(records: list[Record], judged: Judged) -> str:
    pair, vit = beside(records, "table3", LARGE).get(SMALL), _accuracies_at_a_tenth(records)
    if not (pair and not pair.verdict and vit):
        return ""
    own, level, where = _losses(pair, "llama-on-fresh-text", "table-3-llama")
    metric, classes, (ours, theirs) = vit
    return (
        f"{_word(judged, ('Abstract', 'to GQA'), ('Fig. 3, ViT', 'than GQA'))} A tenth of GQA's parameters: "
        f"[loss]({where}) {_above(own, level)} in a small Llama, a ViT's "
        f"[{metric}](RESULTS.md#figure-3-vision-transformers) {abs(theirs - ours):.1f} points {'below' if ours < theirs else 'above'} "
        f"({classes} classes)."
    )


def _accuracies_at_a_tenth(records: list[Record]) -> tuple[str, int, list[float]] | None:
    """The metric, how many classes there are, and per cent of a Tucker row and of GQA-6.

    Top-5 of the row that held-out images chose; without such images top-1 of one row.
    """
    vit, row, metric = grouped(runs_of(records, "figure3", "gpu"), lambda r: r.method), SMALL_VIT, "top1"
    if (best := best_vision_runs(records)) and (chosen := of_a_tenth(RIVAL_VIT)(records)):
        vit, row, metric = {label: own.runs for label, own in best.items()}, chosen[0], "top5"
    pair = [[r for r in vit.get(label, []) if metric in r.metrics] for label in (row, RIVAL_VIT)]
    if not all(pair):
        return None
    accuracies = [100 * statistics.mean(r.metrics[metric] for r in runs) for runs in pair]
    return f"{metric[:3]}-{metric[3:]}", pair[0][0].data["classes"], accuracies


def _faster(records: list[Record], judged: Judged) -> str:
    times = step_times(records)
    tucker = sorted((row for row in times if row.startswith("Tucker")), key=times.__getitem__)
    if not tucker or not times.keys() >= {*TIMED_BESIDE}:
        return ""
    mha, gqa = (percent(1 - times[tucker[0]] / times[base]) for base in TIMED_BESIDE)
    slowest = times[tucker[-1]] / times[TIMED_BESIDE[1]] - 1
    old = ", old code" if of_older_code(r for r, _ in timed_steps(records)) else ""
    return (
        f"{_word(judged, ('LLaMA text', 'iteration time'))} [Steps](docs/speed.md) in “up to 20 %” less time (H200{old}): at best "
        f"{mha} less than MHA's. Beside GQA-8's {gqa} less to {percent(slowest)} more."
    )


def _heads(records: list[Record], judged: Judged) -> str:
    ranks = mode_ranks(records)
    if not ranks:
        return ""
    heads = [shares for mode, shares in ranks.items() if mode.startswith("head")]
    values, squares = (percent(statistics.mean(measure)) for measure in zip(*heads))
    ours = sum(decays(shares) == REPRODUCED for shares in ranks.values())
    others = [verdicts.count(REPRODUCED) for verdicts in decayed(records).values()]
    beside = f" In others' models {'no more' if max(others) <= ours else f'up to {max(others)}'}." if others else ""
    return (
        f"{_word(judged, ('Spectra figure', 'head mode'))} All [unfoldings](docs/ranks.md) decay: {ours} of {len(ranks)} do "
        f"(GPT-2).{beside} Effective head rank {values} of n_H, by squares {squares}."
    )
