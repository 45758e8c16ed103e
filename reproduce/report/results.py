"""Every table of this repository, drawn from records and from nothing else."""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Container
from functools import partial
from pathlib import Path

from ..models.rows import TABLE2, labels_of
from ..store.files import write_atomically
from ..store.records import Record
from .gpu import ablation_table, best_table, budget_tables, cures_table, fresh_table, loss_cell, sweep_table
from .markdown import markdown
from .query import (
    BUDGETS,
    alike,
    attention_mb,
    by_command,
    by_device,
    by_model,
    by_row,
    cache_mb,
    complete,
    diverged,
    grouped,
    of_one_budget,
    sizes_of,
)
from .speed import speed_tables
from .words import (
    commands_of,
    commit_of,
    data_in_words,
    devices_of,
    difference,
    divergence,
    each_once,
    epochs_of,
    mean_and_spread,
    scale_of,
)

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
OURS = {"MLA separated d_c=128": {"cache"}, "Tucker [8,128,64] shared": {"parameters", "cache"}}  # formulas that we derived
PAPER_SCHEDULE = "the paper's latent schedule"  # the control of `exactness` that has a column of its own


def render(records: list[Record], experiments: Container[str] | None = None) -> str:
    """Tables under a heading for each experiment, in the paper's order, with where the numbers come from.

    Args:
        records: of all experiments, since some tables hold several.
        experiments: which to draw, all if None.

    Returns:
        Markdown, empty where nothing is to be shown.

    Raises:
        ValueError: naming the file, if a record lacks what its table shows.
    """
    groups = grouped(records, lambda r: (r.experiment, r.preset))
    sections = []
    for experiment, (heading, draw) in DRAW.items():
        tables = []
        for (name, preset), group in sorted(groups.items(), key=lambda item: item[0][1] != "sizes"):  # sizes first
            if name == experiment and (experiments is None or name in experiments):
                with complete(f"{name}.{preset}.json: a record lacks what its table shows"):
                    if (name, preset) in TOGETHER:
                        tables += TOGETHER[name, preset](records)
                    else:
                        tables += draw[preset if preset in draw else "runs"](group)
        if tables:
            sections += [f"### {heading}", *tables]
    return "\n\n".join(sections)


def table1_sizes(records: list[Record]) -> list[str]:
    """One layer of each kind at GPT-2's shape: formulas against the real module and the real cache."""

    def formulas(label: str) -> list[str]:
        said = zip(("parameters", "cache"), FORMULAS[label])
        return [formula + (" (ours)" if column in OURS.get(label, ()) else "") for column, formula in said]

    rows = [
        [
            r["label"],
            *formulas(r["label"]),
            f"{r['parameters']:,}",
            f"{r['counted_parameters']:,}",
            f"{r['cache_per_token']:,}",
            f"{r['counted_cache_per_token']:,}",
        ]
        for r in sizes_of(records)
    ]
    header = ["layer", "parameters", "cache per token", "parameters: formula", "module", "cache: formula", "cache object"]
    title = (
        "**Table 1, at GPT-2's shape (d 768, 12 heads): one layer, each formula against the real module and the real cache.**"
    )
    return [title, markdown(header, rows)]


def table2_sizes(records: list[Record]) -> list[str]:
    """Table 2's megabytes of attention and of cache, the paper's and ours."""
    shape = records[0].config
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


def each(draw: Callable[[list[Record]], list[str]], split: Callable = alike) -> Callable[[list[Record]], list[str]]:
    """Draws a table for each group of runs that may stand in one.

    Args:
        draw: a group's records -> Markdown, piece by piece.
        split: records -> groups.
    """
    return lambda records: [part for group in split(records) for part in draw(group)]


