"""Survival: training, compressing and recording are killed (kill -9) at random moments; nothing may break, and the end must be the same.

After every kill each file that is there must be whole: checkpoints, models, tokens and records. What was killed is started again, and
what it leaves at the end, weights and losses, must equal what an uninterrupted run leaves, to the last bit. Every worker is forked from one
warm process that has imported PyTorch already, so that a hundred kills take minutes.
"""

import dataclasses
import multiprocessing
import os
import random
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..experiments.compress import compress_model
from ..models.rows import Row
from ..report.markdown import markdown
from ..store import records
from ..store.files import write_atomically
from ..store.saved import read_model
from ..train.language import LanguagePreset, model_path, train_rows
from ..train.options import Options
from ..train.public_models import open_model
from ..train.recipes import Recipe
from ..train.settings import TrainConfig

TAKES = ()
PRESETS = {  # kills of each kind
    "smoke": {"training": 40, "compressing": 25, "recording": 35},
    "quick": {"training": 2, "compressing": 1, "recording": 2},
}
SHAPE = {"model": "gpt2", "d_model": 768, "n_heads": 12}
TOY = LanguagePreset(
    narrower=16,
    n_layers=2,
    context=32,
    vocab_size=300,
    validation_tokens=512,
    train=TrainConfig(steps=60, batch_size=4, learning_rate=2e-3, log_every=5, checkpoint_every=5),
)
ROWS = (Row("MHA"), Row("Tucker", ranks=(8, 64, 64)))
APPENDS = 60  # records of each of the two writers
CLOCK = ("wall_seconds", "finished", "command", "commit")  # of a record, what the numbers do not depend on
CONTEXT = multiprocessing.get_context("forkserver")


@dataclass
class Tally:
    """What came of the kills of one kind.

    Args:
        kills: processes that died of SIGKILL.
        ends: finished runs that were compared.
        files: read and found whole after kills.
        parts: temporary files that kills left behind; nothing reads them.
        seconds: of all kills and runs together.
        moments: of the kills, as shares of an uninterrupted run.
    """

    kills: int = 0
    ends: int = 0
    files: int = 0
    parts: int = 0  # temporary files that kills left behind: nothing reads them
    seconds: float = 0.0
    moments: list = field(default_factory=list)  # of the kills, as shares of an uninterrupted run


def run(options: Options) -> None:
    """One record with the counts of every kind.

    Args:
        options: `out` holds the folders of the runs while they last.

    Raises:
        ValueError: at the first file that is damaged or differs.
    """
    CONTEXT.set_forkserver_preload(["reproduce.__main__"])
    options.out.mkdir(parents=True, exist_ok=True)
    tallies, chance, started = {}, random.Random(0), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.out, prefix="survival-") as place:
        text = Path(place) / "text"
        text.mkdir()
        for n in range(20):
            (text / f"{n:02}.txt").write_text("".join(f"{n} times {k} makes {n * k}.\n" for k in range(60)), encoding="utf-8")
        for kind, kills in PRESETS[options.preset].items():
            tallies[kind] = KINDS[kind](Path(place), kills, chance)
            print(
                f"{kind}: {tallies[kind].kills} kills survived, {tallies[kind].files} files read, {tallies[kind].seconds:.0f} s"
            )
    config = {"kills": PRESETS[options.preset], "seed": 0, "steps": TOY.train.steps, "appends": APPENDS}
    metrics = {kind: dataclasses.asdict(tally) for kind, tally in tallies.items()}
    print(table(metrics))
    record = records.new_record(
        "survival", options.preset, "kill -9", config, metrics, wall_seconds=time.perf_counter() - started
    )
    records.append(options.records, record, replace=True)


def table(metrics: dict) -> str:
    """Markdown: one line per kind, and the sum.

    Args:
        metrics: of the record, a `Tally` as a dictionary by kind.
    """
    columns = ("kills", "ends", "files", "parts")
    rows = [[kind, *(f"{tally[c]:,}" for c in columns)] for kind, tally in metrics.items()]
    rows.append(["together", *(f"{sum(tally[c] for tally in metrics.values()):,}" for c in columns)])
    header = [
        "killed while",
        "kills survived",
        "ends equal to an uninterrupted run",
        "files read after kills",
        "unread parts left",
    ]
    return markdown(header, rows)


