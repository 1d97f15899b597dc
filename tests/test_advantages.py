"""Advantages by hand, by brute force, and by the equivalences they owe each other."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from trl_steppo.advantages import (
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
from trl_steppo.errors import DataError
from trl_steppo.masked import masked_whiten

GAMMA, LAM = 0.9, 0.8
SEEDS = range(5)

# The golden batch: episodes A (0) of 3 steps and B (1) of 2, in the order A0, B1, A2, B0, A1; one reward, on A2.
EPISODE = torch.tensor([0, 1, 0, 1, 0])
STEP = torch.tensor([0, 1, 2, 0, 1])
VALUES = torch.tensor([0.2, 0.5, 0.6, 0.3, 0.4])
REWARDS = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])


def random_episodes(seed: int, prefix: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values and mask (E,T) of rows of any length, and bootstrap values (E,); nan wherever it is masked."""
    E, T = 4, 7
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, E, T, generator=generator, dtype=torch.float64)
    lengths = torch.randint(0, T + 1, (E, 1), generator=generator)
    mask = torch.arange(T) < lengths if prefix else torch.rand(E, T, generator=generator) < 0.6
    bootstrap_values = torch.randn(E, generator=generator, dtype=torch.float64)
    return rewards.where(mask, math.nan), values.where(mask, math.nan), mask, bootstrap_values


def direct_gae(rewards: list[float], values: list[float], bootstrap: float, gamma: float, lam: float) -> list[float]:
    """Σ_k (γλ)^k δ_{t+k} of one row without padding, as a sum and not as a recursion."""
    following = [*values, bootstrap][1:]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(deltas))]


def shuffled_steps(seed: int) -> tuple[Tensor, Tensor]:
    """Episode and step index (N,) of episodes of 3, 0, 1 and 4 steps, in a random order."""
    pairs = torch.tensor([(episode, step) for episode, n in enumerate([3, 0, 1, 4]) for step in range(n)])
    return tuple(pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))].unbind(dim=1))


# --- step_gae ---


@pytest.mark.parametrize(
    ("gamma", "lam", "raw", "whitened", "returns"),
    [
        (
            *(0.99, 1.0),
            [0.7801, -0.5, 0.4, -0.3, 0.59],
            [1.040764, -1.232445, 0.365780, -0.877284, 0.703184],
            [0.9801, 0.0, 1.0, 0.0, 0.99],
        ),
        (
            *(0.99, 0.95),
            [0.732273, -0.5, 0.4, -0.27525, 0.5702],
            [1.008861, -1.264599, 0.395840, -0.849950, 0.709848],
            [0.932273, 0.0, 1.0, 0.02475, 0.9702],
        ),
        (
            *(1.0, 1.0),
            [0.8, -0.5, 0.4, -0.3, 0.6],
            [1.052470, -1.227881, 0.350823, -0.877058, 0.701646],
            [1.0, 0.0, 1.0, 0.0, 1.0],
        ),
    ],
)
def test_golden_values(gamma, lam, raw, whitened, returns):
    (rewards, step_mask), (values, _) = (to_episode_grid(x, EPISODE, STEP) for x in (REWARDS, VALUES))
    grids = step_gae(rewards, values, step_mask, gamma=gamma, lam=lam)
    got_raw, got_returns = (from_episode_grid(grid, EPISODE, STEP) for grid in grids)
    got_whitened = from_episode_grid(masked_whiten(grids[0], step_mask), EPISODE, STEP)
    for got, expected in ((got_raw, raw), (got_whitened, whitened), (got_returns, returns)):
        torch.testing.assert_close(got, torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_is_the_direct_sum_of_td_errors(seed):
    rewards, values, mask, bootstrap_values = random_episodes(seed)
    advantages, returns = step_gae(rewards, values, mask, gamma=GAMMA, lam=LAM, bootstrap_values=bootstrap_values)
    for e, length in enumerate(mask.sum(dim=1).tolist()):
        row_rewards, row_values = rewards[e, :length].tolist(), values[e, :length].tolist()
        expected = direct_gae(row_rewards, row_values, bootstrap_values[e].item(), GAMMA, LAM)
        assert advantages[e, :length].tolist() == pytest.approx(expected)
        assert returns[e, :length].tolist() == pytest.approx(
            [a + v for a, v in zip(expected, row_values, strict=True)]
        )
    assert advantages[~mask].abs().sum() == 0.0
    assert returns[~mask].abs().sum() == 0.0


@pytest.mark.parametrize("seed", SEEDS)
def test_lambda_one_is_return_minus_value(seed):
    rewards, values, mask, _ = random_episodes(seed)
    advantages, returns = step_gae(rewards, values, mask, gamma=GAMMA, lam=1.0)
    expected = discounted_returns(rewards, mask, gamma=GAMMA)
    torch.testing.assert_close(returns, expected)
    torch.testing.assert_close(advantages, (expected - values).where(mask, 0.0))


def test_lambda_zero_is_the_one_step_td_error():
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25]])
    advantages, _ = step_gae(rewards, values, torch.ones(1, 2).bool(), gamma=0.5, lam=0.0)
    assert advantages.tolist() == [[1 + 0.5 * 0.25 - 0.5, 2 - 0.25]]


