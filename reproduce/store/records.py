"""Records: one JSON object per finished run, the only source of every number that this repository prints.

`<folder>/<experiment>.<preset>.json` is a list of them. Training runs append, never overwrite; a run is known by its `id`, the hash of
what defines it (experiment, preset, method, config, seed, data), so a second start of the same command skips what is done. `Record` is
how the rest of the program sees one.
"""

import functools
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path

import numpy
import torch

from .checked import check, read_json
from .files import called, write_atomically
from .locks import locked
from .schema import Entry, check_record

COMMITTED = Path(__file__).parents[1] / "results"
EXPERIMENTS = (  # a file named otherwise holds no records: copies that an editor or a person left beside one are not read
    "exactness", "theorems", "table1", "table2", "table3", "ablations", "spectra", "compress", "compress_models", "heal",
    "compress_speed", "figure3", "decode", "speed", "generation_speed", "two_gpus", "survival", "hostile", "coverage", "mutation",
    "fuzz", "versions", "opening",
)  # fmt: skip


@dataclass(frozen=True)
class Record:
    """One finished run, with all that is needed to make it again.

    Args:
        id: 16 hex digits, as `run_id` gives them.
        experiment, preset: which command ran, and at which scale.
        method: the row of a table, with what was changed in how it is trained; elsewhere what was measured.
        config: all that defines the run; `train` in it, where it was trained.
        seed: of weights and batches, None where there is no chance.
        data: what it was trained on, None where nothing was: `name`, `sha256` and sizes.
        metrics: all that it measured. A language model's are put together in train/language.py, a ViT's in train/vision.py.
        command, commit, versions, device: what made it, and on what.
        wall_seconds: how long it took.
        finished: when, in UTC.
        more: fields of a newer or another program, which are kept.
    """

    id: str
    experiment: str
    preset: str
    method: str
    config: dict
    seed: int | None
    data: dict | None
    metrics: dict
    command: str
    commit: str
    versions: dict
    device: str
    wall_seconds: float
    finished: str
    more: dict = field(default_factory=dict)

    @property
    def train(self) -> dict:
        """Settings of the training.

        Raises:
            KeyError: where there was none.
        """
        return self.config["train"]

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.train["learning_rate"]

    @property
    def warmup(self) -> int:
        """Steps of rising learning rate."""
        return self.train["warmup_steps"]

    @property
    def steps(self) -> int:
        """Training steps that were asked for."""
        return self.train["steps"]

    @property
    def is_trained(self) -> bool:
        """Whether its config says how it was trained; a model to start from has but a part of the settings."""
        return "train" in self.config

    @property
    def diverged_at(self) -> int | None:
        """The step at which it broke off, None if it did not."""
        return self.metrics.get("diverged_at")

    @property
    def on_held_out(self) -> tuple[float, ...]:
        """By what settings are chosen, on data that is held out: the smallest is best, and a run that diverged comes last.

        Of text it is the loss. Of images it is top-5 accuracy, the paper's measure; of equal ones the lower loss, then the lower rate.
        """
        loss = self.metrics.get("validation_loss", math.inf)
        if self.experiment != "figure3":
            return (loss,)
        phase = self.train if self.is_trained else self.config["pretrain"]
        return -self.metrics.get("validation_top5", -math.inf), loss, phase["learning_rate"]

    @property
    def attention_parameters(self) -> int:
        """Of all layers together."""
        return self.metrics["attention_parameters"]

    @property
    def workers(self) -> int:
        """How many trained together."""
        return self.metrics.get("workers", {"workers": 1})["workers"]


FIELDS = tuple(f.name for f in fields(Record))[:-1]  # what every record has; `more` is not one of them


def run_id(experiment: str, preset: str, method: str, config: dict, seed: int | None, data: dict | None) -> str:
    """What tells one run from another, as 16 hex digits.

    Args:
        experiment, preset, method, config, seed, data: as in `Record`.
    """
    parts = json.dumps([experiment, preset, method, config, seed, *data_key(data)], sort_keys=True)
    return hashlib.sha256(parts.encode()).hexdigest()[:16]


