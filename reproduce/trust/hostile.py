"""Hostile input: the tables of cases in tests/test_hostile*.py, tried and counted by kind.

Every case must be refused with a message that names what, where and what is allowed, or have one defined result; whatever was saved or
cached before must be there afterwards. A case counts once for each layer and each backend on which it is tried; of committed records
every change of one leaf counts, and those that a table or a figure was then drawn of count apart.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

from ..report.markdown import markdown
from ..store.records import append, new_record
from ..train.options import Options
from .coverage import what_failed

TAKES = ()
ROOT = Path(__file__).parents[2]
FILES = ("tests/test_hostile.py", "tests/test_hostile_cli.py", "tests/test_hostile_records.py")
TALLY = "HOSTILE_RECORDS_TRIED"  # names the file in which the last of them says how many records it changed
KIND = re.compile(r"[\[-]([a-z][a-z ]*): ")  # within a test's id; those without are tests of one case


def run(options: Options) -> None:
    """One record: trials of every kind.

    Args:
        options: where the record goes.

    Raises:
        ValueError: if one of the tests fails.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report, tally = Path(folder) / "report.xml", Path(folder) / "tally.txt"
        tally.touch()
        command = [sys.executable, "-m", "pytest", f"--junitxml={report}", *FILES]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=os.environ | {TALLY: str(tally)})
        if done.returncode:
            raise ValueError(f"not every hostile input met its end: {what_failed(done.stdout + done.stderr)}")
        metrics = count(report) | changed_records(tally)
    print(table(metrics))
    wall = time.perf_counter() - started
    append(options.records, new_record("hostile", "tests", "pytest", {}, metrics, wall_seconds=wall), replace=True)


def count(report: Path) -> dict:
    """Trials of passed tests by kind.

    Args:
        report: a JUnit file of tests that all passed or were skipped.

    Returns:
        `kinds`: trials by kind, the most frequent first; `skipped`: how many tests were.
    """
    passed, skipped = Counter(), 0
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is not None:
            skipped += 1
        else:
            kind = KIND.search(case.get("name"))
            passed[kind[1] if kind else "others"] += 1
    return {"kinds": dict(passed.most_common()), "skipped": skipped}


def changed_records(tally: Path) -> dict:
    """How many records with one leaf changed were tried, and of how many of them everything was drawn.

    Args:
        tally: a line for each file of records, with both numbers.

    Returns:
        `records` with `tried` and `drawn`; nothing where none was tried.
    """
    lines = [[int(number) for number in line.split()] for line in tally.read_text(encoding="utf-8").splitlines()]
    return {"records": dict(zip(("tried", "drawn"), map(sum, zip(*lines))))} if lines else {}


def table(metrics: dict) -> str:
    """Markdown: a line per kind, and the sum."""
    rows = [[kind, f"{trials:,}"] for kind, trials in metrics["kinds"].items()]
    return markdown(["kind", "inputs that met their end"], [*rows, ["together", f"{sum(metrics['kinds'].values()):,}"]])
