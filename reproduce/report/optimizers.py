"""Do ranks depend on the optimiser? GPT-2 trained with AdamW and with Muon, layer by layer, by a rule that stood before the runs.

Two models of one row, one seed and one text differ in their optimiser, each at the rate that validation text prefers. In every layer the
effective rank of Muon's model is divided by that of AdamW's: the mean over layers, geometric, with Student's interval over them. What
a rate twice or half as large does to one optimiser's ranks is the yardstick beside it.

The rule, for one mode of one row:

* "flatter" or "steeper with Muon" where the intervals of both measures lie on that side of one, and one of the two means is more than
  LARGE away from one and further than its yardstick. Without a yardstick nothing is said.
* "level" where both intervals lie within LARGE of one.
* "not resolved" elsewhere.

Ranks depend on the optimiser where some mode of the weights has the same word with and without QK-norm. They do not where all modes of
both rows are level. Anything else leaves the question open. One seed cannot tell what another one would give: layers of one model
are no independent draws, so even a clear word is about these models.
"""

import math
from collections.abc import Iterator

from ..store.records import Record
from .judge import LEVEL, UNRESOLVED, Estimate, over_layers
from .markdown import Table, markdown
from .query import grouped, of_one_budget, optimizer_of, runs_of
from .unfoldings import BY_OPTIMIZER, MODES, OPTIMIZERS, WAYS, by_optimizer, of_optimizers, share
from .words import mode_titles

ALL_MODES = [(side, mode) for side, modes in MODES.items() for mode in modes]
LARGE = math.log(1.1)  # a tenth of the effective rank
NEAR = 2.01  # rates of which one is at most so many times the other
FLATTER, STEEPER = "flatter", "steeper"
NONE_YET = "Whether ranks depend on the optimiser: there is no record yet."
IMAGES = (
    "![Singular values of GPT-2, with AdamW and with Muon](../paper_figures/images/spectra_optimizers.png)\n\n"
    "![What fewer heads lose, with AdamW and with Muon](../paper_figures/images/head_mode_loss_optimizers.png)"
)


def render(records: list[Record]) -> str:
    """The answer, its table and its figures.

    Args:
        records: all that there are.
    """
    tables = optimizer_tables(records)
    return "\n\n".join([answer(records), *(table.shown() for table in tables), IMAGES]) if tables else NONE_YET


def answer(records: list[Record]) -> str:
    """In one sentence, by the rule; and what one seed leaves open.

    Args:
        records: all that there are.
    """
    words = {row: [word(*compared(*pair, *mode, "trained", records)) for mode in ALL_MODES] for row, pair in pairs(records)}
    if len(words) < 2:
        return NONE_YET
    alike = {title: {of_row[n] for of_row in words.values()} for n, title in enumerate(mode_titles(ALL_MODES))}
    clear = [f"{title} is {said.pop()} with Muon" for title, said in alike.items() if said in ({FLATTER}, {STEEPER})]
    if clear:
        said = f"**Ranks depend on the optimiser**, with and without QK-norm: {', '.join(clear)}."
    elif all(said == {LEVEL} for said in alike.values()):
        said = "**Ranks do not depend on the optimiser**: all modes of the weights are level, with and without QK-norm."
    else:
        said = "**Whether ranks depend on the optimiser stays open**: no mode has the same clear word with and without QK-norm."
    return f"{said} That is of these models: another seed was not asked."


def pairs(records: list[Record]) -> Iterator[tuple[str, tuple[Record, Record]]]:
    """Each row with its models of AdamW and of Muon, at their best rates.

    Args:
        records: all that there are.
    """
    best = [record for (record,) in by_optimizer(records).values()]
    for row, group in grouped(best, lambda r: r.method).items():
        of = {optimizer_of(r): r for r in group}
        if of.keys() >= OPTIMIZERS.keys():
            yield row, (of["adamw"], of["muon"])


def compared(
    adamw: Record, muon: Record, side: str, mode: str, way: str, records: list[Record]
) -> tuple[list[Estimate], list[float | None]]:
    """Logarithms of Muon's effective ranks over AdamW's, and the yardsticks.

    Args:
        adamw, muon: models of one row.
        side, mode: which unfolding.
        way: a key of WAYS, on record of both.
        records: all that there are, for the yardsticks.

    Returns:
        Both by the singular values and by their squares; a yardstick is None without a model of a near rate.
    """
    near = [ratios(best, other, side, mode, way) for best in (adamw, muon) for other in neighbours(best, way, records)]
    found = [over_layers(logs) for logs in ratios(adamw, muon, side, mode, way)]
    return found, [max((abs(sum(logs[n]) / len(logs[n])) for logs in near), default=None) for n in (0, 1)]


