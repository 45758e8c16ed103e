"""Survival: every command that writes is killed (kill -9), meets a full disk or Ctrl-C at random moments; nothing may break.

After each of these every file that is there must be whole: checkpoints, models, tokens, records, pages and figures. A full disk must
be said in one line that names a file, Ctrl-C in one line at most, with exit status 130. What was stopped is started again, and what
it leaves at the end must equal what an uninterrupted run leaves, to the last bit. Beside that, two processes write records into one
file and one of them is killed.

Commands run whole, as `python -m reproduce` runs them, on toy models: every worker is forked from one warm process that has imported
PyTorch already, so that three hundred of them take minutes. Left out are those that test the code, and four that write as others
do: `compress_speed`, `generation_speed` and `heal` take up to a minute a run however small the model, and `two_gpus` needs two GPUs and
kills its own workers.
"""

import dataclasses
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .. import console
from ..data import prepared
from ..data.text import load_text
from ..experiments import ablations, decode, exactness, figure3, table2, table3
from ..models.rows import Row
from ..report import pages
from ..report.markdown import markdown
from ..store import records
from ..store.saved import read_model
from ..train.language import LanguagePreset
from ..train.options import Options
from ..train.settings import TrainConfig

TAKES = ()
KILL, FULL, INTERRUPT = "kills", "full_disks", "interrupts"
FAULTS = (KILL, FULL, INTERRUPT)
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
TIMED = ("decode", "speed")  # experiments whose numbers are times
CONTEXT = multiprocessing.get_context("forkserver")
BEGUN = "begun\n"
PATIENCE = 300  # seconds for a run of toys, on a machine however busy
WRITERS = "two writers of one file"
COMMANDS = {  # as they are typed, in a folder of their own; {0} is the one with what they read
    "table2": "table2 --rows MHA --text {0}/text --out . --records records",
    "table3": "table3 --rows MHA --text {0}/text --out . --records records",
    "ablations": "ablations --rows 'init xavier' --text {0}/text --out . --records records",
    "figure3": "figure3 --device cpu --out . --records records",
    "spectra": "spectra --model {0}/model.safetensors --out . --records records",
    "compress": "compress --model {0}/model.safetensors --text {0}/text --ranks 8,4,4 --save small.safetensors --out . --records records",
    "compress_models": "compress_models --model {0}/model.safetensors --text {0}/text --test {0}/unseen.txt --out . --records records",
    "table1": "table1 --out . --records records",
    "exactness": "exactness --out . --records records",
    "theorems": "theorems --out . --records records",
    "decode": "decode --rows MHA --out . --records records",
    "speed": "speed --rows limits --out . --records records",
    "prepare": "prepare letters --files {0}/letters.jsonl --bpe {0}/bpe --out .",
    "prepare --validation": "prepare text --files {0}/text --validation {0}/unseen.txt --bpe {0}/bpe --out .",
    "report": "report --records {0}/records --write page.md",
    "claims": "claims --records {0}/records --write page.md",
    "paper_figures": "paper_figures --records {0}/records --out .",
}
SELDOM = ("table1", "exactness", "theorems", "speed")  # they write one small record, at the end
OFTEN = ("table2", "figure3", "compress", "prepare", "prepare --validation", "paper_figures")  # they write more than one record
PRESETS = {  # how often each command meets each fault; a hundred of each
    "smoke": {
        **{
            name: {KILL: 6, FULL: 10, INTERRUPT: 10} if name in OFTEN else dict.fromkeys(FAULTS, 3 if name in SELDOM else 4)
            for name in COMMANDS
        },
        WRITERS: {KILL: 24},
    },
    "quick": {name: dict.fromkeys(FAULTS, 1) for name in ("table2", "compress_models", "prepare --validation", "report")}
    | {WRITERS: {KILL: 2}},
}


@dataclass
class Tally:
    """What came of the faults that one command met.

    Args:
        kills, full_disks, interrupts: how often it met each fault.
        ends: finished runs that were compared.
        files: read and found whole after faults.
        parts: temporary files that kills left behind; nothing reads them.
        seconds: of all runs together.
        moments: of the faults, as shares of an uninterrupted run.
    """

    kills: int = 0
    full_disks: int = 0
    interrupts: int = 0
    ends: int = 0
    files: int = 0
    parts: int = 0
    seconds: float = 0.0
    moments: list = field(default_factory=list)

    def count(self, fault: str, moment: float) -> None:
        """One more of these, at this share of a run."""
        setattr(self, fault, getattr(self, fault) + 1)
        self.moments.append(round(moment, 3))


