"""Which records belong together, and what they hold. Tables, claims and figures read records through this; no text is made here."""

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass

from ..experiments import table2, table3
from ..experiments.ablations import PRESETS as ABLATIONS
from ..experiments.ablations import ROW, SLOWER_ATTENTION, SLOWER_FACTORS
from ..models.rows import Row, row_of
from ..store.records import Record, data_key
from ..train.language import LanguagePreset

LONG_WARMUP = {"warmup": 4}  # the recipe that is nothing but the longer warm-up of the sweep


@dataclass(frozen=True)
class Budget:
    """One of the paper's tables as the preset `gpu` trains it.

    Args:
        title: what it is called.
        paper_steps, width: the paper's steps and d.
        preset, rows: how it is trained here, and what.
        base: the row that the paper sets the others beside.
        note: what its title says more.
    """

    title: str
    paper_steps: int
    width: int
    preset: LanguagePreset
    rows: tuple[Row, ...]
    base: str
    note: str = ""

    def narrower(self, config: dict) -> int:
        """By what factor a run's model is narrower than the paper's.

        Args:
            config: of its record.
        """
        return self.width // config["d_model"]

    def rate(self, label: str) -> float:
        """The peak learning rate of a row.

        Args:
            label: of the row, with or without what was changed.
        """
        return self.preset.rate(label)


BUDGETS = {
    "table2": Budget(
        "Table 2, GPT-2", 600_000, table2.PAPER_SHAPE["d_model"], table2.PRESETS["gpu"], table2.ON_GPU_ROWS, "MHA"
    ),
    "table3": Budget(
        "Table 3, Llama",
        100_000,
        table3.PAPER_SHAPE["d_model"],
        table3.PRESETS["gpu"],
        table3.TABLE3,
        "GQA n_KV=8",
        note=" Rotary embeddings turn whole heads in MHA, GQA and MQA, latents in MLA and Tucker.",
    ),
}
FRESH_ROWS = {
    "table2": table2.FRESH_ROWS,
    "table3": (*table3.TABLE3, *table3.TABLE3_NORMED),
}  # all that may be named on fresh text


# What belongs together.