def survive(work: Callable, folder: Path, kills: int, chance: random.Random, same: Callable[[Path, Path], None]) -> Tally:
    """Kill a run so many times, start it again each time, and compare every finished folder with an untouched one.

    Args:
        work: called with its folder, which it completes from whatever it finds there.
        folder: of all attempts.
        kills: how many.
        chance: decides the moments.
        same: called with the untouched folder and a finished one; raises ValueError where they differ.

    Raises:
        ValueError: for a damaged file, a difference, or a run that failed without being killed.
    """
    tally, started = Tally(), time.perf_counter()
    untouched = folder / "whole"
    finish(start(check_files, folder))  # the first worker waits until the process is warm
    begun = time.perf_counter()
    finish(start(work, untouched))
    length = time.perf_counter() - begun
    attempt = folder / "0"
    while True:
        begun, moment = time.perf_counter(), chance.random()
        process = start(work, attempt)
        if tally.kills < kills:
            process.join(moment * length)
            process.kill()
            process.join()
            if process.exitcode == -signal.SIGKILL:
                tally.kills += 1
                tally.moments.append(round(moment, 3))
                tally.files += check_files(attempt)
                continue
        finish(process)
        length = min(length, time.perf_counter() - begun)
        same(untouched, attempt)
        tally.files += check_files(attempt)
        tally.parts += len(list(attempt.rglob("*.part")))
        tally.ends += 1
        if tally.kills == kills:
            tally.seconds = round(time.perf_counter() - started, 1)
            return tally
        attempt = folder / str(tally.ends)


def start(work: Callable, *arguments) -> multiprocessing.Process:
    """A worker of the warm process.

    Args:
        work: what it calls, quietly.
        arguments: of the call.
    """
    process = CONTEXT.Process(target=quietly, args=(work, *arguments))
    process.start()
    return process


def finish(process: multiprocessing.Process) -> None:
    """Wait for a worker that nobody kills.

    Raises:
        ValueError: if it failed.
    """
    process.join()
    if process.exitcode != 0:
        raise ValueError(f"a run that was not killed ended with exit status {process.exitcode}")


def quietly(work: Callable, *arguments) -> None:
    """Without progress bars, and with one thread: what is compared to the last bit must not depend on how work is shared out."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    work(*arguments)


def check_files(folder: Path) -> int:
    """Read every file of a folder whole.

    Args:
        folder: with its subfolders.

    Returns:
        How many files were read.

    Raises:
        ValueError: naming the file, if one cannot be read.
    """
    readers = {
        "*.pt": lambda path: torch.load(path, weights_only=True),
        "*.safetensors": read_model,
        "*.json": lambda path: records.load(path.parent),
        "*.npz": lambda path: dict(np.load(path)),
    }
    count = 0
    for pattern, read in readers.items():
        for path in folder.rglob(pattern):
            whole(read, path)
            count += 1
    return count


def whole(read: Callable, path: Path):
    """What a reader makes of a file or folder.

    Args:
        read: called with the path.
        path: of the file or folder.

    Raises:
        ValueError: naming it, if it cannot be read.
    """
    try:
        return read(path)
    except Exception as error:
        raise ValueError(f"after a kill {path} cannot be read: {error}") from error


def options_of(folder: Path, **more) -> Options:
    """Options of a run in this folder, on the text that lies in a folder above it.

    Args:
        folder: of the run.
        more: other fields of `Options`.
    """
    text = str(next(parent for parent in folder.parents if (parent / "text").exists()) / "text")
    return Options("smoke", folder, folder / "records", text=text, **more)


def train(folder: Path) -> None:
    """Two toy models one after the other, as table2 trains its rows: tokens, checkpoints, model files and records."""
    train_rows("table2", [(row, Recipe()) for row in ROWS], SHAPE, TOY, options_of(folder))


def compress(folder: Path) -> None:
    """The toy model's attention compressed and saved, where an older result stands already."""
    model = next(parent for parent in folder.parents if (parent / "text").exists()) / "training" / "whole"
    model = model_path(model, "table2 MHA seed 0")
    folder.mkdir(parents=True, exist_ok=True)
    options = options_of(folder, model=str(model), ranks=((8, 4, 4),), save=folder / "small.safetensors")
    if not options.save.exists():
        write_atomically(options.save, lambda file: file.write(model.read_bytes()))
    compress_model(open_model(options.model), options)


def training(place: Path, kills: int, chance: random.Random) -> Tally:
    """Kill the training of two toy models.

    Args:
        place: a folder with `text` in it.
        kills: how many.
        chance: decides the moments.
    """
    return survive(train, place / "training", kills, chance, same_files)


def compressing(place: Path, kills: int, chance: random.Random) -> Tally:
    """Kill the compression of a toy model, which `training` has left there.

    Args:
        place: the folder that `training` had.
        kills: how many.
        chance: decides the moments.
    """
    return survive(compress, place / "compressing", kills, chance, same_files)


