"""Sessions and their steps on the disk: what a client has seen is there after a kill or a power cut."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from .. import durable
from ..durable import Lock, LockedError
from ..errors import CheckpointError

T = TypeVar("T")

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS sessions (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, key_digest TEXT NOT NULL, spec TEXT NOT NULL, notes TEXT NOT NULL,
    is_over INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS sessions_by_name ON sessions (name);
CREATE INDEX IF NOT EXISTS sessions_by_key ON sessions (key_digest);
CREATE TABLE IF NOT EXISTS steps (
    session TEXT NOT NULL, position INTEGER NOT NULL, body TEXT NOT NULL, PRIMARY KEY (session, position)
) WITHOUT ROWID;
"""
_APPLICATION_ID = 0x53745050  # "StPP", as `PRAGMA application_id` of our databases
_FORMAT = 1  # of what they hold
_COLUMNS = {
    "sessions": ["id", "name", "key_digest", "spec", "notes", "is_over"],
    "steps": ["session", "position", "body"],
}
_MOST_AT_ONCE = 512  # writes of one transaction


@dataclass(frozen=True)
class StoredSession:
    """One session as it is on the disk; `steps` in order."""

    session_id: str
    name: str
    key_digest: str
    spec: dict[str, Any]
    notes: dict[str, Any]
    is_over: bool
    steps: tuple[dict[str, Any], ...]


