"""Which layers are exact Tucker Attentions, as a table."""

from collections import defaultdict

from ..store.records import Record
from .markdown import Table, markdown

PAPER_SCHEDULE = "the paper's latent schedule"  # the control of `exactness` that has a column of its own
BECOMES = {  # a layer's rotary embedding: the frequencies of the Tucker Attention that equals it
    "none": "none",
    "head-width": "head schedule, once per key/value head",
    "decoupled": "zeros, then the head schedule",
    "coupled": "the paper's latent schedule",
}
HEADER = [
    "layer", "its RoPE", "frequencies of the Tucker latent", "worst error", "with the paper's latent schedule instead",
    "smallest control", "Def. 2.1",
]  # fmt: skip


def exactness_cells(records: list[Record]) -> list[Table]:
    """One line per mechanism and rotary embedding; biases, masks, paths and pairings together, the worst of them shown."""
    groups = defaultdict(list)
    for cell in records[-1].metrics["cells"]:
        c = cell["cell"]
        rotary = "head-width" if c["rotary"].startswith("head-width") else c["rotary"]
        norms = ", latent norms" if c["norm"] else ", QK-norm" if c.get("qk_norm") else ""
        groups[c["mechanism"] + norms, rotary].append(cell)
    title = "**Which layers are exact Tucker Attentions, under which rotary embedding: relative error in float64.**"
    note = (
        f"Each line is the worst of many: {comparisons(records)} comparisons in all, of outputs and of input gradients. They go through "
        "all biases, masks and pairings, and outputs of cached decoding."
    )
    rows = [_line(layer, rotary, cells) for (layer, rotary), cells in groups.items()]
    return [Table("Exact special cases", title, markdown(HEADER, rows, words=True), records[-1:], note)]


def comparisons(records: list[Record]) -> int:
    """How many outputs and gradients were compared."""
    return sum(len(c["errors"]) for c in records[-1].metrics["cells"])


def worst_error(records: list[Record]) -> float:
    """The largest relative error of all comparisons."""
    return max(max(c["errors"].values()) for c in records[-1].metrics["cells"])


def _line(layer: str, rotary: str, cells: list[dict]) -> list[str]:
    schedule = [c["controls"][PAPER_SCHEDULE] for c in cells if PAPER_SCHEDULE in c["controls"]]
    return [
        layer,
        rotary,
        BECOMES[rotary],
        f"{max(max(c['errors'].values()) for c in cells):.0e}",
        f"{min(schedule):.1f}: not exact" if schedule else "no RoPE" if rotary == "none" else "the same",
        f"{min(min(c['controls'].values()) for c in cells):.1f}",
        "no: norms are not linear" if "norm" in layer else "yes",
    ]
