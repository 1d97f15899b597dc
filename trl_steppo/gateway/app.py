"""The gateway over HTTP: routes, keys, limits; what is refused is refused in the API's own words."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, AliasChoices, Field
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from ..calls import look_at
from ..episodes import EpisodeSpec
from ..episodes.json import plain_episode_json
from ..finite import LARGEST
from ..inference.base import MIN_TEMPERATURE
from . import anthropic, openai, responses
from .bodies import FIRST_ERROR, B, Body, JsonObject, dumps, event, read_body
from .conversation import Answer, ModelRequest, RequestError, request_key
from .late import HEARTBEAT_S, LateStream, send_all
from .limits import BodyLimits
from .monitor import CONTENT_TYPE
from .openapi import Operation, document
from .service import Gateway, Reply, Retry, unauthorized
from .sessions import Session
from .work import INLINE_BYTES

logger = logging.getLogger(__name__)

_MOST_NOTES = 10
_RETRIES = {None: None, "": None, "0": False}  # what `x-stainless-retry-count` says; any other: that it is one

T = TypeVar("T")

Handler = Callable[[Request], Awaitable[Response]]
Number = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]  # as of all rewards; `nan` and infinities are neither


# -- bodies of our own ------------------------------------------------------------------------------------------------


def _can_be_sampled(temperature: float) -> float:
    if 0 < temperature < MIN_TEMPERATURE:
        raise ValueError(f"give 0, or at least {MIN_TEMPERATURE:g}")
    return temperature


class RewardBody(Body):
    """`POST /sessions/{session_id}/reward`: what a step is paid, instead of what it was told before."""

    reward: Number
    step: Annotated[int, Field(ge=0)] | str | None = None
    state_key: str | int | None = None
    observation: str | Annotated[list[JsonObject], FIRST_ERROR] | None = None


class FinishBody(Body):
    """
    `POST /sessions/{session_id}/finish`: the episode is over; `reward` is added to its last step. `terminated`: its
    environment ended it; without that, an episode whose last response was cut at its length counts as truncated.
    """

    reward: Number | None = None
    metrics: dict[str, Number] | None = None
    observation: str | Annotated[list[JsonObject], FIRST_ERROR] | None = None
    terminated: bool = False


class AbortBody(Body):
    """`POST /sessions/{session_id}/abort`: the episode failed, and trains nothing."""

    error: str = "aborted by the agent"


class OpenBody(Body):
    """`POST /sessions`: a new session. Budgets and sampling that are left out are the gateway's own."""

    name: str | None = None
    training: bool | None = None
    max_interaction_steps: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_prompt_length: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_episode_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_episode_s: Annotated[float, Field(gt=0, le=1e9)] | None = None
    response_length: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100), AfterValidator(_can_be_sampled)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stream_position: Annotated[
        int | None, Field(ge=0, lt=2**63, validation_alias=AliasChoices("stream_position", "row_index"))
    ] = None
    generation_index: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    dataset_row: Annotated[int, Field(ge=0, lt=2**63)] | None = None

    def spec(self, default: EpisodeSpec) -> EpisodeSpec:
        """The gateway's own settings with these instead; a seed that is not given is drawn."""
        limits = ("max_interaction_steps", "max_prompt_length", "max_episode_tokens", "max_episode_s")
        sampling = {"max_new_tokens": self.response_length, "temperature": self.temperature}
        own: dict[str, Any] = {
            "training": self.training,
            "run_seed": secrets.randbits(63) if self.seed is None else self.seed,
            "stream_position": self.stream_position,
            "generation_index": self.generation_index,
            "dataset_row": self.dataset_row,
        }
        return replace(
            default,
            limits=_with(default.limits, {name: getattr(self, name) for name in limits}),
            sampling=_with(default.sampling, sampling),
            **{name: value for name, value in own.items() if value is not None},
        )


def _with(settings: Any, changes: dict[str, Any]) -> Any:
    return replace(settings, **{name: value for name, value in changes.items() if value is not None})


