"""Checks on the code itself: a line for each of them that is on record, and the versions on which the tests ran."""

from pathlib import Path

import tucker_ref

from ..store.files import code_hash
from ..store.records import Record
from .markdown import markdown
from .query import grouped

LIBRARY = Path(tucker_ref.__file__).parent
ROOT = Path(__file__).parents[2]


def render(records: list[Record]) -> str:
    """A table of what was tried, and what came of it; a check without a record has no line.

    Args:
        records: all that there are.

    Returns:
        Markdown, empty where no check is on record.
    """
    rows = []
    for experiment, own in of_each(records).items():
        title, describe = CHECKS[experiment]
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
    rows = [[r.method, f"{r.metrics['passed']:,}", f"{r.metrics['failed']:,}"] for r in own]
    return markdown(["versions", "passed", "failed"], rows) if rows else ""


def mutants(records: list[Record]) -> tuple[str, str]:
    """Of `mutation`: how many faults tests met and noticed, how many types alone rejected, and how many records are stale."""
    total = [sum(counts) for counts in zip(*map(counts_of, records))]
    every, met, noticed, same, survived, rejected, drawn, noticed_of_these = total
    outcome = (
        f"tests met {met:,} and noticed {noticed:,}; {same:,} change nothing, {survived:,} survive; types alone rejected {rejected:,}; "
        f"of {drawn:,} of these, drawn by lot, tests noticed {noticed_of_these:,}; "
        f"stale records: {len(stale(records))}, modules without one: {len(untried(records))}"
    )
    return f"{every:,} mutants of {len(records)} modules", outcome


def mutants_table(records: list[Record]) -> str:
    """Mutants of every module, those without a record last; empty where none is on record.

    Args:
        records: all that there are.
    """
    own = of_each(records).get("mutation", [])
    old = stale(own)
    rows = [
        [r.method, *(f"{count:,}" for count in counts_of(r)), "stale" if r.method in old else "of this code"]
        for r in sorted(own, key=lambda r: r.method)
    ]
    header = [
        "module",
        "mutants",
        "tests met",
        "noticed",
        "change nothing",
        "survive",
        "types alone",
        "of a lot",
        "noticed",
        "record",
    ]
    return markdown(header, rows + [[name, *[""] * 8, "none"] for name in untried(own)]) if rows else ""


def counts_of(record: Record) -> tuple[int, ...]:
    """Of one module: all mutants, those that tests met, noticed, that change nothing, that survive, and that types alone rejected.

    Then how many of the last were drawn by lot, and how many of these tests noticed: none in records from before there was a lot.
    """
    m = record.metrics
    met, lot = m["mutants"] - m["mypy"], m.get("lot", {"drawn": 0, "noticed": 0})
    noticed = met - m["equivalent"] - m["survived"]
    return m["mutants"], met, noticed, m["equivalent"], m["survived"], m["mypy"], lot["drawn"], lot["noticed"]


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
    kinds = sorted(metrics["kinds"].items(), key=lambda item: -item[1])
    return (
        f"{sum(metrics['kinds'].values()):,} inputs of {len(kinds)} kinds, most often "
        + ", ".join(f"{kind} ({trials:,})" for kind, trials in kinds[:3])
        + (f"; {metrics['records']['tried']:,} records with one leaf changed" if "records" in metrics else ""),
        "each refused with a message that names what and where, or given its one defined result; nothing saved or cached harmed",
    )


def faults(records: list[Record]) -> tuple[str, str]:
    """Of `survival`: how often commands were killed, met a full disk or Ctrl-C, and what was compared afterwards."""
    metrics = records[-1].metrics
    kills, ends, files = (sum(tally[name] for tally in metrics.values()) for name in ("kills", "ends", "files"))
    full, stopped = (sum(tally.get(name, 0) for tally in metrics.values()) for name in ("full_disks", "interrupts"))
    return (
        f"{kills:,} times kill -9, {full:,} times a full disk, {stopped:,} times Ctrl-C, in {len(metrics):,} ways to write: "
        + ", ".join(metrics),
        f"none of {files:,} files read afterwards damaged; all {ends:,} runs that finished equal to uninterrupted ones, to the last bit "
        "but for times; every record there once; each message one line",
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
    "mutation": ("small faults put into the code", mutants),
    "fuzz": ("random inputs", random_inputs),
    "hostile": ("hostile inputs", hostile_inputs),
    "survival": ("stopped at random moments", faults),
    "coverage": ("lines and branches that tests run", covered),
    "versions": ("oldest and newest versions", versions),
}