def run(options: Options) -> None:
    """One record with the counts of every command.

    Args:
        options: `out` holds the folders of the runs while they last.

    Raises:
        ValueError: at the first file that is damaged or differs, or the first message that is not as it should be.
    """
    CONTEXT.set_forkserver_preload(["reproduce.__main__", "paper_figures.__main__", "datasets", "sklearn.datasets"])
    options.out.mkdir(parents=True, exist_ok=True)
    tallies, chance, started = {}, random.Random(0), time.perf_counter()
    with tempfile.TemporaryDirectory(dir=options.out, prefix="survival-") as temporary:
        place = Path(temporary).resolve()
        make_what_is_read(place)
        for name, points in PRESETS[options.preset].items():
            if name == WRITERS:
                tallies[name] = recording(place, points[KILL], chance)
            else:
                faults = [fault for fault, count in points.items() for _ in range(count)]
                chance.shuffle(faults)
                work = functools.partial(command, shlex.split(COMMANDS[name].format(place)))
                tallies[name] = survive(work, place / name.replace(" ", ""), faults, chance, same_files)
            print(f"{name}: {sum(points.values())} faults, {tallies[name].files} files read, {tallies[name].seconds:.0f} s")
    config = {"points": PRESETS[options.preset], "seed": 0, "steps": TOY.train.steps, "appends": APPENDS}
    metrics = {name: dataclasses.asdict(tally) for name, tally in tallies.items()}
    print(table(metrics))
    record = records.new_record(
        "survival", options.preset, "every command", config, metrics, wall_seconds=time.perf_counter() - started
    )
    records.append(options.records, record, replace=True)


def table(metrics: dict) -> str:
    """Markdown: one line per command, and the sum.

    Args:
        metrics: of the record, a `Tally` as a dictionary by command.
    """
    columns = (*FAULTS, "ends", "files", "parts")
    rows = [[name, *(f"{tally[c]:,}" for c in columns)] for name, tally in metrics.items()]
    rows.append(["together", *(f"{sum(tally[c] for tally in metrics.values()):,}" for c in columns)])
    header = [
        "command",
        "kills",
        "full disks",
        "interrupts",
        "ends equal to an uninterrupted run",
        "files read after them",
        "unread parts left",
    ]
    return markdown(header, rows)


def survive(
    work: Callable, folder: Path, faults: list[str], chance: random.Random, same: Callable[[Path, Path], None]
) -> Tally:
    """Stop a run so many times, start it again each time, and compare every finished folder with an untouched one.

    Args:
        work: called with its folder, which it completes from whatever it finds there.
        folder: of all attempts.
        faults: of FAULTS, one after the other.
        chance: decides the moments.
        same: called with the untouched folder and a finished one; raises ValueError where they differ.

    Raises:
        ValueError: for a damaged file, a difference, a message that is not as it should be, or a run that failed untouched.
    """
    tally, started, waiting = Tally(), time.perf_counter(), list(faults)
    untouched = folder / "whole"
    finish(start(check_files, folder))  # the first worker waits until the process is warm
    make_what_is_replaced(untouched)
    length = finish(start(work, untouched))
    attempt = folder / "0"
    while True:
        make_what_is_replaced(attempt)
        before, moment, process = set(attempt.rglob("*.part")), chance.random(), start(work, attempt)
        if waiting:
            time.sleep(moment * length)
            strike(process, waiting[0], chance)
            await_end(process)
            if process.exitcode != 0:
                fault = waiting.pop(0)
                check_end(fault, process)
                if fault != KILL and (left := set(attempt.rglob("*.part")) - before):
                    raise ValueError(f"one of the {fault} left {', '.join(map(str, left))} behind")
                tally.count(fault, moment)
                tally.files += check_files(attempt)
                continue
        length = min(length, finish(process))
        same(untouched, attempt)
        tally.files += check_files(attempt)
        tally.parts += len(list(attempt.rglob("*.part")))
        tally.ends += 1
        if not waiting:
            tally.seconds = round(time.perf_counter() - started, 1)
            return tally
        if tally.ends > 20 * (len(faults) + 1):
            raise ValueError(f"{tally.ends} runs ended, and the {waiting[0]} did not stop one")
        attempt = folder / str(tally.ends)


def start(work: Callable, *arguments) -> multiprocessing.Process:
    """A worker of the warm process, which has begun.

    Args:
        work: what it calls.
        arguments: of the call.

    Returns:
        The process; `said` is the pipe with its stderr, `began` the time.
    """
    said, theirs = CONTEXT.Pipe(duplex=False)
    process = CONTEXT.Process(target=quietly, args=(theirs, work, *arguments))
    process.start()
    theirs.close()
    said.poll(None)  # until its work begins, or it is gone
    process.said, process.began = said, time.perf_counter()
    return process


