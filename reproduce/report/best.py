"""Rows at the settings that validation text prefers, judged on a test text: which there are, and their trend with more tokens."""

import functools
import itertools
import json
from dataclasses import dataclass

from tucker_ref.initialisation import shapes_alone

from ..experiments.table2 import FRESH
from ..models.sizes import count_parameters
from ..store.records import Record
from ..train.language import build_model
from .judge import SEEDS, Best, Estimate, at_their_best, broken, differences_by_seed, loss_difference, on_test_text
from .query import (
    budget_of,
    diverged,
    full_budget_runs,
    grouped,
    mean_loss,
    method_and_rate,
    row_label,
    runs_of,
    settings_on_fresh_text,
)

BASE = "MHA"
COMPARED = (BASE, "GQA n_KV=4", "MLA", "Tucker [8,128,128]", "Tucker [8,128,64]", "Tucker [8,64,64]")  # of MLA the better one
SIZES = {"gpu-fresh": "the paper's shape", "gpu-fresh-narrow": "four times narrower"}  # presets of Table 2


def at_best(records: list[Record], experiment: str, preset: str) -> list[dict[str, Best]]:
    """The rows whose best setting was judged on a test text.

    Args:
        records: all that there are.
        experiment: "table2" or "table3".
        preset: of it.

    Returns:
        For each budget that has some, by row, from the largest attention to the smallest.
    """
    found = []
    for runs in grouped(settings_on_fresh_text(records, experiment, preset), budget_of).values():
        best = {row: own for row, own in at_their_best(runs).items() if any(map(on_test_text, own.runs))}
        found.append(dict(sorted(best.items(), key=lambda item: -item[1].runs[0].attention_parameters)))
    return [best for best in found if best]


def fullest(records: list[Record]) -> dict[str, Best]:
    """Table 2's rows at their best on a test text, at the budget with the most runs.

    Args:
        records: all that there are.

    Returns:
        By row, from the largest attention to the smallest; empty where none read a test text.
    """
    budgets = at_best(records, "table2", "gpu-fresh")
    return max(budgets, key=lambda best: sum(len(own.runs) for own in best.values()), default={})


def judged_at_best(records: list[Record]) -> dict[str, Best]:
    """Those that enough seeds judge.

    Args:
        records: all that there are.

    Returns:
        As `fullest`; empty until all that are to be compared are among them, since a table of the rows that happen to be finished
        would mislead.
    """
    return _if_all_are_there(fullest(records))


def judged_narrower(records: list[Record]) -> dict[str, Best]:
    """The same in the model four times narrower, which read as many tokens: more for each of its parameters.

    Args:
        records: all that there are.

    Returns:
        As `judged_at_best`.
    """
    wide = judged_at_best(records)
    same = [own for own in _with_base(records, "gpu-fresh-narrow") if wide and _budget(own) == _budget(wide)]
    return _if_all_are_there(same[0]) if same else {}


def _if_all_are_there(best: dict[str, Best]) -> dict[str, Best]:
    """Rows that enough seeds judge; none if one that is to be compared is not among them."""
    enough = {row: own for row, own in best.items() if len(own.runs) >= SEEDS and not diverged(own.runs)}
    there = {"MLA" if row.startswith("MLA") else row for row in enough}
    return enough if there >= {*COMPARED} else {}


def _budget(best: dict[str, Best]) -> object:
    """What multi-head attention was trained on."""
    return budget_of(best[BASE].runs[0])


def settings_with_adamw(records: list[Record]) -> dict[str, list[list[Record]]]:
    """Of each row of Table 2 the runs of every setting, rate and change, at its full budget.

    Args:
        records: all that there are.
    """
    plain = full_budget_runs(records)
    budgets = {(budget_of(r), r.warmup) for r in plain}  # one, or none
    changed = [r for r in runs_of(records, "ablations", "gpu") if (budget_of(r), r.warmup) in budgets]
    return {row: list(grouped(runs, method_and_rate).values()) for row, runs in grouped(plain + changed, row_label).items()}


