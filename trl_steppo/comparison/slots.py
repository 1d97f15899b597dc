"""Each run's share of the machine: GPUs where there are any, else cores."""

from __future__ import annotations

import os
from collections.abc import Sequence

from ..errors import ConfigurationError


def slots_of(
    num_runs: int, *, parallel: int | None = None, gpus: Sequence[str] = (), cores: int | None = None
) -> list[dict[str, str]]:
    """
    Divide the machine between the runs that play at a time.

    Args:
        num_runs (`int`):
            Number of runs.
        parallel (`int`, *optional*):
            Number of runs at a time. `None`: one for each GPU, or, where there is none, for each core.
        gpus (`Sequence[str]`, *optional*):
            The GPUs, as in `CUDA_VISIBLE_DEVICES`.
        cores (`int`, *optional*):
            Number of cores. `None`: those that this process may use.

    Returns:
        `list[dict[str, str]]`: One entry for each run at a time, with its `CUDA_VISIBLE_DEVICES` (where there are
        GPUs), and its `OMP_NUM_THREADS`, unless that is set already.
    """
    if parallel is not None and parallel < 1:
        raise ConfigurationError(f"--parallel {parallel}: at least one run plays at a time")
    cores = usable_cores() if cores is None else cores
    num_slots = max(1, min(parallel or len(gpus) or cores, num_runs))
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // num_slots))
    slots = [{"OMP_NUM_THREADS": threads} for _ in range(num_slots)]
    for index, slot in enumerate(slots):
        if gpus:
            each = max(1, len(gpus) // num_slots)
            first = index * each % len(gpus)
            slot["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[first : first + each])
    return slots


def usable_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_gpus() -> list[str]:
    """The GPUs that this process may use, as in `CUDA_VISIBLE_DEVICES`."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1")]
    from torch import cuda

    return [str(index) for index in range(cuda.device_count())]
