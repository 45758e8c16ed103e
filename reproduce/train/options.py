"""What the command line decides, in one object that every experiment receives."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from .distributed import ALONE, Workers


@dataclass(frozen=True)
class Options:
    """preset: the scale; out: checkpoints and cached tokens; records: where finished runs are recorded.

    rows: labels to run, all if empty; seeds: one run each, the preset's if empty; learning_rate, steps, warmup_steps, optimizer,
    qk_clip: in place of the preset's, if given; learning_rates: one run at each, if given (`at_each_rate`); text, validation, bpe,
    images: paths in place of the built-in data; test: texts for finished models alone; device: as torch names it;
    model: whose attention to look at; ranks: to compress it to; save: where the compressed model goes.
    workers: those that train together, this one among them; dry_run: say what a run would take instead of running it;
    gpu_memory: of one GPU in GB, for the dry run.
    """

    preset: str
    out: Path
    records: Path
    device: str = "cpu"
    rows: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    learning_rate: float | None = None
    steps: int | None = None
    warmup_steps: int | None = None
    optimizer: str | None = None
    qk_clip: float | None = None
    learning_rates: tuple[float, ...] = ()
    text: str | None = None
    validation: str | None = None
    test: tuple[str, ...] = ()
    bpe: str | None = None
    images: str | None = None
    model: str | None = None
    ranks: tuple[tuple[int, int, int], ...] = ()
    save: Path | None = None
    workers: Workers = ALONE
    dry_run: bool = False
    gpu_memory: float = 80.0

    def at_each_rate(self) -> list["Options"]:
        """These options once for each of `learning_rates`; as they are where none is given."""
        return [dataclasses.replace(self, learning_rate=rate, learning_rates=()) for rate in self.learning_rates] or [self]
