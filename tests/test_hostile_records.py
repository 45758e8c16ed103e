"""One leaf of a committed record is changed at a time. Whatever reads it is drawn, or ends in one line that says what is wrong.

Of each file a sample, the same in every run. HOSTILE_RECORDS=all tries every kind of leaf with every change, and draws whatever passes the
schema, which takes an hour. A kind of leaf is its place with any entry of a list for all of them: the first of its file stands for it. Of
each file the shortest records are read, of spectra two layers.
"""

import copy
import dataclasses
import itertools
import json
import os
import warnings
from collections.abc import Iterator

import matplotlib.pyplot as plt
import pytest
from made_records import MLA, a_row, study

from paper_figures import __main__ as figures
from paper_figures import style
from reproduce.report import claims, commands, pages, results, room
from reproduce.report.unfoldings import BY_OPTIMIZER
from reproduce.store import records
from reproduce.store.checked import read_json
from reproduce.store.schema import check_record

ALL = os.environ.get("HOSTILE_RECORDS") == "all"
CHECKED, DRAWN = (10**6, 10**6) if ALL else (120, 1)  # of each file: changes that meet the schema, and that are then drawn
WAYS = ("trained", "initial", "inputs", "initial_inputs", "centred")  # layers of a model, in records of `spectra`
FEW = 8  # records of a file that are drawn together; the tables of one experiment alone have lines enough
FILES = sorted(path.name for path in records.COMMITTED.glob("*.json"))

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
    "a list in lists": json.loads("[" * 300 + "]" * 300),
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
        figures.draw_room(some, folder)
        figures.draw_times(some, folder)


def spread(items: list, count: int) -> list:
    """So many of them, evenly spread."""
    return items if len(items) <= count else [items[n * len(items) // count] for n in range(count)]


def passes(entry: dict, named: tuple[str, ...]) -> dict | None:
    """The record as it is read back from its file, None where it is refused: in one line that names the file."""
    try:
        read = read_json(json.dumps(entry), "file")
        check_record(read, "file", named)
        return read
    except ValueError as error:
        said = str(error)
        assert said.startswith("file") and "\n" not in said and len(said) < 1000
        return None


def committed(name: str) -> list[dict]:
    return json.loads((records.COMMITTED / name).read_text(encoding="utf-8"))


def as_filed(some: list[records.Record]) -> list[dict]:
    """As their file would hold them."""
    return json.loads(json.dumps([{name: getattr(record, name) for name in records.FIELDS} for record in some]))


def by_optimizer() -> list[dict]:
    """Runs of another preset, every other one of them with Muon."""
    entries = committed("table2.gpu-fresh.json")[:6]
    for number, entry in enumerate(entries):
        entry["preset"] = BY_OPTIMIZER
        entry["config"]["train"] |= {"optimizer": "muon"} if number % 2 else {}
    return entries


MADE = {  # files of which none is committed yet
    "heal.gpu.json": lambda: as_filed([a_row("as it is", 2.0, 1.8), a_row(MLA, 3.0, 2.0), a_row("Tucker", 2.5, None)]),
    f"spectra.{BY_OPTIMIZER}.json": lambda: as_filed(study(0.2)),
    f"table2.{BY_OPTIMIZER}.json": by_optimizer,
}


@pytest.mark.no_cover
@pytest.mark.parametrize("name", [*FILES, *MADE])
def test_one_leaf_changed_ends_in_no_traceback(name, monkeypatch, tmp_path):
    named = tuple(name.split(".")[:2])
    entries = MADE[name]() if name in MADE else committed(name)
    entries = sorted(entries, key=lambda entry: len(json.dumps(entry)))[:FEW]
    for entry in entries if named[0] == "spectra" else ():  # of layers with thousands of singular values the first two
        entry["metrics"] |= {way: entry["metrics"][way][:2] for way in WAYS if way in entry["metrics"]}
        entry["config"]["n_layers"] = 2
    assert all(passes(entry, named) for entry in entries)  # control: as they are
    tried = spread(trials(entries), CHECKED)
    passed = []
    for number, place, change in tried:
        if read := passes(changed(entries[number], place, CHANGES[change]), named):
            passed.append((number, place, change, read))
    assert 0 < len(passed) < len(tried)  # some change what it says, and some are refused
    several = spread(passed, DRAWN)
    for number, place, change, read in several:
        some = [read if n == number else entry for n, entry in enumerate(entries)]
        (tmp_path / name).write_text(json.dumps(some), encoding="utf-8")
        try:
            drawn(records.load_some(tmp_path), monkeypatch, tmp_path / "figures")
        except ValueError as error:
            assert "\n" not in str(error), (place, change)
        except Exception as error:
            error.add_note(f"{name}: {place} {change}")
            raise
    if tally := os.environ.get("HOSTILE_RECORDS_TRIED"):
        with open(tally, "a", encoding="utf-8") as file:
            file.write(f"{len(tried)} {len(several)}\n")


def test_models_judged_on_other_texts_stand_in_another_table():
    first, second = records.load(records.COMMITTED, "compress_models")[:2]
    assert len(room.compressed_tables([first, second])) == 1  # control
    metrics = json.loads(json.dumps(second.metrics).replace("enwiki_test.txt", "novel.txt"))
    assert len(room.compressed_tables([first, dataclasses.replace(second, metrics=metrics)])) == 2


def test_a_run_without_a_seed_is_counted_and_names_none():
    runs = [r for r in records.load(records.COMMITTED, "table2", "gpu-sweep") if r.seed == 0][:2]
    without = [runs[0], dataclasses.replace(runs[1], seed=None)]
    both, one = commands.on_record(runs), commands.on_record(without)
    assert both.splitlines()[-1] == one.splitlines()[-1] and "`table2 --preset gpu-sweep` | 2 |" in one
