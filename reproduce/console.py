"""Between a program and its terminal: its text goes out as UTF-8, and Ctrl-C is answered in one line whenever it comes."""

import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable

INTERRUPTED = 128 + signal.SIGINT  # the exit status that a shell gives


class Told(KeyboardInterrupt):
    """Ctrl-C of which the user was told already, where more was known of what it stopped."""


def leave_at_once() -> None:
    """Let Ctrl-C end the program with one line from here on; for the seconds of import, in which nothing is written.

    Whoever started the program with Ctrl-C ignored, as a shell starts its background jobs, finds it ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)
        sys.excepthook = _leave_or_tell


def at_the_terminal(main: Callable[[], int]) -> Callable[[], int]:
    """What a program's `main` needs around it: output in UTF-8, and one line and status 130 after Ctrl-C.

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
                signal.signal(signal.SIGINT, signal.default_int_handler)
            speak_utf8()
            return main()
        except Told:
            return INTERRUPTED
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return INTERRUPTED
        finally:
            if is_program:
                with contextlib.suppress(OSError, ValueError):  # of a reader that is gone; Python says so at the end
                    sys.stdout.flush()
                signal.signal(signal.SIGINT, _leave)

    return answering


def speak_utf8() -> None:
    """Write pages and tables as UTF-8 whatever the locale: what it lacks a letter for would end the program, or be lost.

    A path whose bytes are no text is written as these bytes.  Streams that a notebook or a test put in the place of the
    usual ones are left alone.
    """
    for stream, errors in ((sys.stdout, "surrogateescape"), (sys.stderr, "backslashreplace")):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)


def _leave(*_signal) -> None:
    """One line on stderr, past everything that Python would still do."""
    os.write(2, b"stopped\n")
    os._exit(INTERRUPTED)


def _leave_or_tell(kind, error, where) -> None:
    """Of the program's last exceptions: Ctrl-C between two of its lines is answered as everywhere, others are told as ever."""
    if issubclass(kind, KeyboardInterrupt):
        _leave()
    sys.__excepthook__(kind, error, where)
