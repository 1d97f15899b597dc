"""Where the episodes of an update come from: they are played now, were played ahead, or are recorded."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from accelerate import Accelerator
from transformers import TrainerState

from ..batching import num_unique_tokens
from ..learning.metrics import Means
from ..learning.ranks import summed, together
from ..models import gathered
from ..rollout import Ahead, EpisodeRequest, episode_file, fail_beyond_float32, load_episodes
from ..types import Episode, StopReason
from .data_stream import Rows
from .engines import Engine
from .metrics import add_episode_metrics
from .player import EpisodePlayer
from .steppo_config import StepPOConfig
from .update_record import UpdateRecord

logger = logging.getLogger(__name__)

Played = tuple[list[EpisodeRequest], list[Episode]]
"""What was asked for, and the episodes, which are still to be paid."""


class RolloutSource(Protocol):
    """Gives the episodes of one update after the other."""

    def take(self, update: UpdateRecord) -> list[Episode]:
        """This rank's episodes of an update, with their rewards. Collective: every rank must call this."""
        ...

    def close(self) -> None:
        """Abandon what is still being played, at the end of a run. Another run may follow."""
        ...


def make_source(
    args: StepPOConfig, accelerator: Accelerator, rows: Rows, player: EpisodePlayer, engine: Engine
) -> RolloutSource:
    """The source that the run's settings choose."""
    if args.replay_episodes_dir is not None:
        return ReplayedRollouts(args.replay_episodes_dir, accelerator.process_index)
    schedule = RowSchedule.of(args, accelerator, rows)
    if args.max_staleness:
        return RolloutsAhead(player, schedule, args.max_staleness)
    return SynchronousRollouts(player, schedule, engine)


@dataclass(frozen=True)
class RowSchedule:
    """
    Which rows a rank plays in which update.

    Args:
        rows ([`Rows`]):
            The stream of rows.
        rows_per_update (`int`), rows_per_rank (`int`):
            How many of them an update plays, on all ranks and on one.
        num_generations (`int`):
            Episodes of a row, which all are played by one rank.
        rank (`int`):
            This rank.
    """

    rows: Rows
    rows_per_update: int
    rows_per_rank: int
    num_generations: int
    rank: int

    @classmethod
    def of(cls, args: StepPOConfig, accelerator: Accelerator, rows: Rows) -> RowSchedule:
        """The schedule of a run's settings."""
        assert args.batch_size is not None
        per_update = args.batch_size // args.num_generations
        per_rank = per_update // accelerator.num_processes
        return cls(rows, per_update, per_rank, args.num_generations, accelerator.process_index)

    def requests(self, update: UpdateRecord, index: int) -> list[EpisodeRequest]:
        """
        This rank's episodes of an update.

        Args:
            update ([`UpdateRecord`]):
                The update that is being made.
            index (`int`):
                Which update: this one, or one that is still to come.
        """
        first = update.first_row + (index - update.index) * self.rows_per_update + self.rank * self.rows_per_rank
        requests = []
        for position in range(first, first + self.rows_per_rank):
            row, dataset_row = self.rows[position], self.rows.row_number(position)
            requests += [EpisodeRequest(row, position, number, dataset_row) for number in range(self.num_generations)]
        return requests


class SynchronousRollouts:
    """
    Episodes are played when their update begins, by the policy as it is then.

    Args:
        player ([`EpisodePlayer`]):
            Plays them.
        schedule ([`RowSchedule`]):
            Says which.
        engine ([`Engine`]):
            Samples; it runs.
    """

    def __init__(self, player: EpisodePlayer, schedule: RowSchedule, engine: Engine) -> None:
        self._player = player
        self._schedule = schedule
        self._engine = engine

    def take(self, update: UpdateRecord) -> list[Episode]:
        """See [`RolloutSource`]."""
        played = together(partial(self._play, update), self._engine.sampling())
        return pay_together(self._player, played, update.state, update.reward_means)

    def close(self) -> None:
        """Nothing is being played between updates."""

    def _play(self, update: UpdateRecord) -> Played:
        requests = self._player.prepare(self._schedule.requests(update, update.index))
        return requests, self._player.play(requests, update=update.index)


class RolloutsAhead:
    """
    Episodes are played while earlier updates are made, by a policy that is at most `max_staleness` updates older.

    Args:
        player ([`EpisodePlayer`]):
            Plays them, in other threads.
        schedule ([`RowSchedule`]):
            Says which.
        max_staleness (`int`):
            See [`~rollout.Ahead`].
    """

    def __init__(self, player: EpisodePlayer, schedule: RowSchedule, max_staleness: int) -> None:
        self._player = player
        self._schedule = schedule
        self._ahead = Ahead(self._prepare, max_staleness)
        self._update: UpdateRecord | None = None  # being made while rollouts of later ones begin

    def take(self, update: UpdateRecord) -> list[Episode]:
        """See [`RolloutSource`]."""
        self._update = update
        together(partial(self._ahead.begin, update.index, update.state.max_steps))
        played = together(partial(self._ahead.take, update.index))
        return pay_together(self._player, played, update.state, update.reward_means)

    def close(self) -> None:
        """See [`RolloutSource`]."""
        self._ahead.close()

    def _prepare(self, index: int) -> Callable[[], Played]:
        assert self._update is not None
        requests = self._player.prepare(self._schedule.requests(self._update, index))
        return lambda: (requests, self._player.play(requests, update=index))


