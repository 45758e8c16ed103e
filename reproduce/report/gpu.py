"""Tables of how Table 2's rows train on one GPU with AdamW: learning rates, and what was changed in the training."""

from collections.abc import Callable

from ..experiments.ablations import CASES, CURES, ROW
from ..store.records import Record
from ..train.language import method_of
from ..train.recipes import Recipe
from .best import best_setting, settings_with_adamw
from .cells import BOLD, above_cell, bold_if_best, logit_cell, loss_cell
from .markdown import Table, markdown
from .query import (
    BUDGETS,
    budget_of,
    diverged,
    grouped,
    mean_loss,
    method_and_rate,
    of_one_budget,
    recipe_of,
    row_label,
    runs_of,
    sweep_runs,
)
from .words import change_of, seeds_in_words, tokens_of


def sweep_table(records: list[Record]) -> list[Table]:
    """Table 2's sweep: every row and warm-up by learning rate, each row's best in bold.

    Args:
        records: all that there are.
    """
    runs = sweep_runs(records)
    body, best = rates_table(runs, lambda r: f"{r.method}, warm-up {r.warmup}")
    title = (
        f"**Sweep of learning rate and warm-up for Table 2 at the paper's GPT-2 shape, REDUCED BUDGET: {tokens_of(runs)}, "
        f"{seeds_in_words(runs)}.** {BOLD}"
    )
    return [Table("Table 2, sweep", title, body, runs, f"{_order(best, runs)}{gaps(runs)}")]


def _order(best: dict[str, float], runs: list[Record]) -> str:
    """Rows from the lowest loss up; one that was tried at one warm-up alone says so."""
    tried = {row: sorted({r.warmup for r in runs if r.method == row}) for row in best}
    alone = {row: f" (warm-up {warmups[0]} alone)" if len(warmups) == 1 else "" for row, warmups in tried.items()}
    return f"From the lowest best loss up: {'; '.join(f'{row}{alone[row]}' for row in sorted(best, key=best.__getitem__))}."


def gaps(runs: list[Record]) -> str:
    """Why the sweep leaves out some rates.

    Args:
        runs: as `sweep_runs` gives them.

    Returns:
        A sentence, empty where nothing is left out or the reason does not hold.
    """
    ran = {(r.method, r.warmup, r.rate): mean_loss([r]) for r in runs}  # the loss, None of a run that diverged
    rates, shortest = {rate for _, _, rate in ran}, min(warmup for _, warmup, _ in ran)
    left_out = {(row, rate) for row, warmup, _ in ran for rate in rates if (row, warmup, rate) not in ran}

    def was_worse(row: str, rate: float) -> bool:
        short = {other: loss for other in rates if (loss := ran.get((row, shortest, other))) is not None}
        return rate in short and short[rate] > min(short.values())

    if not left_out or not all(was_worse(*cell) for cell in left_out):
        return ""
    return " Where a cell says not run, another rate had been better with the shorter warm-up."


def ablation_table(records: list[Record]) -> list[Table]:
    """What was changed in how one Tucker row is trained, by learning rate.

    Args:
        records: all that there are.
    """
    changed = of_one_budget(runs_of(records, "ablations", "gpu-sweep"))
    sweep = [r for r in runs_of(records, "table2", "gpu-sweep") if budget_of(r) == budget_of(changed[0])]
    known = set(map(method_and_rate, changed))
    rates, rows = {rate for _, rate in known}, (ROW, "MHA")
    plain = [r for r in sweep if r.method in rows and r.rate in rates and method_and_rate(r) not in known and r.warmup == 100]
    runs = sorted(plain + changed, key=lambda r: (row_label(r) != ROW, bool(recipe_of(r)), r.method))
    body, _ = rates_table(runs, lambda r: r.method)
    title = (
        f"**What makes {ROW} train well, REDUCED BUDGET: {tokens_of(runs)}, {seeds_in_words(runs)}.** One change at a time, or one and the "
        f"longer warm-up. {BOLD} Other rows stand beside it, with what is open to any row: the schedule and a slow attention."
    )
    notes = []
    for own in (r for r in changed if row_label(r) == ROW and not recipe_of(r)):
        twins = [r for r in sweep if (method_and_rate(r), r.warmup) == (method_and_rate(own), own.warmup)]
        if (loss := mean_loss(twins)) is not None:
            notes.append(
                f"The unchanged row was run at {own.rate:g} once more than in the sweep, where it ended at {loss:.3f}: "
                "where a run breaks down, it ends anywhere."
            )
    notes += _waiting(CASES, changed)
    return [Table("Changes to the training, sweep", title, body, runs, " ".join(notes))]


