"""Clients that send too much, or nothing at all, do not delay the others."""

from __future__ import annotations

import asyncio
import resource
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.gateway_policy import ADMIN, TOKENIZER, Policy, echo, make_spec, start
from tests.gateway.wire import chat_body
from trl_steppo.errors import ConfigurationError
from trl_steppo.gateway.connections import ConnectionLimits
from trl_steppo.gateway.limits import BodyLimits, check_structure
from trl_steppo.inference.base import Sample, SamplingParams

CONTEXT = 2048


HI = {"role": "user", "content": "hi"}
MOST = BodyLimits(max_bytes=2**25)  # so that something else refuses


@pytest.fixture
def policy() -> Policy:
    return Policy(echo)


@pytest.fixture
def server(policy):
    server = start(policy, context=CONTEXT)
    yield server
    server.close()


def open_client(server: Any, **settings: Any) -> httpx.Client:
    _, key = server.call(server.gateway.open_session(make_spec(**settings)))
    return httpx.Client(base_url=server.origin, headers={"authorization": f"Bearer {key}"}, timeout=60)


# -- what a body may consist of ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/completions"])
@pytest.mark.parametrize("item", [{}, {"role": 1}, {"type": "odd"}, -3, [[]], None])
def test_of_many_mistakes_the_first_is_told(policy, path, item):
    server = start(policy, limits=MOST)
    client = open_client(server)
    field = {"/v1/responses": "input", "/v1/completions": "prompt"}.get(path, "messages")
    try:
        response = client.post(path, json={"model": "m", "max_tokens": 9, field: [item] * 2000})
        assert response.status_code == 400
        assert len(response.content) < 1000
    finally:
        server.close()


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999"])
def test_numbers_that_are_none_are_refused_wherever_they_stand(server, number):
    client = open_client(server)
    use = b'{"type": "tool_use", "id": "a", "name": "f", "input": {"x": [%s]}}' % number
    body = b'{"model": "m", "max_tokens": 5, "messages": [{"role": "assistant", "content": [%s]}, ' % use
    body += b'{"role": "user", "content": "hi"}]}'
    assert client.post("/v1/messages", content=body).status_code == 400
    assert client.post("/sessions/current/reward", content=b'{"reward": %s}' % number).status_code == 400
    observation = b'{"reward": 1, "observation": [{"x": %s}]}' % number
    assert client.post("/sessions/current/reward", content=observation).status_code == 400


# -- the context ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a " * 2500}]}),
        ("/v1/messages", {"max_tokens": 5, "messages": [{"role": "user", "content": "a " * 2500}]}),
        ("/v1/responses", {"input": "a " * 2500}),
        ("/v1/completions", {"prompt": "a " * 2500}),
        ("/v1/completions", {"prompt": [5] * 5000}),
        ("/v1/completions", {"prompt": [5] * CONTEXT}),
    ],
)
def test_a_prompt_beyond_the_context_is_refused_with_the_numbers(server, policy, path, body):
    client = open_client(server)
    response = client.post(path, json={"model": "m", **body})
    assert response.status_code == 400
    error = response.json()["error"]
    assert error.get("code", "context_length_exceeded") == "context_length_exceeded"
    assert str(CONTEXT) in error["message"]
    assert not policy.asked
    assert client.post("/v1/chat/completions", json={"model": "m", "messages": [HI]}).status_code == 200  # it goes on