# -- the APIs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Api:
    """One way to ask the model: its path, its body, and how its responses are written."""

    path: str
    body: type[Any]
    summary: str
    whole: Callable[[Answer, Any], dict[str, Any]]
    stream: Callable[[Answer, Any], Iterator[bytes]]
    late_error: Callable[[RequestError], bytes] = lambda error: event(openai.error_body(error))


def _include_usage(body: Any) -> bool:
    return bool(body.stream_options and body.stream_options.include_usage)


APIS = (
    Api(
        "/v1/chat/completions",
        openai.ChatBody,
        "OpenAI: chat completions",
        lambda answer, body: openai.chat_completion(answer),
        lambda answer, body: openai.chat_stream(answer, include_usage=_include_usage(body)),
    ),
    Api(
        "/v1/completions",
        openai.CompletionBody,
        "OpenAI: completions",
        lambda answer, body: openai.completion(answer),
        lambda answer, body: openai.completion_stream(answer, include_usage=_include_usage(body)),
    ),
    Api(
        "/v1/responses",
        responses.ResponsesBody,
        "OpenAI: responses",
        responses.response,
        responses.response_stream,
        responses.error_event,
    ),
    Api(
        "/v1/messages",
        anthropic.MessagesBody,
        "Anthropic: messages",
        lambda answer, body: anthropic.message(answer),
        lambda answer, body: anthropic.message_stream(answer),
        lambda error: event(anthropic.error_body(error), "error"),
    ),
)


class _Delivery(Response):
    """Sends what a client asked for, and finds out whether it was still there."""

    def __init__(
        self,
        chunks: Iterable[bytes],
        gone: asyncio.Future[None],
        on_told: Callable[[bool], None],
        *,
        media_type: str,
        headers: dict[str, str],
        length: int | None = None,
    ) -> None:
        self.status_code, self.media_type, self.background = 200, media_type, None
        self.init_headers({**headers, **({"content-length": str(length)} if length is not None else {})})
        self._chunks, self._gone, self._on_told = chunks, gone, on_told

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_told = False
        try:
            with suppress(OSError):  # the client has gone away
                if not self._gone.done():
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                is_told = await send_all(self._chunks, send, self._gone)
        finally:
            self._on_told(is_told)
            self._gone.cancel()


