"""What the paper claims about losses, accuracies, spectra and times, and what the records say."""

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..experiments.spectra import MODES
from ..models.rows import TABLE3
from ..store.records import Record
from .judge import (
    FAILED,
    MARGIN,
    POINT,
    REPRODUCED,
    SEEDS,
    UNRESOLVED,
    Best,
    Estimate,
    accuracy_difference,
    at_their_best,
    broken,
    decays,
    loss_difference,
    metric_difference,
    on_test_text,
    together,
)
from .ledger import ALIKE, CLASSES, FASTER, NO_RUN, TENTH, TIMING, Claim, Finding, short
from .query import BUDGETS, alike, grouped, largest, of_one_budget, settings_on_fresh_text, settled, timed_steps
from .since import of_older_code
from .unfoldings import BY_OPTIMIZER, effective_rank, errors_with, has_values, layers_of, name_of, others_of, shares
from .words import signed

# Losses.


@dataclass(frozen=True)
class Pair:
    """A row and the one that it is set beside, trained alike.

    Args:
        own, other: the runs of each.
        which: which runs these are, in words.
    """

    own: list[Record]
    other: list[Record]
    which: str

    @property
    def verdict(self) -> str | None:
        """Where runs diverged."""
        return broken(self.own, self.other)

    @property
    def difference(self) -> Estimate | None:
        """From test text where there is enough; else from the seeds that there are, on the validation text that chose their rates."""
        if estimate := loss_difference(self.own, self.other):
            return estimate
        estimate = None if self.verdict else metric_difference(self.own, self.other, "validation_loss", seeds=2)
        return estimate and replace(estimate, over=f"{estimate.over}, validation text")


def beside(records: list[Record], experiment: str, base: str) -> dict[str, Pair]:
    """Each row of a table with the runs of `base` that are like its own.

    Those on fresh text, each row at its best, as soon as some read a test text and the two have something to be compared by. Else those of
    the preset `gpu`, which decide nothing. Never one of each.

    Args:
        records: all that there are.
        experiment: "table2" or "table3".
        base: another row.

    Returns:
        By row, without the base.
    """
    fresh, older = of_one_budget(settings_on_fresh_text(records, experiment, "gpu-fresh")), settled(records, experiment)
    best = at_their_best(fresh) if any(map(on_test_text, fresh)) else {}
    found = {}
    for row in dict.fromkeys((*best, *older)):
        kinds = []
        if {row, base} <= best.keys():
            kinds.append(Pair(best[row].runs, best[base].runs, f"best of {best[row].settings} settings"))
        if {row, base} <= older.keys():
            kinds.append(Pair(older[row], older[base], "preset gpu" if best else ""))
        if kinds and row != base:
            found[row] = next((pair for pair in kinds if pair.verdict or pair.difference), kinds[0])
    return found


def _loss(experiment: str, base: str, allowed: Callable[[float], tuple[float, float]], tried: bool = False):
    """Judge: a row's loss minus that of `base`, in nats.

    allowed: loss of the base -> the least and the largest difference that the claim allows;
    tried: on validation text and on as many seeds as there are, where the rule itself asks for more.
    """

    def judge(records: list[Record], row: str) -> Finding:
        if (pair := beside(records, experiment, base).get(row)) is None:
            return NO_RUN
        own, other = pair.own, pair.other
        if pair.verdict:
            return f"{base if pair.verdict == UNRESOLVED else row} diverged", pair.verdict
        share = own[0].attention_parameters / other[0].attention_parameters
        with_share = f"with {share:.0%} of its parameters"
        if (estimate := pair.difference) is None:
            return f"one seed, {with_share}", UNRESOLVED
        said = ", ".join(filter(None, (f"{_interval(estimate)} nats {with_share}", estimate.over, pair.which)))
        level = statistics.mean((on_test_text(r) or {"loss": r.metrics["validation_loss"]})["loss"] for r in other)
        if tried:
            estimate = replace(estimate, of_seeds=True)
        return said, estimate.verdict(*allowed(level)) if tried or loss_difference(own, other) else UNRESOLVED

    return judge


