"""What Muon gives to each row of Table 2, what norms give, and what either costs in time."""

import statistics

from ..experiments import table2
from ..models.rows import TABLE2_BEST
from ..store.records import Record
from .best import best_setting, settings_with_adamw
from .cells import loss_cell
from .markdown import Table, markdown
from .query import budget_of, fresh_runs, grouped, losses_of, mean_loss, optimizer_of, recipe_of, runs_of, speeds_on
from .words import change_of, passes_over, signed, tokens_of

TIMED = 3  # runs of a row, with either optimiser, that a median wants
MOST = 1.08  # of AdamW's time: what a step of Muon may take
SAME_TEXT = ("gpu-fresh", "gpu-fresh-optimizers")  # presets that read one text in one order
SHAPE = "GPT-2 at the paper's shape, REDUCED BUDGET"


def gains_tables(records: list[Record]) -> list[Table]:
    """Muon beside AdamW, then norms beside none.

    Args:
        records: all that there are.
    """
    return muon_table(records) + norms_table(records)


def _tried(runs: list[Record]) -> dict[str, list[Record]]:
    """By row those of the seed that all rates were tried with, without QK-clip, which is another setting."""
    seeds = table2.PRESETS["gpu-fresh"].seeds
    return grouped([r for r in runs if r.seed in seeds and r.train.get("qk_clip") is None], lambda r: r.method)


def _lowest(runs: list[Record]) -> list[Record]:
    """The one with the lowest validation loss; all where none ended."""
    ended = [r for r in runs if losses_of([r])]
    return [min(ended, key=lambda r: r.metrics["validation_loss"])] if ended else runs


def _best_cells(group: list[Record], tried: int) -> list[str]:
    """ "factors at a quarter of the rate, 0.0048, of 7", "3.844": the setting, how many there were, and the loss."""
    if mean_loss(group) is None:
        return ["", loss_cell(group)]
    change = f"{change_of(group[0])}, " if recipe_of(group[0]) else ""
    return [f"{change}{group[0].rate:g}, of {tried}", loss_cell(group)]


def _minus_cell(own: list[Record], base: list[Record]) -> str:
    """The difference of mean losses; of those that were judged on different texts there is none."""
    means = [mean_loss(group) for group in (own, base)]
    if None in means:
        return ""
    return signed(means[0] - means[1], 3) if len(_judged_on([*own, *base])) == 1 else "another text"


def _judged_on(runs: list[Record]) -> set[tuple[int, float]]:
    """What records tell of their validation texts: how many tokens were judged, and how many of them make a byte."""
    judged = [(r.metrics["validation_tokens"], r.metrics["bits_per_byte"], r.metrics["validation_loss"]) for r in runs]
    return {(tokens, round(bits / (loss or 1.0), 6)) for tokens, bits, loss in judged}


# Muon.


def muon_table(records: list[Record]) -> list[Table]:
    """Each row without norms at its best with AdamW and with Muon.

    AdamW's runs at Table 2's full budget differ in more than the optimiser. Those on Muon's text stand beside them, as soon as there are
    some.

    Args:
        records: all that there are.

    Returns:
        None without a row that was trained with both.
    """
    settings = {row: _without_norms(groups) for row, groups in settings_with_adamw(records).items()}
    tried = _tried(fresh_runs(records))
    clean = _tried(_adamw_on_the_text_of(records, [r for runs in tried.values() for r in runs]))
    lines, before, after, timed = [], [], [], []
    for row in (row.label for row in TABLE2_BEST):
        adamw, muon, same = best_setting(settings.get(row, [])), _lowest(tried.get(row, [])), _lowest(clean.get(row, []))
        if not adamw or not losses_of(muon):
            continue
        cells = [*_best_cells(adamw, len(settings[row])), *_best_cells(muon, len(tried[row])), _minus_cell(muon, adamw)]
        beside = [*_best_cells(same, len(same and clean[row])), _minus_cell(muon, same)] if clean else []
        lines.append([row, *cells, *beside])
        before, after = [*before, *adamw], [*after, *muon, *(r for r in same if losses_of([r]))]
        plain = [r for group in settings[row] for r in group if not recipe_of(r)]
        timed.append((plain + clean.get(row, []), tried[row]))
    if not lines:
        return []
    title = (
        f"**What Muon gives to each row without norms: {SHAPE}.** Validation loss in nats per token, each at the best of its settings. "
        f"AdamW: {tokens_of(before)}, drawn at random, {passes_over(before):.1f} for each of the text's. Muon: {tokens_of(after)}, "
        "each read once, one seed."
    )
    header = ["row", "AdamW's setting, of how many", "AdamW", "Muon's rate, of how many", "Muon", "Muon minus AdamW"]
    header += ["AdamW's rate on Muon's text, of how many", "AdamW there", "Muon minus that"] if clean else []
    runs = [*before, *after]
    told = _judged_on(runs)
    notes = [
        "Confounded: beside the optimiser, the text differs, its order, how much of it is read and how often.",
        "The last columns differ in the optimiser alone." if clean else "AdamW has not been run on Muon's text yet.",
        f"All were judged on {told.pop()[0]:,} validation tokens of as many bytes: one text, as far as records tell."
        if len(told) == 1
        else "",
        _step_cost(timed),
    ]
    return [Table("What Muon gives", title, markdown(header, lines), runs, " ".join(filter(None, notes)))]


