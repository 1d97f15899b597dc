"""What settings about truncated episodes do where the last response was cut at `response_length`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.trainer.tiny import END, hashed, make_classifier, make_trainer, message_rows, same, scripted, weights
from trl_steppo import StopReason
from trl_steppo.rollout import episode_file, load_episodes


def every_second_is_cut(row: int, generation: int, step: int) -> str:
    return f"say {row}" if row % 2 else f"hi{END}"


def none_is_cut(row: int, generation: int, step: int) -> str:
    return f"hi{row % 2}{END}"


def by_text(completions: Any, **columns: Any) -> list[float]:
    return [hashed(str(completion)) for completion in completions]


def train(directory: Any, script: Any = every_second_is_cut, **settings: Any) -> Any:
    trainer = make_trainer(
        directory,
        train_dataset=message_rows(),
        reward_funcs=by_text,
        max_steps=1,
        value_model=make_classifier(),
        dump_episodes_dir=str(directory / "episodes"),
        engine=scripted(script),
        **settings,
    )
    trainer.train()
    return trainer


def test_metrics_and_recordings_call_it_truncated(tmp_path):
    trainer = train(tmp_path)
    (logs,) = (entry for entry in trainer.state.log_history if "episode" in entry)
    assert logs["env/truncated"] == logs["rollout/length_stopped"] == 0.5
    episodes = load_episodes(episode_file(tmp_path / "episodes", 0, 0))
    reasons = [StopReason.RESPONSE_LENGTH if episode.stream_position % 2 else None for episode in episodes]
    assert [episode.stop_reason if episode.truncated else None for episode in episodes] == reasons


@pytest.mark.parametrize("setting", ["mask_truncated_completions", "bootstrap_truncated"])
def test_settings_about_truncated_episodes_change_what_is_learned(tmp_path, setting):
    """And change nothing where no response is cut."""
    for script, differs in ((every_second_is_cut, True), (none_is_cut, False)):
        off, on = (train(tmp_path / f"{script.__name__}-{v}", script, **{setting: v}) for v in (False, True))
        assert same(weights(off.model), weights(on.model)) != differs


def test_what_is_masked_is_what_was_cut(tmp_path):
    """The policy learns as if the cut responses had taught nothing."""
    trainer = train(tmp_path, mask_truncated_completions=True)
    rollout = trainer.learner.prepare(load_episodes(episode_file(tmp_path / "episodes", 0, 0)))
    mask = trainer.learner.policy_objective.mask(rollout.batch)
    learned = [bool(mask[number].any()) for number in range(rollout.batch.num_steps)]
    assert learned == [episode.stream_position % 2 == 0 for episode in rollout.episodes]


@pytest.mark.parametrize("estimator", ["step_gae", "token_gae"])
def test_the_bootstrap_value_is_that_of_the_state_behind_the_cut(tmp_path, estimator):
    """Prompt and response: what the policy would have gone on from."""
    trainer = train(tmp_path, bootstrap_truncated=True, advantage_estimator=estimator)
    episodes = load_episodes(episode_file(tmp_path / "episodes", 0, 0))
    scores = trainer.learner.evaluate(trainer.learner.prepare(episodes))
    critic = trainer.value_model
    for episode, found in zip(episodes, scores.bootstrap_values.tolist(), strict=True):
        step = episode.steps[-1]
        ids = torch.tensor([[*step.prompt_ids, *step.response_ids]])
        with torch.no_grad():
            hidden = critic.base_model(input_ids=ids).last_hidden_state
            expected = float(critic.score(hidden[:, -1])) if episode.stream_position % 2 else 0.0
        assert found == pytest.approx(expected, abs=1e-5)
