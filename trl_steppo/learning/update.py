"""What one update knows: the steps of its episodes, what the networks say of them, and what is learned from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch

from ..batching import StepBatch, step_ids
from ..types import Episode


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Rollout:
    """The valid episodes of one update on this rank, and the tensors that describe all their steps."""

    steps: Steps
    batch: StepBatch

    @property
    def episodes(self) -> Sequence[Episode]:
        return self.steps.episodes


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Credit:
    """
    What the update learns from.

    Args:
        advantages (`torch.Tensor`):
            (N, A), whitened where the estimator asks for it; 0 where masked.
        returns (`torch.Tensor`, *optional*):
            Targets of the critic, not whitened: (N,), or (N, A) for `token_gae`. `None` without a critic.
        explained_variance (`dict[str, float]`):
            `critic/explained_variance`, and by step index; a key is absent where the returns do not vary.
    """

    advantages: torch.Tensor
    returns: torch.Tensor | None
    explained_variance: dict[str, float]


@dataclass(frozen=True)
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
