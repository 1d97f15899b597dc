"""Episodes on disk, exactly: what is loaded equals what was dumped, token for token and bit for bit.

A file has one episode on each line, in the form of [`episodes.json`].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Set
from pathlib import Path

from .. import durable
from ..episodes.json import episode_from_json, episode_to_json
from ..errors import DataError
from ..types import Episode


def episode_file(directory: str | Path, update: int, rank: int) -> Path:
    """File of the episodes of one update on one rank. Names sort in the order of the updates."""
    return Path(directory) / f"episodes-{update:06d}-rank{rank:03d}.jsonl"


def dump_episodes(path: str | Path, episodes: Iterable[Episode]) -> None:
    """
    Write episodes, one on each line. A file that exists is complete: it appears under its name when all is written.

    What JSON lacks in `info` and `observation` is written as the nearest thing it has (tuples and sets as lists,
    anything unknown as its `repr`).
    """
    with durable.file(Path(path)) as partial, partial.open("w", encoding="utf-8") as file:
        for episode in episodes:
            file.write(json.dumps(episode_to_json(episode), default=_nearest) + "\n")


def load_episodes(path: str | Path) -> list[Episode]:
    """
    Read the episodes that [`dump_episodes`] wrote.

    Raises:
        DataError: There is no such file, or a line of it is damaged; the message names both.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read episodes from {path}: {error}") from error
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1) if line]


def _parse(line: str, path: str | Path, number: int) -> Episode:
    try:
        return episode_from_json(json.loads(line))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        reason = f"`{error.args[0]}` is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}, line {number}: not a recorded episode: {reason}") from error


def _nearest(value: object) -> object:
    """The nearest thing that JSON has."""
    if isinstance(value, Set):
        return sorted(value, key=repr)
    if isinstance(value, Mapping):
        return dict(value)
    if hasattr(value, "tolist"):  # NumPy and torch, scalars included
        return value.tolist()
    return repr(value)