def recording(place: Path, kills: int, chance: random.Random, writer: Callable | None = None) -> Tally:
    """Two writers on one file, one of them killed. What a writer knows to be recorded must still be there, each record once.

    Args:
        place: a folder.
        kills: how many.
        chance: decides who is killed, and when.
        writer: what writes, in place of `write_records`.

    Raises:
        ValueError: if a record is lost or there twice, or a writer failed without being killed.
    """
    writer = write_records if writer is None else writer
    tally, started, folder = Tally(), time.perf_counter(), place / "recording"
    example = records.new_record("table2", "smoke", "MHA", {}, {})
    while tally.kills < kills:
        attempt = folder / str(tally.ends)
        known = [CONTEXT.RawValue("i", 0) for _ in range(2)]  # records that are surely on disk
        turns = [CONTEXT.RawValue("i", 0) for _ in range(2)]  # appends of the process that runs now
        writers = [start(writer, attempt, example, n, known[n], turns[n]) for n in range(2)]
        while any(known_of.value < APPENDS for known_of in known):
            victim = chance.randrange(2)
            while turns[victim].value == 0 and writers[victim].is_alive():
                time.sleep(0.001)
            time.sleep(chance.random() * 0.02)
            if tally.kills < kills:
                writers[victim].kill()
            writers[victim].join(timeout=None if tally.kills < kills else 0.01)
            if writers[victim].exitcode == -signal.SIGKILL:
                tally.kills += 1
                tally.moments.append(round(known[victim].value / APPENDS, 3))
                tally.files += check_files(attempt)
                kept = {r.seed for r in whole(records.load, attempt) if r.method == f"writer {victim}"}
                if not set(range(known[victim].value)) <= kept:
                    raise ValueError(f"{attempt}: writer {victim} lost a record when it was killed")
                turns[victim].value = 0
                writers[victim] = start(writer, attempt, example, victim, known[victim], turns[victim])
            elif writers[victim].exitcode not in (None, 0):
                raise ValueError(f"{attempt}: writer {victim} failed; the file was damaged")
        for process in writers:
            finish(process)
        written = sorted((r.method, r.seed) for r in records.load(attempt))
        if written != [(f"writer {n}", seed) for n in range(2) for seed in range(APPENDS)]:
            raise ValueError(f"{attempt}: {len(written)} records, where each of {2 * APPENDS} should stand once")
        tally.ends += 1
        tally.parts += len(list(attempt.rglob("*.part")))
    tally.seconds = round(time.perf_counter() - started, 1)
    return tally


def write_records(folder: Path, example: records.Record, writer: int, known, turns) -> None:
    """Append APPENDS records, the last one again that is there already.

    Args:
        folder: of the records.
        example: what they are but for id, method and seed.
        writer: its number.
        known: shared with the killer: how many records are surely on disk.
        turns: shared with the killer: appends that were begun.
    """
    for seed in range(max(0, known.value - 1), APPENDS):
        turns.value += 1
        records.append(folder, dataclasses.replace(example, id=f"{writer}-{seed}", method=f"writer {writer}", seed=seed))
        known.value = max(known.value, seed + 1)


KINDS = {"training": training, "compressing": compressing, "recording": recording}


def same_files(expected: Path, actual: Path) -> None:
    """Compare two folders to the last bit, but for the time of day and the speed.

    Args:
        expected: what an uninterrupted run left.
        actual: what the killed one left at its end.

    Raises:
        ValueError: naming what differs.
    """

    def content(path: Path):
        if path.suffix == ".safetensors":  # its header lists the metadata in any order
            metadata, tensors = read_model(path)
            return metadata, {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items()}
        kept = []
        for record in records.load(path.parent):
            metrics = {name: value for name, value in record.metrics.items() if name != "tokens_per_second"}
            kept.append({name: value for name, value in vars(record).items() if name not in CLOCK} | {"metrics": metrics})
        return kept

    both = [
        {path.relative_to(folder): content(path) for path in folder.rglob("*") if path.suffix in (".safetensors", ".json")}
        for folder in (expected, actual)
    ]
    if both[0].keys() != both[1].keys():
        raise ValueError(f"{actual} holds {sorted(map(str, both[1]))}, not {sorted(map(str, both[0]))}")
    for path, expected_content in both[0].items():
        if both[1][path] != expected_content:
            raise ValueError(f"{actual / path} differs from what an uninterrupted run leaves")
