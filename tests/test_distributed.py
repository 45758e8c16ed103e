"""Several workers train the model that one trains: the same losses by every way to share the work, and after any crash."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import workers as toy
from helpers import times_tables

from reproduce.experiments import table2
from reproduce.store import records
from reproduce.train.distributed import Workers, started
from reproduce.train.options import Options

ROOT = Path(__file__).parent.parent
PROGRAM = str(ROOT / "tests" / "workers.py")
# Largest relative difference of a step's loss: rounding alone in float64, the sums' other order in float32.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-6}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def furthest(curve, expected) -> float:
    assert len(curve) == len(expected)
    return max(abs(a - b) / b for a, b in zip(curve, expected))


def torchrun(arguments, warm, **environment: str) -> subprocess.Popen:
    """Two workers; where they meet is torchrun's to find: it listens on a free port at once, and tells them which."""
    launcher = [warm.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", PROGRAM]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
    environment = {**ENVIRONMENT, **environment, "PYTHON_EXEC": warm.python}  # with which torchrun starts its workers
    return subprocess.Popen([*launcher, *map(str, arguments)], env=environment, cwd=ROOT, **pipes)


def succeeded(process, seconds: float) -> tuple[str, str]:
    """What a program that must succeed in time wrote; if it does not, the failure shows all errors of all workers."""
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its workers, who would keep the pipes open
        raise AssertionError(f"not done in {seconds} s: {process.communicate()[1]}") from None
    assert process.returncode == 0, errors
    return output, errors


@pytest.mark.parametrize("last, seconds, how", [("ends", 300, ""), ("waits", 0.1, "not done in 0.1 s")])
def test_a_failure_shows_all_that_the_workers_wrote(warm, tmp_path, last, seconds, how):
    process, deadline = torchrun(["wordy", last, tmp_path], warm), time.time() + 200
    while len(list(tmp_path.iterdir())) < 2 and time.time() < deadline:
        time.sleep(0.02)
    with pytest.raises(AssertionError) as failure:
        succeeded(process, seconds)
    written = {line.strip() for line in str(failure.value).splitlines()}
    assert how in str(failure.value) and {f"{rank} says {n}" for rank in (0, 1) for n in range(1000)} <= written


@pytest.fixture(scope="module")
def folder(tmp_path_factory, warm):
    """What two processes trained, beginning with a checkpoint that one left behind."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.raises(toy.Stopped):
        toy.run(Workers(), torch.float64, folder / "alone.pt", stop=14)
    succeeded(torchrun(["together", folder], warm), 300)
    return folder


@pytest.fixture(scope="module")
def curves(folder):
    return json.loads((folder / "curves.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return {dtype: toy.run(Workers(), dtype, folder / f"{dtype}.pt") for dtype in BOUND}


@pytest.mark.parametrize("dtype", BOUND)
def test_two_workers_take_the_steps_of_one(curves, alone, dtype):
    expected = alone[dtype]
    assert expected[-1] < 0.9 * expected[0]  # it learns: the later losses depend on the earlier steps
    for sharding in ("ddp", "fsdp"):
        for micro_batch in (None, 2):
            assert furthest(curves[f"{dtype} {sharding} {micro_batch}"], expected) < BOUND[dtype]


@pytest.mark.parametrize("dtype", BOUND)
def test_accumulated_gradients_are_those_of_the_whole_batch(alone, tmp_path, dtype):
    curve = toy.run(Workers(micro_batch=2), dtype, tmp_path / "c.pt")
    assert furthest(curve, alone[dtype]) < BOUND[dtype]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_compiled_blocks_can_be_shared_too(curves, alone, sharding):
    assert furthest(curves[f"compiled {sharding}"], alone[torch.float64]) < BOUND[torch.float64]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_queries_can_be_made_again_by_several_workers(curves, alone, sharding):
    assert furthest(curves[f"again {sharding}"], alone[torch.float64]) < BOUND[torch.float64]


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_muon_takes_the_same_steps_whoever_shares_the_work(curves, alone, tmp_path, sharding):
    """Its matrices must be whole to be made orthogonal, wherever their parts lie."""
    expected = toy.run(Workers(), torch.float64, tmp_path / "muon.pt", muon=True)
    assert furthest(curves[f"muon {sharding}"], expected) < 1e-11  # the iteration steepens rounding by 3.4^5
    assert furthest(alone[torch.float64], expected) > 1e-3  # control: AdamW's steps are others


@pytest.mark.parametrize("fault", ["wrong rows", "not averaged"])
def test_workers_that_do_not_work_together_are_found_out(curves, alone, fault):
    """Controls for the two tests above."""
    assert furthest(curves[fault], alone[torch.float64]) > 1e-3


def test_a_checkpoint_serves_any_number_of_workers(folder, curves, alone):
    whole = alone[torch.float64]
    assert furthest(curves["alone, then fsdp"], whole[12:]) < 1e-12  # stopped in step 14, kept after 12
    kept = torch.load(folder / "fsdp.pt", weights_only=True)
    assert kept["step"] == 12 and all(type(tensor) is torch.Tensor for tensor in kept["model"].values())
    assert furthest(toy.run(Workers(), torch.float64, folder / "fsdp.pt"), whole[12:]) < 1e-12
    assert furthest(whole[:7], whole[12:]) > 1e-3  # control


def test_workers_that_do_not_see_one_checkpoint_are_told_so(curves):
    assert re.fullmatch(r".*alone.pt is not the same file for all workers; they need one folder for --out", curves["apart"])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return times_tables(tmp_path_factory.mktemp("text"))


def arguments(text, folder) -> list[str]:
    places = ["--text", str(text), "--out", str(folder), "--records", str(folder / "records")]
    return ["table2", "--device", "cpu", "--rows", "Tucker [8,64,64]", *places]


def table2_by_two(text, folder, warm) -> subprocess.Popen:
    folder.mkdir(exist_ok=True)
    return torchrun(arguments(text, folder), warm, PIDS=str(folder))


def pids(folder) -> list[int]:
    return [int((folder / rank).read_text(encoding="utf-8")) for rank in ("0", "1")]


def await_checkpoint(folder, process, since: float = 0.0) -> float:
    """When the next checkpoint was written."""
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None:
        for path in folder.glob("checkpoints/*.pt"):
            if (written := path.stat().st_mtime) > since:
                return written
        time.sleep(0.02)
    raise AssertionError(f"no checkpoint: {process.communicate()[1]}")


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def in_this_process(text, folder, monkeypatch) -> dict:
    """The record of the same run by one worker."""
    monkeypatch.setitem(table2.PRESETS, "smoke", toy.TOY)
    table2.run(Options("smoke", folder, folder / "records", rows=("Tucker [8,64,64]",), text=str(text)))
    return only_record(folder)


def only_record(folder) -> records.Record:
    (record,) = records.load(folder / "records", "table2", "smoke")
    return record


def assert_same_run(record, expected, workers: int) -> None:
    assert record.id == expected.id and record.metrics["workers"]["workers"] == workers
    assert record.metrics["workers"]["global_batch"] == 8
    assert record.metrics["validation_loss"] == pytest.approx(expected.metrics["validation_loss"], rel=1e-6)
    for mine, theirs in zip(record.metrics["curve"], expected.metrics["curve"], strict=True):
        assert mine == pytest.approx(theirs, abs=2e-4)  # rounded in the record


def test_killed_workers_leave_a_run_that_any_number_of_workers_finish(text, tmp_path, monkeypatch, warm):
    expected = in_this_process(text, tmp_path / "whole", monkeypatch)
    assert expected.metrics["validation_loss"] < 0.8 * expected.metrics["curve"][0][1]  # it learned

    killed = tmp_path / "killed"
    process = table2_by_two(text, killed, warm)
    written = await_checkpoint(killed, process)
    os.kill(pids(killed)[1], signal.SIGKILL)  # one worker
    process.communicate(timeout=100)
    assert process.returncode != 0 and not any(map(is_alive, pids(killed)))  # torchrun ended the other
    assert not records.load(killed / "records", preset="smoke")
    stopped = tmp_path / "stopped"
    shutil.copytree(killed, stopped)

    process = table2_by_two(text, killed, warm)  # the same command
    output, errors = succeeded(process, 200)
    assert " 0/150" not in errors  # it did not start again
    assert output.count("records are in") == 1  # the first worker alone speaks
    assert_same_run(only_record(killed), expected, workers=2)

    process = table2_by_two(text, stopped, warm)
    await_checkpoint(stopped, process, since=written)
    for pid in (process.pid, *pids(stopped)):  # all at once
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=100)
    assert not records.load(stopped / "records", preset="smoke")
    assert_same_run(in_this_process(text, stopped, monkeypatch), expected, workers=1)
    assert not list(stopped.glob("checkpoints/*.pt"))
    in_this_process(text, stopped, monkeypatch)  # on record already: still one


def test_the_gpu_that_is_named_is_the_one_that_is_timed(monkeypatch):
    """Events and memory counters of torch.cuda are of the current GPU."""
    current = ["cuda:0"]

    @contextmanager
    def chosen(device):
        current.append(device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", chosen)
    for device, expected in (("cuda:1", "cuda:1"), ("cpu", "cuda:0")):  # control: a CPU chooses no GPU
        with started(device) as (workers, place):
            assert (workers.count, place, current[-1]) == (1, device, expected)
        assert current == ["cuda:0"]


def test_every_row_belongs_to_one_worker():
    for count in (1, 2, 3):
        shares = [list(range(12))[Workers(rank, count).rows(12)] for rank in range(count)]
        assert sorted(sum(shares, [])) == list(range(12)) and len({len(share) for share in shares}) == 1


def test_what_is_left_open_is_settled_by_size():
    assert Workers(count=8).settled(480, parameters=124_000_000, largest=20).describe(480) == {
        "global_batch": 480,
        "workers": 8,
        "micro_batch": 20,
        "accumulation_steps": 3,
        "sharding": "ddp",
    }
    large = Workers(count=16).settled(480, parameters=1_200_000_000, largest=20)
    assert (large.micro_batch, large.sharding) == (15, "fsdp")  # 20 does not divide a share of 30
    assert Workers(count=2, micro_batch=3, sharding="ddp").settled(12, 10**9).describe(12)["accumulation_steps"] == 2
    assert Workers().settled(16, 10**9).describe(16)["sharding"] == "none"


@pytest.mark.parametrize(
    "workers, message",
    [
        (Workers(count=7), "global batch of 480 cannot be shared evenly among 7 workers"),
        (
            Workers(count=8, micro_batch=7),
            "--micro-batch 7 does not divide a worker's share, 60: the global batch of 480 over 8",
        ),
        (Workers(count=8, micro_batch=480), "--micro-batch 480 does not divide a worker's share, 60"),
    ],
)
def test_a_batch_that_cannot_be_shared_is_refused(workers, message):
    with pytest.raises(ValueError, match=message):
        workers.settled(480, parameters=1)
