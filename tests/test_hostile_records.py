"""One leaf of a committed record is changed at a time; whatever reads it then ends as it should: drawn, or one line that says what is wrong.

Of each file a sample that no clock or generator decides. HOSTILE_RECORDS=all tries every kind of leaf with every change, and
`python -m reproduce hostile` does so for its record.
"""

import copy
import itertools
import json
import os
import warnings
from collections.abc import Iterator

import matplotlib.pyplot as plt

from paper_figures import __main__ as figures
from paper_figures import style
from reproduce.report import claims, pages, results
from reproduce.store import records

ALL = os.environ.get("HOSTILE_RECORDS") == "all"
TRIED = os.environ.get("HOSTILE_RECORDS_TRIED")  # a file for how many were tried, and how many were still drawn
CHECKED, DRAWN = 60, 2  # of each file, without ALL: changes that meet the schema, and of those that pass it such that are drawn
FILES = sorted(path.name for path in records.COMMITTED.glob("*.json"))
DEEP = 3000  # lists in lists: more than Python's recursion takes

DELETED = object()
CHANGES = {
    "deleted": DELETED,
    "null": None,
    "a string": "x",
    "no string": "",
    "a surrogate": "\udcff",
    "negative": -1,
    "zero": 0,
    "huge": 10**30,
    "beyond float": 10**400,
    "a huge float": 1e308,
    "a tiny float": 1e-320,
    "true": True,
    "a dict": {},
    "a list": [],
    "a list in lists": json.loads("[" * 400 + "]" * 400),
    "NaN": float("nan"),
}


def kinds(value: object, place: tuple = (), pattern: tuple = ()) -> Iterator[tuple[tuple, tuple]]:
    """Every place within a JSON value, with its kind: the same place in any entry of a list."""
    if place:
        yield place, pattern
    steps = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for step, inner in steps:
        yield from kinds(inner, (*place, step), (*pattern, "[]" if isinstance(value, list) else step))


def changed(entry: dict, place: tuple, change: object) -> dict:
    """The record with this one leaf changed; what is not on the way to it is shared with the record as it is."""
    new = copy.copy(entry)
    inner = new
    for step in place[:-1]:
        inner[step] = copy.copy(inner[step])
        inner = inner[step]
    if change is DELETED:
        del inner[place[-1]]
    else:
        inner[place[-1]] = change
    return new


def trials(entries: list[dict]) -> list[tuple[int, tuple, str]]:
    """(record, place, change): one place of every kind that any of the records has, with every change."""
    places = {}
    for number, entry in enumerate(entries):
        for place, pattern in kinds(entry):
            places.setdefault(pattern, (number, place))
    return [(number, place, name) for (number, place), name in itertools.product(places.values(), CHANGES)]


def drawn(some: list[records.Record], monkeypatch, folder) -> None:
    """Everything that is ever shown of records: tables, claims, pages, figures."""
    results.render(some)
    claims.render(some)
    pages.texts_of(pages.PARTS, some)

    def no_file(figure, path, **options):
        figure.draw_without_rendering()
        plt.close(figure)

    monkeypatch.setattr(style, "write", no_file)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of matplotlib, of axes without anything on them
        figures.draw_counts(some, folder)
        figures.draw_losses(some, folder)
        figures.draw_trained(some, folder, ("smoke", "gpu"))
        figures.draw_times(some, folder)


def spread(items: list, count: int) -> list:
    """So many of them, evenly spread."""
    return items if len(items) <= count else [items[n * len(items) // count] for n in range(count)]
