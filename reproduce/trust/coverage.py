"""Coverage: which lines and branches of `tucker_ref` and `reproduce` all tests together run, and which only a GPU runs.

`make test` prints the same figures. `[tool.coverage]` in pyproject.toml says what is left out, as GPU-only, and why.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..report.markdown import markdown
from ..store.records import append, new_record
from ..train.options import Options

TAKES = ()
ROOT = Path(__file__).parents[2]
PACKAGES = ("tucker_ref", "reproduce")
COUNTS = {
    "lines": "num_statements",
    "covered_lines": "covered_lines",
    "branches": "num_branches",
    "covered_branches": "covered_branches",
    "left_out": "excluded_lines",
}


def run(options: Options) -> None:
    """One record: lines and branches, covered and all, of both packages.

    Args:
        options: where the record goes.

    Raises:
        ValueError: if a test fails.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        command = [sys.executable, "-m", "pytest", "-n", "2", "--cov", f"--cov-report=json:{report}"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
        if done.returncode:
            raise ValueError(f"the tests do not pass: {what_failed(done.stdout + done.stderr)}")
        metrics = count(json.loads(report.read_text(encoding="utf-8")))
    print(table(metrics))
    wall = time.perf_counter() - started
    append(options.records, new_record("coverage", "tests", "coverage.py", {}, metrics, wall_seconds=wall), replace=True)


def what_failed(said: str) -> str:
    """The first failure that pytest tells of, whole, and the end of its summary.

    Args:
        said: all that pytest wrote.
    """
    title = r"^(?:__+|==+) [^\n]+ (?:__+|==+)$"
    first = re.search(rf"^==+ (?:ERRORS|FAILURES) ==+\n{title}.*?(?={title})", said, re.DOTALL | re.MULTILINE)
    return (first[0] if first else "") + "\n" + said.rpartition("short test summary info")[2][-2000:]


def count(report: dict) -> dict:
    """Sums over the files of each package.

    Args:
        report: by coverage.py, as its JSON holds it.

    Returns:
        Per package how many `lines`, `covered_lines`, `branches`, `covered_branches` there are, and lines `left_out`.
    """
    return {
        package: {
            name: sum(file["summary"][field] for path, file in report["files"].items() if Path(path).parts[0] == package)
            for name, field in COUNTS.items()
        }
        for package in PACKAGES
    }


def table(metrics: dict) -> str:
    """Markdown: a line per package."""
    rows = [
        [
            package,
            f"{counts['covered_lines']:,} of {counts['lines']:,}",
            f"{counts['covered_branches']:,} of {counts['branches']:,}",
            f"{counts['left_out']:,}",
        ]
        for package, counts in metrics.items()
    ]
    return markdown(["package", "lines", "branches", "left out: only a GPU runs them"], rows)