def _interval(estimate: Estimate, factor: float = 1, digits: int = 3) -> str:
    """ "+0.020 (−0.022 to +0.062)"."""
    value, low, high = (signed(factor * x, digits) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} ({low} to {high})"


def _no_worse(level: float) -> tuple[float, float]:
    return -math.inf, MARGIN


def _one_to_three_per_cent(level: float) -> tuple[float, float]:
    return 0.01 * level, 0.03 * level


def _loss_claim(where: str, says: str, experiment: str, row: str, base: str, rule: str = "loss", **more) -> Claim:
    allowed = _no_worse if rule == "loss" else _one_to_three_per_cent
    return Claim(
        where,
        says,
        rule,
        _loss(experiment, base, allowed),
        lambda records: [row],
        f"rows of {BUDGETS[experiment].title}, beside {base}",
        others=lambda records: list(beside(records, experiment, base)),
        tried=_loss(experiment, base, allowed, tried=True),
        **more,
    )


# Accuracies.


def _vision_candidates(records: list[Record]) -> list[Record]:
    """Fine-tuned models that started as the paper's do, on the images with the most classes of which every row has its seeds.

    So a study that is still being run judges nothing, and what was judged before stands as long.
    """
    runs = [r for r in records if r.experiment == "figure3" and r.preset.startswith("gpu") and r.is_trained]
    by_classes = grouped([r for r in runs if "start" not in r.config], lambda r: r.data["classes"])
    studies = [largest(alike(by_classes[classes], any_rate=True)) for classes in sorted(by_classes, reverse=True)]
    finished = (own for own in studies if all(len(group) >= SEEDS for group in _by_row(own).values()))
    return next(finished, studies[0] if studies else [])


def _held_out(runs: list[Record]) -> dict[str, Best]:
    """By row at the rates that held-out images prefer; empty where no images were held out."""
    return at_their_best(runs) if any("validation_loss" in r.metrics for r in runs) else {}


def _by_row(runs: list[Record]) -> dict[str, list[Record]]:
    """By row at the rate that was chosen or, where none was and there are several, by rate too."""
    if best := _held_out(runs):
        return {row: own.runs for row, own in best.items()}
    rates = {r.rate for r in runs}
    return grouped(runs, lambda r: f"{r.method} at {r.rate:g}" if len(rates) > 1 else r.method)


def best_vision_runs(records: list[Record]) -> dict[str, Best]:
    """Rows of Figure 3 at the rates that held-out images prefer.

    Args:
        records: all that there are.

    Returns:
        By row, started as the paper's; empty where no images were held out.
    """
    return _held_out(_vision_candidates(records))


def _vision_runs(records: list[Record]) -> dict[str, list[Record]]:
    """Fine-tuned models by row, as `_by_row`."""
    return _by_row(_vision_candidates(records))


def of_a_tenth(rival: str) -> Callable[[list[Record]], Sequence[str]]:
    """Which rows have about a tenth of another one's attention parameters.

    Args:
        rival: the other row.

    Returns:
        records -> labels of Tucker rows; where images were held out, of the one that they prefer.
    """

    def rows(records: list[Record]) -> list[str]:
        runs, best = _vision_runs(records), best_vision_runs(records)
        size = next((group[0].attention_parameters for group in runs.values() if group[0].method == rival), math.inf)
        shares = {
            row: group[0].attention_parameters / size for row, group in runs.items() if group[0].method.startswith("Tucker")
        }
        found = [row for row, share in shares.items() if TENTH[0] <= share <= TENTH[1]]
        return [min(found, key=lambda row: best[row].chooser.on_held_out)] if best and found else found

    return rows


