"""Requests to stop: on SIGTERM or SIGINT a run stops at a place from which it can be resumed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

import psutil

from .errors import StepPOError

_DEFAULTS: dict[signal.Signals, signal.Handlers | Callable[[int, FrameType | None], object]] = {
    signal.SIGTERM: signal.SIG_DFL,
    signal.SIGINT: signal.default_int_handler,
}
# A launcher passes on a signal that the terminal or the scheduler has sent to its processes already. Within this time
# the same signal is not a second request.
_REPEAT_GRACE_S = 2.0
_POLL_INTERVAL_S = 0.5  # between two checks whether the launcher is alive


class StopRequestedError(StepPOError):
    """This process, or another rank of its run, was asked to stop."""


class _Request:
    signal: signal.Signals | None = None
    at = 0.0


_request = _Request()
_callbacks: dict[object, Callable[[], None]] = {}


def is_requested() -> bool:
    """Whether this process was asked to stop, within [`listening`]."""
    return _request.signal is not None


@contextmanager
def listening() -> Iterator[None]:
    """
    Within the block, SIGTERM and SIGINT do not end the process: [`is_requested`] becomes true, and the callbacks of
    [`calling`] are called. The same signal again, some seconds later, has its usual effect at once.

    When the block raises [`StopRequestedError`], or ends after a stop was requested, an exception that ends this
    process is raised: after SIGTERM a `SystemExit` with the status 143 (128 + 15), after SIGINT a `KeyboardInterrupt`.

    `accelerate launch` does not pass signals on to a single process, so the end of that launcher counts as SIGTERM.

    A signal for which a handler has been installed already is left to that handler. Outside the main thread, Python
    cannot handle signals, and nothing changes.
    """
    if threading.current_thread() is not threading.main_thread() or is_requested():
        yield
        return
    replaced = {number: usual for number, usual in _DEFAULTS.items() if signal.getsignal(number) == usual}
    for number in replaced:
        signal.signal(number, _handle)
    is_over = threading.Event()
    if signal.SIGTERM in replaced and _is_accelerate_launch(os.getppid()):
        watch = threading.Thread(target=_watch_launcher, args=(os.getppid(), is_over), name="launcher", daemon=True)
        watch.start()
    try:
        yield
    except StopRequestedError as error:
        raise _end(_request.signal) from error
    finally:
        is_over.set()
        requested, _request.signal = _request.signal, None
        for number, usual in replaced.items():
            if signal.getsignal(number) == _handle:  # a callback may have installed its own meanwhile
                signal.signal(number, usual)
    if requested is not None:
        raise _end(requested)


def _is_accelerate_launch(pid: int) -> bool:
    try:
        words = psutil.Process(pid).cmdline()
    except psutil.Error:  # it has ended, or access is denied
        return False
    return any("accelerate" in word for word in words[:3]) and any(word.endswith("launch") for word in words[:4])


def _watch_launcher(pid: int, is_over: threading.Event) -> None:
    while not is_over.wait(_POLL_INTERVAL_S):
        if os.getppid() != pid:  # a process whose parent has ended gets another parent
            if not is_requested():  # a second request would end the run at once
                os.kill(os.getpid(), signal.SIGTERM)
            return


def _end(requested: signal.Signals | None) -> BaseException:
    """The exception that ends the process; `None`: another rank was asked to stop, and this one ends with it."""
    return KeyboardInterrupt() if requested == signal.SIGINT else SystemExit(128 + signal.SIGTERM)


@contextmanager
def calling(callback: Callable[[], None]) -> Iterator[None]:
    """
    Within the block, call `callback` when a stop is requested, or at once if it was requested before. It runs in the
    main thread, between any two instructions, and must do no more than wake up threads that wait.
    """
    key = object()
    _callbacks[key] = callback
    try:
        if is_requested():
            callback()
        yield
    finally:
        del _callbacks[key]


def _handle(number: int, frame: FrameType | None) -> None:
    received, now = signal.Signals(number), time.monotonic()
    if _request.signal is None:
        _request.signal, _request.at = received, now
        # Not through `logging` or `sys.stderr`, which this may have interrupted.
        with suppress(OSError):
            os.write(2, f"\n{received.name}: stopping when the current step is done; once more to end now\n".encode())
        for callback in list(_callbacks.values()):
            callback()
    elif now - _request.at > _REPEAT_GRACE_S:
        signal.signal(received, _DEFAULTS[received])
        os.kill(os.getpid(), received)
