"""Streams whose responses take long: no client gives them up, and what fails early still has its status."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.gateway_policy import Policy, echo, start
from tests.gateway.session_client import USER, Client, hold, let_go, wait_until
from trl_steppo.gateway import GatewayServer
from trl_steppo.gateway.conversation import Answer
from trl_steppo.gateway.delivery import ReplyResponse
from trl_steppo.gateway.openai import CHAT_COMPLETIONS, ChatBody
from trl_steppo.gateway.responder import Reply
from trl_steppo.gateway.sampling import SamplerLoop

HEARTBEAT_S = 0.05


class Breaks(Policy):
    """Fails after it was held."""

    async def sample(self, prompt_ids, params, **names):
        self.asked.append((list(prompt_ids), params, names["order"]))
        assert self.gate is not None
        await self.gate.wait()
        raise OSError("the engine is broken")


@pytest.fixture
def policy() -> Policy:
    return Policy(echo)


@pytest.fixture
def server(policy: Policy) -> Iterator[GatewayServer]:
    server = start(policy, heartbeat_s=HEARTBEAT_S)
    yield server
    server.close()


@pytest.fixture
def patient(policy: Policy) -> Iterator[GatewayServer]:
    """A gateway whose streams never begin late."""
    server = start(policy, heartbeat_s=60.0)
    yield server
    server.close()


@pytest.fixture
def client(server: GatewayServer) -> Client:
    return Client(server)


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [USER], "stream": True, **changes}


def open_stream(stack: ExitStack, client: Client, **changes: Any) -> tuple[httpx.Response, Iterator[str]]:
    response = stack.enter_context(client.http.stream("POST", "/v1/chat/completions", json=body(**changes)))
    return response, response.iter_lines()


def test_a_stream_begins_while_its_response_is_sampled(client, policy, server):
    """Comments until it is there; then all that a quick stream sends."""
    server.call(hold(policy))
    with ExitStack() as stack:
        response, lines = open_stream(stack, client, temperature=0.5)
        assert (response.status_code, response.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert [next(lines) for _ in range(6)] == [": sampling", ""] * 3
        assert client.session.steps == []
        server.call(let_go(policy))
        rest = [line for line in lines if line not in (": sampling", "")]
    assert rest[0] == ": temperature is 1, as the run samples"
    again = client.post("/v1/chat/completions", body(temperature=0.5))
    assert rest[1:] == [line for line in again.text.splitlines() if line]
    assert len(policy.asked) == len(client.episode().steps) == 1


def test_a_quick_stream_says_nothing_of_waiting(patient):
    client = Client(patient)
    answer = client.post("/v1/chat/completions", body())
    assert answer.headers["x-request-id"] == client.session.steps[0].answer.answer_id
    assert ": sampling" not in answer.text


@contextmanager
def let_go_later(server: GatewayServer, policy: Policy, after_s: float) -> Iterator[None]:
    """The policy holds what it is asked for so long."""
    server.call(hold(policy))

    def let_it_go() -> None:
        wait_until(lambda: policy.asked)
        time.sleep(after_s)
        server.call(let_go(policy))

    thread = threading.Thread(target=let_it_go)
    thread.start()
    yield
    thread.join()


def stream_openai(sdk: Any, client: Client, timeout: float) -> str:
    with sdk.OpenAI(base_url=client.server.base_url, api_key=client.key, timeout=timeout, max_retries=0) as one:
        chunks = one.chat.completions.create(**body())
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def stream_responses(sdk: Any, client: Client, timeout: float) -> str:
    with (
        sdk.OpenAI(base_url=client.server.base_url, api_key=client.key, timeout=timeout, max_retries=0) as one,
        one.responses.stream(model="m", input="hello") as events,
    ):
        return events.get_final_response().output_text


def stream_anthropic(sdk: Any, client: Client, timeout: float) -> str:
    with (
        sdk.Anthropic(base_url=client.server.origin, api_key=client.key, timeout=timeout, max_retries=0) as one,
        one.messages.stream(model="m", max_tokens=50, messages=[USER]) as events,
    ):
        return "".join(events.text_stream)


CLIENTS = {
    "openai": ("openai", stream_openai),
    "openai responses": ("openai", stream_responses),
    "anthropic": ("anthropic", stream_anthropic),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_real_clients_wait_longer_than_their_time_limit(name, client, policy, server):
    module, stream = CLIENTS[name]
    sdk = pytest.importorskip(module, reason="needs the extra `agents`")
    with let_go_later(server, policy, 4.5):
        assert stream(sdk, client, 3.0).startswith("0:")
    assert len(client.episode().steps) == 1


@pytest.mark.parametrize("name", CLIENTS)
def test_a_failure_in_a_stream_that_has_begun_is_told_as_an_event(name, client, server):
    """Clients raise it, and nothing is recorded."""
    module, stream = CLIENTS[name]
    sdk = pytest.importorskip(module, reason="needs the extra `agents`")
    policy = Breaks(echo)
    server.resume(SamplerLoop(policy))
    with let_go_later(server, policy, 1.0), pytest.raises(sdk.APIError, match="sampling failed: OSError") as error:
        stream(sdk, client, 20.0)
    assert not isinstance(error.value, sdk.InternalServerError), "the stream had begun"
    assert client.session.steps == []


def test_a_failure_before_a_stream_has_begun_keeps_its_status(policy, patient):
    policy.failures, client = 1, Client(patient)
    assert client.post("/v1/chat/completions", body()).status_code == 502
    assert client.post("/v1/chat/completions", body(top_p=0.5)).status_code == 400
    assert client.post("/v1/chat/completions", body(), authorization="Bearer another").status_code == 401
    assert policy.asked != []
    assert client.session.steps == []


def test_a_held_stream_can_still_be_told_when_to_try_again(policy):
    """A stream does not begin while weights change: a status and a header are what clients try again by."""
    server = start(policy, heartbeat_s=HEARTBEAT_S, max_wait_s=0.5)
    try:
        server.pause()
        refused = Client(server).post("/v1/chat/completions", body())
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
    finally:
        server.close()


def test_a_client_that_goes_away_while_it_waits_leaves_nothing_behind(client, policy, server):
    server.call(hold(policy))
    with ExitStack() as stack:
        _, lines = open_stream(stack, client)
        assert next(lines) == ": sampling"
        assert server.gateway.num_in_flight(client.session) == 1
    wait_until(lambda: server.gateway.num_in_flight(client.session) == 0)
    server.call(let_go(policy))
    assert client.session.steps == []
    client.say([USER])
    assert len(client.episode().steps) == 1


def test_a_client_that_goes_away_while_it_is_told_is_heard_of():
    """So that its step is left out, unless a retry gets it."""
    answer = Answer("a", 0, "m", "hello", (), "", "stop", None, 1, 0, 1, (), ())
    sent: list[bytes] = []
    heard: list[tuple[Answer, bool]] = []
    dialect = replace(CHAT_COMPLETIONS, stream=lambda answer, body: iter([b"first", b"second"]))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        asked, gone = loop.create_future(), loop.create_future()

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))
            if message.get("body") == b"first":
                gone.set_result(None)

        late = ReplyResponse(
            dialect,
            ChatBody.model_validate(body()),
            asked,
            gone,
            on_told=lambda answer, is_told: heard.append((answer, is_told)),
            heartbeat_s=HEARTBEAT_S,
        )
        asked.set_result(Reply(answer, ("a note",)))
        await late({}, None, send)

    asyncio.run(run())
    assert sent == [b"", b": a note\n\n", b"first"]
    assert heard == [(answer, False)]