def grouped(records: Iterable[Record], key: Callable[[Record], Hashable]) -> dict[Hashable, list[Record]]:
    """Records of one key together.

    Args:
        records: in any order.
        key: what tells the groups apart.

    Returns:
        Groups by key, in the order of the first record of each.
    """
    # pandas' groupby would take a table with a column per key, and drop keys that are None, as seed and data often are.
    groups: dict[Hashable, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def runs_of(records: Iterable[Record], experiment: str, preset: str) -> list[Record]:
    """Of all records, those of one experiment at one preset, in their order."""
    return [r for r in records if (r.experiment, r.preset) == (experiment, preset)]


def alike(records: list[Record], *, any_rate: bool = False) -> list[list[Record]]:
    """Training runs that may stand in one table: all is alike but rows, learning rates and seeds.

    A pretrained model, which has but a part of the settings, stands with whatever was made of it.

    Args:
        records: of one experiment.
        any_rate: whether learning rates may differ even where all rows should share one, as in Figure 3.

    Returns:
        Groups, in the order of their first runs.
    """
    groups: list[tuple[dict, list[int]]] = []
    pretrained = [not r.is_trained for r in records]
    for n in sorted(range(len(records)), key=pretrained.__getitem__):  # what is pretrained comes last
        settings = _settings(records[n], any_rate)
        fitting = [
            places for known, places in groups if settings == known or pretrained[n] and settings.items() <= known.items()
        ]
        if not fitting:
            groups.append((settings, []))
            fitting = [groups[-1][1]]
        for places in fitting:
            places.append(n)
    return [[records[n] for n in sorted(places)] for _, places in groups]


def _settings(record: Record, any_rate: bool) -> dict:
    """What defines a run, side by side, but for its row and, unless all rows share one as in Figure 3, its learning rate."""
    config = {name: value for name, value in record.config.items() if name not in ("row", "attention")}
    own = ("learning_rate",) if any_rate or "epochs" not in config else ()
    train = {f"train.{name}": value for name, value in config.pop("train", {}).items() if name not in own}
    return {**config, **train, "data": data_key(record.data)}


def largest(groups: list[list[Record]]) -> list[Record]:
    """The group of most runs, of equal ones the last; empty if there is none.

    Args:
        groups: as `alike` gives them.
    """
    return max(reversed(groups), key=len, default=[])


def by_row(records: list[Record]) -> dict[str, list[Record]]:
    """The seeds of a row together. Where a row was run at several rates, the later ones say theirs.

    Args:
        records: runs that are `alike`.

    Returns:
        Runs by label of the row, with ", rate 0.001" or the like behind it for every rate but the first.
    """
    groups: dict[str, list[Record]] = defaultdict(list)
    rates: dict[str, float | None] = {}
    for record in records:
        rate = record.rate if record.is_trained else None
        own = rate == rates.setdefault(record.method, rate)
        groups[record.method if own else f"{record.method}, rate {rate:g}"].append(record)
    return groups


def by_command(records: list[Record]) -> list[list[Record]]:
    """Timings that were taken in one run: of one command on one device."""
    return list(grouped(records, lambda r: (r.command, r.device, r.commit)).values())


def by_device(records: list[Record]) -> list[list[Record]]:
    """Timings that were taken on one device."""
    return list(grouped(records, lambda r: r.device).values())


def _model(record: Record) -> tuple[str, str]:
    """A model's name, and what it is known by: its run, or the hash of its weights."""
    return record.config["model"], record.config.get("run", record.config.get("weights", ""))


def model_names(records: list[Record]) -> list[str]:
    """What each record's model is called; where several models have one name, with the beginning of what it is known by."""
    models = [_model(record) for record in records]
    known = {name: {by for called, by in models if called == name} for name, _ in models}
    return [f"{name} ({by[:8]})" if by and len(known[name]) > 1 else name for name, by in models]


def by_model(records: list[Record]) -> list[list[Record]]:
    """Records of one model on one set of samples together."""
    return list(grouped(records, lambda r: (*_model(r), r.data["sha256"])).values())


def budget_of(record: Record) -> tuple:
    """What text a run was trained on, in which byte pairs, and over how many steps."""
    return *data_key(record.data), record.steps


def of_one_budget(runs: list[Record]) -> list[Record]:
    """Those on the text and over the steps of most of them: losses on other ones are not to be set beside theirs."""
    return max(grouped(runs, budget_of).values(), key=len, default=[])


# What one run is: a row, and what was changed in how it is trained.


def row_label(record: Record) -> str:
    """The row's own name, without what was changed."""
    return row_of(record.config["row"]).label


def recipe_of(record: Record) -> dict:
    """What was changed in how the row is trained, as `Recipe.config` says it; empty where nothing was."""
    return record.config.get("recipe", {})


def method_and_rate(record: Record) -> tuple[str, float]:
    """The row with what was changed, and the peak learning rate: what tells settings of one budget apart."""
    return record.method, record.rate


# What a group of runs reached.


def unbroken(runs: list[Record]) -> list[Record]:
    """Those of settings of which no run diverged: what the other seeds reached is not what the setting reaches.

    Args:
        runs: of any settings.
    """

    def setting(r: Record) -> tuple:
        return r.experiment, r.preset, r.method, r.config, data_key(r.data)

    broken = [setting(r) for r in runs if r.diverged_at is not None]
    return [r for r in runs if setting(r) not in broken]


def diverged(group: list[Record]) -> list[int]:
    """The steps at which runs of a group broke off; empty if none did."""
    return [r.diverged_at for r in group if r.diverged_at is not None]


def losses_of(group: list[Record]) -> list[float]:
    """Validation losses of the runs that ended, in nats per token."""
    return [r.metrics["validation_loss"] for r in group if "validation_loss" in r.metrics]


def mean_loss(group: list[Record]) -> float | None:
    """The mean over seeds.

    Args:
        group: runs of one setting.

    Returns:
        Nats per token; None where no run ended, or one of them diverged.
    """
    return statistics.mean(losses_of(group)) if losses_of(group) and not diverged(group) else None


def largest_logit(runs: list[Record]) -> float | None:
    """The largest attention logit that was seen in any of the runs.

    Returns:
        None if none was looked at.
    """
    return max((o["largest_logit"] for r in runs for o in r.metrics.get("observations", ())), default=None)


def megabytes(record: Record) -> tuple[float, float]:
    """What a run's attention takes in BF16.

    Returns:
        Megabytes (10^6 bytes) of its parameters, and of its cache for one whole context.
    """
    return record.attention_parameters * 2 / 1e6, record.metrics["cache_per_token"] * record.config["context"] * 2 / 1e6


def speeds_on(card: str, runs: list[Record]) -> list[float]:
    """Tokens per second of those that one card has trained by itself, from start to end."""
    return [speed for r in runs if r.workers == 1 and r.device == card and (speed := r.metrics.get("tokens_per_second"))]


def speeds_on_one_card(runs: list[Record]) -> tuple[str, dict[str, float]]:
    """How fast rows were trained, on the card that has trained most of them.

    Args:
        runs: at any rate; those on several GPUs do not count.

    Returns:
        The card in words, and tokens per second by row as means over its runs.
    """
    speeds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in runs:
        if r.workers == 1 and (speed := r.metrics.get("tokens_per_second")):
            speeds[r.device][r.method].append(speed)
    card = max(speeds, key=lambda device: len(speeds[device]), default="no run ended")
    return card, {row: statistics.mean(values) for row, values in speeds[card].items()}


# Sizes at the paper's shapes, as the records `sizes` hold them.


def sizes_of(records: list[Record]) -> list[dict]:
    """The rows of the (one) record of sizes.

    Args:
        records: of the preset "sizes" of one experiment, at least one.
    """
    return records[-1].metrics["rows"]


def attention_mb(row: dict, shape: dict) -> float:
    """Megabytes (10^6 bytes) in BF16 of all layers' attention.

    Args:
        row: of `sizes_of`.
        shape: the config of its record.
    """
    return row["parameters"] * shape["n_layers"] * 2 / 1e6


def cache_mb(row: dict, shape: dict) -> float:
    """Megabytes (10^6 bytes) in BF16 of the cache of one whole context.

    Args:
        row, shape: as in `attention_mb`.
    """
    return row["cache_per_token"] * shape["context"] * shape["n_layers"] * 2 / 1e6


# Parts of the records of one GPU. Each takes all records that there are.


def settled(records: list[Record], experiment: str) -> dict[str, list[Record]]:
    """Runs at the present settings of the preset `gpu`, by row, on the text on which there are most of them.

    Args:
        records: all that there are.
        experiment: "table2" or "table3".

    Returns:
        The runs of each row that has some.
    """
    budget = BUDGETS[experiment]
    now = budget.preset.train

    def is_settled(r: Record) -> bool:
        return (r.rate, r.warmup, r.steps) == (budget.rate(r.method), now.warmup_steps, now.steps)

    runs = largest(alike([r for r in runs_of(records, experiment, "gpu") if is_settled(r)]))
    return grouped(runs, lambda r: r.method)


def rates_of(records: list[Record], experiment: str) -> dict[str, set[float]]:
    """Which rates each row had at the steps and warm-up of the preset `gpu`: the more there were, the better the best of them looks.

    Args:
        records: all that there are.
        experiment: "table2" or "table3".
    """
    train = BUDGETS[experiment].preset.train
    tried: dict[str, set[float]] = {}
    for r in runs_of(records, experiment, "gpu"):
        if (r.steps, r.warmup) == (train.steps, train.warmup_steps):
            tried.setdefault(r.method, set()).add(r.rate)
    return tried


def sweep_runs(records: list[Record]) -> list[Record]:
    """The runs that differ in row, rate and warm-up alone, under their row's name: the sweep, and the ablations' longer warm-up.

    Args:
        records: all that there are.

    Returns:
        Ordered by the row's place in Table 2, warm-up and rate.
    """
    longer = [r for r in runs_of(records, "ablations", "gpu-sweep") if recipe_of(r) == LONG_WARMUP]
    runs = of_one_budget(runs_of(records, "table2", "gpu-sweep") + [under_its_row(r) for r in longer])
    return sorted(runs, key=lambda r: (_place(r), r.warmup, r.rate))


def optimizer_of(record: Record) -> str:
    """ "adamw" or "muon"."""
    return record.train.get("optimizer", "adamw")


def with_muon(records: list[Record], experiment: str, preset: str) -> list[Record]:
    """An experiment's runs with Muon: the preset is Muon's, and AdamW's runs at it are set beside them in one table alone.

    Args:
        records: all that there are.
        experiment, preset: of a language model on fresh text.
    """
    return [r for r in runs_of(records, experiment, preset) if optimizer_of(r) == "muon"]


def settings_on_fresh_text(records: list[Record], experiment: str, preset: str) -> list[Record]:
    """Those of them that are settings of their rows: QK-clip, which not every row was tried with, is a comparison of its own.

    Args:
        records, experiment, preset: as in `with_muon`.
    """
    return [r for r in with_muon(records, experiment, preset) if r.train.get("qk_clip") is None]


def fresh_runs(records: list[Record], preset: str = "gpu-fresh", experiment: str = "table2") -> list[Record]:
    """Runs with Muon on fresh text, which differ in row, rate and QK-clip alone.

    Args:
        records: all that there are.
        preset, experiment: as in `with_muon`.

    Returns:
        Ordered by the row's place in its table, QK-clip and rate.
    """
    runs, rows = of_one_budget(with_muon(records, experiment, preset)), FRESH_ROWS[experiment]
    return sorted(runs, key=lambda r: (_place(r, rows), r.train.get("qk_clip") or 0.0, r.rate))


def _place(record: Record, rows: tuple[Row, ...] = BUDGETS["table2"].rows) -> int:
    """Of its row among these; after them all, where it is none of them any more."""
    labels = [row.label for row in rows]
    return labels.index(record.method) if record.method in labels else len(labels)


def full_budget_runs(records: list[Record]) -> list[Record]:
    """Table 2's runs at its full budget and present warm-up that differ in row, rate and seed alone.

    Args:
        records: all that there are.

    Returns:
        Ordered by the row's place in Table 2.
    """
    runs = [r for r in runs_of(records, "table2", "gpu") if r.warmup == BUDGETS["table2"].preset.train.warmup_steps]
    return sorted(of_one_budget(runs), key=_place)


def slowed_runs(records: list[Record], preset: str) -> list[Record]:
    """The ablations whose factors (Tucker) or attention (any other row) learned at a quarter of the rate, under their row's name.

    Args:
        records: all that there are.
        preset: "gpu", or "gpu-sweep" for those that had the long warm-up too.
    """
    wanted = [recipe.config() | (LONG_WARMUP if preset == "gpu-sweep" else {}) for recipe in (SLOWER_FACTORS, SLOWER_ATTENTION)]
    return [under_its_row(r) for r in of_one_budget(runs_of(records, "ablations", preset)) if recipe_of(r) in wanted]


def under_its_row(record: Record) -> Record:
    """The same run, named by its row alone."""
    return dataclasses.replace(record, method=row_label(record))


def highest_rate(records: list[Record]) -> list[Record]:
    """The ablations' runs at the rate that breaks their row down, where its training was changed and nothing diverged.

    Args:
        records: all that there are.

    Returns:
        The row as it is, then by loss from the highest.
    """
    rate = ABLATIONS["gpu-sweep"].train.learning_rate
    runs = [
        r
        for r in unbroken(runs_of(records, "ablations", "gpu-sweep"))
        if (row_label(r), r.rate) == (ROW, rate) and "init" not in recipe_of(r)
    ]
    return sorted(runs, key=lambda r: (bool(recipe_of(r)), -r.metrics["validation_loss"]))


def timed_steps(records: list[Record]) -> list[tuple[Record, dict[str, float]]]:
    """How long one training step of LLaMA3-1B's true shape takes, as `speed` measured it. Times of two records are never one list.

    Args:
        records: all that there are.

    Returns:
        Each record that timed some row, with milliseconds by row.
    """
    found = []
    for r in runs_of(records, "speed", "gpu"):
        rows = r.metrics["rows"] if r.method == "models" else ()
        if times := {row["row"]: row["milliseconds"] for row in rows if row["model"] == "LLaMA" and "milliseconds" in row}:
            found.append((r, times))
    return found


def step_times(records: list[Record]) -> dict[str, float]:
    """Milliseconds of a step by row, of the record that timed most rows; of equal ones the last.

    Args:
        records: all that there are.
    """
    return max(reversed([times for _, times in timed_steps(records)]), key=len, default={})
