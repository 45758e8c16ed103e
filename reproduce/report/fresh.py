"""Tables of Muon on fresh text: each row by learning rate, each at its best on text that was held back, and what else its parameters
could be spent on."""

from collections.abc import Callable

from ..experiments import table2
from ..models.rows import TABLE2_ALLOCATIONS, TABLE2_BEST
from ..store.records import Record
from .best import BASE, at_best, tokens_per_parameter
from .cells import BOLD, above_cell, bold_if_best, bracketed, loss_cell, with_interval
from .judge import SEEDS, Best, article_difference, away_from_zero, between_seeds, broken, loss_difference, test_losses
from .markdown import Table, markdown
from .query import BUDGETS, budget_of, fresh_runs, grouped, mean_loss, of_one_budget, runs_of
from .words import divergence, mean_and_spread, seeds_in_words, tokens_of

OVER_ARTICLES = (
    "The last columns have the same differences with intervals over articles in place of seeds; a text without marks has stretches of "
    "64 KiB for articles. An article's loss is its mean over the seeds, articles count by their tokens, and the error comes from leaving "
    "out one at a time. These intervals came after the rule of judgement, which is by seeds, and change no word."
)
TITLES = {"table2": "GPT-2", "table3": "Llama"}


def fresh_tables(records: list[Record], preset: str) -> list[Table]:
    """Of Table 2: rows by learning rate, each at its best, and these in pairs.

    Args:
        records: all that there are.
        preset: of Table 2.
    """
    by_rate = rates_table(records, preset)
    return by_rate + [table for draw in (best_tables, pairs_tables) for table in draw("table2", preset, records)]


# By learning rate.


def rates_table(records: list[Record], preset: str = "gpu-fresh") -> list[Table]:
    """Table 2 with Muon, every token read once: each row by learning rate, its best in bold, and how many rates it was tried at.

    Other seeds than the preset's own came after a rate was chosen: the grid leaves them out, and there is none without the preset's own.

    Args:
        records: all that there are.
        preset: of Table 2.
    """
    runs = [r for r in fresh_runs(records, preset) if r.seed in table2.PRESETS[preset].seeds]
    if not runs:
        return []
    rates, lines, tried = sorted({r.rate for r in runs}), [], {}
    for label, group in grouped(runs, clipped_label).items():
        cells = grouped(group, lambda r: r.rate)
        best = min((loss for cell in cells.values() if (loss := mean_loss(cell)) is not None), default=None)
        shown = [bold_if_best(cells.get(rate, []), best) for rate in rates]
        lines.append([label, f"{group[0].attention_parameters / 1e6:.2f}M", *shown, f"{len(cells)}"])
        tried[label] = len(cells)
    title = f"**Learning rates for {_scale('table2', runs)}: {_text(runs)}, {seeds_in_words(runs)}.** {BOLD}"
    body = markdown(["peak learning rate", "attention", *(f"{rate:g}" for rate in rates), "rates tried"], lines)
    as_they_are = sorted(tried.get(row.label, 0) for row in TABLE2_BEST)
    note = f"Every row as it is was tried at as many rates: {as_they_are[0]}."
    if as_they_are[0] < as_they_are[-1]:
        note = f"The rows were not tried equally yet, at {as_they_are[0]} to {as_they_are[-1]} rates each, so no verdict is drawn here."
    if missing := [row.label for row in table2.FRESH_ROWS if row.label not in tried]:
        note += f" Not run at any rate: {'; '.join(missing)}."
    return [Table(_name("table2", preset), title, body, runs, note)]


def clipped_label(record: Record) -> str:
    """The row of a run, and the limit of its logits where it had one: with QK-clip it is another setting, not another seed."""
    clip = record.train.get("qk_clip")
    return record.method if clip is None else f"{record.method}, QK-clip {clip:g}"


def _name(experiment: str, preset: str) -> str:
    return f"{BUDGETS[experiment].title.split(',')[0]}, fresh text{preset.removeprefix('gpu-fresh').replace('-', ', ')}"


def _scale(experiment: str, runs: list[Record]) -> str:
    """ "GPT-2 at the paper's shape with Muon on fresh text, REDUCED BUDGET"."""
    narrower = BUDGETS[experiment].narrower(runs[0].config)
    shape = f"{narrower} times narrower than the paper's" if narrower > 1 else "at the paper's shape"
    reduced = "REDUCED SCALE" if narrower > 1 else "REDUCED BUDGET"
    return f"{TITLES[experiment]} {shape} with Muon on fresh text, {reduced}"


