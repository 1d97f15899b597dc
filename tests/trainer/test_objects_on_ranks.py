"""Ranks wait for each other's objects longer than for their tensors."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.trainer.tiny import id_rows, make_trainer
from trl_steppo import StepPOConfig
from trl_steppo.learning.ranks import together
from trl_steppo.trainer import evaluation, ppo_trainer, rollouts
from trl_steppo.trainer.checks import warn_of_waiting

SCRIPT = Path(__file__).with_name("objects_on_ranks.py")


def test_a_slow_rank_is_waited_for():
    """What NCCL's watchdog, or gloo's own limit of tensors, would end. Nor do interpreters abort when they end."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(SCRIPT)]
    done = subprocess.run(
        launch, capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    ("num_ranks", "settings", "is_warned"),
    [(2, {}, True), (1, {}, False), (2, {"max_episode_s": 60.0}, False), (2, {"replay_episodes_dir": "a"}, False)],
)
def test_ranks_that_may_wait_for_ever_are_told(tmp_path, caplog, num_ranks, settings, is_warned):
    args = StepPOConfig(output_dir=str(tmp_path), use_cpu=True, **settings)
    with caplog.at_level(logging.WARNING):
        warn_of_waiting(args, SimpleNamespace(num_processes=num_ranks, is_main_process=True))
    assert ("`max_episode_s`" in caplog.text) == is_warned


@pytest.mark.parametrize("what", ["collated", "collated ahead", "read back", "dumped", "evaluated"])
def test_what_one_rank_cannot_do_is_told_to_all(tmp_path, monkeypatch, what):
    """A rank that raises by itself leaves the others waiting for it."""
    told: list[str] = []

    def telling(act: Callable[[], Any], within: Any = None) -> Any:
        try:
            return together(act, within)
        except Exception as error:
            told.append(str(error))
            raise

    for module in (ppo_trainer, rollouts, evaluation):
        monkeypatch.setattr(module, "together", telling)
    is_broken: list[bool] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        if is_broken:
            raise OSError("broken")
        return {"input_ids": [row["input_ids"] for row in rows]}

    settings: dict[str, Any] = {"train_dataset": id_rows(), "reward_funcs": [paying], "environment_factory": None}
    if what == "read back":
        settings["replay_episodes_dir"] = str(tmp_path / "not there")
    elif what == "dumped":
        (tmp_path / "a file").touch()
        settings["dump_episodes_dir"] = str(tmp_path / "a file")
    else:
        settings |= {"data_collator": collate, "eval_dataset": id_rows(2)}
    if what == "collated ahead":
        settings["max_staleness"] = 1
    trainer = make_trainer(tmp_path / "run", **settings)
    is_broken.append(True)
    with pytest.raises(Exception, match=r"broken|not there|a file") as raised:
        trainer.evaluate() if what == "evaluated" else trainer.train()
    assert told == [str(raised.value)]


def paying(completions: list[Any], **columns: Any) -> list[float]:
    return [1.0] * len(completions)
