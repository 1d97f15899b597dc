"""Serves a report that renews itself while its runs go on, to browsers on this machine."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ..errors import ConfigurationError
from .find import find_runs, gather
from .page import content_of, page_of, waiting_page

HOST = "127.0.0.1"
_PORT = 8642  # if it is free
_FILES = (
    *("trainer_state.json", "steppo_config.json", "metrics.jsonl", "checkpoint-*/trainer_state.json"),
    *("episodes/*.parquet", "completions/*.parquet"),
)


class LivePage:
    """
    The page of some runs, made again when it is asked for and their files have changed.

    Args:
        places (`Sequence[str | Path]`):
            As in [`write_report`][trl_steppo.report.write_report]. Runs that appear in them later are taken up.
        named (`Mapping[str, Sequence[str | Path]]`):
            Runs by the name of their method.
        look_interval_s (`float`, *optional*, defaults to `2.0`):
            Time between two looks at the files.
        rest (`float`, *optional*, defaults to `4.0`):
            After a page was made, so many times as long passes before the next look: the machine trains, too.
    """

    def __init__(
        self,
        places: Sequence[str | Path],
        named: Mapping[str, Sequence[str | Path]],
        *,
        look_interval_s: float = 2.0,
        rest: float = 4.0,
    ) -> None:
        self._places = list(places)
        self._named = dict(named)
        self._look_interval_s = look_interval_s
        self._rest = rest
        self._lock = threading.Lock()
        self._looks_at = 0.0
        self._version = ""
        self._made: tuple[str, str] | None = None  # the last page, and the version of the files that it shows

    def version(self) -> str:
        """Of the runs' files, as of the last look at them."""
        with self._lock:
            return self._look()

    def html(self) -> str:
        """The page as the files are now. Files that cannot be read, as they are being written, are left out."""
        with self._lock:
            version = self._look()
            if self._made is None or self._made[0] != version:
                start = time.monotonic()
                self._made = (version, self._made_or_last(version))
                self._looks_at = time.monotonic() + max(self._look_interval_s, self._rest * (time.monotonic() - start))
            return self._made[1]

    def _look(self) -> str:
        if time.monotonic() >= self._looks_at:
            self._version = _version_of(self._directories())
            self._looks_at = time.monotonic() + self._look_interval_s
        return self._version

    def _directories(self) -> list[Path]:
        named = [place for members in self._named.values() for place in members]
        return find_runs([*self._places, *named])

    def _made_or_last(self, version: str) -> str:
        """The page; the last one where it cannot be made, as a file changes while it is read."""
        try:
            return self._make(version)
        except Exception as error:
            print(f"the page could not be made: {type(error).__name__}: {error}", file=sys.stderr)
            if self._made is None:
                return waiting_page(f"The page could not be made: {error}", version)
            return self._made[1].replace(_stamp(self._made[0]), _stamp(version), 1)

    def _make(self, version: str) -> str:
        gathered = gather(self._places, self._named, leaves_out=True)
        if gathered.runs:
            return page_of(content_of(gathered), version)
        return waiting_page("No run has logged an update yet. " + " ".join(gathered.notes), version)


class LiveServer(ThreadingHTTPServer):
    """
    Serves a [`LivePage`] at `/`, and its version at `/version`, on the loopback interface.

    Args:
        page ([`LivePage`]):
            The page.
        port (`int`, *optional*):
            The port; 0 takes a free one. `None`: 8642, or, if that is taken, a free one.

    Raises:
        ConfigurationError: If the port is taken.
    """

    daemon_threads = True  # a page that is being made does not keep the process
    allow_reuse_address = True

    def __init__(self, page: LivePage, port: int | None = None) -> None:
        self.page = page
        try:
            super().__init__((HOST, _PORT if port is None else port), _Handler)
        except OSError as error:
            if port is not None:
                raise ConfigurationError(f"--port {port}: {error}; name another, or 0 for any free one") from error
            super().__init__((HOST, 0), _Handler)

    @property
    def url(self) -> str:
        """Where a browser finds the page."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: object, client_address: object) -> None:
        """A browser that goes away in the middle of an answer is not an error."""
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):
            print(f"an answer failed: {type(error).__name__}: {error}", file=sys.stderr)


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def do_GET(self) -> None:
        names = {f"{host}:{self.server.server_port}" for host in (HOST, "localhost")}
        if self.headers.get("Host") not in names:  # a page of another site, under a name that leads here
            self._answer(HTTPStatus.FORBIDDEN, "this server answers this machine's browsers only", "text/plain")
        elif self.path == "/":
            self._answer(HTTPStatus.OK, self.server.page.html(), "text/html")
        elif self.path == "/version":
            self._answer(HTTPStatus.OK, self.server.page.version(), "text/plain")
        else:
            self._answer(HTTPStatus.NOT_FOUND, "there is only one page, at /", "text/plain")

    def _answer(self, status: HTTPStatus, text: str, kind: str) -> None:
        content = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a browser asks every two seconds."""


def _stamp(version: str) -> str:
    """How a page names its version."""
    return f'data-version="{version}"'


def _version_of(directories: Sequence[Path]) -> str:
    """A hash of the names, the sizes and the times of the runs' files."""
    digest = hashlib.sha256()
    for path, stat in _stats(directories):
        digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _stats(directories: Sequence[Path]) -> Iterator[tuple[Path, os.stat_result]]:
    for directory in directories:
        for pattern in _FILES:
            for path in sorted(directory.glob(pattern)):
                try:
                    yield path, path.stat()
                except OSError:  # it has been replaced meanwhile
                    continue
