"""Finds runs: directories of runs, of several runs, and patterns of their names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import DataError
from .runs import load_runs

_MARKS = ("trainer_state.json", "metrics.jsonl", "steppo_config.json")  # what a run writes to its `output_dir`
_MAX_DEPTH = 4


def find_runs(places: Sequence[str | Path]) -> list[Path]:
    """
    The runs in some places, in their order.

    Args:
        places (`Sequence[str | Path]`):
            Each is the `output_dir` of a run; or a directory that holds runs, at any of four levels; or a pattern of
            such names (`runs/*/seed_1`). What does not exist, or holds no run, is returned as it is.
    """
    found: dict[Path, None] = {}
    for place in map(str, places):
        paths = [Path(path) for path in sorted(glob.glob(place))] if glob.has_magic(place) else [Path(place)]
        for path in paths:
            found.update(dict.fromkeys(list(_runs_in(path, _MAX_DEPTH)) or [path]))
    return list(found)


def readable_runs(directories: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The runs that can be read, and why the others cannot: they have logged nothing yet, or are damaged."""
    readable, reasons = [], []
    for directory in directories:
        try:
            load_runs([directory])
            readable.append(directory)
        except DataError as error:
            reasons.append(str(error))
    return readable, reasons


def _runs_in(directory: Path, depth: int) -> Iterator[Path]:
    if is_run(directory):
        yield directory
    elif depth and directory.is_dir():
        for entry in sorted(os.scandir(directory), key=lambda entry: _natural(entry.name)):
            if entry.is_dir() and not entry.name.startswith("."):
                yield from _runs_in(Path(entry.path), depth - 1)


def is_run(directory: Path) -> bool:
    """Whether a run has written to a directory."""
    if any((directory / name).is_file() for name in _MARKS):
        return True
    return any(directory.glob("checkpoint-*/trainer_state.json"))


def _natural(name: str) -> list[tuple[int, str]]:
    """A sort key by which `seed_2` is before `seed_10`."""
    parts = "".join(char if char.isdigit() else f" {char} " for char in name).split()
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]
