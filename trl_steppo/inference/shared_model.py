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
from typing import IO, Any

import torch
from torch import nn

_ALIGNMENT = 64  # as torch's own allocator has it: what a forward pass rounds depends on it


class SharedModel:
    """
    A model that is sent to a process without its weights, which lie in memory that both see: one piece of it, and so
    one file descriptor, however many tensors there are. It is not in `/dev/shm`, which is small in containers.

    Args:
        model (`nn.Module`):
            On the CPU. Its parameters and buffers move to the shared memory, so that it is of no use any more.

    Attributes:
        weights (`dict[str, torch.Tensor]`):
            The shared memory, by the names of the model's parameters and buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        tensors = _tensors(model)
        self._layout = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
        self._file = _memory_file()
        self.weights = self._map()
        for name, tensor in tensors.items():
            self.weights[name].copy_(tensor.data)
            tensor.data = tensor.data.new_empty(0)  # of two that are one, the other is the same object
        self._model = pickle.dumps(model)

    def load(self, device: torch.device, *, private: Collection[str]) -> nn.Module:
        """
        The model, to forward with. On the CPU it shares all weights but those in `private`.

        Args:
            device (`torch.device`):
                Where to.
            private (`Collection[str]`):
                Names of weights that are the model's own from the beginning, and not yet filled.
        """
        model: nn.Module = pickle.loads(self._model)
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

    def __getstate__(self) -> tuple[Any, ...]:
        return self._model, self._layout, DupFd(self._file.fileno())

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._model, self._layout, descriptor = state
        self._file = open(descriptor.detach(), "r+b", buffering=0)  # noqa: SIM115
        self.weights = self._map()


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _memory_file() -> IO[bytes]:
    """A file without a name that is gone when nobody has it open."""
    if sys.platform == "linux":
        return open(os.memfd_create("weights"), "r+b", buffering=0)
    return tempfile.TemporaryFile()
