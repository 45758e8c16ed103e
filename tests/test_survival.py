"""Survival in small: a few kills in every kind of work, and controls that the harness notices damage and difference."""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from reproduce.__main__ import EXPERIMENTS, TRUST
from reproduce.store import files, records
from reproduce.trust import survival

ROOT = Path(__file__).parent.parent


def test_a_few_kills_are_survived_and_recorded(tmp_path):
    places = ["--out", str(tmp_path), "--records", str(tmp_path / "records")]
    command = [sys.executable, "-m", "reproduce", "survival", "--preset", "quick", *places]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (record,) = records.load(tmp_path / "records")
    for name, points in survival.PRESETS["quick"].items():
        tally = record.metrics[name]
        assert {fault: tally[fault] for fault in survival.FAULTS} == dict.fromkeys(survival.FAULTS, 0) | points
        assert tally["ends"] >= 1
        assert tally["files"] >= sum(points.values()) - 1
    assert re.search(r"\| together +\| +6 \| +4 \| +4 \|", result.stdout.splitlines()[-2])
    assert not list(tmp_path.glob("survival-*"))


def test_a_hundred_times_each_fault_and_every_command_that_writes():
    points = survival.PRESETS["smoke"]
    assert all(sum(counts.get(fault, 0) for counts in points.values()) == 100 for fault in survival.FAULTS)
    assert set(points) == {*survival.COMMANDS, survival.WRITERS}
    slow = {*TRUST, "compress_speed", "generation_speed", "heal", "two_gpus"}  # up to a minute a run, or two GPUs
    assert all(f"`{name}`" in survival.__doc__ for name in slow - {*TRUST})
    known = {*EXPERIMENTS, "prepare", "report", "claims"} - slow
    assert known == {arguments.split()[0] for arguments in survival.COMMANDS.values()} - {"paper_figures"}


def test_an_interrupt_while_coverage_holds_its_lock_stops_nothing_for_ever(tmp_path):
    """Of every program that a test starts: it would wait for a lock that it holds itself."""
    twice = (
        "from coverage import Coverage; own = Coverage.current()._collector; own.lock_data(); own.lock_data(); print('went on')"
    )
    measured = {"COVERAGE_PROCESS_START": str(ROOT / "pyproject.toml"), "COVERAGE_FILE": str(tmp_path / "data")}
    result = subprocess.run(
        [sys.executable, "-c", twice], env=os.environ | measured, capture_output=True, encoding="utf-8", timeout=60
    )
    assert result.stdout == "went on\n", result.stderr


def torn_write(path, write):
    """What `write_atomically` must not be: in place, and in two halves."""
    with open(path, "wb") as file:
        write(file)
        end = file.tell()
        file.truncate(end // 2)
        file.flush()
        time.sleep(0.02)
        file.seek(0)
        write(file)


def write_records_in_place(*arguments):
    records.write_atomically = torn_write
    survival.write_records(*arguments)


def test_a_writer_that_writes_in_place_is_caught(tmp_path):
    """Control: the kills do come in the middle of writing."""
    with pytest.raises(ValueError, match="cannot be read|lost a record|the file was damaged"):
        survival.recording(tmp_path, 30, random.Random(0), write_records_in_place)


def ended(code: int, saying: str = "") -> SimpleNamespace:
    """A process that has ended."""
    nothing = lambda timeout=None: None  # noqa: E731
    read, write = os.pipe()
    os.write(write, saying.encode())
    os.close(write)
    said = SimpleNamespace(fileno=lambda: read, close=lambda: os.close(read))
    return SimpleNamespace(exitcode=code, kill=nothing, join=nothing, pid=2**30, began=time.perf_counter(), said=said)


def failing(*_):
    return ended(3)


def forgetting(writer, folder, example, number, known):
    known.value = survival.APPENDS
    return ended(0)


def losing(writer, folder, example, number, known):
    known.value = 1
    return ended(-signal.SIGKILL)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (failing, "writer . failed; the file was damaged"),
        (forgetting, "0 records, where each of"),
        (losing, "lost a record when it was killed"),
    ],
)
def test_a_writer_that_fails_forgets_or_loses_is_caught(tmp_path, monkeypatch, start, message):
    monkeypatch.setattr(survival, "start", start)
    with pytest.raises(ValueError, match=message):
        survival.recording(tmp_path, 1, random.Random(0))


def test_a_run_that_fails_by_itself_is_caught():
    survival.finish(ended(0))
    with pytest.raises(ValueError, match="a run that was not killed ended with exit status 3, saying: error: why"):
        survival.finish(ended(3, "begun\nerror: why"))


def test_a_run_that_does_not_end_is_ended_and_said():
    waits, asked = ended(0), []
    waits.exitcode, waits.join, waits.kill = None, asked.append, lambda: asked.append("kill")
    with pytest.raises(ValueError, match=f"a run did not end within {survival.PATIENCE} s"):
        survival.finish(waits)
    assert asked == [survival.PATIENCE, "kill"]


LARGE = "error: [Errno 27] cannot be written: File too large: '/x/y.json'\n"


