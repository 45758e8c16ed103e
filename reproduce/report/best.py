"""Rows at the settings that validation text prefers, judged on a test text: which there are, and their trend with more tokens."""

import functools
import json

from tucker_ref.initialisation import shapes_alone

from ..models.sizes import count_parameters
from ..store.records import Record
from ..train.language import build_model
from .judge import SEEDS, Best, Estimate, at_their_best, loss_difference, on_test_text
from .query import budget_of, diverged, full_budget_runs, grouped, mean_loss, method_and_rate, row_label, runs_of, with_muon

BASE = "MHA"
COMPARED = (BASE, "GQA n_KV=4", "MLA", "Tucker [8,128,128]", "Tucker [8,128,64]", "Tucker [8,64,64]")  # of MLA the better one


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
    for runs in grouped(with_muon(records, experiment, preset), budget_of).values():
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
    enough = {row: own for row, own in fullest(records).items() if len(own.runs) >= SEEDS and not diverged(own.runs)}
    there = {"MLA" if row.startswith("MLA") else row for row in enough}
    return enough if there >= {*COMPARED} else {}


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
    for preset in ("gpu-fresh", "gpu-fresh-narrow"):
        for best in at_best(records, "table2", preset):
            base = best[BASE].runs if BASE in best else []
            for row, own in best.items():
                if base and row != BASE and (estimate := loss_difference(own.runs, base)):
                    points.setdefault(row, []).append((tokens_per_parameter(base[0]), estimate))
    return {row: sorted(own, key=lambda point: point[0]) for row, own in points.items() if len(own) > 1}
