"""Tells an engine that forms batches when it is worth waiting for the environments."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

_LOOP_TURNS = 4  # from the engine's setting a result to the episode's being counted as away; one would mostly do


class InFlight:
    """
    Counts the episodes that are away from the sampler: being made, reset, answered by their environment or scored.

    With tools that answer at once every episode is back before [`settled`] returns, so the batches that the sampler
    forms are the same in every run, whatever the threads do. With slow tools waiting would hold up the others: the
    first wait that takes longer than `grace_s` is the last one.

    Args:
        grace_s (`float`, *optional*, defaults to `0.25`):
            Longest wait.

    Example:
    ```python
    >>> in_flight = InFlight()
    >>> in_flight.away()
    >>> with in_flight.at_sampler():
    ...     sample = await sampler.sample(...)
    >>> in_flight.back()
    ```
    """

    def __init__(self, *, grace_s: float = 0.25) -> None:
        self._grace_s = grace_s
        self._num_away = 0
        self._all_back = asyncio.Event()
        self._all_back.set()
        self._patient = True

    def away(self) -> None:
        """One more episode is on its way to the sampler, which may wait for it."""
        self._num_away += 1
        self._all_back.clear()

    def back(self) -> None:
        """One of them has reached the sampler, or is over."""
        self._num_away -= 1
        if self._num_away <= 0:
            self._all_back.set()

    @contextmanager
    def at_sampler(self) -> Iterator[None]:
        """
        Around an episode's call of the sampler. There must be no other suspension inside: the request has to be in the
        sampler's hands before the event loop runs anything else.
        """
        self.back()
        try:
            yield
        finally:
            self.away()

    async def settled(self) -> None:
        """Return when no episode is away, or after the grace period; from then on always at once."""
        if not self._patient:
            return
        # The episodes whose samples the caller has just handed out have not run yet, so they do not count as away.
        for _ in range(_LOOP_TURNS):
            await asyncio.sleep(0)
        if self._num_away > 0:
            await self._wait()

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._all_back.wait(), self._grace_s)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            self._patient = False
