"""Sessions on the disk: whole, and with one gateway at a time."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.gateway_policy import start
from tests.gateway.session_client import USER, Client
from trl_steppo.errors import CheckpointError
from trl_steppo.gateway.store import Store


def test_a_restarted_gateway_goes_on(tmp_path, policy):
    path = tmp_path / "s.sqlite"
    server = start(policy, store=path)
    client = Client(server)
    reply = client.say([USER])
    client.post("/sessions/current/reward", {"reward": 0.5})
    before = client.session.episode()
    server.close()
    server = start(policy, store=path, port=server.port)
    try:
        restored = server.gateway.find(client.session.session_id)
        assert restored.episode() == before
        assert client.chat([USER]).json()["choices"][0]["message"] == reply  # a retry, too
        client.say([USER, reply, USER])
        assert [step.history for step in restored.steps] == ["first", "continued"]
        assert restored.steps[1].parent == 0
    finally:
        server.close()


def test_a_store_has_one_gateway(tmp_path):
    path = tmp_path / "s.sqlite"
    store = Store(path)
    words = rf"is open in another gateway \(process {os.getpid()} on .*\), which holds .*s\.sqlite\.lock; stop that"
    with pytest.raises(CheckpointError, match=words):
        Store(path)
    store.close()
    Store(path).close()


@pytest.mark.parametrize(
    ("made_by", "problem"),
    [
        ("CREATE TABLE notes (text TEXT)", "is a database, but not of a gateway"),
        ("PRAGMA application_id = 7", "is a database, but not of a gateway"),
        ("PRAGMA user_version = 7", "has the format 7, and this version of trl_steppo reads 1"),
    ],
)
def test_a_database_of_others_is_left_as_it_is(tmp_path, made_by, problem):
    path = tmp_path / "s.sqlite"
    if "user_version" in made_by:
        Store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(made_by)
        connection.commit()
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=problem):
        Store(path)
    assert path.read_bytes() == before
