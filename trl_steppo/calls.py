"""Calls of code that others wrote, which may hang: time limits, and threads that hold nothing up."""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class CallTimeoutError(TimeoutError):
    """`what` was given up at our time limit `timeout_s`; a call that times out by itself raises something else."""

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__(f"{what} took longer than {timeout_s:g} s")
        self.what = what


async def call(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    thread: DaemonThread,
    timeout_s: float | None,
    what: str,
) -> Any:
    """
    Call a function that someone else wrote: a coroutine function on the event loop, any other in `thread`.

    Raises:
        CallTimeoutError: it took longer than `timeout_s`.
    """
    if inspect.iscoroutinefunction(function):
        return await within(function(*args, **kwargs), timeout_s, what)
    result = await thread.run(lambda: function(*args, **kwargs), timeout_s, what)
    return await within(result, timeout_s, what) if inspect.isawaitable(result) else result


async def within(awaitable: Awaitable[T], timeout_s: float | None, what: str) -> T:
    """
    Wait for `awaitable`, at most `timeout_s`. Unlike `asyncio.wait_for`, it does not wait for the cancelled one to
    end, which code that swallows cancellation never does.

    Raises:
        CallTimeoutError: it took longer than `timeout_s`.
    """
    if timeout_s is None:
        return await awaitable
    task = asyncio.ensure_future(awaitable)
    try:
        await asyncio.wait({task}, timeout=timeout_s)
        if not task.done():
            raise CallTimeoutError(what, timeout_s)
        if task.cancelled():
            raise RuntimeError(f"{what} was cancelled from inside")
        return task.result()
    finally:
        if not task.done():
            task.cancel()
            task.add_done_callback(look_at)


def look_at(task: asyncio.Future[Any]) -> None:
    """Look at the outcome of a task that was given up, so that asyncio does not report it as never looked at."""
    if not task.cancelled():
        task.exception()


class DaemonThread:
    """
    Runs sync calls one after another, all in one thread, which starts with the first call.

    Environments were written for one thread: their state is not locked, and some of what they hold (an SQLite
    connection, for one) refuses any other. A call that is given up keeps its thread to itself; the next call gets a
    new one.

    Args:
        name (`str`):
            Shown in thread dumps.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] | None = None
        self._turn: asyncio.Lock | None = None

    async def run(self, function: Callable[[], T], timeout_s: float | None, what: str) -> T:
        """
        Run `function` when the calls before it are done; the time limit counts from then.

        Raises:
            CallTimeoutError: it took longer than `timeout_s`.
        """
        if self._turn is None:
            self._turn = asyncio.Lock()
        async with self._turn:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[T] = loop.create_future()
            try:
                self._start().put(lambda: _run_job(function, future, loop))
                return await within(future, timeout_s, what)
            finally:
                if future.cancelled():  # given up: whoever comes next must not queue behind it
                    self.end()

    def end(self) -> None:
        """Let the thread end after what it is running. A later call starts a new one."""
        if self._jobs is not None:
            self._jobs.put(None)
            self._jobs = None

    def _start(self) -> queue.SimpleQueue[Callable[[], None] | None]:
        if self._jobs is None:
            self._jobs = queue.SimpleQueue()
            # Neither the thread nor the finalizer holds `self`, so that a forgotten one ends by itself.
            weakref.finalize(self, self._jobs.put, None).atexit = False
            threading.Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True).start()
        return self._jobs


def _work(jobs: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it holds the environment, and the next one may never come


def _run_job(function: Callable[[], T], future: asyncio.Future[T], loop: asyncio.AbstractEventLoop) -> None:
    try:
        result = function()
    except Exception as error:
        _deliver(loop, future, lambda error=error: future.set_exception(_raisable(error)))  # type: ignore[misc]
    except BaseException as error:  # `exit()` in a tool ends neither this thread nor the run
        wrapped = RuntimeError(f"{type(error).__name__}: {error}")
        _deliver(loop, future, lambda: future.set_exception(wrapped))
    else:
        _deliver(loop, future, lambda: future.set_result(result))


def _raisable(error: Exception) -> Exception:
    # A future refuses StopIteration, which means something else to the coroutine that would receive it.
    return RuntimeError(f"StopIteration: {error}") if isinstance(error, StopIteration) else error


def _deliver(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], deliver: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop is closed: the rollout ended long ago
        loop.call_soon_threadsafe(lambda: None if future.done() else deliver())
