"""Limits how many calls of one tool, or episodes, run at a time, as a search engine or a machine may need it."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager


class Slots:
    """
    Limits how many blocks of one name run at a time, in any event loops: the calls of a tool, over all episodes. A
    call that was given up at its time limit no longer counts, even if its thread still runs.

    Args:
        num_slots (`int`):
            Maximum number of blocks of one name at a time, at least 1.

    Example:
    ```python
    >>> slots = Slots(4)
    >>> async with slots.of("search"):
    ...     answer = await search(query)
    ```
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._lock = threading.Lock()
        self._num_taken: Counter[str] = Counter()
        self._waiting: defaultdict[str, list[tuple[int, int, Future[None]]]] = defaultdict(list)  # heaps
        self._arrivals = itertools.count()

    @asynccontextmanager
    async def of(self, name: str, *, priority: int = 0) -> AsyncIterator[None]:
        """Enter the block when a slot of that name is free. The lowest `priority` goes first, then by arrival."""
        with self._lock:
            turn = None
            if self._num_taken[name] < self.num_slots:
                self._num_taken[name] += 1
            else:
                turn = Future[None]()
                heapq.heappush(self._waiting[name], (priority, next(self._arrivals), turn))
        if turn is not None:
            try:
                await asyncio.wrap_future(turn)
            except asyncio.CancelledError:
                if not turn.cancel():  # its turn had just come
                    self._pass_on(name)
                raise
        try:
            yield
        finally:
            self._pass_on(name)

    def _pass_on(self, name: str) -> None:
        """Give a slot that became free to the next waiting block, if any."""
        with self._lock:
            waiting = self._waiting[name]
            while waiting:
                *_, turn = heapq.heappop(waiting)
                if turn.set_running_or_notify_cancel():
                    break
            else:
                self._num_taken[name] -= 1
                return
        turn.set_result(None)
