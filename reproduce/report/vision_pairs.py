"""Two questions beside Figure 3: does it matter how a row is started, and do unequal ranks pay? By a rule that stood before its runs.

A row is set beside the same one started from the HOSVD, or a row with unequal ranks beside the one of its size with equal ranks. Each
stands at the rate that is best by held-out top-5; seeds 1 to 5 judge, paired by seed and by image, as everywhere in Figure 3. What counts
is top-5 after fine-tuning; what it was before is shown, and top-1.

* Intervals are wider by so much that all rows of one start, or all with unequal ranks, hold together (Bonferroni).
* A row is "above" or "below" where its interval excludes zero, "level" where it lies within a point on both sides, else "not
  resolved". One that diverged is "below".
* A start, or making ranks unequal, *helps* where some row is above and none is below, *harms* where some is below and none above,
  *depends on the row* where there are both. It *changes nothing* where all rows are level. Anything else is not resolved, and rows that
  are not run yet leave the question open.
"""

from ..experiments import figure3_tiny
from ..store.records import Record
from ..train.options import STARTS as STARTED
from .cells import with_interval
from .judge import (
    ABOVE,
    BELOW,
    FAILED,
    LEVEL,
    POINT,
    SEEDS,
    UNRESOLVED,
    Best,
    accuracy,
    accuracy_difference,
    at_their_best,
    broken,
)
from .markdown import Table, markdown
from .query import diverged, grouped
from .vision import percent, reached, several_starts, studies
from .words import STARTS, divergence, each_once

ANEW, UNEQUAL = "Figure 3, starts", "Figure 3, unequal ranks"  # the tables, and the parts of a page that hold them
HEADER = [
    "row", "beside", "rates", "top-5 %, converted only", "minus the other's", "top-5 %, fine-tuned", "minus the other's", "that is",
    "top-1 %, fine-tuned", "minus the other's",
]  # fmt: skip
Pairs = dict[str, tuple[Best, Best]]  # by row: its runs, and those that they are set beside


def paired_tables(records: list[Record]) -> list[Table]:
    """Of each study the rows that were started in two ways, and those with unequal ranks.

    Args:
        records: of one preset of Figure 3.
    """
    return [table for runs in studies(records) for table in (*_anew(runs), *_unequal(runs))]


def _anew(runs: list[Record]) -> list[Table]:
    """Rows that were started in another way, beside themselves."""
    preset = figure3_tiny.PRESETS[runs[0].preset]
    best = {start: at_their_best(own) for start, own in grouped(runs, lambda r: r.config.get("start", "hosvd")).items()}
    plain, lines, answers, compared = best.pop("hosvd", {}), [], [], []
    for start, its in best.items():
        pairs = {row + STARTED[start]: (own, plain[row]) for row, own in its.items() if row in plain}
        there = len(preset.started(start))
        lines += _lines(pairs, there)
        answers.append(f"- To start from {STARTS[start]}: {answer(pairs, there)}.")
        compared += _runs(pairs)
    title = "**Other starts beside the HOSVD.**"
    return [_table(ANEW, title, lines, answers, compared)] if lines else []


def _unequal(runs: list[Record]) -> list[Table]:
    """Rows with half of the query rank at the output, beside those of their size with equal ranks."""
    partner = figure3_tiny.PRESETS[runs[0].preset].of_equal_ranks()
    best = at_their_best([r for r in runs if "start" not in r.config])
    pairs = {row: (best[row], best[other]) for row, other in partner.items() if {row, other} <= best.keys()}
    title = "**Unequal ranks beside equal ones of the same size.**"
    answers = [f"- To make ranks unequal: {answer(pairs, len(partner))}."]
    return [_table(UNEQUAL, title, _lines(pairs, len(partner)), answers, _runs(pairs))] if pairs else []


def answer(pairs: Pairs, there: int) -> str:
    """By the rule of this module.

    Args:
        pairs: those that were run.
        there: how many the preset has.
    """
    words = [word(*pair, there) for pair in pairs.values()]
    if len(words) < there or "" in words:
        judged = len(words) - words.count("")
        return f"open, since {judged} of {there} rows have their {SEEDS} seeds"
    if ABOVE in words or BELOW in words:
        said = "depends on the row" if {ABOVE, BELOW} <= {*words} else "helps" if ABOVE in words else "harms"
        return f"**{said}** (of {there} rows {words.count(ABOVE)} above, {words.count(BELOW)} below)"
    return "**changes nothing**, within a point" if {*words} == {LEVEL} else "not resolved"


def word(own: Best, other: Best, there: int) -> str:
    """Of one row, fine-tuned; empty where too few seeds of both were run.

    Args:
        own, other: its runs, and those that they are set beside.
        there: how many rows hold together.
    """
    if verdict := broken(own.runs, other.runs):
        return BELOW if verdict == FAILED else UNRESOLVED
    estimate = accuracy_difference(own.runs, other.runs, "top5", there)
    return estimate.word_within(POINT) if estimate else ""


def _lines(pairs: Pairs, there: int) -> list[list[str]]:
    lines = []
    for row, (own, other) in pairs.items():
        rates = each_once(f"{best.runs[0].rate:g}" for best in (own, other))
        cells = [row, other.runs[0].method, rates, *_cells(own, other, "top5", there, converted=True)]
        lines.append([*cells, *_cells(own, other, "top5", there), word(own, other, there), *_cells(own, other, "top1", there)])
    return lines


def _cells(own: Best, other: Best, name: str, there: int, *, converted: bool = False) -> list[str]:
    """An accuracy, and how far it is from the other's."""
    if not converted and diverged(own.runs):
        return [divergence(own.runs), ""]
    metrics = [r.metrics["converted"] if converted else r.metrics for r in own.runs]
    own_cell = reached(accuracy(own.runs, name, converted=converted), percent(name, metrics))
    beside = accuracy_difference(own.runs, other.runs, name, there, converted=converted)
    return [own_cell, with_interval(beside, 100, 1) if beside else ""]


def _runs(pairs: Pairs) -> list[Record]:
    return [r for pair in pairs.values() for best in pair for r in best.runs]


def _table(name: str, title: str, lines: list[list[str]], answers: list[str], runs: list[Record]) -> Table:
    how = (
        f"{title} Paired by seed and by image; each row at the rate that is best by held-out top-5. In brackets 95 % intervals, in points: "
        "those of differences are so wide that all rows of one start, or all with unequal ranks, hold together. The words follow a rule "
        "that stood before the runs."
    )
    return Table(name, how, markdown(HEADER, lines), runs, "\n".join(answers) + several_starts(runs))
