"""The logged episodes of runs, as many as a page may hold, as the viewer reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from ..errors import DataError
from ..types import num_shared
from .methods import Method
from .runs import Run

T = TypeVar("T")

_LONGEST_TEXT = 6_000  # characters of one prompt, response or observation
_MOST_TOKENS = 400  # of one response
_LONGEST_TITLE = 160
_COLUMNS = (  # that are read; the log has more
    *("update", "episode_id", "stream_position", "dataset_row", "generation_index", "truncated", "stop_reason"),
    "error",
    *("score", "metrics", "step_index", "prompt", "prompt_tokens", "prompt_kept_tokens", "response", "observation"),
    *("response_stop_reason", "reward", "tokens", "rollout_logprobs", "old_logprobs", "new_logprobs", "value"),
    *("return", "raw_advantage", "advantage", "clipped_fraction"),
)


_OLD_NAMES = {"stream_position": "row_index"}  # of columns, in logs of older versions


@dataclass
class Sample:
    """
    What a page holds of the logged episodes.

    Args:
        episodes (`list[dict]`):
            As the viewer reads them.
        questions (`list[str]`):
            A title for each; an episode's `question` counts them.
        num_logged (`int`):
            How many the runs have logged.
        num_shortened (`int`):
            Texts that are shown without their middle.
        unreadable (`list[str]`):
            What was left out because its file cannot be read, and why.
    """

    episodes: list[dict[str, Any]] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    num_logged: int = 0
    num_shortened: int = 0
    unreadable: list[str] = field(default_factory=list)


def sample_episodes(methods: Sequence[Method], max_bytes: int) -> Sample:
    """
    Read logged episodes until the budget is spent: of the first and the last update, then of those halfway between,
    and so on; of one update, question by question, of all runs that have it, so that they can be compared.

    Args:
        methods (`Sequence[Method]`):
            Whose runs' episodes.
        max_bytes (`int`):
            Most bytes they may take in the page.

    Returns:
        [`Sample`]: A file that is no log of episodes, or is damaged, is left out and named in it.
    """
    sample = Sample()
    numbers: dict[tuple[Any, str], int] = {}
    prompts: list[str] = []
    spent = 0
    is_full = False
    runs = [(index, run) for index, method in enumerate(methods) for run in method.runs]
    for update in _spread(sorted({update for _, run in runs for update in run.episode_files})):
        files = [(index, run, run.episode_files[update]) for index, run in runs if update in run.episode_files]
        if is_full:
            sample.num_logged += sum(_readable(_num_episodes, file, sample) or 0 for _, _, file in files)
            continue
        found = [(index, run, rows) for index, run, file in files for rows in _readable(_episodes, file, sample) or []]
        sample.num_logged += len(found)
        positions: dict[tuple[Any, str], int] = {}
        for _, _, rows in found:
            positions.setdefault(_question(rows), len(positions))
        for index, run, rows in sorted(found, key=lambda entry: positions[_question(entry[2])]):
            key = _question(rows)
            episode, num_shortened = _for_viewer(index, run, rows, numbers.setdefault(key, len(numbers)))
            size = len(embedded_json(episode).encode())
            is_full = spent + size > max_bytes
            if is_full:
                break
            spent += size
            sample.episodes.append(episode)
            sample.num_shortened += num_shortened
            if len(prompts) < len(numbers):
                prompts.append(rows[0]["prompt"] or "")
    sample.questions = _titles(prompts)
    sample.episodes.sort(
        key=lambda episode: (episode["update"], episode["position"], episode["method"], episode["id"])
    )
    return sample


def embedded_json(content: Any) -> Markup:
    """JSON that no browser takes for markup, whatever is in it."""
    return htmlsafe_json_dumps(content, dumps=json.dumps, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def outcome(episode: dict[str, Any], metrics: dict[str, float]) -> str:
    """
    `failed` where something broke; else `right` where the exact match (or `success`) is 1, or, in environments that
    score neither, where the score is above 0.
    """
    if episode["error"] is not None:
        return "failed"
    for name in ("exact_match", "success"):
        if name in metrics:
            return "right" if metrics[name] >= 1.0 else "wrong"
    return "right" if episode["score"] > 0.0 else "wrong"


def _readable(read: Callable[[Path], T], file: Path, sample: Sample) -> T | None:
    """What a file holds; of one that cannot be read, a line in the sample: the others are worth a report."""
    try:
        return read(file)
    except DataError as error:
        sample.unreadable.append(str(error))
        return None


def _episodes(path: Path) -> list[list[dict[str, Any]]]:
    """The rows of each episode in a file."""
    by_id: dict[str, list[dict[str, Any]]] = {}
    for row in _read(path, _COLUMNS).to_pylist():
        by_id.setdefault(row["episode_id"], []).append(row | {"metrics": _metrics(path, row)})
    return list(by_id.values())


def _metrics(path: Path, row: dict[str, Any]) -> dict[str, float]:
    try:
        metrics: dict[str, float] = json.loads(row["metrics"])
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no log of episodes: the metrics of {row['episode_id']} are no JSON ({error})"
        ) from error
    return metrics


def _num_episodes(path: Path) -> int:
    return len(_read(path, ["episode_id"])["episode_id"].unique())


def _read(path: Path, columns: Sequence[str]) -> pa.Table:
    try:
        names = set(pq.read_schema(path).names)
        stored = {name: name if name in names else _OLD_NAMES.get(name, name) for name in columns}
        missing = sorted(name for name, column in stored.items() if column not in names)
        if not missing:
            found = list(stored.values())
            return pq.read_table(path, columns=found).select(found).rename_columns(list(stored))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is no log of episodes: {error}") from error
    raise DataError(f"{path} is no log of episodes: it has no column {', '.join(missing)}")


def _question(rows: Sequence[dict[str, Any]]) -> tuple[Any, str]:
    """The same for episodes of one dataset row under one prompt; a failed episode may have no prompt."""
    return rows[0]["dataset_row"], rows[0]["prompt"] or ""


def _spread(updates: Sequence[int]) -> list[int]:
    """First, last, then halfway between those that are there already."""
    order: dict[int, None] = dict.fromkeys([*updates[:1], *updates[-1:]])
    parts = 2
    while len(order) < len(updates):
        for part in range(1, parts, 2):
            order.setdefault(updates[(len(updates) - 1) * part // parts])
        parts *= 2
        if parts > 4 * len(updates):
            order.update(dict.fromkeys(updates))
    return list(order)


def _for_viewer(method: int, run: Run, rows: Sequence[dict[str, Any]], question: int) -> tuple[dict[str, Any], int]:
    first = rows[0]
    metrics = first["metrics"]
    shortened = [0]

    def text(value: str | None) -> str:
        if value is None or len(value) <= _LONGEST_TEXT:
            return value or ""
        shortened[0] += 1
        half = _LONGEST_TEXT // 2
        return f"{value[:half]}\n… {len(value) - 2 * half:,} characters left out …\n{value[-half:]}"

    steps = [
        {
            "index": row["step_index"],
            "prompt": text(row["prompt"]),
            "promptTokens": row["prompt_tokens"],
            "kept": row["prompt_kept_tokens"],
            "response": text(row["response"]),
            "observation": text(row["observation"]),
            "stop": row["response_stop_reason"],
            "reward": _short(row["reward"]),
            "value": _short(row["value"]),
            "return": _short(row["return"]),
            "raw": _short(row["raw_advantage"]),
            "advantage": _short(row["advantage"]),
            "clipped": _short(row["clipped_fraction"]),
            "numTokens": len(row["tokens"]),
            "tokens": row["tokens"][:_MOST_TOKENS],
            "logRatio": _log_ratios(row["new_logprobs"], row["old_logprobs"])[:_MOST_TOKENS],
            "meanLogRatio": _mean(_log_ratios(row["new_logprobs"], row["old_logprobs"])),
            "rolloutGap": _mean(_log_ratios(row["old_logprobs"], row["rollout_logprobs"])),
        }
        for row in rows
        if row["step_index"] is not None
    ]
    episode = {
        "method": method,
        "run": run.name,
        "seed": run.seed,
        "update": first["update"],
        "id": first["episode_id"],
        "position": first["stream_position"],
        "datasetRow": first["dataset_row"],
        "generation": first["generation_index"],
        "question": question,
        "outcome": outcome(first, metrics),
        "score": _short(first["score"]),
        "stop": first["stop_reason"],
        "truncated": first["truncated"],
        "error": None if first["error"] is None else text(first["error"]),
        "metrics": {name: _short(value) for name, value in metrics.items()},
        "steps": steps,
    }
    return episode, shortened[0]


def _log_ratios(new: Sequence[float] | None, old: Sequence[float] | None) -> list[float | None]:
    if new is None or old is None:
        return []
    return [_short(a - b, digits=3) for a, b in zip(new, old, strict=True)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _short(sum(known) / len(known)) if known else None


def _short(value: float | None, digits: int = 4) -> float | None:
    """As many digits as anybody reads; `None` for what is not a number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{digits}g}")


def _common_start(texts: Sequence[str]) -> str:
    first, last = min(texts), max(texts)  # all others stand between them
    return first[: num_shared(first, last)]


def _titles(prompts: Sequence[str]) -> list[str]:
    """What tells prompts apart: without what all of them begin and end with, the system message for one."""
    told_apart = [prompt for prompt in prompts if prompt]
    before = _common_start(told_apart) if len(set(told_apart)) > 1 else ""
    after = _common_start([prompt[len(before) :][::-1] for prompt in told_apart]) if before else ""
    # Whole lines and special tokens, not the words that questions happen to begin or end with.
    start = max((i + 1 for i, char in enumerate(before) if char in "\n>"), default=0)
    end = max((i + 1 for i, char in enumerate(after) if char in "\n<"), default=0)
    titles = []
    for prompt in prompts:
        title = " ".join(prompt[start : len(prompt) - end].split())
        if not start:  # nothing to go by but its end, where the question usually stands
            title = title[-_LONGEST_TITLE:]
        titles.append(title[:_LONGEST_TITLE] or "(failed before its first prompt)")
    return titles
