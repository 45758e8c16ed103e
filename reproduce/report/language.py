"""Tables of language models that were all trained at one rate: at smoke scale, or as the paper trains them."""

from ..store.records import Record
from .cells import UNKNOWN, loss_cell
from .markdown import Table, markdown
from .query import BUDGETS, by_row, diverged, grouped, of_one_budget
from .words import mean_and_spread


def loss_tables(experiment: str, records: list[Record]) -> list[Table]:
    """Each row's sizes and what it reached.

    Args:
        experiment: "table2" or "table3".
        records: its runs that are `alike`.
    """
    budget, runs = BUDGETS[experiment], by_row(records)
    rates = {label: group[0].rate for label, group in runs.items()}
    own = len(set(rates.values())) > 1
    rows = []
    for label, group in runs.items():
        metrics = [r.metrics for r in group]
        sizes = [f"{metrics[0][name]:,}" for name in ("attention_parameters", "cache_per_token")]
        bits = "—" if diverged(group) else mean_and_spread([m["bits_per_byte"] for m in metrics], 3)
        rows.append([label, *([f"{rates[label]:g}"] if own else []), *sizes, loss_cell(group), bits])
    narrower = budget.narrower(records[0].config) > 1
    header = ["row, narrowed" if narrower else "row", *(["rate"] if own else []), "attention parameters", "cached per token"]
    body = markdown([*header, "validation loss (nats/token)", "bits per byte"], rows)
    said = "Each row at its own learning rate." if own else f"The learning rate is {rates.popitem()[1]:g} for every row."
    title = f"{_title(experiment, records[0])} {said} {UNKNOWN}"
    return [Table(f"{budget.title.split(',')[0]}, {records[0].preset}", title, body, records)]


def _title(experiment: str, record: Record) -> str:
    """What was trained, at which scale."""
    budget, c, train = BUDGETS[experiment], record.config, record.train
    tokens = f"{train['steps'] * train['batch_size'] * c['context'] / 1e6:,.2f}M training tokens"
    trained = f"{train['steps']:,} steps of {train['batch_size']} sequences."
    narrower = budget.narrower(c)
    if narrower > 1:
        return (
            f"**{budget.title}, REDUCED SCALE, not the paper's: validation loss after {tokens}.** Width {c['d_model']}, "
            f"{c['n_layers']} layers, {c['context']} tokens of context. {trained} Rows are named as in the paper; all widths and ranks "
            f"but the head rank are divided by {narrower}."
        )
    short = train["steps"] < budget.paper_steps
    reduced, instead = (", REDUCED BUDGET", f" in place of {budget.paper_steps:,}") if short else ("", "")
    return f"**{budget.title} at the paper's shape{reduced}: validation loss after {tokens}.** {trained[:-1]}{instead}."


def ablation_runs(records: list[Record]) -> list[Table]:
    """At a scale that shows no more than that each recipe runs."""
    runs = of_one_budget(records)
    c = runs[0].config

    def label(record: Record) -> str:
        rate = record.rate
        return record.method + (f", rate {rate:g}" if rate != c["train"]["learning_rate"] else "")

    title = (
        f"**Initialisations and cures at REDUCED SCALE: each of them runs; which is best this is too short to tell.** Width "
        f"{c['d_model']}, {c['n_layers']} layers, {c['train']['steps']} steps."
    )
    rows = [[name, loss_cell(group)] for name, group in grouped(runs, label).items()]
    return [Table(f"Ablations, {runs[0].preset}", title, markdown(["row", "validation loss (nats/token)"], rows), runs)]
