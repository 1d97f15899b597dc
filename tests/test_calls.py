"""Code of others: it hangs, swallows what it is told, raises anything, and holds nothing up."""

import asyncio
import os
import subprocess
import sys
import threading
import time

import pytest

from trl_steppo.calls import CallTimeoutError, DaemonThread, call, within
from trl_steppo.rollout.play import run_coroutine


def run_call(function, timeout_s=None, thread=None):
    """Call it by itself."""
    return asyncio.run(call(function, (), {}, thread=thread or DaemonThread("x"), timeout_s=timeout_s, what="it"))


async def awaited():
    return 7


@pytest.mark.parametrize("function", [lambda: 7, awaited, lambda: awaited()])
def test_sync_and_async_functions_return_what_they_return(function):
    assert run_call(function) == run_call(function, 30) == 7


def test_what_hangs_is_given_up_even_if_it_swallows_its_cancellation():
    async def deaf():
        while True:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                await asyncio.sleep(60)

    async def gives_up():
        began = time.monotonic()
        with pytest.raises(CallTimeoutError, match=r"it took longer than 0\.05 s"):
            await within(deaf(), 0.05, "it")
        return time.monotonic() - began

    assert run_coroutine(gives_up()) < 20


@pytest.mark.parametrize(("error", "caught"), [(SystemExit(3), RuntimeError), (StopIteration(4), RuntimeError)])
def test_what_would_end_more_than_the_call_is_an_error_of_the_call(error, caught):
    def raises():
        raise error

    with pytest.raises(caught, match=f"{type(error).__name__}: "):
        run_call(raises)


def test_a_time_limit_counts_from_the_calls_own_turn():
    async def both():
        thread = DaemonThread("x")
        slow = thread.run(lambda: time.sleep(0.4), None, "slow")
        return await asyncio.gather(slow, thread.run(lambda: "in time", 0.2, "quick"))

    assert asyncio.run(both()) == [None, "in time"]


def test_a_forgotten_thread_ends_by_itself():
    async def run() -> threading.Thread:
        return await DaemonThread("x").run(threading.current_thread, None, "x")

    thread = asyncio.run(run())
    thread.join(timeout=20)
    assert not thread.is_alive()
    assert thread.daemon


def test_a_hanging_tool_does_not_keep_the_interpreter_from_exiting():
    program = """
import asyncio, threading
from trl_steppo.calls import DaemonThread
async def main():
    try:
        await DaemonThread("x").run(threading.Event().wait, 0.05, "tool")
    except TimeoutError:
        print("given up")
asyncio.run(main())
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env=env)
    assert (done.returncode, done.stdout.strip()) == (0, "given up")
