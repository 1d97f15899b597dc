"""Plays many episodes at once: one thread that waits for all of them, each in its own coroutine."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from ..calls import (
    CallTimeoutError,
    DaemonThread,
    forget_interruption,
    keeping_thread_state,
    noticing_interruptions,
    raise_interruption,
    within,
)
from ..chat import ChatFormat
from ..environments.base import Playable
from ..environments.slots import Slots
from ..errors import RolloutError, SamplerError
from ..inference.base import Sampler, SamplingParams
from ..stopping import StopRequestedError, calling
from ..types import Episode, EpisodeLimits, renamed_keyword
from .episode import failed_episode, run_episode
from .pacing import InFlight
from .rows import own_row, question_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ATTEMPTS = 3  # at an episode whose sampler fails
_LETS_GO_S = 1.0  # for what was left behind in an event loop to clean up


@renamed_keyword("row_index", "stream_position")
@dataclass(frozen=True)
class EpisodeRequest:
    """
    One episode to play.

    Args:
        row (`Mapping[str, Any]`):
            The dataset row.
        stream_position (`int`):
            Position of the row in the shuffled stream of rows, counted over all epochs.
        generation_index (`int`, *optional*, defaults to `0`):
            Which of the row's episodes this is.
        dataset_row (`int`, *optional*):
            Index of the row in the dataset.
    """

    row: Mapping[str, Any]
    stream_position: int
    generation_index: int = 0
    dataset_row: int | None = None


def play_episodes(
    requests: Sequence[EpisodeRequest],
    make_playable: Callable[[Mapping[str, Any]], Playable | None],
    sampler: Sampler,
    *,
    chat: ChatFormat | None,
    limits: EpisodeLimits,
    sampling: SamplingParams,
    run_seed: int,
    make_timeout_s: float | None = None,
    max_concurrent_episodes: int | None = None,
    slots: Slots | None = None,
    grace_s: float = 0.25,
    id_prefix: str = "",
    on_episode: Callable[[], None] | None = None,
) -> list[Episode]:
    """
    Play all requested episodes concurrently and wait for them. May be called from a thread that runs an event loop:
    the rollout then has one of its own, in a fresh thread.

    Args:
        requests (`Sequence[EpisodeRequest]`):
            What to play.
        make_playable (`Callable[[Mapping], Playable | None]`):
            Makes the environment of one episode from its row. Called for one episode after the other, in the order of
            the requests, in a thread of this rollout's own; what it raises fails that episode.
        sampler ([`Sampler`]):
            The policy; called concurrently.
        chat, limits, sampling, run_seed:
            See [`run_episode`].
        make_timeout_s (`float`, *optional*):
            Most seconds for making an environment; `None`: as long as the whole episode may take.
        max_concurrent_episodes (`int`, *optional*):
            How many to play at a time; `None`: all.
        slots ([`Slots`], *optional*):
            Bounds how many are played at a time by this and other rollouts together, the first rows first.
        grace_s (`float`, *optional*, defaults to `0.25`):
            How long the sampler may wait for environments that have not answered yet ([`InFlight`]).
        id_prefix (`str`, *optional*):
            Put before every `episode_id`, to keep those of several rollouts apart.
        on_episode (`Callable`, *optional*):
            Called whenever an episode has ended.

    Returns:
        `list[Episode]`: in the order of the requests.

    Raises:
        SamplerError: The sampler failed for good, or again and again.
    """
    in_flight = InFlight(grace_s=grace_s)
    rollout = _Rollout(
        make_playable=make_playable,
        sampler=sampler,
        chat=chat,
        limits=limits,
        sampling=sampling,
        run_seed=run_seed,
        in_flight=in_flight,
        make_timeout_s=make_timeout_s if make_timeout_s is not None else limits.max_episode_s,
        id_prefix=id_prefix,
        slots=slots,
        on_episode=on_episode or (lambda: None),
    )
    num_players = max_concurrent_episodes or len(requests)
    return run_coroutine(rollout.play(requests, num_players))


@dataclass(frozen=True)
class _Rollout:
    make_playable: Callable[[Mapping[str, Any]], Playable | None]
    sampler: Sampler
    chat: ChatFormat | None
    limits: EpisodeLimits
    sampling: SamplingParams
    run_seed: int
    in_flight: InFlight
    make_timeout_s: float | None
    id_prefix: str
    slots: Slots | None
    on_episode: Callable[[], None]

    async def play(self, requests: Sequence[EpisodeRequest], num_players: int) -> list[Episode]:
        maker = DaemonThread("make_playable")
        try:
            return await play_concurrently(
                requests,
                lambda request: self._play_one(request, maker),
                self.sampler,
                self.in_flight,
                num_players=num_players,
                slots=self.slots,
                on_episode=self.on_episode,
            )
        finally:
            maker.end()

    async def _play_one(self, request: EpisodeRequest, maker: DaemonThread) -> Episode:
        episode_id = f"{self.id_prefix}{request.stream_position}-{request.generation_index}"
        make = lambda: self.make_playable(request.row)  # noqa: E731
        try:
            env = await maker.run(make, self.make_timeout_s, "making the environment")
        except Exception as error:
            return failed_episode(
                request.stream_position,
                request.generation_index,
                error,
                stage="making the environment",
                episode_id=episode_id,
            )
        return await run_episode(
            env,
            self.sampler,
            request.row,
            chat=self.chat,
            limits=self.limits,
            sampling=self.sampling,
            run_seed=self.run_seed,
            stream_position=request.stream_position,
            generation_index=request.generation_index,
            episode_id=episode_id,
            pacer=self.in_flight,
        )


async def play_concurrently(
    requests: Sequence[EpisodeRequest],
    play_one: Callable[[EpisodeRequest], Awaitable[Episode]],
    sampler: Sampler,
    in_flight: InFlight,
    *,
    num_players: int,
    slots: Slots | None,
    on_episode: Callable[[], None],
) -> list[Episode]:
    """
    Play all requests, `num_players` at a time. Each player takes the next one when it is done with one, so that
    between the two it stays away from the sampler.
    """
    results: dict[int, Episode] = {}
    waiting = iter(enumerate(requests))

    async def player() -> None:
        try:
            for index, request in waiting:
                turn = slots.of("episode", priority=request.stream_position) if slots is not None else nullcontext()
                async with turn:
                    results[index] = await _despite_accidents(play_one, request)
                on_episode()
        finally:
            in_flight.back()

    num_players = min(num_players, len(requests))
    for _ in range(num_players):
        in_flight.away()
    sampler.pace(in_flight.settled)
    try:
        await asyncio.gather(*(player() for _ in range(num_players)))
    finally:
        sampler.pace(None)
    return [results[index] for index in range(len(requests))]


async def _despite_accidents(
    play_one: Callable[[EpisodeRequest], Awaitable[Episode]], request: EpisodeRequest
) -> Episode:
    """
    Play a request again, from its beginning, where the sampler failed, unless that itself has given up. Each attempt
    has a row of its own: what an environment or an agent does to it, no other episode sees.
    """
    for attempt in range(1, _ATTEMPTS + 1):
        own_request = replace(request, row=own_row(request.row))  # the last attempt may have changed its row
        try:
            episode = await play_one(own_request)
            return replace(episode, dataset_row=request.dataset_row, question=question_of(request.row))
        except SamplerError as error:
            has_given_up = isinstance(error.__cause__, RolloutError) and not isinstance(error.__cause__, SamplerError)
            if attempt == _ATTEMPTS or has_given_up:
                raise
            logger.warning("%s; it is played again", error)
    raise AssertionError


def run_coroutine(coroutine: Coroutine[Any, Any, T]) -> T:
    """
    Run a coroutine to its end from sync code, whether or not this thread already runs an event loop.

    Unlike `asyncio.run` it does not wait for what the coroutine left behind: an async tool that hung in
    `asyncio.to_thread` would hold it forever. A task that the code of others has begun, and that ends in `SystemExit`
    or `KeyboardInterrupt`, does not end it.

    Raises:
        StopRequestedError: The process was asked to stop ([`stopping`]) before the coroutine had ended.
    """
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run_in_new_loop(coroutine)
    outcome: list[Callable[[], T]] = []
    stops: list[Callable[[], None]] = []
    run = lambda: outcome.append(_settle(coroutine, stops))  # noqa: E731
    thread = threading.Thread(target=run, name="rollout", daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:  # Ctrl-C reaches this thread alone
        for stop in stops:
            stop()
        raise
    return outcome[0]()


def _settle(coroutine: Coroutine[Any, Any, T], stops: list[Callable[[], None]]) -> Callable[[], T]:
    """A function that returns or raises in the caller's thread what the coroutine did in this one."""
    try:
        result = _run_in_new_loop(coroutine, stops)
    except BaseException as error:
        raised = error

        def fail() -> T:
            raise raised

        return fail
    return lambda: result