class _Routes:
    """The handlers of one gateway."""

    def __init__(self, gateway: Gateway, default: EpisodeSpec, limits: BodyLimits, heartbeat_s: float) -> None:
        self.gateway = gateway
        self.default = default
        self.limits = limits
        self.heartbeat_s = heartbeat_s
        self._admins_turn = asyncio.Lock()

    def model(self, api: Api) -> Handler:
        async def handle(request: Request) -> Response:
            session = self.gateway.session_of(_key(request))
            raw = await self._read(request)
            gone = asyncio.ensure_future(_disconnected(request))
            try:
                understand = partial(self._understand, api, raw)
                body, asks, key = await self._at_work(session.turn, len(raw), understand, gone)
                retry = Retry(
                    key,
                    is_retry=_RETRIES.get(request.headers.get("x-stainless-retry-count"), True),
                    idempotency_key=request.headers.get("idempotency-key"),
                )
                asked = await self._respond(session, asks, retry, gone, may_be_late=bool(body.stream))
            except BaseException:
                gone.cancel()
                raise
            if not asked.done():
                return self._deliver_late(api, session, body, asked, gone)
            return self._deliver(api, session, body, asked.result(), gone)

        return handle

    def _understand(self, api: Api, raw: bytes) -> tuple[Any, ModelRequest, str]:
        """A body, what it asks for, and its key. Runs in any thread."""
        body = read_body(api.body, raw, self.limits)
        return body, replace(body.request(self.limits), size=len(raw)), request_key(api.path, raw)

    async def _at_work(
        self, turn: asyncio.Lock, size: int, function: Callable[[], T], gone: asyncio.Future[None] | None = None
    ) -> T:
        """What a function of a body returns: at once, or beside the loop if the body is long."""
        if size <= INLINE_BYTES:
            return function()
        working = asyncio.ensure_future(self.gateway.worker.run(turn, function))
        either: set[asyncio.Future[Any]] = {working} if gone is None else {working, gone}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not working.done():
                working.cancel()
        if not working.done():
            raise _gone_away()
        return working.result()

    async def _respond(
        self,
        session: Session,
        request: ModelRequest,
        retry: Retry,
        gone: asyncio.Future[None],
        *,
        may_be_late: bool,
    ) -> asyncio.Future[Reply]:
        """
        The reply, for as long as the client is there to hear it. One that may be late is returned before it is there
        if it takes long and is being sampled: while requests are held, it may still have to be told to try again.
        """
        asked = asyncio.ensure_future(self.gateway.respond(session, request, retry))
        asked.add_done_callback(look_at)
        either: set[asyncio.Future[Any]] = {asked, gone}
        try:
            while True:
                await asyncio.wait(
                    either,
                    timeout=self.heartbeat_s if may_be_late else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if asked.done():
                    asked.result()
                    return asked
                if gone.done():
                    raise _gone_away()
                if not self.gateway.port.is_paused:
                    return asked
        except BaseException:
            asked.cancel()
            raise

    def _deliver_late(
        self, api: Api, session: Session, body: Any, asked: asyncio.Future[Reply], gone: asyncio.Future[None]
    ) -> Response:
        return LateStream(
            asked,
            gone,
            write=lambda reply: api.stream(reply.answer, body),
            write_error=api.late_error,
            on_told=lambda reply, is_told: session.told_of(reply.answer, to_the_end=is_told),
            heartbeat_s=self.heartbeat_s,
            headers={"cache-control": "no-cache"},
        )

    def _deliver(self, api: Api, session: Session, body: Any, reply: Reply, gone: asyncio.Future[None]) -> Response:
        def on_told(is_told: bool) -> None:
            session.told_of(reply.answer, to_the_end=is_told)

        headers = {"x-request-id": reply.answer.answer_id}
        if reply.notes:
            headers["x-steppo-note"] = "; ".join(reply.notes[:_MOST_NOTES])
        if body.stream:
            headers["cache-control"] = "no-cache"
            chunks: Iterable[bytes] = api.stream(reply.answer, body)
            return _Delivery(chunks, gone, on_told, media_type="text/event-stream", headers=headers)
        whole = dumps(api.whole(reply.answer, body), compact=True).encode()
        return _Delivery([whole], gone, on_told, media_type="application/json", headers=headers, length=len(whole))

    async def models(self, request: Request) -> Response:
        self.gateway.session_of(_key(request))
        return _json({"object": "list", "data": [self._model(self.gateway.model_name)]})

    async def one_model(self, request: Request) -> Response:
        self.gateway.session_of(_key(request))
        return _json(self._model(request.path_params["model"]))

    def _model(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.gateway.started, "owned_by": "trl-steppo"}

    # -- sessions -----------------------------------------------------------------------------------------------------

    async def open_session(self, request: Request) -> Response:
        self.gateway.check_admin(_key(request))
        body = await self._body(request, OpenBody, self._admins_turn)
        session, key = await self.gateway.open_session(body.spec(self.default), name=body.name)
        base = str(request.base_url).rstrip("/")
        return _json({"id": session.session_id, "api_key": key, "base_url": f"{base}/v1"}, status=201)

    async def reward(self, request: Request) -> Response:
        turn = self._own_session(request).turn
        body = await self._body(request, RewardBody, turn)
        session = self._own_session(request)  # which may be over by now
        step: int | str | None = body.step
        if isinstance(step, str):  # an id as any of the APIs gives it
            step = step.split("-", 1)[-1].split("_", 1)[-1]
        index = await self.gateway.set_reward(
            session, body.reward, step=step, state_key=body.state_key, observation=body.observation
        )
        return _json({"step": index, "reward": body.reward})

    async def finish(self, request: Request) -> Response:
        def ending(body: FinishBody) -> dict[str, Any]:
            return {
                "reward": body.reward,
                "metrics": body.metrics,
                "observation": body.observation,
                "terminated": body.terminated,
            }

        return await self._end(request, FinishBody, ending)

    async def abort(self, request: Request) -> Response:
        def ending(body: AbortBody) -> dict[str, Any]:
            return {"error": body.error.replace(_key(request) or "[key]", "[key]") or "aborted by the agent"}

        return await self._end(request, AbortBody, ending)

    async def _end(self, request: Request, kind: type[B], ending: Callable[[B], dict[str, Any]]) -> Response:
        """End a session; one that is over stays as it is, so that a client may try again until it hears of it."""
        session = await self._own_session_even_if_over(request)
        body = await self._body(request, kind, session.turn)
        if session.session_id in self.gateway:
            await self.gateway.finish(session, **({} if session.is_over else ending(body)))
        return _json(_status(session))

    async def session(self, request: Request) -> Response:
        return _json(_status(await self._own_session_even_if_over(request)))

    async def episode(self, request: Request) -> Response:
        self.gateway.check_admin(_key(request))
        return _json(plain_episode_json(self.gateway.find(request.path_params["session_id"]).episode()))

    async def remove(self, request: Request) -> Response:
        self.gateway.check_admin(_key(request))
        session = self.gateway.find(request.path_params["session_id"])
        await self.gateway.finish(session)
        await self.gateway.collect(session, keep=False)
        return _json({"id": session.session_id, "removed": True})

    def _own_session(self, request: Request) -> Session:
        """The session in the path, for its own key and the admin's; `current` is the key's own."""
        key, session_id = _key(request), request.path_params["session_id"]
        try:
            session = self.gateway.session_of(key)
        except RequestError:
            self.gateway.check_admin(key)
            return self.gateway.find(session_id)
        if session_id not in ("current", session.session_id):
            raise unauthorized()
        return session

    async def _own_session_even_if_over(self, request: Request) -> Session:
        try:
            return self._own_session(request)
        except RequestError:
            session = await self.gateway.finished_session_of(_key(request))
            if session is None or request.path_params["session_id"] not in ("current", session.session_id):
                raise
            return session

    # -- operators ----------------------------------------------------------------------------------------------------

    async def health(self, request: Request) -> Response:
        return _json({"status": "paused" if self.gateway.port.is_paused else "ok"})

    async def metrics(self, request: Request) -> Response:
        return Response(self.gateway.monitor.text(), headers={"content-type": CONTENT_TYPE})

    async def _body(self, request: Request, kind: type[B], turn: asyncio.Lock) -> B:
        """A body of our own; nothing is as good as an empty object."""
        raw = await self._read(request) or b"{}"
        return await self._at_work(turn, len(raw), partial(read_body, kind, raw, self.limits))

    async def _read(self, request: Request) -> bytes:
        """The body, as long as it is not too long."""
        most = self.limits.max_bytes
        too_large = RequestError(413, f"a body has at most {most} bytes", code="body_too_large")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise too_large
        parts, length = [], 0
        try:
            async for part in request.stream():
                length += len(part)
                if length > most:
                    raise too_large
                parts.append(part)
        except ClientDisconnect:
            raise _gone_away() from None
        return b"".join(parts)


def make_app(
    gateway: Gateway,
    *,
    default: EpisodeSpec | None = None,
    limits: BodyLimits | None = None,
    heartbeat_s: float = HEARTBEAT_S,
) -> Starlette:
    """
    The ASGI application of a gateway.

    Args:
        gateway ([`Gateway`]):
            What it serves.
        default ([`EpisodeSpec`], *optional*):
            What a session is allowed that is opened over HTTP, where its body does not say.
        limits ([`~gateway.limits.BodyLimits`], *optional*):
            What a body may consist of; by default what the gateway's context has room for.
        heartbeat_s (`float`, *optional*, defaults to `3.0`):
            How long a stream says nothing.
    """
    routes = _Routes(gateway, default or EpisodeSpec(), limits or BodyLimits.of(gateway.context), heartbeat_s)
    session = "/sessions/{session_id}"
    operations: list[tuple[Operation, Handler]] = [
        *((Operation("POST", api.path, api.summary, api.body, streams=True), routes.model(api)) for api in APIS),
        (Operation("GET", "/v1/models", "The policy"), routes.models),
        (Operation("GET", "/v1/models/{model}", "The policy, under any name"), routes.one_model),
        (Operation("POST", "/sessions", "A new session", OpenBody, is_admin=True, status=201), routes.open_session),
        (Operation("GET", session, "How a session stands"), routes.session),
        (Operation("DELETE", session, "Forget a session", is_admin=True), routes.remove),
        (Operation("POST", f"{session}/reward", "Pay a step", RewardBody), routes.reward),
        (Operation("POST", f"{session}/finish", "End the episode", FinishBody), routes.finish),
        (Operation("POST", f"{session}/abort", "Fail the episode", AbortBody), routes.abort),
        (Operation("GET", f"{session}/episode", "What was recorded", is_admin=True), routes.episode),
        (Operation("GET", "/healthz", "Whether it serves", is_open=True), routes.health),
        (Operation("GET", "/metrics", "For Prometheus", is_open=True, media_type="text/plain"), routes.metrics),
    ]
    described = dumps(document([operation for operation, _ in operations])).encode()

    async def openapi(request: Request) -> Response:
        return Response(described, media_type="application/json")

    table = [
        Route(_starlette_path(op.path), _watched(gateway, op.path, handler), methods=[op.method])
        for op, handler in operations
    ]
    return Starlette(
        routes=[*table, Route("/openapi.json", openapi)],
        exception_handlers={HTTPException: _on_http_error, RequestError: _on_request_error},  # type: ignore[dict-item]
    )


def _starlette_path(path: str) -> str:
    return path.replace("{model}", "{model:path}")


def _watched(gateway: Gateway, route: str, handler: Handler) -> Handler:
    """A handler that is counted and timed, and whose failures are ours alone to see."""

    async def handle(request: Request) -> Response:
        start = time.perf_counter()
        try:
            response = await handler(request)
        except RequestError as error:
            response = _error(request, error)
        except Exception:
            logger.exception("a request to %s failed", route)
            response = _error(request, RequestError(500, "the gateway failed; its log says how", code="internal"))
        gateway.monitor.requests.labels(route, str(response.status_code)).inc()
        gateway.monitor.request_s.labels(route).observe(time.perf_counter() - start)
        return response

    return handle


def _gone_away() -> RequestError:
    return RequestError(499, "the client went away", code="client_closed_request")


def _key(request: Request) -> str | None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    return request.headers.get("x-api-key")


async def _disconnected(request: Request) -> None:
    """Returns when the client has gone away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _json(data: Any, *, status: int = 200) -> Response:
    return Response(dumps(data), status_code=status, media_type="application/json")


def _error(request: Request, error: RequestError) -> Response:
    write = anthropic.error_body if request.url.path == "/v1/messages" else openai.error_body
    response = _json(write(error), status=error.status)
    if error.retry_after_s is not None:
        response.headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:
        response.headers["www-authenticate"] = "Bearer"
    return response


async def _on_http_error(request: Request, error: HTTPException) -> Response:
    """No such path, no such method."""
    response = _error(request, RequestError(error.status_code, error.detail))
    response.headers.update(error.headers or {})
    return response


async def _on_request_error(request: Request, error: RequestError) -> Response:
    return _error(request, error)


def _status(session: Session) -> dict[str, Any]:
    visible = session.visible()
    return {
        "id": session.session_id,
        "steps": len(visible),
        "is_over": session.is_over or session.ended_early,
        "stop_reason": session.notes.stop_reason,
        "error": session.notes.error,
        "max_interaction_steps": session.spec.limits.max_interaction_steps,
    }