def errors(process: multiprocessing.Process) -> str:
    """All that a worker said on stderr; to be asked once, after its end."""
    said = b""
    while chunk := os.read(process.said.fileno(), 1 << 16):
        said += chunk
    process.said.close()
    return said.decode().removeprefix(BEGUN)


def finish(process: multiprocessing.Process) -> float:
    """Wait for a worker that nothing stops.

    Returns:
        How many seconds it took.

    Raises:
        ValueError: if it failed.
    """
    await_end(process)
    if process.exitcode != 0:
        raise ValueError(f"a run that was not killed ended with exit status {process.exitcode}, saying: {errors(process)}")
    return time.perf_counter() - process.began


def await_end(process: multiprocessing.Process) -> None:
    """Wait for a worker, but not for ever.

    Raises:
        ValueError: if it did not end by itself.
    """
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        raise ValueError(f"a run did not end within {PATIENCE} s, whether it was stopped or not")


def strike(process: multiprocessing.Process, fault: str, chance: random.Random) -> None:
    """Let a worker meet a fault now, if it still runs.

    Args:
        process: of `start`.
        fault: of FAULTS.
        chance: decides how many bytes of a file the full disk still takes.
    """
    try:
        if fault == FULL:
            room = 64 + int(4000 * chance.random() ** 3)  # the limit counts shared memory too, where libraries keep a number
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
        else:
            os.kill(process.pid, signal.SIGKILL if fault == KILL else signal.SIGINT)
    except ProcessLookupError:
        pass


def check_end(fault: str, process: multiprocessing.Process) -> None:
    """How a worker ends after a fault, and what it says.

    Raises:
        ValueError: with what it said, if it is not that.
    """
    status, said = process.exitcode, errors(process)
    lines = said.strip().splitlines()
    as_it_should = {
        KILL: status == -signal.SIGKILL,
        FULL: status == 1 and len(lines) == 1 and lines[0].startswith("error: [Errno 27] cannot be written: File too large: '"),
        INTERRUPT: status == console.INTERRUPTED and len(lines) <= 1,
    }
    if not as_it_should[fault]:
        raise ValueError(f"one of the {fault} ended with exit status {status}, saying: {said}")