def loss_table(experiment: str, records: list[Record]) -> list[str]:
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
        rows.append(
            [
                label,
                *([f"{rates[label]:g}"] if own else []),
                f"{metrics[0]['attention_parameters']:,}",
                f"{metrics[0]['cache_per_token']:,}",
                loss_cell(group),
                "—" if diverged(group) else mean_and_spread([m["bits_per_byte"] for m in metrics], 3),
            ]
        )
    c, train = records[0].config, records[0].train
    tokens = f"{train['steps'] * train['batch_size'] * c['context'] / 1e6:,.2f}M training tokens"
    narrower = budget.narrower(c)
    if narrower > 1:
        scale = f", validation loss at REDUCED SCALE, not the paper's: d {c['d_model']}, {c['n_layers']} layers, N {c['context']}, {tokens}"
        named = f" The rows are named as in the paper; all widths and ranks but the head rank are divided by {narrower}."
    else:
        short = train["steps"] < budget.paper_steps
        scale = f" at the paper's shape, validation loss{' at REDUCED BUDGET' if short else ''}: {tokens}"
        named = f" {train['steps']:,} steps in place of {budget.paper_steps:,}." if short else ""
    header = [
        "row, narrowed" if narrower > 1 else "row",
        *(["rate"] if own else []),
        "attention parameters",
        "cached per token",
    ]
    header += ["validation loss (nats/token)", "bits per byte"]
    said = "each row at its own learning rate" if own else f"learning rate {rates.popitem()[1]:g} for every row"
    title = f"**{budget.title}{scale}.**{named} The paper's losses are not available to us."
    return [title, markdown(header, rows), provenance(records, said)]


def ablation_runs(records: list[Record]) -> list[str]:
    """At a scale that shows no more than that each recipe runs."""
    runs = of_one_budget(records)
    c = runs[0].config

    def label(record: Record) -> str:
        rate = record.rate
        return record.method + (f", rate {rate:g}" if rate != c["train"]["learning_rate"] else "")

    title = (
        f"**Initialisations and cures at REDUCED SCALE, d {c['d_model']}, {c['n_layers']} layers, {c['train']['steps']} steps: each of "
        "them runs; which is best this is too short to tell.**"
    )
    rows = [[name, loss_cell(group)] for name, group in grouped(runs, label).items()]
    return [title, markdown(["row", "validation loss (nats/token)"], rows), provenance(runs, "")]


def table3_sizes(records: list[Record]) -> list[str]:
    """Table 3's sizes of attention, the paper's and ours in both readings of its unit."""
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


def figure3_runs(records: list[Record]) -> list[str]:
    """Figure 3 as a table: accuracy of each row, converted only and fine-tuned; nothing where only the start was trained."""
    tuned = [r for r in records if r.is_trained]
    if not tuned:  # nothing is fine-tuned yet
        return []
    rows = []
    for label, group in by_row(records).items():
        metrics = [r.metrics for r in group]
        at_once = [m["converted"] for m in metrics if "converted" in m]
        rows.append(
            [
                label,
                f"{metrics[0]['attention_parameters']:,}",
                percent("top1", at_once) if at_once else "not converted",
                divergence(group) or percent("top1", metrics),
                "—" if diverged(group) else percent("top5", metrics),
            ]
        )
    c, data = tuned[0].config, tuned[0].data
    rest = f"fine-tuned for {epochs_of(tuned[0])}; {data['test_images']:,} test images.**"
    if "pretrain" in c:
        title = (
            f"**Figure 3 as a table, REDUCED SCALE, not the paper's: a ViT of d {c['d_model']}, {c['n_heads']} heads, {c['n_layers']} "
            f"layers, pretrained with MHA for {c['pretrain']['steps']:,} steps on {data['train_images']:,} images of {data['name']}, "
            f"converted, and {rest} The paper fine-tunes ViTs that were pretrained on far more images; its accuracies are not "
            "available to us."
        )
    else:
        title = (
            f"**Figure 3 as a table: {c['model']}, pretrained by others, converted, and on {data['train_images']:,} images of "
            f"{data['name']} {rest} The paper's accuracies are not available to us."
        )
    header = ["row", "attention parameters", "top-1 %, converted only", "top-1 %, fine-tuned", "top-5 %, fine-tuned"]
    return [title, markdown(header, rows), provenance(tuned, f"learning rate {c['train']['learning_rate']:g} for every row")]


def percent(name: str, metrics: list[dict]) -> str:
    """Mean and spread over seeds, in per cent.

    Args:
        name: of the share.
        metrics: of each seed.
    """
    return mean_and_spread([100 * m[name] for m in metrics], 1)


