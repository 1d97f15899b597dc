"""A stream whose response takes long: it begins before the response is there, so that no client takes it for dead."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .conversation import RequestError
from .service import Reply

logger = logging.getLogger(__name__)

HEARTBEAT_S = 3.0  # some HTTP clients give up after 5 s without a byte


class LateStream(Response):
    """
    Sends headers, then comments for as long as the response is being sampled, then the response. What fails by then
    can have no status of its own any more, and is told as an event.

    Args:
        asked (`asyncio.Future[Reply]`):
            The response in the making.
        gone (`asyncio.Future[None]`):
            Done when the client has gone away: the response is then given up.
        write (`Callable[[Reply], Iterable[bytes]]`):
            A response's events.
        write_error (`Callable[[RequestError], bytes]`):
            The event of a failure.
        on_told (`Callable[[Reply, bool], None]`):
            Called in the end with whether the client was told to the end.
        heartbeat_s (`float`):
            Between two comments.
        headers (`dict[str, str]`):
            To send.
    """

    def __init__(
        self,
        asked: asyncio.Future[Reply],
        gone: asyncio.Future[None],
        *,
        write: Callable[[Reply], Iterable[bytes]],
        write_error: Callable[[RequestError], bytes],
        on_told: Callable[[Reply, bool], None],
        heartbeat_s: float,
        headers: dict[str, str],
    ) -> None:
        self.status_code, self.media_type, self.background = 200, "text/event-stream", None
        self.init_headers(headers)
        self._asked, self._gone = asked, gone
        self._write, self._write_error, self._on_told = write, write_error, on_told
        self._heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with suppress(OSError):  # the client has gone away
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                while not self._asked.done() and not self._gone.done():
                    await send(_body(comment("sampling")))
                    either: set[asyncio.Future[Any]] = {self._asked, self._gone}
                    await asyncio.wait(either, timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
                if self._asked.done():
                    await self._tell(send)
        finally:
            self._asked.cancel()
            self._gone.cancel()

    async def _tell(self, send: Send) -> None:
        try:
            reply = self._asked.result()
        except RequestError as error:
            await send_all([self._write_error(error)], send, self._gone)
        except Exception as error:
            logger.error("a stream failed", exc_info=error)
            failure = RequestError(500, "the gateway failed; its log says how", code="internal")
            await send_all([self._write_error(failure)], send, self._gone)
        else:
            is_told = False
            try:
                is_told = await send_all([*map(comment, reply.notes), *self._write(reply)], send, self._gone)
            finally:
                self._on_told(reply, is_told)


async def send_all(chunks: Iterable[bytes], send: Send, gone: asyncio.Future[None]) -> bool:
    """The body of a response, behind its headers; whether its client was there to the end."""
    for chunk in chunks:
        if gone.done():
            return False
        await send(_body(chunk))
        await asyncio.sleep(0)  # lets a disconnection be heard of
    await send({"type": "http.response.body", "body": b"", "more_body": False})
    return True


def comment(text: str) -> bytes:
    """A line of a stream that clients read and leave out."""
    return f": {text}\n\n".encode()


def _body(chunk: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": chunk, "more_body": True}
