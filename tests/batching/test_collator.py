"""Where everything stands in the tensors: drawn by hand, then against a naive computation step by step."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from trl_steppo.batching import StepBatch, StepRolloutCollator
from trl_steppo.errors import DataError
from trl_steppo.models import Critic, PolicyScorer, build_critic
from trl_steppo.types import Episode, Step, StopReason

MIXES = pytest.mark.parametrize("rewritten", [0.0, 0.5, 1.0], ids=["append-only", "mixed", "rewritten"])
SHARING = pytest.mark.parametrize("sharing", [True, False], ids=["shared", "row per step"])


def drawn_episodes() -> list[Episode]:
    first = [
        Step([1, 2], [3], [-0.5], 0.25, 0, 4, 1.0, StopReason.STOP),
        Step([1, 2, 3, 4], [5, 6], [-0.1, -0.2], 1.0, 1, 5, 0.7, StopReason.LENGTH),
    ]
    second = [Step([7], [8, 9], [-0.3, -0.4], -1.0, 0, 5, 1.0, StopReason.STOP)]
    return [
        Episode("first", 0, 0, first, terminated=False, truncated=True, final_prompt_ids=[1, 2, 3, 4, 5, 6, 10]),
        Episode("second", 1, 0, second, terminated=True, truncated=False),
    ]


def test_shared_rows_by_hand():
    batch = StepRolloutCollator(pad_token_id=99)(drawn_episodes())
    # first   1  2 [3] 4 [5  6]      steps 0 and 1
    # second  7 [8  9] .  .  .       step 2
    expected = {
        "input_ids": [[1, 2, 3, 4, 5, 6], [7, 8, 9, 99, 99, 99]],
        "position_ids": [[0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]],
        "attention_mask": [[True] * 6, [True] * 3 + [False] * 3],
        "step_of_token": [[-1, -1, 0, -1, 1, 1], [-1, 2, 2, -1, -1, -1]],
        "action_ids": [[3, 99], [5, 6], [8, 9]],
        "action_mask": [[True, False], [True, True], [True, True]],
        "logit_positions": [[1, 0], [3, 4], [6, 7]],
        "value_positions": [1, 3, 6],
        "rewards": [0.25, 1.0, -1.0],
        "policy_versions": [4, 5, 5],
        "episode_index": [0, 0, 1],
        "step_index": [0, 1, 0],
        "truncated": [True, False],
        "bootstrap_positions": [-1, -1],
    }
    assert {name: getattr(batch, name).tolist() for name in expected} == expected
    torch.testing.assert_close(batch.rollout_logprobs, torch.tensor([[-0.5, 0.0], [-0.1, -0.2], [-0.3, -0.4]]))
    torch.testing.assert_close(batch.temperatures, torch.tensor([1.0, 0.7, 1.0]))
    assert (batch.num_steps, batch.num_episodes) == (3, 2)


def test_a_row_per_step_by_hand():
    batch = StepRolloutCollator(layout="rows")(drawn_episodes())
    assert batch.input_ids.tolist() == [[1, 2, 3, 0, 0, 0], [1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]]
    # The first step's response is context of the second.
    assert batch.step_of_token.tolist() == [[-1, -1, 0, -1, -1, -1], [-1, -1, -1, -1, 1, 1], [-1, 2, 2, -1, -1, -1]]
    assert batch.value_positions.tolist() == [1, 9, 12]
    assert batch.logit_positions.tolist() == [[1, 0], [9, 10], [12, 13]]


@pytest.mark.parametrize(
    ("sharing", "final", "rows", "position"),
    [
        (True, [1, 2, 3, 4, 5, 6, 10], [[1, 2, 3, 4, 5, 6, 10], [7, 8, 9, 0, 0, 0, 0]], 6),  # continues the row
        (True, [1, 2, 3, 4, 5, 6], [[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]], 5),  # is the row
        (True, [1, 11], [[1, 2, 3, 4, 5, 6], [1, 11, 0, 0, 0, 0], [7, 8, 9, 0, 0, 0]], 7),  # rewritten
        (False, [1, 11], [[1, 2, 3, 0, 0, 0], [1, 2, 3, 4, 5, 6], [1, 11, 0, 0, 0, 0], [7, 8, 9, 0, 0, 0]], 13),
        (True, None, [[1, 2, 3, 4, 5, 6], [7, 8, 9, 0, 0, 0]], -1),  # unknown: its value is 0
    ],
)
def test_bootstrap_positions_by_hand(sharing, final, rows, position):
    first, second = drawn_episodes()
    first = replace(first, final_prompt_ids=final)
    batch = StepRolloutCollator(layout=sharing, bootstrap_truncated=True)([first, second])
    assert batch.input_ids.tolist() == rows
    assert batch.bootstrap_positions.tolist() == [position, -1]
    assert batch.attention_mask.sum() == sum(len([i for i in row if i]) for row in rows)
    assert set(batch.step_of_token.flatten().tolist()) == {-1, 0, 1, 2}


@MIXES
@SHARING
def test_every_token_against_a_naive_computation(random_episode, sharing, rewritten):
    collator = StepRolloutCollator(layout=sharing, bootstrap_truncated=True)
    for start in range(0, 60, 5):
        episodes = [random_episode(s, rewritten=rewritten, truncated=s % 3 == 0) for s in range(start, start + 5)]
        batch = collator(episodes)
        _, L = batch.input_ids.shape
        flat, owner = batch.input_ids.flatten(), batch.step_of_token.flatten()
        steps = [(e, t, step) for e, episode in enumerate(episodes) for t, step in enumerate(episode.steps)]
        expected_owner = torch.full_like(owner, -1)
        for n, (e, t, step) in enumerate(steps):
            count, value_position = len(step.response_ids), int(batch.value_positions[n])
            row = value_position // L * L
            # What the row holds up to the value is the state, and nothing else; the action follows.
            assert step.prompt_ids == flat[row : value_position + 1].tolist()
            assert step.response_ids == flat[value_position + 1 : value_position + 1 + count].tolist()
            expected_owner[value_position + 1 : value_position + 1 + count] = n
            assert batch.action_mask[n].tolist() == [a < count for a in range(batch.action_mask.shape[1])]
            assert step.response_ids == batch.action_ids[n, :count].tolist()
            assert batch.logit_positions[n, :count].tolist() == list(range(value_position, value_position + count))
            assert batch.rollout_logprobs[n, :count].tolist() == pytest.approx(list(step.rollout_logprobs))
            assert (batch.episode_index[n], batch.step_index[n]) == (e, t)
            assert batch.rewards[n].item() == pytest.approx(step.reward)
            assert batch.temperatures[n].item() == pytest.approx(step.temperature)
        assert owner.tolist() == expected_owner.tolist()
        assert not batch.rollout_logprobs[~batch.action_mask].any()
        assert not batch.logit_positions[~batch.action_mask].any()
        assert batch.position_ids.tolist() == [list(range(L))] * len(batch.input_ids)
        for episode, position in zip(episodes, batch.bootstrap_positions.tolist(), strict=True):
            if episode.truncated:
                assert episode.final_prompt_ids == flat[position // L * L : position + 1].tolist()
            else:
                assert position == -1


@MIXES
def test_sharing_and_padding_change_no_step(random_episode, rewritten):
    """Everything that losses see is the same, however the rows are packed and whatever fills them."""
    episodes = [random_episode(seed, rewritten=rewritten) for seed in range(8)]
    one, other = StepRolloutCollator()(episodes), StepRolloutCollator(layout="rows", pad_token_id=0)(episodes)
    packed = {"input_ids", "position_ids", "attention_mask", "step_of_token", "logit_positions", "value_positions"}
    for name in {field.name for field in fields(StepBatch)} - packed:
        torch.testing.assert_close(getattr(one, name), getattr(other, name), msg=name)
    assert one.attention_mask.sum() <= other.attention_mask.sum()


def test_the_order_of_episodes_permutes_their_steps(random_episode):
    episodes = [random_episode(seed, rewritten=0.5) for seed in range(6)]
    forward, backward = StepRolloutCollator()(episodes), StepRolloutCollator()(episodes[::-1])
    order = [n for e in range(5, -1, -1) for n in (forward.episode_index == e).nonzero().flatten().tolist()]
    for name in ("action_ids", "action_mask", "rollout_logprobs", "rewards", "temperatures", "step_index"):
        assert torch.equal(getattr(backward, name), getattr(forward, name)[order]), name


# --- mistakes ---


def broken(change) -> Episode:
    episode = drawn_episodes()[0]
    return replace(episode, steps=tuple(change(list(episode.steps))))


@pytest.mark.parametrize(
    "episode",
    [
        broken(lambda steps: steps[1:]),
        broken(lambda steps: [steps[0], steps[0], steps[1]]),
        broken(lambda steps: steps[::-1]),
        broken(lambda steps: [steps[0], replace(steps[1], step_index=2)]),
    ],
    ids=["lost", "doubled", "misplaced", "gap"],
)
def test_a_broken_episode_is_named(episode):
    with pytest.raises(DataError, match=r"'first' has the step indices \["):
        StepRolloutCollator()([drawn_episodes()[1], episode])


def test_a_failed_episode_is_named():
    failed = Episode("broken", 0, 0, (), terminated=False, truncated=False, error="the tool crashed")
    with pytest.raises(DataError, match=r"'broken' failed \(the tool crashed\)"):
        StepRolloutCollator()([*drawn_episodes(), failed])


def test_an_episode_given_twice_is_named():
    first, second = drawn_episodes()
    with pytest.raises(DataError, match="'first' is in the batch twice"):
        StepRolloutCollator()([first, second, first])


def test_no_episode_is_an_error():
    with pytest.raises(DataError, match="no episodes"):
        StepRolloutCollator()([])


# --- the empty batch ---


def test_the_empty_batch_has_the_tensors_of_any_other():
    empty, batch = StepBatch.empty(), StepRolloutCollator()(drawn_episodes())
    assert (empty.num_steps, empty.num_episodes) == (0, 0)
    for field in fields(StepBatch):
        one, other = getattr(empty, field.name), getattr(batch, field.name)
        assert (one.dtype, one.dim()) == (other.dtype, other.dim()), field.name


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3"])
def test_the_empty_batch_trains_nothing(tiny_model, architecture):
    """Its gradients are zero and not missing: a rank without an episode still takes part in every reduction."""
    model, batch = tiny_model(architecture).train(), StepBatch.empty()
    critic = build_critic(model)
    logprobs, entropies = PolicyScorer(model)(batch, entropy="train")
    values = Critic(critic)(batch, batch.value_positions)
    loss = logprobs.sum() + entropies.sum() + values.sum()
    assert loss.item() == 0.0
    loss.backward()
    for name, parameter in [*model.named_parameters(), *critic.named_parameters()]:
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
