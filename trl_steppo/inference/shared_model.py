"""A model whose weights lie in one piece of memory that two processes share."""

from __future__ import annotations

import mmap
import os
import pickle
import sys
import tempfile
from collections.abc import Collection
from itertools import accumulate
from multiprocessing.reduction import DupFd
from typing import IO, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

_ALIGNMENT = 64  # that of torch's own allocator: the rounding of a forward pass depends on it

_Layout = dict[str, tuple[torch.dtype, torch.Size]]
"""Type and shape of each tensor, by its name."""


class _Descriptor(Protocol):
    """A file descriptor on its way to another process."""

    def detach(self) -> int: ...


class SharedModel:
    """
    A model that is sent to a process without its weights, which lie in memory that both processes map. It is one piece
    of memory, and so one file descriptor for any number of tensors. It is not in `/dev/shm`, which is small in
    containers.

    Args:
        model (`PreTrainedModel`):
            A model on the CPU. Its parameters and buffers move to the shared memory, so that it cannot be used any
            more.

    Attributes:
        weights (`dict[str, torch.Tensor]`):
            The shared memory, by the names of the model's parameters and buffers.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        tensors = _tensors(model)
        self._layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        self._file = _memory_file()
        self.weights = self._map()
        for name, tensor in tensors.items():
            self.weights[name].copy_(tensor.data)
            tensor.data = tensor.data.new_empty(0)  # tied weights are one object
        self._model = pickle.dumps(model)

    def load(self, device: torch.device, *, private: Collection[str]) -> PreTrainedModel:
        """
        The model, for forward passes. On the CPU it shares all weights except those in `private`.

        Args:
            device (`torch.device`):
                The model's device.
            private (`Collection[str]`):
                Names of weights that get memory of their own, which is not filled yet.
        """
        model: PreTrainedModel = pickle.loads(self._model)
        for name, tensor in _tensors(model).items():
            shared = self.weights[name]
            tensor.data = torch.empty_like(shared, device=device) if name in private else shared.to(device)
        return model

    def _map(self) -> dict[str, torch.Tensor]:
        sizes = [dtype.itemsize * shape.numel() for dtype, shape in self._layout.values()]
        starts = list(accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=0))
        os.ftruncate(self._file.fileno(), max(starts[-1], 1))
        memory = torch.frombuffer(mmap.mmap(self._file.fileno(), 0), dtype=torch.uint8)
        return {
            name: memory[start : start + size].view(dtype).view(shape)
            for (name, (dtype, shape)), start, size in zip(self._layout.items(), starts[:-1], sizes, strict=True)
        }

    def __getstate__(self) -> tuple[bytes, _Layout, _Descriptor]:
        return self._model, self._layout, DupFd(self._file.fileno())

    def __setstate__(self, state: tuple[bytes, _Layout, _Descriptor]) -> None:
        self._model, self._layout, descriptor = state
        self._file = open(descriptor.detach(), "r+b", buffering=0)  # noqa: SIM115
        self.weights = self._map()


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _memory_file() -> IO[bytes]:
    """A file without a name, which disappears when no process has it open."""
    if sys.platform == "linux":
        return open(os.memfd_create("weights"), "r+b", buffering=0)
    return tempfile.TemporaryFile()
