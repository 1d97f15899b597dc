"""Finished runs as directories, without any training: curves drawn from a formula, episodes made by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from trl_steppo.report.runs import Run, load_runs
from trl_steppo.trainer.episode_log import SCHEMA

SETTINGS: dict[str, Any] = {
    "advantage_estimator": "step_gae",
    "importance_sampling_level": "step",
    "gamma": 0.99,
    "log_episodes": 4,
}
EVIL = "</script><script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\"> & \u2028"
TOKEN_PPO: dict[str, Any] = {"advantage_estimator": "token_gae", "importance_sampling_level": "token"}


def write_run(
    directory: Path,
    *,
    seed: int = 1,
    updates: int = 6,
    episodes: int = 4,
    logged_updates: int | None = None,
    texts: dict[str, str] | None = None,
    evaluated: bool = False,
    without_settings: bool = False,
    **settings: Any,
) -> Path:
    """A run whose exact match grows by 0.1 an update; `texts` replaces what its first episode's first step says."""
    directory.mkdir(parents=True)
    generator = random.Random(seed)
    (directory / "trainer_state.json").write_text(json.dumps({"log_history": _history(updates, generator)}))
    if not without_settings:
        own = {**SETTINGS, "seed": seed, "output_dir": str(directory), "log_episodes": episodes, **settings}
        (directory / "steppo_config.json").write_text(json.dumps(own))
    for update in range(1, (logged_updates or updates) + 1) if episodes else ():
        path = directory / "episodes" / f"update_{update:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        rows = [row for i in range(episodes) for row in _episode(update, i, episodes, generator)]
        if update == 1:
            rows[0] |= texts or {}
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    if evaluated:
        rows = [row for i in range(2) for row in _episode(updates, i, 2, generator)]
        rows = [{**row, "advantage": None, "value": None, "agent_output": "done\n"} for row in rows]
        path = directory / "episodes" / f"evaluation_{updates:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)
    return directory


def read_run(directory: Path, **settings: Any) -> Run:
    return load_runs([write_run(directory, **settings)])[0]


def _history(updates: int, generator: random.Random) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = []
    for step in range(1, updates + 1):
        score = 0.1 * step + 0.01 * generator.random()
        history.append(
            {
                "step": step,
                "episode": 8 * step,
                "env/exact_match": score,
                "env/reward": score,
                "env/episode_steps": 3.0,
                "rollout/episode_response_tokens": 40.0,
                "critic/explained_variance": score / 2,
                "critic/explained_variance/step_0": score / 3,
                "critic/explained_variance/step_1": score / 4,
                "loss/policy_avg": float("nan") if step == 2 else 0.1,
                "loss/value_avg": 1.0 - score,
                "policy/clipfrac_avg": 0.05,
                "val/ratio": 1.0,
                "perf/rollout_s": 2.0,
                "perf/forward_s": 0.5,
                "perf/train_s": 1.0,
                "perf/update_s": 4.0,
                "perf/tokens_per_s": 100.0,
            }
        )
    history.append({"step": updates, "eval_exact_match": score, "eval_reward": score})
    return history


def _episode(update: int, position: int, episodes: int, generator: random.Random) -> list[dict[str, Any]]:
    """Of two steps; right, wrong, right, ... and every fourth failed before its first."""
    row = (update - 1) * episodes + position
    failed = position % 4 == 3
    right = position % 2 == 0
    shared = {
        "update": update,
        "episode_id": f"{update - 1}/{row}-0",
        "stream_position": row,
        "dataset_row": row,
        "generation_index": 0,
        "terminated": not failed,
        "truncated": False,
        "stop_reason": "error" if failed else "environment",
        "error": "OSError: broken" if failed else None,
        "score": None if failed else float(right),
        "metrics": json.dumps({} if failed else {"exact_match": float(right)}),
    }
    if failed:
        return [shared]
    rows = []
    for index in range(2):
        old = [-generator.random() for _ in range(4)]
        rows.append(
            shared
            | {
                "step_index": index,
                "prompt": f"Answer the question.\nWhat is number {row}?\nAnswer:" if index == 0 else "seen",
                "prompt_tokens": 20 + 10 * index,
                "prompt_kept_tokens": 20 * index,
                "response": "look it up",
                "observation": f"page {row}",
                "tokens": ["look", " it", " u", "p"],
                "response_stop_reason": "stop",
                "reward": float(right and index == 1),
                "rollout_logprobs": old,
                "old_logprobs": old,
                "new_logprobs": [value + 0.1 * generator.gauss(0, 1) for value in old],
                "token_advantages": [1.0] * 4,
                "value": 0.5,
                "return": 0.9,
                "raw_advantage": 0.4,
                "advantage": generator.gauss(0, 1),
                "clipped_fraction": 0.25,
            }
        )
    return rows
