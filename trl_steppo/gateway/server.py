"""A gateway that serves: in a thread of a trainer's process, with an event loop of its own, or by itself."""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import uvicorn
from starlette.types import ASGIApp

from ..episodes import EpisodeSpec
from ..errors import ConfigurationError
from .app import make_app
from .connections import ConnectionLimits, Connections, guarded_protocol
from .delivery import HEARTBEAT_S
from .limits import BodyLimits
from .monitor import Monitor
from .sampling import SamplerLoop, SamplingPort
from .service import Gateway
from .store import Store
from .tokens import ChatFormats

T = TypeVar("T")

logger = logging.getLogger(__name__)

_STARTUP_TIMEOUT_S = 30.0
_SWEEP_INTERVAL_S = 1.0  # between looks for idle sessions


class GatewayServer:
    """
    A gateway on a port, which serves until it is closed. It starts paused: `resume` gives it a sampler.

    Args:
        formats ([`ChatFormats`]):
            Messages to ids and back.
        host (`str`, *optional*, defaults to `"127.0.0.1"`):
            Address to listen on: only this machine's own processes reach the default.
        port (`int`, *optional*, defaults to `0`):
            Port to listen on; 0: any free one.
        store (`Path`, *optional*):
            File that keeps sessions; in memory if not given.
        restores (`bool`, *optional*, defaults to `True`):
            Whether sessions that were running when the file was last used go on.
        admin_key (`str`, *optional*):
            Key that lets its owner open sessions over HTTP.
        default ([`EpisodeSpec`], *optional*):
            Settings of sessions that are opened over HTTP.
        model_name (`str`, *optional*, defaults to `"policy"`):
            What `/v1/models` calls the policy.
        max_wait_s (`float`, *optional*, defaults to `20.0`):
            How long a request waits while the gateway is paused.
        context (`int`, *optional*):
            Maximum number of tokens of a prompt with its response that the policy can read
            ([`~models.context_length`]); `None`: no bound is known.
        limits ([`~gateway.limits.BodyLimits`], *optional*):
            What a body may consist of; by default what the context has room for.
        max_body_bytes (`int`, *optional*):
            Maximum number of bytes of a body, instead of the one in `limits`.
        connections ([`~gateway.connections.ConnectionLimits`], *optional*):
            Limits of connections; by default half of the files that this process may open.
        heartbeat_s (`float`, *optional*, defaults to `3.0`):
            Time between the comments of a stream while its response is sampled.
        idle_s (`float`, *optional*):
            How long an agent may ask for nothing before its session is finished; `None`: without limit.

    Raises:
        ConfigurationError: The gateway cannot listen on the port.
        CheckpointError: The store cannot be used ([`Store`]).
    """

    def __init__(
        self,
        formats: ChatFormats,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        store: Path | None = None,
        restores: bool = True,
        admin_key: str | None = None,
        default: EpisodeSpec | None = None,
        model_name: str = "policy",
        max_wait_s: float = 20.0,
        context: int | None = None,
        limits: BodyLimits | None = None,
        max_body_bytes: int | None = None,
        connections: ConnectionLimits | None = None,
        heartbeat_s: float = HEARTBEAT_S,
        idle_s: float | None = None,
    ) -> None:
        if idle_s is not None and not idle_s > 0:
            raise ConfigurationError(f"`idle_s` is {idle_s}; give a positive number of seconds, or None")
        self.idle_s = idle_s
        with ExitStack() as opened:
            self.store = Store(store)
            opened.callback(self.store.close)
            self._socket = _listen(host, port)
            opened.callback(self._socket.close)
            self.host, self.port = self._socket.getsockname()[:2]
            self.gateway = Gateway(
                formats,
                SamplingPort(max_wait_s=max_wait_s),
                store=self.store,
                monitor=Monitor(),
                admin_key=admin_key,
                model_name=model_name,
                context=context,
            )
            if restores:
                self.gateway.restore()
            limits = limits or BodyLimits.of(context)
            if max_body_bytes is not None:
                limits = replace(limits, max_bytes=max_body_bytes)
            self.connections = Connections(connections or ConnectionLimits.of_process())
            app = make_app(self.gateway, default=default, limits=limits, heartbeat_s=heartbeat_s)
            self._server = uvicorn.Server(_config(app, self.connections))
            opened.pop_all()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._serve, name="gateway", daemon=True)

    @property
    def origin(self) -> str:
        """Address of the gateway, without a path."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}"

    @property
    def base_url(self) -> str:
        """Address that OpenAI's clients call `base_url`."""
        return f"{self.origin}/v1"

    def start(self) -> GatewayServer:
        """
        Start to serve, in a thread, and return when requests are answered.

        Raises:
            ConfigurationError: The gateway did not start, and is closed.
        """
        self._thread.start()
        deadline = time.monotonic() + _STARTUP_TIMEOUT_S
        while not self._server.started:
            if time.monotonic() > deadline or not self._thread.is_alive():
                self.close()
                raise ConfigurationError(f"the gateway on {self.origin} did not start; the log says why")
            time.sleep(0.005)
        return self

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine of the gateway in its loop, and wait for the result. For other threads than the loop's."""
        return self.submit(coroutine).result()

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """[`call`] without waiting. Raises a `RuntimeError` if the gateway is closed."""
        assert self._loop is not None, "the server was started"
        if self._loop.is_closed():  # a rollout that nobody waits for any more
            coroutine.close()
            raise RuntimeError("the gateway is closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def resume(self, sampler: SamplerLoop) -> None:
        """Let requests through to this sampler."""
        self.call(self.gateway.port.resume(sampler))

    def pause(self) -> None:
        """Hold new requests, and wait for those that were let through."""
        self.call(self.gateway.port.pause())

    def wait(self) -> None:
        """Wait until the gateway has stopped."""
        while self._thread.is_alive():
            self._thread.join(0.5)

    def stop(self) -> None:
        """Ask the gateway to stop soon. A signal's handler may call this."""
        self._server.should_exit = True

    def close(self) -> None:
        """Stop serving, and close the store."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join()
        self._socket.close()  # still open if the gateway never served
        self.gateway.worker.close()
        self.store.close()

    def _serve(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            sweeping = asyncio.ensure_future(self._sweep())
            try:
                await self._server.serve(sockets=[self._socket])
            finally:
                sweeping.cancel()

        loop = _new_loop()
        try:
            loop.run_until_complete(serve())
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()

    async def _sweep(self) -> None:
        """Finish idle sessions, again and again."""
        while self.idle_s is not None:
            await asyncio.sleep(min(self.idle_s, _SWEEP_INTERVAL_S))
            try:
                await self.gateway.finish_idle(self.idle_s)
            except Exception:  # the store cannot be written now, and perhaps later
                logger.exception("idle sessions cannot be finished")


def _config(app: ASGIApp, connections: Connections) -> uvicorn.Config:
    """uvicorn's settings. Its access log is off, as it is long, and so are headers that name versions."""
    limits = connections.limits
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        lifespan="off",
        http=guarded_protocol(connections),
        ws="none",
        h11_max_incomplete_event_size=limits.max_header_bytes,
        # Requests at work; connections are closed before they are so many.
        limit_concurrency=limits.max_connections + 2 * limits.backlog + 1,
        timeout_keep_alive=75,  # longer than clients keep connections, so that none is closed while it is used
        timeout_graceful_shutdown=1,
        backlog=limits.backlog,
    )


def _new_loop() -> asyncio.AbstractEventLoop:
    """A loop of uvloop where that is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(
            f"the gateway cannot listen on {host}:{port}: {error}; choose another port"
        ) from error
    return listener
