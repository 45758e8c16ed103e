"""Effective ranks of trained layers."""

import statistics

from ..models.rows import TABLE2
from ..store.records import Record
from .markdown import Table, markdown
from .words import mode_titles, scale_of

ORDER = [row.label for row in TABLE2]


def spectra_runs(records: list[Record]) -> list[Table]:
    """Effective ranks of each row's unfoldings, means over layers."""
    modes = [(side, mode) for side, layer in records[0].metrics["trained"][0].items() for mode in layer]
    records = sorted(records, key=lambda r: ORDER.index(r.method) if r.method in ORDER else len(ORDER))
    several = len({r.seed for r in records}) > 1
    rows = [[r.method + (f", seed {r.seed}" if several else ""), *(_cell(r, *m) for m in modes)] for r in records]
    c = records[0].config
    title = (
        f"**Effective ranks of trained layers {scale_of(c)}.** Width {c['d_model']}, {c['n_heads']} heads, {c['n_layers']} layers. "
        f"Trained for {c['train']['steps']:,} steps. Each is the exp(entropy) of the singular values of each unfolding, mean over layers; "
        "in brackets before training; then how many there are. W acts before the softmax, W~ after it."
    )
    header = ["GPT-2 row", *mode_titles(modes)]
    return [Table(f"Ranks, {records[0].preset}", title, markdown(header, rows), records)]


def _cell(record: Record, side: str, mode: str) -> str:
    """The mean after training, before it, and how many singular values there are."""
    states = {state: record.metrics[state] for state in ("trained", "initial") if state in record.metrics}
    means = {state: statistics.mean(x[side][mode]["entropy_rank"] for x in layers) for state, layers in states.items()}
    before = f" ({means['initial']:.1f})" if "initial" in means else ""
    return f"{means['trained']:.1f}{before} of {states['trained'][0][side][mode]['size']}"
