"""Python objects from rank to rank, over gloo.

Ranks wait here for the slowest of them to have played its episodes. Waiting inside NCCL would end all of them after
`ddp_timeout`: its watchdog takes a rank that waits for one that hangs. A rank that dies ends the others here, too:
its connections are closed.
"""

from __future__ import annotations

import atexit
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState

T = TypeVar("T")

_PATIENCE = timedelta(days=1)  # `max_episode_s` bounds what is waited for

_groups: dict[Any, Any] = {}  # the gloo group of each process group of all ranks; a process has one in its life


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
