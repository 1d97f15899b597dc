"""A rank that is killed, or asked to stop, takes the others along; the run then goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.warm import free_port
from trl_steppo.commands.config import CONFIGS

SETTINGS: dict[str, Any] = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "kl_coef": 0.05,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
}


def launch(directory: Path, name: str, settings: dict[str, Any], config: str = "zero3_cpu2") -> subprocess.Popen[str]:
    scenarios = directory / f"{name}.json"
    scenarios.write_text(json.dumps({name: SETTINGS | settings}))
    script = Path(__file__).with_name("replay_on_ranks.py")
    command = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    command += ["--main_process_port", free_port()]
    return subprocess.Popen(
        [sys.executable, *command, str(script), str(scenarios), str(directory)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def process_of_rank(launcher: int, rank: int) -> int:
    """The launcher's child that was given this rank."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == launcher and f"\0RANK={rank}\0" in (path / "environ").read_text():
                return int(path.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the rank's process in /proc")
def test_a_killed_rank_ends_the_run_and_it_resumes(tmp_path):
    assert launch(tmp_path, "whole", {}).wait(200) == 0

    killed = launch(tmp_path, "killed", {})
    deadline = time.monotonic() + 100
    while not (tmp_path / "killed" / "checkpoint-2").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process_of_rank(killed.pid, 1), signal.SIGKILL)
    start = time.monotonic()
    _, errors = killed.communicate(timeout=60)
    assert time.monotonic() - start < 60
    assert killed.returncode != 0
    assert "SIGKILL" in errors
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "it had not ended by itself"

    assert launch(tmp_path, "killed", {"resume_from_checkpoint": True}).wait(200) == 0
    for name in ("model.safetensors", "critic/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the rank's process in /proc")
@pytest.mark.parametrize("config", ["ddp_cpu2", "zero3_cpu2"])
def test_a_rank_that_is_asked_to_stop_stops_all_of_them(tmp_path, config):
    episodes = tmp_path / "episodes"
    settings = {"max_steps": 100_000, "save_steps": 100_000, "dump_episodes_dir": str(episodes)}
    stopped = launch(tmp_path, "stopped", settings, config)
    deadline = time.monotonic() + 100
    while not episodes.is_dir() or len(list(episodes.iterdir())) < 6:
        assert time.monotonic() < deadline
        assert stopped.poll() is None
        time.sleep(0.05)
    os.kill(process_of_rank(stopped.pid, 1), signal.SIGTERM)
    _, errors = stopped.communicate(timeout=60)
    assert stopped.returncode != 0
    assert "the run was asked to stop, and ends after update" in errors
    (checkpoint,) = (tmp_path / "stopped").glob("checkpoint-*")
    update = int(checkpoint.name.removeprefix("checkpoint-"))
    assert update >= 2
    settings["resume_from_checkpoint"] = True
    rest = launch(tmp_path, "stopped", {**settings, "max_steps": update + 1}, config)
    assert rest.wait(200) == 0
    assert json.loads((tmp_path / "stopped" / "trainer_state.json").read_text())["global_step"] == update + 1
