"""Which modes of trained attention have room: models of ours and of others side by side, and what they lose when they are made smaller."""

import statistics
from collections.abc import Sequence

from ..experiments import compress_models
from ..store.records import Record
from .cells import with_interval
from .judge import CLEAR_DECAY, FAILED, REPRODUCED, UNRESOLVED, decays, over_windows
from .markdown import Table, markdown
from .query import grouped, runs_of
from .unfoldings import MODES, STARTS, WAYS, by_optimizer, errors_with, layers_of, models_of, share, shares, texts_read
from .words import mode_titles, ranges

ALL_MODES = [(side, mode) for side, modes in MODES.items() for mode in modes]
KEPT = (1 / 4, 1 / 2, 3 / 4)  # of the heads
MEASURES = {1: "by values", 2: "by squares"}  # powers of the singular values
IN_WORDS = {REPRODUCED: "decays", UNRESOLVED: "depends on the measure", FAILED: "does not decay"}


def room_tables(records: list[Record]) -> list[Table]:
    """Effective ranks of all six unfoldings by model and by layer, and what the head mode would lose.

    Args:
        records: all that there are.
    """
    models = models_of(records) | by_optimizer(records)
    return [_effective(models), _by_layer(models), _judged(models), _head_mode(models)]


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


def _by_layer(models: dict[str, list[Record]]) -> Table:
    rows, said = [], []
    for name, runs in models.items():
        for way, what in WAYS.items():
            for power, measure in MEASURES.items():
                if found := _shares_by_layer(layers_of(runs, way), power):
                    rows.append([f"{name}, {what}, {measure}", *(_extremes(mode, runs) for mode in found)])
                    if (way, power) == ("trained", 2):
                        said.append(_head_mode_of(name, found[0], runs))
    title = (
        "**Effective ranks by layer, in per cent of their size.** The least, with its layer / the median / the largest, with its layer. "
        "Layers count from one."
    )
    return Table("Room by layer", title, markdown(["model", *mode_titles(ALL_MODES)], rows), _runs(models), "\n".join(said))


def _shares_by_layer(layers: list[dict], power: int) -> list[list[float]]:
    """Of each mode its effective ranks over its size, layer by layer; empty where an older record does not say."""
    found = [[share(layer[side][mode], power) for layer in layers] for side, mode in ALL_MODES]
    known = [[x for x in mode if x is not None] for mode in found]
    return known if layers and known == found else []


def _extremes(values: list[float], runs: list[Record]) -> str:
    """ "39 (1) / 83 / 94 (6)"."""
    first, last = (end(range(len(values)), key=values.__getitem__) for end in (min, max))
    low, middle, high = (f"{100 * x:.0f}" for x in (values[first], statistics.median(values), values[last]))
    return f"{low} ({_layer(first, values, runs)}) / {middle} / {high} ({_layer(last, values, runs)})"


