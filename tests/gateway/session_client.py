"""A session of a gateway and its client, over HTTP; and what tests wait for."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import httpx

from tests.gateway.gateway_policy import TOKENIZER, Policy, make_spec
from trl_steppo.gateway import EpisodeSpec, GatewayServer
from trl_steppo.gateway.conversation import Answer, ModelRequest
from trl_steppo.gateway.flights import Retry
from trl_steppo.types import Episode

USER = {"role": "user", "content": "hello"}
SEARCH = {
    "type": "function",
    "function": {"name": "search", "parameters": {"type": "object", "properties": {"query": {"type": "string"}}}},
}
FIRST, SECOND = {"x-stainless-retry-count": "0"}, {"x-stainless-retry-count": "1"}


class Client:
    """One session of a gateway, over HTTP."""

    def __init__(self, server: GatewayServer, spec: EpisodeSpec | None = None) -> None:
        self.server = server
        self.session, self.key = server.call(server.gateway.open_session(spec or make_spec()))
        self.http = httpx.Client(base_url=server.origin, headers={"authorization": f"Bearer {self.key}"}, timeout=20)

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        return self.http.post(path, json=body, headers=headers)

    def chat(self, messages: list[Any], **body: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"model": "m", "messages": messages, **body})

    def say(self, messages: list[Any], **body: Any) -> dict[str, Any]:
        response = self.chat(messages, **body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]

    def episode(self) -> Episode:
        self.server.call(self.server.gateway.finish(self.session))
        return self.session.episode()


def text(ids: Any) -> str:
    return TOKENIZER.decode(list(ids))


def ask_again(client: Client, headers: dict[str, str]) -> str:
    response = client.post("/v1/chat/completions", {"model": "m", "messages": [USER]}, **headers)
    assert response.status_code == 200, response.text
    return response.json()["id"]


async def ask_untold(client: Client) -> Answer:
    """A step that is recorded, and whose client is not there to hear of it."""
    request = ModelRequest("m", messages=(USER,))
    return (await client.server.gateway.respond(client.session, request, Retry("a request"))).answer


async def hold(policy: Policy) -> None:
    policy.gate = asyncio.Event()


async def let_go(policy: Policy) -> None:
    assert policy.gate is not None
    policy.gate.set()


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Held:
    """A store that writes no step until it is told to."""

    def __init__(self, server: GatewayServer, monkeypatch: Any) -> None:
        self.is_asked, self.is_free = threading.Event(), threading.Event()
        add_step = server.store.add_step

        def held(*step: Any) -> Any:
            self.is_asked.set()
            return server.store._submit(lambda _: self.is_free.wait(20)) and add_step(*step)

        monkeypatch.setattr(server.store, "add_step", held)
