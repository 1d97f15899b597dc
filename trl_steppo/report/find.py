"""Finds runs: directories of runs, of several runs, and patterns of their names."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from ..errors import DataError
from .runs import Run, load_run, told_apart

_MARKS = ("trainer_state.json", "metrics.jsonl", "steppo_config.json")  # what a run writes to its `output_dir`
_MAX_DEPTH = 4


@dataclass(frozen=True)
class Gathered:
    """
    Runs that could be read.

    Args:
        runs (`list[Run]`):
            The runs.
        names (`dict[Path, str]`):
            Names of methods, by the resolved directories of their runs.
        notes (`list[str]`):
            Why other runs could not be read.
    """

    runs: list[Run]
    names: dict[Path, str]
    notes: list[str]


def gather(
    places: Sequence[str | Path], named: Mapping[str, Sequence[str | Path]], *, leaves_out: bool = False
) -> Gathered:
    """
    Find and read runs, and leave out those that have logged nothing yet, or are damaged.

    Args:
        places (`Sequence[str | Path]`):
            See [`find_runs`].
        named (`Mapping[str, Sequence[str | Path]]`):
            More of them, by the name of their method.
        leaves_out (`bool`, *optional*, defaults to `False`):
            Whether what was named itself may be left out. Otherwise only what was found within a place is.

    Raises:
        DataError: If none can be read, or one that was named cannot, or one is named twice.
    """
    found = {name: find_runs(members) for name, members in named.items()}
    names = {path.resolve(): name for name, paths in found.items() for path in paths}
    directories = find_runs(places)
    known = {path.resolve() for path in directories}
    directories += [path for paths in found.values() for path in paths if path.resolve() not in known]
    given = {str(Path(place)) for place in (*places, *chain(*named.values()))}
    kept: list[Run] = []
    notes: list[str] = []
    errors: list[DataError] = []
    for directory in directories:
        try:
            kept.append(load_run(directory))
        except DataError as error:
            if not leaves_out and str(directory) in given:
                raise
            errors.append(error)
            notes.append(str(error))
    if not kept and errors and not leaves_out:
        raise errors[0]
    return Gathered(told_apart(kept), names, notes)


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