class ReplayedRollouts:
    """
    Episodes that another run has written (`dump_episodes_dir`).

    Args:
        directory (`str`):
            Where they are.
        rank (`int`):
            This rank.
    """

    def __init__(self, directory: str, rank: int) -> None:
        self._directory = directory
        self._rank = rank

    def take(self, update: UpdateRecord) -> list[Episode]:
        """See [`RolloutSource`]."""
        episodes = together(partial(load_episodes, episode_file(self._directory, update.index, self._rank)))
        return [fail_beyond_float32(episode) for episode in episodes]

    def close(self) -> None:
        """Nothing is played."""


def pay_together(player: EpisodePlayer, played: Played, state: TrainerState, means: Means) -> list[Episode]:
    """
    Episodes with the rewards of reward functions and reward models. Collective: every rank must call this.

    Args:
        player ([`EpisodePlayer`]):
            Has played them.
        played (`tuple`):
            This rank's requests and episodes.
        state (`TrainerState`):
            Shown to reward functions.
        means ([`Means`]):
            Takes the metrics that reward functions log.
    """
    pay = partial(player.pay_rewards, *played, trainer_state=state, log_metric=means.add)
    weights = [parameter for model in player.rewards.models for parameter in model.parameters()]
    return together(pay, gathered(weights))  # a judge may take as long as an episode, or fail on one rank


# -- what they have come to -------------------------------------------------------------------------------------------


_DEFAULT_BUDGETS = (StopReason.MAX_INTERACTION_STEPS, StopReason.MAX_PROMPT_LENGTH)
"""Budgets that cut episodes unless settings say otherwise."""


class Inspection:
    """
    Looks at the episodes of each update: measures them, and warns of what the user may not expect.

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the ranks.
        eos_token_id (`int`, *optional*):
            The tokenizer's.
    """

    def __init__(self, args: StepPOConfig, accelerator: Accelerator, *, eos_token_id: int | None) -> None:
        self._args = args
        self._accelerator = accelerator
        self._eos_token_id = eos_token_id
        self._warned: set[StopReason] = set()

    def num_valid(self, update: UpdateRecord, episodes: Sequence[Episode]) -> int:
        """
        The number of episodes on all ranks that can be trained on. Collective: every rank must call this.

        Args:
            update ([`UpdateRecord`]):
                Takes the metrics of the episodes.
            episodes (`Sequence[Episode]`):
                This rank's.
        """
        add_episode_metrics(update.means, episodes, eos_token_id=self._eos_token_id)
        valid = [episode for episode in episodes if episode.valid]
        update.logs["perf/unique_tokens"] = num_unique_tokens(valid)
        errors = Counter(str(episode.error) for episode in episodes if not episode.valid)
        for error, count in errors.most_common(3):
            logger.warning(f"update {update.number}: {count} of {len(episodes)} episodes failed: {error}")
        num_cut = [sum(episode.stop_reason is reason for episode in episodes) for reason in _DEFAULT_BUDGETS]
        counts = torch.tensor([float(len(valid)), *map(float, num_cut)], device=self._accelerator.device)
        num_valid, *num_cut = map(int, summed(counts).tolist())
        for reason, count in zip(_DEFAULT_BUDGETS, num_cut, strict=True):
            if count and reason not in self._warned:
                self._warned.add(reason)
                self._warn_of_cut(update, reason, count)
        return num_valid

    def _warn_of_cut(self, update: UpdateRecord, reason: StopReason, count: int) -> None:
        """Warn, once for each, of episodes that end at a budget that nobody set."""
        cures = {
            StopReason.MAX_INTERACTION_STEPS: f"`max_interaction_steps` = {self._args.max_interaction_steps}. Raise "
            "it if your episodes need more steps",
            StopReason.MAX_PROMPT_LENGTH: "what the model's context leaves beside `response_length`. Set "
            "`max_interaction_steps`, `max_prompt_length` or `max_episode_tokens` if they should end before",
        }
        is_set = reason is StopReason.MAX_PROMPT_LENGTH and self._args.max_prompt_length is not None
        if self._accelerator.is_main_process and not is_set:
            logger.warning(f"update {update.number}: {count} episodes were cut at {cures[reason]} (told once)")


@contextmanager
def short_collections(device: torch.device) -> Iterator[None]:
    """
    Leave what exists already out of garbage collection. A full collection takes 0.3 s with all that torch and
    transformers have loaded, longer than a rollout waits for environments that it takes to be quick.
    """
    if gc.get_freeze_count():  # the program does so by itself
        yield
        return
    if device.type != "cpu":
        gc.collect()  # a model that nobody uses any more may hold the device's memory
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
