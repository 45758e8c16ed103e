"""Tables of the language models that one GPU trained: learning rates, ablations, and Tables 2 and 3 at the full budget."""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..experiments import figure3, table2, table3
from ..experiments.ablations import CASES, CURES, LONGER, ROW, SLOWER
from ..experiments.ablations import PRESETS as ABLATIONS
from ..models.rows import Row
from ..store.records import data_key, workers_of
from ..train.language import LanguagePreset, method_of
from ..train.recipes import Recipe
from .markdown import alike, commit_of, complete, difference, each_once, grouped, largest, markdown, mean_and_spread

BEGIN, END = "<!-- commands: written by `python -m reproduce report --write README.md` -->", "<!-- end of commands -->"
LONG = ", warm-up four times longer"  # of the ablations, what belongs into the sweep as well


def sweep_runs(records: list[dict]) -> list[dict]:
    """Of all records, the runs that differ in row, rate and warm-up alone, under their row's name."""
    plain = _of(records, "table2", "gpu-sweep")
    longer = [r for r in _of(records, "ablations", "gpu-sweep") if r["method"].endswith(LONG)]
    runs = of_one_budget(plain + [{**r, "method": r["method"].removesuffix(LONG)} for r in longer])
    order = [row.label for row in BUDGETS["table2"].rows]
    return sorted(runs, key=lambda r: (order.index(r["method"]), _warmup(r), rate_of(r)))


def sweep_table(records: list[dict]) -> list[str]:
    """records: all there are.  Every row and warm-up by learning rate, each row's best in bold."""
    runs = sweep_runs(records)
    table, best = rates_table(runs, lambda r: f"{r['method']}, warm-up {_warmup(r)}")
    title = (
        "**Sweep of learning rate and warm-up for Table 2 at the paper's GPT-2 shape, REDUCED BUDGET: "
        f"{tokens_of(runs)}, {seeds_in_words(runs)}; validation loss in nats/token, each row's best in bold.**"
    )
    tried = {row: sorted({_warmup(r) for r in runs if r["method"] == row}) for row in best}
    alone = {row: f" (warm-up {found[0]} alone)" if len(found) == 1 else "" for row, found in tried.items()}
    note = "; ".join(f"{row} {loss:.3f}{alone[row]}" for row, loss in sorted(best.items(), key=lambda item: item[1]))
    return [title, table, f"In order of what each row reaches at its own best: {note}.{gaps(runs)}", sources(runs)]


def full_budget_runs(records: list[dict]) -> list[dict]:
    """Of all records, Table 2's at its full budget and present warm-up that differ in row, rate and seed alone."""
    runs = [r for r in _of(records, "table2", "gpu") if _warmup(r) == BUDGETS["table2"].preset.train.warmup_steps]
    order = [row.label for row in BUDGETS["table2"].rows]
    return sorted(of_one_budget(runs), key=lambda r: order.index(r["method"]))


def slowed_runs(records: list[dict], preset: str) -> list[dict]:
    """Of the ablations of a preset, the runs whose factors (Tucker) or attention (any other row) learned at a quarter of the rate, under
    their row's name; those of the sweep that had the long warm-up too."""
    names = [f"{name}{LONGER}" if preset == "gpu-sweep" else name for name in SLOWER]
    runs = of_one_budget(_of(records, "ablations", preset))
    return [{**r, "method": of_row(r)} for r in runs if change_of(r) in names]


def gaps(runs: list[dict]) -> str:
    """Why the sweep leaves out some rates: a sentence, empty where nothing is left out or the reason does not hold."""
    ran = {(r["method"], _warmup(r), rate_of(r)): _mean([r]) for r in runs}  # the loss, None of a run that diverged
    rates, shortest = {rate for _, _, rate in ran}, min(warmup for _, warmup, _ in ran)
    left_out = {(row, rate) for row, warmup, _ in ran for rate in rates if (row, warmup, rate) not in ran}

    def was_worse(row: str, rate: float) -> bool:
        short = {other: loss for other in rates if (loss := ran.get((row, shortest, other))) is not None}
        return rate in short and short[rate] > min(short.values())

    if not left_out or not all(was_worse(*cell) for cell in left_out):
        return ""
    return " Where a cell says not run, another rate had been better with the shorter warm-up."


