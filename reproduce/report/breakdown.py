"""How a row breaks down at too high a rate: step by step, and what holds its logits."""

import math

from ..experiments.ablations import PRESETS as ABLATIONS
from ..experiments.ablations import ROW
from ..models.rows import Row
from ..store.records import Record
from .cells import logit_cell, loss_cell
from .markdown import Table, markdown
from .query import fresh_runs, largest_logit, of_one_budget, recipe_of, row_label, runs_of
from .words import change_of, tokens_of

LATENT = Row("MLA", latent=128)
PATH = ("q_a_proj.weight", "q_b_proj.weight", "kv_a_proj_with_mqa.weight", "kv_b_proj.weight")  # of a logit
RISE = 0.5  # nats by which the training loss ends above its lowest where a run breaks down


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


def latent_breakdown(records: list[Record]) -> list[Table]:
    """How latent attention breaks down with Muon, step by step until well after the warm-up, beside the same with norms on its latents.

    Args:
        records: all that there are.

    Returns:
        Of the lowest rate at which it breaks down; none without such a run and the one beside it.
    """
    runs = [r for r in fresh_runs(records) if r.seed == 0 and r.metrics.get("observations")]
    broken = {r.rate: r for r in runs if r.method == LATENT.label and _breaks_down(r)}
    normed = {r.rate: r for r in runs if r.method == LATENT.normed().label}
    return [_latent_table(broken[rate], normed[rate]) for rate in sorted(broken.keys() & normed.keys())[:1]]


def _breaks_down(record: Record) -> bool:
    losses = [loss for _, loss, _ in record.metrics["curve"]]
    return record.diverged_at is not None or losses[-1] > min(losses) + RISE


def _latent_table(broken: Record, normed: Record) -> Table:
    until, lines = 2 * broken.warmup, []
    others = {seen["step"]: seen for seen in normed.metrics["observations"]}
    for seen in broken.metrics["observations"]:
        if seen["step"] > until or not (beside := others.get(seen["step"])):
            continue
        grown, grown_beside = _grown(broken, seen), _grown(normed, beside)
        cells = [f"{seen['gradients'][name]:.3f}" for name in (PATH[1], PATH[3])] + [f"{share:.2f}" for share in grown]
        cells = [*_loss_and_logit(broken, seen), *cells, f"{math.prod(grown):.1f}"]
        cells += [*_loss_and_logit(normed, beside), f"{grown_beside[3]:.2f}"]
        cells += [f"{math.prod(grown_beside[n::2]):.1f}" for n in (0, 1)]
        lines.append([f"{seen['step']}", *cells])
    header = [
        "step", "training loss", "largest logit", "gradient, q_b", "gradient, kv_b", "norm, q_a", "norm, q_b", "norm, kv_a", "norm, kv_b",
        "the four norms' product", "normed: training loss", "normed: largest logit", "normed: norm, kv_b", "normed: q_a times kv_a",
        "normed: q_b times kv_b",
    ]  # fmt: skip
    title = (
        f"**How {LATENT.label} breaks down with Muon at the rate {broken.rate:g}, and does not with latent norms (normed), REDUCED BUDGET: "
        f"until step {until:,} of {broken.steps:,}, one seed.** Validation loss at the end: {loss_cell([broken])}, with norms "
        f"{loss_cell([normed])}."
    )
    note = (
        "A logit passes through four matrices: q_a and kv_a make the latents, q_b and kv_b queries and keys of them. kv_b makes values "
        "too; records hold both in one. Over all layers: Frobenius norms of gradients, and of weights over those at the start."
    )
    return Table("Breaking down, MLA", title, markdown(header, lines), [broken, normed], note)


def _grown(record: Record, seen: dict) -> list[float]:
    """Norms of the matrices of PATH over those at the start."""
    first = record.metrics["observations"][0]["weights"]
    return [seen["weights"][name] / first[name] for name in PATH]


def _loss_and_logit(record: Record, seen: dict) -> list[str]:
    """Losses are those of the same step, or of the last one before that was written down."""
    losses = [loss for step, loss, _ in record.metrics["curve"] if step <= seen["step"]]
    return [f"{losses[-1]:.2f}" if losses else "", f"{seen['largest_logit']:,.0f}"]


def _steps_table(record: Record) -> Table:
    first, lines = record.metrics["observations"][0], []
    for seen in record.metrics["observations"]:
        core, head = (seen["gradients"][name] for name in ("pre.core", "pre.head"))
        grown = (seen["weights"][name] / first["weights"][name] for name in ("pre.core", "pre.query", "pre.head"))
        cells = [*_loss_and_logit(record, seen), *(f"{norm:.3f}" for norm in (core, head))]
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