def test_gamma_zero_is_reward_minus_value():
    rewards, values, mask, bootstrap_values = random_episodes(0)
    advantages, _ = step_gae(rewards, values, mask, gamma=0.0, lam=LAM, bootstrap_values=bootstrap_values)
    torch.testing.assert_close(advantages, (rewards - values).where(mask, 0.0))


def test_perfect_values_leave_no_advantage():
    rewards, _, mask, _ = random_episodes(1)
    advantages, _ = step_gae(rewards, discounted_returns(rewards, mask, gamma=GAMMA), mask, gamma=GAMMA, lam=LAM)
    torch.testing.assert_close(advantages, torch.zeros_like(advantages))


def test_reduces_to_token_gae_when_every_step_has_one_token():
    episode_index, step_index = shuffled_steps(0)
    rewards, values = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    one_token = torch.ones(8, 1, dtype=torch.bool)

    step_grids = [to_episode_grid(x, episode_index, step_index) for x in (rewards, values)]
    token_grids = [to_token_grid(x[:, None], one_token, episode_index, step_index) for x in (rewards, values)]
    by_step = step_gae(step_grids[0][0], *step_grids[1], gamma=GAMMA, lam=LAM)
    by_token = token_gae(token_grids[0][0], *token_grids[1], gamma=GAMMA, lam=LAM)
    for step_grid, token_grid in zip(by_step, by_token, strict=True):
        step_x = from_episode_grid(step_grid, episode_index, step_index)
        assert torch.equal(step_x, from_token_grid(token_grid, one_token, episode_index, step_index)[:, 0])


def test_truncated_bootstraps_after_its_own_last_step_and_terminated_does_not():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards, values = torch.zeros(2, 3), torch.zeros(2, 3)
    bootstrap_values = torch.tensor([0.0, 8.0])
    _, returns = step_gae(rewards, values, mask, gamma=0.5, lam=1.0, bootstrap_values=bootstrap_values)
    assert returns.tolist() == [[0.0, 0.0, 0.0], [4.0, 0.0, 0.0]]
    _, returns = step_gae(rewards, values, mask, gamma=0.5, lam=1.0, bootstrap_values=bootstrap_values.flip(0))
    assert returns.tolist() == [[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("gae", [step_gae, token_gae])
def test_padding_changes_nothing(gae):
    rewards, values, mask, bootstrap_values = random_episodes(2)
    padded = [
        torch.nn.functional.pad(x, (0, 3), value=fill) for x, fill in ((rewards, 7.0), (values, -7.0), (mask, 0))
    ]
    plain = gae(rewards, values, mask, gamma=GAMMA, lam=LAM, bootstrap_values=bootstrap_values)
    wide = gae(*padded, gamma=GAMMA, lam=LAM, bootstrap_values=bootstrap_values)
    for x, y in zip(plain, wide, strict=True):
        assert torch.equal(x, y[:, :-3])
        assert y[:, -3:].abs().sum() == 0.0


@pytest.mark.parametrize("gae", [step_gae, token_gae])
def test_episode_order_changes_nothing(gae):
    rewards, values, mask, bootstrap_values = random_episodes(3)
    order = torch.tensor([2, 0, 3, 1])
    plain = gae(rewards, values, mask, gamma=GAMMA, lam=LAM, bootstrap_values=bootstrap_values)
    moved = gae(
        rewards[order], values[order], mask[order], gamma=GAMMA, lam=LAM, bootstrap_values=bootstrap_values[order]
    )
    for x, y in zip(plain, moved, strict=True):
        assert torch.equal(x[order], y)


def test_a_step_without_reward_stays_a_step():
    values, mask = torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)
    _, returns = step_gae(torch.tensor([[0.0, 0.0, 1.0]]), values, mask, gamma=0.5, lam=1.0)
    assert returns.tolist() == [[0.25, 0.5, 1.0]]


def test_a_gap_in_a_row_raises_and_names_it():
    mask = torch.tensor([[True, True, False], [True, False, True]])
    with pytest.raises(ValueError, match="gap in row 1"):
        step_gae(torch.zeros(2, 3), torch.zeros(2, 3), mask, gamma=GAMMA, lam=LAM)


def test_nan_at_a_valid_step_propagates_within_its_episode():
    rewards, mask = torch.tensor([[0.0, math.nan], [0.0, 1.0]]), torch.ones(2, 2, dtype=torch.bool)
    advantages, _ = step_gae(rewards, torch.zeros(2, 2), mask, gamma=1.0, lam=1.0)
    assert advantages.isnan().tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0)])
