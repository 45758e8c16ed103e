"""What every trained row needs around its training: a name, a checkpoint, and a record at the end."""

import contextlib
import dataclasses
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..models.rows import Row
from ..store.faults import first_line
from ..store.records import append, done, new_record, run_id
from .options import Options
from .settings import TrainConfig

SHARED = "the folders of --out, --records and the data must be the same for all of them"


@dataclass(frozen=True)
class Run:
    """One training run: what it is, where its checkpoint lies, and whether it is on record already.

    Args:
        experiment, method, config, seed, data: as in `Record`.
        options: what the command line decides.
    """

    experiment: str
    options: Options
    method: str
    config: dict
    seed: int
    data: dict

    @property
    def identity(self) -> str:
        """The id of its record."""
        return run_id(self.experiment, self.options.preset, self.method, self.config, self.seed, self.data)

    @property
    def checkpoint(self) -> Path:
        """Where its state is kept until it is on record."""
        return self.options.out / "checkpoints" / f"{self.experiment}-{self.identity}.pt"

    @property
    def title(self) -> str:
        """What messages call it."""
        return f"{self.experiment} {self.method} seed {self.seed}"

    def is_done(self) -> bool:
        """Whether it is on record; says so, since the user may wonder why nothing happens.

        Raises:
            ValueError: unless all workers know the same run of the same data.
        """
        known = done(self.options.records, self.identity)
        self.options.workers.agree(
            (self.identity, known), f"{self.title}: the workers do not read the same data and records; {SHARED}"
        )
        if known:
            tqdm.write(f"{self.title}: on record already, skipped ({self.options.records}, id {self.identity})")
        return known

    def finish(self, metrics: dict, seconds: float) -> None:
        """Record the run; only then is its checkpoint dropped.

        Args:
            metrics: all that it measured.
            seconds: how long it took.
        """
        record = new_record(
            self.experiment,
            self.options.preset,
            self.method,
            self.config,
            metrics,
            seed=self.seed,
            data=self.data,
            device=self.options.device,
            wall_seconds=seconds,
        )
        append(self.options.records, record)
        self.checkpoint.unlink(missing_ok=True)


class Failures:
    """What failed of a command that does many things, told when all the rest is done: time on a GPU is scarce, and the fault of one kernel
    is not another's.

    Args:
        device: as torch names it.
        kind: of the errors that are kept.
    """

    def __init__(self, device: str, kind: type[Exception] = Exception):
        self.device, self.kind, self.said = device, kind, []

    @contextlib.contextmanager
    def kept(self, what: str) -> Iterator[None]:
        """Inside, an error is printed and kept, unless the device itself no longer works.

        Args:
            what: is done.
        """
        try:
            yield
        except self.kind as error:
            tqdm.write(f"{what} failed:\n{traceback.format_exc()}")
            self.said.append(f"{what} ({type(error).__name__}: {first_line(error)})")
            torch.ones(1, device=self.device).item()  # after an illegal access nothing else would succeed there

    def tell(self) -> None:
        """Raise ValueError where there were any."""
        if self.said:
            raise ValueError(f"failed: {'; '.join(self.said)}. All else is kept; the same command tries these again")


def check_labels(kind: str, labels: Iterable[str], known: Iterable[str]) -> None:
    """Refuse unknown labels of --rows.

    Args:
        kind: what the labels are of, in a word.
        labels: those that were given.
        known: those that there are.

    Raises:
        ValueError: for a label that is not among the known ones.
    """
    known = list(known)
    if unknown := set(labels) - set(known):
        raise ValueError(f"--rows: no {kind} is called {', '.join(sorted(unknown))}; there are: {'; '.join(known)}")


def selected(rows: Iterable[Row], labels: tuple[str, ...], beside: Iterable[Row] = ()) -> list[Row]:
    """The rows with these labels, all where none is given.

    Args:
        rows: of a table.
        labels: as --rows has them.
        beside: rows that are run only where they are named.

    Raises:
        ValueError: for a label that no row has.
    """
    rows = list(rows)
    known = [*rows, *beside]
    check_labels("row", labels, [row.label for row in known])
    return [row for row in known if row.label in labels] if labels else rows


def override(settings: TrainConfig, options: Options) -> TrainConfig:
    """The preset's settings with what the command line changes.  Raises ValueError for a warm-up longer than the run."""
    changes = {name: getattr(options, name) for name in ("learning_rate", "steps", "warmup_steps", "optimizer", "qk_clip")}
    settings = dataclasses.replace(settings, **{name: value for name, value in changes.items() if value is not None})
    if options.warmup_steps and options.warmup_steps > settings.steps:
        raise ValueError(
            f"--warmup-steps {options.warmup_steps:,}: the run has {settings.steps:,} steps; its learning rate would never reach the peak"
        )
    return settings