def ablation_table(records: list[dict]) -> list[str]:
    """records: all there are.  What was changed in how one Tucker row is trained, by learning rate."""
    changed = of_one_budget(_of(records, "ablations", "gpu-sweep"))
    sweep = [r for r in _of(records, "table2", "gpu-sweep") if budget_of(r) == budget_of(changed[0])]
    known = set(map(_key, changed))
    rates, rows = {rate for _, rate in known}, (ROW, "MHA")
    plain = [r for r in sweep if r["method"] in rows and rate_of(r) in rates and _key(r) not in known and _warmup(r) == 100]
    runs = sorted(plain + changed, key=lambda r: (not r["method"].startswith(ROW), len(r["method"]) > len(ROW), r["method"]))
    table, _ = rates_table(runs, lambda r: r["method"])
    title = (
        f"**What makes {ROW} train well, REDUCED BUDGET: {tokens_of(runs)}, {seeds_in_words(runs)}, one change at a time, or one and the "
        "longer warm-up; validation loss in nats/token, each row's best in bold.** Others beside it, with what is open to any row: the "
        "schedule, and an attention that learns slowly."
    )
    notes = []
    for own in (r for r in changed if r["method"] == ROW):
        twins = [r for r in sweep if (_key(r), _warmup(r)) == (_key(own), _warmup(own))]
        if (loss := _mean(twins)) is not None:
            notes.append(
                f"The unchanged row was run at {rate_of(own):g} once more than in the sweep, where it ended at {loss:.3f}: "
                "where a run breaks down, it ends anywhere."
            )
    notes += _waiting(CASES, changed)
    return [title, table, *([" ".join(notes)] if notes else []), sources(runs)]


def highest_rate(records: list[dict]) -> list[dict]:
    """records: all there are.  The ablations' runs at the rate that breaks their row down, where its training was changed and nothing
    diverged: the row as it is, then by loss from the highest."""
    rate = ABLATIONS["gpu-sweep"].train.learning_rate
    runs = [
        r
        for r in _of(records, "ablations", "gpu-sweep")
        if (of_row(r), rate_of(r)) == (ROW, rate) and f"{ROW}, init" not in r["method"] and not diverged([r])
    ]
    return sorted(runs, key=lambda r: (r["method"] != ROW, -r["metrics"]["validation_loss"]))


def cures_table(records: list[dict]) -> list[str]:
    """records: all there are.  What did good in the sweep, at Table 2's full budget, beside Table 2's runs without it at any rate."""
    cured = of_one_budget(_of(records, "ablations", "gpu"))
    changed, settings = {of_row(r) for r in cured}, (budget_of(cured[0]), _warmup(cured[0]))
    rows = [row.label for row in BUDGETS["table2"].rows if row.label in changed]
    plain = [r for r in _of(records, "table2", "gpu") if r["method"] in rows and (budget_of(r), _warmup(r)) == settings]
    groups = grouped(plain + cured, _key)
    methods = list(dict.fromkeys(method for method, _ in groups))
    lines = []
    for method, rate in sorted(groups, key=lambda key: (rows.index(of_row(groups[key][0])), methods.index(key[0]), key[1])):
        group = groups[method, rate]
        lines.append([method, f"{rate:g}", loss_cell(group, 4), logit_cell(group)])
    title = f"**What makes it train well, at the budget of Table 2: {tokens_of(cured)}, warm-up {_warmup(cured[0])}, REDUCED BUDGET.**"
    table = markdown(["row", "rate", "validation loss", "largest logit"], lines)
    return [title, table, *_waiting(CURES, cured), sources(plain + cured)]


