"""Tables of the language models that one GPU trained: learning rates, ablations, and Tables 2 and 3 at the full budget."""

import statistics
from collections.abc import Callable

from ..experiments import figure3, table2, table3
from ..experiments.ablations import CASES, CURES, ROW, SLOWER
from ..experiments.ablations import PRESETS as ABLATIONS
from ..store.records import Record
from ..train.language import method_of
from ..train.recipes import Recipe
from .markdown import markdown
from .query import (
    BUDGETS,
    Budget,
    budget_of,
    complete,
    diverged,
    fresh_runs,
    full_budget_runs,
    grouped,
    largest_logit,
    losses_of,
    mean_loss,
    megabytes,
    method_and_rate,
    of_one_budget,
    recipe_of,
    row_label,
    runs_of,
    settled,
    speeds_on_one_card,
    step_times,
    sweep_runs,
)
from .words import (
    change_of,
    commands_of,
    commit_of,
    data_in_words,
    devices_of,
    difference,
    divergence,
    each_once,
    mean_and_spread,
    passes_over,
    seeds_in_words,
    tokens_of,
)

BEGIN, END = "<!-- commands: written by `python -m reproduce report --write README.md` -->", "<!-- end of commands -->"


def sweep_table(records: list[Record]) -> list[str]:
    """Table 2's sweep: every row and warm-up by learning rate, each row's best in bold.

    Args:
        records: all that there are.

    Returns:
        Markdown, piece by piece.
    """
    runs = sweep_runs(records)
    table, best = rates_table(runs, lambda r: f"{r.method}, warm-up {r.warmup}")
    title = (
        "**Sweep of learning rate and warm-up for Table 2 at the paper's GPT-2 shape, REDUCED BUDGET: "
        f"{tokens_of(runs)}, {seeds_in_words(runs)}; validation loss in nats/token, each row's best in bold.**"
    )
    tried = {row: sorted({r.warmup for r in runs if r.method == row}) for row in best}
    alone = {row: f" (warm-up {warmups[0]} alone)" if len(warmups) == 1 else "" for row, warmups in tried.items()}
    note = "; ".join(f"{row} {loss:.3f}{alone[row]}" for row, loss in sorted(best.items(), key=lambda item: item[1]))
    return [title, table, f"In order of what each row reaches at its own best: {note}.{gaps(runs)}", sources(runs)]


def fresh_table(records: list[Record]) -> list[str]:
    """Table 2 with Muon, every token read once: each row by learning rate, its best in bold, and how many rates it was tried at.

    Args:
        records: all that there are.

    Returns:
        Markdown, piece by piece.
    """
    runs = fresh_runs(records)
    table, _ = rates_table(runs, clipped_label)
    title = (
        f"**Learning rates for GPT-2 at the paper's shape with Muon on fresh text, REDUCED BUDGET: {tokens_of(runs)}, "
        f"no token read twice, {seeds_in_words(runs)}; validation loss in nats/token, each row's best in bold.**"
    )
    tried = "; ".join(f"{row}: {len({r.rate for r in group})}" for row, group in grouped(runs, clipped_label).items())
    return [
        title,
        table,
        f"The rows were not tried equally yet, so no row is set against another here. Rates tried: {tried}.",
        sources(runs),
    ]


def clipped_label(record: Record) -> str:
    """The row of a run, and the limit of its logits where it had one: with QK-clip it is another setting, not another seed."""
    clip = record.train.get("qk_clip")
    return record.method if clip is None else f"{record.method}, QK-clip {clip:g}"


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


