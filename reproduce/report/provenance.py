"""Where the numbers of every table come from: runs, data, devices, versions, commits and commands, each once."""

from collections.abc import Iterable, Sequence

from ..store.records import Record
from .markdown import Table
from .query import grouped
from .words import patterns, sources


def render(tables: Iterable[Table], others: dict[str, Sequence[Record]]) -> str:
    """A section for each source: tables that one command made at one commit share theirs.

    Args:
        tables: all that the pages show.
        others: what else they show, by what it is called, with the records that it was read from.

    Returns:
        Markdown.
    """
    by_name = {name: [r for table in same for r in table.runs] for name, same in grouped(tables, lambda t: t.name).items()}
    shared = grouped((by_name | others).items(), lambda item: _source(item[1]))
    return "\n\n".join(_section(dict(same)) for same in shared.values())


def _source(runs: Sequence[Record]) -> tuple:
    """What tells two sources apart: commands, commits, devices and versions."""
    return (*patterns(r.command for r in runs), *(text for name, text in sources(runs).items() if name not in ("runs", "data")))


def _section(tables: dict[str, Sequence[Record]]) -> str:
    """tables: of one source, by name."""
    runs = list({r.id: r for own in tables.values() for r in own}.values())
    first, *more = tables
    also = {"also": "; ".join(more)} if more else {}
    said = "\n".join(f"- {what}: {text}" for what, text in (also | sources(runs)).items())
    commands = "\n".join(patterns(r.command for r in runs))
    return f"## {first}\n\n{said}\n\n```sh\n{commands}\n```"