def best_table(records: list[dict]) -> list[str]:
    """records: all there are.  Each row at the best setting of all that were tried at Table 2's full budget, from the lowest loss up.

    Of a row's settings those with the most seeds are compared; rows with fewer seeds than others are left out.  Nothing without a run.
    """
    plain = full_budget_runs(records)
    budgets = {(budget_of(r), _warmup(r)) for r in plain}  # one, or none
    changed = [r for r in _of(records, "ablations", "gpu") if (budget_of(r), _warmup(r)) in budgets]
    settings = {row: list(grouped(runs, _key).values()) for row, runs in grouped(plain + changed, of_row).items()}
    best = {}
    for row, groups in settings.items():
        if ended := [group for group in groups if not diverged(group)]:
            most = max(map(len, ended))
            best[row] = min((group for group in ended if len(group) == most), key=_mean)
    if not best:
        return []
    seeds = max(map(len, best.values()))
    shown = sorted((row for row in best if len(best[row]) == seeds), key=lambda row: _mean(best[row]))
    base, lines = BUDGETS["table2"].base, []
    for row in shown:
        group = best[row]
        above = f" ({difference(_mean(group), _mean(best[base]))})" if row != base and base in shown else ""
        lines.append(
            [
                row,
                f"{group[0]['metrics']['attention_parameters'] / 1e6:.2f}M",
                change_of(group[0]),
                f"{rate_of(group[0]):g}",
                loss_cell(group, 4) + above,
                logit_cell(group),
                f"{len(settings[row])} ({sum(len(tried) == seeds for tried in settings[row])})",
            ]
        )
    title = (
        f"**Every row with {seeds} seeds at the best of all settings that were tried at the budget of Table 2, REDUCED BUDGET: "
        f"{tokens_of(plain)}, warm-up {_warmup(plain[0])}.** Of a row's settings (rates and changes) those with {seeds} seeds are "
        "compared. The more there were the better the best one looks, so the last column counts them."
    )
    header = [
        "row", "attention", "trained", "rate", f"validation loss (against {base})", "largest logit",
        f"settings tried (with {seeds} seeds)",
    ]  # fmt: skip
    return [title, markdown(header, lines), sources([r for row in shown for group in settings[row] for r in group])]


def _waiting(cases: list[tuple[str, Recipe]], changed: list[dict]) -> list[str]:
    """A sentence that names the cases without a run, or nothing."""
    there = {r["method"] for r in changed}
    waiting = [name for row, recipe in cases if recipe.config() and (name := method_of(row, recipe)) not in there]
    return [f"Not run yet: {'; '.join(waiting)}."] if waiting else []


def rates_table(runs: list[dict], label_of: Callable[[dict], str]) -> tuple[str, dict[str, float]]:
    """One line per label, one column per learning rate; bold is the lowest loss of each row.

    Returns: the table, and the lowest losses.
    """
    rates = sorted({rate_of(r) for r in runs})
    found = grouped(runs, lambda r: (label_of(r), rate_of(r)))
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
            cells.append(f"{bold}{loss_cell(group)}{bold}")
        lines.append([label, *cells])
    return markdown(["peak learning rate", *(f"{rate:g}" for rate in rates)], lines), best


def of_one_budget(runs: list[dict]) -> list[dict]:
    """Those on the text and over the steps of most of them: losses on other ones are not to be set beside theirs."""
    return max(grouped(runs, budget_of).values(), key=len, default=[])


def budget_of(record: dict) -> tuple:
    """What text a run was trained on, in which byte pairs, and over how many steps."""
    return *data_key(record["data"]), record["config"]["train"]["steps"]


def seeds_in_words(runs: list[dict]) -> str:
    seeds = len({r["seed"] for r in runs})
    return "one seed" if seeds == 1 else f"up to {seeds} seeds"


def of_row(record: dict) -> str:
    """The row's own name, without what was changed."""
    return re.split(r", (?![^\[]*\])", record["method"])[0]


