"""Files and directories that are whole or not there, and locks that a process holds until its end."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trl_steppo import durable
from trl_steppo.durable import Lock, LockedError

# -- locks ------------------------------------------------------------------------------------------------------------


def test_a_lock_is_held_by_one_process_at_a_time(tmp_path):
    path = tmp_path / "lock"
    lock = Lock(path)
    with pytest.raises(LockedError, match=f"held by process {os.getpid()} on "):
        Lock(path)
    lock.close()
    lock.close()
    assert not path.exists()
    Lock(path).close()


HOLDS = """
import os, sys, time
from pathlib import Path
from trl_steppo.durable import Lock
lock = Lock(Path(sys.argv[1]))
if os.fork() == 0:  # lives on, and holds nothing
    print(flush=True)
time.sleep(60)
"""


def test_a_lock_is_released_when_its_process_is_killed(tmp_path):
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDS, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            with pytest.raises(LockedError, match=f"process {process.pid} on "):
                Lock(path)
            process.kill()
            process.wait()
            Lock(path).close()
        finally:
            os.killpg(process.pid, 9)


def test_a_removed_lock_file_is_not_the_lock(tmp_path, monkeypatch):
    """Its holder let go of it between our opening it and our locking it."""
    path = tmp_path / "lock"
    flock, removed = fcntl.flock, []

    def removes(descriptor, how):
        flock(descriptor, how)
        if not removed:
            removed.append(path.unlink())

    monkeypatch.setattr(fcntl, "flock", removes)
    lock = Lock(path)
    with pytest.raises(LockedError):
        Lock(path)
    lock.close()


def test_a_file_system_without_locks_gets_a_warning(tmp_path, monkeypatch, caplog):
    def cannot(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    with caplog.at_level(logging.WARNING):
        Lock(tmp_path / "lock").close()
    assert "cannot be locked ([Errno" in caplog.text


# -- files and directories --------------------------------------------------------------------------------------------


def write_file(path: Path, text: str, **options: Any) -> None:
    with durable.file(path) as partial:
        partial.write_text(text)


def write_directory(path: Path, text: str, **options: Any) -> None:
    with durable.directory(path, replaces=True, **options) as partial:
        (partial / "folder").mkdir()
        (partial / "folder" / "a").write_text(text)
        (partial / "b").write_text(text)


def partial_file(path: Path) -> Path:
    """Where this process writes a file."""
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def read(path: Path) -> set[str]:
    return {p.read_text() for p in (path, *path.rglob("*")) if p.is_file()}


WRITERS = pytest.mark.parametrize("write", [write_file, write_directory])


@WRITERS
def test_what_is_written_gets_its_place(tmp_path, write):
    path = tmp_path / "new" / "place"
    for text in ("first", "second"):
        write(path, text)
        assert read(path) == {text}
        assert list(path.parent.iterdir()) == [path]


@WRITERS
@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails_at", ["write_text", "fsync", "replace"])
def test_what_fails_changes_nothing(tmp_path, monkeypatch, write, error, fails_at):
    path = tmp_path / "place"
    write(path, "first")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Path if fails_at == "write_text" else os, fails_at, fail)
        with pytest.raises(type(error)):
            write(path, "second")
    assert read(path) == {"first"}
    assert list(tmp_path.iterdir()) == [path]


@WRITERS
def test_what_a_killed_process_left_is_written_anew(tmp_path, write):
    path = tmp_path / "place"
    if write is write_file:
        partial_file(path).write_text("half")
    else:
        durable.partial_of(path).mkdir()
        (durable.partial_of(path) / "c").write_text("half")
    write(path, "whole")
    assert read(path) == {"whole"}
    assert list(tmp_path.iterdir()) == [path]


@WRITERS
@pytest.mark.parametrize("syncs", [True, False])
def test_all_is_on_the_disk_before_it_gets_its_place(tmp_path, monkeypatch, write, syncs):
    """In the order that a power cut asks for: content, then the name, then the folder that holds the name."""
    if write is write_file and not syncs:
        return
    path = tmp_path / "place"
    partial = partial_file(path) if write is write_file else durable.partial_of(path)
    replace, happened = os.replace, list[Path | str]()
    monkeypatch.setattr(durable, "sync", happened.append)
    monkeypatch.setattr(os, "replace", lambda *paths: (happened.append("replace"), replace(*paths)))
    write(path, "text", syncs=syncs)
    of_parts = [partial / "b", partial / "folder", partial / "folder" / "a"] if write is write_directory else []
    if syncs:
        assert sorted(happened[: len(of_parts)], key=str) == of_parts
        assert happened[len(of_parts) :] == [partial, "replace", tmp_path]
    else:
        assert happened == ["replace"]


@pytest.mark.parametrize("is_file", [True, False])
def test_a_directory_that_is_not_to_be_replaced_stays(tmp_path, is_file):
    path = tmp_path / "place"
    write_directory(path, "first")
    with (
        pytest.raises(OSError, match=r"Is a directory|not empty"),
        durable.file(path) if is_file else durable.directory(path) as partial,
    ):
        (partial if is_file else partial / "a").write_text("second")
    assert read(path) == {"first"}
    assert list(tmp_path.iterdir()) == [path]


def test_one_that_is_to_be_deleted_has_left_its_place(tmp_path):
    for text in ("first", "second"):
        write_directory(tmp_path / "place", text)
        retired = durable.retire(tmp_path / "place")
        assert read(retired) == {text}
        assert list(tmp_path.iterdir()) == [retired]
