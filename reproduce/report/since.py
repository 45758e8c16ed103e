"""What changed in the layers that `speed` trains since a record of it: such numbers are of older code, and say so."""

from collections.abc import Iterable

from ..store.records import Record

CHANGES = {
    "cd06762": "heads of a token lay side by side",
    "10e19f2": "compiled layers stopped copying the output's gradient",
}
BEFORE = {"da6a6d415": ("cd06762", "10e19f2"), "111d3c934": ("10e19f2",)}  # commits of records, and what came after them
TRAINED = ("layers", "contexts", "memory", "models", "step", "curves")  # sections: decoding has no gradient


def changes_since(record: Record) -> tuple[str, ...]:
    """Of CHANGES those that a record of `speed` was measured before."""
    return BEFORE.get(record.commit[:9], ()) if record.method in TRAINED else ()


def of_older_code(records: Iterable[Record]) -> bool:
    """Whether one of them is."""
    return any(map(changes_since, records))


def measured(record: Record) -> str:
    """A sentence: when, at which commit, and before which changes."""
    before = " and ".join(f"{CHANGES[commit]} (`{commit}`)" for commit in changes_since(record))
    return f"Measured {record.finished[:10]} at `{record.commit[:9]}`{before and f', before {before}'}."
