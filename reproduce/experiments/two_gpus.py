"""Two GPUs: the same training steps on one and on two, by DDP and by FSDP2; killed, resumed on one, and back on two.

A loss that several GPUs reach differs from one GPU's by rounding, since sums are taken in another order. How far that carries is
measured: two runs on one GPU that differ in the size of their micro-batches alone take the same batches, and only sums in another order.
The runs on two GPUs may be twice as far from the first of them as the second is.

Every run has processes of its own, and the two on one GPU run at the same time, each on its own. What has ended is kept under --out, as
result.json in a folder of its run, and is not run again when the command is repeated. Only the run that is killed leaves checkpoints.
"""

import dataclasses
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from ..models.language_model import LanguageModel
from ..models.rows import TABLE2, TABLE3, Row
from ..models.sizes import count_parameters
from ..store.files import write_atomically
from ..store.records import append, device_in_words, new_record
from ..train.distributed import started
from ..train.language import LanguagePreset, batch_of, build_model, config_of, read_text
from ..train.loop import train
from ..train.options import Options
from ..train.runs import check_labels
from ..train.settings import TrainConfig
from . import table2, table3

ROUNDING = 1e-4  # of losses in a curve
LAST_LINES = 40  # of what a run said that failed
FARTHER = 2.0  # than the noise on one GPU, which is the largest of as many differences
TAKES = ("device", "rows", "text", "bpe")


@dataclass(frozen=True)
class Case:
    """What is trained, and how it is shared.

    Args:
        row: of the table.
        model: its shape, as `config_of` takes it.
        preset: how large and how long; its micro-batch is that of all runs but one.
        sharding: of two workers.
        other_micro_batch: of the run that shows the noise.
        paper_tokens: that the paper's own run sees.
    """

    row: Row
    model: dict
    preset: LanguagePreset
    sharding: str
    other_micro_batch: int
    paper_tokens: int


def shortened(preset: LanguagePreset, **changes) -> LanguagePreset:
    """A preset on any text, with every step's loss and other settings of its training."""
    return dataclasses.replace(preset, text=None, train=dataclasses.replace(preset.train, log_every=1, **changes))


def tokens_of(preset: LanguagePreset) -> int:
    """How many a run sees."""
    return preset.train.steps * preset.train.batch_size * preset.context


GPT2, LLAMA = table2.PRESETS["paper"], table3.PRESETS["paper"]
LLAMA_SHAPE = {"model": "llama", "rope_base": table3.ROPE_BASE, **table3.PAPER_SHAPE}
TOY = LanguagePreset(
    16, 1, 16, 300, 4096, TrainConfig(40, 8, 2e-3, warmup_steps=10, log_every=1, checkpoint_every=5), micro_batch=4
)
PRESETS = {
    "smoke": {"table2": Case(TABLE2[0], {"model": "gpt2", **table2.PAPER_SHAPE}, TOY, "fsdp", 2, tokens_of(GPT2))},
    # The paper's models; batches a third and an eighth of the preset's, so that all of it takes minutes.
    "gpu": {
        "table2": Case(
            TABLE2[0],
            {"model": "gpt2", **table2.PAPER_SHAPE},
            shortened(GPT2, steps=200, batch_size=160, warmup_steps=100, checkpoint_every=50),
            "ddp",
            10,
            tokens_of(GPT2),
        ),
        "table3": Case(
            TABLE3[0],
            LLAMA_SHAPE,
            shortened(LLAMA, steps=50, batch_size=32, warmup_steps=25, checkpoint_every=20),
            "fsdp",
            4,
            tokens_of(LLAMA),
        ),
    },
}


def run(options: Options) -> None:
    """One record per table.

    Args:
        options: `rows` are names of tables, all if empty.

    Raises:
        ValueError: for a table that is not there, fewer than two GPUs, or a run that fails.
    """
    device, cases = options.device, PRESETS[options.preset]
    check_labels("table", options.rows, cases)
    if torch.device(device).type == "cuda" and torch.cuda.device_count() < 2:
        raise ValueError("two_gpus needs two GPUs")
    for name, case in cases.items():
        if options.rows and name not in options.rows:
            continue
        began, settings = time.perf_counter(), case.preset.train
        config = {
            "row": case.row.label,
            "sharding": case.sharding,
            "steps": settings.steps,
            "global_batch": settings.batch_size,
            "context": case.preset.context,
            "micro_batches": [case.preset.micro_batch, case.other_micro_batch],
            "paper_tokens": case.paper_tokens,
            "device": device_in_words(device),
        }
        data = read_text(case.preset, options)  # once: what is tokenised is kept for the runs
        metrics = measured(name, case, options, data.sha256)
        seconds = time.perf_counter() - began
        what = "two_gpus", options.preset, name, config, metrics
        record = new_record(*what, data=data.describe(), device=device, wall_seconds=seconds)
        append(options.records, record, replace=True)