def quietly(said, work: Callable, *arguments) -> None:
    """Without progress bars, and with one thread: what is compared to the last bit must not depend on how work is shared out."""
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(said.fileno(), 2)
    said.close()
    sys.stdout, sys.stderr = (open(n, "w", encoding="utf-8", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell lets its background jobs ignore
    console.leave_at_once()  # as every program does that answers Ctrl-C
    os.write(2, BEGUN.encode())
    work(*arguments)


def command(arguments: list[str], folder: Path) -> None:
    """A whole command, on toy models, in its folder.

    Args:
        arguments: as they are typed.
        folder: where it writes, with what it replaces.
    """
    make_small()
    os.chdir(folder)
    is_figures = arguments[0] == "paper_figures"
    sys.argv = arguments if is_figures else ["reproduce", *arguments]
    sys.exit(importlib.import_module("paper_figures.__main__" if is_figures else "reproduce.__main__").main())


def make_small() -> None:
    """The presets of this process, as toys."""
    toy = dataclasses.replace(TOY, n_layers=1, train=dataclasses.replace(TOY.train, steps=20))
    table2.PRESETS["smoke"] = toy
    table3.PRESETS["smoke"] = dataclasses.replace(toy, narrower=32)
    ablations.PRESETS["smoke"] = dataclasses.replace(toy, keep_models=False)
    full, often = figure3.PRESETS["smoke"], {"warmup_steps": 1, "log_every": 2, "checkpoint_every": 2}
    figure3.PRESETS["smoke"] = dataclasses.replace(
        full,
        d_model=16,
        n_heads=4,
        n_layers=1,
        rows=full.rows[1:2],
        seeds=(0,),
        epochs=1,
        pretrain=dataclasses.replace(full.pretrain, steps=8, **often),
        finetune=dataclasses.replace(full.finetune, batch_size=256, **often),
    )
    decode.PRESETS["smoke"] = dataclasses.replace(decode.PRESETS["smoke"], contexts=(16, 32), repeats=2)
    cells = exactness.cells
    exactness.cells = lambda: itertools.islice(cells(), 5)
    prepared.AT_ONCE = 100


def make_what_is_read(place: Path) -> None:
    """Texts, byte pairs, a model and records.

    Args:
        place: the folder for them.
    """
    (place / "text").mkdir()
    for n in range(21):
        lines = "".join(f"{n} times {k} makes {n * k}.\n" for k in range(60))
        (place / (f"text/{n:02}.txt" if n < 20 else "unseen.txt")).write_text(lines, encoding="utf-8")
    letters = (json.dumps({"text": f"Letter {n}: {n * n} sold."}) for n in range(2 * prepared.HELD_OUT))
    (place / "letters.jsonl").write_text("\n".join(letters), encoding="utf-8")
    learned = json.loads(load_text(str(place / "text"), TOY.vocab_size, place / "cache").tokenizer)["model"]
    (place / "bpe").mkdir()
    (place / "bpe" / "vocab.json").write_text(json.dumps(learned["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in learned["merges"])
    (place / "bpe" / "merges.txt").write_text(f"#version: 0.2\n{merges}", encoding="utf-8")
    make_what_is_replaced(place / "made")
    for name in ("table2", "table1", "decode"):
        finish(start(functools.partial(command, shlex.split(COMMANDS[name].format(place))), place / "made"))
    shutil.copy(next((place / "made" / "models").iterdir()), place / "model.safetensors")
    (place / "records").mkdir()
    for record in place.glob("made/records/*.sizes.json"), place.glob("made/records/decode.*.json"):
        shutil.copy(next(record), place / "records")


def make_what_is_replaced(folder: Path) -> None:
    """A page to write into, unless it is there.

    Args:
        folder: is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "page.md").exists():
        begin, end = (mark.format("results") for mark in pages.MARK)
        (folder / "page.md").write_text(f"{begin}\n{end}\n", encoding="utf-8")


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
        "*.json": lambda path: (json.loads(path.read_text(encoding="utf-8")), records.load(path.parent)),
        "*.npz": lambda path: dict(np.load(path)),
        "*.png": lambda path: Image.open(path).load(),
        "*.md": lambda path: pages.MARKS.search(path.read_text(encoding="utf-8")).group(),
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
    except Exception as error:  # whatever a reader raises, the file is the finding
        raise ValueError(f"after a kill {path} cannot be read: {error}") from error


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
        writers = [start(writer, attempt, example, n, known[n]) for n in range(2)]
        while any(known_of.value < APPENDS for known_of in known):
            victim = chance.randrange(2)
            time.sleep(chance.random() * 0.02)
            if tally.kills < kills:
                writers[victim].kill()
            writers[victim].join(timeout=None if tally.kills < kills else 0.01)
            if writers[victim].exitcode == -signal.SIGKILL:
                tally.count(KILL, known[victim].value / APPENDS)
                tally.files += check_files(attempt)
                kept = {r.seed for r in whole(records.load, attempt) if r.method == f"writer {victim}"}
                if not set(range(known[victim].value)) <= kept:
                    raise ValueError(f"{attempt}: writer {victim} lost a record when it was killed")
                writers[victim] = start(writer, attempt, example, victim, known[victim])
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


def write_records(folder: Path, example: records.Record, writer: int, known) -> None:
    """Append APPENDS records, the last one again that is there already.

    Args:
        folder: of the records.
        example: what they are but for id, method and seed.
        writer: its number.
        known: shared with the killer: how many records are surely on disk.
    """
    for seed in range(max(0, known.value - 1), APPENDS):
        records.append(folder, dataclasses.replace(example, id=f"{writer}-{seed}", method=f"writer {writer}", seed=seed))
        known.value = max(known.value, seed + 1)


KEPT_BYTES = ("tokens.json", "tokenizer.json", ".bin", ".png", ".md")
RATES = ("tokens_per_second", "images_per_second")
SUFFIXES = (".safetensors", ".json", ".bin", ".png", ".md")


def same_files(expected: Path, actual: Path) -> None:
    """Compare two folders to the last bit, but for the time of day and the speed.

    Args:
        expected: what an uninterrupted run left.
        actual: what the killed one left at its end.

    Raises:
        ValueError: naming what differs.
    """

    def content(path: Path):
        if path.name in KEPT_BYTES or path.suffix in KEPT_BYTES:
            return path.read_bytes()
        if path.suffix == ".safetensors":  # its header lists the metadata in any order
            metadata, tensors = read_model(path)
            return metadata, {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items()}
        kept = []
        for record in records.load(path.parent):
            is_timed = record.experiment in TIMED
            metrics = {name: is_timed or value for name, value in record.metrics.items() if name not in RATES}
            kept.append({name: value for name, value in vars(record).items() if name not in CLOCK} | {"metrics": metrics})
        return kept

    both = [
        {path.relative_to(folder): content(path) for path in folder.rglob("*") if path.suffix in SUFFIXES}
        for folder in (expected, actual)
    ]
    if both[0].keys() != both[1].keys():
        raise ValueError(f"{actual} holds {sorted(map(str, both[1]))}, not {sorted(map(str, both[0]))}")
    for path, expected_content in both[0].items():
        if both[1][path] != expected_content:
            raise ValueError(f"{actual / path} differs from what an uninterrupted run leaves")
