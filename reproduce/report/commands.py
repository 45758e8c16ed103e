"""The commands of the preset `gpu`, with what they take and give, and what of them is on record."""

import statistics

from ..experiments import figure3, table2, table3
from ..experiments.ablations import CASES, CURES, ROW, SLOWER
from ..experiments.ablations import PRESETS as ABLATIONS
from ..store.records import Record
from .markdown import markdown
from .query import BUDGETS, grouped, row_label, runs_of, settled
from .words import divergence, mean_and_spread


def render(records: list[Record]) -> str:
    """The commands in the order to run them, with minutes and what comes out.

    Args:
        records: all that there are.
    """
    swept = [r for r in runs_of(records, "table2", "gpu-sweep") if (r.rate, r.warmup) == (2.4e-3, 400)]
    sweep = "table2 --preset gpu-sweep --learning-rate 2.4e-3 --warmup-steps 400 $TEXT"
    changed = [r for r in runs_of(records, "ablations", "gpu-sweep") if r.rate == ABLATIONS["gpu-sweep"].train.learning_rate]
    lines = [
        _line(sweep, len(table2.TABLE2), swept, ("GQA n_KV=4", "Tucker [8,64,64]"), "validation_loss"),
        _line("ablations --preset gpu-sweep $TEXT", len(CASES), changed, (f"{ROW}, init std 0.02",), "validation_loss"),
    ]
    for experiment, small in (("table2", "Tucker [8,64,64]"), ("table3", "Tucker [32,64,64]")):
        budget = BUDGETS[experiment]
        runs = [r for group in settled(records, experiment).values() for r in group]
        count = len(budget.rows) * len(budget.preset.seeds)
        lines.append(_line(f"{experiment} --preset gpu $TEXT", count, runs, (budget.base, small), "validation_loss"))
    cured = [r for r in runs_of(records, "ablations", "gpu") if r.rate == ABLATIONS["gpu"].rate(row_label(r), r.method)]
    slowed = tuple(f"{row}, {change}" for row, change in zip((ROW, "MHA"), SLOWER))
    lines.append(_line("ablations --preset gpu $TEXT", len(CURES), cured, slowed, "validation_loss"))
    vit = figure3.PRESETS["gpu"]
    count, runs = (1 + len(vit.rows)) * len(vit.seeds), runs_of(records, "figure3", "gpu")
    lines.append(_line("figure3 --preset gpu --images images.npz", count, runs, ("MHA", "Tucker [8,24,24]"), "top1"))
    return "```sh\n" + "\n".join(lines) + "\n```"


def _line(command: str, count: int, runs: list[Record], rows: tuple[str, ...], metric: str) -> str:
    """count: how many runs the command makes.  Minutes are those of the runs on record, for as many."""
    groups = grouped(runs, lambda r: r.method)
    said = [
        f"{row} {divergence(groups[row]) or mean_and_spread([r.metrics[metric] for r in groups[row]], 3)}"
        for row in rows
        if row in groups
    ]
    minutes = count * statistics.mean(r.wall_seconds for r in runs) / 60 if runs else 0
    expect = f"{minutes:.0f} minutes; {metric.replace('_', ' ')}: {'; '.join(said)}" if runs else "not run yet"
    return f"python -m reproduce {command}\n#   {count} runs, {expect}"


def on_record(records: list[Record]) -> str:
    """Of each language experiment at its preset's steps: how many runs, how many hours, and which settings; and what was not run.

    Args:
        records: all that there are.

    Returns:
        A table, empty without a run.
    """
    presets = {"table2": table2.PRESETS, "ablations": ABLATIONS, "table3": table3.PRESETS}
    lines, missing = [], []
    for experiment, preset in (
        ("table2", "gpu-fresh"),
        *((e, "gpu-sweep") for e in ("table2", "ablations")),
        *((e, "gpu") for e in presets),
        *(("table2", f"gpu-fresh-{what}") for what in ("narrow", "allocations", "optimizers")),
        ("table3", "gpu-fresh"),
    ):
        steps = presets[experiment][preset].train.steps
        if runs := [r for r in runs_of(records, experiment, preset) if r.steps == steps]:
            settings = ([r.rate for r in runs], [r.warmup for r in runs], [r.seed for r in runs])
            hours = sum(r.wall_seconds for r in runs) / 3600
            listed = [", ".join(f"{v:g}" for v in sorted(set(values) - {None})) for values in settings]  # a seed may be none
            lines.append([f"`{experiment} --preset {preset}`", f"{len(runs)}", f"{hours:.1f}", *listed])
        else:
            missing.append(f"`{experiment} --preset {preset}`")
    if not lines:
        return ""
    table = markdown(["on record", "runs", "hours", "rates", "warm-ups", "seeds"], lines)
    return f"{table}\n\nNot run yet: {', '.join(missing)}." if missing else table