def _without_norms(settings: list[list[Record]]) -> list[list[Record]]:
    """Those whose recipe does not normalise latents."""
    return [group for group in settings if not recipe_of(group[0]).get("latent_norm")]


def _adamw_on_the_text_of(records: list[Record], like: list[Record]) -> list[Record]:
    """AdamW's runs that differ from these in optimiser, row and rate alone."""
    budgets = [budget_of(r) for r in like]
    runs = [r for preset in SAME_TEXT for r in runs_of(records, "table2", preset)]
    return [r for r in runs if optimizer_of(r) == "adamw" and budget_of(r) in budgets]


def _step_cost(timed: list[tuple[list[Record], list[Record]]]) -> str:
    """How long a step takes with Muon, over AdamW's; empty where no row was timed often enough with both doing the same work.

    Args:
        timed: of each row the runs with AdamW and those with Muon, at any rate.
    """
    works = grouped((r for _, muon in timed for r in muon), _work)
    work = max(works, key=lambda key: len(works[key]))
    speeds = [[speeds_on(work[0], [r for r in runs if _work(r) == work]) for runs in pair] for pair in timed]
    speeds = [pair for pair in speeds if min(map(len, pair)) >= TIMED]
    if not speeds:
        return ""
    ratios = [statistics.median(adamw) / statistics.median(muon) for adamw, muon in speeds]
    return (
        f"A step of Muon takes {min(ratios):.2f} to {max(ratios):.2f} times as long as one of AdamW; the aim was at most {MOST}. These are "
        f"medians of at least {TIMED} runs each, for {len(speeds)} rows on one {work[0]} with the same batches. Machines were shared, and "
        f"{_spread(speeds)}, so that is rough."
    )


def _work(record: Record) -> tuple:
    """The card, the model but for its row, and a step: what must be the same where times are compared."""
    c, t = record.config, record.train
    return record.device, c["d_model"], c["n_layers"], c["context"], t["batch_size"], t["precision"], t.get("compiled")


def _spread(speeds: list[list[list[float]]]) -> str:
    """speeds: of each row those of both kinds of runs."""
    most = max(max(values) / min(values) for pair in speeds for values in pair)
    return f"runs of one row differ by up to a factor of {most:.2f}"


# Norms.


def norms_table(records: list[Record]) -> list[Table]:
    """Each row with and without norms, both with Muon: the lowest loss of its rates, and how fast it trains.

    Args:
        records: all that there are.

    Returns:
        None without a row that was trained with and without.
    """
    every = [r for r in fresh_runs(records) if r.train.get("qk_clip") is None]
    tried, by_row, cards = _tried(every), grouped(every, lambda r: r.method), grouped(every, lambda r: r.device)
    card = max(cards, key=lambda device: len(cards[device]), default="")
    lines, shown, timed = [], [], []
    for row in TABLE2_BEST:
        labels = (row.label, row.normed().label)
        bare, normed = (_lowest(tried.get(label, [])) for label in labels)
        if not bare or not normed:
            continue
        cells = [
            *_best_cells(bare, len(tried[labels[0]])),
            *_best_cells(normed, len(tried[labels[1]])),
            _minus_cell(normed, bare),
        ]
        speeds = [speeds_on(card, by_row[label]) for label in labels]
        if all(speeds):
            timed.append(speeds)
            without, with_them = map(statistics.median, speeds)
            cells += [f"{without / 1e3:.0f} ({len(speeds[0])})", f"{with_them / 1e3:.0f} ({len(speeds[1])})"]
            cells.append(f"{with_them / without:.2f}")
        lines.append([row.label, *cells, *([] if all(speeds) else [""] * 3)])
        shown += [r for label in labels for r in by_row[label]]
    if not lines:
        return []
    title = (
        f"**What norms give to each row with Muon, and what they cost: {SHAPE}, {tokens_of(shown)}, one seed.** Validation loss in nats "
        f"per token, each at the best of its rates. Speeds are medians (over how many runs, of any rate and seed) on one {card}."
    )
    header = [
        "row", "rate without norms, of how many", "loss", "rate with norms, of how many", "loss", "with minus without",
        "1,000 tokens/s without", "with", "with over without",
    ]  # fmt: skip
    note = f"Speeds are rough: {_spread(timed)}." if timed else ""
    return [Table("What norms give", title, markdown(header, lines), shown, note)]