def change_of(record: dict) -> str:
    """What was changed in how the row is trained."""
    return record["method"].removeprefix(of_row(record)).removeprefix(", ") or Recipe().name


def rate_of(record: dict) -> float:
    """The peak learning rate."""
    return record["config"]["train"]["learning_rate"]


@dataclass(frozen=True)
class Budget:
    """One of the paper's tables as the preset `gpu` trains it.

    paper_steps, width: the paper's steps and d; base: the row that the paper sets the others beside; note: what its title says more.
    """

    title: str
    paper_steps: int
    width: int
    preset: LanguagePreset
    rows: tuple[Row, ...]
    base: str
    note: str = ""

    def narrower(self, config: dict) -> int:
        """By what factor a run's model is narrower than the paper's."""
        return self.width // config["d_model"]

    def rate(self, label: str) -> float:
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


def settled(records: list[dict], experiment: str) -> dict[str, list[dict]]:
    """The runs of "table2" or "table3" at the present settings of the preset `gpu`, by row; a row that has none is not there.

    On the text on which there are most of them.
    """
    budget = BUDGETS[experiment]
    now = budget.preset.train

    def is_settled(record: dict) -> bool:
        t, rate = record["config"]["train"], budget.rate(record["method"])
        return (t["learning_rate"], t["warmup_steps"], t["steps"]) == (rate, now.warmup_steps, now.steps)

    runs = largest(alike([r for r in _of(records, experiment, "gpu") if is_settled(r)]))
    return grouped(runs, lambda r: r["method"])


def budget_tables(records: list[dict], experiment: str) -> list[str]:
    """records: all there are.  The rows of "table2" or "table3" at their best settings, then runs at other settings."""
    budget, groups = BUDGETS[experiment], settled(records, experiment)
    runs, times = _of(records, experiment, "gpu"), step_times(records) if experiment == "table3" else {}
    base = _mean(groups.get(budget.base, []))
    card, speeds = speeds_on_one_card([r for r in runs if r["config"]["train"]["steps"] == budget.preset.train.steps])
    lines = []
    for row in budget.rows:
        group = groups.get(row.label)
        time = [f"{times[row.label]:.0f}" if row.label in times else "not run yet"] if times else []
        if not group:
            lines.append([row.label, *["not run yet"] * 7, *time])
            continue
        losses = [] if diverged(group) else losses_of(group)
        above = f" ({difference(statistics.mean(losses), base)})" if base and losses and row.label != budget.base else ""
        bits = [r["metrics"]["bits_per_byte"] for r in group] if losses else []
        lines.append(
            [
                row.label,
                *(f"{megabytes:.2f}" for megabytes in sizes(group[0])),
                f"{budget.rate(row.label):g}",
                loss_cell(group, 4) + above,
                mean_and_spread(bits, 4) if bits else "",
                logit_cell(group),
                f"{speeds[row.label] / 1e3:.0f}" if row.label in speeds else "another card" if losses else "",
                *time,
            ]
        )
    header = [
        "row", "attention MB", "KV cache MB", "rate", f"validation loss (against {budget.base})", "bits per byte",
        "largest logit", f"1,000 tokens/s, {card}", *(["ms a step, LLaMA3-1B"] if times else []),
    ]  # fmt: skip
    shown = [r for group in groups.values() for r in group]
    parts = [_scale(budget, shown), markdown(header, lines), sources(shown)] if shown else []
    kept = {id(r) for r in shown}
    if others := [r for r in runs if id(r) not in kept]:
        order, rows = [row.label for row in budget.rows], []
        others.sort(key=lambda r: order.index(r["method"]))
        found = grouped(others, lambda r: (*_key(r), _warmup(r), budget_of(r)))
        for (label, rate, warmup, (*_, steps)), group in found.items():
            text = group[0]["data"]["name"]
            rows.append([label, f"{rate:g}", f"{warmup}", f"{steps:,}", text, loss_cell(group), logit_cell(group)])
        parts += [
            f"**{budget.title}, at other settings.** Runs on another text or over other steps are not to be set beside those above.",
            markdown(["row", "rate", "warm-up", "steps", "text", "validation loss", "largest logit"], rows),
            sources(others),
        ]
    return parts


