"""What ranks do together: exchange Python objects and statistics, agree, and fail together.

Python objects go over gloo. Ranks wait here for the slowest of them to have played its episodes. Waiting inside NCCL
would end all of them after `ddp_timeout`: its watchdog ends a rank that waits for one that hangs. A rank that dies
ends the others here, too: its connections are closed.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce

from ..errors import CheckpointError, ConfigurationError, DataError, RolloutError, SamplerError, StepPOError
from ..stopping import StopRequestedError

T = TypeVar("T")

_PATIENCE = timedelta(days=1)  # `max_episode_s` bounds what is waited for
_KINDS = (StopRequestedError, ConfigurationError, DataError, CheckpointError, SamplerError, RolloutError)

_groups: dict[Any, Any] = {}  # the gloo group of each process group of all ranks; a process has one in its life


# -- objects ----------------------------------------------------------------------------------------------------------


def gather_objects(own: list[T]) -> list[T]:
    """
    The lists of all ranks, one behind the other. Every rank must call it.

    Args:
        own (`list`):
            What can be pickled, any number of it.
    """
    if PartialState().num_processes == 1:
        return own
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, own, group=_object_group())
    return [one for of_rank in found for one in of_rank]


def from_first_rank(own: T) -> T:
    """What the first rank has. Every rank must call it."""
    if PartialState().num_processes == 1:
        return own
    found = [own]
    torch.distributed.broadcast_object_list(found, src=0, group=_object_group())
    return found[0]


def _object_group() -> Any:
    """A gloo group of all ranks, made when they first meet here, whatever their tensors go over."""
    everyone = torch.distributed.group.WORLD
    if everyone not in _groups:
        if not _groups:
            atexit.register(_end)
        _groups[everyone] = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)
    return _groups[everyone]


def _end() -> None:
    """
    Let go of all groups, which ends their threads: one that drops a tensor while the interpreter ends would abort it.
    """
    while _groups:
        _, group = _groups.popitem()
        with suppress(Exception):  # it may have ended with the group of all ranks
            torch.distributed.destroy_process_group(group)


# -- numbers ----------------------------------------------------------------------------------------------------------


def summed(statistics: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over ranks of a tensor on their device. Collective: every rank must call this."""
    return reduce(statistics, reduction="sum") if PartialState().num_processes > 1 else statistics


def largest(count: int) -> int:
    """The largest of all ranks' counts. Collective: every rank must call this."""
    if PartialState().num_processes == 1:
        return count
    return int(gather(torch.tensor([count], device=PartialState().device)).max())


def all_agree(is_true: bool) -> bool:
    """Whether something is true on every rank. Collective: every rank must call this."""
    denials = torch.tensor([0.0 if is_true else 1.0], dtype=torch.double, device=PartialState().device)
    return float(summed(denials)) == 0.0


# -- failures ---------------------------------------------------------------------------------------------------------


@dataclass
class Caught:
    """What a block raised, if it did."""

    error: Exception | None = None


@contextmanager
def caught() -> Iterator[Caught]:
    """Keeps an exception for later; libraries wrap "no space left" in exceptions of their own, so any."""
    found = Caught()
    try:
        yield found
    except Exception as error:
        found.error = error


def first_failure(found: Caught, gather: Callable[[list[Any]], list[Any]] = gather_objects) -> str | None:
    """What the first rank caught that caught anything, told to all of them. Every rank must call it."""
    failures = gather([None if found.error is None else str(found.error)])
    return next((failure for failure in failures if failure is not None), None)


def together(act: Callable[[], T], within: AbstractContextManager[Any] | None = None) -> T:
    """
    Do something on every rank, `within` some context, which is left when all have done it. What fails on one is raised
    on all of them then, so that none waits for another: where it failed as it is, elsewhere as the error of this
    package that it is nearest to. Every rank must call it.
    """
    with within or nullcontext():
        with caught() as found:
            result = act()
        failures = gather_objects([None if found.error is None else _that_travels(found.error)])
    if found.error is not None:
        raise found.error
    for failure in failures:
        if failure is not None:
            raise failure
    return result


def _that_travels(error: Exception) -> StepPOError:
    """The same as a plain one of this package: one's own class may not be known elsewhere, or not be built so."""
    kind = next((kind for kind in _KINDS if isinstance(error, kind)), RolloutError)
    what = str(error) if isinstance(error, StepPOError) else f"{type(error).__name__}: {error}"
    return kind(f"on another rank: {what}")
