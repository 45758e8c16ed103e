"""Standard output and error where nobody listens: closed from the start (`2>&-`), or by a reader that has seen enough (`| head -1`).

What is said there is then lost, and nothing else: a run goes on, and its records are written.
"""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


def open_closed() -> None:
    """Open what is closed of standard input, output and error, on nothing.

    The next file that is opened would get the number of the closed one, and everything that is said would go into that file.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  (for as long as the process lives)


class Patient:
    """A stream that goes on into nothing once its reader has gone.

    Args:
        stream: of text.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's own.  Returns: how many characters were taken."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        """As the stream's own."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._give_up()

    def _give_up(self) -> None:
        """Put nothing in the place of the pipe; what is still buffered goes there too."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
        self._stream.flush()


@contextlib.contextmanager
def patient() -> Iterator[None]:
    """Standard output and error do not mind that their readers go."""
    with contextlib.redirect_stdout(Patient(sys.stdout)), contextlib.redirect_stderr(Patient(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