def best_setting(settings: list[list[Record]]) -> list[Record]:
    """Of those with the most seeds the one with the lowest mean loss.

    Args:
        settings: the runs of each.

    Returns:
        Empty where in every one a run diverged.
    """
    ended = [group for group in settings if not diverged(group)]
    most = max(map(len, ended), default=0)
    return min((group for group in ended if len(group) == most), key=lambda group: mean_loss(group) or 0.0, default=[])


def tokens_per_parameter(record: Record) -> float:
    """Tokens that a run is trained on, for each parameter beside the embedding."""
    tokens = record.steps * record.train["batch_size"] * record.config["context"]
    return tokens / _beside_embedding(json.dumps(record.config))


@functools.cache
def _beside_embedding(config: str) -> int:
    """Parameters of all blocks.  config: as JSON."""
    with shapes_alone():
        return count_parameters(build_model(json.loads(config)).blocks)


def trend(records: list[Record]) -> dict[str, list[tuple[float, Estimate]]]:
    """How far each row of Table 2 is from multi-head attention, the more tokens there are for each parameter.

    Args:
        records: all that there are.

    Returns:
        By row, from few tokens to many: those for each parameter of the multi-head model, and the difference of test losses. Empty
        where no two budgets have one.
    """
    points: dict[str, list[tuple[float, Estimate]]] = {}
    for best in (best for preset in SIZES for best in _with_base(records, preset)):
        base = best[BASE].runs
        for row, own in best.items():
            if row != BASE and (estimate := loss_difference(own.runs, base)):
                points.setdefault(row, []).append((tokens_per_parameter(base[0]), estimate))
    return {row: sorted(own, key=lambda point: point[0]) for row, own in points.items() if len(own) > 1}


def _with_base(records: list[Record], preset: str) -> list[dict[str, Best]]:
    """Table 2's budgets in which multi-head attention read a test text, from few tokens to many."""
    found = [best for best in at_best(records, "table2", preset) if BASE in best]
    return sorted(found, key=lambda best: tokens_per_parameter(best[BASE].runs[0]))


@dataclass(frozen=True)
class Move:
    """A row's difference to multi-head attention where there are few tokens for each parameter, and where there are many.

    Args:
        row: which.
        along: what differs between the two.
        tokens: of both, those for each parameter of the multi-head model.
        few, many: by seed, the difference of test losses.
    """

    row: str
    along: str
    tokens: tuple[float, float]
    few: dict[int | None, float]
    many: dict[int | None, float]

    @property
    def seeds(self) -> list[int | None]:
        """Those that both have."""
        return [seed for seed in self.many if seed in self.few]

    @property
    def by(self) -> list[float]:
        """Of each of these seeds, by how much the difference is larger with many tokens."""
        return [self.many[seed] - self.few[seed] for seed in self.seeds]


def moves(records: list[Record]) -> list[Move]:
    """Whether the difference to multi-head attention moves with tokens per parameter, by a rule that stood before the runs.

    Within a size the budget with the most tokens is set beside that with the fewest. Between the sizes it is one pass over the text each.
    Rows of which a run diverged there are left out.

    Args:
        records: all that there are.
    """
    budgets = {preset: _with_base(records, preset) for preset in SIZES}
    pairs = [(own[0], own[-1], SIZES[preset]) for preset, own in budgets.items() if len(own) > 1]
    for few, many in itertools.product(*budgets.values()):
        if _budget(few) == _budget(many) and few[BASE].runs[0].steps == FRESH.train.steps:
            pairs.append((few, many, "between the sizes"))
    found = []
    for few, many, along in pairs:
        tokens = tokens_per_parameter(few[BASE].runs[0]), tokens_per_parameter(many[BASE].runs[0])
        for row in [row for row in few if row != BASE and row in many]:
            sides = [(best[row].runs, best[BASE].runs) for best in (few, many)]
            if not any(broken(*side) for side in sides):
                found.append(Move(row, along, tokens, *(differences_by_seed(*side) for side in sides)))
    return found
