"""What captions say of runs: at which scale, with how many seeds."""

import statistics

from reproduce.report.query import BUDGETS
from reproduce.store.records import Record


def setting(experiment: str, config: dict) -> str:
    """Of a run of "table2" or "table3": its shape, and whether that or the budget is not the paper's."""
    narrower = BUDGETS[experiment].narrower(config)
    if narrower == 1:
        return "The paper's shape, REDUCED BUDGET"
    return (
        f"d {config['d_model']:,}, {config['n_layers']} layers, REDUCED SCALE (rows as the paper names them, ranks but the head rank "
        f"divided by {narrower})"
    )


def seeds_each(groups: dict[str, list[Record]]) -> str:
    """ "3 seeds a row", "3 seeds a row (MQA: 1)": how many runs there are of each.

    Args:
        groups: runs by row.
    """
    counts = {label: len(group) for label, group in groups.items()}
    usual = statistics.mode(counts.values())
    others = ", ".join(f"{label}: {n}" for label, n in counts.items() if n != usual)
    return f"{usual} seed{'s' * (usual > 1)} a row" + (f" ({others})" if others else "")


def short(label: str) -> str:
    """A row's name beside a point: what its colour says is left out.

    Args:
        label: "Tucker [8,64,64]", "GQA n_KV=4", "MLA shared d_c=128, and how it was trained".
    """
    name, comma, change = label.partition(", ")
    name = name.removeprefix("Tucker ").replace("n_KV=", "").replace(" d_c=", " ")
    return name + (comma and ",\n") + quarter(change)


def quarter(change: str) -> str:
    """ "factors at ¼ rate" for "factors at a quarter of the rate"."""
    return change.replace("at a quarter of the rate", "at ¼ rate")
