"""Runs -> one HTML file: curves, final figures, and a viewer for the episodes that the runs logged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import ConfigurationError


def write_report(directories: Sequence[str | Path], output: str | Path = "report.html") -> list[Path]:
    """
    Write a report of runs as one HTML file that loads nothing, and its plots as PNGs beside it.

    Args:
        directories (`Sequence[str | Path]`):
            The `output_dir` of each run. Runs that differ in their seed alone are taken as one method; one that was
            stopped is read up to its last checkpoint.
        output (`str | Path`, *optional*, defaults to `"report.html"`):
            The HTML file; its name is the beginning of the PNGs' names.

    Returns:
        `list[Path]`: What was written, the HTML file first.

    Raises:
        DataError: If a directory holds no run that logged an update.
        ConfigurationError: If the extra `report` is not installed.
    """
    try:
        from .page import write_page
    except ImportError as error:
        raise ConfigurationError(
            f'a report needs the extra `report`: pip install "trl_steppo[report]" ({error})'
        ) from error
    return write_page(directories, Path(output))
