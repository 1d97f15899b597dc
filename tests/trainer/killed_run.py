"""
Kills a run again and again: `killed_run.py OUTPUT_DIR NUM_KILLS SEED`.

Imports everything once, then forks a process for each attempt to train, which goes on from the newest checkpoint there
is. `kill -9` falls at a random moment of a rollout, an update or a save, in turn. Prints the phases it fell into.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tiny import make_trainer, prompt_rows
from transformers.trainer_utils import get_last_checkpoint

PHASES = {"_roll_out": 1, "_learn": 2, "_save_checkpoint": 3}
SETTINGS: dict[str, Any] = {
    "total_episodes": 64,
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


def train(directory: Path, phase: Any = None) -> None:
    """A run, or the rest of it; `phase` shows another process where it is."""
    torch.set_num_threads(1)
    trainer = make_trainer(
        directory, eval_dataset=prompt_rows(3), dump_episodes_dir=str(directory / "episodes"), **SETTINGS
    )
    for name, number in PHASES.items() if phase is not None else ():
        setattr(trainer, name, shown(getattr(trainer, name), phase, number))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(directory)) if directory.is_dir() else None)
    trainer.save_model()


def shown(method: Any, phase: Any, number: int) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        phase.value = number
        try:
            return method(*args, **kwargs)
        finally:
            phase.value = 0

    return run


def main(directory: Path, num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    context, generator = multiprocessing.get_context("fork"), random.Random(seed)
    kills = 0
    while True:
        phase = context.Value("i", 0, lock=False)
        child = context.Process(target=train, args=(directory, phase))
        child.start()
        if kills < num_kills:
            target = 1 + kills % 3
            while phase.value != target and child.is_alive():
                time.sleep(0.0002)
            time.sleep(generator.random() * 0.05)  # a phase takes some 10 to 100 ms
            fell_into = phase.value
            os.kill(child.pid or 0, signal.SIGKILL)
            child.join()
            if child.exitcode == -signal.SIGKILL:
                kills += 1
                print(fell_into, flush=True)
                continue
        child.join()
        if kills >= num_kills or child.exitcode:
            sys.exit(child.exitcode)
        sys.exit(f"the run ended after {kills} of {num_kills} kills")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
