"""Table 1: parameters and cache of each mechanism, formula against the real module, at GPT-2's shape."""

from ..models.rows import Row
from ..train.options import Options
from .sizes import record_sizes

TAKES = ()
SHAPE = {"d_model": 768, "n_heads": 12}
ROWS = (
    Row("MHA"),
    Row("GQA", n_kv_heads=1),
    Row("GQA", n_kv_heads=4),
    Row("MLA", latent=128, shared_kv=True),
    Row("MLA", latent=128, shared_kv=False),
    Row("Tucker", ranks=(8, 128, 64)),
    Row("Tucker", ranks=(8, 128, 64), shared_kv=True),
)


def run(options: Options) -> None:
    """One record with all rows; nothing is trained.

    Args:
        options: where the record goes.
    """
    record_sizes("table1", ROWS, SHAPE, options)
