"""The warning that rewards do not differ, and the metrics that say so."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from tests.trainer.tiny import END, Endless, Hash, Look, call, make_episode, make_trainer, message_rows, scripted
from trl_steppo.trainer import figures
from trl_steppo.trainer.diagnosis import PATIENCE
from trl_steppo.trainer.figures import EpisodeFigures

LOGGER = "trl_steppo.trainer.inspection"


class Unpaid(Hash):
    def step(self, response: str) -> tuple[str, float, bool]:
        return "no", 0.0, True


class LaterPaid(Unpaid):
    """Pays one of the episodes of each update from the second one on."""

    count = 0

    def step(self, response: str) -> tuple[str, float, bool]:
        LaterPaid.count += 1
        return "no", float(LaterPaid.count > 8 and LaterPaid.count % 8 == 0), True


class PaidByRow(Unpaid):
    """All episodes of a row have one reward, and rows differ."""

    def step(self, response: str) -> tuple[str, float, bool]:
        return "", float(self.row["number"] % 2), True


class PaysSteps(Endless):
    def step(self, response: str) -> tuple[str, float, bool]:
        return "go on", 1.0, False


def train(directory: Any, caplog: pytest.LogCaptureFixture, **arguments: Any) -> tuple[list[str], list[dict]]:
    trainer = make_trainer(directory, **{"max_steps": PATIENCE + 2, **arguments})
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        trainer.train()
    warnings = [record.getMessage() for record in caplog.records if record.name == LOGGER]
    warnings = [text for text in warnings if "nothing to learn from" in text]
    return warnings, [logs for logs in trainer.state.log_history if "episode" in logs]


def test_rewards_of_0_are_told_once(tmp_path, caplog):
    warnings, logs = train(tmp_path, caplog, environment_factory=Unpaid, log_episodes=1)
    (text,) = warnings
    assert text.startswith(
        "updates 1 to 3: all 24 rewards are 0, so there is nothing to learn from.\nThe last response: "
    )
    assert f"`trl-steppo show {tmp_path}" in text
    assert "8 of 8 responses were cut at `response_length` = 6 (`rollout/length_stopped`)" in text
    assert text.endswith('See docs/guides/troubleshooting.md, "Reward is 0".')
    assert {(update["env/reward_std"], update["env/equal_rewards"]) for update in logs} == {(0.0, 1.0)}


@pytest.mark.parametrize(
    ("script", "hint"),
    [
        (f"<tool_call>\nlook\n</tool_call>{END}", "8 of 8 episodes have tool calls that cannot be read"),
        (f"I do not know{END}", "no tool was called"),
    ],
)
def test_the_hint_is_what_the_episodes_show(tmp_path, caplog, script, hint):
    engine = scripted(lambda row, generation, step: script)
    arguments = {"environment_factory": Look, "train_dataset": message_rows(), "max_steps": PATIENCE}
    ((text,), _) = train(tmp_path, caplog, engine=engine, **arguments)
    assert "all 24 rewards are 1" in text
    assert hint in text
    assert "response_length" not in text


def test_one_tool_that_is_called_gives_no_hint_on_tools(tmp_path, caplog):
    engine = scripted(lambda row, generation, step: call("look", where="there") if step == 0 else f"done{END}")
    arguments = {"environment_factory": Look, "train_dataset": message_rows(), "max_steps": PATIENCE}
    ((text,), _) = train(tmp_path, caplog, engine=engine, **arguments)
    assert text.count("\n- ") == 1


def test_groups_are_compared_within_themselves(tmp_path, caplog):
    groups = {"advantage_estimator": "grpo", "num_generations": 4}
    warnings, logs = train(tmp_path / "a", caplog, environment_factory=PaidByRow, **groups)
    assert "no two of one row have different rewards" in warnings[0]
    assert {update["frac_reward_zero_std"] for update in logs} == {1.0}
    caplog.clear()
    warnings, logs = train(tmp_path / "b", caplog, environment_factory=PaidByRow)
    assert not warnings
    assert {update["env/equal_rewards"] for update in logs} == {0.0}
    assert "frac_reward_zero_std" not in logs[0]


@pytest.mark.parametrize("environment", [LaterPaid, Hash, PaysSteps])
def test_not_a_word_for_a_run_that_is_fine(tmp_path, caplog, environment):
    warnings, _ = train(tmp_path, caplog, environment_factory=environment)
    assert not warnings


def test_a_run_that_learned_before_it_was_resumed_is_fine(tmp_path, caplog):
    saved = {"save_strategy": "steps", "save_steps": 1}
    make_trainer(tmp_path, max_steps=1, **saved).train()
    trainer = make_trainer(tmp_path, environment_factory=Unpaid, max_steps=PATIENCE + 2, **saved)
    with caplog.at_level(logging.WARNING, logger=LOGGER):
        trainer.train(resume_from_checkpoint=True)
    assert "nothing to learn from" not in caplog.text


def test_steps_that_another_rank_pays_count(monkeypatch):
    own, others = (EpisodeFigures.of([make_episode("a", rewards)]) for rewards in ([0.0, 1.0], [1.0, 0.0]))
    assert (own.pays_steps, others.pays_steps) == (False, True)
    monkeypatch.setattr(figures, "gather_objects", lambda items: [*items, others])
    assert own.on_all_ranks().pays_steps


def test_groups_of_one_are_no_groups():
    found = EpisodeFigures(returns=[0.0, 1.0, 1.0], groups=[[0.0], [1.0, 1.0]])
    assert found.share_of_equal_groups == 1.0
    assert found.has_equal_rewards(compares_groups=True)
    assert not found.has_equal_rewards(compares_groups=False)
    assert EpisodeFigures(returns=[0.0, 1.0], groups=[[0.0], [1.0]]).share_of_equal_groups is None