def test_nothing_in_nothing_out(shape):
    advantages, returns = step_gae(*torch.zeros(2, *shape), torch.zeros(shape, dtype=torch.bool), gamma=GAMMA, lam=LAM)
    assert advantages.shape == returns.shape == shape


def test_integer_rewards_and_masks_are_taken():
    ones = torch.ones(1, 2, dtype=torch.long)
    advantages, _ = step_gae(ones, torch.zeros(1, 2), ones, gamma=0.5, lam=1.0)
    assert advantages.tolist() == [[1.5, 1.0]]


@pytest.mark.parametrize("setting", [{"gamma": 1.5}, {"gamma": -0.1}, {"lam": 2.0}, {"lam": math.nan}])
def test_discounts_outside_the_unit_interval_raise(setting):
    with pytest.raises(ValueError, match=rf"`{next(iter(setting))}` is .* \[0, 1\]"):
        step_gae(*torch.zeros(2, 1, 1), torch.ones(1, 1), **{"gamma": GAMMA, "lam": LAM, **setting})


def test_shapes_that_would_broadcast_raise():
    rewards, mask = torch.zeros(2, 3), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"`values` has shape \(2, 1\)"):
        step_gae(rewards, torch.zeros(2, 1), mask, gamma=GAMMA, lam=LAM)
    with pytest.raises(ValueError, match=r"`bootstrap_values` has shape \(1,\)"):
        token_gae(rewards, rewards, mask, gamma=GAMMA, lam=LAM, bootstrap_values=torch.zeros(1))


# --- token_gae ---


@pytest.mark.parametrize("seed", SEEDS)
def test_token_gae_is_the_direct_sum_over_action_tokens_alone(seed):
    rewards, values, mask, bootstrap_values = random_episodes(seed, prefix=False)
    advantages, returns = token_gae(rewards, values, mask, gamma=GAMMA, lam=LAM, bootstrap_values=bootstrap_values)
    for e in range(len(mask)):
        row_rewards, row_values = rewards[e, mask[e]].tolist(), values[e, mask[e]].tolist()
        expected = direct_gae(row_rewards, row_values, bootstrap_values[e].item(), GAMMA, LAM)
        assert advantages[e, mask[e]].tolist() == pytest.approx(expected)
    torch.testing.assert_close(returns, (advantages + values).where(mask, 0.0))


@pytest.mark.parametrize("observation_tokens", [0, 1, 5])
def test_observation_length_changes_nothing(observation_tokens):
    # [leading observation] a a [observation] a, with numbers in the observations that would show up if they were read.
    def row(first: list[float], last: list[float], fill: float) -> Tensor:
        observation = [fill] * observation_tokens
        return torch.tensor([observation + first + observation + last])

    advantages, _ = token_gae(
        row([0.0, 0.0], [1.0], 50.0),
        row([0.5, 0.25], [0.125], math.nan),
        row([1.0, 1.0], [1.0], 0.0).bool(),
        gamma=0.5,
        lam=1.0,
    )
    assert torch.equal(advantages, row([0.25 - 0.5, 0.5 - 0.25], [1 - 0.125], 0.0))


# --- broadcasting and grids ---


