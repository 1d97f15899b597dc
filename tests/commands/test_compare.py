"""`trl-steppo compare`, on a script that trains nothing, and, slowly, on one that does."""

from __future__ import annotations

import io
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from tests.comparison.test_plan import SCRIPT
from trl_steppo.cli import main
from trl_steppo.commands import compare
from trl_steppo.comparison.plan import Arm, plan_runs
from trl_steppo.comparison.processes import State
from trl_steppo.comparison.screen import Screen

ROOT = Path(__file__).parents[2]


def starts(directory: Path) -> dict[str, list[str]]:
    """How often each run was started, and from which update."""
    return {
        f"{path.parts[-3]} {path.parts[-2]}": [line.split(",")[0] for line in path.read_text().splitlines()]
        for path in sorted(directory.glob("*/*/starts.txt"))
    }


@pytest.fixture(autouse=True)
def _no_gpus(monkeypatch):
    """The number of GPUs is known without torch, whose import takes seconds."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def quick(monkeypatch):
    """Without what takes seconds."""
    monkeypatch.setattr(compare, "_report", lambda runs, output: None)


def test_arms_and_seeds_end_in_a_report(tmp_path, capsys):
    """With the arms' names, whatever their settings; one that fails costs itself alone."""
    words = ["compare", str(SCRIPT), "--seeds", "1", "2", "--arm", "slow", "--arm", "fast", "learning_rate=0.3"]
    words += ["--arm", "broken", "fails=true", "--output_dir", str(tmp_path), "--parallel", "2"]
    assert main([*words, "--", "--total_updates", "3"]) == 1
    printed = capsys.readouterr()
    assert "4 of 6 runs are finished" in printed.out
    assert "broken, seed 1: failed after" in printed.out
    assert "    broken on purpose" in printed.out
    assert re.search(
        r"2 of 6 runs failed; the same command again plays these:\n  broken, seed 1: \S+log\.txt", printed.err
    )
    assert re.search(r"fast +2 +24 +0\.615 *\n +0\.61 to 0\.62", printed.out), (
        "the mean of 0.3, 0.6 and 0.9 and the seed"
    )
    page = (tmp_path / "report.html").read_text()
    assert "<title>slow · fast" in page
    assert "broken on purpose" in (tmp_path / "broken" / "seed_1" / "log.txt").read_text()


def test_what_is_finished_is_not_played_again(tmp_path, capsys, quick):
    words = ["compare", str(SCRIPT), "--arm", "a", "--arm", "b", "learning_rate=0.3", "--output_dir", str(tmp_path)]
    assert main([*words, "--seeds", "1"]) == 0
    assert main([*words, "--seeds", "1", "2"]) == 0
    assert starts(tmp_path) == {f"{arm} seed_{seed}": ["from 0"] for arm in "ab" for seed in (1, 2)}
    assert "a, seed 1: finished before" in capsys.readouterr().out
    words[6] = "learning_rate=0.2"
    assert main([*words, "--seeds", "1"]) == 1
    assert "What differs: learning_rate is 0.3 there, and 0.2 here" in capsys.readouterr().err


def test_an_unknown_setting_is_found_before_anything_starts(tmp_path, capsys):
    words = ["compare", str(SCRIPT), "--seeds", "1", "--output_dir", str(tmp_path / "runs")]
    assert main([*words, "--arm", "a", "--arm", "b", "learning_rat=1"]) == 1
    assert "arm b: the script has no setting `learning_rat`; did you mean `learning_rate`?" in capsys.readouterr().err
    assert main([*words, "--arm", "a", "--", "--totl_updates", "1"]) == 1
    assert "after --: the script has no setting `totl_updates`" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_prints_the_commands(tmp_path, capsys):
    words = [
        "compare",
        str(SCRIPT),
        "--seeds",
        "3",
        "--arm",
        "a b",
        "learning_rate=1",
        "--launcher",
        "accelerate launch -q",
    ]
    assert main([*words, "--output_dir", str(tmp_path / "runs"), "--dry_run", "--", "--total_updates", "1"]) == 0
    command, share = capsys.readouterr().out.splitlines()
    assert command == (
        f"accelerate launch -q {SCRIPT} --total_updates 1 --learning_rate 1 --seed 3 --run_name 'a b' "
        f"--output_dir '{tmp_path}/runs/a b/seed_3'"
    )
    assert share.startswith("# 1 runs, 1 at a time, with OMP_NUM_THREADS=")
    assert not (tmp_path / "runs").exists()


