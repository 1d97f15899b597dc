"""Plays runs as processes that end with this one."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from types import FrameType
from typing import TypeVar

from ..keeper import Keeper
from .runs import LOG, PlannedRun

logger = logging.getLogger(__name__)

RunT = TypeVar("RunT", bound=PlannedRun)

_POLL_INTERVAL_S = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class State(Enum):
    """What has become of a run."""

    WAITING = "waiting"
    RUNNING = "running"
    STOPPING = "stopping"  # it was interrupted, and finishes what it must
    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"


def play(
    runs: Iterable[RunT],
    slots: Sequence[Mapping[str, str]],
    on_change: Callable[[RunT, State], None] = lambda run, state: None,
) -> list[RunT]:
    """
    Play the runs that are not finished, in their order. A run that fails does not stop the others.

    SIGINT (Ctrl-C) and SIGTERM interrupt all runs, and wait for them: a `StepPOTrainer` finishes its update and saves
    it. A second signal ends them within seconds. They also end when this process is killed.

    Args:
        runs (`Iterable[PlannedRun]`):
            The runs.
        slots (`Sequence[Mapping[str, str]]`):
            One entry for each run that may play at a time: what it finds in its environment.
        on_change (`Callable`, *optional*):
            Called with a run and its new state; also with runs that were finished before. An error that it raises
            is logged, and the runs go on.

    Returns:
        `list[PlannedRun]`: The runs that failed. Their logs say why.

    Raises:
        KeyboardInterrupt: After SIGINT, when all runs have ended.
        SystemExit: After SIGTERM, with the status 143.
    """

    def tell(run: RunT, state: State) -> None:
        try:
            on_change(run, state)
        except Exception:
            logger.exception("%s is %s, and showing that failed; the runs go on", run.output_dir, state.value)

    waiting = deque(runs)
    free = deque(slots)
    playing: dict[RunT, _Process] = {}
    failed: list[RunT] = []
    with _listening() as signals:
        try:
            while playing or (waiting and not signals):
                while waiting and free and not signals:
                    run = waiting.popleft()
                    if run.is_finished:
                        tell(run, State.FINISHED)
                    else:
                        playing[run] = _start(run, free.popleft())
                        tell(run, State.RUNNING)
                for run, process in list(playing.items()):
                    state = process.heed(len(signals))
                    if state is State.FINISHED:
                        run.mark_finished(time.perf_counter() - process.start)
                    if state is State.FAILED:
                        failed.append(run)
                    if process.has_ended:
                        free.append(process.slot)
                        del playing[run]
                    if state is not None:
                        tell(run, state)
                if playing:
                    time.sleep(_POLL_INTERVAL_S)
        finally:
            for process in playing.values():
                process.keeper.end()
            for process in playing.values():
                process.popen.wait()
    if signals:
        raise KeyboardInterrupt if signals[0] == signal.SIGINT else SystemExit(128 + signals[0])
    return failed


@dataclass
class _Process:
    """The process of a run."""

    run: PlannedRun
    slot: Mapping[str, str]
    keeper: Keeper
    popen: subprocess.Popen[bytes]
    start: float
    num_signals: int = 0

    @property
    def has_ended(self) -> bool:
        return self.popen.poll() is not None

    def heed(self, num_signals: int) -> State | None:
        """Pass on new signals. Returns the run's state if it has changed."""
        if self.has_ended:
            self.keeper.end()
            if self.popen.returncode == 0 and self.run.has_trained:
                return State.FINISHED
            return State.STOPPED if num_signals else State.FAILED
        if num_signals == self.num_signals:
            return None
        self.num_signals = num_signals
        if num_signals == 1:
            self.keeper.interrupt()
            return State.STOPPING
        self.keeper.end()
        return None


def _start(run: PlannedRun, slot: Mapping[str, str]) -> _Process:
    words = run.words
    run.prepare()
    keeper = Keeper(words)
    with (run.output_dir / LOG).open("ab") as log, keeper.starting() as descriptor:
        popen = subprocess.Popen(
            keeper.command,
            env={**os.environ, **slot},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[descriptor],
        )
    return _Process(run, slot, keeper, popen, time.perf_counter())


@contextmanager
def _listening() -> Iterator[list[int]]:
    """Within the block, signals that ask this process to end are listed and do nothing else."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
