"""Runs -> one HTML file: curves, final figures, and a viewer for the episodes that the runs logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..errors import ConfigurationError
from ..extras import install_command


def write_report(
    directories: Sequence[str | Path],
    output: str | Path = "report.html",
    *,
    methods: Mapping[str, Sequence[str | Path]] | None = None,
) -> list[Path]:
    """
    Write a report of runs as one self-contained HTML file, and its plots as PNGs in the same directory.

    Args:
        directories (`Sequence[str | Path]`):
            The `output_dir` of each run. Runs that differ only in their seed are one method. An unfinished run is read
            up to its last checkpoint.
        output (`str | Path`, *optional*, defaults to `"report.html"`):
            The HTML file. The PNGs' names begin with its name.
        methods (`Mapping[str, Sequence[str | Path]]`, *optional*):
            The `output_dir`s of runs by the name of their method, for runs that their settings would name or group
            otherwise. These need not be in `directories`.

    Returns:
        `list[Path]`: The written files, the HTML file first.

    Raises:
        DataError: If a directory does not hold a run that logged an update.
        ConfigurationError: If the extra `report` is not installed.
    """
    try:
        from .page import write_page
    except ImportError as error:
        raise ConfigurationError(
            f"a report needs the extra `report`: {install_command('report')} ({error})"
        ) from error
    return write_page(directories, Path(output), methods or {})
