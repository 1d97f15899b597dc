"""The client that agents have of their own session: sync and async, its errors, and what it imports."""

from __future__ import annotations

import asyncio
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest

from tests.gateway.session_client import USER
from trl_steppo.commands.speakers import Conversation, Endpoint
from trl_steppo.errors import ConfigurationError
from trl_steppo.gateway.client import AsyncSession, Session, SessionError, SessionInfo
from trl_steppo.inference import SamplingParams


def test_an_agent_pays_its_steps_and_ends_its_episode(client):
    for base_url in (client.server.base_url, client.server.origin, f"{client.server.base_url}/"):
        assert Session(base_url, client.key).info().steps == 0
    session = Session(client.server.base_url, client.key)
    first = client.chat([USER]).json()["id"]
    client.say([USER, USER])
    assert session.reward(0.5) == 1
    assert session.reward(0.25, step=first, state_key="a", observation="warm") == 0
    assert session.reward(0.75, step=0) == 0  # instead of 0.25
    info = session.finish(reward=2, metrics={"moves": 3}, terminated=True)
    assert info == SessionInfo(client.session.session_id, 2, True, max_interaction_steps=info.max_interaction_steps)
    assert session.finish(reward=9.0) == info  # it is over
    episode = client.session.episode()
    assert [step.reward for step in episode.steps] == [0.75, 2.5]
    assert (episode.steps[0].info, episode.steps[0].observation) == ({"state_key": "a"}, "warm")
    assert (episode.metrics["moves"], episode.terminated) == (3.0, True)


def test_async_agents(client):
    async def play() -> SessionInfo:
        session = AsyncSession(client.server.base_url, client.key)
        assert await session.reward(0.5) == 0
        assert (await session.info()).steps == 1
        return await session.abort("no more")

    client.say([USER])
    info = asyncio.run(play())
    assert (info.is_over, info.error, info.steps_left) == (True, "no more", (info.max_interaction_steps or 0) - 1)
    assert client.session.episode().error == "no more"


@pytest.mark.parametrize("name", ["STEPPO_SESSION_URL", "OPENAI_BASE_URL"])
def test_a_command_finds_its_session_in_its_environment(client, monkeypatch, name):
    for other in ("STEPPO_SESSION_URL", "OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(other, raising=False)
    with pytest.raises(ConfigurationError, match=r"`STEPPO_SESSION_URL` is not in the environment; a trainer"):
        Session.from_env()
    urls = {
        "STEPPO_SESSION_URL": f"{client.server.origin}/sessions/{client.session.session_id}",
        "OPENAI_BASE_URL": client.server.base_url,
    }
    monkeypatch.setenv(name, urls[name])
    with pytest.raises(ConfigurationError, match="`OPENAI_API_KEY` is not in the environment"):
        AsyncSession.from_env()
    monkeypatch.setenv("OPENAI_API_KEY", client.key)
    assert Session.from_env().info().id == client.session.session_id


def test_errors_say_what_to_do(client):
    session = Session(client.server.base_url, client.key)
    with pytest.raises(SessionError, match=r"does not have any step yet.*\(HTTP 404\)") as refused:
        session.reward(1.0)
    assert refused.value.status == 404
    with pytest.raises(ConfigurationError, match="`reward` is nan; give a finite number"):
        session.reward(float("nan"))
    with pytest.raises(ConfigurationError, match="metrics"):
        session.finish(metrics={"x": float("inf")})
    with pytest.raises(SessionError, match="this key is not valid here"):
        Session(client.server.base_url, "sk-other").info()
    with pytest.raises(ConfigurationError, match="`base_url` is 'localhost'; give the gateway's"):
        Session("localhost", "key")
    with pytest.raises(ConfigurationError, match="`api_key` is empty"):
        Session(client.server.base_url, "")
    session.abort("broken")
    with pytest.raises(SessionError, match=r"the session of this key is over.*it failed: broken") as over:
        session.reward(1.0)
    assert (over.value.status, over.value.code) == (401, "session_over")


class Flaky(http.server.BaseHTTPRequestHandler):
    """Fails twice, and answers then."""

    num_requests: ClassVar[int] = 0

    def do_POST(self) -> None:
        type(self).num_requests += 1
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200 if self.num_requests == 3 else 503)
        self.end_headers()
        self.wfile.write(b'{"step": 4}' if self.num_requests == 3 else b"busy")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def flaky(monkeypatch) -> Iterator[str]:
    monkeypatch.setattr("trl_steppo.gateway.client._FIRST_PAUSE_S", 0.001)
    with serving(Flaky) as url:
        yield url


class Redirects(http.server.BaseHTTPRequestHandler):
    """Sends every request elsewhere, on the same server, and notes what came."""

    seen: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.seen.append(self.path)
        self.send_response(302)
        self.send_header("location", f"http://localhost:{self.server.server_port}/stolen")  # type: ignore[attr-defined]
        self.end_headers()

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    server = http.server.HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_key_goes_to_one_address():
    """The clients of agents and of `trl-steppo try` follow no redirect."""
    Redirects.seen.clear()
    endpoint_error = r"chat/completions answered 302: a redirect from .* to http://localhost:\d+/stolen, which is not"
    with serving(Redirects) as url:
        for call in (Session(url, "sk-1").info, Session(url, "sk-1").finish):
            with pytest.raises(SessionError, match=r"HTTP 302: a redirect from .* to http://localhost") as refused:
                call()
            assert refused.value.status == 302
        with pytest.raises(ConfigurationError, match=endpoint_error):
            asyncio.run(Endpoint(url, "m", api_key="sk-2").reply(Conversation([], [], ()), SamplingParams(9)))
    assert Redirects.seen == ["/sessions/current", "/sessions/current/finish", "/v1/chat/completions"]


def test_what_may_pass_is_tried_again(flaky, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # not for this machine
    monkeypatch.setenv("no_proxy", "")
    assert Session(flaky, "key").reward(1.0) == 4
    assert Flaky.num_requests == 3


def test_a_gateway_that_is_gone(monkeypatch):
    monkeypatch.setattr("trl_steppo.gateway.client._FIRST_PAUSE_S", 0.001)
    with pytest.raises(SessionError, match=r"does not answer.*The gateway of a trainer serves while it plays"):
        Session("http://127.0.0.1:1/v1", "key").info()


def test_an_agent_s_process_loads_nothing_heavy():
    heavy = ("torch", "transformers", "starlette", "pydantic", "numpy", "httpx")
    code = f"import sys, trl_steppo.gateway.client; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
