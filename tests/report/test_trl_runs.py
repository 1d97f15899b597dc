"""Runs of TRL's trainers: what is read of them, and that nothing in their files is run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from trl import GRPOConfig, RLOOConfig

from tests.report.synthetic import write_run
from trl_steppo.errors import DataError
from trl_steppo.report.episodes import sample_episodes
from trl_steppo.report.files import read_arguments
from trl_steppo.report.methods import differing_settings, group_runs
from trl_steppo.report.runs import load_runs
from trl_steppo.report.trl_runs import _OUR_NAMES, as_our_history, completions
from trl_steppo.report.trl_settings import EQUAL, RENAMED, as_our_settings
from trl_steppo.trainer.grpo_settings import COUNTERPARTS, converted
from trl_steppo.trainer.metric_table import METRICS

HERE: dict[str, Any] = {"use_cpu": True, "bf16": False, "report_to": "none", "per_device_train_batch_size": 8}


def logs(step: int, **more: float) -> dict[str, float]:
    return {"step": step, "reward": 0.1 * step, "entropy": 2.0, "learning_rate": 1e-6, "step_time": 3.0, **more}


def write_trl_run(directory: Path, args: object, steps: int = 4, **state: Any) -> Path:
    """What TRL's trainers leave behind: a checkpoint, and in it the history and the settings."""
    checkpoint = directory / f"checkpoint-{steps}"
    checkpoint.mkdir(parents=True)
    history = [logs(step) for step in range(1, steps + 1)]
    content = {"global_step": steps, "max_steps": steps, "log_history": history, **state}
    (checkpoint / "trainer_state.json").write_text(json.dumps(content))
    if args is not None:
        torch.save(args, checkpoint / "training_args.bin")
    return directory


def grpo(directory: Path, **settings: Any) -> GRPOConfig:
    return GRPOConfig(str(directory), **{**HERE, "num_generations": 4, **settings})


def test_runs_are_known_by_the_class_of_their_settings(tmp_path):
    rloo = RLOOConfig(str(tmp_path), num_generations=4, **HERE)
    paths = [
        write_trl_run(tmp_path / "grpo_s1", grpo(tmp_path, seed=1)),
        write_trl_run(tmp_path / "grpo_s2", grpo(tmp_path, seed=2)),
        write_trl_run(tmp_path / "rloo", rloo),
        write_trl_run(tmp_path / "lost", None),
        write_run(tmp_path / "ours"),
    ]
    methods = group_runs(load_runs(paths))
    assert [(method.name, [run.name for run in method.runs]) for method in methods] == [
        ("GRPO (TRL)", ["grpo_s1", "grpo_s2"]),
        ("RLOO (TRL)", ["rloo"]),
        ("TRL, lost", ["lost"]),
        ("StepPO", ["ours"]),
    ]
    assert "loss_type" not in differing_settings(methods), "ours has none"


def test_settings_of_both_libraries_are_compared_by_our_names(tmp_path):
    """Those that change what is learned; equal ones, and those of one library, are left out."""
    args = grpo(tmp_path, max_completion_length=64, gradient_accumulation_steps=2, epsilon=0.1)
    same = {"batch_size": 16, "kl_loss_coef": 0.0, "per_device_train_batch_size": 16, "accelerator_config": {"a": 1}}
    ours = write_run(tmp_path / "ours", response_length=128, cliprange=0.2, gamma=0.9, trainer="StepPOTrainer", **same)
    methods = group_runs(load_runs([write_trl_run(tmp_path / "theirs", args), ours]))
    assert differing_settings(methods) == {
        "advantage_estimator": ["grpo", "step_gae"],
        "importance_sampling_level": ["token", "step"],
        "response_length": [64, 128],
        "cliprange": [0.1, 0.2],
    }


def test_counterparts_of_settings_are_those_of_the_conversion(tmp_path):
    fields = {name: counterpart.field for name, counterpart in COUNTERPARTS.items() if counterpart.field}
    of_memory = {"ds3_gather_for_generation": "ds3_gather_for_generation"}
    assert {**RENAMED, **dict(zip(EQUAL, EQUAL, strict=True)), **of_memory} == fields
    args = grpo(tmp_path, gradient_accumulation_steps=2, steps_per_generation=4, max_steps=9, warmup_steps=3, top_k=5)
    found = as_our_settings({**vars(args), "trainer": "trl.GRPO"})
    expected = converted(args, advantage_estimator="grpo")
    apart = {"advantage_estimator": "grpo", "batch_size": 32}
    assert found == {name: expected[name] for name in found if name not in apart} | apart