def _layer(place: int, values: Sequence, runs: list[Record]) -> int:
    """The number of a layer, from 1, in each of the records."""
    return place % (len(values) // len(runs)) + 1


def _head_mode_of(name: str, heads: list[float], runs: list[Record]) -> str:
    """How far the layer with the least effective rank of the head mode is from the others."""
    size = layers_of(runs, "trained")[0]["pre"]["head"]["size"]
    ranks = [size * x for x in heads]
    first = min(range(len(ranks)), key=ranks.__getitem__)
    others = ranks[:first] + ranks[first + 1 :]
    elsewhere = f" In the others it has {min(others):.1f} to {max(others):.1f}." if others else ""
    return (
        f"- {name}: by squares the head mode before the softmax has least in layer {_layer(first, ranks, runs)}, {ranks[first]:.1f} of "
        f"{size}.{elsewhere}"
    )


def _judged(models: dict[str, list[Record]]) -> Table:
    """The rule of the claim about spectra, mode by mode."""
    rows = []
    for name, runs in models.items():
        for what, layers in ((name, layers_of(runs, "trained")), (f"{name}, as it starts", layers_of(runs, "initial"))):
            both = [_shares_by_layer(layers, power) for power in MEASURES]
            if all(both):
                rows.append([what, *(_by_the_rule(list(zip(*mode)), runs) for mode in zip(*both))])
    title = (
        "**The rule for the paper's spectra, mode by mode.** A mode decays where both effective ranks are at most "
        f"{100 * CLEAR_DECAY:g} % of its size, as means over layers. In brackets the layers of which each decays when it is judged alone."
    )
    return Table("Room by the rule", title, markdown(["model", *mode_titles(ALL_MODES)], rows, words=True), _runs(models))


def _by_the_rule(layers: list[tuple[float, ...]], runs: list[Record]) -> str:
    """ "depends on the measure (1)".  layers: effective ranks over size by both measures."""
    word = IN_WORDS[decays([statistics.mean(measure) for measure in zip(*layers)])]
    alone = [place for place, both in enumerate(layers) if decays(both) == REPRODUCED]
    if len(alone) in (0, len(layers)):
        return f"{word} ({'all' if alone else 'none'})"
    return f"{word} ({ranges([_layer(place, layers, runs) for place in alone])})"


def _head_mode(models: dict[str, list[Record]]) -> Table:
    rows = []
    for name, runs in models.items():
        for way, said in WAYS.items():
            for side in MODES if layers_of(runs, way) else ():
                if way == "centred" and side == "post":
                    continue  # values have no keys
                cells = [_spread(errors_with(layers_of(runs, way), side, kept), runs) for kept in KEPT]
                rows.append([f"{name}, {said}, {'before' if side == 'pre' else 'after'} the softmax", *cells])
    title = (
        "**What fewer heads lose: the relative error of the tensor whose head mode keeps a part of its vectors.** Median over layers; in "
        "brackets the least, with its layer, and the largest. Heads of equal size that share nothing lose 0.87, 0.71 and 0.50."
    )
    header = ["model", *(f"{kept:.0%} of the heads" for kept in KEPT)]
    return Table("Room in the head mode", title, markdown(header, rows), _runs(models))


def _spread(errors: list[float], runs: list[Record]) -> str:
    """ "0.43 (0.12 in layer 1 to 0.47)"."""
    least = min(range(len(errors)), key=errors.__getitem__)
    return f"{statistics.median(errors):.2f} ({errors[least]:.2f} in layer {_layer(least, errors, runs)} to {max(errors):.2f})"


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
    beside = _beside_mla(runs, tests)
    header = ["row", "attention parameters", "cache"]
    for test in tests:
        header += [f"{_text(test)}: {said}" for said in measures.values()]
        header += [f"{_text(test)}: minus MLA's"] if beside else []
    rows = [["as it is", f"{own['attention_parameters']:,}", f"{own['cache']:,}"]]
    for test in tests:
        rows[0] += [f"{own['tests'][test][m]:.3f}" if predicts else "1" for m in measures] + [""] * bool(beside)
    for r in runs:
        m = r.metrics
        sizes = [m["attention_parameters"] / own["attention_parameters"], m["cache"] / own["cache"]]
        cells = [r.method, *(f"{100 * x:.0f} %" for x in sizes)]
        for test in tests:
            cells += [f"{m['tests'][test][measure]:.3f}" for measure in measures]
            cells += [beside.get((r.method, test), "")] if beside else []
        rows.append(cells)
    judged = own["tests"][tests[0]]
    how = (
        f"Loss on {judged['tokens']:,} tokens of each text. {PAIRED if beside else UNPAIRED}"
        if predicts
        else f"How far the embeddings of {judged['sentences']} sentences move: their mean cosine with those before, and Spearman's rank "
        "correlation of the similarities of all pairs."
    )
    title = (
        f"**{c['model']}, compressed without training, knowing the inputs.** Width {c['d_model']}, {c['n_layers']} layers of "
        f"{c['n_heads']} heads. Key heads: {c['n_kv_heads']}. The cache is in numbers a token, of all layers. {how}"
    )
    return Table("Models compressed", title, markdown(header, rows), runs)


PAIRED = (
    "Minus MLA's: beside the separated MLA of the same group, paired by window of the text, with 95 % intervals; they are of this model "
    "and say nothing of others."
)
UNPAIRED = "The losses of single windows are not on record, so there is no interval: a few thousandths are not told apart."


def _beside_mla(runs: list[Record], tests: list[str]) -> dict[tuple[str, str], str]:
    """By row and text how many bits per byte it is above the separated MLA of its group; empty where no record has losses by window."""
    mla = {r.metrics["share"]: r for r in runs if r.method.startswith("MLA separated")}
    found = {}
    for r, test in ((r, test) for r in runs for test in tests):
        base = mla.get(r.metrics["share"], r)
        own, other = (x.metrics["tests"][test] for x in (r, base))
        if base is not r and (nats := over_windows(own, other, windows=compress_models.TEST_WINDOWS)):
            unit = other["bits_per_byte"] / other["loss"]  # bits per byte over nats per token, of this text
            found[r.method, test] = with_interval(nats, unit)
    return found


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
