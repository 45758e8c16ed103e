"""The README's section of checks on the code itself: one line for each of them that is on record."""

from pathlib import Path

import tucker_ref

from ..store.files import code_hash
from ..store.records import Record
from .markdown import markdown
from .query import complete
from .words import commit_of, each_once

LIBRARY = Path(tucker_ref.__file__).parent
ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- checks: written by the same command -->", "<!-- end of checks -->"


def render(records: list[Record]) -> str:
    """A table of what was tried, and what came of it; a check without a record has no line.

    Args:
        records: all that there are.

    Returns:
        Markdown, empty where no check is on record.

    Raises:
        ValueError: naming the check, if a record of it lacks what is shown.
    """
    rows = []
    for experiment, (title, describe) in CHECKS.items():
        if own := [r for r in records if r.experiment == experiment]:
            with complete(f"{experiment}: a record lacks what the table of checks shows"):
                rows.append([title, *describe(own), source(own)])
    return markdown(["check", "tried", "outcome", "by"], rows) if rows else ""


def source(records: list[Record]) -> str:
    """The commands that made them, and the commits that ran."""
    commands = each_once(f"`{r.command.split(' --')[0]}`" for r in records)
    return f"{commands} at {each_once(map(commit_of, records))}"


def mutants(records: list[Record]) -> tuple[str, str]:
    """Of `mutation`: how many faults tests met and noticed, how many types alone rejected, and what was not tried or is stale."""
    total = {name: sum(r.metrics[name] for r in records) for name in ("mutants", "mypy", "timeouts", "equivalent", "survived")}
    met = total["mutants"] - total["mypy"]
    lots = [r.metrics["lot"] for r in records if "lot" in r.metrics]
    drawn, noticed = (sum(lot[name] for lot in lots) for name in ("drawn", "noticed"))
    said = [
        f"tests met {met:,} and noticed {met - total['equivalent'] - total['survived']:,}, {total['timeouts']:,} of them by the clock",
        f"{total['equivalent']:,} change nothing, {total['survived']:,} survive",
        f"types alone rejected {total['mypy']:,}",
        f"of {drawn:,} of these, drawn by lot, tests noticed {noticed:,}",
    ]
    if left := untried(records):
        said.append(f"without a record: {', '.join(left)}")
    if old := stale(records):
        said.append(f"stale, for the module has changed since: {', '.join(old)}")
    return f"{total['mutants']:,} mutants of {len(records)} modules", "; ".join(said)


def module_path(name: str) -> Path:
    """Where the module of a record of `mutation` is.

    Args:
        name: from `tucker_ref`, as "compression/ranks", or from the root, as "reproduce/train/muon".
    """
    return (ROOT if name.startswith("reproduce/") else LIBRARY) / f"{name}.py"


def stale(records: list[Record]) -> list[str]:
    """Modules whose code is not what it was when they were mutated.

    Args:
        records: of `mutation`; those from before the code's hash was kept count as stale.
    """

    def changed(record: Record) -> bool:
        path = module_path(record.method)
        return not path.exists() or record.metrics.get("source") != code_hash(path)

    return sorted(record.method for record in records if changed(record))


def untried(records: list[Record]) -> list[str]:
    """Modules of the library that no record of `mutation` names; a package's own file only collects names."""
    modules = {
        path.relative_to(LIBRARY).with_suffix("").as_posix() for path in LIBRARY.rglob("*.py") if path.stem != "__init__"
    }
    return sorted(modules - {r.method for r in records})


def random_inputs(records: list[Record]) -> tuple[str, str]:
    """Of `fuzz`: how many inputs were tried for how many contracts, and how many contracts broke."""
    metrics = records[-1].metrics
    contracts, names = len(metrics["tried"]), len(metrics["public_names"])
    return (
        f"{metrics['inputs']:,} random inputs for {contracts} contracts of {names} public names",
        f"{len(metrics['failed'])} contracts broken",
    )


def hostile_inputs(records: list[Record]) -> tuple[str, str]:
    """Of `hostile`: how many inputs of which kind."""
    metrics = records[-1].metrics
    kinds = metrics["kinds"]
    return (
        f"{sum(kinds.values()):,} inputs: " + ", ".join(f"{kind} {trials:,}" for kind, trials in kinds.items()),
        "each refused with a message that names what and where, or given its one defined result; nothing saved or cached harmed",
    )


def kills(records: list[Record]) -> tuple[str, str]:
    """Of `survival`: how often what was killed, and what was compared afterwards."""
    metrics = records[-1].metrics
    total = {name: sum(tally[name] for tally in metrics.values()) for name in ("kills", "files")}
    ends = sum(tally["ends"] for kind, tally in metrics.items() if kind != "recording")
    return (
        f"{total['kills']:,} times kill -9: "
        + ", ".join(f"{tally['kills']:,} while {kind}" for kind, tally in metrics.items()),
        f"none of {total['files']:,} files read afterwards damaged; all {ends:,} runs that finished equal to uninterrupted ones "
        "to the last bit; every record there once",
    )


def covered(records: list[Record]) -> tuple[str, str]:
    """Of `coverage`: shares of lines and branches that tests run."""
    packages = records[-1].metrics
    tried = "; ".join(f"`{name}`: {p['lines']:,} lines, {p['branches']:,} branches" for name, p in packages.items())
    outcome = "; ".join(
        f"`{name}`: {p['covered_lines'] / p['lines']:.1%} of lines, {p['covered_branches'] / p['branches']:.1%} of branches"
        for name, p in packages.items()
    )
    return tried, f"{outcome}; {sum(p['left_out'] for p in packages.values()):,} lines left out, which only a GPU runs"


def versions(records: list[Record]) -> tuple[str, str]:
    """Of `versions`: on which the tests ran, and how many passed."""
    counts = [f"{r.metrics['passed']:,} passed, {r.metrics['failed']:,} failed" for r in records]
    return "; ".join(r.method for r in records), "; ".join(counts)


CHECKS = {
    "mutation": ("small faults put into the code", mutants),
    "fuzz": ("random inputs", random_inputs),
    "hostile": ("hostile inputs", hostile_inputs),
    "survival": ("killed at random moments", kills),
    "coverage": ("lines and branches that tests run", covered),
    "versions": ("oldest and newest versions", versions),
}
