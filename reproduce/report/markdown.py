"""Markdown tables, and what belongs to one: its name, its title, and the runs that its numbers come from."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ..store.records import Record


@dataclass(frozen=True)
class Table:
    """A table as a page shows it.

    Args:
        name: under which pages ask for it, and the page of provenance lists it; tables of one kind share theirs.
        title: the line above it.
        body: the table, in Markdown.
        runs: whose numbers it shows.
        note: what stands under it, if anything.
    """

    name: str
    title: str
    body: str
    runs: Sequence[Record]
    note: str = ""

    def shown(self) -> str:
        """Title, table and note, one under the other."""
        return "\n\n".join(part for part in (self.title, self.body, self.note) if part)


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]], words: bool = False) -> str:
    """A GitHub table whose source is as wide as its content.

    Args:
        header: of each column; the first is aligned to the left, the others to the right.
        rows: as many cells each; what is not text becomes it.
        words: whether the cells are words, which stand to the left in all columns.
    """
    rule = "|" + "|".join(["---", *["---" if words else "---:"] * (len(header) - 1)]) + "|"
    return "\n".join([_line(header), rule, *map(_line, rows)])


def _line(cells: Sequence[str]) -> str:
    # A model's name may hold bars and line breaks.
    return _joined(re.sub(r"\s*\n\s*", " ", str(cell)).replace("|", r"\|") for cell in cells)


def _joined(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def aligned(text: str) -> str:
    """The same text with the columns of its tables below each other, as a terminal shows them best."""
    return re.sub(r"(?:^\|.*\|$\n?)+", _aligned_table, text, flags=re.MULTILINE)


def _aligned_table(found: re.Match) -> str:
    header, rule, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])] for line in found.group().splitlines())
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    left = [not cell.endswith(":") for cell in rule]

    def line(cells: list[str]) -> str:
        return _joined([c.ljust(w) if l else c.rjust(w) for c, w, l in zip(cells, widths, left)])  # noqa: E741

    rules = "|".join("-" * (w + 2) if l else "-" * (w + 1) + ":" for w, l in zip(widths, left))  # noqa: E741
    end = "\n" if found.group().endswith("\n") else ""
    return "\n".join([line(header), f"|{rules}|", *map(line, rows)]) + end