def _run_in_new_loop(coroutine: Coroutine[Any, Any, T], stops: list[Callable[[], None]] | None = None) -> T:
    """`stops`: where to put what stops it from another thread."""
    loop = asyncio.new_event_loop()
    with noticing_interruptions(), keeping_thread_state():
        main = loop.create_task(coroutine)
        stopped = threading.Event()
        stop = partial(_stop, loop, stopped)
        if stops is not None:
            stops.append(stop)
        try:
            with calling(stop):
                return _run_until_done(loop, main, stopped)
        except RuntimeError as error:
            if main.done() or not stopped.is_set():
                raise
            raise StopRequestedError("a rollout was broken off, as a stop was requested") from error
        finally:
            forget_interruption()
            for task in asyncio.all_tasks(loop):
                task.cancel()
            try:  # lets the cancelled ones clean up, and waits for none of them for long
                _run_until_done(loop, loop.create_task(asyncio.sleep(0)))
                closing = within(loop.shutdown_asyncgens(), _LETS_GO_S, "cleaning up")
                with suppress(CallTimeoutError):
                    _run_until_done(loop, loop.create_task(closing))
            finally:
                loop.close()


def _run_until_done(
    loop: asyncio.AbstractEventLoop, main: asyncio.Task[T], stopped: threading.Event | None = None
) -> T:
    """Run the loop until `main` is done, or `stopped` is set, whatever else tries to end it."""
    while True:
        try:
            return loop.run_until_complete(main)
        except (SystemExit, KeyboardInterrupt) as error:
            raise_interruption(error)
            if main.done():
                return main.result()
            logger.error("a task of an environment, a tool or a reward function ended in %r", error, exc_info=error)
        except RuntimeError:  # of `main`, or as the loop was stopped
            if main.done() or (stopped is not None and stopped.is_set()):
                raise


def _stop(loop: asyncio.AbstractEventLoop, stopped: threading.Event) -> None:
    stopped.set()
    with suppress(RuntimeError):  # the loop is closed: it has ended by itself
        loop.call_soon_threadsafe(loop.stop)
