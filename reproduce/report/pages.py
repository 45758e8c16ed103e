"""Pages whose generated parts stand between marks: what each part is, and how all pages are written again."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ..store.files import write_atomically
from ..store.records import Record
from . import again, checks, claims, commands, headline, healing, optimizers, provenance, results, room, vision_pairs
from .query import grouped

FIRST = "README.md"  # writing it writes those beside it too
CLAIMS = "CLAIMS.md"
BESIDE = (
    "RESULTS.md", CLAIMS, "docs/training.md", "docs/adamw.md", "docs/vision.md", "docs/speed.md", "docs/scale.md",
    "docs/compression.md", "docs/ranks.md", "docs/exactness.md", "docs/testing.md", "docs/provenance.md",
)  # fmt: skip

PARTS: dict[str, Callable[[list[Record]], str]] = {  # beside them every table has its own name
    "headline": headline.headline,
    "verdicts": headline.six_verdicts,
    "claims": claims.render,
    "commands": commands.render,
    "on record": commands.on_record,
    "model commands": room.commands,
    "once more": again.render,
    "optimisers": optimizers.render,
    "healing": healing.render,
    "checks": checks.render,
    "mutants": checks.mutants_table,
    "versions": checks.versions_table,
    "provenance": lambda records: provenance.render(all_tables(records), checks.on_record(records)),
    "results": results.render,
}
TO_COME = {  # tables that have their marks before they have a record, and what stands under them then
    "Table 2, fresh text, narrow": "",
    "Table 2, fresh text, trend": "![Difference to multi-head attention on a test text against tokens for each parameter, over two sizes "
    "of GPT-2](../paper_figures/images/difference_against_tokens.png)",
    "Table 2, fresh text, allocations": "",
    "Table 3, fresh text": "",
    vision_pairs.ANEW: "",
    vision_pairs.UNEQUAL: "",
    "Two GPUs": "",
}
MARK = "<!-- {}: written by `python -m reproduce report --write README.md` -->", "<!-- end of {} -->"
MARKS = re.compile(
    r"<!-- ([^:\n]+): written by `python -m reproduce report --write README\.md` -->\n(.*?)<!-- end of \1 -->", re.DOTALL
)
NONE, NONE_YET = "Not on record.", "There is no record of it yet."


def all_tables(records: list[Record]) -> list[results.Table]:
    """Those of all experiments, one after the other."""
    return [table for found in results.tables(records).values() for table in found]


def parts_of(page: str) -> list[str]:
    """The names of the parts that a page has marks for, in its order."""
    return [name for name, _ in MARKS.findall(page)]


def filled(page: str, texts: dict[str, str]) -> str:
    """The page with these texts between the marks of their names; what has no text here stays as it is."""

    def fill(found: re.Match) -> str:
        name = found.group(1)
        if name not in texts:
            return found.group()
        begin, end = (mark.format(name) for mark in MARK)
        return f"{begin}\n\n{texts[name] or NONE}\n\n{end}"

    return MARKS.sub(fill, page)


def texts_of(names: Iterable[str], records: list[Record]) -> dict[str, str]:
    """What stands in each of these parts; nothing in one that no record fills.

    Args:
        names: of PARTS, or of tables.
        records: all that there are.
    """
    by_name = grouped(all_tables(records), lambda table: table.name)
    drawn = {name: "\n\n".join(table.shown() for table in found) for name, found in by_name.items()}
    drawn = {name: NONE_YET for name in TO_COME} | {
        name: f"{shown}\n\n{TO_COME.get(name, '')}".strip() for name, shown in drawn.items()
    }
    return {name: PARTS[name](records) if name in PARTS else drawn.get(name, "") for name in names}


def write(path: Path, records: list[Record]) -> None:
    """Write the parts of a page again; of the first page, also those of the pages beside it.

    Args:
        path: a Markdown file with marks.
        records: all that there are.

    Raises:
        ValueError: if it has no marks, or is no UTF-8.
    """
    beside = [path.parent / name for name in BESIDE] if path.name == FIRST else []
    pages = {page: _read(page) for page in (path, *(page for page in beside if page.exists()))}
    texts = texts_of(dict.fromkeys(name for text in pages.values() for name in parts_of(text)), records)
    for page, text in pages.items():
        if page == path or parts_of(text):
            _replace(page, text, texts)


def write_claims(path: Path, records: list[Record]) -> None:
    """Write the claims into a page: where it has a place for them, else where it has one for results.

    Args, Raises: as in `write`.
    """
    page = _read(path)
    part = "claims" if "claims" in parts_of(page) else "results"
    _replace(path, page, {part: claims.render(records)})


def _replace(path: Path, page: str, texts: dict[str, str]) -> None:
    if not texts.keys() & {*parts_of(page)}:
        begin, end = (mark.format("results") for mark in MARK)
        raise ValueError(f"{path} lacks the marks between which results belong: {begin} and {end}")
    write_atomically(path, lambda file: file.write(filled(page, texts).encode()))


def _read(path: Path) -> str:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():  # a pipe would be waited for, and for ever
            raise ValueError(f"{path} is no page: it is no regular file")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from None
