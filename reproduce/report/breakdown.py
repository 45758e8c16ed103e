"""How a row breaks down at too high a rate: step by step, and what holds its logits."""

from ..experiments.ablations import PRESETS as ABLATIONS
from ..experiments.ablations import ROW
from ..store.records import Record
from .cells import logit_cell, loss_cell
from .markdown import Table, markdown
from .query import largest_logit, of_one_budget, recipe_of, row_label, runs_of
from .words import change_of, tokens_of


def breakdown_tables(records: list[Record]) -> list[Table]:
    """The row as it is, step by step; then every change that was made to its training, by the largest logit.

    Args:
        records: all that there are.

    Returns:
        None without a run whose logits were looked at.
    """
    rate = ABLATIONS["gpu-sweep"].train.learning_rate
    changed = of_one_budget(runs_of(records, "ablations", "gpu-sweep"))
    runs = [r for r in changed if row_label(r) == ROW and r.rate == rate and largest_logit([r])]
    plain = [r for r in runs if not recipe_of(r)]
    return [*(_steps_table(r) for r in plain[:1]), *([_logits_table(runs)] if runs else [])]


def _steps_table(record: Record) -> Table:
    """Losses are those of the same step, or of the last one before that was written down."""
    first, lines = record.metrics["observations"][0], []
    for seen in record.metrics["observations"]:
        losses = [loss for step, loss, _ in record.metrics["curve"] if step <= seen["step"]]
        core, head = (seen["gradients"][name] for name in ("pre.core", "pre.head"))
        grown = (seen["weights"][name] / first["weights"][name] for name in ("pre.core", "pre.query", "pre.head"))
        cells = [
            f"{losses[-1]:.2f}" if losses else "",
            f"{seen['largest_logit']:,.0f}",
            *(f"{norm:.3f}" for norm in (core, head)),
        ]
        lines.append([f"{seen['step']}", *cells, *(f"{share:.2f}" for share in grown)])
    header = [
        "step", "training loss", "largest logit", "gradient, core", "gradient, head factor", "norm, core", "norm, query factor",
        "norm, head factor",
    ]  # fmt: skip
    title = f"**How {ROW} breaks down at the rate {record.rate:g}, REDUCED BUDGET: {tokens_of([record])}, one seed.**"
    note = "Of the tensor before the softmax, over all layers: Frobenius norms of gradients, and of weights over those at the start."
    return Table("Breaking down", title, markdown(header, lines), [record], note)


def _logits_table(runs: list[Record]) -> Table:
    runs = sorted(runs, key=lambda r: largest_logit([r]) or 0)
    lines = [[change_of(r) if recipe_of(r) else "unchanged", logit_cell([r]), loss_cell([r])] for r in runs]
    title = f"**What holds the logits of {ROW} at the rate {runs[0].rate:g}, REDUCED BUDGET: the best holder first.** One seed each."
    return Table("Largest logits", title, markdown(["what was changed", "largest logit", "validation loss"], lines), runs)