def _scale(budget: Budget, runs: list[dict]) -> str:
    """The title of a table: what was trained, at which scale."""
    c, t = runs[0]["config"], budget.preset.train
    narrower = budget.preset.narrower
    shape = (
        " at the paper's shape, validation loss at REDUCED BUDGET"
        if narrower == 1
        else f", validation loss at REDUCED SCALE, not the paper's: d {c['d_model']:,}, {c['n_heads']} heads, {c['n_layers']} layers, "
        f"N {c['context']:,}"
    )
    named = (
        ""
        if narrower == 1
        else f" Rows are named as in the paper; all widths and ranks but the head rank are divided by {narrower}."
    )
    rate = "the best of the rates that were tried here"
    if narrower > 1:
        rate = "the rate that was best in GPT-2's sweep or, where others were tried, here"
    return (
        f"**{budget.title}{shape}: {tokens_of(runs)}{passes_over(runs)}, {t.steps:,} steps in place of {budget.paper_steps:,}; "
        f"every row at {rate}; warm-up {t.warmup_steps} steps.**{named}{budget.note} The largest logit is that of every 100th "
        "step, over all layers and seeds: hundreds are usual, thousands say that the attention of some layer has run away. The paper's "
        "losses are not available to us."
    )


def sizes(record: dict) -> tuple[float, float]:
    """Megabytes (10^6 bytes) in BF16 of a run's attention parameters, and of its cache for one whole context."""
    m = record["metrics"]
    return m["attention_parameters"] * 2 / 1e6, m["cache_per_token"] * record["config"]["context"] * 2 / 1e6


def largest_logit(runs: list[dict]) -> float | None:
    """The largest attention logit that was seen in any of the runs, None if none was looked at."""
    return max((o["largest_logit"] for r in runs for o in r["metrics"].get("observations", ())), default=None)


def logit_cell(runs: list[dict]) -> str:
    return f"{logit:,.0f}" if (logit := largest_logit(runs)) else ""


def speeds_on_one_card(runs: list[dict]) -> tuple[str, dict[str, float]]:
    """The card that has trained most of the rows, and its tokens per second by row: means over runs on one GPU, at any rate."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in runs:
        if workers_of(r) == 1 and (speed := r["metrics"].get("tokens_per_second")):
            found[r["device"]][r["method"]].append(speed)
    card = max(found, key=lambda device: len(found[device]), default="no run ended")
    return card, {row: statistics.mean(speeds) for row, speeds in found[card].items()}


def step_times(records: list[dict]) -> dict[str, float]:
    """Milliseconds of one training step of LLaMA3-1B's true shape by row, as `speed` measured them."""
    return {
        row["row"]: row["milliseconds"]
        for r in _of(records, "speed", "gpu")
        if r["method"] == "models"
        for row in r["metrics"]["rows"]
        if row["model"] == "LLaMA" and "milliseconds" in row
    }


def sources(runs: list[dict]) -> str:
    """Where numbers come from: data, devices, commits, minutes, and the commands with what varies between runs in capitals."""
    minutes = statistics.median(r["wall_seconds"] for r in runs) / 60
    return (
        f"<sub>Data: {each_once(map(data_in_words, runs))}; {devices_of(runs)}; commits {each_once(map(commit_of, runs))}; "
        f"about {minutes:.1f} minutes a run; {commands_of(runs)}. "
        "± is the standard deviation over seeds, where there are several.</sub>"
    )


def data_in_words(record: dict) -> str:
    return f"{record['data']['name']} (content sha256 {record['data']['sha256'][:12]}…)"


