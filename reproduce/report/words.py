"""Records, counts and differences in words, as titles, cells and figures say them."""

import re
import statistics
from collections.abc import Iterable, Sequence

from ..store.records import Record
from ..train.recipes import Recipe
from .query import BUDGETS, diverged, recipe_of, row_label

STARTS = {  # how layers were converted
    "hosvd": "the HOSVD of their layers' weights (GQA and MLA: the SVD)",
    "hooi": "HOOI, the HOSVD refitted",
    "moment": "the HOSVD or SVD that knows the second moment of the layers' inputs",
}
TITLES = {"table2": "GPT-2", "table3": "Llama"}
VARIED = {"--rows": "ROWS", "--learning-rate": "RATE", "--warmup-steps": "STEPS", "--seeds": "SEEDS"}


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """ "4.321" for one value, "4.321 ± 0.012 (3)" with the standard deviation and the number of runs for more.

    Args:
        values: of each run.
        digits: after the point.
    """
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} ({len(values)})"


def each_once(names: Iterable[str]) -> str:
    """ "a, b" for a, b and a."""
    return ", ".join(dict.fromkeys(names))


def difference(ours: float, paper: float) -> str:
    """ours / paper - 1 in per cent, signed.

    Args:
        ours, paper: of one unit; paper is not 0.
    """
    per_cent = round(100 * (ours / paper - 1), 1) + 0.0  # no minus before a zero
    return f"{signed(per_cent, 1)} %"


def divergence(group: list[Record]) -> str:
    """At which steps runs of a group broke off; empty if none did."""
    steps = ", ".join(map(str, diverged(group)))
    return f"diverged at step {steps}" if steps else ""


def change_of(record: Record) -> str:
    """What was changed in how the row is trained, as its recipe is called."""
    return record.method.removeprefix(f"{row_label(record)}, ") if recipe_of(record) else Recipe().name


def seeds_in_words(runs: list[Record]) -> str:
    """ "one seed", "up to 3 seeds"."""
    seeds = len({r.seed for r in runs})
    return "one seed" if seeds == 1 else f"up to {seeds} seeds"


def tokens_seen(runs: list[Record]) -> int:
    """How many tokens a run that ended was trained on.

    Args:
        runs: of one budget.

    Returns:
        0 where none ended.
    """
    return next((r.metrics["tokens_seen"] for r in runs if "tokens_seen" in r.metrics), 0)


def tokens_of(runs: list[Record]) -> str:
    """ "100.0M training tokens"."""
    return f"{tokens_seen(runs) / 1e6:.1f}M training tokens"


def passes_over(runs: list[Record]) -> float:
    """How many tokens were drawn for each token of the text; windows are drawn at random, so that some are never read."""
    return max((r.metrics.get("tokens_seen", 0) / r.data["train_tokens"] for r in runs), default=0)


def epochs_of(record: Record) -> str:
    """Over how many epochs a run of Figure 3 was fine-tuned.

    Args:
        record: of a run whose data are images.

    Returns:
        "3 epochs", or, of a run with other steps than those of its epochs, these and what share they are.
    """
    images, epochs, batch = record.data["train_images"], record.config["epochs"], record.train["batch_size"]
    if record.steps == epochs * images // batch:
        return f"{epochs} epochs"
    return f"{record.steps:,} steps at REDUCED BUDGET, {record.steps * batch / images:.2g} epochs"


def scale_of(config: dict) -> str:
    """Of a trained GPT-2: whether it has the paper's shape, and was trained as long.

    Args:
        config: of its record.
    """
    if config["d_model"] < BUDGETS["table2"].width:
        return "at REDUCED SCALE, not the paper's"
    return "at the paper's shape" + (", REDUCED BUDGET" if config["train"]["steps"] < BUDGETS["table2"].paper_steps else "")


def data_in_words(record: Record) -> str:
    """What it was trained on, with the start of its hash."""
    return f"{record.data['name']} (content sha256 {record.data['sha256'][:12]}…)"


