"""Runs -> one HTML file: curves, final figures, and a viewer for the episodes that the runs logged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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
            The `output_dir` of each run; directories that hold runs, as of `trl-steppo compare`; or patterns of
            such names. Runs that differ only in their seed are one method. A run in such a directory that has not
            logged an update yet is left out, and named in the report.
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
    with _needing_the_extra():
        from .page import write_page
    return write_page(directories, Path(output), methods or {})


def serve_report(
    directories: Sequence[str | Path],
    *,
    methods: Mapping[str, Sequence[str | Path]] | None = None,
    port: int | None = None,
) -> None:
    """
    Serve a report to browsers on this machine, until Ctrl-C. The page renews itself when its runs log something new.

    Args:
        directories (`Sequence[str | Path]`), methods (`Mapping[str, Sequence[str | Path]]`, *optional*):
            As in [`write_report`]. None of them has to exist yet.
        port (`int`, *optional*):
            The port; 0 takes a free one. `None`: 8642, or, if that is taken, a free one.

    Raises:
        ConfigurationError: If the extra `report` is not installed, or the port is taken.
    """
    with _needing_the_extra():
        from .live import LivePage, LiveServer
    server = LiveServer(LivePage(directories, methods or {}), port)
    with server, suppress(KeyboardInterrupt):
        print(f"live at {server.url} (Ctrl-C ends it)", flush=True)
        server.serve_forever(poll_interval=0.1)


@contextmanager
def _needing_the_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ConfigurationError(
            f"a report needs the extra `report`: {install_command('report')} ({error})"
        ) from error
