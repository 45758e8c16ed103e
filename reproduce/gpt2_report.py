"""Tables of the GPT-2 runs at the paper's shape: the sweep of learning rates, the ablations, and Table 2's rows at the full budget."""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable

from .ablations import ROW
from .table2 import PRESETS, ROWS
from .tables import markdown, mean_and_spread

LONG = ", warm-up four times longer"  # of the ablations, what belongs into the sweep as well


def sweep_runs(records: list[dict]) -> list[dict]:
    """Of all records, the runs that differ in row, rate and warm-up alone, under their row's name."""
    plain = _of(records, "table2", "gpu-sweep")
    longer = [r for r in _of(records, "ablations", "gpu-sweep") if r["method"].endswith(LONG)]
    runs = plain + [{**r, "method": r["method"].removesuffix(LONG)} for r in longer]
    order = [row.label for row in ROWS["gpu"]]
    return sorted(runs, key=lambda r: (order.index(r["method"]), _warmup(r), r["config"]["train"]["learning_rate"]))


def sweep_table(records: list[dict]) -> list[str]:
    """records: all there are.  Every row and warm-up by learning rate, each row's best in bold."""
    runs = sweep_runs(records)
    table, best = rates_table(runs, lambda r: f"{r['method']}, warm-up {_warmup(r)}")
    title = (
        f"**Sweep of learning rate and warm-up for Table 2 at the paper's GPT-2 shape, REDUCED BUDGET: {_budget(runs)}, one seed; "
        "validation loss in nats/token, each row's best in bold.**"
    )
    note = "; ".join(f"{row} {loss:.3f}" for row, loss in sorted(best.items(), key=lambda item: item[1]))
    return [title, table, f"In order of what each row reaches at its own best: {note}.", sources(runs)]


def ablation_table(records: list[dict]) -> list[str]:
    """records: all there are.  What was changed in how one Tucker row is trained, by learning rate."""
    changed = _of(records, "ablations", "gpu-sweep")
    known = {(r["method"], r["config"]["train"]["learning_rate"]) for r in changed}
    rates, rows = {rate for _, rate in known}, (ROW, "MHA")
    plain = [
        r
        for r in _of(records, "table2", "gpu-sweep")
        if r["method"] in rows and r["config"]["train"]["learning_rate"] in rates and _key(r) not in known and _warmup(r) == 100
    ]
    runs = sorted(plain + changed, key=lambda r: (not r["method"].startswith(ROW), len(r["method"]) > len(ROW), r["method"]))
    table, _ = rates_table(runs, lambda r: r["method"])
    title = (
        f"**What makes {ROW} train well, REDUCED BUDGET: {_budget(runs)}, one seed, one change at a time; validation loss in "
        "nats/token.** MHA beside it, with the schedule's change, since that one is open to every row."
    )
    return [title, table, sources(changed)]


def rates_table(runs: list[dict], label_of: Callable[[dict], str]) -> tuple[str, dict[str, float]]:
    """One line per label, one column per learning rate; bold is the lowest loss of each row.

    Returns: the table, and the lowest losses.
    """
    rates = sorted({r["config"]["train"]["learning_rate"] for r in runs})
    found: dict[tuple, list[dict]] = defaultdict(list)
    for r in runs:
        found[label_of(r), r["config"]["train"]["learning_rate"]].append(r)
    best: dict[str, float] = {}
    for group in found.values():
        if (loss := _mean(group)) is not None:
            best[of_row(group[0])] = min(loss, best.get(of_row(group[0]), loss))
    lines = []
    for label in dict.fromkeys(label for label, _ in found):
        cells = []
        for rate in rates:
            group = found.get((label, rate), [])
            loss = _mean(group)
            bold = "**" if loss is not None and loss == best[of_row(group[0])] else ""
            cells.append(f"{bold}{_cell(group)}{bold}")
        lines.append([label, *cells])
    return markdown(["peak learning rate", *(f"{rate:g}" for rate in rates)], lines), best


def of_row(record: dict) -> str:
    """The row's own name, without what was changed."""
    return re.split(r", (?![^\[]*\])", record["method"])[0]


def settled(records: list[dict]) -> dict[str, list[dict]]:
    """The runs of Table 2's `gpu` preset at its present settings, by row; a row that has none is not there."""
    preset, groups = PRESETS["gpu"], defaultdict(list)
    for r in _of(records, "table2", "gpu"):
        t = r["config"]["train"]
        rate = preset.learning_rates.get(r["method"], preset.train.learning_rate)
        if (t["learning_rate"], t["warmup_steps"], t["steps"]) == (rate, preset.train.warmup_steps, preset.train.steps):
            groups[r["method"]].append(r)
    return groups


