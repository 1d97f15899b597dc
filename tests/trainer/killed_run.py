"""
Kills a run again and again: `killed_run.py OUTPUT_DIR NUM_UPDATES NUM_KILLS SEED`.

Imports everything once, then forks a process for each attempt to train, which goes on from the newest checkpoint there
is. `kill -9` falls, in turn, at a random moment of a rollout, of an update, or of writing a checkpoint: not the first
of the attempt, so that most attempts leave something to go on from.

Prints a line for each kill: where it fell, the update of the newest checkpoint, whether a half-written one is left.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers.trainer_utils import get_last_checkpoint

from tests.trainer.forked import context, fork
from tests.trainer.tiny import make_trainer, prompt_rows
from trl_steppo.trainer import player

PHASES = {"_roll_out": 0.05, "_learn": 0.03, "_write_checkpoint": 0.02}  # method: seconds that it takes, about
GRACE_S = 60.0
SETTINGS: dict[str, Any] = {
    "num_mini_batches": 2,
    "num_ppo_epochs": 2,
    "kl_coef": 0.05,
    "save_strategy": "steps",
    "save_steps": 1,
    "save_total_limit": 2,
    "logging_steps": 3,  # so that a checkpoint has metrics that were not logged yet
    "eval_strategy": "steps",
    "eval_steps": 4,
    "lr_scheduler_type": "linear",
}


def train(directory: Path, num_updates: int, entered: Any = None) -> None:
    """A run, or the rest of it; `entered` counts for another process how often it was in each phase."""
    torch.set_num_threads(1)
    trainer = make_trainer(
        directory,
        total_episodes=8 * num_updates,
        eval_dataset=prompt_rows(3),
        dump_episodes_dir=str(directory / "episodes"),
        **SETTINGS,
    )
    for index, name in enumerate(PHASES if entered is not None else ()):
        setattr(trainer, name, counted(getattr(trainer, name), entered, index))
    newest = get_last_checkpoint(str(directory)) if directory.is_dir() else None
    # However long a thread stalls, the sampler waits for it: else its batches differ, and with them its last digits.
    with patch.object(player, "play_episodes", partial(player.play_episodes, grace_s=GRACE_S)):
        trainer.train(resume_from_checkpoint=newest)
    trainer.save_model()


def counted(method: Callable[..., Any], entered: Any, index: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        entered[index] += 1
        return method(*args, **kwargs)

    return run


def main(directory: Path, num_updates: int, num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    train(
        directory.with_name("warm"), 1
    )  # what is slow for the first time is not so in the processes forked from here
    generator = random.Random(seed)
    for number in range(num_kills):
        target, ordinal = number % len(PHASES), generator.randint(2, 3)
        entered = context.Array("i", len(PHASES), lock=False)
        child = fork(train, directory, num_updates, entered)
        while entered[target] < ordinal and child.is_alive():
            time.sleep(0.0002)
        time.sleep(generator.random() * list(PHASES.values())[target])
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
        if child.exitcode != -signal.SIGKILL:
            sys.exit(f"the run ended after {number} of {num_kills} kills")
        newest = get_last_checkpoint(str(directory)) or "-0"
        print("killed", target, newest.rpartition("-")[2], int(any(directory.glob("*.partial"))), flush=True)
    child = fork(train, directory, num_updates)
    child.join()
    sys.exit(child.exitcode)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
