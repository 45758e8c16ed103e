"""What every trained row needs around its training: a name, a checkpoint, and a record at the end."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ..models.rows import Row
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


def selected(rows: Iterable[Row], labels: tuple[str, ...]) -> list[Row]:
    """The rows with these labels.

    Args:
        rows: to choose from.
        labels: all rows if there are none.

    Raises:
        ValueError: for a label that no row has.
    """
    rows = list(rows)
    check_labels("row", labels, [row.label for row in rows])
    return [row for row in rows if not labels or row.label in labels]


def override(settings: TrainConfig, options: Options) -> TrainConfig:
    """The preset's settings with what the command line changes."""
    changes = {name: getattr(options, name) for name in ("learning_rate", "steps", "warmup_steps", "optimizer", "qk_clip")}
    return dataclasses.replace(settings, **{name: value for name, value in changes.items() if value is not None})
