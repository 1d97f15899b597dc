"""Tables of episodes for the trackers that have tables: wandb and trackio, as TRL logs completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module

_WITH_TABLES = ("wandb", "trackio")


def log_table(report_to: str | Sequence[str], name: str, columns: Mapping[str, Sequence[object]]) -> None:
    """
    Log a table to the run's trackers. The trackers' callbacks must have begun the run.

    Args:
        report_to (`str` or `Sequence[str]`):
            The trackers, as in `TrainingArguments`.
        name (`str`):
            The table's name.
        columns (`Mapping[str, Sequence]`):
            Its columns, all of one length. What is neither a number nor text becomes text.
    """
    chosen = [library for library in _WITH_TABLES if library in report_to]
    if not chosen:
        return
    import pandas

    plain = {column: [_plain(value) for value in values] for column, values in columns.items()}
    for library in chosen:
        tracker = import_module(library)
        if library != "wandb" or tracker.run is not None:
            tracker.log({name: tracker.Table(dataframe=pandas.DataFrame(plain))})


def _plain(value: object) -> object:
    return value if value is None or isinstance(value, int | float | str) else str(value)
