"""Between a program and its terminal: its text goes out as UTF-8, and Ctrl-C is answered in one line whenever it comes.

Where nobody listens, since a stream was closed from the start (`2>&-`), by a reader that has seen enough (`| head -1`) or with its
terminal, what is said is lost, and nothing else: a run goes on, and its records are written. Where standard output cannot be written
otherwise, as on a full disk, a run goes on too, and the end says so.
"""

import argparse
import contextlib
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import TextIO

BUG = "This is a fault of the program, not of what it was given: please report it, with the lines above and the command."
INTERRUPTED = 128 + signal.SIGINT  # the exit status that a shell gives
GONE = {errno.EPIPE, errno.EIO}  # what is heard of a reader that has gone, and of a terminal


class Told(KeyboardInterrupt):
    """Ctrl-C of which the user was told already, where more was known of what it stopped."""


def given(text: str) -> str:
    """A name or a path. None would mean the default, or this folder, and mostly comes of a variable of the shell that is not set.

    Raises:
        argparse.ArgumentTypeError: for no text; argparse prints it as an error of the command line.
    """
    if not text:
        raise argparse.ArgumentTypeError("'' names nothing; leave the option out for the default")
    return text


def path(text: str) -> Path:
    """A path, as in `given`."""
    return Path(given(text))


def leave_at_once() -> None:
    """Let Ctrl-C end the program with one line from here on; for the seconds of import, in which nothing is written.

    Whoever started the program with Ctrl-C ignored, as a shell starts its background jobs, finds it ignored.
    """
    open_closed()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
        sys.excepthook = _leave_or_tell


def at_the_terminal(main: Callable[[], int]) -> Callable[[], int]:
    """What a program's `main` needs around it: output in UTF-8, one line and status 130 after Ctrl-C, one line and status 1 where
    something given cannot be used, and a note to whatever else it raises.

    Args:
        main: returns the exit status.

    Returns:
        A function like it.
    """

    @functools.wraps(main)
    def answering() -> int:
        is_program = signal.getsignal(signal.SIGINT) is _leave
        try:
            if is_program:
                signal.signal(signal.SIGINT, _stop)
            speak_utf8()
            with patient() as output:
                status = _in_one_line(main)
            if output.lost is None:
                return status
            with contextlib.suppress(OSError):
                print(f"error: what was printed is not all there: standard output: {output.lost.strerror}", file=sys.stderr)
            return status or 1
        except (KeyboardInterrupt, Exception) as error:
            if not is_interrupt(error):
                error.add_note(BUG)
                raise
            _clear_away_unheard()
            if not isinstance(error, Told):
                print("stopped", file=sys.stderr)
            return INTERRUPTED
        finally:
            if is_program:
                with contextlib.suppress(OSError, ValueError):  # of a reader that is gone; Python says so at the end
                    sys.stdout.flush()
                signal.signal(signal.SIGINT, _leave)

    return answering


def _in_one_line(main: Callable[[], int]) -> int:
    try:
        return main()
    except (ValueError, OSError, FloatingPointError) as error:
        if is_interrupt(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1


def is_interrupt(error: BaseException | None) -> bool:
    """Whether this is Ctrl-C, or what a library made of it: one that is stopped while it loads its compiled parts is an ImportError,
    and some compiled parts make an error of their own that forgets what it came from.

    Args:
        error: with what it was raised from, or in the course of.
    """
    if _stop.came:
        return True
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def speak_utf8() -> None:
    """Write pages and tables as UTF-8 whatever the locale: what it lacks a letter for would end the program, or be lost.

    A path whose bytes are no text is written as these bytes.  Streams that a notebook or a test put in the place of the
    usual ones are left alone.
    """
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)


def _clear_away_unheard() -> None:
    """Say nothing of what a library had half made when Ctrl-C came: Python would report that it could not be cleared away."""
    if sys.unraisablehook is sys.__unraisablehook__:
        sys.unraisablehook = lambda _: None


def _leave(*_signal) -> None:
    """One line on stderr, past everything that Python would still do."""
    os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)


def _stop(_signal, frame: FrameType | None) -> None:
    """An exception, as Ctrl-C is otherwise; but the end at once while a library is loaded, which many do when first used.

    Compiled parts that are stopped while they load abort the program (nanobind), or make an error of their own of it.

    Raises:
        KeyboardInterrupt: everywhere else, and where a file is being written, whose part is to be removed.
    """
    _stop.came = True
    loads = False
    while frame is not None:
        if frame.f_code.co_name == "write_atomically":
            raise KeyboardInterrupt
        loads |= frame.f_code.co_filename == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    if loads:
        _leave()
    raise KeyboardInterrupt


_stop.came = False  # from Ctrl-C on the program only ends, whatever error it ends with


def _leave_or_tell(kind, error, where) -> None:
    """Of the program's last exceptions: Ctrl-C between two of its lines is answered as everywhere, others are told as ever."""
    if is_interrupt(error):
        _leave()
    sys.__excepthook__(kind, error, where)


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
    """A stream that goes on into nothing once it cannot be written any more.

    Args:
        stream: of text.

    Attributes:
        lost: why, where somebody may still want what was said: not of a reader or a terminal that has gone.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream
        self.lost: OSError | None = None

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """As the stream's own.  Returns: how many characters were taken."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """As the stream's own."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Put nothing in the place of the file; what is still buffered goes there too."""
        if error.errno not in GONE:
            self.lost = error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
        self._stream.flush()


@contextlib.contextmanager
def patient() -> Iterator[Patient]:
    """Standard output and error do not mind that they cannot be written.  Yields: the output, which knows whether all of it was."""
    output, errors = Patient(sys.stdout), Patient(sys.stderr)
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            yield output
        finally:
            output.flush()
            errors.flush()
