"""What the first page says came out: one table, and six verdicts of one sentence each."""

import statistics

from ..store.records import Record
from .cells import above_cell
from .claims import verdicts
from .exactness import comparisons, worst_error
from .findings import head_ranks
from .judge import FAILED, REPRODUCED, UNRESOLVED, UNTESTED, metric_difference, together
from .markdown import markdown
from .query import BUDGETS, complete, diverged, grouped, losses_of, mean_loss, megabytes, runs_of, settled, step_times
from .words import percent, tokens_of

SEEDS = 3  # a row with fewer has no place in the headline
WORDS = {REPRODUCED: "Holds.", FAILED: "Fails here.", UNRESOLVED: "Not resolved.", UNTESTED: "Not tested."}
EXACT = 1e-12  # relative error in float64
ROW, SMALL, SMALL_VIT = "Tucker [8,128,64]", "Tucker [32,64,64]", "Tucker [12,20,20]"


def headline(records: list[Record]) -> str:
    """Table 2's rows with enough seeds beside multi-head attention, from the largest to the smallest.

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
            gap = metric_difference(runs, base, "validation_loss", seeds=2)
            word = "" if runs is base or gap is None else gap.word
            loss = f"{statistics.mean(losses_of(runs)):.3f}"
            lines.append([row, *(f"{100 * share:.0f}" for share in shares), loss, above_cell(runs, base), word])
    title = f"**GPT-2 at the paper's shape, REDUCED BUDGET: {tokens_of(base)}, {SEEDS} seeds a row.** Each has its best rate."
    sizes = [f"attention, % of {parameters / 1e6:.1f}M", f"cache, % of {cache:.1f} MB"]
    header = ["row", *sizes, "loss", f"minus {BUDGETS['table2'].base}'s [95 %]", "verdict"]
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


def _word(judged: Judged, *claims: tuple[str, str]) -> str:
    """The verdict on some claims together, each named by its place and words that it has in it."""
    found = [[v for place, words, v in judged if place == where and says in words] for where, says in claims]
    verdict = together(verdict for (verdict,) in found)
    return f"**{WORDS[verdict]}**"


def _exact(records: list[Record], judged: Judged) -> str:
    runs = runs_of(records, "exactness", "float64")
    if not runs:
        return ""
    word = REPRODUCED if worst_error(runs) <= EXACT else FAILED
    return (
        f"**{WORDS[word]}** Multi-head, grouped-query and latent attention are exact special cases: worst of {comparisons(runs):,} "
        f"comparisons {worst_error(runs):.0e}."
    )


def _sizes(records: list[Record], judged: Judged) -> str:
    sizes = [verdict for where, _, verdict in judged if where.startswith("Table")]
    right = sizes.count(REPRODUCED)
    if not sizes:
        return ""
    word = WORDS[REPRODUCED] if 2 * right > len(sizes) else WORDS[FAILED]
    return f"**{word}** {right} of {len(sizes)} sizes in Tables 1-3 are as printed; the others are in [ERRATA.md](ERRATA.md)."


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
    vit = grouped(runs_of(records, "figure3", "gpu"), lambda r: r.method)
    if not (mean_loss(runs) and mean_loss(base) and vit.keys() >= {SMALL_VIT, "GQA n_KV=6"}):
        return ""
    ours, theirs = (100 * statistics.mean(r.metrics["top1"] for r in vit[row]) for row in (SMALL_VIT, "GQA n_KV=6"))
    return (
        f"{_word(judged, ('Abstract', 'to GQA'), ('Fig. 3, ViT', 'than GQA'))} At a tenth of GQA's parameters a small Llama's loss is "
        f"{_above(runs, base)} GQA's, a small ViT's accuracy {theirs - ours:.1f} points below."
    )


def _faster(records: list[Record], judged: Judged) -> str:
    times = step_times(records)
    tucker = [ms for row, ms in times.items() if row.startswith("Tucker")]
    if not tucker or "MHA" not in times:
        return ""
    return (
        f"{_word(judged, ('LLaMA text', 'iteration time'))} Training steps “up to 20 % faster”: the fastest Tucker row of LLaMA3-1B takes "
        f"{percent(1 - min(tucker) / times['MHA'])} less time than MHA."
    )


def _heads(records: list[Record], judged: Judged) -> str:
    ranks = head_ranks(records)
    if not ranks:
        return ""
    values, squares = (statistics.mean(measure) for measure in zip(*ranks.values()))
    return (
        f"{_word(judged, ('Spectra figure', 'head mode'))} “The head mode decays”: a GPT-2's heads have an effective rank of "
        f"{percent(values)} of their number, or of {percent(squares)} by squares."
    )
