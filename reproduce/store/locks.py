"""One writer at a time: a folder is locked while what stands in it is read, changed and written."""

import errno
import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

PATIENCE = 600.0  # seconds that a lock is waited for
SILENT = 2.0  # seconds of waiting after which it is said whom for
PAUSE = 0.01  # seconds between two attempts
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}  # what file systems without locks answer

_patience = PATIENCE
_without_locks: set[Path] = set()  # folders of which that was said


def wait_at_most(seconds: float) -> None:
    """How long this process waits for a lock from now on.

    Args:
        seconds: positive.
    """
    global _patience
    _patience = seconds


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others out of a folder; whoever holds it stands in its file .lock, which goes with the lock.

    Where the file system has no locks, that is said once, and nothing keeps others out.

    Args:
        folder: is made.

    Raises:
        TimeoutError: naming the holder, if another process holds it for longer than `wait_at_most` says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, begun, told = folder / ".lock", time.monotonic(), False
    while (file := _taken(path)) is None:
        waited = time.monotonic() - begun
        if waited > _patience:
            raise TimeoutError(
                f"{folder} is locked by {_holder(path)}; {_patience:g} seconds were waited. Repeat the command when that process has "
                "ended, or wait longer with --lock-timeout"
            )
        if waited > SILENT and not told:
            told = True
            tqdm.write(f"{folder} is locked by {_holder(path)}: waiting, at most {_patience:g} seconds", file=sys.stderr)
        time.sleep(PAUSE)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before the lock is let go: who waits for this file finds that it is no longer the one
        file.close()


def _taken(path: Path) -> BinaryIO | None:
    """The lock's open file, which holds the lock until it is closed; None if another process has it."""
    file = open(path, "ab+", buffering=0)  # noqa: SIM115 (whoever gets it closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            _sign(file)
            return file
    except (BlockingIOError, FileNotFoundError):  # it is another's, or was until a moment ago
        pass
    except OSError as error:
        if error.errno not in NO_LOCKS:
            file.close()
            raise OSError(error.errno, f"cannot be locked: {error.strerror}", str(path)) from None
        if path.parent not in _without_locks:
            _without_locks.add(path.parent)
            tqdm.write(
                f"{path.parent}: its file system has no locks ({error.strerror}); let one run at a time write there",
                file=sys.stderr,
            )
        return file
    file.close()
    return None


def _sign(file: BinaryIO) -> None:
    """Write down who has the lock, for those who wait; on a full disk they are not told."""
    with suppress(OSError):
        file.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode())


def _holder(path: Path) -> str:
    """Who has the lock, in words."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return f"process {said['pid']} on {said['host']} since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
