"""What the command line decides, in one object that every experiment receives."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from .distributed import ALONE, Workers

# How a trained layer is converted, and what a record's method says of it: the HOSVD of its weights (the SVD, of GQA and MLA), refitted
# (HOOI), or the HOSVD weighed by the second moment of the layer's inputs.
STARTS = {"hosvd": "", "hooi": ", start by HOOI", "moment": ", start by second moments"}


@dataclass(frozen=True)
class Options:
    """What the command line decides. What is empty or None leaves the preset's choice, or all rows.

    Args:
        preset: the scale.
        out: checkpoints and cached tokens.
        records: where finished runs are recorded.
        device: as torch names it.
        rows: labels to run.
        seeds: one run each.
        learning_rate, steps, warmup_steps, optimizer, qk_clip: as in `TrainConfig`.
        passes: how often the text is read, of presets that read it window by window; their steps go with it.
        learning_rates: one run at each (`at_each_rate`).
        pretrain_rates: of Figure 3's preset that chooses them, in place of its own.
        start: how layers are converted, a key of STARTS.
        text, validation, bpe, images: paths in place of the built-in data.
        test: texts for finished models alone.
        model: whose attention to look at.
        trust_layers: without comparing it with the original first.
        ranks: to compress it to, (head, query, key) each.
        save: where the compressed model goes.
        workers: those that train together, this one among them.
        dry_run: say what a run would take instead of running it.
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
    passes: float | None = None
    learning_rates: tuple[float, ...] = ()
    pretrain_rates: tuple[float, ...] = ()
    start: str = "hosvd"
    text: str | None = None
    validation: str | None = None
    test: tuple[str, ...] = ()
    bpe: str | None = None
    images: str | None = None
    model: str | None = None
    trust_layers: bool = False
    ranks: tuple[tuple[int, int, int], ...] = ()
    save: Path | None = None
    workers: Workers = ALONE
    dry_run: bool = False
    gpu_memory: float = 80.0

    def at_each_rate(self) -> list["Options"]:
        """These options once for each of `learning_rates`; as they are where none is given."""
        return [dataclasses.replace(self, learning_rate=rate, learning_rates=()) for rate in self.learning_rates] or [self]
