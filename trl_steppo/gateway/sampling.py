"""Requests into a sampler, which may live in another thread's event loop; held while weights change."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from ..inference.base import Pacer, Sample, Sampler, SamplingParams
from .conversation import RequestError


@dataclass(frozen=True)
class SamplerLoop:
    """
    A sampler, and the event loop that it runs in.

    Args:
        sampler ([`Sampler`]):
            The policy.
        loop (`asyncio.AbstractEventLoop`, *optional*):
            Where it runs; `None`: in the gateway's own loop.
        pacer ([`Pacer`], *optional*):
            Told, in the sampler's loop, when an episode is not away from it.
    """

    sampler: Sampler
    loop: asyncio.AbstractEventLoop | None = None
    pacer: Pacer | None = None

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, session_id: str, order: tuple[int, ...]
    ) -> Sample:
        """Ask the sampler, in its own loop."""
        asked = self._ask(prompt_ids, params, session_id, order)
        if self.loop is None:
            return await asked
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(asked, self.loop))

    def release(self, session_id: str) -> None:
        """Let the sampler forget an episode."""
        if self.loop is None:
            self.sampler.release(session_id)
        elif not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.sampler.release, session_id)

    async def _ask(
        self, prompt_ids: Sequence[int], params: SamplingParams, session_id: str, order: tuple[int, ...]
    ) -> Sample:
        # Without another suspension inside, as the pacer needs it.
        with self.pacer.at_sampler() if self.pacer is not None else nullcontext():
            return await self.sampler.sample(prompt_ids, params, episode_id=session_id, order=order)


class SamplingPort:
    """
    Where requests wait for a sampler. Its methods run in the gateway's event loop.

    Args:
        max_wait_s (`float`, *optional*, defaults to `20.0`):
            How long a request waits while there is no sampler; after that its client is told to try again.
        retry_after_s (`float`, *optional*, defaults to `5.0`):
            How much later the client is told to try again.
    """

    def __init__(self, *, max_wait_s: float = 20.0, retry_after_s: float = 5.0) -> None:
        self.max_wait_s = max_wait_s
        self.retry_after_s = retry_after_s
        self.num_in_flight = 0
        self._current: SamplerLoop | None = None
        self._changed = asyncio.Condition()

    @property
    def is_paused(self) -> bool:
        """Whether requests wait."""
        return self._current is None

    async def resume(self, sampler: SamplerLoop) -> None:
        """Let requests through, to this sampler."""
        async with self._changed:
            self._current = sampler
            self._changed.notify_all()

    async def pause(self) -> None:
        """Hold new requests; return when those that were let through have been answered."""
        async with self._changed:
            self._current = None
            await self._changed.wait_for(lambda: self.num_in_flight == 0)

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, session_id: str, order: tuple[int, ...]
    ) -> Sample:
        """
        Sample one response.

        Raises:
            RequestError: There was no sampler for too long.
        """
        sampler = await self._admit()
        try:
            return await sampler.sample(prompt_ids, params, session_id=session_id, order=order)
        finally:
            self.num_in_flight -= 1
            if self.is_paused:
                asyncio.ensure_future(self._announce())  # noqa: RUF006  (a pause waits for it)

    def release(self, session_id: str) -> None:
        """Let the sampler forget an episode that is over."""
        if self._current is not None:
            self._current.release(session_id)

    async def _admit(self) -> SamplerLoop:
        """Count a request as in flight, once there is a sampler for it."""
        deadline = asyncio.get_running_loop().time() + self.max_wait_s
        while self._current is None:  # again, if it was paused before this had its turn
            try:
                await asyncio.wait_for(self._resumed(), deadline - asyncio.get_running_loop().time())
            except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
                raise RequestError(
                    429,
                    "the policy is being updated; try again",
                    code="paused",
                    retry_after_s=self.retry_after_s,
                ) from None
        self.num_in_flight += 1
        return self._current

    async def _resumed(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self._current is not None)

    async def _announce(self) -> None:
        async with self._changed:
            self._changed.notify_all()
