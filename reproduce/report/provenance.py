"""Where the numbers of every table come from: runs, data, devices, versions, commits and commands, each once."""

from collections.abc import Iterable, Sequence

from ..store.records import Record
from .markdown import Table
from .query import grouped
from .words import patterns, sources


def render(tables: Iterable[Table], others: dict[str, Sequence[Record]]) -> str:
    """A section for each name of a table.

    Args:
        tables: all that the pages show.
        others: what else they show, by what it is called, with the records that it was read from.

    Returns:
        Markdown.
    """
    by_name = {name: [r for table in same for r in table.runs] for name, same in grouped(tables, lambda t: t.name).items()}
    return "\n\n".join(_section(name, runs) for name, runs in (by_name | others).items() if runs)


def _section(name: str, runs: Sequence[Record]) -> str:
    said = "\n".join(f"- {what}: {text}" for what, text in sources(runs).items())
    commands = "\n".join(patterns(r.command for r in runs))
    return f"### {name}\n\n{said}\n\n```sh\n{commands}\n```"
