"""Processes forked from one that has imported what they need, which takes seconds: samplers, and scripts."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch

PRELOADED = ["trl_steppo.trainer.steppo_trainer", "transformers.models.qwen2.modeling_qwen2"]


class WarmProcess(ForkServerProcess):
    def run(self) -> None:
        parent: Any = multiprocessing.parent_process()
        parent._pid = os.getppid()  # who forked it ends with who started it
        super().run()


class WarmContext(ForkServerContext):
    Process = WarmProcess  # type: ignore[assignment]


def warm_context(method: str) -> WarmContext:
    """In the place of `multiprocessing.get_context("spawn")`."""
    assert method == "spawn"
    context = WarmContext()
    context.set_forkserver_preload(PRELOADED)
    return context


@dataclass
class Finished:
    """A process that has ended, and what it wrote."""

    returncode: int | None
    stdout: str
    stderr: str


def run_script(script: Path | str, *arguments: Any, cwd: Path | None = None, timeout: float, **env: str) -> Finished:
    """
    Run a Python script, given as its file or as its code, as `python SCRIPT ARGUMENTS` would; with the interpreter's
    options and environment it was not started, though, and modules that are imported here may be imported there. What
    it registered with `atexit` runs; the interpreter is not taken down, which a test of that starts for itself.

    Args:
        script (`Path` or `str`), arguments:
            What is run.
        cwd (`Path`, *optional*):
            Its working directory; `None`: this one.
        timeout (`float`):
            Seconds after which it is killed, with all processes that it has started.
        env:
            Changes of its environment.
    """
    with tempfile.TemporaryDirectory() as directory:
        outputs = [Path(directory, name) for name in ("stdout", "stderr")]
        if isinstance(script, str):
            Path(directory, "script.py").write_text(script)
            script = Path(directory, "script.py")
        given = [str(argument) for argument in arguments]
        process = warm_context("spawn").Process(
            target=_run, args=(script, given, cwd or Path.cwd(), {**os.environ, **env}, outputs)
        )
        process.start()
        try:
            process.join(timeout)
        finally:
            if process.is_alive():
                _kill(process)
        return Finished(process.exitcode, *(path.read_text() for path in outputs))


def free_port() -> str:
    """A port for ranks to meet at. Older versions of accelerate do not take 0 for one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_on_ranks(script: Path, *arguments: Any, timeout: float, **env: str) -> list[Finished]:
    """[`run_script`] on two ranks, with what `torchrun` tells its processes."""
    env |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def run(rank: int) -> Finished:
        return run_script(script, *arguments, timeout=timeout, **env, RANK=str(rank), LOCAL_RANK=str(rank))

    with ThreadPoolExecutor() as pool:
        return list(pool.map(run, range(2)))


def _kill(process: WarmProcess) -> None:
    """End a process and those of its group: it leads one of its own once it runs a script."""
    assert process.pid is not None
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _run(script: Path, arguments: list[str], cwd: Path, env: dict[str, str], outputs: list[Path]) -> None:
    os.setpgid(0, 0)
    for descriptor, path in enumerate(outputs, start=1):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        vars(threading)["_shutdown"]()  # as in an interpreter that ends: first the threads
        atexit._run_exitfuncs()
