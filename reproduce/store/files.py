"""Files that are either whole or not there: written beside their place, flushed to disk, then renamed into it.

All that this program keeps is written here. And what tells one state of a source file from another.
"""

import ast
import errno
import fcntl
import glob
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

ABANDONED = 3600  # seconds since the last write after which a part belongs to a run that was killed


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Create or replace a file, whole or not at all; a crash leaves the old one as it was.

    A new file has the rights that the umask leaves it, another those of the one that it replaces. A link stays: what it leads
    to is replaced. Only a kill can leave a temporary file, which a later write of the same file removes.

    Args:
        path: the file, whose folder is made.
        write: puts the content into the open binary file.

    Raises:
        OSError: naming the file, if it is read-only or no file, or cannot be written whole; no temporary file is left then.
    """
    place = Path(os.path.realpath(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_name(f"{place.name}.{secrets.token_hex(4)}.part")
    with _naming(path):
        old = _replaceable(place)
        try:
            with open(part, "xb") as file:
                _remove_abandoned(place, file)
                write(file)
                file.flush()
                if old is not None:
                    _give(file, old)
                os.fsync(file.fileno())
                os.replace(part, place)  # while it is open: as long as it is a part, it is locked
            _flush_names(place.parent)
        finally:  # of Ctrl-C too, between any two lines
            part.unlink(missing_ok=True)


def called(path: str | Path) -> str:
    """What a path is called: its last part; of "." and "..", which have none, that of the folder they mean; of the root "/".

    Args:
        path: of a file or a folder.
    """
    whole = os.path.abspath(path)
    return os.path.basename(whole) or whole


def extend(path: Path, size: int, content: bytes) -> None:
    """Let a file hold its first bytes and then these, on disk; for files too large to be written anew.

    Args:
        path: the file, made if there are no first bytes.
        size: how many of its bytes stay; what stands behind them was never counted.
        content: what follows.

    Raises:
        ValueError: if the file holds fewer bytes.
        OSError: naming the file, if they cannot all be written; it holds its first bytes then.
    """
    with _naming(path), open(path, "ab", buffering=0) as file:  # nothing is left for close() to write
        if (found := os.fstat(file.fileno()).st_size) < size:
            raise ValueError(f"{path} is damaged: it holds {found:,} bytes, where {size:,} were written")
        try:
            file.truncate(size)
            rest = memoryview(content)
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, size)
            raise


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of what writes a file become one kind, which names it; the name that `path` is called by, not that of a part."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save hides the one behind the other
        cause = next((e for e in _behind(error) if isinstance(e, OSError)), error)
        reason = getattr(cause, "strerror", None) or str(cause)
        raise OSError(getattr(cause, "errno", None) or errno.EIO, f"cannot be written: {reason}", str(path)) from error


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """The error, the one it was raised in the course of, and so on."""
    while error is not None:
        yield error
        error = error.__context__


def _replaceable(place: Path) -> os.stat_result | None:
    """What is known of the file that will be replaced; None where there is none.

    Raises:
        OSError: if it is not to be replaced. A rename asks nobody: neither a file's own rights, nor whether it is a device.
    """
    try:
        old = place.lstat()  # of a link that leads to itself; others were followed
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(old.st_mode):
        raise OSError(errno.EISDIR if place.is_dir() else errno.EINVAL, "it is no regular file")
    may = os.access(place, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
    if not (may and old.st_mode & 0o222):  # root may write everywhere, and yet meant something by mode 400
        raise PermissionError(errno.EACCES, "it is read-only")
    return old


def _give(file: BinaryIO, old: os.stat_result) -> None:
    """The owner, as far as one may, and the rights of the file that this one replaces."""
    with suppress(OSError):
        os.fchown(file.fileno(), old.st_uid, old.st_gid)
    os.fchmod(file.fileno(), stat.S_IMODE(old.st_mode))


def _remove_abandoned(place: Path, own: BinaryIO) -> None:
    """Lock this writer's part, and remove those of writers that were killed: long untouched, and locked by nobody.

    How long is counted from the last write of this part, by the clock of the disk, which need not be that of this machine. What
    other writers rename or remove meanwhile is gone, and no matter.
    """
    with suppress(OSError):  # a disk without locks keeps what was abandoned
        fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)
        now = os.fstat(own.fileno()).st_mtime
        for part in place.parent.glob(f"{glob.escape(place.name)}*.part"):
            with suppress(OSError), open(part, "r+b") as file:
                if now - os.fstat(file.fileno()).st_mtime > ABANDONED:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # refused while its writer lives
                    part.unlink()


def _flush_names(folder: Path) -> None:
    """That a file has this name now is on disk as well, where folders can be flushed."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def code_hash(path: Path) -> str:
    """What tells one state of a module from another: its lines but for docstrings, comments of a whole line and empty lines.

    Args:
        path: of a Python file.

    Returns:
        16 hex digits.
    """
    source = path.read_text(encoding="utf-8")
    said = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            said |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = [line for n, line in enumerate(source.splitlines(), 1) if n not in said]
    code = "\n".join(line for line in lines if line.strip() and not line.lstrip().startswith("#"))
    return hashlib.sha256(code.encode()).hexdigest()[:16]
