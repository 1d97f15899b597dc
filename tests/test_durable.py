"""Locks that a process holds until its end."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import subprocess
import sys

import pytest

from trl_steppo.durable import Lock, LockedError


def test_one_holds_it_at_a_time(tmp_path):
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


def test_it_goes_with_a_process_that_is_killed(tmp_path):
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


def test_one_that_was_removed_meanwhile_is_not_the_lock(tmp_path, monkeypatch):
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


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def cannot(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", cannot)
    with caplog.at_level(logging.WARNING):
        Lock(tmp_path / "lock").close()
    assert "cannot be locked ([Errno" in caplog.text
