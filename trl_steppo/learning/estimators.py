"""From rewards and values to what each action token is weighted with: where the algorithms differ, and only here.

StepPO and token-level PPO share everything but this choice and the importance ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..advantages import (
    GroupBaseline,
    broadcast_to_tokens,
    discounted_returns,
    explained_variance,
    from_episode_grid,
    from_token_grid,
    gigpo_step_advantages,
    group_advantages,
    step_gae,
    to_episode_grid,
    to_token_grid,
    token_gae,
)
from ..batching import StepBatch
from ..masked import Reduce, masked_whiten
from ..types import Episode
from .settings import LearnerSettings
from .update import Credit

_MOST_STEPS_LOGGED = 16
"""Steps that have an explained variance of their own where `max_interaction_steps` is `None`."""


def assign_credit(
    args: LearnerSettings,
    batch: StepBatch,
    *,
    token_penalties: torch.Tensor,
    values: torch.Tensor | None,
    bootstrap_values: torch.Tensor | None,
    group_index: torch.Tensor,
    state_index: torch.Tensor,
    reduce: Reduce | None = None,
) -> Credit:
    """
    Args:
        args ([`LearnerSettings`]):
            `advantage_estimator`, `gamma`, `lam`, `whiten_rewards`.
        batch ([`StepBatch`]):
            All steps of this rank.
        token_penalties (`torch.Tensor`):
            (N, A), added to the rewards of the action tokens (−`kl_coef`·KL); 0 where masked.
        values (`torch.Tensor`, *optional*):
            State values: (N,) for `step_gae`, (N, A) for `token_gae`.
        bootstrap_values (`torch.Tensor`, *optional*):
            (E,), the value after each episode's last step.
        group_index (`torch.Tensor`):
            (E,), equal for the episodes of one dataset row.
        state_index (`torch.Tensor`):
            (N,), equal for the steps of one dataset row that were taken in the same state.
        reduce (`Callable`, *optional*):
            Sums statistics over ranks.
    """
    index = (batch.episode_index, batch.step_index, batch.num_episodes)
    step_rewards, step_mask = to_episode_grid(batch.rewards + token_penalties.sum(-1), *index)  # (E, S)

    if args.advantage_estimator == "step_gae":
        assert values is not None
        if args.whiten_rewards:
            step_rewards = masked_whiten(step_rewards, step_mask, shift_mean=False, reduce=reduce)
        grid_values, _ = to_episode_grid(values, *index)
        advantages, returns = step_gae(
            step_rewards, grid_values, step_mask, gamma=args.gamma, lam=args.lam, bootstrap_values=bootstrap_values
        )
        monte_carlo = discounted_returns(step_rewards, step_mask, gamma=args.gamma)
        return Credit(
            broadcast_to_tokens(
                from_episode_grid(masked_whiten(advantages, step_mask, reduce=reduce), *index[:2]), batch.action_mask
            ),
            from_episode_grid(returns, *index[:2]),
            _explained_variance(
                grid_values, monte_carlo, step_mask, _step_numbers(step_mask), args.max_interaction_steps, reduce
            ),
        )

    if args.advantage_estimator in ("token_gae", "reinforce_plus_plus"):
        token_rewards, token_mask = to_token_grid(_token_rewards(batch, token_penalties), batch.action_mask, *index)
        if values is None:  # REINFORCE++: the return of each token, without a critic
            advantages = discounted_returns(token_rewards, token_mask, gamma=args.gamma)
            return Credit(_to_steps(masked_whiten(advantages, token_mask, reduce=reduce), batch), None, {})
        if args.whiten_rewards:
            token_rewards = masked_whiten(token_rewards, token_mask, shift_mean=False, reduce=reduce)
        grid_values, _ = to_token_grid(values, batch.action_mask, *index)
        advantages, returns = token_gae(
            token_rewards, grid_values, token_mask, gamma=args.gamma, lam=args.lam, bootstrap_values=bootstrap_values
        )
        monte_carlo = discounted_returns(token_rewards, token_mask, gamma=args.gamma)
        numbers = batch.step_index[:, None].expand_as(batch.action_mask)
        grid_numbers, _ = to_token_grid(numbers, batch.action_mask, *index)
        return Credit(
            _to_steps(masked_whiten(advantages, token_mask, reduce=reduce), batch),
            _to_steps(returns, batch),
            _explained_variance(
                grid_values, monte_carlo, token_mask, grid_numbers, args.max_interaction_steps, reduce
            ),
        )

    baseline: GroupBaseline = "rloo" if args.advantage_estimator == "rloo" else "grpo"
    of_episode = group_advantages(step_rewards.sum(-1), group_index, baseline)  # (E,)
    of_step = of_episode[batch.episode_index]
    if args.advantage_estimator == "gigpo":
        step_returns = discounted_returns(step_rewards, step_mask, gamma=args.gamma)
        of_step = of_step + gigpo_step_advantages(from_episode_grid(step_returns, *index[:2]), state_index)
    return Credit(broadcast_to_tokens(of_step, batch.action_mask), None, {})


def _token_rewards(batch: StepBatch, token_penalties: torch.Tensor) -> torch.Tensor:
    """(N, A): each step's reward on its last action token, and the penalties on all of them."""
    last = batch.action_mask.sum(-1) - 1
    return token_penalties.scatter_add(-1, last[:, None], batch.rewards[:, None])


def _to_steps(grid: torch.Tensor, batch: StepBatch) -> torch.Tensor:
    return from_token_grid(grid, batch.action_mask, batch.episode_index, batch.step_index)


def _step_numbers(step_mask: torch.Tensor) -> torch.Tensor:
    return torch.arange(step_mask.shape[1], device=step_mask.device).expand_as(step_mask)


def _explained_variance(
    values: torch.Tensor,
    returns: torch.Tensor,
    mask: torch.Tensor,
    step_numbers: torch.Tensor,
    max_steps: int | None,
    reduce: Reduce | None,
) -> dict[str, float]:
    found = {"critic/explained_variance": explained_variance(values, returns, mask, reduce)}
    # A bound that all ranks share: each of them reduces as often.
    for number in range(_MOST_STEPS_LOGGED if max_steps is None else max_steps):
        at_step = mask & (step_numbers == number)
        found[f"critic/explained_variance/step_{number}"] = explained_variance(values, returns, at_step, reduce)
    return {name: float(value) for name, value in found.items() if value is not None}


def group_indices(episodes: Sequence[Episode], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(E,) equal for the episodes of a row, and (N,) equal for the steps of a row that were taken in one state."""
    states: dict[tuple[int, Any], int] = {}
    step_states = []
    for episode in episodes:
        observed: Any = None  # the state of a step that has no key of its own: what was observed last
        for step in episode.steps:
            key = step.info.get("state_key", repr(observed))
            step_states.append(states.setdefault((episode.stream_position, _hashable(key)), len(states)))
            observed = step.observation
    rows: dict[int, int] = {}
    groups = [rows.setdefault(episode.stream_position, len(rows)) for episode in episodes]
    return torch.tensor(groups, device=device).long(), torch.tensor(step_states, device=device).long()


def _hashable(key: Any) -> Any:
    """A user's key that cannot be one (a list, say) as text: no reason for a run to end."""
    try:
        hash(key)
    except TypeError:
        return repr(key)
    return key
