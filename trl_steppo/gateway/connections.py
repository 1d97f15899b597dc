"""Limits of connections, which anyone can open without a key: silent and endless ones are closed."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from ..errors import ConfigurationError

_MAX_CONNECTIONS = 16_384
_MAX_BACKLOG = 2048
_RESPONSE = b"HTTP/1.1 %s\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
_TOO_LARGE = _RESPONSE % b"431 Request Header Fields Too Large"
_TOO_SLOW = _RESPONSE % b"408 Request Timeout"
_TOO_MANY = _RESPONSE % b"503 Service Unavailable"


@dataclass(frozen=True)
class ConnectionLimits:
    """
    Limits of the connections of a server.

    Args:
        max_connections (`int`):
            Maximum number of open connections. One more takes the place of the one that has been silent for longest:
            first those that have never asked for anything, then those that are kept open for a next request.
        backlog (`int`):
            Maximum number of connections that wait to be accepted; as many are accepted at once.
        max_header_bytes (`int`, *optional*, defaults to `65536`):
            Maximum size of the header of one request.
        max_request_s (`float`, *optional*, defaults to `60.0`):
            Maximum time from the first byte of a request until it is whole. For a connection's first request, it
            counts from the beginning of the connection.
    """

    max_connections: int
    backlog: int
    max_header_bytes: int = 2**16
    max_request_s: float = 60.0

    @classmethod
    def of_process(cls, max_connections: int | None = None) -> ConnectionLimits:
        """
        Limits that leave this process half of the files that it may open, because connections that are being accepted
        or closed have files, too.

        Args:
            max_connections (`int`, *optional*):
                Maximum number of open connections, instead of one that follows from the process's own limit.

        Raises:
            ConfigurationError: The process may not open so many files.
        """
        files = _max_files()
        if max_connections is not None and not 0 < max_connections < files:
            raise ConfigurationError(
                f"`max_connections` is {max_connections}, and this process may open {files} files (`ulimit -n`); give "
                "a smaller number, at least 1"
            )
        backlog = max(16, min(_MAX_BACKLOG, files // 6))
        return cls(max_connections or max(16, min(_MAX_CONNECTIONS, files // 2)), backlog)


def _max_files() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 2 * _MAX_CONNECTIONS
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 2 * _MAX_CONNECTIONS if soft in (resource.RLIM_INFINITY, -1) else soft


class Connection(Protocol):
    """One connection."""

    num_requests: int
    last_heard: int

    @property
    def is_at_work(self) -> bool:
        """Whether a whole request of it is being answered."""
        ...

    def end(self, last_words: bytes = b"") -> None:
        """Close it, because of a limit."""
        ...


@dataclass
class Connections:
    """
    The open connections of one server. Its methods run in the server's event loop.

    Args:
        limits ([`ConnectionLimits`]):
            Their limits.
    """

    limits: ConnectionLimits
    opened: set[Connection] = field(default_factory=set)
    num_closed: int = 0  # because of a limit
    _clock: Iterator[int] = field(default_factory=count)

    def add(self, connection: Connection) -> None:
        """Add a new connection. If there are too many, another one is closed, or else this one."""
        self.opened.add(connection)
        self.touch(connection)
        if len(self.opened) > self.limits.max_connections:
            idle = [other for other in self.opened if not other.is_at_work and other is not connection]
            # A client that has asked before has shown a key, or that it speaks HTTP.
            victim = min(idle, key=lambda other: (other.num_requests > 0, other.last_heard), default=connection)
            victim.end(_TOO_MANY if victim is connection else b"")

    def touch(self, connection: Connection) -> None:
        """Note that a connection has just sent something."""
        connection.last_heard = next(self._clock)


class _Guarded(asyncio.Protocol):
    """
    Limits for a protocol of uvicorn, which this class stands before. `_is_incoming` and `_in_header` depend on how
    that protocol parses.
    """

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    cycle: Any
    connections_of_server: Connections

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.num_requests = 0  # whole ones
        self.last_heard = 0
        self._header_bytes = 0
        self._alarm: asyncio.TimerHandle | None = None

    @property
    def _is_incoming(self) -> bool:
        """Whether a part of a request is missing."""
        raise NotImplementedError

    @property
    def _in_header(self) -> bool:
        """Whether a part of a request's header is missing."""
        raise NotImplementedError

    @property
    def is_at_work(self) -> bool:
        """Whether a whole request of it is being answered."""
        return self.cycle is not None and not self.cycle.response_complete and not self._is_incoming

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._expect()
        self.connections_of_server.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.connections_of_server.opened.discard(self)
        self._expect_nothing()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        limits = self.connections_of_server.limits
        self.connections_of_server.touch(self)
        self._expect()
        before, was_in_header = self.cycle, self._in_header
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self.cycle is not before:
            self._header_bytes = sum(len(name) + len(value) for name, value in self.cycle.scope["headers"])
        if was_in_header and self._in_header:  # where in `data` the header began is not known
            self._header_bytes += len(data)
        if self._header_bytes > limits.max_header_bytes:
            self.end(_TOO_LARGE)
        elif not self._is_incoming:
            self.num_requests += 1
            self._header_bytes = 0
            self._expect_nothing()

    def end(self, last_words: bytes = b"") -> None:
        """Close it, because of a limit."""
        self.connections_of_server.num_closed += 1
        self.connections_of_server.opened.discard(self)
        self._expect_nothing()
        if not self.transport.is_closing():
            if last_words and (self.cycle is None or self.cycle.response_complete):
                self.transport.write(last_words)
            self.transport.close()

    def _expect(self) -> None:
        """Start the time in which a request has to be whole."""
        if self._alarm is None:
            self._alarm = self.loop.call_later(self.connections_of_server.limits.max_request_s, self._is_late)

    def _expect_nothing(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _is_late(self) -> None:
        self._alarm = None
        self.end(_TOO_SLOW)


def guarded_protocol(connections: Connections) -> type[asyncio.Protocol]:
    """
    uvicorn's protocol for HTTP, with limits. It uses httptools where that is installed, else h11.

    Args:
        connections ([`Connections`]):
            The server's connections.
    """
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return _on_h11(connections)

    class OnHttptools(_Guarded, HttpToolsProtocol):
        """One connection."""

        connections_of_server = connections
        _is_incoming = True  # from its beginning
        _in_header = False

        def on_message_begin(self) -> None:
            self._is_incoming = self._in_header = True
            super().on_message_begin()

        def on_headers_complete(self) -> None:
            self._in_header = False
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            self._is_incoming = False
            super().on_message_complete()

    return OnHttptools


def _on_h11(connections: Connections) -> type[asyncio.Protocol]:
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class OnH11(_Guarded, H11Protocol):
        """One connection."""

        connections_of_server = connections

        @property
        def _is_incoming(self) -> bool:
            return self.cycle is None or self._in_header or self.conn.their_state is h11.SEND_BODY

        @property
        def _in_header(self) -> bool:
            return self.conn.their_state is h11.IDLE and bool(self.conn.trailing_data[0])

    return OnH11
