"""The gateway over HTTP: keys, odd clients, and what they are told."""

from __future__ import annotations

import logging
import socket
import stat
import threading
from contextlib import closing

import httpx
import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.gateway_policy import ADMIN, start
from tests.gateway.session_client import USER, Client, wait_until
from trl_steppo.errors import ConfigurationError
from trl_steppo.gateway import app
from trl_steppo.gateway.dialect import Dialect
from trl_steppo.gateway.openai import ChatBody


@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"x-api-key": "wrong"}, {"x-api-key": ""}])
def test_without_a_key_there_is_401_and_nothing_else(server, headers):
    Client(server)
    for method, path in [
        *(("POST", f"/v1/{name}") for name in ("chat/completions", "completions", "responses", "messages")),
        ("GET", "/v1/models"),
        ("POST", "/sessions"),
        ("POST", "/sessions/current/finish"),
        ("GET", "/sessions/current/episode"),
    ]:
        refused = httpx.request(method, server.origin + path, headers=headers, content=b"{")
        assert refused.status_code == 401
        assert "not valid" in refused.json()["error"]["message"]


def test_a_foreign_key_is_no_key(server):
    one, two = Client(server), Client(server)
    one.say([USER])
    session = one.session.session_id
    for path in ("reward", "finish", "abort"):
        assert two.post(f"/sessions/{session}/{path}", {"reward": 9.0}).status_code == 401
    assert two.http.get(f"/sessions/{session}/episode").status_code == 401
    assert one.http.get(f"/sessions/{session}").json()["steps"] == 1


def test_the_admins_key_opens_reads_and_removes_sessions(server):
    admin = httpx.Client(base_url=server.origin, headers={"authorization": f"Bearer {ADMIN}"})
    opened = admin.post("/sessions", json={"max_interaction_steps": 1, "name": "a"}).json()
    body = {"model": "m", "messages": [USER]}
    own = {"authorization": f"Bearer {opened['api_key']}"}
    assert httpx.post(f"{opened['base_url']}/chat/completions", json=body, headers=own).status_code == 200
    path = f"/sessions/{opened['id']}"
    admin.post(f"{path}/finish", json={"reward": 1.5})
    recorded = admin.get(f"{path}/episode").json()
    assert (recorded["episode_id"], recorded["steps"][0]["reward"]) == ("a", 1.5)
    assert admin.delete(path).status_code == 200
    assert admin.get(f"{path}/episode").status_code == 404