def devices_of(records: list[dict]) -> str:
    """On what they ran: devices and versions of PyTorch."""
    return f"{each_once(r['device'] for r in records)}, torch {each_once(r['versions']['torch'] for r in records)}"


def commands_of(records: list[dict]) -> str:
    return ", ".join(f"`{p}`" for p in patterns(r["command"] for r in records))


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


TEXT = "--text wiki.txt.xz --validation held_out.txt.xz --bpe gpt2"


def render(records: list[dict]) -> str:
    """records: all there are.  The commands with what they take and give, then what came out.  Raises ValueError for a record that
    lacks what is shown."""
    with complete("a record of the preset gpu lacks what its commands show"):
        return f"{commands(records)}\n\n{findings(records)}".strip()


def commands(records: list[dict]) -> str:
    """records: all there are.  The commands of the preset `gpu` in the order to run them, with minutes and what comes out."""
    swept = [r for r in _of(records, "table2", "gpu-sweep") if (rate_of(r), _warmup(r)) == (2.4e-3, 400)]
    sweep = f"table2 --preset gpu-sweep {TEXT} --learning-rate 2.4e-3 --warmup-steps 400"
    changed = [r for r in _of(records, "ablations", "gpu-sweep") if rate_of(r) == ABLATIONS["gpu-sweep"].train.learning_rate]
    lines = [
        _line(sweep, len(table2.TABLE2), swept, ("GQA n_KV=4", "Tucker [8,64,64]"), "validation_loss"),
        _line(f"ablations --preset gpu-sweep {TEXT}", len(CASES), changed, (f"{ROW}, init std 0.02",), "validation_loss"),
    ]
    for experiment, small in (("table2", "Tucker [8,64,64]"), ("table3", "Tucker [32,64,64]")):
        budget = BUDGETS[experiment]
        runs = [r for group in settled(records, experiment).values() for r in group]
        count = len(budget.rows) * len(budget.preset.seeds)
        lines.append(_line(f"{experiment} --preset gpu {TEXT}", count, runs, (budget.base, small), "validation_loss"))
    cured = [r for r in _of(records, "ablations", "gpu") if rate_of(r) == ABLATIONS["gpu"].rate(of_row(r), r["method"])]
    slowed = tuple(f"{row}, {change}" for row, change in zip((ROW, "MHA"), SLOWER))
    lines.append(_line(f"ablations --preset gpu {TEXT}", len(CURES), cured, slowed, "validation_loss"))
    vit = figure3.PRESETS["gpu"]
    count, runs = (1 + len(vit.rows)) * len(vit.seeds), _of(records, "figure3", "gpu")
    lines.append(_line("figure3 --preset gpu --images images.npz", count, runs, ("MHA", "Tucker [8,24,24]"), "top1"))
    return markdown(["after `python -m reproduce`", "runs", "minutes", "expect"], lines)


def findings(records: list[dict]) -> str:
    """records: all there are.  What came out, in sentences whose numbers are those of the records; none without a run."""
    said = []
    for experiment, budget in BUDGETS.items():
        groups = {label: group for label, group in settled(records, experiment).items() if not diverged(group)}
        if budget.base not in groups:
            continue
        loss, size = _mean(groups[budget.base]), groups[budget.base][0]["metrics"]["attention_parameters"]
        others = [
            f"{label} {difference(_mean(groups[label]), loss)} with {groups[label][0]['metrics']['attention_parameters'] / size:.0%}"
            for label in (row.label for row in budget.rows if row.paper)  # ours are in the table
            if label in groups and label != budget.base
        ]
        said.append(
            f"{budget.title}, loss against {budget.base}'s {loss:.3f}, with which share of its attention parameters: {'; '.join(others)}."
        )
    logits = {
        r["method"].removeprefix(f"{ROW}, "): logit
        for r in _of(records, "ablations", "gpu-sweep")
        if of_row(r) == ROW and rate_of(r) == ABLATIONS["gpu-sweep"].train.learning_rate and (logit := largest_logit([r]))
    }
    if logits:
        largest = "; ".join(f"{change if change != ROW else 'unchanged'} {value:,.0f}" for change, value in logits.items())
        said.append(f"Largest attention logit of {ROW} in a run at the highest rate: {largest}.")
    if said:
        said.append(on_record(records))
    return "\n".join(f"- {sentence}" for sentence in said)