def _accuracy(rival: str, metric: str, tried: bool = False) -> Callable[[list[Record], str], Finding]:
    """Judge: a row's accuracy minus the rival's, at every rate of the rival.

    tried: on images of however few classes.
    """

    def judge(records: list[Record], row: str) -> Finding:
        runs, tries = _vision_runs(records), max(1, len(of_a_tenth(rival)(records)))
        found = [_accuracies(runs[row], other, metric, tries, tried) for other in runs.values() if other[0].method == rival]
        return "; ".join(said for said, _ in found), together(verdict for _, verdict in found)

    return judge


def _accuracies(own: list[Record], other: list[Record], metric: str, tries: int, tried: bool) -> Finding:
    if verdict := broken(own, other):
        return f"{other[0].method if verdict == UNRESOLVED else own[0].method} diverged", verdict
    share, classes = own[0].attention_parameters / other[0].attention_parameters, own[0].data["classes"]
    top5, top1 = (accuracy_difference(own, other, name, tries) for name in ("top5", "top1"))
    if top5 is None or top1 is None:
        return f"fewer than {SEEDS} seeds", UNRESOLVED
    judged = (top5 if metric == "top5" else top1).verdict(-POINT, math.inf)
    said = f"top-5 {_interval(top5, 100, 1)}, top-1 {_interval(top1, 100, 1)} points with {share:.0%} of its parameters"
    return f"{said}, {top5.over}, {classes} classes", judged if classes >= CLASSES or tried else UNRESOLVED


def _accuracy_claim(rival: str) -> Claim:
    return Claim(
        "Fig. 3, ViT",
        f"comparable accuracy with almost 10x fewer attention parameters than {rival} (the row is our choice)",
        "accuracy",
        _accuracy(rival, "top5"),
        of_a_tenth(rival),
        f"top-1 of ten classes, beside {rival}",
        every=False,
        others=lambda records: [row for row, runs in _vision_runs(records).items() if runs[0].method != rival],
        tried=_accuracy(rival, "top1", tried=True),
    )


def _with_all_heads(runs: dict[str, list[Record]], row: str) -> str | None:
    """The largest Tucker row with all heads that has no more parameters than this one; None where there is none."""
    sizes = {
        other: group[0].attention_parameters
        for other, group in runs.items()
        if _head_rank(group[0]) == group[0].config["n_heads"]
        and group[0].attention_parameters <= runs[row][0].attention_parameters
    }
    return max(sizes, key=sizes.get, default=None)


def _head_rank(record: Record) -> int:
    """Of a Tucker row with the same ranks before and after the softmax; 0 of any other row."""
    row = record.config.get("row", {})
    return row["ranks"][0] if row.get("ranks") and not row.get("post_ranks") else 0


def _fewer_heads(records: list[Record], alike_in_size: bool = False) -> list[str]:
    """Rows with fewer heads than the model that have a row beside them, of about their size if that is asked for."""
    runs = _vision_runs(records)
    found = []
    for row, group in runs.items():
        fewer = 0 < _head_rank(group[0]) < group[0].config["n_heads"]
        if fewer and (other := _with_all_heads(runs, row)):
            share = runs[other][0].attention_parameters / group[0].attention_parameters
            found += [row] if share >= ALIKE or not alike_in_size else []
    return found


def _heads(records: list[Record], row: str, metric: str = "top5", tried: bool = False) -> Finding:
    """Judge: a row with fewer heads beside the one with all heads."""
    runs = _vision_runs(records)
    other = _with_all_heads(runs, row)
    said, verdict = _accuracies(runs[row], runs[other], metric, 1, tried)
    return f"beside {short(other)}: {said}", verdict


# Spectra.


def _spectra(records: list[Record], tried: bool = False) -> dict[str, list[dict]]:
    """Layers of trained models by row: those of Table 2's budget or, to try the rule, all of them, those of others too."""
    steps = BUDGETS["table2"].preset.train.steps
    layers: dict[str, list[dict]] = {}
    for r in records:
        if r.experiment == "spectra" and (tried and has_values(r) or r.is_trained and (r.preset, r.steps) == ("gpu", steps)):
            name = name_of(r) if r.preset == BY_OPTIMIZER else f"{r.method} ({r.preset})" if tried else r.method
            layers.setdefault(name, []).extend(r.metrics["trained"])
    return layers


