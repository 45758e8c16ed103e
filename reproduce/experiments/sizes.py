"""The record of sizes that Tables 1-3 each begin with."""

from collections.abc import Iterable

from ..models.rows import Row
from ..models.sizes import measure
from ..store.records import append, new_record
from ..train.options import Options


def record_sizes(experiment: str, rows: Iterable[Row], shape: dict, options: Options) -> None:
    """One record with the sizes of all rows at the paper's shape, of several workers by the first; nothing is trained.

    Args:
        experiment: whose record it is.
        rows: what is measured.
        shape: `d_model` and `n_heads`, and what else defines the table.
        options: workers, and where the record goes.
    """
    if not options.workers.is_first:
        return
    sizes = [measure(row, shape["d_model"], shape["n_heads"]) for row in rows]
    append(options.records, new_record(experiment, "sizes", "all rows", shape, {"rows": sizes}), replace=True)