class Store:
    """
    A database that one thread of one process writes: what came in while it was busy goes into one transaction, with
    one sync.

    Args:
        path (`Path`, *optional*):
            The database's file, for its owner's eyes alone; `None`: in memory.

    A session whose record is damaged is left out of what is read, and named in a warning.

    Raises:
        CheckpointError: It cannot be opened, is damaged, is no database of ours, or another gateway has it open; from
            what reads, if its file was damaged since.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._jobs: queue.SimpleQueue[tuple[Callable[[sqlite3.Connection], Any], Future[Any]] | None]
        self._jobs = queue.SimpleQueue()
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._work, args=(opened,), name="gateway store", daemon=True)
        self._thread.start()
        try:
            opened.result()
        except (sqlite3.OperationalError, OSError) as error:
            raise CheckpointError(f"the gateway's store {path} cannot be opened: {error}") from error
        except sqlite3.DatabaseError as error:
            raise self._damage(error) from error

    def add_session(
        self, session_id: str, name: str, key_digest: str, spec: dict[str, Any], notes: dict[str, Any]
    ) -> Future[Any]:
        """A new session."""
        row = (session_id, name, key_digest, json.dumps(spec), json.dumps(notes))
        return self._write("INSERT INTO sessions (id, name, key_digest, spec, notes) VALUES (?, ?, ?, ?, ?)", row)

    def add_step(self, session_id: str, position: int, body: dict[str, Any]) -> Future[Any]:
        """A whole step, or nothing."""
        return self._write("INSERT INTO steps VALUES (?, ?, ?)", (session_id, position, json.dumps(body)))

    def set_notes(self, session_id: str, notes: dict[str, Any], *, is_over: bool) -> Future[Any]:
        """What is known of a session beside its steps."""
        row = (json.dumps(notes), is_over, session_id)
        return self._write("UPDATE sessions SET notes = ?, is_over = ? WHERE id = ?", row)

    def remove(self, session_id: str) -> Future[Any]:
        """Forget a session."""

        def run(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM steps WHERE session = ?", (session_id,))
            connection.execute("DELETE FROM sessions WHERE id = ?", (session_id,))

        return self._submit(run)

    def keep_finished(self, *prefixes: str) -> Future[Any]:
        """Forget all sessions but the finished ones whose names begin with one of these."""
        begins = " OR ".join(["substr(name, 1, ?) = ?"] * len(prefixes)) or "0"
        values = [value for prefix in prefixes for value in (len(prefix), prefix)]
        return self._forget(f"is_over = 0 OR NOT ({begins})", values)

    def forget(self, prefix: str) -> Future[Any]:
        """Forget all sessions whose names begin like this."""
        return self._forget("substr(name, 1, ?) = ?", [len(prefix), prefix])

    def _forget(self, where: str, values: Sequence[Any]) -> Future[Any]:
        def run(connection: sqlite3.Connection) -> None:
            connection.execute(f"DELETE FROM steps WHERE session IN (SELECT id FROM sessions WHERE {where})", values)
            connection.execute(f"DELETE FROM sessions WHERE {where}", values)

        return self._submit(self._undamaged(run))

    def named(self, name: str) -> list[StoredSession]:
        """The sessions of one name, oldest first."""
        return self._submit(self._undamaged(lambda connection: list(_load(connection, "name = ?", (name,))))).result()

    def session(self, session_id: str) -> StoredSession | None:
        """The session of that id."""
        read = self._undamaged(lambda connection: next(_load(connection, "id = ?", (session_id,)), None))
        return self._submit(read).result()

    def of_key(self, key_digest: str) -> Future[StoredSession | None]:
        """The session whose key has that digest."""
        read = self._undamaged(lambda connection: next(_load(connection, "key_digest = ?", (key_digest,)), None))
        return self._submit(read)

    def running(self) -> list[StoredSession]:
        """The sessions that are not over."""
        return self._submit(self._undamaged(lambda connection: list(_load(connection, "is_over = 0", ())))).result()

    def close(self) -> None:
        """Write what is left, and close."""
        self._jobs.put(None)
        self._thread.join()

    def _undamaged(self, job: Callable[[sqlite3.Connection], T]) -> Callable[[sqlite3.Connection], T]:
        """A job that says in words of ours what sqlite has to say of a damaged file."""

        def run(connection: sqlite3.Connection) -> T:
            try:
                return job(connection)
            except sqlite3.DatabaseError as error:
                raise self._damage(error) from error

        return run

    def _damage(self, error: Exception) -> CheckpointError:
        what = " ".join(str(error).split())
        return CheckpointError(
            f"the gateway's store {self.path} cannot be read: {what}. If its disk is sound, the file is damaged: "
            "move it away, with those beside it that end in -wal and -shm, to begin with an empty one; the sessions "
            "that were running are lost, and a run plays its episodes again"
        )

    def _write(self, statement: str, row: Sequence[Any]) -> Future[Any]:
        return self._submit(lambda connection: connection.execute(statement, row))

    def _submit(self, job: Callable[[sqlite3.Connection], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        self._jobs.put((job, future))
        return future

    # -- the writing thread -------------------------------------------------------------------------------------------

    def _work(self, opened: Future[None]) -> None:
        with ExitStack() as stack:
            try:
                connection = self._open(stack)
            except BaseException as error:
                stack.close()
                opened.set_exception(error)
                return
            self._serve(connection, opened)

    def _serve(self, connection: sqlite3.Connection, opened: Future[None]) -> None:
        opened.set_result(None)
        is_open = True
        while is_open:
            jobs = [self._jobs.get()]
            while len(jobs) < _MOST_AT_ONCE and not self._jobs.empty():
                jobs.append(self._jobs.get())
            _run_together(connection, [job for job in jobs if job is not None])
            is_open = None not in jobs

    def _open(self, stack: ExitStack) -> sqlite3.Connection:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            stack.callback(_locked(self.path).close)
            if self.path.exists():
                _check_length(self.path)
            else:
                _create(self.path)
        connection = sqlite3.connect(self.path or ":memory:", isolation_level=None)
        stack.callback(connection.close)
        # So that what is no text in a column of text is found out where it is read.
        connection.text_factory = _text
        if self.path is None:
            _set_up(connection)
        else:
            _check_format(connection, self.path)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
        return connection


def _text(data: bytes) -> str | bytes:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _set_up(connection: sqlite3.Connection) -> None:
    connection.executescript(_SCHEMA)
    connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
    connection.execute(f"PRAGMA user_version = {_FORMAT}")


def _create(path: Path) -> None:
    """Make an empty store. It is there as a whole or not at all, so that a file that is not whole is damaged."""
    with durable.file(path) as partial:
        os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        with closing(sqlite3.connect(partial, isolation_level=None)) as connection:
            connection.execute("PRAGMA synchronous = FULL")
            _set_up(connection)


def _check_length(path: Path) -> None:
    if path.is_file() and path.stat().st_size == 0:
        raise CheckpointError(
            f"the gateway's store {path} is empty, which no store is: what it held is lost. Put back a copy of it, or "
            "remove it, with those beside it that end in -wal and -shm, to begin with an empty one"
        )


def _locked(path: Path) -> Lock:
    """A file beside the database that one gateway holds for as long as it is open, or lives."""
    try:
        return Lock(path.with_name(path.name + ".lock"))
    except LockedError as error:
        raise CheckpointError(
            f"the gateway's store {path} is open in another gateway ({error.holder}), which holds {error.path}; stop "
            "that one, or give this one a directory of its own"
        ) from error


def _check_format(connection: sqlite3.Connection, path: Path) -> None:
    """Nothing is written into a database that is not ours, or is not whole."""
    (application_id,), (version,) = (
        connection.execute(query).fetchone() for query in ("PRAGMA application_id", "PRAGMA user_version")
    )
    if application_id != _APPLICATION_ID:
        raise CheckpointError(f"{path} is a database, but not of a gateway; give the gateway a directory of its own")
    if version != _FORMAT:
        raise CheckpointError(
            f"the gateway's store {path} has the format {version}, and this version of trl_steppo reads {_FORMAT}; go "
            "on with the version that wrote it, or give the gateway a new directory"
        )
    for table, columns in _COLUMNS.items():
        found = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        if found != columns:
            raise sqlite3.DatabaseError(f"its table {table} has the columns {found}, not {columns}")
    (problem,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    if problem != "ok":
        raise sqlite3.DatabaseError(problem)


def _run_together(
    connection: sqlite3.Connection, jobs: Sequence[tuple[Callable[[sqlite3.Connection], Any], Future[Any]]]
) -> None:
    """In one transaction; or, where one of them fails, each in its own, so that it takes none of the others along."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        results = [job(connection) for job, _ in jobs]
        connection.execute("COMMIT")
    except Exception as error:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        if len(jobs) == 1:
            _tell(jobs[0][1].set_exception, error)
        else:
            for job in jobs:
                _run_together(connection, [job])
    else:
        for (_, future), result in zip(jobs, results, strict=True):
            _tell(future.set_result, result)


