"""Every table of this repository, drawn from records and from nothing else."""

from collections import defaultdict
from pathlib import Path

from .tables import difference, markdown, mean_and_spread

BEGIN, END = "<!-- results: written by `python -m reproduce report --write README.md` -->", "<!-- end of results -->"
FORMULAS = {
    "MHA": ("4 d²", "2 d"),
    "MQA": ("2 d² + 2 d_H d", "2 d_H"),
    "GQA n_KV=4": ("2 d² + 2 n_KV d_H d", "2 n_KV d_H"),
    "MLA shared d_c=128": ("d² + 5 d d_c", "d_c"),
    "MLA separated d_c=128": ("d² + 6 d d_c", "2 d_c"),
    "Tucker [8,128,64]": ("2 (n_H r1 + d r2 + d r3 + r1 r2 r3)", "2 r3"),
    "Tucker [8,128,64] shared": ("2 (n_H r1 + d r2 + r1 r2 r3) + d r3", "r3"),
}


def render(records: list[dict]) -> str:
    """All tables, in the paper's order, each with where its numbers come from.  Returns: Markdown."""
    groups = defaultdict(list)
    for record in records:
        groups[record["experiment"], record["preset"]].append(record)
    sections = []
    for experiment, draw in DRAW.items():
        for (name, preset), group in sorted(groups.items(), key=lambda item: item[0][1] != "sizes"):  # sizes first
            if name == experiment:
                sections += draw[preset if preset == "sizes" else "runs"](group)
    return "\n\n".join(sections)


def table1_sizes(records: list[dict]) -> list[str]:
    rows = [
        [
            r["label"],
            *FORMULAS[r["label"]],
            f"{r['parameters']:,}",
            f"{r['counted_parameters']:,}",
            f"{r['cache_per_token']:,}",
        ]
        for r in sizes_of(records)
    ]
    header = ["layer", "parameters", "cache per token", "by formula", "in the module", "numbers cached"]
    title = "**Table 1, at GPT-2's shape (d 768, 12 heads): one layer, formula against the parameters of the real module.**"
    return [title, markdown(header, rows)]


def table2_sizes(records: list[dict]) -> list[str]:
    shape = records[0]["config"]
    rows = []
    for r in sizes_of(records):
        cells = [r["label"]]
        for column, ours in (("attention_mb", attention_mb(r, shape)), ("cache_mb", cache_mb(r, shape))):
            printed = r["paper"][column]
            cells += [f"{printed:.2f}", f"{ours:.2f}", difference(ours, printed)]
        rows.append(cells)
    title = "**Table 2, GPT-2, sizes at the paper's shape (12 layers, N 1024; BF16, MB = 10⁶ bytes).**"
    header = ["GPT-2 row", "attention MB: paper", "here", "diff.", "KV cache MB: paper", "here", "diff."]
    return [title, markdown(header, rows)]


def table2_runs(records: list[dict]) -> list[str]:
    runs = by_row(records)
    return [sweep_table(runs)] if records[0]["preset"].endswith("sweep") else loss_table(runs)


def loss_table(runs: dict[str, list[dict]]) -> list[str]:
    example = next(iter(runs.values()))[0]
    rows = []
    for label, group in runs.items():
        metrics = [r["metrics"] for r in group]
        rows.append(
            [
                label,
                f"{metrics[0]['attention_parameters']:,}",
                f"{metrics[0]['cache_per_token']:,}",
                mean_and_spread([m["validation_loss"] for m in metrics], 3),
                mean_and_spread([m["bits_per_byte"] for m in metrics], 3),
            ]
        )
    c, t = example["config"], example["config"]["train"]
    narrower = 768 // c["d_model"]
    scale = (
        f"**Table 2, validation loss at REDUCED SCALE, not the paper's: d {c['d_model']}, {c['n_layers']} layers, N {c['context']}, "
        f"{example['metrics']['tokens_seen'] / 1e6:.2f}M training tokens.** The rows are named as in the paper; all widths and "
        f"ranks but the head rank are divided by {narrower}. The paper's losses are not available to us."
    )
    header = ["row, narrowed", "attention parameters", "cached per token", "validation loss (nats/token)", "bits per byte"]
    return [scale, markdown(header, rows), provenance(example, f"learning rate {t['learning_rate']:g} for every row")]


