"""A store that an earlier version wrote is read as that version read it, and written as it wrote it."""

from __future__ import annotations

import gzip
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.gateway_policy import END, TOKENIZER, Policy, echo, make_spec, start
from trl_steppo.episodes.json import plain_episode_json
from trl_steppo.gateway import GatewayServer

RECORDED = Path(__file__).parent / "recorded"  # by version 0.1.0: sessions that ended in every way, and two that run
EXPECTED = json.loads((RECORDED / "episodes.json").read_text())
EPISODES, KEYS = EXPECTED["episodes"], EXPECTED["keys"]
USER = {"role": "user", "content": "hello"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "sessions.sqlite"
    path.write_bytes(gzip.decompress((RECORDED / "sessions.sqlite.gz").read_bytes()))
    return path


@pytest.fixture
def policy() -> Policy:
    return Policy(echo)


@pytest.fixture
def server(path: Path, policy: Policy) -> Iterator[GatewayServer]:
    with closing(start(policy, store=path)) as server:
        yield server


def in_json(episode: Any) -> Any:
    return json.loads(json.dumps(plain_episode_json(episode)))


def ask(server: GatewayServer, name: str, messages: list[Any], **headers: str) -> httpx.Response:
    headers["authorization"] = f"Bearer {KEYS[name]}"
    body = {"model": "m", "messages": messages}
    return httpx.post(f"{server.base_url}/chat/completions", json=body, headers=headers, timeout=20)


@pytest.mark.parametrize("name", EPISODES)
def test_every_episode_is_what_it_was(server, name):
    (stored,) = server.store.named(name)
    session = server.gateway.find(stored.session_id)
    assert in_json(session.episode()) == EPISODES[name]
    assert session.is_over == (name not in KEYS)


def test_a_finished_episode_need_not_be_played_again(server):
    spec = make_spec(run_seed=3, stream_position=5, dataset_row=2)
    assert in_json(server.gateway.finished_episode("grows", spec)) == EPISODES["grows"]
    assert server.gateway.finished_episode("grows", make_spec()) is None
    assert server.gateway.finished_episode("aborted", make_spec()) is None


@pytest.mark.parametrize("name", KEYS)
def test_a_session_that_was_running_goes_on(server, policy, name):
    """A retry gets the recorded step, and a longer conversation continues it."""
    said = [echo_of(step) for step in EPISODES[name]["steps"]]
    messages = [USER, {"role": "assistant", "content": said[0], "refusal": None}, USER]
    retry = ask(server, name, messages, **{"x-stainless-retry-count": "1"}) if name == "runs" else None
    if retry is not None:
        assert retry.json()["choices"][0]["message"]["content"] == said[1]
        assert policy.asked == []
    answer = ask(server, name, [*messages, {"role": "assistant", "content": said[1]}, USER])
    assert answer.status_code == 200, answer.text
    (session,) = [session for session in server.gateway.sessions if session.episode_id == name]
    assert (session.steps[2].parent, session.steps[2].history) == (1, "continued")
    assert in_json(session.episode())["steps"][0] == EPISODES[name]["steps"][0]


def echo_of(step: Any) -> str:
    """What the policy said, as its client was told."""
    text: str = TOKENIZER.decode(step["response_ids"])
    return text.removesuffix(END)


def test_what_is_written_has_the_form_of_before(path, policy):
    """Notes that are written again are the same text; a new step has the fields of an old one."""
    notes = "SELECT notes, spec FROM sessions WHERE name = 'runs'"
    steps = "SELECT body FROM steps JOIN sessions ON session = id WHERE name = 'runs' ORDER BY position"
    notes_before, steps_before = rows(path, notes), rows(path, steps)
    with closing(start(policy, store=path)) as server:
        body, headers = {"reward": 0.5, "step": 0}, {"authorization": f"Bearer {KEYS['runs']}"}
        assert httpx.post(f"{server.origin}/sessions/current/reward", json=body, headers=headers).status_code == 200
        assert ask(server, "runs", [USER, USER]).status_code == 200
    assert rows(path, notes) == notes_before
    *earlier, (written,) = rows(path, steps)
    assert earlier == steps_before
    written, recorded = json.loads(written), json.loads(steps_before[-1][0])
    assert list(written) == list(recorded)
    assert list(written["answer"]) == list(recorded["answer"])


def rows(path: Path, query: str) -> list[Any]:
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute(query).fetchall()
