"""Survival in small: a few kills in every kind of work, and controls that the harness notices damage and difference."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from reproduce.store import files, records
from reproduce.trust import survival

ROOT = Path(__file__).parent.parent


def test_a_few_kills_are_survived_and_recorded(tmp_path):
    places = ["--out", str(tmp_path), "--records", str(tmp_path / "records")]
    command = [sys.executable, "-m", "reproduce", "survival", "--preset", "quick", *places]
    result = subprocess.run(command, capture_output=True, encoding="utf-8", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    (record,) = records.load(tmp_path / "records")
    for kind, kills in survival.PRESETS["quick"].items():
        tally = record.metrics[kind]
        assert tally["kills"] == kills and tally["ends"] >= 1 and tally["files"] >= kills - 1
    assert "5 " in result.stdout.splitlines()[-2] and not list(tmp_path.glob("survival-*"))


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


def ended(code: int) -> SimpleNamespace:
    """A process that has ended."""
    nothing = lambda timeout=None: None  # noqa: E731
    return SimpleNamespace(exitcode=code, is_alive=lambda: False, kill=nothing, join=nothing)


def failing(*_):
    return ended(3)


def forgetting(writer, folder, example, number, known, turn):
    known.value = survival.APPENDS
    return ended(0)


def losing(writer, folder, example, number, known, turn):
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
    with pytest.raises(ValueError, match="a run that was not killed ended with exit status 3"):
        survival.finish(ended(3))


def test_a_run_that_ends_before_its_kill_is_compared_and_another_begins(tmp_path, monkeypatch):
    codes, compared = iter([0, 0, 0, -signal.SIGKILL, 0]), []  # to warm up, untouched; too fast, killed, to its end
    monkeypatch.setattr(survival, "start", lambda *_: ended(next(codes)))
    same = lambda whole, attempt: compared.append((whole.name, attempt.name))  # noqa: E731
    tally = survival.survive(None, tmp_path, 1, random.Random(0), same)
    assert compared == [("whole", "0"), ("whole", "1")] and (tally.kills, tally.ends) == (1, 2)


def write_something(folder, more):
    records.append(folder, records.new_record("decode", "p", "m", {}, {"loss": 1.0 + more}))


def test_folders_that_differ_in_one_digit_are_told_apart(tmp_path):
    for name, more in (("a", 0), ("b", 0), ("c", 1e-15)):
        write_something(tmp_path / name, more)
    survival.same_files(tmp_path / "a", tmp_path / "b")
    with pytest.raises(ValueError, match="decode.p.json differs from what an uninterrupted run leaves"):
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
