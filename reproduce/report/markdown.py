"""Markdown tables, which runs may stand in one, and the small arithmetic that every table needs."""

import statistics
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from ..store.records import data_key


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A GitHub table; the first column left-aligned, the others right-aligned, padded so that the source reads well too."""
    cells = [list(header), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [_line(cells[0], widths), "|" + "|".join(_rule(i, w) for i, w in enumerate(widths)) + "|"]
    return "\n".join(lines + [_line(row, widths) for row in cells[1:]])


def _line(cells: list[str], widths: list[int]) -> str:
    padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths))]
    return "| " + " | ".join(padded) + " |"


def _rule(column: int, width: int) -> str:
    return "-" * (width + 2) if column == 0 else "-" * (width + 1) + ":"


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """ "4.321" for one value, "4.321 ± 0.012 (3)" with the standard deviation and the number of runs for more."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f} ({len(values)})"


def counted(number: int, thing: str) -> str:
    """ "1 worker", "8 workers"."""
    return f"{number:,} {thing}{'s' if number > 1 else ''}"


def each_once(names: Iterable[str]) -> str:
    """ "a, b" for a, b and a."""
    return ", ".join(dict.fromkeys(names))


@contextmanager
def complete(complaint: str) -> Iterator[None]:
    """What the records within turn out to lack becomes a ValueError that begins with this complaint."""
    try:
        yield
    except (KeyError, TypeError) as error:
        raise ValueError(f"{complaint}: {error}") from error


def commit_of(record: dict) -> str:
    """The commit that ran, short, and whether the tree differed from it."""
    commit, plus, changes = record["commit"].partition("+")
    return commit[:10] + plus + changes


def difference(ours: float, paper: float) -> str:
    """ours / paper - 1 in per cent, signed."""
    return f"{100 * (ours / paper - 1):+.1f} %"


def grouped(records: Iterable[dict], key: Callable[[dict], Hashable]) -> dict[Hashable, list[dict]]:
    """Those of one key together, in the order of the first of each."""
    groups: dict[Hashable, list[dict]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def alike(records: list[dict]) -> list[list[dict]]:
    """Training runs that may stand in one table, in the order of their first runs: all is alike but rows, learning rates and seeds.

    A pretrained model, which has but a part of the settings, stands with whatever was made of it.
    """
    groups: list[tuple[dict, list[int]]] = []
    pretrained = ["train" not in r["config"] for r in records]
    for n in sorted(range(len(records)), key=pretrained.__getitem__):  # what is pretrained comes last
        settings = _settings(records[n])
        fitting = [
            places for known, places in groups if settings == known or pretrained[n] and settings.items() <= known.items()
        ]
        if not fitting:
            groups.append((settings, []))
            fitting = [groups[-1][1]]
        for places in fitting:
            places.append(n)
    return [[records[n] for n in sorted(places)] for _, places in groups]


def largest(groups: list[list[dict]]) -> list[dict]:
    """The group of most runs, of equal ones the last; empty if there is none."""
    return max(reversed(groups), key=len, default=[])


def _settings(record: dict) -> dict:
    """What defines a run, side by side, but for its row and, unless all rows share one as in Figure 3, its learning rate."""
    config = {name: value for name, value in record["config"].items() if name not in ("row", "attention")}
    own = () if "epochs" in config else ("learning_rate",)
    train = {f"train.{name}": value for name, value in config.pop("train", {}).items() if name not in own}
    return {**config, **train, "data": data_key(record["data"])}