def ablation_table(records: list[Record]) -> list[str]:
    """What was changed in how one Tucker row is trained, by learning rate.

    Args:
        records: all that there are.

    Returns:
        Markdown, piece by piece.
    """
    changed = of_one_budget(runs_of(records, "ablations", "gpu-sweep"))
    sweep = [r for r in runs_of(records, "table2", "gpu-sweep") if budget_of(r) == budget_of(changed[0])]
    known = set(map(method_and_rate, changed))
    rates, rows = {rate for _, rate in known}, (ROW, "MHA")
    plain = [r for r in sweep if r.method in rows and r.rate in rates and method_and_rate(r) not in known and r.warmup == 100]
    runs = sorted(plain + changed, key=lambda r: (row_label(r) != ROW, bool(recipe_of(r)), r.method))
    table, _ = rates_table(runs, lambda r: r.method)
    title = (
        f"**What makes {ROW} train well, REDUCED BUDGET: {tokens_of(runs)}, {seeds_in_words(runs)}, one change at a time, or one and the "
        "longer warm-up; validation loss in nats/token, each row's best in bold.** Others beside it, with what is open to any row: the "
        "schedule, and an attention that learns slowly."
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
    return [title, table, *([" ".join(notes)] if notes else []), sources(runs)]


def cures_table(records: list[Record]) -> list[str]:
    """What did good in the sweep, at Table 2's full budget, beside Table 2's runs without it at any rate.

    Args:
        records: all that there are.

    Returns:
        Markdown, piece by piece.
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
        lines.append([method, f"{rate:g}", loss_cell(group, 4), logit_cell(group)])
    title = f"**What makes it train well, at the budget of Table 2: {tokens_of(cured)}, warm-up {cured[0].warmup}, REDUCED BUDGET.**"
    table = markdown(["row", "rate", "validation loss", "largest logit"], lines)
    return [title, table, *_waiting(CURES, cured), sources(plain + cured)]


def best_table(records: list[Record]) -> list[str]:
    """Each row at the best setting of all that were tried at Table 2's full budget, from the lowest loss up.

    Of a row's settings those with the most seeds are compared; rows with fewer seeds than others are left out.

    Args:
        records: all that there are.

    Returns:
        Markdown, piece by piece; nothing without a run.
    """
    plain = full_budget_runs(records)
    budgets = {(budget_of(r), r.warmup) for r in plain}  # one, or none
    changed = [r for r in runs_of(records, "ablations", "gpu") if (budget_of(r), r.warmup) in budgets]
    settings = {row: list(grouped(runs, method_and_rate).values()) for row, runs in grouped(plain + changed, row_label).items()}
    best = {}
    for row, groups in settings.items():
        if ended := [group for group in groups if not diverged(group)]:
            most = max(map(len, ended))
            best[row] = min((group for group in ended if len(group) == most), key=mean_loss)
    if not best:
        return []
    seeds = max(map(len, best.values()))
    shown = sorted((row for row in best if len(best[row]) == seeds), key=lambda row: mean_loss(best[row]))
    base, lines = BUDGETS["table2"].base, []
    for row in shown:
        group = best[row]
        above = f" ({difference(mean_loss(group), mean_loss(best[base]))})" if row != base and base in shown else ""
        lines.append(
            [
                row,
                f"{group[0].metrics['attention_parameters'] / 1e6:.2f}M",
                change_of(group[0]),
                f"{group[0].rate:g}",
                loss_cell(group, 4) + above,
                logit_cell(group),
                f"{len(settings[row])} ({sum(len(tried) == seeds for tried in settings[row])})",
            ]
        )
    title = (
        f"**Every row with {seeds} seeds at the best of all settings that were tried at the budget of Table 2, REDUCED BUDGET: "
        f"{tokens_of(plain)}, warm-up {plain[0].warmup}.** Of a row's settings (rates and changes) those with {seeds} seeds are "
        "compared. The more there were the better the best one looks, so the last column counts them."
    )
    header = [
        "row", "attention", "trained", "rate", f"validation loss (against {base})", "largest logit",
        f"settings tried (with {seeds} seeds)",
    ]  # fmt: skip
    return [title, markdown(header, lines), sources([r for row in shown for group in settings[row] for r in group])]


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
    lines = []
    for label in dict.fromkeys(label for label, _ in groups):
        cells = []
        for rate in rates:
            group = groups.get((label, rate), [])
            loss = mean_loss(group)
            bold = "**" if loss is not None and loss == best[row_label(group[0])] else ""
            cells.append(f"{bold}{loss_cell(group)}{bold}")
        lines.append([label, *cells])
    return markdown(["peak learning rate", *(f"{rate:g}" for rate in rates)], lines), best


def budget_tables(records: list[Record], experiment: str) -> list[str]:
    """The rows of one of the paper's tables at their best settings, then runs at other settings.

    Args:
        records: all that there are.
        experiment: "table2" or "table3".

    Returns:
        Markdown, piece by piece.
    """
    budget, groups = BUDGETS[experiment], settled(records, experiment)
    runs, times = runs_of(records, experiment, "gpu"), step_times(records) if experiment == "table3" else {}
    base = mean_loss(groups.get(budget.base, []))
    card, speeds = speeds_on_one_card([r for r in runs if r.steps == budget.preset.train.steps])
    lines = []
    for row in budget.rows:
        group = groups.get(row.label)
        time = [f"{times[row.label]:.0f}" if row.label in times else "not run yet"] if times else []
        if not group:
            lines.append([row.label, *["not run yet"] * 7, *time])
            continue
        losses = [] if diverged(group) else losses_of(group)
        above = f" ({difference(statistics.mean(losses), base)})" if base and losses and row.label != budget.base else ""
        bits = [r.metrics["bits_per_byte"] for r in group] if losses else []
        lines.append(
            [
                row.label,
                *(f"{megabytes:.2f}" for megabytes in megabytes(group[0])),
                f"{budget.rate(row.label):g}",
                loss_cell(group, 4) + above,
                mean_and_spread(bits, 4) if bits else "",
                logit_cell(group),
                f"{speeds[row.label] / 1e3:.0f}" if row.label in speeds else "another card" if losses else "",
                *time,
            ]
        )
    header = [
        "row", "attention MB", "KV cache MB", "rate", f"validation loss (against {budget.base})", "bits per byte",
        "largest logit", f"1,000 tokens/s, {card}", *(["ms a step, LLaMA3-1B"] if times else []),
    ]  # fmt: skip
    shown = [r for group in groups.values() for r in group]
    parts = [_scale(budget, shown), markdown(header, lines), sources(shown)] if shown else []
    kept = {id(r) for r in shown}
    if others := [r for r in runs if id(r) not in kept]:
        order, rows = [row.label for row in budget.rows], []
        others.sort(key=lambda r: order.index(r.method))
        settings = grouped(others, lambda r: (*method_and_rate(r), r.warmup, budget_of(r)))
        for (label, rate, warmup, (*_, steps)), group in settings.items():
            text = group[0].data["name"]
            rows.append([label, f"{rate:g}", f"{warmup}", f"{steps:,}", text, loss_cell(group), logit_cell(group)])
        parts += [
            f"**{budget.title}, at other settings.** Runs on another text or over other steps are not to be set beside those above.",
            markdown(["row", "rate", "warm-up", "steps", "text", "validation loss", "largest logit"], rows),
            sources(others),
        ]
    return parts


def _scale(budget: Budget, runs: list[Record]) -> str:
    """The title of a table: what was trained, at which scale."""
    c, t = runs[0].config, budget.preset.train
    narrower = budget.preset.narrower
    shape = (
        " at the paper's shape, validation loss at REDUCED BUDGET"
        if narrower == 1
        else f", validation loss at REDUCED SCALE, not the paper's: d {c['d_model']:,}, {c['n_heads']} heads, {c['n_layers']} layers, "
        f"N {c['context']:,}"
    )
    named = (
        ""
        if narrower == 1
        else f" Rows are named as in the paper; all widths and ranks but the head rank are divided by {narrower}."
    )
    rate = "the best of the rates that were tried here"
    if narrower > 1:
        rate = "the rate that was best in GPT-2's sweep or, where others were tried, here"
    return (
        f"**{budget.title}{shape}: {tokens_of(runs)}{passes_over(runs)}, {t.steps:,} steps in place of {budget.paper_steps:,}; "
        f"every row at {rate}; warm-up {t.warmup_steps} steps.**{named}{budget.note} The largest logit is that of every 100th "
        "step, over all layers and seeds: hundreds are usual, thousands say that the attention of some layer has run away. The paper's "
        "losses are not available to us."
    )


def logit_cell(runs: list[Record]) -> str:
    """The largest logit of the runs as a cell, empty where none was looked at."""
    return f"{logit:,.0f}" if (logit := largest_logit(runs)) else ""


def sources(runs: list[Record]) -> str:
    """Where numbers come from: data, devices, commits, minutes, and the commands with what varies between runs in capitals.

    Args:
        runs: at least one, all of them trained on data.
    """
    minutes = statistics.median(r.wall_seconds for r in runs) / 60
    return (
        f"<sub>Data: {each_once(map(data_in_words, runs))}; {devices_of(runs)}; commits {each_once(map(commit_of, runs))}; "
        f"about {minutes:.1f} minutes a run; {commands_of(runs)}. "
        "± is the standard deviation over seeds, where there are several.</sub>"
    )


TEXT = "--text wiki.txt.xz --validation held_out.txt.xz --bpe gpt2"


def render(records: list[Record]) -> str:
    """The commands with what they take and give, then what came out.

    Args:
        records: all that there are.

    Raises:
        ValueError: for a record that lacks what is shown.
    """
    with complete("a record of the preset gpu lacks what its commands show"):
        return f"{commands(records)}\n\n{findings(records)}".strip()


def commands(records: list[Record]) -> str:
    """The commands of the preset `gpu` in the order to run them, with minutes and what comes out.

    Args:
        records: all that there are.
    """
    swept = [r for r in runs_of(records, "table2", "gpu-sweep") if (r.rate, r.warmup) == (2.4e-3, 400)]
    sweep = f"table2 --preset gpu-sweep {TEXT} --learning-rate 2.4e-3 --warmup-steps 400"
    changed = [r for r in runs_of(records, "ablations", "gpu-sweep") if r.rate == ABLATIONS["gpu-sweep"].train.learning_rate]
    lines = [
        _line(sweep, len(table2.TABLE2), swept, ("GQA n_KV=4", "Tucker [8,64,64]"), "validation_loss"),
        _line(f"ablations --preset gpu-sweep {TEXT}", len(CASES), changed, (f"{ROW}, init std 0.02",), "validation_loss"),
    ]
    for experiment, small in (("table2", "Tucker [8,64,64]"), ("table3", "Tucker [32,64,64]")):
        budget = BUDGETS[experiment]
        runs = [r for group in settled(records, experiment).values() for r in group]
        count = len(budget.rows) * len(budget.preset.seeds)
        lines.append(_line(f"{experiment} --preset gpu {TEXT}", count, runs, (budget.base, small), "validation_loss"))
    cured = [r for r in runs_of(records, "ablations", "gpu") if r.rate == ABLATIONS["gpu"].rate(row_label(r), r.method)]
    slowed = tuple(f"{row}, {change}" for row, change in zip((ROW, "MHA"), SLOWER))
    lines.append(_line(f"ablations --preset gpu {TEXT}", len(CURES), cured, slowed, "validation_loss"))
    vit = figure3.PRESETS["gpu"]
    count, runs = (1 + len(vit.rows)) * len(vit.seeds), runs_of(records, "figure3", "gpu")
    lines.append(_line("figure3 --preset gpu --images images.npz", count, runs, ("MHA", "Tucker [8,24,24]"), "top1"))
    return markdown(["after `python -m reproduce`", "runs", "minutes", "expect"], lines)


def findings(records: list[Record]) -> str:
    """What came out, in sentences whose numbers are those of the records; none without a run.

    Args:
        records: all that there are.
    """
    said = []
    for experiment, budget in BUDGETS.items():
        groups = {label: group for label, group in settled(records, experiment).items() if not diverged(group)}
        if budget.base not in groups:
            continue
        loss, size = mean_loss(groups[budget.base]), groups[budget.base][0].attention_parameters
        others = [
            f"{label} {difference(mean_loss(groups[label]), loss)} with {groups[label][0].metrics['attention_parameters'] / size:.0%}"
            for label in (row.label for row in budget.rows if row.paper)  # ours are in the table
            if label in groups and label != budget.base
        ]
        said.append(
            f"{budget.title}, loss against {budget.base}'s {loss:.3f}, with which share of its attention parameters: {'; '.join(others)}."
        )
    logits = {
        change_of(r) if recipe_of(r) else "unchanged": logit
        for r in runs_of(records, "ablations", "gpu-sweep")
        if row_label(r) == ROW and r.rate == ABLATIONS["gpu-sweep"].train.learning_rate and (logit := largest_logit([r]))
    }
    if logits:
        largest = "; ".join(f"{change} {value:,.0f}" for change, value in logits.items())
        said.append(f"Largest attention logit of {ROW} in a run at the highest rate: {largest}.")
    if said:
        said.append(on_record(records))
    return "\n".join(f"- {sentence}" for sentence in said)


def on_record(records: list[Record]) -> str:
    """Of each language experiment at its preset's steps: how many runs, which settings, how many hours.

    Args:
        records: all that there are.
    """
    presets = {"table2": table2.PRESETS, "ablations": ABLATIONS, "table3": table3.PRESETS}
    said = []
    for experiment, preset in (*((e, "gpu-sweep") for e in ("table2", "ablations")), *((e, "gpu") for e in presets)):
        steps = presets[experiment][preset].train.steps
        if runs := [r for r in runs_of(records, experiment, preset) if r.steps == steps]:
            settings = {"rates": [r.rate for r in runs], "warm-ups": [r.warmup for r in runs], "seeds": [r.seed for r in runs]}
            listed = "; ".join(
                f"{name} {', '.join(f'{v:g}' for v in sorted(set(values)))}" for name, values in settings.items()
            )
            hours = sum(r.wall_seconds for r in runs) / 3600
            said.append(f"`{experiment} --preset {preset}` {len(runs)} runs in {hours:.1f} hours ({listed})")
    return f"What is shown, each run with some of these settings, comes from {'; '.join(said)}."


def _line(command: str, count: int, runs: list[Record], rows: tuple[str, ...], metric: str) -> list[str]:
    """count: how many runs the command makes.  Minutes are those of the runs on record, for as many."""
    if not runs:
        return [f"`{command}`", f"{count}", "not run yet", "not run yet"]
    groups = grouped(runs, lambda r: r.method)
    said = [
        f"{row} {divergence(groups[row]) or mean_and_spread([r.metrics[metric] for r in groups[row]], 3)}"
        for row in rows
        if row in groups
    ]
    minutes = count * statistics.mean(r.wall_seconds for r in runs) / 60
    return [f"`{command}`", f"{count}", f"{minutes:.0f}", f"{metric.replace('_', ' ')}: {'; '.join(said)}"]


def loss_cell(group: list[Record], digits: int = 3) -> str:
    """A group's loss as a cell: mean and spread over seeds in nats per token, or which of them diverged.

    Args:
        group: runs of one setting.
        digits: after the point.
    """
    if not group:
        return "not run"
    return divergence(group) or mean_and_spread(losses_of(group), digits)
