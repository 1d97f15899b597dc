"""What is read of a run's directory, and what is said of one that is none."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from tests.report.synthetic import read_run, write_run
from trl_steppo.durable import Lock
from trl_steppo.errors import DataError
from trl_steppo.report import write_report
from trl_steppo.report.runs import load_runs


def test_a_run(tmp_path):
    run = read_run(tmp_path / "a", seed=7, updates=3)
    assert (run.name, run.seed, run.num_updates, run.episodes_per_update) == ("a", 7, 3, 8.0)
    assert list(run.series("env/exact_match")) == [1, 2, 3]
    assert list(run.series("loss/policy_avg")) == [1, 3], "what is not a number is left out"
    assert list(run.episode_files) == [1, 2, 3]


def test_a_directory_that_is_no_run(tmp_path):
    with pytest.raises(DataError, match=r"there is no directory '.*/nothing'"):
        write_report([tmp_path / "nothing"], tmp_path / "report.html")
    (tmp_path / "begun").mkdir()
    with pytest.raises(DataError, match=r"begun has no trainer_state\.json.*TRL's trainers .* each checkpoint"):
        write_report([tmp_path / "begun"], tmp_path / "report.html")


def test_a_run_that_was_stopped_is_read_up_to_its_last_checkpoint(tmp_path):
    path = write_run(tmp_path / "a", updates=12)
    whole = json.loads((path / "trainer_state.json").read_text())["log_history"]
    (path / "trainer_state.json").unlink()
    for step in (2, 10):  # the names' order is not the numbers'
        (path / f"checkpoint-{step}").mkdir()
        history = [logs for logs in whole if logs["step"] <= step]
        (path / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    run = load_runs([path])[0]
    assert (run.is_finished, run.num_updates) == (False, 10)
    assert list(run.episode_files) == list(range(1, 11))
    other = write_run(tmp_path / "b", seed=2, updates=12)
    page = write_report([path, other], tmp_path / "report.html")[0].read_text()
    assert "Not finished, and shown as far as they were logged: a (update 10)." in page
    assert load_runs([other])[0].is_finished


def without_state(path: Path, lines: int, tail: str = "") -> None:
    """A run that has logged so many lines, and is at work, or was killed."""
    history = json.loads((path / "trainer_state.json").read_text())["log_history"]
    (path / "trainer_state.json").unlink()
    (path / "metrics.jsonl").write_text("".join(json.dumps(logs) + "\n" for logs in history[:lines]) + tail)


def test_a_run_that_goes_on_is_read_up_to_its_last_log(tmp_path):
    going, killed = (write_run(tmp_path / name, seed=seed, updates=12) for name, seed in (("going", 1), ("killed", 2)))
    without_state(going, 7, tail='{"step": 8, "epi')
    without_state(killed, 5)
    lock = Lock(going / "_run.lock")
    (killed / "_run.lock").write_text(f"process 2147483646 on {platform.node()}\n")
    try:
        runs = load_runs([going, killed])
        page = write_report([going, killed], tmp_path / "report.html")[0].read_text()
    finally:
        lock.close()
    assert [(run.num_updates, run.is_finished, run.is_running) for run in runs] == [
        (7, False, True),
        (5, False, False),
    ]
    assert "Still going on: going (update 7)." in page
    assert "Not finished, and shown as far as they were logged: killed (update 5)." in page
    assert not load_runs([going])[0].is_running


def test_evaluations_after_a_run_are_its_own(tmp_path):
    path = write_run(tmp_path / "a", updates=3)
    history = json.loads((path / "trainer_state.json").read_text())["log_history"]
    later = [*history, {"step": 3, "eval_reward": 0.5}]
    (path / "metrics.jsonl").write_text("".join(json.dumps(logs) + "\n" for logs in later))
    run = load_runs([path])[0]
    assert (run.is_finished, len(run.history)) == (True, len(later))


def test_a_run_that_begins_where_another_has_ended_is_not_finished(tmp_path):
    path = write_run(tmp_path / "a", updates=3)
    (path / "metrics.jsonl").write_text('{"step": 1, "episode": 8, "env/reward": 0.25}\n')
    run = load_runs([path])[0]
    assert (run.is_finished, run.num_updates, run.series("env/reward")) == (False, 1, {1: 0.25})


@pytest.mark.parametrize("history", [[], [{"step": 1, "train_runtime": 1.0}]])
def test_a_run_that_logged_no_update(tmp_path, history):
    write_run(tmp_path / "a")
    (tmp_path / "a" / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    with pytest.raises(DataError, match="holds no update"):
        load_runs([tmp_path / "a"])


@pytest.mark.parametrize(("file", "content"), [("trainer_state.json", "{"), ("steppo_config.json", "[]")])
def test_a_damaged_file_is_named(tmp_path, file, content):
    write_run(tmp_path / "a")
    (tmp_path / "a" / file).write_text(content)
    with pytest.raises(DataError, match=file):
        load_runs([tmp_path / "a"])


def test_a_run_that_is_named_twice(tmp_path):
    write_run(tmp_path / "a")
    with pytest.raises(DataError, match="named 2 times"):
        load_runs([tmp_path / "a", tmp_path / "b" / ".." / "a"])


def test_names_are_as_short_as_can_be(tmp_path):
    paths = [write_run(tmp_path / name) for name in ("x/run", "y/run")]
    assert [run.name for run in load_runs(paths)] == ["x/run", "y/run"]


def test_episodes_that_an_earlier_run_left_behind_are_not_its_own(tmp_path):
    path = write_run(tmp_path / "a", updates=3)
    file = path / "episodes" / "update_00001.parquet"
    file.with_name("update_00009.parquet").write_bytes(file.read_bytes())
    assert list(load_runs([path])[0].episode_files) == [1, 2, 3]
    settings = json.loads((path / "steppo_config.json").read_text())
    (path / "steppo_config.json").write_text(json.dumps(settings | {"log_episodes": 0}))
    assert load_runs([path])[0].episode_files == {}
