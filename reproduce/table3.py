"""Table 3, LLaMA3-1B: attention sizes at the paper's shape, under both readings of the unit that its numbers admit."""

from .options import Options
from .records import append, new_record
from .rows import TABLE3
from .sizes import measure

SHAPE = {"d_model": 2048, "n_heads": 32}


def run(options: Options) -> None:
    """One record with all rows; nothing is trained yet."""
    sizes = [measure(row, **SHAPE) for row in TABLE3]
    append(options.records, new_record("table3", "sizes", "all rows", SHAPE, {"rows": sizes}))
