"""How far a run is, from what it has written."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from ..report.files import last_checkpoint, read_json
from ..types import JsonObject

_TAIL_BYTES = 65_536  # of the log, which hold its last lines
_REWARDS = ("env/reward", "reward", "objective/scores")  # the first one that a run logs


@dataclass(frozen=True)
class Progress:
    """The last update that a run logged, and its mean reward (`None`: it logs none)."""

    update: int
    reward: float | None


def progress_of(output_dir: Path) -> Progress | None:
    """The progress of a run, finished or not; `None` before its first log."""
    for logs in reversed(_last_logs(output_dir)):
        update = logs.get("step")
        reward = next((logs[name] for name in _REWARDS if name in logs), None)
        if isinstance(update, int) and isinstance(reward, int | float):
            return Progress(update, float(reward))
    return None


def _last_logs(output_dir: Path) -> list[JsonObject]:
    lines = _last_lines(output_dir / "metrics.jsonl")
    if lines:
        return [logs for logs in map(_parsed, lines) if logs]
    # Other trainers write nothing before the end, besides their checkpoints, which they also delete.
    checkpoint = last_checkpoint(output_dir)
    for place in (output_dir, *(() if checkpoint is None else (checkpoint,))):
        try:
            history: list[JsonObject] = read_json(place / "trainer_state.json").get("log_history") or []
        except DataError:
            continue
        return history
    return []


def _last_lines(file: Path) -> list[str]:
    try:
        with file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - _TAIL_BYTES))
            return opened.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _parsed(text: str) -> JsonObject:
    """A JSON object; an empty one if the text is none, as a line that is being written."""
    try:
        content = json.loads(text)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}
