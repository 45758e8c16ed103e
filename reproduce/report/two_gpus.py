"""One GPU and two: how far apart their losses are, how fast they train, and how long the paper's own runs would take."""

from ..store.records import Record
from .markdown import Table, markdown

HEADER = [
    "model",
    "split",
    "steps",
    "noise",
    "two GPUs",
    "killed and resumed",
    "tokens/s, one",
    "two",
    "ratio",
    "paper's hours",
]


def two_gpus_table(records: list[Record]) -> list[Table]:
    """One line per table of the paper.

    Args:
        records: of `reproduce two_gpus`, on one kind of GPU.
    """
    lines = []
    for r in records:
        config, found = r.config, r.metrics
        one, two = found["tokens_per_second"]
        apart = [f"{found[what]:.4f}" for what in ("noise", "two_apart", "resumed_apart")]
        rates = [f"{one:,.0f}", f"{two:,.0f}", f"{two / one:.2f}", f"{config['paper_tokens'] / two / 3600:,.0f}"]
        lines.append([f"{r.method} {config['row']}", config["sharding"], f"{config['steps']}", *apart, *rates])
    inside = sum(r.metrics["within_noise"] for r in records)
    batch = min(r.metrics["next_batch"] for r in records)
    note = (
        "Differences are the largest of all steps, in nats, to one GPU. Noise is that of a second run on one GPU whose micro-batches "
        f"are smaller: the same batches, other sums. Within twice the noise are {inside} of {len(records)}; another batch moves the "
        f"loss by up to {batch:.2f}. Hours are those of two GPUs for the tokens of the preset `paper`."
    )
    title = f"**One {records[0].device} and two: the same training steps.**"
    name = "Two GPUs" if records[0].preset == "gpu" else "Two GPUs, a trial"
    return [Table(name, title, markdown(HEADER, lines), records, note)]
