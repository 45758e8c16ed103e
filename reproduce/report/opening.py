"""The table of architectures that can be opened: how exactly, in which forms, and what is refused. From the record of `opening`."""

from ..store.records import Record
from .markdown import Table, markdown

HEADER = (
    "architecture", "`model_type`", "own layers put back", "as Tucker Attention, saved, opened", "compressed at full rank",
    "tokens generated alike", "altered in one option: refused at", "refused",
)  # fmt: skip


def opening_table(records: list[Record]) -> list[Table]:
    """The table, from the newest record."""
    rows = [row_of(architecture) for architecture in records[-1].metrics["architectures"]]
    title = (
        "**Architectures that open.** Each is a tiny random checkpoint that transformers wrote. Numbers are relative differences of "
        "its logits in single precision."
    )
    return [Table("Architectures that open", title, markdown(HEADER, rows), records[-1:])]


def row_of(architecture: dict) -> list[str]:
    """One line of the table."""
    errors, generated = architecture["errors"], [g for g in architecture["generated"].values() if g]
    return [
        ", ".join(filter(None, (architecture["name"], architecture["which"]))),
        f"`{architecture['type']}`",
        digits(max(errors["opened"], errors["own layers"])),
        digits(max(errors["Tucker"], errors["saved"])),
        digits(errors["compressed"]) if "compressed" in errors else "no tensor: norms",
        f"{sum(g['same'] for g in generated)} of {sum(g['tokens'] for g in generated)}" if generated else "no decoder",
        f"{architecture['option']}: {architecture['refused']:.0e}",
        ", ".join(architecture["refuses"]) or "-",
    ]


def digits(error: float) -> str:
    """Its power of ten; 0 where not a bit differs."""
    return f"{error:.0e}" if error else "0"
