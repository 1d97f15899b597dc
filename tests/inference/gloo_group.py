"""A group over gloo instead of NCCL, which needs GPUs: this process's end of it, or a server's."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, TCPStore

_LONGEST = timedelta(seconds=5)  # nothing else ends what hangs


class GlooGroup:
    """Like [`NCCLGroup`], and like the communicator of vLLM's workers."""

    def __init__(self, address: str, port: int, size: int, rank: int = 0) -> None:
        self._store = TCPStore(address, port, size, is_master=rank == 0, timeout=_LONGEST)
        self._members = ProcessGroupGloo(self._store, rank, size, _LONGEST)

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        for tensor in tensors:
            self.broadcast(tensor)

    def broadcast(self, tensor: torch.Tensor, src: int = 0, stream: Any = None) -> None:
        self._members.broadcast(tensor, src).wait()

    def leave(self) -> None:
        self._members.abort()

    destroy = leave