def _decay(records: list[Record], row: str, tried: bool = False) -> Finding:
    """Judge: effective ranks of all six unfoldings over their size, by both measures."""
    ranks = mode_ranks(records, row, tried)
    if not ranks:
        return NO_RUN
    found = {mode: decays(shares) for mode, shares in ranks.items()}
    said = []
    for verdict, words in ((REPRODUCED, "decay"), (UNRESOLVED, "depend on the measure"), (FAILED, "do not decay")):
        modes = [f"{mode} {ranks[mode][0]:.0%} / {ranks[mode][1]:.0%}" for mode in ranks if found[mode] == verdict]
        said += [f"{words}: {', '.join(modes)}"] if modes else []
    return f"effective ranks over their size, by values / by squares; {'; '.join(said)}", together(found.values())


def mode_ranks(records: list[Record], row: str = "MHA", tried: bool = False) -> dict[str, list[float]]:
    """Effective ranks of a row's unfoldings over their size, means over layers and seeds.

    Args:
        records: all that there are.
        row: which.
        tried: of all trained models, whose rows are named with their preset; otherwise of those of Table 2's budget.

    Returns:
        By mode, "head before the softmax" first, the share by singular values and that by their squares; empty without a model.
    """
    layers = _spectra(records, tried).get(row, [])
    return {
        f"{mode} {'before' if side == 'pre' else 'after'} the softmax" if mode == "head" else mode: [
            statistics.mean(effective_rank(layer[side][mode]["values"], power) / layer[side][mode]["size"] for layer in layers)
            for power in (1, 2)
        ]
        for side, modes in MODES.items()
        for mode in modes
        if layers
    }


def decayed(records: list[Record]) -> dict[str, list[str]]:
    """What the rule says to the six unfoldings of models that others trained.

    Args:
        records: all that there are.

    Returns:
        Of each model a verdict per unfolding.
    """
    modes = [(side, mode) for side in MODES for mode in MODES[side]]
    found = {name: layers_of(runs, "trained") for name, runs in others_of(records).items()}
    return {name: [decays([x for x in shares(layers, *m) if x is not None]) for m in modes] for name, layers in found.items()}


def _decay_of_others(records: list[Record]) -> str:
    """ "Of others' models: MiniLM 4 of 6 decay, 2 depend on the measure"."""
    words = {REPRODUCED: "decay", UNRESOLVED: "depend on the measure", FAILED: "do not decay"}
    said = []
    for name, verdicts in decayed(records).items():
        parts = [f"{verdicts.count(verdict)} {word}" for verdict, word in words.items() if verdict in verdicts]
        said.append(f"{name} {', '.join(parts)}")
    return f"Of others' models, which do not judge: {'; '.join(said)}" if said else ""


def _heads_of_others(records: list[Record]) -> str:
    """What half of the heads would lose in models that others trained, on what their layers read."""
    half, said = 1 / 2, []
    for name, runs in others_of(records).items():
        if layers := layers_of(runs, "inputs"):
            before, after = (statistics.median(errors_with(layers, side, half)) for side in MODES)
            said.append(f"{name} {before:.2f} before the softmax, {after:.2f} after it")
    if not said:
        return ""
    return (
        "Of others' models, which do not judge, the tensor's relative error on inputs with half of its head mode (median over layers; "
        f"{(1 - half) ** 0.5:.2f} where heads share nothing): {'; '.join(said)}"
    )


# Times.

TIMED_BESIDE = ("MHA", "GQA n_KV=8")


