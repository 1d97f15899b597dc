"""What reward functions of a trainer log, as in `GRPOTrainer`."""

from __future__ import annotations

import json
from typing import Any

import pyarrow.parquet as pq
from tiny import make_trainer, prompt_rows

from trl_steppo.rollout import episode_file, load_episodes


def logs(completions: list[str], number: list[int], log_extra: Any, log_metric: Any, **columns: Any) -> list[float]:
    log_extra("number", number)
    log_extra("kind of [it]", ["half \ud83d", *(["x"] * (len(number) - 1))])
    for value in number:
        log_metric("my/number", value)
    log_metric("env/reward", 7.0)
    return [0.5] * len(completions)


def test_what_functions_log_is_shown(tmp_path, capsys):
    """Metrics by their names, evaluations included; columns in the log of episodes, in recordings, in the table."""
    trainer = make_trainer(
        tmp_path,
        reward_funcs=logs,
        environment_factory=None,
        train_dataset=prompt_rows(8),
        eval_dataset=prompt_rows(3),
        max_steps=1,
        log_episodes=2,
        num_sample_generations=1,
        dump_episodes_dir=str(tmp_path / "episodes"),
    )
    trainer.train()
    update = trainer.state.log_history[0]
    assert update["my/number"] == 3.5
    assert (update["env/reward"], update["log_metric/env/reward"]) == (0.5, 7.0)
    assert "log_metric/my/number" not in update
    evaluation = trainer.evaluate()
    assert (evaluation["eval_my/number"], evaluation["eval_env/reward"], evaluation["eval_reward"]) == (1.0, 7.0, 0.5)
    episodes = load_episodes(episode_file(tmp_path / "episodes", 0, 0))
    assert [episode.logged["number"] for episode in episodes] == [int(e.question.split()[1]) for e in episodes]
    rows = pq.read_table(tmp_path / "episodes" / "update_00001.parquet").to_pylist()
    assert [json.loads(row["logged"])["number"] for row in rows] == [e.logged["number"] for e in episodes[:2]]
    assert "kind of" in capsys.readouterr().out