@pytest.mark.parametrize(
    ("fault", "code", "saying", "is_right"),
    [
        (survival.KILL, -signal.SIGKILL, "anything", True),
        (survival.KILL, 1, "", False),
        (survival.FULL, 1, LARGE, True),
        (survival.FULL, 1, "error: [Errno 27] File too large\n", False),
        (survival.FULL, 1, f"Traceback (most recent call last)\n{LARGE}", False),
        (survival.FULL, 120, LARGE, False),
        (survival.INTERRUPT, 130, "stopped\n", True),
        (survival.INTERRUPT, 130, "", True),
        (survival.INTERRUPT, 130, "Traceback (most recent call last)\nKeyboardInterrupt\n", False),
        (survival.INTERRUPT, -signal.SIGINT, "", False),
    ],
)
def test_how_a_command_ends_is_looked_at(fault, code, saying, is_right):
    with (
        contextlib.nullcontext()
        if is_right
        else pytest.raises(ValueError, match=f"one of the {fault} ended with exit status {code}")
    ):
        survival.check_end(fault, ended(code, f"begun\n{saying}"))


def test_a_run_that_ends_before_its_kill_is_compared_and_another_begins(tmp_path, monkeypatch):
    codes, compared = iter([0, 0, 0, -signal.SIGKILL, 0]), []  # to warm up, untouched; too fast, killed, to its end
    monkeypatch.setattr(survival, "start", lambda *_: ended(next(codes)))
    same = lambda whole, attempt: compared.append((whole.name, attempt.name))  # noqa: E731
    tally = survival.survive(None, tmp_path, [survival.KILL], random.Random(0), same)
    assert compared == [("whole", "0"), ("whole", "1")] and (tally.kills, tally.ends) == (1, 2)


def test_a_fault_that_stops_nothing_is_not_waited_for_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(survival, "start", lambda *_: ended(0))
    with pytest.raises(ValueError, match="41 runs ended, and the interrupts did not stop one"):
        monkeypatch.setattr(survival, "strike", lambda *_: None)
        survival.survive(None, tmp_path, [survival.INTERRUPT], random.Random(0), lambda *_: None)


def test_a_part_that_no_kill_left_is_a_fault(tmp_path, monkeypatch):
    codes = iter([0, 0, 130])

    def littering(*_):
        if (code := next(codes)) == 130:
            (tmp_path / "0").mkdir(exist_ok=True)
        return ended(code, "begun\n")

    def strike(*_):
        (tmp_path / "0" / "c.pt.x.part").write_bytes(b"half")

    monkeypatch.setattr(survival, "start", littering)
    monkeypatch.setattr(survival, "strike", strike)
    with pytest.raises(ValueError, match="one of the interrupts left .*c.pt.x.part behind"):
        survival.survive(None, tmp_path, [survival.INTERRUPT], random.Random(0), None)


def test_the_commands_are_toys(monkeypatch):
    """What the workers do in processes of their own, here: the rest of the harness never runs in this one."""
    seen = [dict(module.PRESETS) for module in (survival.table2, survival.table3, survival.ablations, survival.figure3)]
    monkeypatch.setattr(survival.exactness, "cells", survival.exactness.cells)
    monkeypatch.setattr(survival.prepared, "AT_ONCE", survival.prepared.AT_ONCE)
    for module in (survival.table2, survival.table3, survival.ablations, survival.figure3, survival.decode):
        monkeypatch.setattr(module, "PRESETS", dict(module.PRESETS))
    survival.make_small()
    assert survival.table2.PRESETS["smoke"].n_layers == 1 and len(list(survival.exactness.cells())) == 5
    monkeypatch.undo()
    assert seen[0] == survival.table2.PRESETS and survival.table2.PRESETS["smoke"].n_layers == 2


def write_something(folder, more):
    records.append(folder, records.new_record("theorems", "p", "m", {}, {"loss": 1.0 + more}))


def test_folders_that_differ_in_one_digit_are_told_apart(tmp_path):
    for name, more in (("a", 0), ("b", 0), ("c", 1e-15)):
        write_something(tmp_path / name, more)
    survival.same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="theorems.p.json differs from what an uninterrupted run leaves"):
        survival.same_files(tmp_path / "a", tmp_path / "c")
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(ValueError, match="holds \\[\\], not"):
        survival.same_files(tmp_path / "a", tmp_path / "b")


def test_a_damaged_file_is_found(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"half")
    with pytest.raises(ValueError, match="after a kill .*a.pt cannot be read"):
        survival.check_files(tmp_path)


def test_parts_that_a_kill_left_are_removed_by_a_later_write(tmp_path):
    old, young = tmp_path / "a.jsonxyz.part", tmp_path / "a.jsonabc.part"
    for part in (old, young):
        part.write_text("half", encoding="utf-8")
    long_ago = time.time() - files.ABANDONED - 1
    os.utime(old, (long_ago, long_ago))
    files.write_atomically(tmp_path / "a.json", lambda file: file.write(b"[]"))
    assert {p.name for p in tmp_path.iterdir()} == {"a.json", young.name}  # the young one may be another run's
