"""Tables of Muon on fresh text: each row by learning rate, each at its best on text that was held back, and whether that moves with more
tokens for each parameter."""

import statistics

from ..experiments import table2, table3
from ..models.rows import TABLE2_BEST
from ..store.records import Record
from .best import BASE, SIZES, at_best, moves, tokens_per_parameter
from .cells import BOLD, bold_if_best, bracketed, difference_cells, with_interval
from .judge import SEEDS, Best, article_difference, away_from_zero, between_seeds, broken, test_losses
from .markdown import Table, markdown
from .query import fresh_runs, grouped, mean_loss
from .words import divergence, mean_and_spread, scale_in_words, seeds_in_words, signed, table_name, text_in_words

OVER_ARTICLES = (
    "The last columns have the same differences with intervals over articles in place of seeds; a text without marks has stretches of "
    "64 KiB for articles. An article's loss is its mean over the seeds, articles count by their tokens, and the error comes from leaving "
    "out one at a time. These intervals came after the rule of judgement, which is by seeds, and change no word."
)
EXPERIMENTS = {"table2": table2, "table3": table3}


def fresh_tables(records: list[Record], preset: str, experiment: str = "table2") -> list[Table]:
    """Rows by learning rate, each at its best, and these in pairs; of Table 2 at the paper's shape, the trend too.

    Args:
        records: all that there are.
        preset: of the experiment.
        experiment: "table2" or "table3".
    """
    found = rates_table(records, preset, experiment)
    found += [table for draw in (best_tables, pairs_tables) for table in draw(experiment, preset, records)]
    return found + (moves_tables(records) if (experiment, preset) == ("table2", "gpu-fresh") else [])


def _mark(experiment: str, preset: str, kind: str) -> str:
    """Of Table 2 at the paper's shape each kind of table has a mark of its own; all others of one preset stand together."""
    name = table_name(experiment, preset)
    return f"{name}, {kind}" if (experiment, preset) == ("table2", "gpu-fresh") else name


# By learning rate.


def rates_table(records: list[Record], preset: str = "gpu-fresh", experiment: str = "table2") -> list[Table]:
    """A table with Muon, every token read once: each row by learning rate, its best in bold, and how many rates it was tried at.

    Other seeds than the preset's own came after a rate was chosen: the grid leaves them out, and there is none without the preset's own.

    Args:
        records: all that there are.
        preset, experiment: as in `fresh_tables`.
    """
    module = EXPERIMENTS[experiment]
    runs = [r for r in fresh_runs(records, preset, experiment) if r.seed in module.PRESETS[preset].seeds]
    if not runs:
        return []
    rates, lines, tried = sorted({r.rate for r in runs}), [], {}
    for label, group in grouped(runs, clipped_label).items():
        cells = grouped(group, lambda r: r.rate)
        best = min((loss for cell in cells.values() if (loss := mean_loss(cell)) is not None), default=None)
        shown = [bold_if_best(cells.get(rate, []), best) for rate in rates]
        lines.append([label, f"{group[0].attention_parameters / 1e6:.2f}M", *shown, f"{len(cells)}"])
        tried[label] = len(cells)
    title = f"**Learning rates for {scale_in_words(experiment, runs)}: {text_in_words(runs)}, {seeds_in_words(runs)}.** {BOLD}"
    body = markdown(["peak learning rate", "attention", *(f"{rate:g}" for rate in rates), "rates tried"], lines)
    rows = module.ROWS[preset]
    equally, which = (TABLE2_BEST, "Every row as it is") if set(TABLE2_BEST) <= set(rows) else (rows, "Every row")
    counts = sorted(tried.get(row.label, 0) for row in equally)
    note = f"{which} was tried at as many rates: {counts[0]}."
    if counts[0] < counts[-1]:
        note = f"The rows were not tried equally yet, at {counts[0]} to {counts[-1]} rates each, so no verdict is drawn here."
    if missing := [row.label for row in rows if row.label not in tried]:
        note += f" Not run at any rate: {'; '.join(missing)}."
    return [Table(table_name(experiment, preset), title, body, runs, note)]


def clipped_label(record: Record) -> str:
    """The row of a run, and the limit of its logits where it had one: with QK-clip it is another setting, not another seed."""
    clip = record.train.get("qk_clip")
    return record.method if clip is None else f"{record.method}, QK-clip {clip:g}"


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
    chosen = "Settings were chosen on validation text, with a seed that does not count here."
    if all(own.settings == 1 for own in best.values()):
        chosen = "Settings are those that were chosen for one pass over the text."
    title = (
        f"**{scale_in_words(experiment, runs)}: each row at its best, on {texts[0]}.** Nats per token; {text_in_words(runs)}. "
        f"{chosen} Differences are paired by seed and carry 95 % intervals."
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
    return Table(_mark(experiment, preset, "at best"), title, markdown(header, lines), runs, OVER_ARTICLES)


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
    return Table(_mark(experiment, preset, "in pairs"), title, body, runs)


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
    return ", ".join([*norms, f"{first.rate:g}"])


def test_loss_cell(runs: list[Record]) -> str:
    """Mean and spread of the test loss, or which runs diverged."""
    return divergence(runs) or mean_and_spread(test_losses(runs), 3)


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


# More tokens for each parameter.


def moves_tables(records: list[Record]) -> list[Table]:
    """Whether each row's difference to multi-head attention moves with tokens per parameter.

    Args:
        records: all that there are.

    Returns:
        One table; none where no two budgets can be set side by side.
    """
    found = [move for move in moves(records) if move.by]
    told = away_from_zero({(move.row, move.along): move.by for move in found if len(move.by) >= SEEDS})
    lines = []
    for move in found:
        shared = [statistics.mean(side[seed] for seed in move.seeds) for side in (move.few, move.many)]
        estimate = between_seeds(move.by, seeds=2)
        word = f"{estimate.word}{'*' * ((move.row, move.along) in told)}" if estimate and len(move.by) >= SEEDS else ""
        cells = [f"{tokens:.2g}: {signed(mean, 3)}" for tokens, mean in zip(move.tokens, shared)]
        by = with_interval(estimate) if estimate else signed(move.by[0], 3)
        lines.append([move.row, move.along, *cells, f"{by} ({len(move.by)})", word])
    title = (
        f"**Does the difference to {BASE} move with tokens per parameter?** Nats per token on the first test text, minus {BASE}'s with as "
        f"many tokens; tokens for each parameter of {BASE} beside the embedding stand before the colon. In brackets 95 % intervals over "
        f"seeds, paired, and how many there are: from {SEEDS} on there is a word. *Above*: the row loses ground where they are more. A "
        "star would stand if all words were judged together (Holm)."
    )
    header = ["row", "along", "few tokens", "many tokens", "many minus few", "that is"]
    runs = [r for preset in SIZES for best in at_best(records, "table2", preset) for own in best.values() for r in own.runs]
    return [Table(_mark("table2", "gpu-fresh", "trend"), title, markdown(header, lines), runs)] if lines else []
