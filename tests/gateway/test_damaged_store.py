"""A store that is damaged, or not wholly there: what can be read is, and the rest is named."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
import httpx

from tests.gateway.gateway_policy import Policy, echo, make_spec, start
from trl_steppo.errors import CheckpointError
from trl_steppo.gateway.store import Store


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A store of two running sessions, `good` and `bad`, with two steps each; and their keys."""
    path = tmp_path_factory.mktemp("made") / "s.sqlite"
    server = start(Policy(echo), store=path)
    keys = {}
    for name in ("good", "bad"):
        _, keys[name] = server.call(server.gateway.open_session(make_spec(), name=name))
        messages: list[Any] = [{"role": "user", "content": name}]
        for _ in range(2):
            answer = ask(server, keys[name], messages).json()["choices"][0]["message"]
            messages += [answer, {"role": "user", "content": "on"}]
    server.close()
    assert [file.name for file in path.parent.iterdir() if file.suffix != ".lock"] == [path.name]
    return path, keys


@pytest.fixture
def path(made, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copy(made[0], tmp_path))


@pytest.fixture
def keys(made) -> dict[str, str]:
    return made[1]


def ask(server: Any, key: str, messages: Any) -> httpx.Response:
    body = {"model": "m", "messages": messages}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.origin}/v1/chat/completions", json=body, headers=headers, timeout=60)


def edit(path: Path, statement: str, *values: Any) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TEMP VIEW bad AS SELECT id FROM sessions WHERE name = 'bad'")
    connection.execute(statement, values)
    connection.commit()
    connection.close()


def change(column: str, make: Callable[[Any], Any]) -> Callable[[Path], None]:
    """What `make` returns for the JSON in a column of the bad session, or of its second step."""

    def damage(path: Path) -> None:
        where = "steps WHERE session IN bad AND position = 1" if column == "body" else "sessions WHERE name = 'bad'"
        connection = sqlite3.connect(path)
        connection.execute("CREATE TEMP VIEW bad AS SELECT id FROM sessions WHERE name = 'bad'")
        (text,) = connection.execute(f"SELECT {column} FROM {where}").fetchone()
        connection.close()
        value = make(json.loads(text))
        table, _, condition = where.partition(" ")
        edit(path, f"UPDATE {table} SET {column} = ? {condition}", value if isinstance(value, bytes) else dumps(value))

    return damage


def dumps(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def having(**changes: Any) -> Callable[[Any], Any]:
    return lambda data: {**data, **changes}


def lacking(name: str) -> Callable[[Any], Any]:
    return lambda data: {key: value for key, value in data.items() if key != name}


def of_answer(**changes: Any) -> Callable[[Any], Any]:
    return lambda data: {**data, "answer": {**data["answer"], **changes}}


def of_limits(**changes: Any) -> Callable[[Any], Any]:
    return lambda data: {**data, "limits": {**data["limits"], **changes}}


DAMAGES: list[tuple[str, Callable[[Any], Any]]] = [
    ("body", lambda data: json.dumps(data)[:-20]),
    ("body", lambda data: "[]"),
    ("body", lambda data: b"\xff\xfe"),
    ("body", lacking("response_ids")),
    ("body", lacking("answer")),
    ("body", having(new_field=1)),
    ("body", having(parent=7)),
    ("body", having(parent=-1)),
    ("body", having(key="no hex")),
    ("body", having(stop_reason="sunset")),
    ("body", having(response_ids="")),
    ("body", having(new_ids="AAA=")),
    ("body", having(logprobs="")),
    ("body", having(temperature="hot")),
    ("body", having(temperature=float("nan"))),
    ("body", having(observed=3)),
    ("body", having(text_length="long")),
    ("body", of_answer(tool_calls=3)),
    ("body", of_answer(text=None)),
    ("body", of_answer(new_field=1)),
    ("spec", lambda data: "null"),
    ("spec", lacking("sampling")),
    ("spec", having(new_field=1)),
    ("spec", of_limits(max_interaction_steps="five")),
    ("spec", of_limits(new_field=1)),
    ("notes", lambda data: "{"),
    ("notes", lambda data: "[" * 100_000),
    ("notes", having(new_field=1)),
    ("notes", having(undelivered=[9])),
    ("notes", having(rewards={"9": 1.0})),
    ("notes", having(rewards={"zero": 1.0})),
    ("notes", having(rewards={"0": "much"})),
    ("notes", having(final_reward=float("inf"))),
    ("notes", having(stop_reason="sunset")),
    ("notes", having(created="now")),
]


@pytest.mark.parametrize(("column", "make"), DAMAGES)
def test_a_damaged_session_is_left_out_and_named(path, keys, caplog, column, make):
    change(column, make)(path)
    server = start(Policy(echo), store=path)
    try:
        assert [session.episode_id for session in server.gateway.sessions] == ["good"]
        assert "'bad'" in caplog.text
        assert ask(server, keys["good"], [{"role": "user", "content": "new"}]).status_code == 200
        assert ask(server, keys["bad"], [{"role": "user", "content": "new"}]).status_code == 401
    finally:
        server.close()


def test_a_session_that_lacks_a_step_is_left_out(path, caplog):
    edit(path, "DELETE FROM steps WHERE session IN bad AND position = 0")
    server = start(Policy(echo), store=path)
    assert [session.episode_id for session in server.gateway.sessions] == ["good"]
    assert "a step of it is missing" in caplog.text
    server.close()


def test_a_damaged_episode_is_played_again(path):
    edit(path, "UPDATE sessions SET is_over = 1")
    change("body", having(parent=7))(path)
    server = start(Policy(echo), store=path)
    assert server.gateway.finished_episode("good", make_spec()) is not None
    assert server.gateway.finished_episode("bad", make_spec()) is None
    server.close()


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    path.write_bytes(data)


FILES: list[tuple[Callable[[Path], Any], str]] = [
    (lambda path: path.write_bytes(b""), "is empty, which no store is"),
    (lambda path: path.write_bytes(b"not a database" * 100), "not a database"),
    (truncate, "cannot be read: .* move it away"),
    (overwrite, "cannot be read: .* move it away"),
    (lambda path: edit(path, "DROP TABLE steps"), "table steps has the columns"),
    (lambda path: edit(path, "ALTER TABLE sessions RENAME COLUMN notes TO remarks"), "table sessions has the columns"),
    (lambda path: edit(path, "PRAGMA user_version = 99"), "has the format 99"),
]


@pytest.mark.parametrize(("damage", "problem"), FILES)
def test_a_damaged_file_is_refused_with_the_cure(path, damage, problem):
    damage(path)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=problem):
        Store(path)
    assert path.read_bytes() == before


def test_a_file_that_is_damaged_later_is_told_in_our_words(path):
    store = Store(path)
    edit(path, "DROP TABLE steps")
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.named("good")
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.keep_finished("1/").result()
    store.close()


def test_a_store_that_was_being_made_is_made_anew(tmp_path):
    path = tmp_path / "s.sqlite"
    path.with_name("s.sqlite.partial").write_bytes(b"half")
    store = Store(path)
    assert store.running() == []
    store.close()
    assert (path.stat().st_mode & 0o777) == 0o600
