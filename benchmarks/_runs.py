"""Runs of an example script: each a process of its own, as a user starts it. A run that is there is not repeated."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _record import current_commit

EXAMPLES = Path(__file__).parents[1] / "examples"
LAUNCHER = ("-m", "accelerate.commands.launch", "--num_processes", "1")

_SECONDS = "seconds.txt"  # written when a run is over, and well: its mark
_COMMIT = "commit.txt"  # written when it starts: figures may be read under another
_POLL_S = 0.2


@dataclass(frozen=True)
class Run:
    """
    A run, to do or done.

    Args:
        arguments (`tuple[str, ...]`):
            What Python is started with: a script and its flags.
        output_dir (`Path`):
            Where the run writes; its output goes to `log.txt` there.
    """

    arguments: tuple[str, ...]
    output_dir: Path

    @property
    def is_finished(self) -> bool:
        """Whether it need not be played again."""
        return (self.output_dir / _SECONDS).is_file()

    @property
    def seconds(self) -> float:
        """What it took."""
        return float((self.output_dir / _SECONDS).read_text())

    @property
    def commit(self) -> str | None:
        """The code it ran."""
        path = self.output_dir / _COMMIT
        return (path.read_text().strip() or None) if path.is_file() else None

    @property
    def command(self) -> str:
        """What a user types for the same run."""
        here = os.path.relpath(Path(__file__).parents[1])
        return shlex.join(["python", *(argument.removeprefix(f"{here}/") for argument in self.arguments)])

    def history(self) -> list[dict[str, Any]]:
        """Everything it logged."""
        logged: list[dict[str, Any]] = json.loads((self.output_dir / "trainer_state.json").read_text())["log_history"]
        return logged


def example_run(
    script: str,
    output_dir: Path,
    flags: Mapping[str, Any],
    *,
    switches: Sequence[str] = (),
    launcher: Sequence[str] = (),
) -> Run:
    """
    A run of one of the examples.

    Args:
        script (`str`):
            Its name in `examples/`.
        output_dir (`Path`):
            Where it writes.
        flags (`Mapping[str, Any]`):
            Its flags, without the dashes.
        switches (`Sequence[str]`, *optional*):
            More of them, as on the command line.
        launcher (`Sequence[str]`, *optional*):
            What starts the script: nothing, or `LAUNCHER`.
    """
    given = [part for name, value in {**flags, "output_dir": output_dir}.items() for part in (f"--{name}", str(value))]
    return Run((*launcher, os.path.relpath(EXAMPLES / script), *switches, *given), output_dir)


def play(
    runs: Iterable[Run],
    *,
    parallel: int = 1,
    num_threads: int | None = None,
    on_finish: Callable[[Run], None] = lambda run: None,
) -> list[Run]:
    """
    Play the runs that are not finished, in their order. One that was stopped half-way begins anew.

    Args:
        runs (`Iterable[Run]`):
            The runs.
        parallel (`int`, *optional*, defaults to `1`):
            Most at a time.
        num_threads (`int`, *optional*):
            Threads of each. `None`: as PyTorch chooses.
        on_finish (`Callable`, *optional*):
            Called with each run once it is finished, with those that were before, too.

    Returns:
        `list[Run]`: Those that failed. Their logs say why.
    """
    waiting = deque(runs)
    playing: dict[Run, tuple[subprocess.Popen[bytes], float]] = {}
    failed = []
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        while waiting or playing:
            while waiting and len(playing) < parallel:
                run = waiting.popleft()
                if run.is_finished:
                    on_finish(run)
                else:
                    playing[run] = _start(run, num_threads), time.perf_counter()
            for run, (process, start) in list(playing.items()):
                if process.poll() is None:
                    continue
                del playing[run]
                if process.returncode == 0:
                    _mark_finished(run, time.perf_counter() - start)
                    on_finish(run)
                else:
                    failed.append(run)
            if playing:
                time.sleep(_POLL_S)
    finally:
        for process, _ in playing.values():
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        signal.signal(signal.SIGTERM, before)
    return failed


def refuse_failures(failed: Sequence[Run]) -> None:
    """Raise if a run failed, with where to look."""
    if failed:
        raise SystemExit("failed, see " + ", ".join(str(run.output_dir / "log.txt") for run in failed))


def updates_of(history: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each update logged; the last line of a run repeats some of its metrics and is none."""
    return [logs for logs in history if "perf/update_s" in logs]


def _start(run: Run, num_threads: int | None) -> subprocess.Popen[bytes]:
    shutil.rmtree(run.output_dir, ignore_errors=True)
    run.output_dir.mkdir(parents=True)
    (run.output_dir / _COMMIT).write_text(f"{current_commit() or ''}\n")
    threads = {} if num_threads is None else {"OMP_NUM_THREADS": str(num_threads)}
    with (run.output_dir / "log.txt").open("w") as log:
        return subprocess.Popen(
            [sys.executable, *run.arguments],
            env={**os.environ, "PYTHONWARNINGS": "ignore", **threads},
            stdout=log,
            stderr=log,
            start_new_session=True,  # with the processes it starts, so that all of them can be stopped
        )


def _mark_finished(run: Run, seconds: float) -> None:
    unfinished = run.output_dir / f"{_SECONDS}.part"
    unfinished.write_text(f"{seconds:.1f}\n")
    unfinished.replace(run.output_dir / _SECONDS)
