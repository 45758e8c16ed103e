"""Tables 2 and 3 as one GPU trained them: every row at its best rate, then runs at other settings."""

import statistics

from ..store.records import Record
from .cells import UNKNOWN, above_cell, logit_cell, loss_cell
from .markdown import Table, markdown
from .query import (
    BUDGETS,
    Budget,
    budget_of,
    diverged,
    grouped,
    megabytes,
    method_and_rate,
    rates_of,
    runs_of,
    settled,
    speeds_on_one_card,
    step_times,
    timed_steps,
)
from .since import of_older_code
from .words import passes_over, tokens_of

LOGITS = (
    "The largest logit was looked for in all layers and seeds at every 100th step. Hundreds are usual; thousands say that the attention of "
    "some layer has run away."
)


def budget_tables(records: list[Record], experiment: str) -> list[Table]:
    """The rows of one of the paper's tables at their best settings, then runs at other settings.

    Args:
        records: all that there are.
        experiment: "table2" or "table3".

    Returns:
        None, one or two.
    """
    groups = settled(records, experiment)
    shown = [r for group in groups.values() for r in group]
    kept = {id(r) for r in shown}
    others = [r for r in runs_of(records, experiment, "gpu") if id(r) not in kept]
    tables = [_settled_table(records, experiment, groups, shown)] if shown else []
    return tables + ([_others_table(BUDGETS[experiment], others)] if others else [])


def name_of(budget: Budget) -> str:
    """ "Table 2, one GPU"."""
    return f"{budget.title.split(',')[0]}, one GPU"


def _settled_table(records: list[Record], experiment: str, groups: dict[str, list[Record]], shown: list[Record]) -> Table:
    budget = BUDGETS[experiment]
    times = step_times(records) if experiment == "table3" else {}
    old = ", older code" if of_older_code(r for r, _ in timed_steps(records)) else ""
    runs = runs_of(records, experiment, "gpu")
    card, speeds = speeds_on_one_card([r for r in runs if r.steps == budget.preset.train.steps])
    lines = []
    for row in budget.rows:
        group = groups.get(row.label)
        time = [f"{times[row.label]:.0f}" if row.label in times else "not run yet"] if times else []
        if not group:
            lines.append([row.label, *["not run yet"] * 8, *time])
            continue
        ended = not diverged(group)
        bits = f"{statistics.mean(r.metrics['bits_per_byte'] for r in group):.3f}" if ended else ""
        speed = f"{speeds[row.label] / 1e3:.0f}" if row.label in speeds else "another card" if ended else ""
        sizes = [*(f"{megabytes:.2f}" for megabytes in megabytes(group[0])), f"{budget.rate(row.label):g}"]
        above = above_cell(group, groups.get(budget.base, []))
        lines.append([row.label, *sizes, loss_cell(group), above, bits, logit_cell(group), speed, *time])
    header = [
        "row", "attention MB", "KV cache MB", "rate", "validation loss", f"minus {budget.base}'s", "bits per byte",
        "largest logit", f"1,000 tokens/s, {card}", *([f"ms a step, LLaMA3-1B{old}"] if times else []),
    ]  # fmt: skip
    note = f"{LOGITS} {_rates_tried(budget, rates_of(records, experiment))}"
    return Table(name_of(budget), _scale(budget, shown), markdown(header, lines), shown, note)


def _rates_tried(budget: Budget, tried: dict[str, set[float]]) -> str:
    """How many rates each row had at this budget."""
    order = [row.label for row in budget.rows if row.label in tried]
    by_count = grouped(order, lambda row: len(tried[row]))
    said = [f"{count} rate{'s' * (count > 1)}: {'; '.join(rows)}" for count, rows in sorted(by_count.items())]
    return f"Rows had unequal numbers of rates here. {'. '.join(said)}."


def _others_table(budget: Budget, others: list[Record]) -> Table:
    order, rows = [row.label for row in budget.rows], []
    others = sorted(others, key=lambda r: order.index(r.method))
    settings = grouped(others, lambda r: (*method_and_rate(r), r.warmup, budget_of(r)))
    for (label, rate, warmup, (*_, steps)), group in settings.items():
        name = group[0].data["name"]
        rows.append([label, f"{rate:g}", f"{warmup}", f"{steps:,}", name, loss_cell(group), logit_cell(group)])
    itself = budget.title.partition(",")[0]
    title = f"**{budget.title}, at other settings.** Runs on another text or over other steps are not to be set beside {itself} itself."
    body = markdown(["row", "rate", "warm-up", "steps", "text", "validation loss", "largest logit"], rows)
    return Table(f"{name_of(budget)}, other settings", title, body, others)


def _scale(budget: Budget, runs: list[Record]) -> str:
    """The title of a table: what was trained, at which scale."""
    c, t = runs[0].config, budget.preset.train
    narrower = budget.preset.narrower
    reached = f"validation loss after {tokens_of(runs)}"
    shape = f"**{budget.title} at the paper's shape, REDUCED BUDGET: {reached}.**"
    rate = "Every row has the best of its rates here, where it had several."
    if narrower > 1:
        shape = (
            f"**{budget.title}, REDUCED SCALE, not the paper's: {reached}.** Width {c['d_model']:,}, {c['n_heads']} heads, {c['n_layers']} "
            f"layers. Contexts have {c['context']:,} tokens. Rows are named as in the paper; all widths and ranks but the head rank "
            f"are divided by {narrower}."
        )
        rate = "Every row has the rate that was best in GPT-2's sweep or, where others were tried, here."
    drawn = (
        f" Windows are drawn at random, {passes:.1f} tokens for each of the text's."
        if (passes := passes_over(runs)) > 1
        else ""
    )
    return (
        f"{shape} {t.steps:,} steps in place of {budget.paper_steps:,}, {t.warmup_steps} of them warm-up.{drawn} {rate}{budget.note} "
        f"{UNKNOWN}"
    )
