"""One run of the study: the process that plays it, what is kept of it, and the directory of what was kept."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

from common.runs import Run, example_run, updates_of

from trl_steppo import durable

from .methods import CRITIC_OVER_POLICY, METHODS, TOKEN_CLIPRANGE, WITH_CRITIC, Flags
from .tasks import Task

# Evaluated at the start and at the end alone: the curve is that of the episodes trained on.
EVERY_RUN = {"eval_on_start": True, "eval_strategy": "steps", "eval_steps": 1_000_000, "num_sample_generations": 0}
QUICK = {"total_episodes": 64, "per_device_train_batch_size": 32}  # that it runs, not that it learns


@dataclass(frozen=True, order=True)
class Cell:
    """One run of the study."""

    task: str
    phase: str
    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its name in the phase's folder."""
        return f"{self.method}_lr{self.learning_rate:g}_seed{self.seed}"


@dataclass(frozen=True)
class Record:
    """
    What is kept of a run.

    Args:
        episodes (`list[int]`):
            Played by the end of each update.
        sampled (`list[float]`):
            The mean score of each update's episodes.
        greedy_start, greedy_end (`float`):
            The score on the evaluation rows before and after.
        explained_variance (`list[float | None]`):
            Of the critic, by update.
        clip_fraction (`list[float | None]`):
            Share of ratios beyond the clip range, by update; `None` where the critic was trained alone.
        response_tokens, episode_steps (`list[float]`, *optional*):
            Tokens of a response and steps of an episode, in the mean of each update. `None` in older files.
        seconds (`float`):
            The whole process.
        processor, commit, command (`str`):
            What it ran on, and how.
        staleness (`list[float]`, *optional*):
            Updates between the weights that sampled a step and those that trained on it, in the mean of each update.
        inputs (`dict[str, str]`, *optional*):
            Hashes of the files it read: its configuration, and the policy. `None` in the oldest records.
    """

    episodes: list[int]
    sampled: list[float]
    greedy_start: float
    greedy_end: float
    explained_variance: list[float | None]
    clip_fraction: list[float | None]
    seconds: float
    processor: str
    commit: str | None
    command: str
    response_tokens: list[float] | None = None
    episode_steps: list[float] | None = None
    staleness: list[float] | None = None
    inputs: dict[str, str] | None = None

    @property
    def area(self) -> float:
        """Under the learning curve, over its length."""
        return mean(self.sampled)


def run_of(task: Task, cell: Cell, runs_dir: Path, extra: Flags) -> Run:
    """The process of a cell, with every setting that differs from the task's configuration as a flag."""
    with_critic = cell.method in WITH_CRITIC
    config = task.config if with_critic else task.group_config
    flags: dict[str, object] = {
        "config": str(config),
        **task.flags,
        **EVERY_RUN,
        "learning_rate": cell.learning_rate,
        "seed": cell.seed,
    }
    if with_critic:
        flags |= {"critic_learning_rate": cell.learning_rate * CRITIC_OVER_POLICY, "gamma": 0.99, "lam": 0.95}
    method = METHODS[cell.method]
    ratio_tokens = 1 if "importance_sampling_level" in method else task.response_tokens
    flags |= {"cliprange": TOKEN_CLIPRANGE / ratio_tokens, **method, **extra}
    return example_run(task.script, runs_dir / cell.task / cell.phase / cell.name, flags)


def record_of(run: Run, score: str) -> Record:
    """What is kept of a finished run."""
    history = run.history()
    updates = updates_of(history)
    greedy = [logs[f"eval_{score}"] for logs in history if f"eval_{score}" in logs]
    return Record(
        episodes=[int(logs["episode"]) for logs in updates],
        sampled=[logs[f"env/{score}"] for logs in updates],
        greedy_start=greedy[0],
        greedy_end=greedy[-1],
        explained_variance=[logs.get("critic/explained_variance") for logs in updates],
        clip_fraction=[logs.get("policy/clipfrac_avg") for logs in updates],
        seconds=run.seconds,
        processor=processor_name(),
        commit=run.commit,
        command=run.command,
        response_tokens=[logs["rollout/response_tokens"] for logs in updates],
        episode_steps=[logs["env/episode_steps"] for logs in updates],
        staleness=[logs.get("rollout/staleness", 0.0) for logs in updates],
        inputs=run.played_hashes,
    )


def processor_name() -> str:
    """The processor's model, as the system calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


@dataclass(frozen=True)
class Store:
    """The directory with a file for each run."""

    root: Path

    def path(self, cell: Cell) -> Path:
        """Where a run's file is."""
        return self.root / cell.task / cell.phase / f"{cell.name}.json"

    def holds(self, cell: Cell) -> bool:
        """Whether the run is done."""
        return self.path(cell).is_file()

    def read(self, cell: Cell) -> Record:
        """What is kept of a run."""
        return Record(**json.loads(self.path(cell).read_text())["record"])

    def write(self, cell: Cell, record: Record) -> None:
        """Keep it: whole, or not at all."""
        with durable.file(self.path(cell)) as partial:
            partial.write_text(json.dumps({"run": asdict(cell), "record": asdict(record)}) + "\n")

    def areas(self, cells: Iterable[Cell]) -> dict[Cell, float | None]:
        """Under the curve of each; `None` for those that are not done."""
        return {cell: self.read(cell).area if self.holds(cell) else None for cell in cells}

    def records(self, cells: Iterable[Cell]) -> dict[Cell, Record]:
        """Those that are done."""
        return {cell: self.read(cell) for cell in cells if self.holds(cell)}
