"""The table of architectures that can be opened: how exactly, in which forms, and what is refused. From the record of `opening`."""

from ..store.records import Record
from .markdown import markdown
from .query import complete
from .words import commands_of

BEGIN, END = "<!-- opening: written by `python -m reproduce report --write` -->", "<!-- end of opening -->"
HEADER = (
    "architecture", "`model_type`", "own layers put back", "as Tucker Attention, saved, opened", "compressed at full rank",
    "tokens generated alike", "altered in one option: refused at", "refused",
)  # fmt: skip


def render(records: list[Record]) -> str:
    """The table, from the newest record; nothing without one.

    Args:
        records: all that there are.

    Raises:
        ValueError: if the record lacks what is shown.
    """
    own = [record for record in records if record.experiment == "opening"]
    if not own:
        return ""
    with complete("opening: a record lacks what the table of architectures shows"):
        rows = [row_of(architecture) for architecture in own[-1].metrics["architectures"]]
        title = (
            "**Architectures that open.** Each a tiny random checkpoint that transformers wrote; relative differences of its logits in "
            "single precision."
        )
        return "\n\n".join([title, markdown(HEADER, rows), f"<sub>{commands_of(own[-1:])}</sub>"])


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
