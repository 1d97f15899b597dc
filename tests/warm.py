"""Processes forked from one that has imported what they need, for tests that start many samplers."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

PRELOADED = ["trl_steppo.inference.worker_process", "transformers.models.qwen2.modeling_qwen2"]


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
