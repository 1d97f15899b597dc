"""Ranks wait for each other's objects longer than for their tensors."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from trl_steppo import StepPOConfig
from trl_steppo.trainer.checks import warn_of_waiting
from trl_steppo.trainer.ranks import from_first_rank, gather_objects

SCRIPT = Path(__file__).with_name("objects_on_ranks.py")


def test_a_slow_rank_is_waited_for():
    """What NCCL's watchdog, or gloo's own limit of tensors, would end."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    done = subprocess.run(
        launch, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_one_rank_has_what_it_has():
    own = [1, 2]
    assert gather_objects(own) is own
    assert from_first_rank("a") == "a"


@pytest.mark.parametrize(
    ("num_ranks", "settings", "is_warned"),
    [(2, {}, True), (1, {}, False), (2, {"max_episode_s": 60.0}, False), (2, {"replay_episodes_dir": "a"}, False)],
)
def test_ranks_that_may_wait_for_ever_are_told(tmp_path, caplog, num_ranks, settings, is_warned):
    args = StepPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    with caplog.at_level(logging.WARNING):
        warn_of_waiting(args, SimpleNamespace(num_processes=num_ranks, is_main_process=True))
    assert ("`max_episode_s`" in caplog.text) == is_warned
