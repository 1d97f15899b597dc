"""Episodes on disk, exactly: what is loaded equals what was dumped, token for token and bit for bit.

One episode a line, as JSON. The ids that an episode's steps share are written once, as they are held in memory: a
prompt that is a prefix of them is written as its length, and a response that follows it there as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from .. import durable
from ..errors import DataError
from ..types import Episode, Step, StopReason, TokenIds


def episode_file(directory: str | Path, update: int, rank: int) -> Path:
    """Where the episodes of one update on one rank are; names sort in the order of the updates."""
    return Path(directory) / f"episodes-{update:06d}-rank{rank:03d}.jsonl"


def dump_episodes(path: str | Path, episodes: Iterable[Episode]) -> None:
    """
    Write episodes, one a line. A file that is there is complete: it appears under its name when all is written.

    What JSON lacks in `info` and `observation` is written as the nearest thing it has (tuples and sets as lists,
    anything unknown as its `repr`).
    """
    with durable.file(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
        for episode in episodes:
            file.write(json.dumps(_to_json(episode), default=_nearest) + "\n")


def load_episodes(path: str | Path) -> list[Episode]:
    """
    Read what [`dump_episodes`] wrote.

    Raises:
        DataError: there is no such file, or a line of it is damaged; names both.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read episodes from {path}: {error}") from error
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1) if line]


def _parse(line: str, path: str | Path, number: int) -> Episode:
    try:
        return _from_json(json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        reason = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}, line {number}: not a recorded episode: {reason}") from error


def _to_json(episode: Episode) -> dict[str, Any]:
    token_ids = _shared_ids(episode)
    return {
        "episode_id": episode.episode_id,
        "stream_position": episode.stream_position,
        "dataset_row": episode.dataset_row,
        "question": episode.question,
        "generation_index": episode.generation_index,
        "terminated": episode.terminated,
        "truncated": episode.truncated,
        "stop_reason": None if episode.stop_reason is None else episode.stop_reason.value,
        "error": episode.error,
        "metrics": dict(episode.metrics),
        "reset_text": episode.reset_text,
        "logged": dict(episode.logged),
        "token_ids": token_ids.tolist(),
        "final_prompt_ids": None
        if episode.final_prompt_ids is None
        else _pack(episode.final_prompt_ids, token_ids, start=0),
        "steps": [_step_to_json(step, token_ids) for step in episode.steps],
    }


def _step_to_json(step: Step, token_ids: TokenIds) -> dict[str, Any]:
    return {
        "step_index": step.step_index,
        "prompt_ids": _pack(step.prompt_ids, token_ids, start=0),
        "response_ids": _pack(step.response_ids, token_ids, start=len(step.prompt_ids)),
        "rollout_logprobs": list(step.rollout_logprobs),
        "reward": step.reward,
        "policy_version": step.policy_version,
        "temperature": step.temperature,
        "stop_reason": step.stop_reason.value,
        "observation": step.observation,
        "info": dict(step.info),
    }


def _from_json(data: Mapping[str, Any]) -> Episode:
    token_ids = TokenIds(data["token_ids"])
    final = data["final_prompt_ids"]
    return Episode(
        episode_id=data["episode_id"],
        # Recordings of older versions have the position alone, under another name.
        stream_position=data["stream_position"] if "stream_position" in data else data["row_index"],
        dataset_row=data.get("dataset_row"),
        question=data.get("question"),
        generation_index=data["generation_index"],
        steps=tuple(_step_from_json(step, token_ids) for step in data["steps"]),
        terminated=data["terminated"],
        truncated=data["truncated"],
        final_prompt_ids=None if final is None else _unpack(final, token_ids, start=0),
        error=data["error"],
        metrics=dict(data["metrics"]),
        reset_text=data.get("reset_text"),
        logged=dict(data.get("logged", {})),
        stop_reason=None if data["stop_reason"] is None else StopReason(data["stop_reason"]),
    )


def _step_from_json(data: Mapping[str, Any], token_ids: TokenIds) -> Step:
    prompt_ids = _unpack(data["prompt_ids"], token_ids, start=0)
    info = dict(data["info"])
    if "state_key" in info:
        info["state_key"] = _hashable(info["state_key"])
    return Step(
        prompt_ids=prompt_ids,
        response_ids=_unpack(data["response_ids"], token_ids, start=len(prompt_ids)),
        rollout_logprobs=tuple(data["rollout_logprobs"]),
        reward=data["reward"],
        step_index=data["step_index"],
        policy_version=data["policy_version"],
        temperature=data["temperature"],
        stop_reason=StopReason(data["stop_reason"]),
        observation=data["observation"],
        info=info,
    )


def _shared_ids(episode: Episode) -> TokenIds:
    """The longest sequence in the episode; of an append-only one all others are parts."""
    candidates = [episode.final_prompt_ids or TokenIds()]
    if episode.steps:
        longest = max(episode.steps, key=lambda step: len(step.prompt_ids) + len(step.response_ids))
        candidates.append(TokenIds([*longest.prompt_ids, *longest.response_ids]))
    return max(candidates, key=len)


def _pack(ids: TokenIds, token_ids: TokenIds, *, start: int) -> int | list[int]:
    """The length of `ids` where they are what `token_ids` has from `start` on; else the ids themselves."""
    return len(ids) if token_ids[start : start + len(ids)] == ids else ids.tolist()


def _unpack(packed: int | Sequence[int], token_ids: TokenIds, *, start: int) -> TokenIds:
    if not isinstance(packed, int):
        return TokenIds(packed)
    if start + packed > len(token_ids):
        raise ValueError(f"ids {start} to {start + packed} of {len(token_ids)} `token_ids`")
    return token_ids[start : start + packed]


def _nearest(value: Any) -> Any:
    if isinstance(value, Set):
        return sorted(value, key=repr)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # NumPy and torch, scalars included
        return value.tolist()
    return repr(value)


def _hashable(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _hashable(item)) for key, item in value.items()))
    return value
