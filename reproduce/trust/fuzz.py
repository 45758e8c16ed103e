"""Fuzzing: the contracts of every public function (tests/test_contracts.py) tried on many random inputs, others each time.

`make test` tries a few fixed inputs of each contract; here each gets hundreds. What fails is printed with the smallest input that fails.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ..store.records import append, new_record
from ..train.options import Options

TAKES = ()
ROOT = Path(__file__).parents[2]


def run(options: Options) -> None:
    """One record: per contract how many inputs were tried.

    Args:
        options: where the record goes.

    Raises:
        ValueError: if a contract failed, after the record is written; or if none ran.
    """
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tried = Path(folder) / "tried.json"
        environment = os.environ | {"HYPOTHESIS_PROFILE": "long", "CONTRACTS_TRIED": str(tried)}
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "tests/test_contracts.py"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8")
        if not tried.exists():
            raise ValueError(f"the contracts did not run: {(done.stdout + done.stderr)[-2000:]}")
        tallied = json.loads(tried.read_text(encoding="utf-8"))
    failed = re.findall(r"^(?:FAILED|ERROR) .*?::(\S+)", done.stdout, re.MULTILINE)
    names = {name: len(tests) for name, tests in sorted(tallied["contracts"].items())}
    metrics = {"tried": tallied["tried"], "inputs": sum(tallied["tried"].values()), "public_names": names, "failed": failed}
    print(
        f"{metrics['inputs']} inputs for {len(metrics['tried'])} contracts of {len(names)} public names; {len(failed)} failed"
    )
    wall = time.perf_counter() - started
    append(options.records, new_record("fuzz", "long", "hypothesis", {}, metrics, wall_seconds=wall), replace=True)
    if done.returncode:
        raise ValueError(f"{', '.join(failed)} failed: {done.stdout[-6000:]}")
