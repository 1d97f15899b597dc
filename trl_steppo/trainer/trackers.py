"""Tables of episodes for the trackers that have tables: wandb and trackio, as TRL logs completions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from importlib import import_module

from ..learning.ranks import caught

logger = logging.getLogger(__name__)

_WITH_TABLES = ("wandb", "trackio")

_warned: set[str] = set()  # trackers that failed


def log_table(report_to: str | Sequence[str], name: str, columns: Mapping[str, Sequence[object]]) -> None:
    """
    Log a table to the run's trackers. The trackers' callbacks must have begun the run. If a tracker fails, training
    goes on, and a warning names the tracker, once.

    Args:
        report_to (`str` or `Sequence[str]`):
            The trackers, as in `TrainingArguments`.
        name (`str`):
            The table's name.
        columns (`Mapping[str, Sequence]`):
            Its columns, all of one length. What is neither a number nor text becomes text.
    """
    for library in _WITH_TABLES:
        if library in report_to:
            with caught() as found:
                _log_to(library, name, columns)
            if found.error is not None and library not in _warned:
                _warned.add(library)
                logger.warning(
                    f"the table {name!r} could not be logged to {library}: {type(found.error).__name__}: "
                    f"{found.error} (told once)"
                )


def _log_to(library: str, name: str, columns: Mapping[str, Sequence[object]]) -> None:
    import pandas

    tracker = import_module(library)
    if library == "wandb" and tracker.run is None:
        return
    plain = {column: [_plain(value) for value in values] for column, values in columns.items()}
    tracker.log({name: tracker.Table(dataframe=pandas.DataFrame(plain))})


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, int | float | str) else str(value)