def sweep_table(runs: dict[str, list[dict]]) -> str:
    rates = sorted({r["config"]["train"]["learning_rate"] for group in runs.values() for r in group})
    rows = []
    for label, group in runs.items():
        by_rate = defaultdict(list)
        for r in group:
            by_rate[r["config"]["train"]["learning_rate"]].append(r["metrics"]["validation_loss"])
        rows.append([label, *(mean_and_spread(by_rate[rate], 3) if rate in by_rate else "not run" for rate in rates)])
    example = next(iter(runs.values()))[0]
    title = (
        "**Learning-rate sweep for Table 2 at the paper's GPT-2 shape, REDUCED BUDGET: "
        f"{example['metrics']['tokens_seen'] / 1e6:.1f}M training tokens; validation loss in nats/token.**"
    )
    table = markdown(["peak learning rate", *(f"{rate:g}" for rate in rates)], rows)
    return "\n\n".join([title, table, provenance(example)])


def table3_sizes(records: list[dict]) -> list[str]:
    rows = []
    for r in sizes_of(records):
        printed = r["paper"]["size"]
        parameters, megabytes = r["parameters"] * 16 / 1e6, r["parameters"] * 8 * 2 / 1e6
        rows.append(
            [
                r["label"],
                f"{r['parameters']:,}",
                f"{printed:g}",
                f"{parameters:.1f}",
                f"{megabytes:.1f}",
                difference(parameters, printed),
            ]
        )
    header = ["LLaMA3-1B row", "parameters a layer", "paper", "10⁶ parameters, 16 layers", "MB in BF16, 8 layers", "diff."]
    title = (
        "**Table 3, LLaMA3-1B, attention size at the paper's shape (d 2048, 32 heads).** The paper's unit is not certain to us; "
        "the two readings that fit its numbers give the same figures. The row MLA is printed once in the paper, without saying "
        "whether its latents are shared."
    )
    return [title, markdown(header, rows)]


def figure3_runs(records: list[dict]) -> list[str]:
    runs = by_row(records)
    rows = [
        [
            label,
            f"{group[0]['metrics']['attention_parameters']:,}",
            mean_and_spread([100 * r["metrics"]["top1"] for r in group], 1),
            mean_and_spread([100 * r["metrics"]["top5"] for r in group], 1),
        ]
        for label, group in runs.items()
    ]
    example = next(iter(runs.values()))[0]
    c, data = example["config"], example["data"]
    title = (
        f"**Figure 3 as a table, REDUCED SCALE, not the paper's: a ViT of d {c['d_model']}, {c['n_heads']} heads, {c['n_layers']} "
        f"layers, trained from scratch on {data['train_images']:,} images of {data['name']}, {data['test_images']:,} test images.** "
        "The paper fine-tunes pretrained ViTs on ImageNet-1k; its accuracies are not available to us."
    )
    header = ["row", "attention parameters", "top-1 %", "top-5 %"]
    return [title, markdown(header, rows), provenance(example, f"learning rate {c['train']['learning_rate']:g} for every row")]


def sizes_of(records: list[dict]) -> list[dict]:
    """The rows of the (one) record of sizes."""
    return records[0]["metrics"]["rows"]


def by_row(records: list[dict]) -> dict[str, list[dict]]:
    """Training runs by row label, in the order of their first run."""
    groups = defaultdict(list)
    for record in records:
        groups[record["method"]].append(record)
    return dict(groups)


def attention_mb(row: dict, shape: dict) -> float:
    return row["parameters"] * shape["n_layers"] * 2 / 1e6


def cache_mb(row: dict, shape: dict) -> float:
    return row["cache_per_token"] * shape["context"] * shape["n_layers"] * 2 / 1e6


def provenance(record: dict, extra: str = "") -> str:
    """One line under a table: data, global batch, device, versions, commit and the command."""
    data, settings = record["data"], record["config"]["train"]
    parts = [
        f"Data: {data['name']} (sha256 {data['sha256'][:12]}…)",
        f"{settings['steps']:,} steps at global batch {settings['batch_size']}",
        extra,
        f"± is the standard deviation over seeds, where there are several; {record['device']}, torch {record['versions']['torch']}",
        f"commit {record['commit'][:10]}; `{record['command']}`",
    ]
    return "<sub>" + "; ".join(p for p in parts if p) + "</sub>"


DRAW = {
    "table1": {"sizes": table1_sizes},
    "table2": {"sizes": table2_sizes, "runs": table2_runs},
    "table3": {"sizes": table3_sizes},
    "figure3": {"runs": figure3_runs},
}


def write_into(path: Path, rendered: str) -> None:
    """Replace what stands between the two result marks of a Markdown file.  Raises ValueError if it has none."""
    text = path.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} lacks the marks between which results belong: {BEGIN} and {END}")
    before, rest = text.split(BEGIN, 1)
    path.write_text(f"{before}{BEGIN}\n\n{rendered}\n\n{END}{rest.split(END, 1)[1]}")
