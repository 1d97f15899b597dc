"""
Kills a run whose rollouts begin before their updates, again and again: `killed_ahead.py ENGINE OUTPUT_DIR NUM_UPDATES
NUM_KILLS SEED`.

`kill -9` falls at random moments, in turn on the trainer, which is started again and goes on from its newest
checkpoint, and on what samples for it: with ENGINE `worker` its own process, which it starts again itself, with
`vllm` a server, which is started again here a little later.

Prints a line for each kill: whom it met, and how many updates were done. Fails if a process is left behind.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from tests.inference.fake_vllm import free_port
from tests.trainer.forked import context, fork
from tests.trainer.served_policy import serve
from tests.trainer.tiny import make_trainer, message_rows

BATCH = 8
UPDATE_S = 0.2  # about


def command_of(process: psutil.Process) -> str:
    """The command of a process; none of one that has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


class Counts(TrainerCallback):
    """Tells another process how many updates are done."""

    def __init__(self, done: Any) -> None:
        self.done = done

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.done.value = state.global_step


def train(directory: Path, num_updates: int, engine: dict[str, Any], done: Any) -> None:
    """A run, or the rest of it."""
    torch.set_num_threads(1)
    trainer = make_trainer(
        directory,
        train_dataset=message_rows(10),
        total_episodes=BATCH * num_updates,
        dump_episodes_dir=str(directory / "episodes"),
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        callbacks=[Counts(done)],
        **engine,
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(directory)) if directory.is_dir() else None)


class Run:
    """The processes of a run, and what has become of it."""

    def __init__(self, directory: Path, num_updates: int, port: int | None) -> None:
        self.directory, self.num_updates, self.port = directory, num_updates, port
        self.engine: dict[str, Any] = {"max_staleness": 2}
        if port is not None:
            self.engine |= {"use_vllm": True, "vllm_server_base_url": f"http://127.0.0.1:{port}"}
        self.done = context.Value("i", 0, lock=False)
        self.samplers: set[psutil.Process] = set()

    def start_trainer(self) -> None:
        self.trainer = fork(train, self.directory, self.num_updates, self.engine, self.done)

    def start_server(self) -> None:
        if self.port is not None:
            self.server = fork(serve, self.port)

    def sampler(self) -> psutil.Process | None:
        """The process that samples now."""
        if self.port is not None:
            return psutil.Process(self.server.pid)
        found = [one for one in psutil.Process(self.trainer.pid).children() if "spawn_main" in command_of(one)]
        self.samplers |= set(found)
        return found[0] if found else None

    def wait_for_update(self, number: int) -> None:
        """Until so many are done."""
        while self.done.value < number:
            if not self.trainer.is_alive():
                sys.exit(f"the run ended with exit status {self.trainer.exitcode} after {self.done.value} updates")
            time.sleep(0.002)

    def kill_trainer(self) -> None:
        self.sampler()  # so that it is known who must end with it
        os.kill(self.trainer.pid or 0, signal.SIGKILL)
        self.trainer.join()
        self.start_trainer()

    def kill_sampler(self, pause_s: float) -> None:
        while (sampler := self.sampler()) is None:
            time.sleep(0.01)
        sampler.kill()
        if self.port is not None:
            self.server.join()
            time.sleep(pause_s)
            self.start_server()


def main(engine: str, directory: Path, num_updates: int, num_kills: int, seed: int) -> None:
    torch.set_num_threads(1)
    generator = random.Random(seed)
    run = Run(directory, num_updates, free_port() if engine == "vllm" else None)
    run.start_server()
    run.start_trainer()
    for number in range(num_kills):
        run.wait_for_update(run.done.value + 1)  # so that every attempt leaves something to go on from
        time.sleep(generator.random() * UPDATE_S)
        print("killed", number % 2, run.done.value, flush=True)
        if number % 2 == 0:
            run.kill_trainer()
        else:
            run.kill_sampler(generator.random())
    run.trainer.join()
    if run.port is not None:
        run.server.kill()
    _, left = psutil.wait_procs(list(run.samplers), timeout=20)
    sys.exit(run.trainer.exitcode or (f"left behind: {left}" if left else 0))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