def on_record(records: list[dict]) -> str:
    """records: all there are.  Of each language experiment at its preset's steps: how many runs, which settings, how many hours."""
    presets = {"table2": table2.PRESETS, "ablations": ABLATIONS, "table3": table3.PRESETS}
    said = []
    for experiment, preset in (*((e, "gpu-sweep") for e in ("table2", "ablations")), *((e, "gpu") for e in presets)):
        steps = presets[experiment][preset].train.steps
        if runs := [r for r in _of(records, experiment, preset) if r["config"]["train"]["steps"] == steps]:
            settings = {"rates": [rate_of(r) for r in runs], "warm-ups": map(_warmup, runs), "seeds": [r["seed"] for r in runs]}
            listed = "; ".join(
                f"{name} {', '.join(f'{v:g}' for v in sorted(set(values)))}" for name, values in settings.items()
            )
            hours = sum(r["wall_seconds"] for r in runs) / 3600
            said.append(f"`{experiment} --preset {preset}` {len(runs)} runs in {hours:.1f} hours ({listed})")
    return f"What is shown, each run with some of these settings, comes from {'; '.join(said)}."


def _line(command: str, count: int, runs: list[dict], rows: tuple[str, ...], metric: str) -> list[str]:
    """count: how many runs the command makes.  Minutes are those of the runs on record, for as many."""
    if not runs:
        return [f"`{command}`", f"{count}", "not run yet", "not run yet"]
    found = {row: [r["metrics"][metric] for r in runs if r["method"] == row and metric in r["metrics"]] for row in rows}
    said = [f"{row} {mean_and_spread(values, 3)}" for row, values in found.items() if values]
    minutes = count * statistics.mean(r["wall_seconds"] for r in runs) / 60
    return [f"`{command}`", f"{count}", f"{minutes:.0f}", f"{metric.replace('_', ' ')}: {'; '.join(said)}"]


def _of(records: Iterable[dict], experiment: str, preset: str) -> list[dict]:
    return [r for r in records if (r["experiment"], r["preset"]) == (experiment, preset)]


def _key(record: dict) -> tuple[str, float]:
    return record["method"], rate_of(record)


def _warmup(record: dict) -> int:
    return record["config"]["train"]["warmup_steps"]


def losses_of(group: list[dict]) -> list[float]:
    return [r["metrics"]["validation_loss"] for r in group if "validation_loss" in r["metrics"]]


def _mean(group: list[dict]) -> float | None:
    return statistics.mean(losses_of(group)) if losses_of(group) else None


def loss_cell(group: list[dict], digits: int = 3) -> str:
    if not group:
        return "not run"
    return diverged(group) or mean_and_spread(losses_of(group), digits)


def diverged(group: list[dict]) -> str:
    """Which of the runs broke off, in words; empty if none did."""
    broken = [f"{r['metrics']['diverged_at']}" for r in group if "diverged_at" in r["metrics"]]
    return f"diverged at step {', '.join(broken)}" if broken else ""


def tokens_of(runs: list[dict]) -> str:
    tokens = next((r["metrics"]["tokens_seen"] for r in runs if "tokens_seen" in r["metrics"]), 0)
    return f"{tokens / 1e6:.1f}M training tokens"


def passes_over(runs: list[dict]) -> str:
    """How often the text was read, where it was read more than once; otherwise nothing."""
    passes = max((r["metrics"].get("tokens_seen", 0) / r["data"]["train_tokens"] for r in runs), default=0)
    return f", {passes:.1f} times through the text" if passes > 1 else ""