def measured(name: str, case: Case, options: Options, text: str) -> dict:
    """Four runs, and how far their losses are from the first's.

    Args:
        name, case: what is trained.
        options: as in `run`.
        text: its sha256.

    Returns:
        The record's metrics.
    """
    place = options.out / f"two_gpus-{options.preset}-{name}"
    command = Command(name, options, place, case.preset.train.checkpoint_every)
    other = case.other_micro_batch
    begin(place, {"case": repr(case), "data": text, "device": device_in_words(options.device)})
    one, noisy = command.side_by_side({"one": 0, "one-other-sums": other})
    two, resumed = command.whole("two", 2), command.killed("killed")
    curves = [[loss for _, loss, _ in found["curve"]] for found in (one, noisy, two, resumed)]
    noise, apart, after = (furthest(curves[0], curve) for curve in curves[1:])
    rate = case.preset.train.batch_size * case.preset.context
    return {
        "losses": curves[0],
        "noise": noise,
        "two_apart": apart,
        "resumed_apart": after,
        "within_noise": max(apart, after) <= FARTHER * noise + ROUNDING,
        "next_batch": furthest(curves[0][1:], curves[0][:-1]),  # a control: what other batches do to the loss
        "tokens_per_second": [rate / found["step_seconds"] for found in (one, two)],
        "resumed_after": resumed["resumed_after"],
    }


def begin(place: Path, what: dict) -> None:
    """Keep what is there of these runs; of another text, or another machine, it would be taken for theirs, and goes.

    Args:
        place: their folder.
        what: tells them from others.
    """
    file, said = place / "runs.json", json.dumps(what).encode()
    if place.exists() and not (file.exists() and file.read_bytes() == said):
        shutil.rmtree(place)
    write_atomically(file, lambda target: target.write(said))


