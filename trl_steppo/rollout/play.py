"""Plays many episodes at once: one thread that waits for all of them, each in its own coroutine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

from ..calls import MainThreadNeededError, NewEnvironmentNeededError
from ..chat import ChatFormat
from ..environments.slots import Slots
from ..errors import ConfigurationError, RolloutError, SamplerError
from ..inference.base import Sampler, SamplingParams
from ..types import Episode, EpisodeLimits, renamed_keyword
from .episode import failed_episode, run_episode
from .loops import run_coroutine
from .pacing import InFlight
from .rows import own_row, question_of
from .stage import CANCELLING_S, MakePlayable, Place, Stage

__all__ = ["EpisodeRequest", "play_concurrently", "play_episodes", "run_coroutine"]

logger = logging.getLogger(__name__)

_ATTEMPTS = 3  # at an episode whose sampler fails


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
    make_playable: MakePlayable | Stage,
    sampler: Sampler,
    *,
    chat: ChatFormat | Callable[[Mapping[str, Any]], ChatFormat | None] | None,
    limits: EpisodeLimits,
    sampling: SamplingParams,
    run_seed: int,
    make_timeout_s: float | None = None,
    max_concurrent_episodes: int | None = None,
    slots: Slots | None = None,
    grace_s: float = 0.25,
    id_prefix: str = "",
    on_episode: Callable[[], None] | None = None,
    holds: bool = False,
) -> list[Episode]:
    """
    Play all requested episodes concurrently and wait for them. May be called from a thread that runs an event loop:
    the rollout then has one of its own, in a fresh thread.

    Args:
        requests (`Sequence[EpisodeRequest]`):
            What to play.
        make_playable (`Callable[[Mapping], Playable | None]` or [`~stage.Stage`]):
            Makes the environment of one episode from its row, which is closed when the episode is over. Called for one
            episode after the other, in the order of the requests, each time in a thread of the environment's own; what
            it raises fails that episode. A [`~stage.Stage`] keeps environments from one rollout to the next.
        sampler ([`Sampler`]):
            The policy; called concurrently.
        chat ([`ChatFormat`] or `Callable[[Mapping], ChatFormat | None]`, *optional*):
            See [`run_episode`]; a function gives that of a row.
        limits, sampling, run_seed:
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
        holds (`bool`, *optional*, defaults to `False`):
            Whether environments stay as their episodes have left them, until the stage's `release`.

    Returns:
        `list[Episode]`: in the order of the requests.

    Raises:
        SamplerError: The sampler failed for good, or again and again.
        ConfigurationError: An environment or a tool works in the main thread only, which has no time for it.
    """
    in_flight = InFlight(grace_s=grace_s)
    stage = (
        make_playable
        if isinstance(make_playable, Stage)
        else Stage(make_playable, reuses=False, close_timeout_s=limits.max_episode_s)
    )
    rollout = _Rollout(
        stage=stage,
        sampler=sampler,
        chat_of=chat if callable(chat) else lambda row: chat,
        limits=limits,
        sampling=sampling,
        run_seed=run_seed,
        in_flight=in_flight,
        make_timeout_s=make_timeout_s if make_timeout_s is not None else limits.max_episode_s,
        id_prefix=id_prefix,
        holds=holds,
    )
    try:
        return stage.run(
            play_concurrently(
                requests,
                rollout.play_one,
                sampler,
                in_flight,
                max_concurrent_episodes=max_concurrent_episodes,
                slots=slots,
                on_episode=on_episode,
            )
        )
    finally:
        if stage is not make_playable:
            stage.close()


@dataclass(frozen=True)
class _Rollout:
    stage: Stage
    sampler: Sampler
    chat_of: Callable[[Mapping[str, Any]], ChatFormat | None]
    limits: EpisodeLimits
    sampling: SamplingParams
    run_seed: int
    in_flight: InFlight
    make_timeout_s: float | None
    id_prefix: str
    holds: bool

    async def play_one(self, request: EpisodeRequest) -> Episode:
        episode_id = f"{self.id_prefix}{request.stream_position}-{request.generation_index}"
        try:
            place = await self.stage.take(request.row, self.make_timeout_s)
        except MainThreadNeededError as error:
            raise _cannot_play(error) from error
        except Exception as error:
            return failed_episode(
                request.stream_position,
                request.generation_index,
                error,
                stage="making the environment",
                episode_id=episode_id,
            )
        is_well = False
        try:
            episode = await self._play_at(place, request, episode_id)
            is_well = episode.valid
            return episode
        except MainThreadNeededError as error:
            try:
                self.stage.move_to_main_thread(place.kind, error)
            except MainThreadNeededError:
                raise _cannot_play(error) from error
            raise
        finally:
            await self.stage.give_back(place, is_well=is_well, name=episode_id, is_held=self.holds)

    async def _play_at(self, place: Place, request: EpisodeRequest, episode_id: str) -> Episode:
        return await run_episode(
            place.playable,
            self.sampler,
            request.row,
            chat=self.chat_of(request.row),
            limits=self.limits,
            sampling=self.sampling,
            run_seed=self.run_seed,
            stream_position=request.stream_position,
            generation_index=request.generation_index,
            episode_id=episode_id,
            pacer=self.in_flight,
            closes=False,
        )


def _cannot_play(error: MainThreadNeededError) -> ConfigurationError:
    return ConfigurationError(
        f"{error}, and the main thread has no time for it while the next episodes are played: set `max_staleness=0`, "
        "and call `train()` in the main thread; or leave signals out: `tool_timeout_s` limits the time of a tool, and "
        "a process of its own can handle signals"
    )


async def play_concurrently(
    requests: Sequence[EpisodeRequest],
    play_one: Callable[[EpisodeRequest], Awaitable[Episode]],
    sampler: Sampler,
    in_flight: InFlight,
    *,
    max_concurrent_episodes: int | None,
    slots: Slots | None,
    on_episode: Callable[[], None] | None,
) -> list[Episode]:
    """
    Play all requests, `max_concurrent_episodes` at a time. Each player takes the next one when it is done with one, so
    that between the two it stays away from the sampler.
    """
    results: dict[int, Episode] = {}
    waiting = iter(enumerate(requests))

    async def player() -> None:
        try:
            for index, request in waiting:
                turn = slots.of("episode", priority=request.stream_position) if slots is not None else nullcontext()
                async with turn:
                    results[index] = await _despite_accidents(play_one, request)
                if on_episode is not None:
                    on_episode()
        finally:
            in_flight.back()

    num_players = min(max_concurrent_episodes or len(requests), len(requests))
    for _ in range(num_players):
        in_flight.away()
    sampler.pace(in_flight.settled)
    players = [asyncio.ensure_future(player()) for _ in range(num_players)]
    try:
        await asyncio.gather(*players)
    except BaseException:
        for playing in players:
            playing.cancel()
        await asyncio.wait(players, timeout=CANCELLING_S)
        raise
    finally:
        sampler.pace(None)
    return [results[index] for index in range(len(requests))]


async def _despite_accidents(
    play_one: Callable[[EpisodeRequest], Awaitable[Episode]], request: EpisodeRequest
) -> Episode:
    """
    Play a request again, from its beginning, where the sampler failed, unless that itself has given up; and once where
    its environment turned out to need the main thread. Each attempt has a row of its own: what an environment or an
    agent does to it, no other episode sees.
    """
    num_accidents = 0
    was_moved = False
    while True:
        own_request = replace(request, row=own_row(request.row))  # the last attempt may have changed its row
        try:
            episode = await play_one(own_request)
            return replace(episode, dataset_row=request.dataset_row, question=question_of(request.row))
        except NewEnvironmentNeededError:  # the old one is closed, and a new one never needs another
            continue
        except MainThreadNeededError as error:
            if was_moved:
                return failed_episode(request.stream_position, request.generation_index, error, stage="playing")
            was_moved = True
        except SamplerError as error:
            num_accidents += 1
            has_given_up = isinstance(error.__cause__, RolloutError) and not isinstance(error.__cause__, SamplerError)
            if num_accidents == _ATTEMPTS or has_given_up:
                raise
            logger.warning("%s; it is played again", error)