def test_a_response_gets_what_the_context_leaves(server, policy):
    client = open_client(server, response_length=200)
    response = client.post("/v1/completions", json={"model": "m", "prompt": [5] * (CONTEXT - 3)})
    assert response.json()["choices"][0]["finish_reason"] == "length"
    ((prompt_ids, params, _),) = policy.asked
    assert len(prompt_ids) + params.max_new_tokens == CONTEXT
    assert client.post("/v1/chat/completions", json={"model": "m", "messages": [HI]}).status_code == 200  # it goes on


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 30_000}]}),
        ("/v1/completions", {"prompt": "a" * 30_000}),
    ],
)
def test_a_long_text_that_cannot_fit_is_never_tokenized(server, monkeypatch, path, body):
    client = open_client(server)
    chat = server.gateway.formats.of(())
    for name in ("render", "append", "encode_text"):
        monkeypatch.setattr(chat, name, None)
    monkeypatch.setattr("trl_steppo.chat.chat_format.characters_per_token", lambda tokenizer: 10)
    response = client.post(path, json={"model": "m", **body})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "context_length_exceeded"
    assert "at least 3000" in response.json()["error"]["message"]


# -- others -----------------------------------------------------------------------------------------------------------


class Held:
    """Functions that do not return before they are let go."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()

    def around(self, function: Any) -> Any:
        def held(*args: Any, **names: Any) -> Any:
            self.begun.set()
            assert self.go.wait(60)
            return function(*args, **names)

        return held


def long_text(length: int = 20_000) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "a" * length}]


@pytest.mark.parametrize("name", ["check_structure", "render", "prefix_keys"])
def test_others_are_served_while_a_long_body_is_worked_on(policy, monkeypatch, name):
    server = start(policy)
    held = Held()
    homes = {
        "check_structure": ("trl_steppo.gateway.bodies", check_structure),
        "prefix_keys": ("trl_steppo.gateway.placement", sys.modules["trl_steppo.gateway.placement"].prefix_keys),
    }
    hostile, other = open_client(server), open_client(server)
    body = {"model": "m", "messages": [HI]}
    assert other.post("/v1/chat/completions", json=body).status_code == 200
    if name == "render":
        chat = server.gateway.formats.of(())
        real = chat.render
        monkeypatch.setattr(chat, name, lambda m: held.around(real)(m) if len(m[0]["content"]) > 999 else real(m))
    else:
        module, real = homes[name]
        only_long = lambda *args: (held.around(real) if len(str(args)) > 9999 else real)(*args)  # noqa: E731
        monkeypatch.setattr(f"{module}.{name}", only_long)
    answers: list[httpx.Response] = []
    long_body = {"model": "m", "messages": long_text()}
    thread = threading.Thread(target=lambda: answers.append(hostile.post("/v1/chat/completions", json=long_body)))
    thread.start()
    try:
        assert held.begun.wait(60)
        assert httpx.get(f"{server.origin}/healthz").status_code == 200
        assert other.post("/v1/chat/completions", json=body).status_code == 200
        assert not answers
    finally:
        held.go.set()
        thread.join()
        server.close()
    assert answers[0].status_code == 200


def test_long_requests_are_recorded_as_short_ones_are(server):
    """In a conversation that becomes long, and in retries that meet while its new part is tokenized."""
    client = open_client(start_with_room := start(Policy(echo)))
    messages: list[Any] = long_text()
    for step in range(3):
        body = {"model": "m", "messages": messages}
        message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
        assert message["content"].startswith(f"{step}:")
        messages += [message, {"role": "user", "content": "b" * 20_000}]
    (session,) = start_with_room.gateway.sessions
    assert [step.history for step in session.steps] == ["first", "continued", "continued"]
    assert TOKENIZER.decode(session.state_ids(2)).count("b" * 20_000) == 2
    start_with_room.close()


def test_retries_of_a_long_request_share_one_step(policy):
    server = start(policy)
    client = open_client(server)
    body = {"model": "m", "messages": long_text()}
    answers: list[bytes] = []
    ask = lambda: answers.append(client.post("/v1/chat/completions", json=body).content)  # noqa: E731
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(answers)) == 1
    assert len(policy.asked) == 1
    server.close()


def test_one_client_has_one_piece_of_work_at_a_time(policy, monkeypatch):
    """What others send is not behind all that one client has sent."""
    server = start(policy)
    held, order = Held(), []
    real = server.gateway.formats.of(()).render
    chat = server.gateway.formats.of(())

    def render(messages: Any) -> Any:
        order.append(messages[0]["content"][0])
        return held.around(real)(messages)

    monkeypatch.setattr(chat, "render", render)
    hostile, other = open_client(server), open_client(server)

    def ask(client: httpx.Client, letter: str, number: int) -> None:
        content = letter * (20_000 + number)
        client.post("/v1/chat/completions", json={"model": "m", "messages": [{"role": "user", "content": content}]})

    threads = [threading.Thread(target=ask, args=(hostile, "h", number)) for number in range(5)]
    threads[0].start()
    assert held.begun.wait(60)

    def turns() -> list[Any]:
        return [session.turn for session in server.gateway.sessions if session.turn.locked()]

    (turn,) = turns()
    for thread in threads[1:]:
        thread.start()
    threads.append(threading.Thread(target=ask, args=(other, "o", 0)))
    threads[-1].start()
    while "o" not in order and len(turns()) < 2:  # the other's has arrived
        time.sleep(0.01)
    held.go.set()
    for thread in threads:
        thread.join()
    assert order.count("h") == 5
    assert order.index("o") < 5
    server.close()
    assert not turn.locked()


class Cancelled(Policy):
    """Samples until it is given up."""

    def __init__(self) -> None:
        super().__init__(echo)
        self.begun, self.given_up = threading.Event(), threading.Event()

    async def sample(self, prompt_ids: Any, params: SamplingParams, **names: Any) -> Sample:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.given_up.set()
            raise
        raise AssertionError


@pytest.mark.parametrize("stream", [False, True])
def test_sampling_that_nobody_waits_for_stops(stream):
    policy = Cancelled()
    server = start(policy)
    _, key = server.call(server.gateway.open_session(make_spec()))
    body = chat_body(HI, stream=stream)
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\ncontent-length: {len(body)}"
    )
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(head.encode() + b"\r\n\r\n" + body)
        assert policy.begun.wait(60)
    assert policy.given_up.wait(60)
    server.close()


# -- who connects -----------------------------------------------------------------------------------------------------


def connect(server: Any) -> socket.socket:
    return socket.create_connection((server.host, server.port), timeout=60)


def is_served(server: Any) -> bool:
    return httpx.get(f"{server.origin}/healthz", timeout=60).status_code == 200


def read_all(client: socket.socket) -> bytes:
    parts = []
    try:
        while part := client.recv(2**16):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


@pytest.fixture(params=["httptools", "h11"])
def parser(request, monkeypatch):
    if request.param == "h11":
        monkeypatch.setitem(sys.modules, "uvicorn.protocols.http.httptools_impl", None)
    return request.param


def limits(**changes: Any) -> ConnectionLimits:
    return ConnectionLimits(**{"max_connections": 8, "backlog": 16, **changes})


def test_silent_connections_make_way(policy, parser):
    server = start(policy, connections=limits())
    client = open_client(server)
    assert client.get("/v1/models").status_code == 200  # and stays connected
    silent = [connect(server) for _ in range(20)]
    assert read_all(silent[0]) == b""  # the first to come is the first to go
    assert client.get("/v1/models").status_code == 200
    assert is_served(server)
    assert len(server.connections.opened) <= 8
    server.close()


def test_requests_at_work_are_never_given_up_for_others(parser):
    policy = Cancelled()
    server = start(policy, connections=limits(max_connections=2))
    _, key = server.call(server.gateway.open_session(make_spec()))
    body = chat_body(HI)
    working = []
    for number in range(2):
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nidempotency-key: {number}\r\n"
        head += f"authorization: Bearer {key}\r\ncontent-length: {len(body)}\r\n\r\n"
        working.append(connect(server))
        policy.begun.clear()
        working[-1].sendall(head.encode() + body)
        assert policy.begun.wait(60)
    late = connect(server)
    assert read_all(late).startswith(b"HTTP/1.1 503")
    assert not policy.given_up.is_set()
    for client in working:
        client.close()
    assert policy.given_up.wait(60)
    server.close()


@pytest.mark.parametrize(
    "head",
    [
        b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: ",
        b"GET /",
        b"GET /healthz HTTP/1.1\r\nhost: a\r\n" + b"x: y\r\n" * 500,
    ],
)
def test_a_header_that_never_ends_is_refused(policy, parser, head):
    server = start(policy, connections=limits(max_header_bytes=2000))
    with connect(server) as client:
        try:
            client.sendall(head)
            for _ in range(1000):
                client.sendall(b"a" * 1000)
        except OSError:
            pass
        answer = read_all(client)
        assert answer == b"" or answer.split(b"\r\n")[0].split()[1] in (b"431", b"400")
    assert is_served(server)
    server.close()


@pytest.mark.parametrize(
    "begun", [b"", b"GET /heal", b"POST /sessions HTTP/1.1\r\nhost: a\r\ncontent-length: 9\r\n\r\n{"]
)
def test_a_request_has_to_be_whole_in_time(policy, parser, begun):
    server = start(policy, connections=limits(max_request_s=0.05))
    with connect(server) as client:
        client.sendall(begun)
        answer = read_all(client)  # which ends: it was closed
        assert answer == b"" or answer.split()[1] in (b"408", b"401")
    assert is_served(server)
    server.close()


def test_a_response_may_take_longer_than_a_request(parser):
    server = start(Policy(echo, token_s=0.02), connections=limits(max_request_s=0.05))
    client = open_client(server)
    for _ in range(2):
        assert client.post("/v1/chat/completions", content=chat_body(HI)).status_code == 200
    server.close()


def test_a_refused_body_leaves_its_connection_usable(policy, parser):
    server = start(policy, context=CONTEXT, connections=limits(max_request_s=30))
    client = open_client(server)
    for _ in range(3):
        assert client.post("/v1/chat/completions", content=b"x" * 500_000).status_code == 413
        assert client.post("/v1/chat/completions", content=chat_body(HI)).status_code == 200
    server.close()


def test_a_header_may_begin_behind_a_long_body(policy, parser):
    """In one piece with its end."""
    server = start(policy, connections=limits(max_header_bytes=500))
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 4000\r\n\r\n"
    with connect(server) as client:
        client.sendall(head + b"x" * 1000)
        assert b" 401 " in client.recv(2**16)  # before it is whole
        client.sendall(b"x" * 3000 + b"GET /healthz HT")
        client.sendall(b"TP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert b" 200 " in read_all(client)
    server.close()


def test_connections_are_bounded_by_the_files_of_the_process():
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    found = ConnectionLimits.of_process()
    assert found.max_connections + 2 * found.backlog < files
    with pytest.raises(ConfigurationError, match="`max_connections` is 0"):
        ConnectionLimits.of_process(0)


SERVE_WITH_FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from tests.gateway.gateway_policy import Policy, echo, start
server = start(Policy(echo))
print(server.port, flush=True)
sys.stdin.read()
server.close()
"""


def test_more_silent_connections_than_files(tmp_path):
    """400 of them under a limit of 256 files: others are served."""
    command = [sys.executable, "-c", SERVE_WITH_FEW_FILES]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    assert process.stdout is not None
    address = ("127.0.0.1", int(process.stdout.readline()))
    silent: list[socket.socket] = []
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{address[1]}", timeout=60) as client:
            for number in range(400):
                silent.append(socket.create_connection(address, timeout=60))
                if number % 100 == 99:
                    assert client.get("/healthz").status_code == 200
            admin = {"authorization": f"Bearer {ADMIN}"}
            assert client.post("/sessions", json={}, headers=admin).status_code == 201
    finally:
        for one in silent:
            one.close()
        process.stdin.close()
        assert process.wait(60) == 0