def test_ctrl_c_has_runs_save_and_says_how_to_go_on(tmp_path, monkeypatch):
    """One is interrupted while it trains, and one has not begun."""
    arguments = [str(SCRIPT), "--seeds", "1", "2", "--arm", "a", "waits_after=2", "--output_dir", str(tmp_path)]
    command = [
        sys.executable,
        "-m",
        "trl_steppo.cli",
        "compare",
        *arguments,
        "--parallel",
        "1",
        "--",
        "--total_updates",
        "3",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "a" / "seed_1" / "waits").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    busy = main(command[3:])
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert busy == 1, "two comparisons in one directory"
    assert "a, seed 1: stopped after" in printed
    assert "again goes on: 0 of 2 runs are finished, 1 go on from their last checkpoints\n" in printed
    assert starts(tmp_path) == {"a seed_1": ["from 0"]}
    monkeypatch.setattr(compare, "_report", lambda runs, output: None)
    (tmp_path / "a" / "seed_2").mkdir()
    words = [word for word in command[3:] if word != "2"]
    assert main(words) == 0
    assert starts(tmp_path) == {"a seed_1": ["from 0", "from 2"]}
    assert (tmp_path / "a" / "seed_1" / "log.txt").read_text().count("it begins") == 2


def test_a_table_on_a_terminal(tmp_path):
    """Of more runs than it has lines it shows those that matter, and counts the others."""
    runs = plan_runs("train.py", [Arm("steppo", {}), Arm("grpo", {})], list(range(1, 9)), tmp_path)
    runs[3].output_dir.mkdir(parents=True)
    (runs[3].output_dir / "metrics.jsonl").write_text('{"step": 7, "env/reward": 0.625}\n')
    console = Console(file=io.StringIO(), force_terminal=True, width=80, height=14, color_system=None)
    runs[2].output_dir.mkdir(parents=True)
    (runs[2].output_dir / "log.txt").write_text("it says \x1b]0;title\x07")
    with Screen(runs, console) as screen:
        screen.change(runs[0], State.FINISHED)
        for run in runs[2:4]:
            screen.change(run, State.RUNNING)
        screen.change(runs[2], State.FAILED)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    last = shown[shown.rindex("arm") :]
    assert re.search(r"grpo +│ +2 │ running +│ +7 │ +0\.625 │ +0\.0", last)
    assert re.search(r"steppo │ +2 │ failed", last)
    assert "and 8 waiting, 1 finished" in last
    assert "steppo, seed 2 failed; the end of" in shown
    assert r"it says \x1b]0;title\x07" in shown


@pytest.mark.slow
def test_a_comparison_of_real_runs(tmp_path):
    words = [str(ROOT / "examples" / "rooms_steppo.py"), "--seeds", "1", "2", "--arm", "StepPO", "--arm", "token PPO"]
    words += ["advantage_estimator=token_gae", "importance_sampling_level=token", "--output_dir", str(tmp_path), "--"]
    words += ["--total_episodes", "32", "--per_device_train_batch_size", "16", "--max_interaction_steps", "3"]
    done = subprocess.run(
        [sys.executable, "-m", "trl_steppo.cli", "compare", *words, "--response_length", "8"],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert "4 of 4 runs are finished" in done.stdout
    assert "<title>StepPO · token PPO" in (tmp_path / "report.html").read_text()
