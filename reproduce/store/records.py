"""Records: one JSON object per finished run, the only source of every number that this repository prints.

`<folder>/<experiment>.<preset>.json` is a list of them. Training runs append, never overwrite; a run is known by its `id`, the hash of
what defines it (experiment, preset, method, config, seed, data), so a second start of the same command skips what is done.
"""

import fcntl
import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy
import torch

from .files import write_atomically

COMMITTED = Path(__file__).parents[1] / "results"
FIELDS = (
    "id", "experiment", "preset", "method", "config", "seed", "data", "metrics",
    "command", "commit", "versions", "device", "wall_seconds", "finished",
)  # fmt: skip
TYPES = {"id": str, "experiment": str, "preset": str, "method": str, "config": dict, "metrics": dict, "versions": dict,
         "command": str, "commit": str, "device": str}  # fmt: skip


def run_id(experiment: str, preset: str, method: str, config: dict, seed: int | None, data: dict | None) -> str:
    """What tells one run from another, as 16 hex digits."""
    parts = json.dumps([experiment, preset, method, config, seed, *data_key(data)], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def data_key(data: dict | None) -> tuple:
    """What tells one data set from another: its content, and byte pairs where they could be taken for others."""
    if data is None:
        return (None,)
    return (data["sha256"], data["byte_pairs"]) if "byte_pairs" in data else (data["sha256"],)


def workers_of(record: dict) -> int:
    """How many trained together."""
    return record["metrics"].get("workers", {"workers": 1})["workers"]


def new_record(
    experiment: str,
    preset: str,
    method: str,
    config: dict,
    metrics: dict,
    *,
    seed: int | None = None,
    data: dict | None = None,
    device: str = "cpu",
    wall_seconds: float = 0.0,
) -> dict:
    """A complete record. config: all that defines the run; metrics: all that it measured; data: as `describe()` returns it."""
    return {
        "id": run_id(experiment, preset, method, config, seed, data),
        "experiment": experiment,
        "preset": preset,
        "method": method,
        "config": config,
        "seed": seed,
        "data": data,
        "metrics": metrics,
        "command": command_line(),
        "commit": git_commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        "device": device_in_words(device),
        "wall_seconds": round(wall_seconds, 1),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def load(folder: Path, experiment: str | None = None, preset: str | None = None) -> list[dict]:
    """All records of a folder, or those of one experiment or preset; fields not known here are kept and ignored.

    Raises ValueError, naming file and record, if one is damaged.
    """
    records = []
    for path in sorted(folder.glob(f"{experiment or '*'}.{preset or '*'}.json")):
        records += _read(path)
    return records


def load_some(folder: Path) -> list[dict]:
    """All records of a folder.  Raises ValueError where there is none, and as `load` does."""
    if records := load(folder):
        return records
    raise ValueError(f"{folder} holds no records; run an experiment first, or name another folder")


def append(folder: Path, record: dict, *, replace: bool = False) -> None:
    """Add a record to its file, whole or not at all.

    A training run with a known id is left as it stands: first runs count. What is quickly measured, not trained, is measured
    anew each time, and `replace` puts the new record in the old one's place.
    """
    path = folder / f"{record['experiment']}.{record['preset']}.json"
    with _locked(folder):
        records = _read(path) if path.exists() else []
        known = [r["id"] for r in records]
        if record["id"] in known and replace:
            records[known.index(record["id"])] = record
        elif record["id"] not in known:
            records.append(record)
        else:
            return
        try:
            lines = ",\n".join(json.dumps(r, allow_nan=False) for r in records)  # one run a line: readable diffs
        except ValueError:
            raise ValueError(f"{path}: {record['method']} measured NaN or infinity, which is not recorded") from None
        write_atomically(path, lambda file: file.write(f"[\n{lines}\n]\n".encode()))


def done(folder: Path, identity: str) -> bool:
    """Whether a run with this id is on record."""
    return any(record["id"] == identity for record in load(folder))


def _read(path: Path) -> list[dict]:
    try:
        records = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a record file: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} is not a record file: it must hold a list of records")
    for number, record in enumerate(records):
        missing = [f for f in FIELDS if not isinstance(record, dict) or f not in record]
        if missing:
            raise ValueError(f"{path}: record {number} lacks {', '.join(missing)}")
        for field, kind in TYPES.items():
            if not isinstance(record[field], kind):
                raise ValueError(
                    f"{path}: record {number} has {field} {json.dumps(record[field])[:40]}; it must be a {kind.__name__}"
                )
    return records


@contextmanager
def _locked(folder: Path):
    """One writer at a time: two runs may share a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def command_line() -> str:
    """The command as a reader would type it; of absolute paths, which exist on one machine only, the name is kept."""

    def shortened(argument: str) -> str:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        return option + equals + (Path(value).name if os.path.isabs(value) or value.startswith("..") else value)

    return shlex.join(["python", "-m", "reproduce", *map(shortened, sys.argv[1:])])


def git_commit() -> str:
    """The commit that ran, with "+changes" if the tree differed from it; $GIT_COMMIT says it where the tree is a bare copy."""
    if said := os.environ.get("GIT_COMMIT"):
        return said
    root = Path(__file__).parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!reproduce/results")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_in_words(device: str) -> str:
    """For example "NVIDIA H200" or "2 cores of Intel(R) Xeon(R) ..."."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = models[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        model = platform.processor() or platform.machine()
    return f"{torch.get_num_threads()} threads on {model}"