def furthest(a: list[float], b: list[float]) -> float:
    """The largest difference of two curves, in nats."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Command:
    """Starts runs of one case.

    Args:
        name: of the case.
        options: as in `run`.
        place: a folder for what they leave.
        every: steps between two checkpoints.
    """

    name: str
    options: Options
    place: Path
    every: int

    def start(self, title: str, workers: int, micro_batch: int = 0, gpu: int = 0, lasting: bool = False) -> subprocess.Popen:
        """One run, alone on one of the GPUs or by torchrun; what it says goes into a file.

        Args:
            title: of its folder.
            workers: how many.
            micro_batch: 0 for the preset's.
            gpu: where a worker alone runs.
            lasting: leaves checkpoints.
        """
        folder = self.place / title
        folder.mkdir(parents=True, exist_ok=True)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)] if workers > 1 else []
        kind = torch.device(self.options.device).type
        options = {"preset": self.options.preset, "device": f"cuda:{gpu}" if kind == "cuda" else self.options.device}
        options |= {"micro_batch": micro_batch, "lasting": lasting}
        options |= {"text": self.options.text, "bpe": self.options.bpe, "out": str(self.options.out), "case": self.name}
        tqdm.write(f"{self.name}: {title}, workers {workers}")
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            arguments = [sys.executable, *launcher, "-m", "reproduce.experiments.two_gpus", str(folder), json.dumps(options)]
            return subprocess.Popen(arguments, stdout=log, stderr=log)

    def result(self, title: str) -> Path:
        """Where a run leaves what it found."""
        return self.place / title / "result.json"

    def whole(self, title: str, workers: int, lasting: bool = False) -> dict:
        """What a run found that nobody disturbs; or found before."""
        if not self.result(title).exists():
            self.end(title, self.start(title, workers, lasting=lasting), expected=0)
        return json.loads(self.result(title).read_text(encoding="utf-8"))

    def side_by_side(self, micro_batches: dict[str, int]) -> list[dict]:
        """`whole` of runs of one worker each, on GPUs of their own at the same time.  micro_batches: by title, 0 for the preset's."""
        left = [title for title in micro_batches if not self.result(title).exists()]
        started = {title: self.start(title, 1, micro_batches[title], gpu) for gpu, title in enumerate(left)}
        for process in started.values():
            process.wait()
        for title, process in started.items():
            self.end(title, process, expected=0)
        return [self.whole(title, 1) for title in micro_batches]

    def killed(self, title: str) -> dict:
        """Two workers, one of which is killed; one that is killed; two to the end."""
        folder, after = self.place / title, self.place / f"{title}.json"
        if not self.result(title).exists():
            shutil.rmtree(folder, ignore_errors=True)
            steps = []
            for workers, victim in ((2, "1"), (1, "0")):
                process = self.start(title, workers, lasting=True)
                self.await_checkpoint(title, process, beyond=steps[-1] if steps else 0)
                os.kill(int((folder / f"pid-{victim}").read_text(encoding="utf-8")), signal.SIGKILL)
                self.end(title, process, expected=None)
                steps.append(step_of(folder))
            write_atomically(after, lambda file: file.write(json.dumps(steps).encode()))
        return {**self.whole(title, 2, lasting=True), "resumed_after": json.loads(after.read_text(encoding="utf-8"))}

    def await_checkpoint(self, title: str, process: subprocess.Popen, beyond: int) -> None:
        """Until there is one of a later step.

        Raises:
            ValueError: if the run ends before.
        """
        while step_of(self.place / title) <= beyond:
            if process.poll() is not None:
                self.end(title, process, expected=None)
                raise ValueError(f"{self.name}, {title}: it ended before it was killed; {self.last_words(title)}")
            time.sleep(0.1)

    def end(self, title: str, process: subprocess.Popen, expected: int | None) -> None:
        """Wait until it has ended.

        Raises:
            ValueError: if it did so with another code.
        """
        if process.wait() != expected is not None:
            raise ValueError(f"{self.name}, {title}: a worker failed; {self.last_words(title)}")

    def last_words(self, title: str) -> str:
        """Where a run's output is, and its end: a machine that is lent takes the file with it."""
        log = self.place / title / "log.txt"
        there = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        return "\n".join([f"see {log}", *there[-LAST_LINES:]])


def step_of(folder: Path) -> int:
    """Of a run's last checkpoint; 0 if there is none."""
    path = folder / "checkpoint.pt"
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["step"] if path.exists() else 0


def worker(folder: Path, chosen: dict) -> None:
    """One worker's part of one run; the first leaves what it found in result.json, and at the end no checkpoint.

    Args:
        folder: of the run.
        chosen: as `Command.start` writes it.
    """
    case = PRESETS[chosen["preset"]][chosen["case"]]
    settings, context = case.preset.train, case.preset.context
    options = Options(chosen["preset"], Path(chosen["out"]), folder, text=chosen["text"], bpe=chosen["bpe"])
    with started(chosen["device"], chosen["micro_batch"] or case.preset.micro_batch, case.sharding) as (workers, device):
        (folder / f"pid-{workers.rank}").write_text(str(os.getpid()), encoding="utf-8")
        data = read_text(case.preset, options)
        torch.manual_seed(0)
        with torch.device(device):  # a billion numbers take a CPU many seconds, and every GPU of a kind draws the same
            model = build_model(config_of(case.row, case.model, case.preset, data.vocab_size))
        workers = workers.settled(settings.batch_size, count_parameters([model]))
        at = []

        def batch_at(step: int) -> tuple[torch.Tensor]:
            at.append(time.perf_counter())  # the loss of the step before has been read: nothing is under way
            return (batch_of(data.train, step, 0, settings.batch_size, context, workers.rows(settings.batch_size)),)

        checkpoint = folder / "checkpoint.pt" if chosen["lasting"] else None
        result = train(model, batch_at, LanguageModel.loss, settings, checkpoint, str(folder.name), workers=workers)
        if workers.is_first:
            steps = [after - before for before, after in zip(at, at[1:])]
            found = {"curve": result.curve, "step_seconds": statistics.median(steps), "machines": result.machines}
            write_atomically(folder / "result.json", lambda file: file.write(json.dumps(found).encode()))
            if checkpoint:
                checkpoint.unlink()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), json.loads(sys.argv[2]))