def test_our_names_stand_beside_trls(tmp_path):
    (run,) = load_runs([write_trl_run(tmp_path, grpo(tmp_path))])
    assert run.series("env/reward") == run.series("reward") == pytest.approx({1: 0.1, 2: 0.2, 3: 0.3, 4: 0.4})
    assert run.series("policy/entropy_avg") == dict.fromkeys(range(1, 5), 2.0)
    assert run.series("perf/update_s")[4] == 3.0
    assert (run.is_finished, run.num_updates, run.seed) == (True, 4, 42)


def test_names_that_we_log_with_trls_meaning_are_those_that_repeat_ours():
    """A metric of TRL's that is ours under another name says so in the table; all others would be other quantities."""
    ours = {metric.name: metric.same_as for metric in METRICS if metric.name in _OUR_NAMES}
    assert ours == {name: _OUR_NAMES[name] for name in ours}


def test_what_differs_from_ours_is_not_shown_as_ours(tmp_path):
    different = {"loss": 0.5, "kl": 0.1, "completions/clipped_ratio": 0.2}
    history = [logs(1, **different, reward_std=0.3)]
    (run,) = load_runs([write_trl_run(tmp_path, grpo(tmp_path), 1, log_history=history)])
    assert not {"loss/policy_avg", "objective/kl", "env/truncated"} & run.metrics
    assert set(different) <= run.metrics
    assert run.series("env/reward_std") == {1: 0.3}
    (of_groups,) = as_our_history(history, {"trainer": "trl.AsyncGRPO"})
    assert "env/reward_std" not in of_groups


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 8),
        ({"gradient_accumulation_steps": 2}, 16),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, 16),
        ({"gradient_accumulation_steps": 2, "num_iterations": 2}, 8),
    ],
)
def test_episodes_of_an_optimizer_step(tmp_path, settings, expected):
    (run,) = load_runs([write_trl_run(tmp_path, grpo(tmp_path, **settings))])
    assert run.episodes_per_update == expected


def test_asynchronous_runs_count_what_they_train_on(tmp_path):
    history = [logs(step, **{"batch/samples_per_step": 24.0, "perf/step_s": 5.0}) for step in (1, 2)]
    (run,) = load_runs([write_trl_run(tmp_path, grpo(tmp_path), 2, log_history=history, max_steps=9)])
    assert (run.episodes_per_update, run.is_finished, run.series("perf/update_s")[2]) == (24.0, False, 5.0)


def test_a_state_that_was_saved_by_hand_is_the_last_one(tmp_path):
    write_trl_run(tmp_path, grpo(tmp_path))
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": [logs(5)]}))
    (run,) = load_runs([tmp_path])
    assert (run.num_updates, run.is_finished) == (5, True)


def test_a_run_without_rewards_is_none(tmp_path):
    write_trl_run(tmp_path, None, log_history=[{"step": 1, "loss": 0.5}])
    with pytest.raises(DataError, match="holds no update"):
        load_runs([tmp_path])


# -- settings in a pickle ---------------------------------------------------------------------------------------------


class Exploit:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_settings_are_read_without_running_them(tmp_path):
    torch.save({"args": Exploit(f"touch {tmp_path}/ran")}, tmp_path / "a.bin")
    torch.save(Exploit(f"touch {tmp_path}/ran"), tmp_path / "b.bin")
    assert read_arguments(tmp_path / "a.bin") is None
    read_arguments(tmp_path / "b.bin")
    assert not (tmp_path / "ran").exists()


def test_plain_values_of_settings(tmp_path):
    torch.save(grpo(tmp_path, learning_rate=3e-6, reward_weights=[1.0, 2.0]), tmp_path / "args.bin")
    found = read_arguments(tmp_path / "args.bin")
    assert found is not None
    name, settings = found
    assert name == "trl.trainer.grpo_config.GRPOConfig"
    assert (settings["learning_rate"], settings["reward_weights"]) == (3e-6, [1.0, 2.0])
    assert settings["save_strategy"] == "steps", "an enumeration by its value"


@pytest.mark.parametrize("content", [b"", b"PK", pickle.dumps(1)])
def test_what_is_no_such_file_is_none(tmp_path, content):
    (tmp_path / "args.bin").write_bytes(content)
    assert read_arguments(tmp_path / "args.bin") is read_arguments(tmp_path / "gone.bin") is None


