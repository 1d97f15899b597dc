"""Scripts that are run in forked processes end as those of an interpreter do."""

from __future__ import annotations

import fcntl

import pytest

from tests.warm import WarmProcess, run_script

ENDS = """
import atexit, sys, threading, time
atexit.register(print, "exit function")
threading.Thread(target=lambda: (time.sleep(0.2), print("thread"))).start()
{end}
"""


@pytest.mark.parametrize(
    ("end", "status", "error"),
    [("", 0, ""), ("sys.exit(3)", 3, ""), ("sys.exit('wrong')", 1, "wrong"), ("1 / 0", 1, "ZeroDivisionError")],
)
def test_a_forked_script_ends_as_under_an_interpreter(end, status, error):
    done = run_script(ENDS.format(end=end), timeout=120)
    assert (done.returncode, done.stdout) == (status, "thread\nexit function\n")
    assert error in done.stderr


STARTS_ANOTHER = """
import fcntl, subprocess, sys, threading
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)  # it is held as long as a process has the file
subprocess.Popen(["sleep", "600"], pass_fds=[file.fileno()])
file.write("started")
file.flush()
threading.Event().wait()
"""


def test_a_script_that_takes_too_long_ends_with_its_processes(tmp_path, monkeypatch):
    file = tmp_path / "held"
    file.touch()
    join = WarmProcess.join

    def until_it_has_started(process: WarmProcess, timeout: float | None = None) -> None:
        while timeout is not None and not file.read_text():
            join(process, 0.05)
        if timeout is None:
            join(process)

    monkeypatch.setattr(WarmProcess, "join", until_it_has_started)
    assert run_script(STARTS_ANOTHER, file, timeout=1).returncode == -9
    with file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # would wait for the other process