def _tell(tell: Callable[[Any], None], outcome: Any) -> None:
    with suppress(InvalidStateError):  # nobody waits for it any more
        tell(outcome)


def _load(connection: sqlite3.Connection, where: str, values: Sequence[Any]) -> Iterator[StoredSession]:
    """The sessions that can be read."""
    columns = ", ".join(_COLUMNS["sessions"])
    for row in connection.execute(f"SELECT {columns} FROM sessions WHERE {where} ORDER BY rowid", values).fetchall():
        query = "SELECT position, body FROM steps WHERE session = ? ORDER BY position"
        found = connection.execute(query, (row[0],)).fetchall()
        try:
            yield _read(row, found)
        except (TypeError, ValueError, RecursionError) as error:
            report_damage(row[0], row[1], error)


def _read(row: Sequence[Any], found: Sequence[tuple[Any, Any]]) -> StoredSession:
    session_id, name, digest, spec, notes, is_over = row
    if not all(isinstance(text, str) for text in row[:5]):
        raise ValueError("a column holds no text")
    if any(position != index for index, (position, _) in enumerate(found)):
        raise ValueError("a step of it is missing")
    steps = tuple(_object(body) for _, body in found)
    return StoredSession(session_id, name, digest, _object(spec), _object(notes), bool(is_over), steps)


def _object(text: str) -> dict[str, Any]:
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError("what should be an object is none")
    return value


async def written(future: Future[Any]) -> None:
    """Wait until something is in the store. Who stops waiting does not keep it from being written."""
    await asyncio.shield(asyncio.wrap_future(future))


def report_damage(session_id: str, name: str, error: Exception) -> None:
    """Tell which session is left out, because its record cannot be read."""
    logger.warning(
        "session %r (%r) is left out: its record in the gateway's store is damaged, or of another version (%s: %s)",
        session_id,
        name,
        type(error).__name__,
        error,
    )
