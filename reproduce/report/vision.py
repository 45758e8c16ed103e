"""Figure 3 as a table."""

import json

from ..experiments import figure3_tiny
from ..store.records import Record, data_key
from .cells import with_interval
from .judge import Best, Estimate, accuracy, accuracy_difference, at_their_best
from .markdown import Table, markdown
from .query import by_row, diverged, grouped
from .words import STARTS, divergence, each_once, epochs_of, mean_and_spread

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


CHOSEN = [
    "row", "rate", "attention parameters", "top-5 %, converted only", "top-5 %, fine-tuned", "minus MHA's", "top-1 %, fine-tuned",
    "minus MHA's",
]  # fmt: skip


def chosen_runs(records: list[Record]) -> list[Table]:
    """Rows that start as the paper's do, at the rates that held-out images chose; nothing where only the pretraining was run."""
    return [_chosen_table(runs) for runs in studies([r for r in records if "start" not in r.config])]


def studies(records: list[Record]) -> list[list[Record]]:
    """Fine-tuned models that differ in row, start, rate and seed alone.

    Args:
        records: of one preset.
    """
    return list(grouped([r for r in records if r.is_trained], _but_for_row_start_and_rate).values())


def _but_for_row_start_and_rate(record: Record) -> str:
    """What defines a run otherwise."""
    config = {name: value for name, value in record.config.items() if name not in ("row", "start")}
    train = {name: value for name, value in record.train.items() if name != "learning_rate"}
    return json.dumps([config | {"train": train}, data_key(record.data)], sort_keys=True)


def _chosen_table(runs: list[Record]) -> Table:
    """All rows beside multi-head attention."""
    best = at_their_best(runs)
    return Table(
        f"Figure 3, {runs[0].preset}",
        _chosen_title(runs[0], best),
        markdown(CHOSEN, [_chosen_line(row, its, best.get("MHA")) for row, its in best.items()]),
        runs,
        NOTE + several_starts(runs) + _not_run(runs, list(best)),
    )


NOTE = (
    "In brackets 95 % intervals, in points: they know of other seeds and of other images. Every rate was chosen by top-5 on "
    "training images that were held out, in the runs of one seed. These are shown where no other seed was run, without an interval, and "
    "else judge nothing."
)


def several_starts(runs: list[Record]) -> str:
    """A sentence where the rows of one seed did not all start from the same weights.

    Args:
        runs: that are compared.
    """
    starts = grouped(runs, lambda r: r.seed)
    several = [str(seed) for seed, own in starts.items() if len({r.metrics["start"] for r in own}) > 1]
    if not several:
        return ""
    return (
        f" Of seed {', '.join(several)} the pretrained model was made again: its rows do not all start from the same weights."
    )


def _not_run(runs: list[Record], rows: list[str]) -> str:
    """A sentence where the preset has more rows than these."""
    preset = figure3_tiny.PRESETS.get(runs[0].preset)
    there = preset.rows if preset else ()
    left = [row for row in there if row.label not in rows]
    return f" Not run yet: {len(left)} of {len(there)} rows." if left else ""


def _chosen_line(row: str, own: Best, base: Best | None) -> list[str]:
    """A row of the table."""
    runs, metrics = own.runs, [r.metrics for r in own.runs]
    cells = [row, f"{runs[0].rate:g}", f"{runs[0].attention_parameters:,}"]
    cells.append(reached(accuracy(runs, "top5", converted=True), percent("top5", [m["converted"] for m in metrics])))
    for name in ("top5", "top1"):
        if diverged(runs):
            cells += [divergence(runs), ""]
            continue
        cells.append(reached(accuracy(runs, name), percent(name, metrics)))
        beside = base and own is not base and not diverged(base.runs) and accuracy_difference(runs, base.runs, name)
        cells.append(with_interval(beside, 100, 1) if beside else "")
    return cells


def reached(estimate: Estimate | None, plain: str) -> str:
    """ "81.2 [80.1, 82.3]"; the plain mean where there is no interval."""
    return f"{100 * estimate.value:.1f} [{100 * estimate.low:.1f}, {100 * estimate.high:.1f}]" if estimate else plain


def _chosen_title(record: Record, best: dict[str, Best]) -> str:
    c, data = record.config, record.data
    seeds = each_once(
        str(len([r for r in own.runs if own.settings == 1 or r is not own.chooser]) or "none") for own in best.values()
    )
    return (
        f"**Figure 3 as a table, REDUCED SCALE, not the paper's: a vision transformer on {data['name']}, {data['classes']} classes; "
        f"rows start from {STARTS['hosvd']}.** Width {c['d_model']}, {c['n_heads']} heads, {c['n_layers']} layers. It was pretrained with "
        f"MHA for {c['pretrain']['steps']:,} steps on {data['train_images']:,} images, converted, and fine-tuned for {epochs_of(record)}. "
        f"Seeds that judge: {seeds}. {data['test_images']:,} test images. The paper's accuracies are not available to us."
    )


def percent(name: str, metrics: list[dict]) -> str:
    """Mean and spread over seeds, in per cent.

    Args:
        name: of the share.
        metrics: of each seed.
    """
    return mean_and_spread([100 * m[name] for m in metrics], 1)
