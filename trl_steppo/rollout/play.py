"""Plays many episodes at once: one thread that waits for all of them, each in its own coroutine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from .. import tracing
from ..calls import MainThreadNeededError, NewEnvironmentNeededError
from ..environments.slots import Slots
from ..episodes import EpisodeSpec
from ..errors import RolloutError, SamplerError
from ..inference.base import Pacer, Sampler
from ..names import renamed_keyword
from ..types import Episode, Row
from .episode import failed_episode
from .pacing import EpisodePacer
from .rows import own_row, question_of
from .stage import CANCEL_TIMEOUT_S

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_ATTEMPTS = 3  # at an episode whose sampler fails


@renamed_keyword("row_index", "stream_position")
@dataclass(frozen=True)
class EpisodeRequest:
    """
    One episode to play.

    Args:
        row (`Mapping`):
            The dataset row.
        stream_position (`int`):
            Position of the row in the shuffled stream of rows, counted over all epochs.
        generation_index (`int`, *optional*, defaults to `0`):
            Which of the row's episodes this is.
        dataset_row (`int`, *optional*):
            Index of the row in the dataset.
    """

    row: Row
    stream_position: int
    generation_index: int = 0
    dataset_row: int | None = None

    def spec(self, settings: EpisodeSpec) -> EpisodeSpec:
        """The settings of a rollout, at this episode's place in the run."""
        return replace(
            settings,
            stream_position=self.stream_position,
            generation_index=self.generation_index,
            dataset_row=self.dataset_row,
        )


class Player(Protocol):
    """Plays episodes: in environments ([`EnvironmentPlayer`]), or with an agent ([`AgentPlayer`])."""

    @property
    def sampler(self) -> Sampler:
        """The policy, which is called concurrently."""
        ...

    def run(self, rollout: Coroutine[object, None, T], pacer: Pacer) -> T:
        """Run a coroutine that awaits [`play`], from sync code and to its end."""
        ...

    async def play(self, request: EpisodeRequest, pacer: Pacer) -> Episode:
        """
        Play one episode.

        Raises:
            SamplerError, MainThreadNeededError, NewEnvironmentNeededError: It may be played again.
            ConfigurationError: It never can be played.
        """
        ...


def play_episodes(
    requests: Sequence[EpisodeRequest],
    player: Player,
    *,
    max_concurrent_episodes: int | None = None,
    slots: Slots | None = None,
    grace_s: float = 0.25,
    on_episode: Callable[[], None] | None = None,
) -> list[Episode]:
    """
    Play all requested episodes concurrently and wait for them. May be called from a thread that runs an event loop:
    the rollout then has one of its own, in a fresh thread.

    Args:
        requests (`Sequence[EpisodeRequest]`):
            What to play.
        player ([`Player`]):
            Plays one episode.
        max_concurrent_episodes (`int`, *optional*):
            Maximum number of episodes that are played at a time; `None`: all.
        slots ([`Slots`], *optional*):
            Bounds how many are played at a time by this and other rollouts together, the first rows first.
        grace_s (`float`, *optional*, defaults to `0.25`):
            How long the sampler may wait for environments that have not answered yet ([`EpisodePacer`]).
        on_episode (`Callable`, *optional*):
            Called whenever an episode has ended.

    Returns:
        `list[Episode]`: in the order of the requests.

    Raises:
        SamplerError: The sampler failed for good, or again and again.
        ConfigurationError: An environment or a tool works in the main thread only, which has no time for it.
    """
    pacer = EpisodePacer(grace_s=grace_s)
    name = f"rollout {id(pacer)}"  # episodes may be played in another thread than this
    num_players = min(max_concurrent_episodes or len(requests), len(requests))
    results: dict[int, Episode] = {}
    waiting = iter(enumerate(requests))

    async def play_some() -> None:
        """Plays one request after another, and stays away from the sampler between two of them."""
        try:
            for index, request in waiting:
                turn = slots.of("episode", priority=request.stream_position) if slots is not None else nullcontext()
                async with turn:
                    results[index] = await _despite_accidents(player, request, pacer, within=name)
                if on_episode is not None:
                    on_episode()
        finally:
            pacer.arrived()

    async def play_all() -> None:
        for _ in range(num_players):
            pacer.left()
        player.sampler.pace(pacer.quiet)
        tasks = [asyncio.ensure_future(play_some()) for _ in range(num_players)]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=CANCEL_TIMEOUT_S)
            raise
        finally:
            player.sampler.pace(None)

    with tracing.shared(name):
        player.run(play_all(), pacer)
    return [results[index] for index in range(len(requests))]


async def _despite_accidents(player: Player, request: EpisodeRequest, pacer: Pacer, *, within: str) -> Episode:
    """
    Play a request again, from its beginning, where the sampler failed, unless that itself has given up; and once where
    its environment turned out to need the main thread. Each attempt has a row of its own: what an environment or an
    agent does to it, no other episode sees.
    """
    num_accidents = 0
    was_moved = False
    while True:
        attempt = replace(request, row=own_row(request.row))  # the last attempt may have changed its row
        try:
            episode = await _traced(player, attempt, pacer, within)
            return replace(episode, question=question_of(request.row))
        except NewEnvironmentNeededError:  # the old one is closed, and a new one never needs another
            continue
        except MainThreadNeededError as error:
            if was_moved:
                spec = request.spec(EpisodeSpec())
                return failed_episode(spec, spec.name, error, stage="playing")
            was_moved = True
        except SamplerError as error:
            num_accidents += 1
            has_given_up = isinstance(error.__cause__, RolloutError) and not isinstance(error.__cause__, SamplerError)
            if num_accidents == _MAX_ATTEMPTS or has_given_up:
                raise
            logger.warning("%s; it is played again", error)


async def _traced(player: Player, request: EpisodeRequest, pacer: Pacer, within: str) -> Episode:
    """Play an episode, in a span of its own."""
    with tracing.span("episode", within=within) as span:
        episode = await player.play(request, pacer)
        span.set(
            gen_ai__conversation__id=episode.episode_id,
            steppo__stream_position=request.stream_position,
            steppo__generation_index=request.generation_index,
            steppo__dataset_row=request.dataset_row,
            steppo__num_steps=len(episode.steps),
            steppo__reward=episode.episode_return if episode.valid else None,  # before reward functions
            steppo__truncated=episode.truncated,
            steppo__stop_reason=None if episode.stop_reason is None else episode.stop_reason.value,
        )
        if episode.error is not None:
            span.fail(episode.error)
        return episode
