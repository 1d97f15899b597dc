"""What ranks do together: exchange Python objects and statistics, agree, and fail together.

Python objects are exchanged over gloo. Here a rank waits until the slowest rank has played its episodes. The same wait
in NCCL would end all ranks after `ddp_timeout`, because its watchdog takes the waiting rank for one that hangs. If a
rank dies, the others still end: its connections are closed.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather, reduce

from ..errors import CheckpointError, ConfigurationError, DataError, RolloutError, SamplerError, StepPOError
from ..stopping import StopRequestedError

T = TypeVar("T")

_TIMEOUT = timedelta(days=1)  # of exchanged objects; `max_episode_s` bounds how long episodes take
_SENT_ERRORS = (StopRequestedError, ConfigurationError, DataError, CheckpointError, SamplerError, RolloutError)

# The gloo group for each group of all ranks. A process has one in its life; a test may have several.
_groups: dict[torch.distributed.ProcessGroup, torch.distributed.ProcessGroup] = {}


# -- objects ----------------------------------------------------------------------------------------------------------


def gather_objects(items: list[T]) -> list[T]:
    """
    The lists of all ranks, joined in the order of the ranks. Collective: every rank must call this.

    Args:
        items (`list`):
            Objects that can be pickled, any number of them.
    """
    if PartialState().num_processes == 1:
        return items
    lists: list[list[T]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(lists, items, group=_object_group())
    return [item for of_rank in lists for item in of_rank]


def from_first_rank(value: T) -> T:
    """The first rank's value. Collective: every rank must call this."""
    if PartialState().num_processes == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=_object_group())
    return values[0]


def _object_group() -> torch.distributed.ProcessGroup:
    """A gloo group of all ranks, whatever backend their tensors use. Made at the first exchange."""
    world = torch.distributed.group.WORLD
    assert world is not None
    if world not in _groups:
        if not _groups:
            atexit.register(_destroy_groups)
        _groups[world] = torch.distributed.new_group(backend="gloo", timeout=_TIMEOUT)
    return _groups[world]


def _destroy_groups() -> None:
    """
    Destroy all groups, which ends their threads. A thread that frees a tensor while the interpreter ends aborts it.
    """
    while _groups:
        _, group = _groups.popitem()
        with suppress(Exception):  # it may have been destroyed with the group of all ranks
            torch.distributed.destroy_process_group(group)


# -- numbers ----------------------------------------------------------------------------------------------------------


def summed(statistics: torch.Tensor) -> torch.Tensor:
    """The elementwise sum over ranks of a tensor. Collective: every rank must call this."""
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
    """The exception of a block, if it raised one."""

    error: Exception | None = None


@contextmanager
def caught() -> Iterator[Caught]:
    """Keep an exception of the block for later, of any class: libraries wrap "no space left" in their own classes."""
    result = Caught()
    try:
        yield result
    except Exception as error:
        result.error = error


def first_failure(
    result: Caught, gather: Callable[[list[str | None]], list[str | None]] = gather_objects
) -> str | None:
    """The message of the first rank that caught an exception. Collective: every rank must call this."""
    failures = gather([None if result.error is None else str(result.error)])
    return next((failure for failure in failures if failure is not None), None)


def together(act: Callable[[], T], within: AbstractContextManager[object] | None = None) -> T:
    """
    Do something on every rank. If it fails on one, it fails on all of them, so that none waits for another.
    Collective: every rank must call this.

    Args:
        act (`Callable`):
            What to do.
        within (`AbstractContextManager`, *optional*):
            A context to do it in. It is left when all ranks have done it.

    Returns:
        What `act` returned on this rank.

    Raises:
        The exception of `act` where it failed; elsewhere the error of this package that is nearest to it.
    """
    with within or nullcontext():
        with caught() as result:
            value = act()
        failures = gather_objects([None if result.error is None else _sendable(result.error)])
    if result.error is not None:
        raise result.error
    for failure in failures:
        if failure is not None:
            raise failure
    return value


def _sendable(error: Exception) -> StepPOError:
    """The same error in a class of this package: other classes may be unknown to other ranks, or not picklable."""
    kind = next((kind for kind in _SENT_ERRORS if isinstance(error, kind)), RolloutError)
    what = str(error) if isinstance(error, StepPOError) else f"{type(error).__name__}: {error}"
    return kind(f"on another rank: {what}")
