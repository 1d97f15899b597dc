"""What objectives average over, and where they read and write, without a network."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from tests.trainer.tiny import make_config, mixed_episodes
from trl_steppo.batching import StepRolloutCollator
from trl_steppo.learning.objectives import PolicyObjective, ValueObjective, rows_of

NO_NETWORK: Any = None


def objective(kind: type, directory: Any, **settings: Any) -> Any:
    return kind(make_config(directory, **settings), NO_NETWORK, "rows", nullcontext)


@pytest.mark.parametrize(("aggregation", "expected"), [("token", 15), ("step", 4), ("episode", 2)])
def test_the_policys_loss_is_a_mean_over_tokens_steps_or_episodes(tmp_path, aggregation, expected):
    batch = StepRolloutCollator()(mixed_episodes())
    chosen = torch.isin(batch.episode_index, torch.tensor([0, 1]))  # responses of 4, 1, 3 and 7 tokens
    assert objective(PolicyObjective, tmp_path, loss_aggregation=aggregation).count(batch, chosen) == expected


def test_truncated_episodes_do_not_count_where_they_are_masked(tmp_path):
    episodes = mixed_episodes()
    batch = StepRolloutCollator()(episodes)
    everything = torch.ones(batch.num_steps, dtype=torch.bool)
    masked = objective(PolicyObjective, tmp_path, loss_aggregation="episode", mask_truncated_completions=True)
    assert masked.count(batch, everything) == sum(not episode.truncated for episode in episodes)


@pytest.mark.parametrize(("estimator", "expected"), [("step_gae", 4), ("token_gae", 15)])
def test_the_critics_loss_is_a_mean_over_its_values(tmp_path, estimator, expected):
    batch = StepRolloutCollator()(mixed_episodes())
    critic = objective(ValueObjective, tmp_path, advantage_estimator=estimator)
    chosen = torch.isin(batch.episode_index, torch.tensor([0, 1]))
    assert critic.count(batch, chosen) == expected
    assert critic.zeros(batch).shape == {4: (batch.num_steps,), 15: batch.action_mask.shape}[expected]


@pytest.mark.parametrize("shape", [(4,), (4, 5)])
def test_rows_of_a_micro_batch(shape):
    """Narrower than those of the whole batch, where another step has the longest response."""
    whole = torch.arange(20).view(4, 5) if len(shape) == 2 else torch.arange(4)
    rows = rows_of(torch.tensor([2, 0]), torch.zeros(2, *(3 for _ in shape[1:])))
    assert whole[rows].tolist() == ([[10, 11, 12], [0, 1, 2]] if len(shape) == 2 else [2, 0])
