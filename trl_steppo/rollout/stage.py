"""Where episodes are played: environments that are made once and reset often, each in a thread of its own."""

from __future__ import annotations

import asyncio
import heapq
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Coroutine, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..calls import (
    DaemonThread,
    Home,
    MainThread,
    MainThreadNeededError,
    living_in,
    raise_if_main_thread_needed,
    within,
)
from ..environments.base import Playable
from .loops import EventLoop

logger = logging.getLogger(__name__)

T = TypeVar("T")
MakePlayable = Callable[[Mapping[str, Any]], Playable | None]

LETS_GO_S = 5.0  # for a rollout that was broken off, to close its environments
_MAKING = "making the environment"


def make_at_home(home: Home, make: Callable[[], T]) -> T:
    """To be run in a home: what `make` makes lives there."""
    with living_in(home):
        return make()


@dataclass(frozen=True)
class Place:
    """An environment that plays an episode, and which of its kind it is."""

    kind: Hashable
    number: int
    playable: Playable | None


class Stage:
    """
    An event loop for rollouts, one after another, and the environments that live with it. Each has one thread, in
    which it is made and in which all its sync methods run; its async ones run in the event loop.

    An environment whose episode ended well is reset for a later one, the lowest number of its kind first, so that the
    episodes of a rollout get the same ones in every run as long as all play at once. One whose episode failed, or that
    a call was given up of, is closed; its successor has a new thread.

    Args:
        make_playable (`Callable[[Mapping], Playable | None]`):
            Makes the environment of an episode from its row; `None`: the episode needs none.
        kind_of (`Callable[[Mapping], Hashable]`, *optional*):
            What an environment must have in common with a row to play it; by default all are of one kind. What it
            raises fails the episode.
        reuses (`bool`, *optional*, defaults to `True`):
            Whether an environment plays more than one episode.
        close_timeout_s (`float`, *optional*):
            Most seconds that an environment may take to close.

    Example:
    ```python
    >>> stage = Stage(make)
    >>> for requests in updates:
    ...     episodes = play_episodes(requests, stage, sampler, ...)
    >>> stage.close()
    ```
    """

    def __init__(
        self,
        make_playable: MakePlayable,
        *,
        kind_of: Callable[[Mapping[str, Any]], Hashable] = lambda row: None,
        reuses: bool = True,
        close_timeout_s: float | None = None,
        in_place: bool | None = None,
    ) -> None:
        self._make_playable = make_playable
        self._kind_of = kind_of
        self._reuses = reuses
        self._close_timeout_s = close_timeout_s
        self._loop = EventLoop(in_place=in_place)
        self._making = asyncio.Lock()
        self._free: defaultdict[Hashable, list[int]] = defaultdict(list)  # heaps of numbers
        self._num_taken: defaultdict[Hashable, int] = defaultdict(int)
        self._resting: dict[tuple[Hashable, int], Playable] = {}
        self._playing: dict[tuple[Hashable, int], Playable] = {}
        self._held: dict[str, Place] = {}  # by the name of their episode
        self._changing = threading.Lock()  # what is free: rollouts and `release` may be in different threads
        self._need_main_thread: set[Hashable] = set()
        self._spare: DaemonThread | None = None  # in which nothing lives
        self._rollout: asyncio.Task[Any] | None = None
        self._is_closed = False

    @property
    def fits_here(self) -> bool:
        """Whether a rollout may be run from this thread."""
        return self._loop.fits_here

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a rollout to its end; see [`~loops.EventLoop.run`]. After one that raised, the stage is to be closed."""

        async def rollout() -> T:
            self._rollout = asyncio.current_task()
            return await coroutine

        return self._loop.run(rollout())

    def put(self, kind: Hashable, playable: Playable) -> None:
        """Have an environment that was made before the first rollout play its episodes, too."""
        number = self._next_number(kind)
        self._resting[kind, number] = playable
        self._release(kind, number)

    def held(self, name: str) -> Playable | None:
        """Where an episode was played; `None` where it is not held, or there was nothing."""
        place = self._held.get(name)
        return place.playable if place is not None else None

    def release(self, names: Iterable[str]) -> None:
        """Let the environments of these episodes, which were held, play others."""
        for name in names:
            place = self._held.pop(name, None)
            if place is not None and place.playable is not None:
                self._resting[place.kind, place.number] = place.playable
                self._release(place.kind, place.number)

    def close(self) -> None:
        """Close all environments, also those in the midst of an episode, and the event loop."""
        if self._is_closed:
            return
        self._is_closed = True
        try:
            self._loop.run(self._close_all(), heeds_stops=False)
        finally:
            self._loop.close()

    # -- in the event loop --------------------------------------------------------------------------------------------

    async def take(self, row: Mapping[str, Any], timeout_s: float | None) -> Place:
        """
        An environment for an episode. They are made one after the other.

        Args:
            row (`Mapping[str, Any]`):
                The dataset row.
            timeout_s (`float`, *optional*):
                Most seconds for making one.
        """
        kind = self._kind_of(row)
        with self._changing:
            number = heapq.heappop(self._free[kind]) if self._free[kind] else self._next_number(kind)
        try:
            playable = self._resting.pop((kind, number), None)
            if playable is not None and self._is_worn(playable):
                await self._close(playable, "(the one before)")
                playable = None
            if playable is None:
                async with self._making:
                    playable = await self._make(kind, row, timeout_s)
        except BaseException:
            self._release(kind, number)
            raise
        if playable is not None:
            self._playing[kind, number] = playable
        return Place(kind, number, playable)

    async def give_back(self, place: Place, *, is_well: bool, name: str, is_held: bool = False) -> None:
        """
        An episode is over: its environment may play another one, or is closed.

        Args:
            place ([`Place`]):
                What [`take`] gave.
            is_well (`bool`):
                Whether the episode went as it should.
            name (`str`):
                The episode's.
            is_held (`bool`, *optional*, defaults to `False`):
                Whether it is left as the episode has left it, until [`release`].
        """
        key = place.kind, place.number
        playable = self._playing.pop(key, None)
        if playable is not None:
            if is_well and is_held:
                self._held[name] = place
                return
            if is_well and self._reuses and getattr(playable, "is_reusable", False):
                self._resting[key] = playable
            else:
                await self._close(playable, name)
        self._release(*key)

    async def move_to_main_thread(self, place: Place, error: MainThreadNeededError) -> None:
        """All environments of the kind live in the main thread from now on. Raises the error if it has no time."""
        if not MainThread.is_free():
            raise error
        if place.kind not in self._need_main_thread:
            self._need_main_thread.add(place.kind)
            logger.warning(
                "%s: environments of this kind are made and played in the main thread from now on, one after the "
                "other, and without time limits (said once)",
                error,
            )
            for key in [key for key in self._resting if key[0] == place.kind]:
                await self._close(self._resting.pop(key), "")

    async def _make(self, kind: Hashable, row: Mapping[str, Any], timeout_s: float | None) -> Playable | None:
        if kind not in self._need_main_thread:
            home, self._spare = self._spare or DaemonThread("environment"), None
            try:
                playable = await home.run(
                    lambda: make_at_home(home, lambda: self._make_playable(row)), timeout_s, _MAKING
                )
            except Exception as error:
                home.end()
                try:
                    raise_if_main_thread_needed(error, _MAKING)
                except MainThreadNeededError as needed:
                    await self.move_to_main_thread(Place(kind, 0, None), needed)
                else:
                    raise
            else:
                if not home.is_taken:
                    self._spare = home
                return playable
        main = MainThread()
        return await main.run(lambda: make_at_home(main, lambda: self._make_playable(row)), None, _MAKING)

    def _is_worn(self, playable: Playable) -> bool:
        """Whether it has played, and may not play another episode."""
        was_played = getattr(playable, "was_played", True)
        return was_played and not (self._reuses and getattr(playable, "is_reusable", False))

    async def _close(self, playable: Playable, name: str) -> None:
        try:
            await within(playable.close(), self._close_timeout_s, "close()")
        except Exception:  # the episode is complete; what its cleanup does to itself must not cost it
            logger.warning("closing the environment of episode %s failed", name, exc_info=True)

    async def _close_all(self) -> None:
        if self._rollout is not None and not self._rollout.done():  # it was broken off, and is cancelled
            await asyncio.wait({self._rollout}, timeout=LETS_GO_S)
        held = [place.playable for place in self._held.values() if place.playable is not None]
        left = [*self._playing.values(), *self._resting.values(), *held]
        self._held.clear()
        self._playing.clear()
        self._resting.clear()
        await asyncio.gather(*(self._close(playable, "(the last one)") for playable in left))
        if self._spare is not None:
            self._spare.end()

    def _next_number(self, kind: Hashable) -> int:
        number = self._num_taken[kind]
        self._num_taken[kind] += 1
        return number

    def _release(self, kind: Hashable, number: int) -> None:
        with self._changing:
            heapq.heappush(self._free[kind], number)
