"""Tells a sampler that forms batches when it is worth waiting for the environments."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

_LOOP_TURNS = 4  # between the sampler setting a result and the episode counting as away; one is mostly enough


class EpisodePacer:
    """
    Counts the episodes that are away from the sampler: being made, reset, answered by their environment or scored. A
    [`~inference.base.Pacer`].

    With tools that answer at once every episode has arrived before [`quiet`] returns, so the batches that the sampler
    forms are the same in every run, whatever the threads do. With slow tools waiting would hold up the others: the
    first wait that takes longer than `grace_s` is the last one.

    Args:
        grace_s (`float`, *optional*, defaults to `0.25`):
            Longest wait.

    Example:
    ```python
    >>> pacer = EpisodePacer()
    >>> pacer.left()
    >>> with pacer.at_sampler():
    ...     sample = await sampler.sample(...)
    >>> pacer.arrived()
    ```
    """

    def __init__(self, *, grace_s: float = 0.25) -> None:
        self._grace_s = grace_s
        self._num_away = 0
        self._none_away = asyncio.Event()
        self._none_away.set()
        self._waits = True

    def left(self) -> None:
        """One more episode is on its way to the sampler, which may wait for it."""
        self._num_away += 1
        self._none_away.clear()

    def arrived(self) -> None:
        """One of these episodes has arrived at the sampler, or is over."""
        self._num_away -= 1
        if self._num_away <= 0:
            self._none_away.set()

    @contextmanager
    def at_sampler(self) -> Iterator[None]:
        """Context of an episode's call of the sampler; see [`~inference.base.Pacer`]."""
        self.arrived()
        try:
            yield
        finally:
            self.left()

    async def quiet(self) -> None:
        """Return when no episode is away, or after the grace period; from then on always at once."""
        if not self._waits:
            return
        # The episodes whose samples the caller has just handed out have not run yet, so they do not count as away.
        for _ in range(_LOOP_TURNS):
            await asyncio.sleep(0)
        if self._num_away > 0:
            await self._wait()

    async def _wait(self) -> None:
        try:
            await asyncio.wait_for(self._none_away.wait(), self._grace_s)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            self._waits = False