# -- completions ------------------------------------------------------------------------------------------------------

TOOL = {"role": "tool", "name": "look", "content": "tea"}


def calls(**arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "look", "arguments": arguments}}
    return {"role": "assistant", "content": "hm", "tool_calls": [call]}


def write_table(path: Path, prompts: list[Any], answers: list[Any], **columns: Any) -> Path:
    table = {"step": [7] * len(prompts), "prompt": prompts, "completion": answers}
    pd.DataFrame({**table, **columns, "advantage": [0.5] * len(prompts)}).to_parquet(path)
    return path


def test_messages_are_steps(tmp_path):
    question = [{"role": "user", "content": "Where?"}]
    answer = [calls(shelf=1, item=None), TOOL, TOOL, {"role": "assistant", "content": "There."}]
    file = write_table(tmp_path / "t.parquet", [question], [answer], right=[1.0], style=[0.5])
    (rows,) = completions(file, ["right", "style"], [1.0, 2.0])
    assert [row["response"] for row in rows] == [
        'hm\n<tool_call>\n{"name": "look", "arguments": {"shelf": 1}}\n</tool_call>',
        "There.",
    ]
    assert [row["observation"] for row in rows] == ["tea\ntea", ""]
    assert [row["prompt"] for row in rows] == ["Where?", "tea\ntea"]
    assert [row["reward"] for row in rows] == [0.0, 2.0]
    assert {row["score"] for row in rows} == {2.0}
    assert rows[0]["question"] == "Where?"
    assert rows[0]["metrics"] == {"rewards/right": 1.0, "rewards/style": 0.5}
    assert (rows[0]["update"], rows[1]["advantage"]) == (7, 0.5)


def test_what_a_prompt_asks_and_what_rewards_logged(tmp_path):
    prompts = ["system\nLook.\nuser\nWhere\nis it?\nassistant\n", "Where?"]
    text = "first\ntool\ntea\nassistant\nsecond"
    file = write_table(tmp_path / "t.parquet", prompts, [text] * 2, right=[0.0] * 2, searches=[0, 1])
    episodes = completions(file, ["right"], None)
    assert [rows[0]["question"] for rows in episodes] == ["Where\nis it?", ""]
    assert [rows[0]["logged"] for rows in episodes] == [{"searches": 0}, {"searches": 1}]
    assert [row["response"] for row in episodes[0]] == ["first", "second"]


def test_a_question_is_the_same_under_both_libraries(tmp_path):
    theirs = write_trl_run(tmp_path / "theirs", grpo(tmp_path))
    (theirs / "completions").mkdir()
    prompts = [f"system\nLook.\nuser\n{text}\nassistant\n" for text in ("Where?", "Who?")]
    write_table(theirs / "completions" / "completions_00001.parquet", prompts, ["there", "me"])
    question = json.dumps([{"role": "system", "content": "Look."}, {"role": "user", "content": "Where?"}])
    ours = write_run(tmp_path / "ours", updates=1, episodes=2, texts={"question": question})
    sample = sample_episodes(group_runs(load_runs([theirs, ours])), max_bytes=10**6)
    asked = [(episode["method"], sample.questions[episode["question"]]) for episode in sample.episodes]
    assert set(asked) >= {(0, "Where?"), (0, "Who?"), (1, "Where?")}


def test_text_is_divided_at_tool_results(tmp_path):
    text = "first\nuser\n<tool_response>\ntea\n</tool_response>\nassistant\nsecond"
    file = write_table(tmp_path / "t.parquet", ["p", "q", "p"], [text, "plain", ""], right=[1.0, None, 0.0])
    episodes = completions(file, ["right"], None)
    assert [[row["response"] for row in rows] for rows in episodes] == [["first", "second"], ["plain"], [""]]
    assert episodes[0][0]["observation"] == "<tool_response>\ntea\n</tool_response>"
    assert [(rows[0]["stream_position"], rows[0]["generation_index"]) for rows in episodes] == [(0, 0), (1, 0), (0, 1)]
    assert [rows[0]["score"] for rows in episodes] == [1.0, 0, 0.0]


def test_another_table_is_named(tmp_path):
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match=r"t\.parquet is not a table of completions: its columns are \['a'\]"):
        completions(tmp_path / "t.parquet", [], None)
