"""Attention that was converted to half the cache and trained alone: how much of the loss comes back, beside the control."""

from ..experiments.heal import AS_IT_IS
from ..store.records import Record
from .cells import with_interval
from .judge import Estimate, over_windows
from .markdown import Table, markdown
from .query import grouped
from .words import percent

NONE_YET = "How much of the loss a short training brings back: there is no record yet."
TRIAL = "smoke"  # the preset that only says that the command works


def render(records: list[Record]) -> str:
    """A sentence and a table for each model.

    Args:
        records: all that there are.
    """
    groups = grouped([r for r in records if r.experiment == "heal" and r.preset != TRIAL], _study)
    return "\n\n".join(f"{sentence(runs)}\n\n{_table(runs).shown()}" for runs in groups.values()) or NONE_YET


def heal_tables(records: list[Record]) -> list[Table]:
    """A table for each model, text and length of training.

    Args:
        records: of the experiment `heal`.
    """
    return [_table(runs) for runs in grouped(records, _study).values()]


def _study(record: Record) -> tuple:
    """What rows must share to stand in one table."""
    c = record.config
    judged = tuple((text, t["tokens"], len(t["windows"])) for text, t in record.metrics["before"]["tests"].items())
    how = repr(sorted(c["healing"].items()))
    return record.preset, c["model"], c.get("weights"), how, record.data["sha256"], record.seed, judged


def sentence(runs: list[Record]) -> str:
    """What comes back of the loss on the first test text, of every row.

    Args:
        runs: of one model and one training, the control among them or not.
    """
    text, said = next(iter(runs[0].metrics["before"]["tests"])), []
    for run in runs:
        if run.method != AS_IT_IS and (share := closed(run, control_of(runs), text)) is not None:
            said.append(f"{run.method} {percent(share)}")
    if not said:
        return (
            "How much of the loss comes back cannot be said from these records: that takes a conversion that cost something, and a control "
            "that was trained to its end."
        )
    million = runs[0].metrics["tokens_seen"] / 1e6
    return (
        f"**After {million:.3g}M tokens so much of what the conversion cost {runs[0].config['model']} on {_name(text)} has come back**, "
        f"beside the unconverted model trained alike: {', '.join(said)}."
    )


def control_of(runs: list[Record]) -> Record | None:
    """The unconverted model, trained in the same way."""
    return next((r for r in runs if r.method == AS_IT_IS), None)


def closed(run: Record, control: Record | None, text: str) -> float | None:
    """Which share of the gap is closed: 1 where the row ends where the control does, 0 where it is as far above it as it began.

    Args:
        run: of a converted row.
        control: the unconverted model, trained alike.
        text: on which the losses are.

    Returns:
        None without a control, where one of the two broke off, or where the conversion cost nothing.
    """
    if control is None or not _ended(run, control):
        return None
    cost = _cost(run, text)
    return 1 - (_loss(run, "healed", text) - _loss(control, "healed", text)) / cost if cost > 0 else None


def regained(run: Record, text: str) -> float | None:
    """Which share of what the conversion cost the training brings back, whatever the text itself taught.

    Args:
        run, text: as in `closed`.

    Returns:
        None where it broke off, or where the conversion cost nothing.
    """
    cost = _cost(run, text)
    if not _ended(run) or cost <= 0:
        return None
    return (_loss(run, "converted", text) - _loss(run, "healed", text)) / cost


def _loss(run: Record, state: str, text: str) -> float:
    return run.metrics[state]["tests"][text]["loss"]


def _cost(run: Record, text: str) -> float:
    """What the conversion cost, in nats per token."""
    return _loss(run, "converted", text) - _loss(run, "before", text)


def _ended(*runs: Record) -> bool:
    """Whether all were trained to their end."""
    return all("healed" in run.metrics for run in runs)


def above(run: Record, control: Record | None, text: str) -> Estimate | None:
    """By how many nats a token a healed row is above the control, over windows; None where one of the two is not there."""
    if control is None or not _ended(run, control):
        return None
    return over_windows(*(r.metrics["healed"]["tests"][text] for r in (run, control)))


def _table(runs: list[Record]) -> Table:
    control, before = control_of(runs), runs[0].metrics["before"]
    texts, c, healing = list(before["tests"]), runs[0].config, runs[0].config["healing"]
    header = ["row", "attention parameters", "cache", "rate"]
    for text in texts:
        header += [f"{_name(text)}: {what}" for what in ("converted", "healed", "above the control (nats/token)", "comes back")]
    rows = []
    for run in sorted(runs, key=lambda r: -r.metrics["share"]):
        m = run.metrics
        sizes = [percent(m[name] / before[name]) for name in ("attention_parameters", "cache")]
        cells = [cell for text in texts for cell in _cells(run, control, text)]
        rows.append([run.method, *sizes, _rate(run), *cells])
    own = ", ".join(f"{before['tests'][text]['bits_per_byte']:.3f} on {_name(text)}" for text in texts)
    title = (
        f"**{c['model']}, its attention converted and then trained alone, everything else frozen.** {healing['steps']:,} steps of "
        f"{healing['batch_size']} sequences of {healing['window']} tokens; held-out text picks one of {len(healing['rates'])} rates. Bits "
        f"per byte; before it was {own}. What comes back is measured beside the row `{AS_IT_IS}`, which was trained alike; in "
        "brackets beside the model as it was, so that what the text teaches counts too."
    )
    return Table("Healing", title, markdown(header, rows), runs)


def _rate(run: Record) -> str:
    """The one that was chosen, and whether it is the lowest or highest of several that were tried: a further one might be better."""
    if "chosen" not in run.metrics:
        return "diverged"
    tried, chosen = run.config["healing"]["rates"], run.metrics["chosen"]
    return f"{chosen:g}" + (", at the edge" if len(tried) > 1 and chosen in (min(tried), max(tried)) else "")


def _cells(run: Record, control: Record | None, text: str) -> list[str]:
    states = [run.metrics.get(state) for state in ("converted", "healed")]
    losses = [f"{state['tests'][text]['bits_per_byte']:.3f}" if state else "–" for state in states]
    if run.method == AS_IT_IS:
        return [*losses, "", ""]
    estimate = above(run, control, text)
    shares = ["–" if share is None else percent(share) for share in (closed(run, control, text), regained(run, text))]
    gap = with_interval(estimate) if estimate else "–"
    return [*losses, gap, "{} ({})".format(*shares)]


def _name(file: str) -> str:
    return file.split(".")[0]
