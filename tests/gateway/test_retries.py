"""Half steps, retries and pauses: a request is recorded once, or not at all."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
import threading
import time
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.gateway_policy import make_spec, start
from tests.gateway.session_client import FIRST, SECOND, USER, Client, Held, ask_again, hold, let_go, wait_until
from trl_steppo.gateway.sampling import SamplerLoop, SamplingPort
from trl_steppo.gateway.sessions import Delivery


def test_a_failing_sampler_leaves_nothing_behind(client, policy):
    policy.failures = 1
    assert client.chat([USER]).status_code == 502
    assert client.session.steps == []
    assert client.say([USER])["content"].startswith("0:")
    assert len(client.episode().steps) == 1


def test_a_store_that_cannot_write_leaves_no_half_step(server, client, monkeypatch):
    reply = client.say([USER])

    def fails(*step: Any) -> Any:
        return server.store._submit(lambda connection: connection.execute("INSERT INTO no_such_table VALUES (1)"))

    with monkeypatch.context() as patch:
        patch.setattr(server.store, "add_step", fails)
        refused = client.chat([USER, reply, USER])
        assert (refused.status_code, refused.json()["error"]["code"]) == (502, "store")
        assert len(client.session.steps) == 1
    with monkeypatch.context() as patch:
        patch.setattr(server.store, "set_notes", fails)
        assert client.post("/sessions/current/finish", {"reward": 1.0}).status_code == 500
        assert client.chat([USER]).status_code == 401
    assert client.post("/sessions/current/finish", {}).status_code == 200
    assert server.store.session(client.session.session_id).notes["final_reward"] == 1.0
    assert client.session.session_id not in server.gateway


def test_a_retry_is_recorded_once_and_gets_the_same(client, policy):
    first, second = client.chat([USER]), client.chat([USER])
    assert first.content == second.content
    assert len(policy.asked) == len(client.session.steps) == 1
    streams = [client.chat([USER], stream=True).content for _ in range(2)]
    assert streams[0] == streams[1]
    assert len(client.session.steps) == 2  # another body
    other = client.post("/v1/chat/completions", {"model": "m", "messages": [USER]}, **{"idempotency-key": "b"})
    assert other.json()["id"] != first.json()["id"]
    again = client.post("/v1/chat/completions", {"model": "m", "messages": [USER]}, **{"x-stainless-retry-count": "1"})
    assert again.content == first.content  # a client that says so is believed, however long ago it was
    assert len(client.episode().steps) == 3


def test_who_asks_for_the_first_time_gets_a_step_of_its_own(client, policy, server):
    """SDKs say how often they have tried: two calls are two samples, and a retry is none."""
    one, two = ask_again(client, FIRST), ask_again(client, FIRST)
    assert one != two
    assert ask_again(client, SECOND) == two
    server.call(hold(policy))
    ids: list[str] = []
    threads = [threading.Thread(target=lambda: ids.append(ask_again(client, FIRST))) for _ in range(2)]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(policy.asked) == 4)
    threads.append(threading.Thread(target=lambda: ids.append(ask_again(client, SECOND))))
    threads[-1].start()  # joins one of those that are on their way
    wait_until(lambda: server.gateway.monitor.retries._value.get() == 2)
    server.call(let_go(policy))
    for thread in threads:
        thread.join()
    assert len(set(ids)) == 2
    assert len({params.seed for _, params, _ in policy.asked}) == len(client.episode().steps) == 4


@pytest.mark.parametrize("headers", [{}, FIRST, SECOND], ids=["no header", "first", "second"])
def test_a_step_whose_client_was_not_told_is_the_next_ones(client, server, headers):
    """Wherever it stands; and two that ask for it do not both get it."""
    lost = ask_again(client, FIRST)
    position = client.session.steps[-1]
    client.say([USER, USER])
    client.session.deliveries[0] = Delivery.SENT
    client.session.told_of(position.answer, to_the_end=False)
    assert ask_again(client, headers) == lost
    assert ask_again(client, FIRST) != lost
    assert len(client.episode().steps) == 3


def test_a_step_that_was_recorded_for_nobody_is_the_next_ones(client, server, monkeypatch):
    held = Held(server, monkeypatch)
    body = {"model": "m", "messages": [USER]}
    with pytest.raises(httpx.ReadTimeout):
        client.http.post("/v1/chat/completions", json=body, headers=FIRST, timeout=0.5)
    assert held.is_asked.wait(20)
    (flight,) = server.gateway._responders[client.session.session_id].flights
    wait_until(lambda: flight.num_waiting == 0)
    held.is_free.set()
    wait_until(lambda: Delivery.LOST in client.session.deliveries)
    assert ask_again(client, FIRST) == f"chatcmpl-{client.session.steps[0].answer.answer_id}"
    assert len(client.episode().steps) == 1


def test_a_real_client_that_tries_again_doubles_no_step(client, policy, server):
    openai = pytest.importorskip("openai", reason="needs the extra `openai`")
    policy.failures = 1
    with openai.OpenAI(base_url=server.base_url, api_key=client.key, max_retries=2) as sdk:
        ids = [sdk.chat.completions.create(model="m", messages=[USER]).id for _ in range(2)]
        assert len(set(ids)) == len(client.session.steps) == 2
        server.call(hold(policy))
        thread = threading.Thread(
            target=lambda: wait_until(lambda: len(policy.asked) == 5) or server.call(let_go(policy))
        )
        thread.start()
        with sdk.with_options(timeout=0.5) as hasty:
            ids.append(hasty.chat.completions.create(model="m", messages=[USER]).id)
        thread.join()
    assert [f"chatcmpl-{step.answer.answer_id}" for step in client.session.steps] == ids
    assert len(client.episode().steps) == 3


def test_retries_in_flight_share_one_step(client, policy, server):
    server.call(hold(policy))
    replies: list[bytes] = []
    threads = [threading.Thread(target=lambda: replies.append(client.chat([USER]).content)) for _ in range(3)]
    for thread in threads:
        thread.start()
    wait_until(lambda: server.gateway.monitor.retries._value.get() == 2)
    server.call(let_go(policy))
    for thread in threads:
        thread.join()
    assert len(set(replies)) == 1
    assert len(replies) == 3
    assert len(client.episode().steps) == 1


def test_a_client_that_goes_away_leaves_nothing_behind(client, policy, server):
    server.call(hold(policy))
    with pytest.raises(httpx.ReadTimeout):
        client.http.post("/v1/chat/completions", json={"model": "m", "messages": [USER]}, timeout=0.5)
    wait_until(lambda: server.gateway.num_in_flight(client.session) == 0)
    server.call(let_go(policy))
    assert client.session.steps == []
    client.say([USER])
    assert [step.step_index for step in client.episode().steps] == [0]


def test_an_end_and_a_disconnection_at_once_leave_no_exception_behind(server, client, policy, caplog):
    server.call(hold(policy))
    with pytest.raises(httpx.ReadTimeout):
        client.http.post("/v1/chat/completions", json={"model": "m", "messages": [USER]}, timeout=0.5)
    other = Client(server)
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        body = json.dumps({"model": "m", "messages": [USER]}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {other.key}\r\n"
        connection.sendall(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.gateway.num_in_flight(other.session))

        async def end_both() -> None:
            """The handler's request, and what it waits for, in one turn of the loop."""
            coroutines = {t: t.get_coro().__qualname__ for t in asyncio.all_tasks()}
            (asked,) = [t for t, name in coroutines.items() if name == "Gateway.respond"]
            (flight,) = [t for t, name in coroutines.items() if name == "Responder._step"]
            flight.cancel()
            await asyncio.wait([flight])
            asked.cancel()

        server.call(end_both())
    wait_until(lambda: not server.gateway.num_in_flight(other.session))
    gc.collect()
    assert "never retrieved" not in caplog.text


