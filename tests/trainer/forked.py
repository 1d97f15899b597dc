"""Processes forked from one that has imported everything, to be killed at any moment."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkProcess
from typing import Any

from tqdm import tqdm

context = multiprocessing.get_context("fork")


def fork(target: Callable[..., Any], *args: Any) -> ForkProcess:
    """Start a process that calls `target` with `args`."""
    process = context.Process(target=_call, args=(target, *args))
    process.start()
    return process


def _call(target: Callable[..., Any], *args: Any) -> None:
    # the lock of progress bars lies in memory that forked processes share: one that is killed with it stops the others
    lock = threading.RLock()
    for bar in _with_subclasses(tqdm):  # whichever was the first to be shown has a lock of its own
        bar.set_lock(lock)
    target(*args)


def _with_subclasses(kind: type[tqdm]) -> Iterator[type[tqdm]]:
    yield kind
    for subclass in kind.__subclasses__():
        yield from _with_subclasses(subclass)
