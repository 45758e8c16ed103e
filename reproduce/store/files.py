"""Files that are either whole or not there: written beside their place, flushed to disk, then renamed into it.

And what tells one state of a source file from another.
"""

import ast
import errno
import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

ABANDONED = 3600  # seconds since the last write after which a part belongs to a run that was killed


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Create or replace a file, whole or not at all; a crash leaves the old one as it was.

    Only a kill can leave a temporary file, which a later write of the same file removes.

    Args:
        path: the file, whose folder is made.
        write: puts the content into the open binary file.

    Raises:
        OSError: naming the file, if it cannot be written whole; no temporary file is left behind then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in path.parent.glob(f"{path.name}*.part"):
        if time.time() - part.stat().st_mtime > ABANDONED:
            part.unlink(missing_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, (OSError, RuntimeError)):  # torch.save hides the one behind the other
            cause = next((e for e in _behind(error) if isinstance(e, OSError)), error)
            reason = getattr(cause, "strerror", None) or str(cause)
            raise OSError(getattr(cause, "errno", None) or errno.EIO, f"cannot be written: {reason}", str(path)) from error
        raise


def _behind(error: BaseException | None) -> Iterator[BaseException]:
    """The error, the one it was raised in the course of, and so on."""
    while error is not None:
        yield error
        error = error.__context__


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