def test_keys_are_nowhere_but_with_their_owners(tmp_path, policy, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    server = start(policy, store=tmp_path / "store" / "s.sqlite")
    try:
        client = Client(server)
        client.say([USER])
        client.chat([USER], nonsense=1)
        policy.failures = 1
        client.chat([USER, USER])
        metrics = client.http.get("/metrics").text
        secret = client.key.encode()
        for file in (tmp_path / "store").iterdir():
            assert secret not in file.read_bytes()
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert client.key not in metrics + caplog.text + "".join(capfd.readouterr())
        assert ADMIN not in metrics + caplog.text
    finally:
        server.close()


def test_an_error_that_an_agent_tells_has_no_key(server, client):
    client.say([USER])
    client.post("/sessions/current/abort", {"error": f"401 for {client.key}"})
    assert client.session.episode().error == "401 for [key]"
    assert client.key not in str(server.store.session(client.session.session_id))


def test_it_listens_on_this_machine_alone(server):
    assert server.host == "127.0.0.1"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_gateway_that_cannot_start_leaves_nothing_open(policy, server, monkeypatch):
    """A port that is taken; a server that ends while it starts."""
    before = threading.active_count()
    with pytest.raises(ConfigurationError, match="choose another port"):
        start(policy, port=server.port)
    assert threading.active_count() == before
    monkeypatch.setattr("uvicorn.Server.startup", lambda self, sockets: 1 / 0)
    with pytest.raises(ConfigurationError, match="did not start"):
        start(policy)
    assert threading.active_count() == before


# -- odd clients ------------------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_413(policy):
    server = start(policy, max_body_bytes=1000)
    try:
        client = Client(server)
        assert client.chat([{"role": "user", "content": "x" * 2000}]).status_code == 413
        chunks = (b"x" * 600 for _ in range(3))
        assert client.http.post("/v1/chat/completions", content=chunks).status_code == 413
    finally:
        server.close()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"a":' * 5000, b'{"model": "\\ud800"}', b'{"model": NaN}'],
    ids=["empty", "cut", "list", "null", "no text", "deep", "half a character", "NaN"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/sessions/current/reward"])
def test_odd_bodies_are_the_clients_mistake(client, path, content):
    assert client.http.post(path, content=content).status_code == 400


@pytest.mark.parametrize("path", ["/%00", "/v1/chat/completions/", "/v1//models", "/sessions/%2e%2e/finish", "/%ff"])
def test_odd_paths_are_no_failure_of_ours(client, path):
    assert client.http.get(path).status_code < 500
    assert client.post(path, {}).status_code < 500
    assert client.http.put("/v1/models").status_code == 405


@pytest.mark.parametrize(
    "header",
    [
        b"content-length: -5",
        b"content-length: 5, 6",
        b"authorization: Bearer",
        b"authorization: \xff\xfe",
        b"x: " + b"y" * 70000,
        b"transfer-encoding: chunked\r\ncontent-length: 5",
        b": nameless",
        b"authorization: Bearer a\r\nauthorization: b",
    ],
    ids=lambda header: header[:20].decode("latin-1"),
)
def test_odd_headers_are_no_failure_of_ours(server, header):
    with socket.create_connection((server.host, server.port), timeout=5) as connection:
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n" + header + b"\r\n\r\n")
        status = connection.recv(4096).split(b" ")[1:2]
    assert status in ([b"400"], [b"401"], [b"431"], [])  # the last: hung up


@pytest.mark.parametrize("system", [{}, {"system": "be brief"}])
def test_a_response_that_its_client_has_begun_is_refused(client, system):
    """Anthropic's clients mean the beginning of the answer, which no turn that is over can be."""
    messages = [USER, {"role": "assistant", "content": "{"}]
    refused = client.post("/v1/messages", {"model": "m", "max_tokens": 5, "messages": messages, **system})
    assert refused.status_code == 400
    assert "`messages`" in refused.json()["error"]["message"]
    assert client.session.steps == []
    assert client.say(messages)  # those of OpenAI's ask for a message that follows


def test_null_is_as_good_as_absent(client):
    nulls = {"modalities": None, "prediction": None}
    messages = [{**USER, "cache_hint": None}, {"role": "user", "content": [{"type": "text", "text": "x", "id": None}]}]
    assert client.say(messages, **nulls)
    body = {"model": "m", "max_tokens": 5, "messages": messages, "container": None}
    assert client.post("/v1/messages", body).status_code == 200
    items = [{"type": "function_call", "call_id": "a", "name": "f", "arguments": "{}", "created_by": None}]
    items.append({"type": "function_call_output", "call_id": "a", "output": "x", "created_by": None})
    body = {"model": "m", "input": items, "previous_response_id": None, "prompt": None}
    assert client.post("/v1/responses", body).status_code == 200
    schema = {"type": "object", "properties": {"x": {"default": None}}}  # not ours to change
    tool = {"type": "function", "function": {"name": "f", "parameters": schema, "deprecated": None}}
    assert client.say([USER], tools=[tool], prediction=None)
    refused = client.chat([USER], tools=[tool], prediction={"a": None})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prediction")


def test_a_client_that_leaves_while_it_uploads_is_no_failure_of_ours(server, client, caplog):
    with socket.create_connection((server.host, server.port), timeout=20) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {client.key}\r\n"
        connection.sendall(head.encode() + b"content-length: 100\r\n\r\n{")
        wait_until(lambda: client.http.get("/healthz").status_code == 200)
    count = 'steppo_gateway_requests_total{route="/v1/chat/completions",status="499"} 1.0'
    wait_until(lambda: count in client.http.get("/metrics").text)
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


# -- APIs -------------------------------------------------------------------------------------------------------------


def test_one_more_api_is_one_dialect(policy, monkeypatch):
    """It has a route, refusals and streams of its own form, and a place in the description."""
    dialect = Dialect(
        "/v9/say",
        "One more",
        ChatBody,
        whole=lambda answer, body: {"said": answer.text},
        stream=lambda answer, body: iter([answer.text.encode()]),
        error=lambda error: {"problem": error.message},
        error_event=lambda error: error.message.encode(),
    )
    monkeypatch.setattr(app, "DIALECTS", (*app.DIALECTS, dialect))
    with closing(start(policy)) as server:
        client = Client(server)
        body = {"model": "m", "messages": [USER]}
        said = client.post("/v9/say", body).json()["said"]
        assert said.startswith("0:")
        assert client.post("/v9/say", {**body, "stream": True}).text.startswith("1:")
        assert client.post("/v9/say", {**body, "top_p": 0.5}).json()["problem"].startswith("`top_p` restricts")
        assert "/v9/say" in client.http.get("/openapi.json").json()["paths"]
        assert len(client.episode().steps) == 2
