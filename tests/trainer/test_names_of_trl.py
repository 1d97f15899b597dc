"""Metrics under the names of `GRPOTrainer` have its meaning: values by hand, from the definitions in its source."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from typing import Any

import pytest
import trl

from tests.trainer.tiny import END as END_OF_TURN
from tests.trainer.tiny import Look, call, make_episode, make_trainer, message_rows, scripted
from trl_steppo.learning.metrics import Means
from trl_steppo.trainer.metrics import NAMES_IN_TRL, add_episode_metrics
from trl_steppo.types import Episode, StopReason


def metrics_of(*episodes: Episode) -> dict[str, float]:
    means = Means()
    add_episode_metrics(means, episodes)
    return means.reduced()


def cut(episode: Episode) -> Episode:
    """The episode with a last response that was cut by its length."""
    last = replace(episode.steps[-1], stop_reason=StopReason.LENGTH)
    return replace(episode, steps=(*episode.steps[:-1], last))


def test_lengths_are_of_sampled_tokens_of_whole_episodes():
    episodes = [
        make_episode("a", [0.0, 1.0], lengths=[4, 3], row=0),
        make_episode("b", [0.0], lengths=[2], row=0),
        cut(make_episode("c", [0.0], lengths=[9], row=1)),
        make_episode("d", [5.0], lengths=[99], row=1, error="broken"),
    ]
    found = metrics_of(*episodes)
    assert (found["completions/min_length"], found["completions/max_length"]) == (2, 9)
    assert found["rollout/episode_response_tokens"] == 6
    assert found["completions/clipped_ratio"] == pytest.approx(1 / 3)
    assert found["completions/mean_terminated_length"] == 4.5
    assert (found["completions/min_terminated_length"], found["completions/max_terminated_length"]) == (2, 7)
    assert metrics_of(episodes[2])["completions/mean_terminated_length"] == 0


def test_spreads_are_unbiased_and_of_all_episodes():
    episodes = [make_episode(str(i), [reward], row=i // 2) for i, reward in enumerate([0.0, 0.0, 1.0, 3.0])]
    found = metrics_of(*episodes)
    assert found["env/reward_std"] == pytest.approx(math.sqrt(2.0))
    assert found["frac_reward_zero_std"] == 0.5
    assert "env/reward_std" not in metrics_of(episodes[0])
    assert "frac_reward_zero_std" not in metrics_of(episodes[0], episodes[2])


def test_functions_count_where_they_apply():
    scores = [{"rewards/judge": 1.0}, {"rewards/judge": 2.0}, {}]
    episodes = [replace(make_episode(str(i), [0.0]), metrics=of_one) for i, of_one in enumerate(scores)]
    found = metrics_of(*episodes)
    assert (found["rewards/judge/mean"], found["rewards/judge/std"]) == (1.5, pytest.approx(math.sqrt(0.5)))


def test_tools(tmp_path):
    def script(row: int, generation: int, step: int) -> str:
        return [call("look", where="there"), call("fall"), call("nothing"), f"done{END_OF_TURN}"][step]

    arguments: dict[str, Any] = {"environment_factory": Look, "train_dataset": message_rows(), "max_steps": 1}
    trainer = make_trainer(tmp_path, engine=scripted(script), max_interaction_steps=4, **arguments)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["tools/call_frequency"] == 3
    assert logs["tools/failure_frequency"] == pytest.approx(2 / 3)


def test_tokens_are_counted_over_a_run_that_is_resumed(tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole, rest = make_trainer(tmp_path / "a", **saved), make_trainer(tmp_path / "b", **saved)
    whole.train()
    rest.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    counts = [logs["num_tokens"] for logs in whole.state.log_history if "num_tokens" in logs]
    assert [logs["num_tokens"] for logs in rest.state.log_history if "num_tokens" in logs] == counts
    assert 0 < counts[0] < counts[1]


def test_the_loss_has_all_its_terms(tmp_path):
    settings = {"kl_loss_coef": 0.5, "num_mini_batches": 2, "max_steps": 1, "loss_aggregation": "token"}
    trainer = make_trainer(tmp_path, **settings)
    trainer.train()
    logs = trainer.state.log_history[0]
    assert logs["kl"] > 0
    assert logs["loss"] == pytest.approx(logs["loss/policy_avg"] + 0.5 * logs["loss/kl_avg"])


def test_the_names_are_those_of_trl():
    source = inspect.getsource(trl.trainer.grpo_trainer)
    logged_by_trainer = {"loss", "grad_norm", "learning_rate"}  # of transformers
    names = {*NAMES_IN_TRL, "num_tokens", "kl", "frac_reward_zero_std", "tools/failure_frequency"}
    names |= {
        f"completions/{part}" for part in ("min_length", "max_length", "clipped_ratio", "mean_terminated_length")
    }
    assert not [name for name in names - logged_by_trainer if f'"{name}"' not in source]
