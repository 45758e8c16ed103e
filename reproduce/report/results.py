"""Every table of an experiment, drawn from records and from nothing else."""

from collections.abc import Callable, Container
from functools import partial

from ..store.records import Record
from .allocations import allocation_tables
from .breakdown import breakdown_tables, latent_breakdown
from .budgets import budget_tables
from .compression import compress_runs, compress_speed_runs
from .decoding import decode_runs, generation_tables
from .exactness import exactness_cells
from .fresh import fresh_tables
from .gains import gains_tables
from .gpu import ablation_table, best_table, cures_table, sweep_table
from .healing import heal_tables
from .language import ablation_runs, loss_tables
from .markdown import Table
from .opening import opening_table
from .optimizers import loss_table, optimizer_tables
from .query import alike, by_command, by_device, grouped
from .ranks import spectra_runs
from .room import compressed_tables, room_tables
from .sizes import table1_sizes, table2_sizes, table3_sizes
from .speed import gpu_tables, speed_tables
from .two_gpus import two_gpus_table
from .vision import chosen_runs, figure3_runs
from .vision_pairs import paired_tables
from .words import patterns, sources

Draw = Callable[[list[Record]], list[Table]]


def each(draw: Draw, split: Callable[[list[Record]], list[list[Record]]] = alike) -> Draw:
    """Draws tables for each group of runs that may stand in one.

    Args:
        draw: a group's records -> tables.
        split: records -> groups.
    """
    return lambda records: [table for group in split(records) for table in draw(group)]


def in_turn(*draws: Draw) -> Draw:
    """Draws the tables of each of them, one after the other.  draws: of the same records."""
    return lambda records: [table for draw in draws for table in draw(records)]


DRAW: dict[str, tuple[str, dict[str, Draw]]] = {  # the heading, and what draws each preset's records
    "exactness": ("Exact special cases", {"float64": exactness_cells}),
    "table1": ("Table 1: parameters and cache", {"sizes": table1_sizes}),
    "table2": ("Table 2: GPT-2", {"sizes": table2_sizes, "runs": each(partial(loss_tables, "table2"))}),
    "ablations": ("What makes it train well", {"runs": ablation_runs}),
    "spectra": ("Ranks of trained layers", {"runs": each(spectra_runs)}),
    "table3": ("Table 3: Llama", {"sizes": table3_sizes, "runs": each(partial(loss_tables, "table3"))}),
    "compress": ("Compressed without training", {"runs": compress_runs}),
    "compress_models": ("Models that others trained, compressed", {"models": compressed_tables}),
    "heal": ("Healed by a short training", {"runs": heal_tables}),
    "compress_speed": ("What compressing costs", {"runs": compress_speed_runs}),
    "opening": ("Architectures that open", {"tests": opening_table}),
    "figure3": (
        "Figure 3: vision transformers",
        {"runs": each(figure3_runs), "gpu-tiny-imagenet": in_turn(chosen_runs, paired_tables)},
    ),
    "decode": ("Decoding", {"runs": each(decode_runs, by_command)}),
    "speed": ("Speed on a GPU", {"runs": each(speed_tables, by_device)}),
    "generation_speed": ("Generation", {"runs": each(generation_tables, by_device)}),
    "two_gpus": ("One GPU and two", {"runs": each(two_gpus_table, by_device)}),
}
TOGETHER: dict[tuple[str, str], Draw] = {  # drawn from several experiments' records
    ("table2", "gpu-sweep"): sweep_table,
    ("table2", "gpu-fresh"): in_turn(partial(fresh_tables, preset="gpu-fresh"), gains_tables, latent_breakdown),
    ("table2", "gpu-fresh-narrow"): partial(fresh_tables, preset="gpu-fresh-narrow"),
    ("table2", "gpu-fresh-allocations"): allocation_tables,
    ("table3", "gpu-fresh"): partial(fresh_tables, preset="gpu-fresh", experiment="table3"),
    ("table2", "gpu"): lambda records: budget_tables(records, "table2"),
    ("table3", "gpu"): lambda records: budget_tables(records, "table3"),
    ("ablations", "gpu-sweep"): in_turn(ablation_table, breakdown_tables),
    ("ablations", "gpu"): in_turn(cures_table, best_table),
    ("table2", "gpu-fresh-optimizers"): loss_table,
    ("spectra", "gpu-fresh-optimizers"): optimizer_tables,
    ("spectra", "models"): room_tables,
    ("speed", "gpu"): gpu_tables,
}


def tables(records: list[Record], experiments: Container[str] | None = None) -> dict[str, list[Table]]:
    """All tables of each experiment, in the paper's order.

    Args:
        records: of all experiments, since some tables hold several.
        experiments: which to draw, all if None.

    Returns:
        Those that there are, by experiment.
    """
    groups = sorted(grouped(records, lambda r: (r.experiment, r.preset)).items(), key=lambda item: item[0][1] != "sizes")
    drawn: dict[str, list[Table]] = {}
    for experiment, (_, draw) in DRAW.items():
        for (name, preset), group in groups:  # sizes first
            if name == experiment and (experiments is None or name in experiments):
                together = TOGETHER.get((name, preset))
                found = together(records) if together else draw[preset if preset in draw else "runs"](group)
                drawn.setdefault(experiment, []).extend(found)
    return {experiment: found for experiment, found in drawn.items() if found}


def render(records: list[Record], experiments: Container[str] | None = None) -> str:
    """Tables under a heading for each experiment, with where the numbers come from.

    Args:
        records, experiments: as in `tables`.

    Returns:
        Markdown, empty where nothing is to be shown.
    """
    sections = []
    for experiment, found in tables(records, experiments).items():
        parts = [part for table in found for part in (table.shown(), _source(table))]
        sections += [f"### {DRAW[experiment][0]}", *parts]
    return "\n\n".join(sections)


def _source(table: Table) -> str:
    """One line: where the numbers of a table come from."""
    said = "; ".join(f"{what} {text}" for what, text in sources(table.runs).items())
    return f"From: {said}; {', '.join(f'`{command}`' for command in patterns(r.command for r in table.runs))}."
