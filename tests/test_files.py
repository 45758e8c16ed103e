"""One writer for all files: whole or not at all, whoever else writes, whatever stops it; and one lock that says who has it."""

import contextlib
import errno
import json
import multiprocessing
import os
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import run_here
from test_prepared import tables

from reproduce.data.prepared import prepare
from reproduce.report import pages
from reproduce.store import files, locks, saved
from reproduce.store.files import extend, write_atomically
from reproduce.store.locks import locked

# Not forked off from the process of the tests: pytest-cov wraps its os._exit once more at each test that is marked no_cover, and after a
# thousand of them a child cannot end, and goes on with the next tests.
APART = multiprocessing.get_context("forkserver")


def writes(content: bytes):
    return lambda file: file.write(content)


@pytest.fixture(autouse=True)
def patience():
    """As it was, after each test."""
    yield
    locks.wait_at_most(locks.PATIENCE)
    locks._without_locks.clear()


@contextlib.contextmanager
def room(size: int):
    """No file may grow beyond so many bytes: what a full disk is to a writer, from the file system itself."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# What is replaced, and what is not


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_new_file_has_the_rights_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "new", writes(b"x"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_a_file_that_is_replaced_keeps_its_rights(tmp_path, mode):
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "old").chmod(mode)
    owner = (12, 34) if os.geteuid() == 0 else (os.getuid(), os.getgid())
    os.chown(tmp_path / "old", *owner)
    write_atomically(tmp_path / "old", writes(b"new"))
    now = (tmp_path / "old").stat()
    assert (stat.S_IMODE(now.st_mode), (now.st_uid, now.st_gid)) == (mode, owner)


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "page.md").write_bytes(b"old")
    (tmp_path / "second").symlink_to("there/page.md")
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "to nothing yet").symlink_to("there/new.md")
    write_atomically(tmp_path / "first", writes(b"new"))
    write_atomically(tmp_path / "to nothing yet", writes(b"new"))
    assert {p.name: p.read_bytes() for p in (tmp_path / "there").iterdir()} == {"page.md": b"new", "new.md": b"new"}
    assert all((tmp_path / name).is_symlink() for name in ("first", "second", "to nothing yet"))


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


def read_only(path: Path) -> None:
    path.write_bytes(b"old")
    path.chmod(0o400)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (read_only, "it is read-only"),
        (os.mkfifo, "it is no regular file"),
        (Path.mkdir, "it is no regular file"),
        (a_loop, "it is no regular file"),
    ],
)
def test_what_is_not_to_be_replaced_is_refused_and_left(tmp_path, make, reason):
    make(path := tmp_path / "there")
    before = path.lstat()
    with pytest.raises(OSError, match=f"cannot be written: {reason}: '{path}'$"):
        write_atomically(path, writes(b"new"))
    assert [p.name for p in tmp_path.iterdir()] == ["there"]
    assert (path.lstat().st_ino, path.lstat().st_mode) == (before.st_ino, before.st_mode)


def test_a_read_only_page_is_refused_in_one_line(tmp_path, capsys):
    page, mark = tmp_path / "page.md", pages.MARK
    page.write_text(f"{mark[0].format('table1')}\nold\n{mark[1].format('table1')}\n", encoding="utf-8")
    page.chmod(0o444)
    assert run_here("report", "--write", page) == 1
    assert capsys.readouterr().err == f"error: [Errno 13] cannot be written: it is read-only: '{page}'\n"


# Full disks, through the file system


def test_a_file_that_does_not_fit_is_named_and_the_old_one_stays(tmp_path):
    write_atomically(tmp_path / "file", writes(b"old"))
    with room(1000), pytest.raises(OSError, match=f"cannot be written: File too large: '{tmp_path / 'file'}'"):
        write_atomically(tmp_path / "file", writes(bytes(5000)))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"old"}
    with room(1000):
        write_atomically(tmp_path / "file", writes(bytes(1000)))  # control: what fits is written


def test_a_file_that_is_extended_keeps_what_was_counted(tmp_path):
    path = tmp_path / "train.bin"
    extend(path, 0, b"counted")
    with open(path, "ab") as file:
        file.write(b" and not")
    extend(path, 7, b", then more")
    assert path.read_bytes() == b"counted, then more"
    with room(1000), pytest.raises(OSError, match=f"cannot be written: File too large: '{path}'"):
        extend(path, 18, bytes(5000))
    assert path.read_bytes() == b"counted, then more"
    assert path.stat().st_size == 18
    with pytest.raises(ValueError, match=r"train.bin is damaged: it holds 18 bytes, where 20 were written"):
        extend(path, 20, b"")  # and no zeros in the place of what is lost
    assert path.read_bytes() == b"counted, then more"


# Other writers, clocks and Ctrl-C


def write_again_and_again(path: Path, failed) -> None:
    end = time.monotonic() + 2
    while time.monotonic() < end:
        try:
            write_atomically(path, writes(bytes(200_000)))
        except BaseException:
            failed.value = 1
            raise


def test_two_writers_of_one_file_do_not_disturb_one_another(tmp_path):
    failed = APART.Value("i", 0)
    writers = [APART.Process(target=write_again_and_again, args=(tmp_path / "c.pt", failed)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failed.value and [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_a_part_that_is_gone_when_it_is_looked_at_is_no_matter(tmp_path, monkeypatch):
    monkeypatch.setattr(files.Path, "glob", lambda folder, pattern: iter([folder / "file.gone.part"]))
    write_atomically(tmp_path / "file", writes(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new"


def test_of_old_parts_only_those_without_a_writer_are_removed(tmp_path, monkeypatch):
    """And names of files are no patterns."""
    monkeypatch.setattr(time, "time", lambda: 4e9)  # of this machine, whose clock the disk need not share
    name = "model [8,64].pt"
    dead, alive, young = (tmp_path / f"{name}.{part}.part" for part in ("dead", "alive", "young"))
    other = tmp_path / "model 8.pt.x.part"
    for part in (dead, alive, young, other):
        part.write_bytes(b"half")
    long_ago = alive.stat().st_mtime - files.ABANDONED - 9
    for part in (dead, alive, other):
        os.utime(part, (long_ago, long_ago))
    with open(alive, "r+b") as file:
        files.fcntl.flock(file, files.fcntl.LOCK_EX)  # as its writer holds it
        write_atomically(tmp_path / name, writes(b"new"))
    assert {p.name for p in tmp_path.iterdir()} == {name, alive.name, young.name, other.name}
    write_atomically(tmp_path / name, writes(b"new"))
    assert {p.name for p in tmp_path.iterdir()} == {name, young.name, other.name}


def test_a_folder_that_cannot_be_flushed_or_locked_is_written_all_the_same(tmp_path, monkeypatch):
    flush = os.fsync

    def only_files(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "no folders")
        flush(descriptor)

    monkeypatch.setattr(files.os, "fsync", only_files)
    monkeypatch.setattr(files.fcntl, "flock", refusing(errno.ENOTSUP))
    write_atomically(tmp_path / "file", writes(b"new"))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"new"}


def stopped_at(number: int, work, modules: tuple[str, ...]) -> bool:
    """Whether work was stopped by a Ctrl-C before the line that comes as number so and so in these files."""
    seen = 0

    def tracer(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.endswith(modules):
            return None
        if event == "line":
            seen += 1
            if seen == number:
                raise KeyboardInterrupt
        return tracer

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        work()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_between_any_two_lines_leaves_the_old_file_or_the_new_one(tmp_path):
    path, number, seen = tmp_path / "file", 0, set()
    while True:
        number += 1
        path.write_bytes(b"old")
        stopped = stopped_at(number, lambda: write_atomically(path, writes(b"new")), ("store/files.py", "contextlib.py"))
        seen.add(path.read_bytes())
        assert [p.name for p in tmp_path.iterdir()] == ["file"], number
        if not stopped:
            break
    assert number > 30 and seen == {b"old", b"new"}  # some came before the rename, some after it


@pytest.mark.no_cover
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_between_any_two_lines_leaves_no_lock(tmp_path):
    def work():
        with locked(tmp_path):
            pass

    number, locks._patience = 1, 0.05
    while stopped_at(number, work, ("store/locks.py", "contextlib.py")):
        work()
        number += 1
    assert number > 15


# Locks


def refusing(number: int):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    return flock


def test_who_waits_says_whom_for_and_for_how_long(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(locks, "SILENT", 0.05)
    release = threading.Event()

    def hold():
        with locked(tmp_path):
            release.wait(10)

    holder = threading.Thread(target=hold)
    holder.start()
    while not (tmp_path / ".lock").exists() or not (tmp_path / ".lock").read_bytes():
        time.sleep(0.01)
    threading.Timer(0.5, release.set).start()
    with locked(tmp_path):
        mine = json.loads((tmp_path / ".lock").read_text(encoding="utf-8"))
    holder.join()
    said = capsys.readouterr().err
    who = f"{tmp_path} is locked by process {os.getpid()} on {socket.gethostname()} since {mine['since'][:10]}"
    assert said.startswith(who) and said.endswith("waiting, at most 600 seconds\n") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())  # the lock's file goes with the lock


def test_nobody_waits_in_vain_for_longer_than_was_said(tmp_path, capsys):
    with locked(tmp_path):
        assert run_here("table1", "--out", tmp_path, "--records", tmp_path, "--lock-timeout", "0.1") == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path} is locked by process {os.getpid()} on ") and error.count("\n") == 1
        assert "; 0.1 seconds were waited. Repeat the command" in error and "--lock-timeout" in error
        (tmp_path / ".lock").write_bytes(b"{")
        assert run_here("table1", "--out", tmp_path, "--records", tmp_path, "--lock-timeout", "0.1") == 1
        assert "is locked by another process; " in capsys.readouterr().err
    assert run_here("table1", "--out", tmp_path, "--records", tmp_path, "--lock-timeout", "0.1") == 0
    assert run_here("table1", "--lock-timeout", "0") == 2


@pytest.mark.parametrize("number", sorted(locks.NO_LOCKS))
def test_a_folder_without_locks_is_said_once(tmp_path, monkeypatch, capsys, number):
    monkeypatch.setattr(locks.fcntl, "flock", refusing(number))
    for _ in range(2):
        with locked(tmp_path):
            pass
    said = capsys.readouterr().err
    assert said == f"{tmp_path}: its file system has no locks ({os.strerror(number)}); let one run at a time write there\n"


def test_a_lock_that_fails_otherwise_is_an_error_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.fcntl, "flock", refusing(errno.EIO))
    with pytest.raises(OSError, match=f"cannot be locked: Input/output error: '{tmp_path}/.lock'"), locked(tmp_path):
        pass


def test_on_a_full_disk_a_lock_is_a_lock_without_a_name(tmp_path):
    with room(0), locked(tmp_path):
        assert (tmp_path / ".lock").read_bytes() == b"" and locks._holder(tmp_path / ".lock") == "another process"


def test_a_lock_of_a_file_that_was_removed_meanwhile_is_none(tmp_path, monkeypatch):
    answers, asked = iter([False, True]), []
    monkeypatch.setattr(locks.os.path, "samestat", lambda mine, there: asked.append((mine, there)) or next(answers))
    with locked(tmp_path):
        assert len(asked) == 2


def count_up(folder: Path) -> None:
    for _ in range(50):
        with locked(folder):
            number = int((folder / "number").read_text(encoding="utf-8"))
            (folder / "number").write_text(str(number + 1), encoding="utf-8")


def test_one_at_a_time_though_the_lock_s_file_comes_and_goes(tmp_path):
    (tmp_path / "number").write_text("0", encoding="utf-8")
    workers = [APART.Process(target=count_up, args=(tmp_path,)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert (tmp_path / "number").read_text(encoding="utf-8") == "200"


def test_two_runs_that_make_room_at_once_move_a_model_once(tmp_path, monkeypatch):
    (tmp_path / "m.safetensors").write_bytes(b"of another run")
    monkeypatch.setattr(saved, "run_of", lambda path: path.unlink() or "other")  # the other run is quicker
    saved.make_room(tmp_path / "m.safetensors", "mine")
    assert not list(tmp_path.iterdir())


# Two at once, on the command line


def prepare_beside(given: dict, out: Path, ready) -> None:
    with open(out.parent / f"said by {os.getpid()}", "w", encoding="utf-8") as said, contextlib.redirect_stdout(said):
        ready.wait(60)
        prepare("letters", out, **given)


def test_of_two_prepares_one_writes_and_the_other_finds_it_finished(tmp_path):
    bpe = str(tables(tmp_path))
    given = {"files": str(tmp_path / "text"), "bpe": bpe, "validation": str(tmp_path / "held_out.txt")}
    ready = APART.Barrier(2)
    both = [APART.Process(target=prepare_beside, args=(given, tmp_path / "out", ready)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    said = sorted(p.read_text(encoding="utf-8").split()[1] for p in tmp_path.glob("said by *"))
    assert said == ["holds", "is"]  # "... holds 9 tokens to train on", and "... is finished"
    prepare("letters", tmp_path / "alone", **given)
    names = {p.name for p in (tmp_path / "alone").iterdir()}
    assert (
        {p.name for p in (tmp_path / "out").iterdir()}
        == names
        == {"tokenizer.json", "tokens.json", "train.bin", "validation.bin"}
    )
    assert all((tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes() for name in names)


def test_a_second_prepare_that_waits_too_long_says_whom_for(tmp_path, capsys):
    arguments = ["prepare", "letters", "--files", tmp_path / "text", "--bpe", tables(tmp_path), "--out", tmp_path / "out"]
    arguments += ["--validation", tmp_path / "held_out.txt", "--lock-timeout", "0.1"]
    with locked(tmp_path / "out"):
        assert run_here(*arguments) == 1
        assert f"out is locked by process {os.getpid()} on " in capsys.readouterr().err
    assert run_here(*arguments) == 0


def test_at_the_end_of_a_small_disk_nothing_is_half(tmp_path):
    """A disk of its own, where one can be made, has less room than a part needs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(disk)], capture_output=True, encoding="utf-8"
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be made here: {mounted.stderr.strip()}")
    try:
        write_atomically(disk / "0", writes(bytes(150_000)))
        with pytest.raises(OSError, match=f"cannot be written: No space left on device: '{disk}/0'"):
            write_atomically(disk / "0", writes(b"1" * 300_000))
        extend(disk / "bin", 0, b"counted")
        with pytest.raises(OSError, match=f"cannot be written: No space left on device: '{disk}/bin'"):
            extend(disk / "bin", 7, bytes(300_000))
        assert {p.name: p.read_bytes() for p in disk.iterdir()} == {"0": bytes(150_000), "bin": b"counted"}
        with locked(disk):
            pass
    finally:
        subprocess.run(["umount", str(disk)], check=True)
