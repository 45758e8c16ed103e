"""Which modes of trained attention have room: models of ours and of others side by side, and what they lose when they are made smaller."""

import statistics

from ..store.records import Record
from .judge import CLEAR_DECAY, FAILED, REPRODUCED, UNRESOLVED, decays
from .markdown import Table, markdown
from .query import grouped, runs_of
from .unfoldings import MODES, STARTS, WAYS, by_optimizer, errors_without, layers_of, models_of, shares, texts_read
from .words import mode_titles

ALL_MODES = [(side, mode) for side, modes in MODES.items() for mode in modes]
KEPT = (1 / 4, 1 / 2, 3 / 4)  # of the heads
IN_WORDS = {REPRODUCED: "decays", UNRESOLVED: "depends on the measure", FAILED: "does not decay"}


def room_tables(records: list[Record]) -> list[Table]:
    """Effective ranks of all six unfoldings by model, and what the head mode would lose.

    Args:
        records: all that there are.
    """
    models = models_of(records) | by_optimizer(records)
    return [_effective(models), _judged(models), _head_mode(models)]


def _runs(models: dict[str, list[Record]]) -> list[Record]:
    return [r for runs in models.values() for r in runs]


def _effective(models: dict[str, list[Record]]) -> Table:
    rows = []
    for name, runs in models.items():
        for way, said in WAYS.items():
            if layers := layers_of(runs, way):
                starts = layers_of(runs, STARTS[way])
                cells = [_both(shares(layers, *m)) + (f" ({_both(shares(starts, *m))})" if starts else "") for m in ALL_MODES]
                rows.append([f"{name}, {said}", *cells])
    title = (
        "**Effective ranks of trained models, in per cent of their size.** By the singular values / by their squares, means over layers; "
        "in brackets the same layers as they start; –: not on record. W acts before the softmax, W~ after it."
    )
    if texts := texts_read(_runs(models)):
        title += f" On inputs: as they act on what the layer reads in {texts}."
    return Table("Room by mode", title, markdown(["model", *mode_titles(ALL_MODES)], rows), _runs(models))


def _both(pair: list[float | None]) -> str:
    return " / ".join("–" if x is None else f"{100 * x:.0f}" for x in pair)


def _judged(models: dict[str, list[Record]]) -> Table:
    """The rule of the claim about spectra, mode by mode."""
    rows = []
    for name, runs in models.items():
        for what, layers in ((name, layers_of(runs, "trained")), (f"{name}, as it starts", layers_of(runs, "initial"))):
            found = [shares(layers, *m) for m in ALL_MODES]
            if not any(None in pair for pair in found):
                rows.append([what, *(IN_WORDS[decays([x for x in pair if x is not None])] for pair in found)])
    title = (
        "**The rule for the paper's spectra, mode by mode.** A mode decays where both effective ranks are at most "
        f"{100 * CLEAR_DECAY:g} % of its size."
    )
    return Table("Room by the rule", title, markdown(["model", *mode_titles(ALL_MODES)], rows, words=True), _runs(models))


def _head_mode(models: dict[str, list[Record]]) -> Table:
    rows = []
    for name, runs in models.items():
        for way, said in WAYS.items():
            for side in MODES if layers_of(runs, way) else ():
                if way == "centred" and side == "post":
                    continue  # values have no keys
                heads = [layer[side]["head"] for layer in layers_of(runs, way)]
                curves = [errors_without(mode) for mode in heads]
                cells = [_spread([curve[max(1, round(kept * len(curve))) - 1] for curve in curves], runs) for kept in KEPT]
                rows.append([f"{name}, {said}, {'before' if side == 'pre' else 'after'} the softmax", *cells])
    title = (
        "**What fewer heads lose: the relative error of the tensor whose head mode keeps a part of its vectors.** Median over layers; in "
        "brackets the least, with its layer, and the largest. Heads of equal size that share nothing lose 0.87, 0.71 and 0.50."
    )
    header = ["model", *(f"{kept:.0%} of the heads" for kept in KEPT)]
    return Table("Room in the head mode", title, markdown(header, rows), _runs(models))


