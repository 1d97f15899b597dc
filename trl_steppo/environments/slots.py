"""How many calls of one tool run at a time: a search engine or a paid API bears only so many."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator
from concurrent.futures import Future
from contextlib import asynccontextmanager


class ToolSlots:
    """
    Bounds the calls of each tool that run at a time, over all episodes, in whichever event loops these are played.
    Calls get their turns in the order in which they came.

    Args:
        num_slots (`int`):
            Most calls of one tool at a time, at least 1.

    Example:
    ```python
    >>> slots = ToolSlots(4)
    >>> async with slots.of("search"):
    ...     answer = await search(query)
    ```
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._lock = threading.Lock()
        self._num_taken: Counter[str] = Counter()
        self._waiting: defaultdict[str, deque[Future[None]]] = defaultdict(deque)

    @asynccontextmanager
    async def of(self, tool: str) -> AsyncIterator[None]:
        """Around a call of the tool of that name: begins when one of its slots is free."""
        with self._lock:
            turn = None
            if self._num_taken[tool] < self.num_slots:
                self._num_taken[tool] += 1
            else:
                turn = Future[None]()
                self._waiting[tool].append(turn)
        if turn is not None:
            try:
                await asyncio.wrap_future(turn)
            except asyncio.CancelledError:
                if not turn.cancel():  # its turn had just come
                    self._pass_on(tool)
                raise
        try:
            yield
        finally:
            self._pass_on(tool)

    def _pass_on(self, tool: str) -> None:
        """A slot is free: it is the next one's who still waits, or nobody's."""
        with self._lock:
            waiting = self._waiting[tool]
            while waiting:
                turn = waiting.popleft()
                if turn.set_running_or_notify_cancel():
                    break
            else:
                self._num_taken[tool] -= 1
                return
        turn.set_result(None)
