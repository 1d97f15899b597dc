"""A thread for work that takes as long as what clients send is long, so that the event loop stays free for others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

T = TypeVar("T")

INLINE_BYTES = 2**14  # what is no longer than this is done at once, in less time than a thread's turn takes


class Worker:
    """
    Runs functions in one thread, in the order in which they come. Tokenizing and hashing let the loop run meanwhile;
    Python code shares the interpreter with it. Nothing that the loop changes may be read or changed there.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="gateway work")

    async def run(self, turn: asyncio.Lock, function: Callable[..., T], *args: Any) -> T:
        """
        Run a function, and wait for it.

        Args:
            turn (`asyncio.Lock`):
                Whose work it is: of one client only one piece waits for the thread, so that all have their turn.
            function (`Callable`), *args:
                What to run.
        """
        async with turn:
            return await asyncio.get_running_loop().run_in_executor(self._executor, function, *args)

    def close(self) -> None:
        """Begin nothing more."""
        self._executor.shutdown(wait=False, cancel_futures=True)
