"""A thread for work that takes as long as what clients send is long, so that the event loop stays free for others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

INLINE_BYTES = 2**14  # what is not longer than this is done in the event loop, which is faster than another thread


class Worker:
    """
    Runs functions in one thread, in the order in which they come. Tokenizing and hashing let the loop run meanwhile;
    Python code shares the interpreter with it. The functions must neither read nor change what the loop changes.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="gateway work")

    async def run(self, turn: asyncio.Lock, function: Callable[[], T]) -> T:
        """
        Run a function, and wait for it.

        Args:
            turn (`asyncio.Lock`):
                Lock of the client that the work is for. Of one client, only one piece of work waits for the thread, so
                that all clients have their turn.
            function (`Callable[[], T]`):
                What to run.
        """
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function)

    def close(self) -> None:
        """Start no further work."""
        self._executor.shutdown(wait=False, cancel_futures=True)