def decode_runs(records: list[Record]) -> list[str]:
    """Cache bytes and milliseconds of one more token by row and context, beside multi-head attention's in the same run."""
    contexts = list(records[0].metrics["milliseconds"])
    mha = next((r.metrics["milliseconds"] for r in records if r.method == "MHA"), None)
    rows = []
    for r in records:
        times = r.metrics["milliseconds"]
        cells = [f"{times[c]:.2f}" + (f" ({times[c] / mha[c]:.2f})" if mha else "") for c in contexts]
        rows.append([r.method, f"{r.metrics['cache_bytes_per_token']:,}", *cells])
    c = records[0].config
    title = (
        f"**Decoding: cache and time of one more token, one layer of GPT-2's shape (d {c['d_model']}, {c['n_heads']} heads), "
        f"{c['precision']}, batch {c['batch']}; milliseconds, and in brackets the ratio to MHA in the same run.** "
        "One layer, not a model; these are not the paper's measurements."
    )
    header = ["row", "cache bytes a token", *(f"after {int(c):,} tokens" for c in contexts)]
    note = (
        f"<sub>Medians of {c['repeats']} timings, rows in turns; {records[0].device}; `{records[0].command}`. Tucker mixes its "
        "core into the heads anew at every step here, which a decoder needs to do only once per update of the weights.</sub>"
    )
    return [title, markdown(header, rows), note]


def compress_runs(records: list[Record]) -> list[str]:
    """A table and a note for each model that was compressed."""
    sections = []
    for group in by_model(records):
        sections += [compress_table(group), compress_note(group)]
    return sections


def compress_table(records: list[Record]) -> str:
    """Sizes and errors of each row of one model, truncated for the weights alone and knowing the inputs."""
    model = records[0].config["model"]
    c, data, before = records[0].config, records[0].data, records[0].metrics["before"]
    score = next((name for name in ("loss", "top1") if name in before), "agreement")
    rows = []
    for r in records:
        m = r.metrics
        sizes = [f"{m['attention_parameters']:,}", f"{m['cache_per_token']:,}"]
        pooled = {"mean-pooled": ("mean",)} if "mean" in m["ways"] else {}
        for name, ways in ({"": ("plain", "aware")} | pooled).items():
            errors = [m["ways"][way] for way in ways]
            columns = [[e["weights"][0] for e in errors], [e["weights"][1] for e in errors]]
            columns += [[e["inputs"][0] for e in errors], [e["inputs"][1] for e in errors], [e[score] for e in errors]]
            rows.append(
                [" ".join([r.method, name]).strip(), *sizes, *(" / ".join(f"{v:.3f}" for v in column) for column in columns)]
            )
    scale = "" if records[0].preset == "models" else ", REDUCED SCALE"
    names = {"loss": "loss (nats/token)", "top1": "top-1", "agreement": "same first guess"}
    title = (
        f"**{model}{scale}: trained layers (d {c['d_model']}, {c['n_heads']} heads, {c['n_layers']} layers) compressed, not trained "
        f"further.** In each cell: truncated for the weights alone / knowing the inputs ({data['calibration']:,} {data['unit']} of "
        f"{data['name']}; measured on {data['test']:,} others). Errors are relative, means over layers."
        + (f" The {names[score]} was {before[score]:.3f} before." if score in before else "")
    )
    header = [
        "row",
        "attention parameters",
        "cached per token and layer",
        "error of W",
        "of W~",
        "of logits",
        "of outputs",
        names[score],
    ]
    return "\n\n".join([title, markdown(header, rows)])


def compress_note(records: list[Record]) -> str:
    """In how many cases it paid to know the inputs, and in which it did not."""
    counts, missed = [], []
    for name, value in (
        ("error of logits", lambda errors: errors["inputs"][0]),
        ("error of outputs", lambda errors: errors["inputs"][1]),
        ("loss", lambda errors: errors.get("loss")),
    ):
        pairs = {r.method: [value(r.metrics["ways"][way]) for way in ("aware", "plain")] for r in records}
        if None in (v for pair in pairs.values() for v in pair):
            continue
        counts.append(f"the {name} in {sum(aware < plain for aware, plain in pairs.values())} of {len(pairs)} rows")
        if name != "loss":
            missed += [f"{name} of {label}" for label, (aware, plain) in pairs.items() if aware >= plain]
    text = f"Knowing the inputs lowered {', '.join(counts)}" + (f"; not {', '.join(missed)}" if missed else "")
    return f"<sub>{text}. {each_once(r.device for r in records)}; {commands_of(records)}</sub>"


