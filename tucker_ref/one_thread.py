"""Beside rung 6. A cache belongs to one sequence of calls: what a second thread would spoil in silence, it is refused (PyTorch)."""

import contextlib
import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Method = TypeVar("Method", bound=Callable[..., Any])


class OneThread:
    """`with one_thread:` lets one thread in, as deep as it likes. Another one gets a RuntimeError, and does not wait.

    To wait would lose no token and still be wrong: which of two threads' tokens come first would be chance. A copy has nobody inside.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __reduce__(self):
        return OneThread, ()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "another thread is inside a call with this cache, which keeps one sequence of tokens: make each thread a cache of its "
                "own with new_cache, or let the threads take turns with a lock of yours"
            )

    def __exit__(self, *_) -> None:
        self._lock.release()


def alone(cache) -> contextlib.AbstractContextManager:
    """Inside it no other thread may write this cache. Code that torch.compile makes knows no locks, and does not look."""
    return contextlib.nullcontext() if torch.compiler.is_dynamo_compiling() else cache.one_thread


def by_one_thread(method: Method) -> Method:
    """Decorates a method that writes a cache: RuntimeError where another thread is inside one."""

    @functools.wraps(method)
    def guarded(self, *arguments, **options):
        with alone(self):
            return method(self, *arguments, **options)

    return guarded  # type: ignore[return-value]
