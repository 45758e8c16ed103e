"""Whose fault an error is. What a file on disk can cause is said in one line; a fault of the program stays one, with its traceback.

Whoever reads a file calls libraries with what it says, and they raise what they like. Errors of the program's own code are told apart
by where they are raised: a library that meets values which it did not expect raises in its own code, and a mistake here in ours.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager
from pickle import UnpicklingError
from types import TracebackType

OURS = {"reproduce", "tucker_ref"}
BENEATH = {"torch", "numpy"} | sys.stdlib_module_names  # they raise for whoever called them, as Python itself does


def is_of_a_file(error: BaseException) -> bool:
    """Whether an error may come of what a file holds.

    Args:
        error: that was raised where a file was read, or where a model was built from what it says.
    """
    if (
        isinstance(error, (ValueError, OSError, UnpicklingError)) or type(error) is Exception
    ):  # the class that tokenizers raises
        return True
    kind = _package(type(error).__module__)
    if not isinstance(error, Exception) or kind in OURS:
        return False
    if kind not in BENEATH:  # an error of a library's own kind
        return True
    return _raised_by(error.__traceback__) not in OURS


@contextmanager
def as_one_line(say: Callable[[Exception], str]):
    """Turns what a file may cause into ValueError. All else is a fault of the program, and is raised as it is.

    Args:
        say: what is raised as one line about the file.

    Raises:
        ValueError: in place of an error that `is_of_a_file`.
    """
    try:
        yield
    except Exception as error:
        if not is_of_a_file(error):
            raise
        raise ValueError(say(error)) from error


def first_line(error: Exception) -> str:
    """What an error says, as far as it fits into a message of one line.

    Args:
        error: of a library.
    """
    return str(error).partition("\n")[0]


def _package(module: str) -> str:
    return module.partition(".")[0]


def _raised_by(traceback: TracebackType | None) -> str:
    """The package whose code raised, or called what raised and belongs to nobody; "" if there is none."""
    packages = []
    while traceback is not None:
        packages.append(_package(traceback.tb_frame.f_globals.get("__name__", "")))
        traceback = traceback.tb_next
    return next((package for package in reversed(packages) if package not in BENEATH), "")
