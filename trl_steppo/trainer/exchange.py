"""What the steps of an update are, what is known of them, and how ranks hand it to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from accelerate import PartialState
from torch.nn.functional import pad

from ..batching import StepBatch, step_ids
from ..errors import CheckpointError, ConfigurationError, DataError, RolloutError, SamplerError, StepPOError
from ..stopping import StopRequestedError
from ..types import Episode
from .credit import Credit
from .ranks import gather_objects

T = TypeVar("T")

_KINDS = (StopRequestedError, ConfigurationError, DataError, CheckpointError, SamplerError, RolloutError)


@dataclass
class Steps:
    """
    The steps of episodes, counted in the order of the episodes.

    Args:
        episodes (`Sequence[Episode]`):
            Valid ones.
        sequences (`list[list[np.ndarray]]`):
            Of each episode, its steps' tokens.
        first_step (`list[int]`):
            Number of each episode's first step.
    """

    episodes: Sequence[Episode]
    sequences: list[list[np.ndarray]]
    first_step: list[int]

    @classmethod
    def of(cls, episodes: Sequence[Episode]) -> Steps:
        """Count them."""
        sequences = [[step_ids(step) for step in episode.steps] for episode in episodes]
        return cls(episodes, sequences, list(accumulate(map(len, sequences), initial=0))[:-1])


@dataclass
class Rollout:
    """The valid episodes of one update on this rank, and the tensors that describe all their steps."""

    steps: Steps
    batch: StepBatch

    @property
    def episodes(self) -> Sequence[Episode]:
        return self.steps.episodes


@dataclass
class Scores:
    """
    What the networks say before the update, step-major over the rollout.

    Args:
        old_logprobs, ref_logprobs (`torch.Tensor`, *optional*):
            (N, A). Without `old_logprobs`, the training pass gives them: nothing has moved before its only step.
        values (`torch.Tensor`, *optional*):
            (N,) for `step_gae`, (N, A) for `token_gae`.
        bootstrap_values (`torch.Tensor`, *optional*):
            (E,), 0 where an episode terminated.
    """

    old_logprobs: torch.Tensor | None
    ref_logprobs: torch.Tensor | None
    values: torch.Tensor | None
    bootstrap_values: torch.Tensor | None


@dataclass
class Lesson:
    """
    What micro-batches are cut from.

    Args:
        steps ([`Steps`]):
            Of this rank, or of all ranks, one after another.
        scores ([`Scores`]), credit ([`Credit`]):
            Of these steps.
        num_episodes (`list[int]`):
            How many of the episodes are from each of these ranks.
        rank (`int`):
            Which of these is this one.
    """

    steps: Steps
    scores: Scores
    credit: Credit
    num_episodes: list[int]
    rank: int


@dataclass
class Caught:
    """What a block raised, if it did."""

    error: Exception | None = None


@contextmanager
def caught() -> Iterator[Caught]:
    """Keeps an exception for later; libraries wrap "no space left" in exceptions of their own, so any."""
    found = Caught()
    try:
        yield found
    except Exception as error:
        found.error = error


def first_failure(found: Caught, gather: Callable[[list[Any]], list[Any]] = gather_objects) -> str | None:
    """What the first rank caught that caught anything, told to all of them. Every rank must call it."""
    failures = gather([None if found.error is None else str(found.error)])
    return next((failure for failure in failures if failure is not None), None)


def together(act: Callable[[], T], within: AbstractContextManager[Any] | None = None) -> T:
    """
    Do something on every rank, `within` some context, which is left when all have done it. What fails on one is raised
    on all of them then, so that none waits for another: where it failed as it is, elsewhere as the error of this
    package that it is nearest to. Every rank must call it.
    """
    with within or nullcontext():
        with caught() as found:
            result = act()
        failures = gather_objects([None if found.error is None else _that_travels(found.error)])
    if found.error is not None:
        raise found.error
    for failure in failures:
        if failure is not None:
            raise failure
    return result


def _that_travels(error: Exception) -> StepPOError:
    """The same as a plain one of this package: one's own class may not be known elsewhere, or not be built so."""
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RolloutError)
    what = str(error) if isinstance(error, StepPOError) else f"{type(error).__name__}: {error}"
    return kind(f"on another rank: {what}")


def own_lesson(rollout: Rollout, scores: Scores, credit: Credit) -> Lesson:
    """This rank's own steps."""
    return Lesson(rollout.steps, scores, credit, [len(rollout.episodes)], 0)


def lesson_of_all_ranks(rollout: Rollout, scores: Scores, credit: Credit) -> Lesson:
    """The steps of all ranks, the same on each of them. Every rank must call it."""
    if PartialState().num_processes == 1:
        return own_lesson(rollout, scores, credit)
    device = rollout.batch.rewards.device
    found = gather_objects([(list(map(_bare, rollout.episodes)), _moved(scores, "cpu"), _moved(credit, "cpu"))])
    episodes, all_scores, all_credit = zip(*found, strict=True)
    return Lesson(
        Steps.of([episode for of_rank in episodes for episode in of_rank]),
        _moved(_joined(all_scores), device),
        _moved(_joined(all_credit), device),
        list(map(len, episodes)),
        PartialState().process_index,
    )


def _bare(episode: Episode) -> Episode:
    """Without what nothing is learned from, which may be large, or unfit for a journey."""
    steps = tuple(replace(step, observation="", info={}) for step in episode.steps)
    return replace(episode, steps=steps, metrics={})


def _moved(found: Any, device: torch.device | str) -> Any:
    """The same dataclass with its tensors on a device."""
    values = {field.name: getattr(found, field.name) for field in fields(found)}
    return replace(found, **{name: x.to(device) for name, x in values.items() if isinstance(x, torch.Tensor)})


def _joined(found: Sequence[Any]) -> Any:
    """Dataclasses of step-major tensors as one; rows of action tokens as wide as the widest."""
    joined = {}
    for field in fields(found[0]):
        tensors = [getattr(one, field.name) for one in found]
        if not isinstance(tensors[0], torch.Tensor):
            continue
        if tensors[0].dim() == 2:
            width = max(tensor.shape[1] for tensor in tensors)
            tensors = [pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors]
        joined[field.name] = torch.cat(tensors)
    return replace(found[0], **joined)
