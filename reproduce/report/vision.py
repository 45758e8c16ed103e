"""Figure 3 as a table."""

from ..store.records import Record
from .markdown import Table, markdown
from .query import by_row, diverged
from .words import divergence, epochs_of, mean_and_spread

HEADER = ["row", "attention parameters", "top-1 %, converted only", "top-1 %, fine-tuned", "top-5 %, fine-tuned"]


def figure3_runs(records: list[Record]) -> list[Table]:
    """Accuracy of each row, converted only and fine-tuned; nothing where only the start was trained."""
    tuned = [r for r in records if r.is_trained]
    if not tuned:  # nothing is fine-tuned yet
        return []
    rows = []
    for label, group in by_row(records).items():
        metrics = [r.metrics for r in group]
        at_once = [m["converted"] for m in metrics if "converted" in m]
        converted = percent("top1", at_once) if at_once else "not converted"
        reached = [divergence(group), "—"] if diverged(group) else [percent("top1", metrics), percent("top5", metrics)]
        rows.append([label, f"{metrics[0]['attention_parameters']:,}", converted, *reached])
    return [Table(f"Figure 3, {tuned[0].preset}", _title(tuned[0]), markdown(HEADER, rows), records)]


def _title(record: Record) -> str:
    c, data = record.config, record.data
    rate = f"The learning rate is {c['train']['learning_rate']:g} for every row; {data['test_images']:,} test images."
    if "pretrain" not in c:
        return (
            f"**Figure 3 as a table: {c['model']}, pretrained by others, converted, and on {data['train_images']:,} images of "
            f"{data['name']} fine-tuned for {epochs_of(record)}.** {rate} The paper's accuracies are not available to us."
        )
    return (
        f"**Figure 3 as a table, REDUCED SCALE, not the paper's: a small vision transformer on {data['name']}.** Width {c['d_model']}, "
        f"{c['n_heads']} heads, {c['n_layers']} layers. It was pretrained with MHA for {c['pretrain']['steps']:,} steps on "
        f"{data['train_images']:,} images, converted, and fine-tuned for {epochs_of(record)}. {rate} The paper fine-tunes models that "
        "saw far more images; its accuracies are not available to us."
    )


def percent(name: str, metrics: list[dict]) -> str:
    """Mean and spread over seeds, in per cent.

    Args:
        name: of the share.
        metrics: of each seed.
    """
    return mean_and_spread([100 * m[name] for m in metrics], 1)
