"""Event loops for sync code: they end when the process is asked to stop, and wait for nothing that hangs."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import TypeVar

from ..calls import (
    CallTimeoutError,
    Jobs,
    forget_interruption,
    keeping_thread_state,
    noticing_interruptions,
    raise_interruption,
    within,
    work,
    work_for,
)
from ..stopping import StopRequestedError, calling

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SHUTDOWN_GRACE_S = 1.0  # for what is left in an event loop to clean up


def run_coroutine(coroutine: Coroutine[object, None, T]) -> T:
    """
    Run a coroutine to its end from sync code, whether or not this thread already runs an event loop.

    Unlike `asyncio.run` it does not wait for what the coroutine leaves running: an async tool that hangs in
    `asyncio.to_thread` would hold it forever. A task that was begun by code that is not ours, and that ends in
    `SystemExit` or `KeyboardInterrupt`, does not end it.

    Raises:
        StopRequestedError: The process was asked to stop ([`stopping`]) before the coroutine had ended.
    """
    loop = EventLoop(in_place=not _runs_a_loop())
    try:
        return loop.run(coroutine)
    finally:
        loop.close()


class EventLoop:
    """
    Runs one coroutine after another, each to its end, from sync code. What is bound to the event loop (an HTTP
    session) or to its thread can be used in all of them. The loop does not run between two of them.

    Args:
        in_place (`bool`, *optional*):
            Whether it runs in its callers' thread, where no other loop may run. Otherwise it has a thread of its own,
            and the main thread, while it waits for a coroutine, runs what the coroutine asks [`~calls.MainThread`]
            for. By default it runs in its callers' thread where the main thread makes it, and runs no loop.
    """

    def __init__(self, *, in_place: bool | None = None) -> None:
        if in_place is None:
            in_place = threading.current_thread() is threading.main_thread() and not _runs_a_loop()
        self._loop = asyncio.new_event_loop()
        self._jobs: Jobs | None = None
        self._is_left = False
        if not in_place:
            self._jobs = queue.SimpleQueue()
            threading.Thread(target=work, args=(self._jobs,), name="rollout", daemon=True).start()

    @property
    def fits_here(self) -> bool:
        """Whether this thread may run coroutines."""
        is_main = threading.current_thread() is threading.main_thread()
        return self._jobs is not None or (is_main and not _runs_a_loop())

    def run(self, coroutine: Coroutine[object, None, T], *, heeds_stops: bool = True) -> T:
        """
        Run a coroutine to its end.

        Args:
            coroutine (`Coroutine`):
                What to run.
            heeds_stops (`bool`, *optional*, defaults to `True`):
                Whether a request to stop the process interrupts it.

        Raises:
            StopRequestedError: The process was asked to stop before the coroutine had ended.
        """
        stop = _Stop(self._loop)
        begin = partial(_run, self._loop, coroutine, stop, heeds_stops=heeds_stops)
        return begin() if self._jobs is None else self._run_there(begin, stop)

    def close(self) -> None:
        """Cancel what is left of the coroutines, let it clean up for a short time, and close the loop."""
        if self._jobs is None:
            _close(self._loop)
        else:
            self._jobs.put(partial(_close, self._loop))
            closed: Jobs = queue.SimpleQueue()
            self._jobs.put(lambda: closed.put(None))
            self._jobs.put(None)
            if not self._is_left:
                work(closed)

    def _run_there(self, begin: Callable[[], T], stop: _Stop) -> T:
        assert self._jobs is not None
        outcome: list[Callable[[], T]] = []
        jobs: Jobs = queue.SimpleQueue()

        def run() -> None:
            outcome.append(_settled(begin))
            jobs.put(None)

        self._jobs.put(run)
        try:
            work_for(self._loop, jobs)
        except BaseException:  # Ctrl-C reaches this thread alone
            self._is_left = True
            stop()
            raise
        return outcome[0]()


def _runs_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _settled(function: Callable[[], T]) -> Callable[[], T]:
    """Call a function in this thread. What is returned returns or raises the same, in the thread that calls it."""
    try:
        result = function()
    except BaseException as error:
        raised = error

        def fail() -> T:
            raise raised

        return fail
    return lambda: result


class _Stop:
    """Interrupts what an event loop runs, from any thread, between any two instructions."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.was_called = False

    def __call__(self) -> None:
        self.was_called = True
        with suppress(RuntimeError):  # the loop is closed: it has ended by itself
            self._loop.call_soon_threadsafe(self._loop.stop)


def _run(
    loop: asyncio.AbstractEventLoop, coroutine: Coroutine[object, None, T], stop: _Stop, *, heeds_stops: bool
) -> T:
    with noticing_interruptions(), keeping_thread_state():
        main = loop.create_task(coroutine)
        try:
            with calling(stop if heeds_stops else lambda: None):
                return _run_until_done(loop, main, stop)
        except RuntimeError as error:
            if main.done() or not stop.was_called:
                raise
            raise StopRequestedError("a rollout was interrupted, as a stop was requested") from error
        finally:
            forget_interruption()
            if not main.done():  # interrupted: no task of it does another step
                _cancel_all(loop)


def _cancel_all(loop: asyncio.AbstractEventLoop) -> None:
    for task in asyncio.all_tasks(loop):
        task.cancel()


def _close(loop: asyncio.AbstractEventLoop) -> None:
    with noticing_interruptions(), keeping_thread_state():
        _cancel_all(loop)
        try:  # lets cancelled tasks clean up, and waits for none of them for long
            _run_until_done(loop, loop.create_task(asyncio.sleep(0)))
            closing = within(loop.shutdown_asyncgens(), _SHUTDOWN_GRACE_S, "cleaning up")
            with suppress(CallTimeoutError):
                _run_until_done(loop, loop.create_task(closing))
        finally:
            loop.close()


def _run_until_done(loop: asyncio.AbstractEventLoop, main: asyncio.Task[T], stop: _Stop | None = None) -> T:
    """Run the loop until `main` is done, or `stop` was called, whatever else tries to end it."""
    while True:
        try:
            return loop.run_until_complete(main)
        except (SystemExit, KeyboardInterrupt) as error:
            raise_interruption(error)
            if main.done():
                return main.result()
            logger.error("a task of an environment, a tool or a reward function ended in %r", error, exc_info=error)
        except RuntimeError:  # of `main`, or as the loop was stopped
            if main.done() or (stop is not None and stop.was_called):
                raise