def _spread(errors: list[float], runs: list[Record]) -> str:
    """ "0.43 (0.12 in layer 1 to 0.47)"; layers count from 1, in each of the records."""
    least = min(range(len(errors)), key=errors.__getitem__)
    layer = least % (len(errors) // len(runs)) + 1
    return f"{statistics.median(errors):.2f} ({errors[least]:.2f} in layer {layer} to {max(errors):.2f})"


def compressed_tables(records: list[Record]) -> list[Table]:
    """A table for each model: what is left of it at each size.

    Args:
        records: of the experiment `compress_models`.
    """
    return [_compressed(runs) for runs in _by_model(records)]


def _compressed(runs: list[Record]) -> Table:
    runs = sorted(runs, key=lambda r: -r.metrics["share"])
    c, own = runs[0].config, runs[0].metrics["before"]
    tests = list(own["tests"])
    predicts = "bits_per_byte" in own["tests"][tests[0]]
    measures = {"bits_per_byte": "bits per byte"} if predicts else {"cosine": "cosine", "rank_correlation": "rank correlation"}
    header = [
        "row",
        "attention parameters",
        "cache",
        *(f"{_text(test)}: {said}" for test in tests for said in measures.values()),
    ]
    whole = [f"{own['tests'][test][m]:.3f}" if predicts else "1" for test in tests for m in measures]
    rows = [["as it is", f"{own['attention_parameters']:,}", f"{own['cache']:,}", *whole]]
    for r in runs:
        m = r.metrics
        sizes = [m["attention_parameters"] / own["attention_parameters"], m["cache"] / own["cache"]]
        scores = [f"{m['tests'][test][measure]:.3f}" for test in tests for measure in measures]
        rows.append([r.method, *(f"{100 * x:.0f} %" for x in sizes), *scores])
    judged = own["tests"][tests[0]]
    how = (
        f"Loss on {judged['tokens']:,} tokens of each text."
        if predicts
        else f"How far the embeddings of {judged['sentences']} sentences move: their mean cosine with those before, and Spearman's rank "
        "correlation of the similarities of all pairs."
    )
    title = (
        f"**{c['model']}, compressed without training, knowing the inputs.** Width {c['d_model']}, {c['n_layers']} layers of "
        f"{c['n_heads']} heads. Key heads: {c['n_kv_heads']}. The cache is in numbers a token, of all layers. {how}"
    )
    return Table("Models compressed", title, markdown(header, rows), runs)


def _text(file: str) -> str:
    return file.split(".")[0]


def commands(records: list[Record]) -> str:
    """The commands that made these tables, with minutes and a number to expect.

    Args:
        records: all that there are.
    """
    lines = []
    for r in runs_of(records, "spectra", "models"):
        head = [layer["pre"]["head"] for layer in r.metrics["trained"]]
        text = f" --text {r.data['name']}" if r.data else ""
        lines += [
            f"python -m reproduce spectra --model models/{r.method}{text}",
            f"#   {minutes([r])}; effective ranks of the head mode before the softmax, mean over layers: "
            f"{statistics.mean(mode['entropy_rank'] for mode in head):.2f} of {head[0]['size']}",
        ]
    for runs in _by_model(runs_of(records, "compress_models", "models")):
        first = runs[0]
        tests = list(first.metrics["before"]["tests"])
        name, score = next((n, s) for n, s in first.metrics["tests"][tests[0]].items() if n in ("bits_per_byte", "cosine"))
        lines += [
            f"python -m reproduce compress_models --model models/{first.config['model']} --text {first.data['name']} "
            f"--test {','.join(tests)}",
            f"#   {len(runs)} rows, {minutes(runs)}; {first.method}: {score:.3f} {name.replace('_', ' ')}",
        ]
    return "```sh\n" + "\n".join(lines) + "\n```" if lines else ""


def minutes(runs: list[Record]) -> str:
    """Of all of them together."""
    taken = max(1, round(sum(r.wall_seconds for r in runs) / 60))
    return f"{taken} minute{'s' * (taken > 1)}"


def _by_model(records: list[Record]) -> list[list[Record]]:
    """Records of one model, judged on the same texts, together."""
    return list(
        grouped(records, lambda r: (r.config["model"], r.config.get("weights"), *r.metrics["before"]["tests"])).values()
    )