def _step_time(records: list[Record], row: str) -> Finding:
    """Judge: a training step of the true 1B shape beside multi-head attention's and GQA-8's, each in one record."""
    said, verdicts, timed = [], set(), timed_steps(records)
    for r, times in timed:
        changes = {base: times[row] / times[base] - 1 for base in TIMED_BESIDE if {row, base} <= times.keys() and base != row}
        verdicts |= {Estimate(x, x - TIMING, x + TIMING, r.device).verdict(*FASTER) for x in changes.values()}
        if changes:
            where = f", {_card(r)}" if len(timed) > 1 else ""
            said.append(", ".join(f"{signed(100 * x, 1)} % beside {base}" for base, x in changes.items()) + where)
    if not said:
        return NO_RUN
    return "; ".join(said), verdicts.pop() if len(verdicts) == 1 else UNRESOLVED


def _timed_on(records: list[Record]) -> str:
    """Said once for all rows where one record timed them; of several, each number says its own."""
    timed = timed_steps(records)
    compared = [r for r, times in timed if times.keys() & {*TIMED_BESIDE} and times.keys() & {*TUCKER3}]
    return f"On {_card(compared[0])}" if compared and len(timed) == 1 else ""


def _card(run: Record) -> str:
    return f"one {run.device}" + (" with [older code](docs/speed.md#whole-models)" if of_older_code([run]) else "")


def _timed(records: list[Record]) -> list[str]:
    """All rows that were timed in some record."""
    return list(dict.fromkeys(row for _, times in timed_steps(records) for row in times))


SMALLEST, TUCKER3 = "Tucker [32,64,64]", tuple(row.label for row in TABLE3 if row.mechanism == "Tucker")
FINDINGS = (
    _loss_claim("Abstract", "comparable to GQA, with a tenth of the parameters (we take [32,64,64])", "table3", SMALLEST, "GQA n_KV=8"),
    _loss_claim("Abstract", "comparable to MLA, with a tenth (we take [32,64,64])", "table3", SMALLEST, "MLA separated d_c=128"),
    _loss_claim(
        "Abstract", "comparable to MLA with a shared latent, with a tenth (we take [32,64,64])", "table3", SMALLEST, "MLA shared d_c=128",
        none_can="none: of these rows it has the highest loss on record",
    ),
    _loss_claim("Sec. 4.2, GPT-2", "[8,128,64]: competitive with MHA", "table2", "Tucker [8,128,64]", "MHA"),
    _loss_claim(
        "Sec. 4.2, GPT-2", "[8,128,64]: competitive with MLA, its latent shared", "table2", "Tucker [8,128,64]", "MLA shared d_c=128",
        none_can="none: no row with more than one seed ends above it",
    ),
    *(
        _loss_claim("LLaMA text", f"{short(row)}: loss only 1-3 % above GQA-8's", "table3", row, "GQA n_KV=8", "1-3 %")
        for row in TUCKER3
    ),
    Claim(
        "LLaMA text", "training iteration time down by up to 20 %", "time", _step_time,
        lambda records: [row for row in TUCKER3 if row in _timed(records)], "rows of Table 3, beside MHA and GQA n_KV=8", every=False,
        others=lambda records: [row for row in _timed(records) if row != "MHA"], beside=_timed_on,
    ),
    _accuracy_claim("GQA n_KV=6"),
    _accuracy_claim("MLA shared d_c=128"),
    Claim(
        "Spectra figure, asked of a ViT",
        "GQA and MLA leave the head-mode redundancy unused (we read: fewer heads cost nothing at equal size)",
        "heads", _heads, functools.partial(_fewer_heads, alike_in_size=True), "top-1 of ten classes, also beside smaller rows",
        others=_fewer_heads, tried=functools.partial(_heads, metric="top1", tried=True), beside=_heads_of_others,
    ),
    Claim(
        "Spectra figure", "singular values of all unfoldings of a trained GPT-2 decay clearly, head mode included", "decay",
        _decay, lambda records: ["MHA"], "all trained layers on record", others=lambda records: list(_spectra(records, tried=True)),
        tried=functools.partial(_decay, tried=True), beside=_decay_of_others,
    ),
)  # fmt: skip