def _text(runs: list[Record]) -> str:
    """ "64.9M training tokens, no token read twice"."""
    passes = max(r.config.get("passes", 1) for r in runs)
    return f"{tokens_of(runs)}, {'no token read twice' if passes == 1 else f'every token read {passes} times'}"


# Each row at its best.


def best_tables(experiment: str, preset: str, records: list[Record]) -> list[Table]:
    """Each row at its best on the test texts, beside multi-head attention at its own best; one table for each budget.

    Args:
        experiment, preset: as in `at_best`.
        records: all that there are.
    """
    return [_best_table(experiment, preset, best) for best in at_best(records, experiment, preset)]


def _best_table(experiment: str, preset: str, best: dict[str, Best]) -> Table:
    base = best[BASE].runs if BASE in best else []
    runs = [r for own in best.values() for r in own.runs]
    texts = _texts(runs)
    lines = [
        [row, setting_of(own), f"{own.settings}", f"{own.runs[0].attention_parameters / 1e6:.2f}M"]
        + [f"{tokens_per_parameter(own.runs[0]):.2g}", test_loss_cell(own.runs)]
        + [*difference_cells(own.runs, base), *(transfer_cell(own.runs, base, name) for name in texts[1:])]
        + [articles_cell(own.runs, base, name) for name in texts]
        for row, own in best.items()
    ]
    title = (
        f"**{_scale(experiment, runs)}: each row at its best, on {texts[0]}.** Nats per token; {_text(runs)}. Settings were chosen on "
        "validation text, with a seed that does not count here. Differences are paired by seed and carry 95 % intervals."
    )
    header = [
        "row",
        "setting",
        "of how many",
        "attention",
        "tokens per parameter beside the embedding",
        "test loss",
        f"minus {BASE}'s",
        "that is",
    ]
    header += [f"minus {BASE}'s on {name}" for name in texts[1:]]
    header += [f"over {_articles(runs, name)} articles of {name}" for name in texts]
    return Table(f"{_name(experiment, preset)}, at best", title, markdown(header, lines), runs, OVER_ARTICLES)


def _articles(runs: list[Record], name: str) -> int:
    return next(len(r.metrics["test"][name]["articles"]) for r in runs if name in r.metrics.get("test", {}))


def pairs_tables(experiment: str, preset: str, records: list[Record]) -> list[Table]:
    """Each row at its best minus each larger one, of those with enough seeds; one table for each budget that has more than two, in two
    parts for two texts.

    Args:
        experiment, preset, records: as in `best_tables`.
    """
    found = [{row: own for row, own in best.items() if len(own.runs) >= SEEDS} for best in at_best(records, experiment, preset)]
    return [_pairs_table(experiment, preset, best) for best in found if len(best) > 2]


def _pairs_table(experiment: str, preset: str, best: dict[str, Best]) -> Table:
    runs = [r for own in best.values() for r in own.runs]
    title = (
        "**Each of these rows minus each larger one.** Nats per token, with 95 % intervals over the seeds that both have. A *below* "
        "or *above* with a star would stand if all rows of its table were judged together (Holm); the other words are each by itself."
    )
    body = "\n\n".join(_pairs(best, name) for name in _texts(runs))
    return Table(f"{_name(experiment, preset)}, in pairs", title, body, runs)


def _texts(runs: list[Record]) -> list[str]:
    """The test texts that some of them read, the one that judges first."""
    return list(dict.fromkeys(name for r in runs for name in r.metrics.get("test", {})))


def _pairs(best: dict[str, Best], name: str) -> str:
    """All rows but the first by all but the last, on one test text."""
    labels, differences = list(best), {}
    for i, row in enumerate(labels):
        for base in labels[:i]:
            found = seedwise(best[row].runs, best[base].runs, name)
            if len(found) >= SEEDS and not broken(best[row].runs, best[base].runs):
                differences[row, base] = found
    told = away_from_zero(differences)

    def cell(pair: tuple[str, str]) -> str:
        estimate = between_seeds(differences.get(pair, []))
        return f"{with_interval(estimate)} {estimate.word}{'*' * (pair in told)}" if estimate else ""

    lines = [[row, *(cell((row, base)) for base in labels[:-1])] for row in labels[1:]]
    return markdown([name, *(f"minus {base}" for base in labels[:-1])], lines)