def data_key(data: dict | None) -> tuple:
    """What tells one data set from another: its content, and byte pairs where they could be taken for others.

    Args:
        data: as in `Record`.
    """
    if data is None:
        return (None,)
    return (data["sha256"], data["byte_pairs"]) if "byte_pairs" in data else (data["sha256"],)


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
) -> Record:
    """A complete record of what this process has just measured.

    Args:
        experiment, preset, method, config, metrics, seed: as in `Record`.
        data: as `describe()` returns it.
        device: as torch names it.
        wall_seconds: how long it took.
    """
    return Record(
        id=run_id(experiment, preset, method, config, seed, data),
        experiment=experiment,
        preset=preset,
        method=method,
        config=config,
        seed=seed,
        data=data,
        metrics=metrics,
        command=command_line(),
        commit=git_commit(),
        versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": numpy.__version__},
        device=device_in_words(device),
        wall_seconds=round(wall_seconds, 1),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def load(folder: Path, experiment: str | None = None, preset: str | None = None, *, to_show: bool = False) -> list[Record]:
    """The records of a folder.

    Args:
        folder: where they are; files that are not named `<experiment>.<preset>.json`, after an experiment of ours, are left alone.
        experiment, preset: only those of this one.
        to_show: whether tables, claims or figures will read them, so that they must hold all that these ask for (schema.py).

    Raises:
        ValueError: naming file and record, if one is damaged, or naming both files if one is there twice.
    """
    records: dict[str, Record] = {}
    places: dict[str, Path] = {}
    for path in _files(folder, experiment, preset):
        for number, entry in enumerate(_read(path)):
            if to_show:
                check_record(entry, f"{path}: record {number}", tuple(path.name.split(".")[:2]))
            record = Record(**{f: entry[f] for f in FIELDS}, more={f: v for f, v in entry.items() if f not in FIELDS})
            if record.id in records:
                raise ValueError(
                    f"record {record.id} is there twice, in {places[record.id]} and in {path}: remove one of the two"
                )
            records[record.id], places[record.id] = record, path
    return list(records.values())


def load_some(folder: Path) -> list[Record]:
    """All records of a folder, to be shown.

    Raises:
        ValueError: where there is none, and as `load` does.
    """
    if records := load(folder, to_show=True):
        return records
    raise ValueError(f"{folder} holds no records; run an experiment first, or name another folder")


def append(folder: Path, record: Record, *, replace: bool = False) -> None:
    """Add a record to its file, whole or not at all.

    A training run with a known id is left as it stands: first runs count. What is quickly measured, not trained, is measured
    anew each time.

    Args:
        folder: where its file is, or is made.
        record: what to add.
        replace: put it in the place of the one with its id.

    Raises:
        ValueError: if its experiment is not one of EXPERIMENTS, its file is damaged, or it measured NaN or infinity.
    """
    if record.experiment not in EXPERIMENTS:
        raise ValueError(f"no experiment is called {record.experiment}; there are: {', '.join(EXPERIMENTS)}")
    path = folder / f"{record.experiment}.{record.preset}.json"
    entry = _legible({name: getattr(record, name) for name in FIELDS} | record.more)
    with locked(folder):
        entries = _read(path) if path.exists() else []
        known = [e["id"] for e in entries]
        if record.id in known and replace:
            entries[known.index(record.id)] = entry
        elif record.id not in known:
            entries.append(entry)
        else:
            return
        try:
            lines = ",\n".join(json.dumps(e, allow_nan=False) for e in entries)  # one run a line: readable diffs
        except ValueError:
            raise ValueError(f"{path}: {record.method} measured NaN or infinity, which is not recorded") from None
        write_atomically(path, lambda file: file.write(f"[\n{lines}\n]\n".encode()))


def _legible(entry: dict) -> dict:
    """The entry with the bytes of paths that are no text as U+FFFD: a page could not show them."""
    try:
        json.dumps(entry, ensure_ascii=False).encode()
        return entry
    except UnicodeEncodeError:
        return json.loads(json.dumps(entry, ensure_ascii=False).encode(errors="surrogateescape").decode(errors="replace"))


def done(folder: Path, identity: str) -> bool:
    """Whether a run with this id is on record."""
    return any(record.id == identity for record in load(folder))


def _files(folder: Path, experiment: str | None, preset: str | None) -> Iterator[Path]:
    """Those that hold records, in order of their names."""
    for path in sorted(folder.glob("*.json")):
        named = re.fullmatch(r"(\w+)\.([\w-]+)\.json", path.name)
        if named and named[1] in EXPERIMENTS and experiment in (None, named[1]) and preset in (None, named[2]):
            yield path


def _read(path: Path) -> list[dict]:
    """What a file of records holds, of each the fields that all have.  Raises ValueError, naming file and record, if it is damaged."""
    if path.exists() and not path.is_file():  # a pipe would be waited for, and for ever
        raise ValueError(f"{path} is not a record file: it is no regular file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a record file: {error}") from None
    records = read_json(text, f"{path} is not a record file")
    if not isinstance(records, list):
        raise ValueError(f"{path} is not a record file: it must hold a list of records")
    for number, record in enumerate(records):
        check(Entry, record, f"{path}: record {number}")
    return records


def command_line() -> str:
    """The command as a reader would type it; of absolute paths, which exist on one machine only, the name is kept."""

    def shortened(argument: str) -> str:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        paths = (called(part) if os.path.isabs(part) or part.startswith("..") else part for part in value.split(","))
        return option + equals + ",".join(paths)

    return shlex.join(["python", "-m", "reproduce", *map(shortened, sys.argv[1:])])


def git_commit() -> str:
    """The commit that runs, with "+changes" if the tree differs from it; $GIT_COMMIT says it where the tree is a bare copy.

    It is that of the first call: the tree may change while a command runs for hours, but what it imported does not.
    """
    return os.environ.get("GIT_COMMIT") or _commit_of(Path(__file__))


@functools.cache
def _commit_of(file: Path) -> str:
    """An installed package may lie within the repository of another program, whose commit is none of ours.  file: this one."""
    root = file.parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", root, *arguments]  # a lock would stay where this is killed
        return subprocess.run(command, capture_output=True, encoding="utf-8", check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "--", str(file.relative_to(root)))
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!reproduce/results")
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_in_words(device: str) -> str:
    """For example "NVIDIA H200" or "2 threads on Intel(R) Xeon(R) ...".

    Args:
        device: as torch names it.
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    try:
        models = [
            line for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if line.startswith("model name")
        ]
        model = models[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        model = platform.processor() or platform.machine()
    return f"{torch.get_num_threads()} threads on {model}"