def compress_speed_runs(records: list[Record]) -> list[str]:
    """Seconds and megabytes of the HOSVD from factors and from tensors, with how they grow."""
    r = records[-1]
    sizes = r.metrics["sizes"]
    rows = []
    for size in sizes:
        ours, dense = size["factors"], size["tensors"]
        rows.append(
            [
                f"{size['d_model']:,}, {size['n_heads']}",
                f"[{','.join(map(str, size['ranks']))}]",
                f"{ours['seconds']:.2f}",
                f"{dense['seconds']:.2f}",
                f"{dense['seconds'] / ours['seconds']:.1f}",
                f"{ours['megabytes']:,.0f}",
                f"{dense['megabytes']:,.0f}",
                f"{dense['megabytes'] / ours['megabytes']:.1f}",
            ]
        )
    title = (
        "**The truncated HOSVD of one multi-head layer, from its factors (`compress`) and by forming both tensors and calling "
        "TensorLy's Tucker on them (no sweeps), float64.** Both find the same core norms before a ratio is taken."
    )
    header = [
        "d, heads", "ranks", "s, factors", "s, tensors", "ratio", "peak MB, factors", "peak MB, tensors", "ratio"
    ]  # fmt: skip
    laws = ", ".join(
        f"{what} of the {way} as d to the {growth(sizes, way, what):.1f}"
        for what in ("seconds", "megabytes")
        for way in ("factors", "tensors")
    )
    note = f"Growth between the two largest sizes: {laws}. Peak memory is what the call adds to the layer itself"
    return [
        title,
        markdown(header, rows),
        f"<sub>{note}; {r.device}, torch {r.versions['torch']}; `{r.command}`</sub>",
    ]


def growth(sizes: list[dict], way: str, what: str) -> float:
    """The exponent of the width between the two largest sizes.

    Args:
        sizes: of the record, from small to large.
        way: "factors" or "tensors".
        what: "seconds" or "megabytes".
    """
    small, large = sizes[-2:]
    return math.log(large[way][what] / small[way][what]) / math.log(large["d_model"] / small["d_model"])


def spectra_runs(records: list[Record]) -> list[str]:
    """Effective ranks of each row's unfoldings, means over layers."""
    modes = [(side, mode) for side, layer in records[0].metrics["trained"][0].items() for mode in layer]

    def cell(r: dict, side: str, mode: str) -> str:
        means = {
            state: statistics.mean(layer[side][mode]["entropy_rank"] for layer in layers) for state, layers in r.metrics.items()
        }
        before = f" ({means['initial']:.1f})" if "initial" in means else ""
        return f"{means['trained']:.1f}{before} of {r.metrics['trained'][0][side][mode]['size']}"

    order = labels_of(TABLE2)
    records = sorted(records, key=lambda r: order.index(r.method) if r.method in order else len(order))
    several = len({r.seed for r in records}) > 1
    rows = [[r.method + (f", seed {r.seed}" if several else ""), *(cell(r, *m) for m in modes)] for r in records]
    if records[0].preset == "models":
        title = "**Effective ranks of models that were named:** exp(entropy) of singular values of each unfolding, mean over layers."
        return [title, markdown(["model", *mode_titles(modes)], rows), f"<sub>{commands_of(records)}</sub>"]
    c = records[0].config
    title = (
        f"**Effective ranks of trained layers {scale_of(c)}: d {c['d_model']}, {c['n_heads']} heads, "
        f"{c['n_layers']} layers, {c['train']['steps']} steps.** exp(entropy) of the singular values of each unfolding, mean over "
        "layers; in brackets before training; then how many there are."
    )
    header = ["GPT-2 row", *mode_titles(modes)]
    devices = each_once(r.device for r in records)
    return [title, markdown(header, rows), f"<sub>{devices}; {commands_of(records)}</sub>"]


def mode_titles(modes: list[tuple[str, str]]) -> list[str]:
    """("pre", "head") as "W head", ("post", "head") as "W~ head"."""
    return [f"{'W' if side == 'pre' else 'W~'} {mode}" for side, mode in modes]