def budget_tables(records: list[dict]) -> list[str]:
    """records: all there are.  Table 2's rows at their best settings and the full budget, then runs at other settings."""
    groups = settled(records)
    runs = _of(records, "table2", "gpu")
    t = PRESETS["gpu"].train
    mha = statistics.mean(_losses(groups["MHA"])) if "MHA" in groups else None
    lines = []
    for row in ROWS["gpu"]:
        group = groups.get(row.label)
        if not group:
            lines.append([row.label, *["not run yet"] * 6])
            continue
        m, c = group[0]["metrics"], group[0]["config"]
        losses = _losses(group)
        above = f" ({100 * (statistics.mean(losses) / mha - 1):+.1f} %)" if mha and row.label != "MHA" else ""
        lines.append(
            [
                row.label,
                f"{m['attention_parameters'] * 2 / 1e6:.2f}",
                f"{m['cache_per_token'] * c['context'] * 2 / 1e6:.2f}",
                f"{c['train']['learning_rate']:g}",
                mean_and_spread(losses, 4) + above,
                mean_and_spread([r["metrics"]["bits_per_byte"] for r in group], 4),
                f"{statistics.mean(r['metrics']['tokens_per_second'] for r in group) / 1e3:.0f}",
            ]
        )
    title = (
        f"**Table 2, GPT-2 at the paper's shape, validation loss at REDUCED BUDGET: {_budget(runs)} in place of 600,000 steps; "
        f"each row at its best rate of the sweep, warm-up {t.warmup_steps} steps.** The paper's losses are not available to us."
    )
    header = [
        "GPT-2 row", "attention MB", "KV cache MB", "rate", "validation loss (against MHA)", "bits per byte", "1,000 tokens/s"
    ]  # fmt: skip
    parts = [title, markdown(header, lines), sources([r for group in groups.values() for r in group])]
    kept = {id(r) for group in groups.values() for r in group}
    others = [r for r in runs if id(r) not in kept]
    if others:
        rows = [
            [r["method"], f"{r['config']['train']['learning_rate']:g}", f"{_warmup(r)}", r["data"]["name"], _cell([r])]
            for r in others
        ]
        parts += [
            "**The same budget at other settings**, from before the sweep had a longer warm-up; not to be set beside the losses above.",
            markdown(["GPT-2 row", "rate", "warm-up", "text", "validation loss"], rows),
        ]
    return parts


def sources(runs: list[dict]) -> str:
    """Where numbers come from: data, devices, commits, minutes, and the commands with what varies between runs in capitals."""
    names = {"data": [], "device": [], "commit": []}
    for r in runs:
        for kind, name in (
            ("data", f"{r['data']['name']} (sha256 {r['data']['sha256'][:12]}…)"),
            ("device", r["device"]),
            ("commit", r["commit"][:10]),
        ):
            if name not in names[kind]:
                names[kind].append(name)
    said = ", ".join
    versions = said(dict.fromkeys(r["versions"]["torch"] for r in runs))
    minutes = statistics.median(r["wall_seconds"] for r in runs) / 60
    return (
        f"<sub>Data: {said(names['data'])}; {said(names['device'])}, torch {versions}; "
        f"commits {said(names['commit'])}; about {minutes:.1f} minutes a run; "
        f"{said(f'`{p}`' for p in patterns(r['command'] for r in runs))}. "
        "± is the standard deviation over seeds, where there are several.</sub>"
    )


VARIED = {"--rows": "ROWS", "--learning-rate": "RATE", "--warmup-steps": "STEPS", "--seeds": "SEEDS"}


def patterns(commands: Iterable[str]) -> list[str]:
    """The commands without the folders of one machine and, as words, what varies between runs; one for all that are alike then."""
    found: dict[str, set[str]] = {}
    for command in commands:
        start, *options = re.split(r" (?=--[a-z])", command)
        named = {option.split(" ")[0]: option for option in options}
        fixed = [option for name, option in sorted(named.items()) if name not in ("--records", "--out", *VARIED)]
        found.setdefault(" ".join([start, *fixed]), set()).update(named.keys() & VARIED.keys())
    return [" ".join([base, *(f"{name} {VARIED[name]}" for name in VARIED if name in used)]) for base, used in found.items()]


def _of(records: Iterable[dict], experiment: str, preset: str) -> list[dict]:
    return [r for r in records if (r["experiment"], r["preset"]) == (experiment, preset)]


def _key(record: dict) -> tuple[str, float]:
    return record["method"], record["config"]["train"]["learning_rate"]


def _warmup(record: dict) -> int:
    return record["config"]["train"]["warmup_steps"]


def _losses(group: list[dict]) -> list[float]:
    return [r["metrics"]["validation_loss"] for r in group if "validation_loss" in r["metrics"]]


def _mean(group: list[dict]) -> float | None:
    return statistics.mean(_losses(group)) if _losses(group) else None


def _cell(group: list[dict]) -> str:
    if not group:
        return "not run"
    if broken := [r["metrics"]["diverged_at"] for r in group if "diverged_at" in r["metrics"]]:
        return f"diverged at step {', '.join(map(str, broken))}"
    return mean_and_spread(_losses(group), 3)


def _budget(runs: list[dict]) -> str:
    tokens = next((r["metrics"]["tokens_seen"] for r in runs if "tokens_seen" in r["metrics"]), 0)
    return f"{tokens / 1e6:.1f}M training tokens"