def setting_of(best: Best) -> str:
    """ "QK-norm, 0.0096": what was changed in the row, and its rate.

    Args:
        best: one row's.
    """
    first = best.runs[0]
    norms = [name for norm, name in (("qk_norm", "QK-norm"), ("latent_norm", "latent norms")) if first.config["row"].get(norm)]
    clip = first.train.get("qk_clip")
    return ", ".join([*norms, *([f"QK-clip {clip:g}"] if clip is not None else []), f"{first.rate:g}"])


def test_loss_cell(runs: list[Record]) -> str:
    """Mean and spread of the test loss, or which runs diverged."""
    return divergence(runs) or mean_and_spread(test_losses(runs), 3)


def difference_cells(runs: list[Record], base: list[Record]) -> list[str]:
    """By how much a row's test loss is above the base's, and the word for it.

    Args:
        runs, base: those that judge each.
    """
    if runs is base or not base or broken(runs, base) or not (estimate := loss_difference(runs, base)):
        return ["", ""]
    return [with_interval(estimate), estimate.word if estimate.of_seeds else f"{estimate.word}, these models"]


def transfer_cell(runs: list[Record], base: list[Record], name: str) -> str:
    """The same on another test text, between seeds.

    Args:
        runs, base: as in `difference_cells`.
        name: of the text.
    """
    estimate = None if runs is base or broken(runs, base) else between_seeds(seedwise(runs, base, name), seeds=2)
    return with_interval(estimate) if estimate else ""


def articles_cell(runs: list[Record], base: list[Record], name: str) -> str:
    """The interval of the same difference over the articles of a test text: "[−0.002, +0.002]".

    Args:
        runs, base, name: as in `transfer_cell`.
    """
    estimate = None if runs is base or broken(runs, base) else article_difference(runs, base, name)
    return bracketed(estimate) if estimate else ""


def seedwise(runs: list[Record], base: list[Record], name: str) -> list[float]:
    """Losses on a test text minus the base's with the same seeds.

    Args:
        runs, base: as in `difference_cells`.
        name: of the text.
    """
    own, others = (
        {r.seed: r.metrics["test"][name]["loss"] for r in side if name in r.metrics.get("test", {})} for side in (runs, base)
    )
    return [own[seed] - others[seed] for seed in own if seed in others]


# Where the parameters should go.


def allocation_tables(records: list[Record]) -> list[Table]:
    """For each Tucker row of Table 2: as many parameters spent otherwise, from the lowest loss to the highest.

    Args:
        records: all that there are.
    """
    found = of_one_budget(runs_of(records, "table2", "gpu-fresh-allocations"))
    tables = []
    for triple, rows in TABLE2_ALLOCATIONS.items():
        labels = {row.normed().label for row in rows}
        own = [r for r in found if r.method in labels]
        if own:
            tables.append(_allocation_table(triple, own, _as_the_paper(records, triple, own)))
    return tables


def _as_the_paper(records: list[Record], triple: str, like: list[Record]) -> list[Record]:
    """The runs of the paper's own triple for both tensors that differ in nothing else."""
    trained, budget, seeds = like[0].train, budget_of(like[0]), {r.seed for r in like}
    wanted: Callable[[Record], bool] = lambda r: (r.train, budget_of(r)) == (trained, budget) and r.seed in seeds  # noqa: E731
    return [r for r in runs_of(records, "table2", "gpu-fresh") if r.method == f"{triple} QK-norm" and wanted(r)]


def _allocation_table(triple: str, own: list[Record], base: list[Record]) -> Table:
    groups = grouped([*base, *own], lambda r: r.method)
    order = sorted(groups, key=lambda row: (mean_loss(groups[row]) is None, mean_loss(groups[row]) or 0.0))
    lines = [
        [f"{row} (the paper's)" if groups[row][0] in base else row, f"{groups[row][0].attention_parameters / 1e6:.2f}M"]
        + [loss_cell(groups[row]), above_cell(groups[row], groups[base[0].method]) if base else ""]
        for row in order
    ]
    title = (
        f"**The parameters of {triple} spent otherwise: {_scale('table2', own)}, {_text(own)}, {seeds_in_words(own)}.** "
        f"Rate {own[0].rate:g}, with QK-norm. Ranks before and after the softmax, where they differ. Validation loss in nats per token."
    )
    body = markdown(["row", "attention", "validation loss", "minus the paper's"], lines)
    return Table(_name("table2", "gpu-fresh-allocations"), title, body, [*base, *own])
