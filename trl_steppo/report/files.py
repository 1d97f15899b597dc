"""Reads the files that runs of transformers' trainers write, without running code from them."""

from __future__ import annotations

import io
import json
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import cast
from urllib.parse import unquote

from ..errors import DataError
from ..types import JsonObject

FOLDERS_OF_LOGS = ("episodes", "completions")
"""In `output_dir`: where this package's trainers log episodes, and where TRL's do."""

_PLAIN = (str, int, float, bool, type(None))


def read_json(file: Path) -> JsonObject:
    """The mapping in a JSON file."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{file} holds a {type(content).__name__}; a run writes a mapping there")
    return content


def read_lines(file: Path) -> list[JsonObject]:
    """The mappings in a file of one JSON object a line. A last line that is still being written is left out."""
    try:
        lines = file.read_bytes().split(b"\n")[:-1]
        return [cast(JsonObject, json.loads(line)) for line in lines]
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def episode_logs(folder: Path, last_update: float = math.inf) -> dict[tuple[int, str], Path]:
    """
    The logs of episodes in a folder.

    Args:
        folder (`Path`):
            One of a run's `FOLDERS_OF_LOGS`.
        last_update (`float`, *optional*, defaults to no limit):
            The last update of the run. An earlier run in the same directory may have left further files.

    Returns:
        `dict[tuple[int, str], Path]`: By update and part: `""` for what was trained on, `"evaluation"` for the
        evaluation after the update, or `"evaluation NAME"` where there are several datasets.
    """
    logs = {}
    for path in sorted(folder.glob("*.parquet")):
        if found := re.fullmatch(r"(update|completions|evaluation)_(\d+)(?:_(.*))?", path.stem):
            kind, number, name = found[1], int(found[2]), found[3]
            part = f"evaluation {unquote(name or '')}".strip() if kind == "evaluation" else ""
            if number <= last_update and (part or not name):
                logs[number, part] = path
    return logs


def last_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint in a run's directory that has a state, if there is one."""
    paths = [path.parent for path in directory.glob("checkpoint-*/trainer_state.json")]
    numbered = {int(number): path for path in paths if (number := path.name.removeprefix("checkpoint-")).isdecimal()}
    return numbered[max(numbered)] if numbered else None


def read_arguments(file: Path) -> tuple[str, JsonObject] | None:
    """
    The name of the class and the plain values of pickled training arguments (`training_args.bin`).

    The file is a pickle, which could run any code. Here every class in it is replaced by one that only holds values.

    Returns:
        `tuple[str, dict]`: The class as "module.Name", and its values: numbers, texts, enumerations by their values,
        lists and mappings of these. `None` if the file is not there, or cannot be read.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            loaded = _Unpickler(io.BytesIO(archive.read(name))).load()
    except (OSError, ValueError, StopIteration, zipfile.BadZipFile, pickle.UnpicklingError, EOFError, AttributeError):
        return None
    if not isinstance(loaded, _Held):
        return None
    values = {name: _plain(value) for name, value in vars(loaded).items() if not name.startswith("_")}
    return f"{type(loaded).__module__}.{type(loaded).__name__}", values


class _Held:
    """Stands for an object of any class: it holds the arguments and the state that it was pickled with."""

    def __new__(cls, *arguments: object, **_: object) -> _Held:
        held = object.__new__(cls)
        vars(held)["_arguments"] = arguments
        return held

    def __init__(self, *_: object, **__: object) -> None: ...

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            vars(self).update(state)

    def __call__(self, *arguments: object) -> _Held:
        return type(self)(*arguments)


class _Unpickler(pickle.Unpickler):
    """Loads no class and calls no function of a pickle."""

    def find_class(self, module: str, name: str) -> type[_Held]:
        return type(name, (_Held,), {"__module__": module})

    def persistent_load(self, pid: object) -> None:
        """Tensors are not read."""


def _plain(value: object) -> object:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, _Held):
        arguments = vars(value)["_arguments"]
        return arguments[0] if len(arguments) == 1 and isinstance(arguments[0], _PLAIN) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return None
