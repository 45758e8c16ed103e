"""Checks on the code itself: a line for each of them that is on record, and the versions on which the tests ran."""

from ..store.records import Record
from .markdown import markdown
from .query import complete, grouped

COMPLAINT = "{}: a record lacks what the table of checks shows"


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
    for experiment, own in of_each(records).items():
        title, describe = CHECKS[experiment]
        with complete(COMPLAINT.format(experiment)):
            rows.append([title, *describe(own), f"`python -m reproduce {experiment}`"])
    return markdown(["check", "tried", "outcome", "command"], rows, words=True) if rows else ""


def of_each(records: list[Record]) -> dict[str, list[Record]]:
    """The records of each check that is on record."""
    groups = grouped(records, lambda r: r.experiment)
    return {experiment: groups[experiment] for experiment in CHECKS if experiment in groups}


def on_record(records: list[Record]) -> dict[str, list[Record]]:
    """The same by what a check is called, for the page of provenance."""
    return {f"Checks, {experiment}": own for experiment, own in of_each(records).items()}


def versions_table(records: list[Record]) -> str:
    """On which versions the tests ran, and how many passed; empty where that is not on record.

    Args:
        records: all that there are.
    """
    own = of_each(records).get("versions", [])
    with complete(COMPLAINT.format("versions")):
        rows = [[r.method, f"{r.metrics['passed']:,}", f"{r.metrics['failed']:,}"] for r in own]
    return markdown(["versions", "passed", "failed"], rows) if rows else ""


def mutants(records: list[Record]) -> tuple[str, str]:
    """Of `mutation`: how many faults there were, and who noticed them."""
    total = {
        name: sum(r.metrics[name] for r in records)
        for name in ("mutants", "killed", "mypy", "timeouts", "equivalent", "survived")
    }
    different = total["mutants"] - total["equivalent"]
    return (
        f"{total['mutants']:,} mutants of {len(records)} modules",
        f"{1 - total['survived'] / different:.1%} of those that change anything noticed: {total['killed']:,} by tests, "
        f"{total['mypy']:,} by mypy, {total['timeouts']:,} by the clock; {total['equivalent']:,} change nothing, "
        f"{total['survived']:,} survive",
    )


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
    kinds = sorted(metrics["kinds"].items(), key=lambda item: -item[1])
    return (
        f"{sum(metrics['kinds'].values()):,} inputs of {len(kinds)} kinds, most often "
        + ", ".join(f"{kind} ({trials:,})" for kind, trials in kinds[:3]),
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
    """Of `versions`: on how many combinations the tests ran, and what came of it."""
    passed, failed = (sum(r.metrics[name] for r in records) for name in ("passed", "failed"))
    return f"combinations of Python, torch and NumPy: {len(records)}", f"{passed:,} passed, {failed:,} failed"


CHECKS = {
    "mutation": ("small faults put into `tucker_ref`", mutants),
    "fuzz": ("random inputs", random_inputs),
    "hostile": ("hostile inputs", hostile_inputs),
    "survival": ("killed at random moments", kills),
    "coverage": ("lines and branches that tests run", covered),
    "versions": ("oldest and newest versions", versions),
}
