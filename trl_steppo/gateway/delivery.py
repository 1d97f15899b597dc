"""How a reply reaches its client: whole, or as a stream, which may begin before the response is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .bodies import dumps
from .conversation import Answer, RequestError
from .dialect import Dialect, ModelBody
from .responder import Reply

logger = logging.getLogger(__name__)

HEARTBEAT_S = 3.0  # some HTTP clients give up after 5 s without a byte
_MAX_NOTES = 10


def when_gone(request: Request) -> asyncio.Future[None]:
    """
    A future that is done when the client has gone away. It consumes what the client sends, so the body must have been
    read before.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    return asyncio.ensure_future(disconnected())


def gone_away() -> RequestError:
    """The error of a request whose client has gone away."""
    return RequestError(499, "the client went away", code="client_closed_request")


async def is_done(work: asyncio.Future[Any], gone: asyncio.Future[None], timeout_s: float | None = None) -> bool:
    """
    Wait for a client's work, at most `timeout_s`, and return whether it is done. If the client goes away first, the
    work is cancelled.

    Raises:
        RequestError: The client went away.
    """
    try:
        done, _ = await asyncio.wait({work, gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if gone in done and work not in done:
            raise gone_away()
    except BaseException:
        work.cancel()
        raise
    return work in done


async def wait_for_reply(
    asked: asyncio.Future[Reply],
    gone: asyncio.Future[None],
    *,
    begins_after_s: float | None,
    is_held: Callable[[], bool],
) -> None:
    """
    Wait until a reply is there, or until its stream is to begin without it.

    Args:
        asked (`asyncio.Future[Reply]`):
            The reply, which is given up if the client goes away.
        gone (`asyncio.Future[None]`):
            Done when the client has gone away.
        begins_after_s (`float`, *optional*):
            How long a stream waits for the reply before it begins; `None`: until the reply is there.
        is_held (`Callable[[], bool]`):
            Whether requests wait for new weights. No stream begins then, because its client may still have to be told,
            by a status, to try again.

    Raises:
        RequestError: The request failed, or the client went away.
    """
    while not await is_done(asked, gone, begins_after_s):
        if not is_held():
            return
    asked.result()


class ReplyResponse(Response):
    """
    Sends a reply while its client is there, and notes whether the client was told to the end.

    A stream whose reply is not there yet begins with its headers, and sends comments until the response has been
    sampled. A failure after that has no status, and is told as an event.

    Args:
        dialect ([`~gateway.dialect.Dialect`]), body ([`~gateway.dialect.ModelBody`]):
            How the reply is written, and what asked for it.
        asked (`asyncio.Future[Reply]`):
            The reply, which is given up if the client goes away.
        gone (`asyncio.Future[None]`):
            Done when the client has gone away.
        on_told (`Callable[[Answer, bool], None]`):
            Called in the end, with whether the client was told to the end.
        heartbeat_s (`float`):
            Time between two comments.
    """

    def __init__(
        self,
        dialect: Dialect[Any],
        body: ModelBody,
        asked: asyncio.Future[Reply],
        gone: asyncio.Future[None],
        *,
        on_told: Callable[[Answer, bool], None],
        heartbeat_s: float,
    ) -> None:
        self.status_code, self.background = 200, None
        self._dialect, self._body = dialect, body
        self._asked, self._gone = asked, gone
        self._on_told, self._heartbeat_s = on_told, heartbeat_s
        self._is_late = not asked.done()
        headers = {} if self._is_late else _headers(asked.result())
        if body.stream:
            self.media_type = "text/event-stream"
            headers["cache-control"] = "no-cache"
        else:
            self.media_type = "application/json"
            self._whole = dumps(dialect.whole(asked.result().answer, body), compact=True).encode()
            headers["content-length"] = str(len(self._whole))
        self.init_headers(headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_told = False
        try:
            with suppress(OSError):  # the client has gone away
                if not self._gone.done():
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                while not self._asked.done() and not self._gone.done():
                    await send(_part(comment("sampling")))
                    either: set[asyncio.Future[Any]] = {self._asked, self._gone}
                    await asyncio.wait(either, timeout=self._heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
                if self._asked.done():
                    is_told = await self._send_all(self._chunks(), send)
        finally:
            if self._asked.done() and not self._asked.cancelled() and self._asked.exception() is None:
                self._on_told(self._asked.result().answer, is_told)
            self._asked.cancel()
            self._gone.cancel()

    def _chunks(self) -> Iterator[bytes]:
        """What to send of a reply, or of a failure."""
        try:
            reply = self._asked.result()
        except RequestError as error:
            yield self._dialect.error_event(error)
            return
        except Exception as error:
            logger.error("a stream failed", exc_info=error)
            yield self._dialect.error_event(RequestError(500, "the gateway failed; its log says how", code="internal"))
            return
        if self._is_late:
            yield from map(comment, reply.notes)
        if self._body.stream:
            yield from self._dialect.stream(reply.answer, self._body)
        else:
            yield self._whole

    async def _send_all(self, chunks: Iterable[bytes], send: Send) -> bool:
        """Send the body of the response, and return whether its client was there to the end."""
        for chunk in chunks:
            if self._gone.done():
                return False
            await send(_part(chunk))
            await asyncio.sleep(0)  # so that a disconnection is noticed
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True


def _headers(reply: Reply) -> dict[str, str]:
    notes = {"x-steppo-note": "; ".join(reply.notes[:_MAX_NOTES])} if reply.notes else {}
    return {"x-request-id": reply.answer.answer_id, **notes}


def comment(text: str) -> bytes:
    """A line of a stream that clients skip."""
    return f": {text}\n\n".encode()


def _part(chunk: bytes) -> dict[str, object]:
    return {"type": "http.response.body", "body": chunk, "more_body": True}
