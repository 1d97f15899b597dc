"""Objects that a command line names: `file.py:NAME` or `package.module:NAME`."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Literal

from ..calls import error_text, users_place
from ..errors import ConfigurationError, DataError
from ..types import Row

Kind = Literal["environment", "tool", "agent"]

_AGENT_KEYWORDS = {"base_url", "api_key"}


def is_object_name(text: str) -> bool:
    """Whether a text names an object of a file or a module."""
    place, colon, name = text.rpartition(":")
    return bool(colon and place and name.isidentifier()) and "/" not in name


def load_object(text: str) -> object:
    """
    Load the object that a text names.

    Args:
        text (`str`):
            `file.py:NAME`, or `package.module:NAME`, which is looked for in the working directory, too.

    Raises:
        ConfigurationError: There is no such file, module or name, or loading it raised an error.
    """
    place, _, name = text.rpartition(":")
    module = _load_file(Path(place)) if place.endswith(".py") else _load_module(place)
    if not hasattr(module, name):
        names = ", ".join(_own_names(module)) or "nothing"
        raise ConfigurationError(f"{place} has no `{name}`; it defines {names}")
    loaded: object = getattr(module, name)
    return loaded


def _load_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ConfigurationError(f"there is no file {path}; give its path, as seen from {Path.cwd()}")
    if known := sys.modules.get(path.stem):
        return _same(known, path)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    loader = spec.loader
    assert loader is not None
    _first_in_path(str(path.parent.resolve()))  # what the file imports from its own directory
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses and pickle look it up there

    def load() -> ModuleType:
        try:
            loader.exec_module(module)
        except BaseException:
            sys.modules.pop(path.stem, None)
            raise
        return module

    return _loaded(str(path), load)


def _same(known: ModuleType, path: Path) -> ModuleType:
    """A module that is loaded already, if it is that of the file. Another one is in use, and must not be replaced."""
    file = getattr(known, "__file__", None)
    if file is not None and Path(file).resolve() == path.resolve():
        return known
    raise ConfigurationError(
        f"{path} has the name of a module that is loaded already, `{path.stem}` ({file or 'built into Python'}); "
        "rename your file"
    )


def _load_module(name: str) -> ModuleType:
    _first_in_path(str(Path.cwd()))
    return _loaded(name, lambda: importlib.import_module(name))


def _first_in_path(directory: str) -> None:
    if directory not in sys.path:
        sys.path.insert(0, directory)


def _loaded(what: str, load: Callable[[], ModuleType]) -> ModuleType:
    try:
        return load()
    except (Exception, SystemExit) as error:
        place = users_place(error)
        raise ConfigurationError(
            f"{what} cannot be loaded: {type(error).__name__}: {error_text(error)}{f' ({place})' if place else ''}. A "
            "script that trains when it is loaded needs `if __name__ == '__main__':`"
        ) from error


def _own_names(module: ModuleType) -> list[str]:
    """The classes and functions that a module defines itself."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    ]


def kind_of(thing: object) -> Kind:
    """
    What an object is to a trainer: an agent takes `base_url` and `api_key`; a class, and a function without parameters
    and without a docstring, makes environments; any other function is a tool.

    Raises:
        ConfigurationError: It is none of these.
    """
    if inspect.isclass(thing):
        return "environment"
    if not callable(thing):
        raise ConfigurationError(
            f"{thing!r:.100} is a {type(thing).__name__}; name an environment's class, a tool, or an agent's function"
        )
    try:
        parameters = inspect.signature(thing).parameters
    except (TypeError, ValueError):
        return "tool"
    if set(parameters) >= _AGENT_KEYWORDS:
        return "agent"
    needed = [parameter for parameter in parameters.values() if parameter.default is parameter.empty]
    return "environment" if not needed and not inspect.getdoc(thing) else "tool"


# -- rows -------------------------------------------------------------------------------------------------------------


def parse_row(text: str) -> Row:
    """A row of a dataset, from JSON. Raises a `DataError` if it is none."""
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(f"`--row` is {text!r:.200}, which is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f'`--row` is {text!r:.200}; give an object of columns, as in \'{{"prompt": "..."}}\'')
    return row


def load_rows(name: str, count: int) -> list[Row]:
    """
    The first rows of a dataset.

    Args:
        name (`str`):
            A .json, .jsonl, .csv or .parquet file; or `file.py:NAME`, rows or a function that returns them.
        count (`int`):
            How many.

    Raises:
        DataError: The file cannot be read, or has no rows.
    """
    if is_object_name(name):
        rows = load_object(name)
        rows = rows() if callable(rows) else rows
    else:
        rows = _rows_of_file(Path(name), count)
    if isinstance(rows, Mapping) or not hasattr(rows, "__iter__"):
        raise DataError(f"{name} is a {type(rows).__name__}; a dataset is a sequence of rows")
    first = [dict(row) for row in islice(rows, count)]
    if not first:
        raise DataError(f"{name} has no rows")
    return list(first)


def _rows_of_file(path: Path, count: int) -> Sequence[Row]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            batches = pq.ParquetFile(path).iter_batches(batch_size=count)
            rows: Sequence[Row] = next(batches).to_pylist()
            return rows
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                return list(islice(csv.DictReader(file), count))
            if path.suffix == ".jsonl":
                return [json.loads(line) for line in islice(filter(str.strip, file), count)]
            if path.suffix == ".json":
                content: Sequence[Row] = json.load(file)
                return content
    except (OSError, ValueError, StopIteration) as error:
        raise DataError(f"cannot read rows from {path}: {error}") from error
    raise DataError(f"{path} is not a dataset that can be read here; give a .json, .jsonl, .csv or .parquet file")