def test_broadcast_to_tokens():
    mask = torch.tensor([[True, True, False], [False, True, False]])
    assert broadcast_to_tokens(torch.tensor([1.5, -2.0]), mask).tolist() == [[1.5, 1.5, 0.0], [0.0, -2.0, 0.0]]
    with pytest.raises(ValueError, match="`advantages`"):
        broadcast_to_tokens(torch.zeros(3), mask)


def test_episode_grid_by_hand():
    grid, step_mask = to_episode_grid(VALUES, EPISODE, STEP, num_episodes=3)
    torch.testing.assert_close(grid, torch.tensor([[0.2, 0.4, 0.6], [0.3, 0.5, 0.0], [0.0, 0.0, 0.0]]))
    assert step_mask.tolist() == [[True, True, True], [True, True, False], [False, False, False]]


@pytest.mark.parametrize("seed", SEEDS)
def test_episode_grid_and_back_is_the_identity(seed):
    x = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    episode_index, step_index = shuffled_steps(seed)
    grid, step_mask = to_episode_grid(x, episode_index, step_index)
    assert torch.equal(from_episode_grid(grid, episode_index, step_index), x)
    assert step_mask.sum(dim=1).tolist() == [3, 0, 1, 4]


@pytest.mark.parametrize(
    ("step_index", "found"),
    [
        ([0, 1, 0, 0, 2], r"\[0, 0, 2\]"),  # a duplicate that hides a loss
        ([0, 1, 0, 0, 0], r"\[0, 0, 0\]"),
        ([0, 1, 3, 0, 1], r"\[0, 1, 3\]"),  # a gap
        ([1, 1, 2, 0, 3], r"\[1, 2, 3\]"),  # the first is lost
        ([0, 1, -1, 0, 1], r"\[-1, 0, 1\]"),
    ],
)
def test_a_lost_or_duplicated_step_raises_and_names_the_episode(step_index, found):
    with pytest.raises(DataError, match=rf"episode 0 has the step indices {found}; they must be 0 to 2"):
        to_episode_grid(VALUES, EPISODE, torch.tensor(step_index))


def test_the_shorter_episode_is_checked_against_its_own_length():
    with pytest.raises(DataError, match=r"episode 1 has the step indices \[0, 2\]"):
        to_episode_grid(VALUES, EPISODE, torch.tensor([0, 2, 2, 0, 1]))


@pytest.mark.parametrize("index", [-1, 2])
def test_an_unknown_episode_raises(index):
    with pytest.raises(DataError, match=f"episode index {index}; with 2 episodes"):
        to_episode_grid(torch.zeros(2), torch.tensor([0, index]), torch.tensor([0, 0]), num_episodes=2)


def test_token_grid_by_hand():
    # Episode 0 is [1 2][3], episode 1 is [4]; the steps come in reverse and one has its padding on the left.
    x = torch.tensor([[4.0, math.nan], [math.nan, 3.0], [1.0, 2.0]])
    mask = torch.tensor([[True, False], [False, True], [True, True]])
    indices = torch.tensor([1, 0, 0]), torch.tensor([0, 1, 0])
    grid, grid_mask = to_token_grid(x, mask, *indices)
    assert grid.tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]
    assert grid_mask.tolist() == [[True, True, True], [True, False, False]]
    assert from_token_grid(grid, mask, *indices).tolist() == [[4.0, 0.0], [0.0, 3.0], [1.0, 2.0]]


@pytest.mark.parametrize("seed", SEEDS)
def test_token_grid_and_back_is_the_identity(seed):
    generator = torch.Generator().manual_seed(seed)
    x, mask = torch.randn(8, 5, generator=generator), torch.rand(8, 5, generator=generator) < 0.7
    indices = shuffled_steps(seed)
    grid, grid_mask = to_token_grid(x, mask, *indices, num_episodes=5)
    assert torch.equal(from_token_grid(grid, mask, *indices), x.where(mask, 0.0))
    assert grid_mask.sum() == mask.sum()
    assert len(grid) == 5


def test_a_duplicated_step_raises_for_tokens_too():
    with pytest.raises(DataError, match="episode 0"):
        to_token_grid(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0, 0]), torch.tensor([0, 0]))


def test_grids_without_steps():
    empty = torch.zeros(0, dtype=torch.long)
    assert to_episode_grid(torch.zeros(0), empty, empty)[0].shape == (0, 0)
    assert to_episode_grid(torch.zeros(0), empty, empty, num_episodes=2)[0].shape == (2, 0)
    assert to_token_grid(torch.zeros(0, 4), torch.zeros(0, 4), empty, empty, num_episodes=2)[0].shape == (2, 0)