def percent(share: float, digits: int = 0) -> str:
    """0.18 as "18 %"."""
    return f"{100 * share:.{digits}f} %"


def signed(value: float, digits: int) -> str:
    """With its sign, a minus as wide as a plus."""
    return f"{value:+.{digits}f}".replace("-", "−")


def commit_of(record: Record) -> str:
    """The commit that ran, short, and whether the tree differed from it."""
    commit, plus, changes = record.commit.partition("+")
    return commit[:10] + plus + changes


def sources(records: Sequence[Record]) -> dict[str, str]:
    """Where numbers come from, by what is said: runs, data, devices, versions and commits, each once.

    Args:
        records: at least one.
    """
    minutes = statistics.median(r.wall_seconds for r in records) / 60
    median = f", {minutes:.1f} minutes each (median)" if minutes >= 0.1 else ""
    said = {"runs": f"{len(records):,}{median}"}
    if data := each_once(data_in_words(r) for r in records if r.data):
        said["data"] = data
    said["devices"] = each_once(r.device for r in records)
    said["torch"] = each_once(r.versions["torch"] for r in records if "torch" in r.versions)
    said["commits"] = each_once(map(commit_of, records))
    return {name: text for name, text in said.items() if text}


def patterns(commands: Iterable[str]) -> list[str]:
    """The commands without the folders of one machine and, as words, what varies between runs.

    Args:
        commands: as records have them.

    Returns:
        One for all that are alike then.
    """
    varied: dict[str, set[str]] = {}
    for command in commands:
        start, *options = re.split(r" (?=--[a-z])", command)
        named = {option.split(" ")[0]: option for option in options}
        fixed = [option for name, option in sorted(named.items()) if name not in ("--records", "--out", *VARIED)]
        varied.setdefault(" ".join([start, *fixed]), set()).update(named.keys() & VARIED.keys())
    return [" ".join([base, *(f"{name} {VARIED[name]}" for name in VARIED if name in used)]) for base, used in varied.items()]


def mode_titles(modes: list[tuple[str, str]]) -> list[str]:
    """("pre", "head") as "W head", ("post", "head") as "W~ head"."""
    return [f"{'W' if side == 'pre' else 'W~'} {mode}" for side, mode in modes]


def ranges(numbers: Sequence[int]) -> str:
    """ "1 to 3, 6, 7" for 1, 2, 3, 6 and 7.

    Args:
        numbers: in rising order.
    """
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(f"{group[0]} to {group[-1]}" if len(group) > 2 else ", ".join(map(str, group)) for group in groups)


# Of fresh text.


def table_name(experiment: str, preset: str) -> str:
    """ "Table 2, fresh text, narrow": what pages ask for.

    Args:
        experiment: "table2" or "table3".
        preset: one of its "gpu-fresh".
    """
    return f"{BUDGETS[experiment].title.split(',')[0]}, fresh text{preset.removeprefix('gpu-fresh').replace('-', ', ')}"


def scale_in_words(experiment: str, runs: list[Record]) -> str:
    """ "GPT-2 at the paper's shape with Muon on fresh text, REDUCED BUDGET".

    Args:
        experiment: as in `table_name`.
        runs: of one budget.
    """
    narrower = BUDGETS[experiment].narrower(runs[0].config)
    shape = f"{narrower} times narrower than the paper's" if narrower > 1 else "at the paper's shape"
    reduced = "REDUCED SCALE" if narrower > 1 else "REDUCED BUDGET"
    return f"{TITLES[experiment]} {shape} with Muon on fresh text, {reduced}"


def text_in_words(runs: list[Record]) -> str:
    """ "64.9M training tokens, no token read twice"."""
    passes = max(r.config.get("passes", 1) for r in runs)
    return f"{tokens_of(runs)}, {'no token read twice' if passes == 1 else f'every token read {passes} times'}"