def exactness_cells(records: list[Record]) -> list[str]:
    """One line per mechanism and rotary embedding; biases, masks, paths and pairings together, the worst of them shown."""
    groups = defaultdict(list)
    for cell in records[-1].metrics["cells"]:
        c = cell["cell"]
        rotary = "head-width" if c["rotary"].startswith("head-width") else c["rotary"]
        norms = ", latent norms" if c["norm"] else ", QK-norm" if c.get("qk_norm") else ""
        groups[c["mechanism"] + norms, rotary].append(cell)
    becomes = {
        "none": "none",
        "head-width": "head schedule, once per key/value head",
        "decoupled": "zeros, then the head schedule",
    }
    rows = []
    for (layer, rotary), cells in groups.items():
        schedule = [c["controls"][PAPER_SCHEDULE] for c in cells if PAPER_SCHEDULE in c["controls"]]
        rows.append(
            [
                layer,
                rotary,
                becomes.get(rotary, "the paper's latent schedule"),
                f"{max(max(c['errors'].values()) for c in cells):.0e}",
                f"{min(schedule):.1f}: not exact" if schedule else "no RoPE" if rotary == "none" else "the same",
                f"{min(min(c['controls'].values()) for c in cells):.1f}",
                "no: norms are not linear" if "norm" in layer else "yes",
            ]
        )
    title = "**Which layers are exact Tucker Attentions, under which rotary embedding: relative error in float64.**"
    header = [
        "layer", "its RoPE", "frequencies of the Tucker latent", "worst error", "with the paper's latent schedule instead",
        "smallest control", "Def. 2.1",
    ]  # fmt: skip
    count = sum(len(c["errors"]) for c in records[-1].metrics["cells"])
    note = (
        f"<sub>The worst of {count} comparisons of outputs and input gradients: all biases, masks, both pairings, and outputs of "
        f"cached decoding; `{records[-1].command}`</sub>"
    )
    return [title, markdown(header, rows), note]


def provenance(records: list[Record], extra: str) -> str:
    """One line under a table: data, global batch, devices, versions, commits and commands.

    Args:
        records: runs that are `alike`.
        extra: what else is to be said, if anything.
    """
    settings = records[0].train
    parts = [
        f"Data: {data_in_words(records[0])}",
        f"{settings['steps']:,} steps at global batch {settings['batch_size']}",
        extra,
        f"± is the standard deviation over seeds, where there are several; {devices_of(records)}",
        f"commit {each_once(map(commit_of, records))}; {commands_of(records)}",
    ]
    return "<sub>" + "; ".join(p for p in parts if p) + "</sub>"


DRAW = {  # the heading, and what draws each preset's records
    "exactness": ("Exact special cases", {"float64": exactness_cells}),
    "table1": ("Table 1: parameters and cache", {"sizes": table1_sizes}),
    "table2": ("Table 2: GPT-2", {"sizes": table2_sizes, "runs": each(partial(loss_table, "table2"))}),
    "ablations": ("What makes it train well", {"runs": ablation_runs}),
    "spectra": ("Ranks of trained layers", {"runs": each(spectra_runs), "models": spectra_runs}),
    "table3": ("Table 3: Llama", {"sizes": table3_sizes, "runs": each(partial(loss_table, "table3"))}),
    "compress": ("Compressed without training", {"runs": compress_runs}),
    "compress_speed": ("What compressing costs", {"runs": compress_speed_runs}),
    "figure3": ("Figure 3: vision transformers", {"runs": each(figure3_runs)}),
    "decode": ("Decoding", {"runs": each(decode_runs, by_command)}),
    "speed": ("Speed on a GPU", {"runs": each(speed_tables, by_device)}),
}
TOGETHER = {  # drawn from several experiments' records
    ("table2", "gpu-sweep"): sweep_table,
    ("table2", "gpu-fresh"): fresh_table,
    ("table2", "gpu"): lambda records: budget_tables(records, "table2"),
    ("table3", "gpu"): lambda records: budget_tables(records, "table3"),
    ("ablations", "gpu-sweep"): ablation_table,
    ("ablations", "gpu"): lambda records: cures_table(records) + best_table(records),
}


def write_into(path: Path, parts: dict[tuple[str, str], str]) -> None:
    """Replace what stands between pairs of marks of a Markdown file.

    Args:
        path: the file.
        parts: by the pair, what belongs between.

    Raises:
        ValueError: if it has not the marks of the first part; those of others may be missing.
    """
    try:
        page = path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from None
    begin, end = next(iter(parts))
    if not -1 < page.find(begin) < page.find(end):
        raise ValueError(f"{path} lacks the marks between which results belong: {begin} and {end}")
    for (begin, end), part in parts.items():
        if part and begin in page and end in page:
            before, rest = page.split(begin, 1)
            page = f"{before}{begin}\n\n{part}\n\n{end}{rest.split(end, 1)[1]}"
    write_atomically(path, lambda file: file.write(page.encode()))