# --- baselines ---


def test_group_advantages_by_hand():
    # Group 7: returns 0, 1, 2 (std 1). Group 3: 1, 4 (std 3/√2). Group 5: alone.
    returns = torch.tensor([0.0, 1.0, 1.0, 2.0, 4.0, 9.0])
    group_index = torch.tensor([7, 3, 7, 7, 3, 5])
    grpo = group_advantages(returns, group_index, "grpo")
    assert grpo.tolist() == pytest.approx([-1.0, -(0.5**0.5), 0.0, 1.0, 0.5**0.5, 0.0], abs=2e-6)
    rloo = group_advantages(returns, group_index, "rloo")
    assert rloo.tolist() == pytest.approx([-1.5, -3.0, 0.0, 1.5, 3.0, 0.0])


def test_rloo_is_the_distance_from_the_mean_of_the_others():
    returns = torch.randn(5, generator=torch.Generator().manual_seed(0))
    expected = [returns[i] - torch.cat([returns[:i], returns[i + 1 :]]).mean() for i in range(5)]
    torch.testing.assert_close(group_advantages(returns, torch.zeros(5).long(), "rloo"), torch.stack(expected))


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_a_failed_episode_leaves_its_group(kind):
    returns, group_index = torch.tensor([1.0, math.nan, 3.0, 2.0]), torch.tensor([0, 0, 0, 1])
    with_failed = group_advantages(returns, group_index, kind, torch.tensor([True, False, True, True]))
    without = group_advantages(returns[[0, 2]], group_index[[0, 2]], kind)
    assert with_failed.tolist() == [without[0].item(), 0.0, without[1].item(), 0.0]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_equal_returns_have_no_advantage(kind):
    returns = torch.tensor([0.1, 0.1, 0.1, 0.7, 0.7, 0.7])
    advantages = group_advantages(returns, torch.tensor([0, 0, 0, 1, 1, 1]), kind)
    assert advantages.abs().max() < 1e-9


def test_groups_without_episodes():
    empty = torch.zeros(0)
    assert group_advantages(empty, empty.long(), "grpo").shape == (0,)


def test_an_unknown_baseline_raises():
    with pytest.raises(ValueError, match="`kind` is 'mean'; it must be 'grpo' or 'rloo'"):
        group_advantages(torch.zeros(2), torch.zeros(2).long(), "mean")


def test_gigpo_compares_steps_that_share_a_state():
    step_returns, state = torch.tensor([0.0, 5.0, 2.0]), torch.tensor([4, 9, 4])
    expected = [-(0.5**0.5), 0.0, 0.5**0.5]
    assert gigpo_step_advantages(step_returns, state).tolist() == pytest.approx(expected, abs=2e-6)


def test_discounted_returns_by_hand_skip_what_is_masked():
    rewards = torch.tensor([[1.0, math.nan, 2.0, 4.0]])
    mask = torch.tensor([[True, False, True, True]])
    assert discounted_returns(rewards, mask, gamma=0.5).tolist() == [[3.0, 0.0, 4.0, 4.0]]


# --- explained variance ---


def test_explained_variance_by_hand():
    returns, mask = torch.tensor([0.0, 2.0, 4.0, math.nan]), torch.tensor([True, True, True, False])
    assert explained_variance(returns + 3, returns, mask) == 1.0  # a constant error explains all the variance
    assert explained_variance(torch.ones(4), returns, mask) == 0.0
    assert explained_variance(torch.tensor([0.0, 1.0, 2.0, 9.0]), returns, mask) == 0.75
    assert explained_variance(-returns, returns, mask) == -3.0


@pytest.mark.parametrize("num_valid", [0, 1, 3])
def test_explained_variance_is_absent_without_variance(num_valid):
    returns = torch.full((3,), 0.1, dtype=torch.float64)
    assert explained_variance(torch.randn(3), returns, torch.arange(3) < num_valid) is None


def test_explained_variance_of_a_rank_without_steps_is_that_of_the_others():
    values, returns = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    whole = explained_variance(values, returns, torch.ones(6), reduce=lambda local: seen.append(local) or local)
    others = iter(seen)
    on_rank = explained_variance(values, returns, torch.zeros(6), reduce=lambda local: local + next(others))
    assert on_rank == whole
    assert len(seen) == 4