def ratios(base: Record, other: Record, side: str, mode: str, way: str) -> list[list[float]]:
    """Logarithms of the other's effective ranks over the base's, layer by layer; by the values, then by their squares."""
    layers = list(zip(base.metrics[way], other.metrics[way], strict=True))
    return [[math.log(_rank(b[side][mode], power) / _rank(a[side][mode], power)) for a, b in layers] for power in (1, 2)]


def _rank(mode: dict, power: int) -> float:
    """At least one, as every effective rank is."""
    return max(1.0, (share(mode, power) or 0.0) * mode["size"])


def neighbours(record: Record, way: str, records: list[Record]) -> list[Record]:
    """Models of the same row and optimiser at another rate, or of another seed, that is near."""
    return [
        r
        for r in of_optimizers(records)
        if (r.method, optimizer_of(r)) == (record.method, optimizer_of(record))
        and r.id != record.id
        and max(r.rate, record.rate) <= NEAR * min(r.rate, record.rate)
        and r.metrics.get(way)
    ]


def word(found: list[Estimate], yardsticks: list[float | None]) -> str:
    """By the rule of this module.

    Args:
        found, yardsticks: as `compared` gives them.
    """
    if all(e.low >= -LARGE and e.high <= LARGE for e in found):
        return LEVEL
    large = any(y is not None and abs(e.value) > max(LARGE, y) for e, y in zip(found, yardsticks))
    if large and all(e.low > 0 for e in found):
        return FLATTER
    if large and all(e.high < 0 for e in found):
        return STEEPER
    return UNRESOLVED


def optimizer_tables(records: list[Record]) -> list[Table]:
    """Muon's effective ranks over AdamW's, of every mode.

    Args:
        records: all that there are.

    Returns:
        One table; none where no row was trained with both.
    """
    rows, runs = [], []
    for row, pair in pairs(records):
        for way, said in WAYS.items():
            if all(r.metrics.get(way) for r in pair):
                cells = [_cell(*compared(*pair, *mode, way, records)) for mode in ALL_MODES]
                rates = " and ".join(f"{r.rate:g}" for r in pair)
                rows.append([f"{row}, {said}", rates, *cells])
        runs += pair
    title = (
        "**Effective ranks with Muon over those with AdamW.** By the singular values / by their squares, geometric means over layers; "
        "in brackets the most that a rate twice or half as large changes with one optimiser, as a factor. Rates are those that validation "
        "text prefers, AdamW's first. The words follow a rule that stood before the runs: both intervals over layers on one side of 1, "
        "and one mean more than a tenth away and further than its bracket."
    )
    header = ["GPT-2 row", "rates", *mode_titles(ALL_MODES)]
    return [Table("Ranks by optimiser", title, markdown(header, rows), runs)] if rows else []


def _cell(found: list[Estimate], yardsticks: list[float | None]) -> str:
    """ "1.12 / 1.35 (1.03 / 1.08), flatter"."""
    factors = " / ".join(f"{math.exp(e.value):.2f}" for e in found)
    near = " / ".join("–" if y is None else f"{math.exp(y):.2f}" for y in yardsticks)
    return f"{factors} ({near}), {word(found, yardsticks)}"


def loss_table(records: list[Record]) -> list[Table]:
    """What each row reached with each optimiser and rate.

    Args:
        records: all that there are.
    """
    runs = sorted(of_one_budget(runs_of(records, "table2", BY_OPTIMIZER)), key=lambda r: (r.method, optimizer_of(r), r.rate))
    rows = [[r.method, OPTIMIZERS[optimizer_of(r)], f"{r.rate:g}", str(r.seed), _loss(r)] for r in runs]
    title = (
        "**Multi-head GPT-2 with AdamW and with Muon: validation loss (nats/token).** Every window of the text is read once."
    )
    return [Table("Optimisers", title, markdown(["GPT-2 row", "optimiser", "rate", "seed", "loss"], rows), runs)]


def _loss(record: Record) -> str:
    return (
        f"{record.metrics['validation_loss']:.3f}" if record.diverged_at is None else f"diverged at step {record.diverged_at}"
    )
