"""Programs written for `GRPOTrainer` under `StepPOTrainer`: reward functions see the same, and say the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.trl_scripts import scripted_runs
from tests.examples.trl_scripts.programs import PROGRAMS
from tests.examples.trl_scripts.scripted_runs import (
    GRPOConfig,
    Recording,
    grpo_trainer,
    say,
    steppo_config,
    steppo_trainer,
)


@pytest.fixture(scope="module")
def policy(tmp_path_factory) -> str:
    return scripted_runs.save_policy(tmp_path_factory.mktemp("policy"))


def play(name: str, config, make_trainer, policy: str, folder: Path) -> Recording:
    program, recording = PROGRAMS[name], Recording()

    def says(prompt: str, generation: int, step: int) -> str:
        turns = program.said[generation]
        return turns[step] if step < len(turns) else say("done")

    program.run(config, make_trainer(says, recording, policy), str(folder))
    return recording


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_see_the_same_rewards_as_under_grpo_trainer(name, policy, tmp_path):
    theirs = play(name, GRPOConfig, grpo_trainer, policy, tmp_path / "grpo")
    ours = play(name, steppo_config, steppo_trainer, policy, tmp_path / "steppo")
    assert ours.episodes == theirs.episodes
    assert len({str(rewards) for rewards in theirs.rewards()}) > 1  # else the comparison would say nothing
    assert ours.metrics_of_rewards() == pytest.approx(theirs.metrics_of_rewards(), abs=1e-6)