# -- pauses -----------------------------------------------------------------------------------------------------------


def test_requests_wait_while_weights_change(client, policy, server):
    server.pause()
    assert client.http.get("/healthz").json() == {"status": "paused"}
    replies: list[int] = []
    thread = threading.Thread(target=lambda: replies.append(client.chat([USER]).status_code))
    thread.start()
    time.sleep(0.2)
    assert policy.asked == []
    server.resume(SamplerLoop(policy))
    thread.join()
    assert replies == [200]


def test_a_pause_that_is_too_long_tells_when_to_try_again(policy):
    server = start(policy, max_wait_s=0.05)
    try:
        server.pause()
        client = Client(server)
        refused = client.chat([USER])
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert client.session.steps == []
    finally:
        server.close()


def test_a_pause_waits_for_what_is_in_flight(client, policy, server):
    server.call(hold(policy))
    thread = threading.Thread(target=client.chat, args=([USER],))
    thread.start()
    wait_until(lambda: policy.asked)
    paused = server.submit(server.gateway.port.pause())
    time.sleep(0.1)
    assert not paused.done()
    server.call(let_go(policy))
    paused.result(timeout=10)
    thread.join()
    assert len(client.session.steps) == 1


def test_who_was_let_through_too_late_waits_for_the_next_engine(policy):
    """A pause that comes between the call and its turn is a pause."""

    async def run() -> int:
        port = SamplingPort(max_wait_s=20.0)
        resumed, calls = port._resumed, []

        async def told_too_early() -> None:
            calls.append(port.is_paused)
            if len(calls) > 1:
                await resumed()

        port._resumed = told_too_early
        asked = asyncio.ensure_future(port.sample([1], make_spec().sampling, session_id="a", order=(0, 0, 0)))
        await asyncio.sleep(0.05)
        await port.resume(SamplerLoop(policy))
        await asked
        return len(policy.asked)

    assert asyncio.run(run()) == 1
