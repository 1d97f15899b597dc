"""Reads runs of TRL's online trainers (GRPO, RLOO, AsyncGRPO, ...), so that they stand beside ours in a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..types import JsonObject
from .files import read_arguments

_OUR_NAMES = {
    "reward": "env/reward",
    "reward_std": "env/reward_std",
    "entropy": "policy/entropy_avg",
    "learning_rate": "lr",
    "loss": "loss/policy_avg",
    "grad_norm": "policy/grad_norm",
    "kl": "objective/kl",
    "ratio": "val/ratio",
    "clip_ratio/region_mean": "policy/clipfrac_avg",
    "completions/mean_length": "rollout/episode_response_tokens",
    "completions/clipped_ratio": "env/truncated",
    "step_time": "perf/update_s",
    "perf/step_s": "perf/update_s",
}
"""Names of metrics that mean the same, by TRL's names."""


def as_our_history(history: Sequence[JsonObject], arguments: JsonObject) -> list[JsonObject]:
    """
    The logs of one of TRL's trainers, with our names for metrics besides its own.

    Args:
        history (`Sequence[dict]`):
            The logs. A step is an optimizer step there.
        arguments (`dict`):
            The trainer's arguments, from which the episodes of a step are computed.
    """
    per_step = _episodes_per_step(arguments)
    logs = []
    for given in history:
        ours = {ours: given[theirs] for theirs, ours in _OUR_NAMES.items() if theirs in given}
        if "reward" in given:
            ours["episode"] = given["step"] * given.get("batch/samples_per_step", per_step)
        logs.append({**ours, **given})
    return logs


def _episodes_per_step(arguments: JsonObject) -> float:
    """Episodes that are sampled for one optimizer step, on all ranks."""
    accumulated = arguments.get("gradient_accumulation_steps") or 1
    sampled, repeated = arguments.get("generation_batch_size"), arguments.get("steps_per_generation")
    if sampled and repeated:
        return float(sampled * accumulated / (repeated * (arguments.get("num_iterations") or 1)))
    return float((arguments.get("per_device_train_batch_size") or 1) * accumulated)


def trainer_and_settings(directory: Path, checkpoint: Path | None) -> JsonObject:
    """
    The settings of a run of one of TRL's trainers, with its `trainer`, as in "trl.GRPO".

    Args:
        directory (`Path`):
            The run's `output_dir`.
        checkpoint (`Path`, *optional*):
            A checkpoint of it.
    """
    for place in (checkpoint, directory):
        found = None if place is None else read_arguments(place / "training_args.bin")
        if found is not None:
            name, settings = found
            title = name.rsplit(".", 1)[1].removesuffix("Config")
            return {**settings, "trainer": f"trl.{title}" if name.startswith("trl.") else title}
    return {"trainer": "trl."}


def completion_files(directory: Path, last_step: int) -> dict[int, Path]:
    """The tables of completions (`log_completions`) of a run, by step."""
    files = {}
    for path in sorted((directory / "completions").glob("completions_*.parquet")):
        number = path.stem.removeprefix("completions_")
        if number.isdecimal() and int(number) <= last_step:
            files[int(number)] = path
    return files
