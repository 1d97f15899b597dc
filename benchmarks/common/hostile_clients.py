"""
Clients that send too much, or nothing, to a gateway, and what other clients see of it. Used by `gateway.py`.

The gateway runs in a process of its own (`python benchmarks/common/hostile_clients.py`), with a limit of 1,024 open
files. Its sampler answers at once with one token.
"""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Thread
from typing import Any

import httpx

from trl_steppo.types import JsonObject

CONTEXTS = (2_048, 131_072)  # tokens; a long one has room for more of what hostile clients send
MAX_FILES = 1024
NUM_SILENT = 1500
ALLOWED_MS = 50.0  # or five times the idle gateway's, if that is more
HI = {"role": "user", "content": "hi"}


def hostile_bodies() -> dict[str, tuple[str, bytes]]:
    """What hostile clients send, and where to."""

    def chat(messages: Sequence[Any]) -> tuple[str, bytes]:
        return "/v1/chat/completions", json.dumps({"model": "m", "messages": messages}).encode()

    return {
        "malformed_1.6_mb": chat([{}] * 400_000),
        "malformed_7.6_mb": chat([{"role": 1, "content": 2}] * 240_000),
        "short_messages_100_000": chat([HI] * 100_000),
        "prompt_ids_200_000": ("/v1/completions", json.dumps({"model": "m", "prompt": [5] * 200_000}).encode()),
        "nested_1_mb": ("/v1/chat/completions", b'{"model": "m", "messages": ' + b"[" * 2**20),
    }


def measure_hostile(*, quick: bool) -> JsonObject:
    """All figures of this file, for each context."""
    num_asked = 40 if quick else 400
    contexts = CONTEXTS[:1] if quick else CONTEXTS
    return {"requests_each": num_asked, **{f"context_{one}": _measure(one, num_asked) for one in contexts}}


def _measure(context: int, num_asked: int) -> JsonObject:
    figures: JsonObject = {}
    with serving(context) as (port, key):
        figures["idle"] = ask_others(port, key, num_asked)
        for name, (path, body) in hostile_bodies().items():
            with sending(port, key, path, body) as told:
                figures[name] = ask_others(port, key, num_asked)
            figures[name] |= {"hostile_requests": len(told), "hostile_statuses": sorted(set(told))}
        figures["silent_connections_1500"] = ask_beside_silent(port, key, num_asked)
    idle = figures["idle"]
    for name in ("healthz_p99_ms", "one_token_p99_ms"):
        allowed = max(5 * idle[name], ALLOWED_MS)
        others = [one[name] for one in figures.values() if isinstance(one, dict) and one is not idle]
        figures[f"worst_{name}"], figures[f"allowed_{name}"] = max(others), allowed
    return figures


@contextmanager
def serving(context: int) -> Iterator[tuple[int, str]]:
    """A gateway in a process of its own: its port, and the admin's key."""
    with TemporaryDirectory() as directory:
        command = [sys.executable, __file__, directory, str(context)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline()), "admin"
        finally:
            process.stdin.close()
            process.wait()


def open_client(port: int, admin_key: str) -> httpx.Client:
    """A client with a session of its own."""
    origin = f"http://127.0.0.1:{port}"
    headers = {"authorization": f"Bearer {admin_key}"}
    opened = httpx.post(f"{origin}/sessions", json={"max_interaction_steps": 10**6}, headers=headers, timeout=60)
    headers = {"authorization": f"Bearer {opened.json()['api_key']}"}
    return httpx.Client(base_url=origin, headers=headers, timeout=600)


@contextmanager
def sending(port: int, admin_key: str, path: str, body: bytes) -> Iterator[list[int]]:
    """One client that sends a body again and again; the statuses that it was told."""
    stop, told = Event(), list[int]()

    def send() -> None:
        with open_client(port, admin_key) as client:
            while not stop.is_set():
                try:
                    told.append(client.post(path, content=body).status_code)
                except httpx.TransportError:  # it was refused before it was whole
                    told.append(0)

    thread = Thread(target=send)
    thread.start()
    try:
        yield told
    finally:
        stop.set()
        thread.join()


def ask_beside_silent(port: int, admin_key: str, num_asked: int) -> JsonObject:
    """The same while silent connections are open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, NUM_SILENT + 500)), hard))
    silent = []
    try:
        for _ in range(NUM_SILENT):
            silent.append(socket.create_connection(("127.0.0.1", port), timeout=60))
        return ask_others(port, admin_key, num_asked) | {"connected": len(silent), "most_files": MAX_FILES}
    finally:
        for one in silent:
            one.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def ask_others(port: int, admin_key: str, num_asked: int) -> JsonObject:
    """How long others wait for `/healthz`, and for a response of one token."""
    with open_client(port, admin_key) as client:

        def health() -> None:
            client.get("/healthz").raise_for_status()

        def one_token() -> None:
            # For the first time: a retry would be answered by what is recorded.
            headers = {"x-stainless-retry-count": "0"}
            body = {"model": "m", "messages": [HI]}
            client.post("/v1/chat/completions", json=body, headers=headers).raise_for_status()

        one_token()
        return {"healthz_p99_ms": p99_ms(health, num_asked), "one_token_p99_ms": p99_ms(one_token, num_asked)}


def p99_ms(ask: Callable[[], None], count: int) -> float:
    """Of as many calls, one after the other, the time that 99 % of them do not exceed."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        ask()
        times.append((time.perf_counter() - start) * 1000)
    return sorted(times)[min(count - 1, int(0.99 * count))]


def serve(directory: Path, context: int) -> None:
    """Serve until standard input ends."""
    from transformers import AutoTokenizer

    from trl_steppo.assets import MINI_WIKI_POLICY
    from trl_steppo.gateway import EpisodeSpec, GatewayServer
    from trl_steppo.gateway.sampling import SamplerLoop
    from trl_steppo.gateway.tokens import ChatFormats
    from trl_steppo.inference.base import Sample, SamplingParams
    from trl_steppo.types import EpisodeLimits, StopReason, TokenIds

    class OneToken:
        """Answers at once."""

        async def sample(self, prompt_ids: Any, params: Any, **names: Any) -> Sample:
            return Sample(TokenIds(params.stop_token_ids[:1]), (-1.0,), StopReason.STOP, 0)

        def release(self, episode_id: str) -> None:
            """Nothing is kept."""

        def pace(self, quiet: object) -> None:
            """Nothing is batched."""

    resource.setrlimit(resource.RLIMIT_NOFILE, (MAX_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    server = GatewayServer(
        ChatFormats(AutoTokenizer.from_pretrained(MINI_WIKI_POLICY)),
        store=directory / "sessions.sqlite",
        admin_key="admin",
        default=EpisodeSpec(EpisodeLimits(10**6), SamplingParams(1)),
        context=context,
    ).start()
    server.resume(SamplerLoop(OneToken()))
    print(server.port, flush=True)
    sys.stdin.read()
    server.close()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