def cures_table(records: list[Record]) -> list[Table]:
    """What did good in the sweep, at Table 2's full budget, beside Table 2's runs without it at any rate.

    Args:
        records: all that there are.
    """
    cured = of_one_budget(runs_of(records, "ablations", "gpu"))
    changed, settings = {row_label(r) for r in cured}, (budget_of(cured[0]), cured[0].warmup)
    rows = [row.label for row in BUDGETS["table2"].rows if row.label in changed]
    plain = [r for r in runs_of(records, "table2", "gpu") if r.method in rows and (budget_of(r), r.warmup) == settings]
    groups = grouped(plain + cured, method_and_rate)
    methods = list(dict.fromkeys(method for method, _ in groups))
    lines = []
    for method, rate in sorted(groups, key=lambda key: (rows.index(row_label(groups[key][0])), methods.index(key[0]), key[1])):
        group = groups[method, rate]
        lines.append([method, f"{rate:g}", loss_cell(group), logit_cell(group)])
    title = f"**What makes it train well, at the budget of Table 2, REDUCED BUDGET: {tokens_of(cured)}, warm-up {cured[0].warmup}.**"
    body = markdown(["row", "rate", "validation loss", "largest logit"], lines)
    return [Table("Changes to the training, full budget", title, body, plain + cured, " ".join(_waiting(CURES, cured)))]


def best_table(records: list[Record]) -> list[Table]:
    """Each row at the best setting of all that were tried at Table 2's full budget, from the lowest loss up.

    Of a row's settings those with the most seeds are compared; rows with fewer seeds than others are left out.

    Args:
        records: all that there are.

    Returns:
        One, or none without a run.
    """
    settings = settings_with_adamw(records)
    best = {row: group for row, groups in settings.items() if (group := best_setting(groups))}
    if not best:
        return []
    seeds = max(map(len, best.values()))
    shown = sorted((row for row in best if len(best[row]) == seeds), key=lambda row: mean_loss(best[row]))
    base, lines, runs = BUDGETS["table2"].base, [], [r for row in shown for group in settings[row] for r in group]
    for row in shown:
        group, tried = best[row], len(settings[row])
        cells = [row, f"{group[0].metrics['attention_parameters'] / 1e6:.2f}M", change_of(group[0]), f"{group[0].rate:g}"]
        cells += [loss_cell(group), above_cell(group, best[base]) if base in shown else "", logit_cell(group)]
        lines.append([*cells, f"{tried} ({sum(len(other) == seeds for other in settings[row])})"])
    title = (
        f"**Every row at the best of its settings (rates and changes) that were run with {seeds} seeds at the budget of Table 2, REDUCED "
        f"BUDGET: {tokens_of(runs)}.**"
    )
    lower = [
        group for row in shown for group in settings[row] if not diverged(group) and mean_loss(group) < mean_loss(best[row])
    ]
    left_out = [f"{group[0].method} at {group[0].rate:g} ended at {loss_cell(group)}" for group in lower]
    note = (
        "The more settings there were the better the best one looks, so the last column counts them. They were chosen by the loss that "
        "is shown."
    ) + (f" Lower, but left out for want of seeds: {'; '.join(left_out)}." if left_out else "")
    header = [
        "row", "attention", "trained", "rate", "validation loss", f"minus {base}'s", "largest logit",
        f"settings tried (with {seeds} seeds)",
    ]  # fmt: skip
    return [Table("Table 2, best of all settings", title, markdown(header, lines), runs, note)]


def _waiting(cases: list[tuple[str, Recipe]], changed: list[Record]) -> list[str]:
    """A sentence that names the cases without a run, or nothing."""
    there = [(row_label(r), recipe_of(r)) for r in changed]
    waiting = [method_of(row, recipe) for row, recipe in cases if recipe.config() and (row, recipe.config()) not in there]
    return [f"Not run yet: {'; '.join(waiting)}."] if waiting else []


def rates_table(runs: list[Record], label_of: Callable[[Record], str]) -> tuple[str, dict[str, float]]:
    """One line per label, one column per learning rate; bold is the lowest loss of each row.

    Args:
        runs: of one budget.
        label_of: in which line a run stands.

    Returns:
        The table, and the lowest loss of each row in nats per token.
    """
    rates = sorted({r.rate for r in runs})
    groups = grouped(runs, lambda r: (label_of(r), r.rate))
    best: dict[str, float] = {}
    for group in groups.values():
        if (loss := mean_loss(group)) is not None:
            best[row_label(group[0])] = min(loss, best.get(row_label(group[0]), loss))
    rows = {label_of(r): row_label(r) for r in runs}  # by line, in their order
    lines = [
        [label, *(bold_if_best(groups.get((label, rate), []), best.get(row)) for rate in rates)] for label, row in rows.items()
    ]
    return markdown(["peak learning rate", *(f"{rate:g}" for rate in rates)], lines), best
