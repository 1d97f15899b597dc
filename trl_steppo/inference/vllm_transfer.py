"""Whole weights from this process's memory to the GPUs of a vLLM server, without files: vLLM's own transfer over NCCL.

This process and each server form a group of their own, so that a server that dies does not delay the others.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Protocol, TypeVar
from urllib.parse import urlsplit

import torch

from ..compat import vllm as compat
from ..errors import ConfigurationError

T = TypeVar("T")


class Group(Protocol):
    """A transfer group: this process, as the first member, and the workers of a server."""

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """Send tensors to all other members, one after another. Returns when they have them."""
        ...

    def leave(self) -> None:
        """End the group, and with it a running transfer. May be called from another thread."""
        ...


Join = Callable[[str, int, int], Group]
"""Makes a group, given the address and the port where its members meet, and their number."""


class Communicator(Protocol):
    """vLLM's communicator over NCCL."""

    disabled: bool

    def broadcast(self, tensor: torch.Tensor, src: int, stream: torch.cuda.Stream) -> object: ...
    def destroy(self) -> object: ...


class NCCLGroup:
    """
    A [`Group`] over NCCL. Construction waits for all members.

    Args:
        open_endpoint (`Callable`):
            vLLM's `trainer_init`: meets the others, and returns the communicator.
        device (`int`):
            Index of this process's GPU.
        address (`str`):
            This process's address, as the other members see it.
        port (`int`):
            Port where this process waits for them.
        size (`int`):
            Number of members, with this process.

    Raises:
        ConfigurationError: If NCCL is not available here.
    """

    def __init__(
        self,
        open_endpoint: Callable[[dict[str, object]], Communicator],
        device: int,
        address: str,
        port: int,
        size: int,
    ) -> None:
        torch.cuda.set_device(device)  # of this thread
        self._device = device
        self._stream = torch.cuda.Stream(device)  # training does not wait for it
        self._is_left = threading.Event()
        self._members = open_endpoint({"master_address": address, "master_port": port, "world_size": size})
        if self._members.disabled:
            raise ConfigurationError(
                "`vllm_weight_transfer`='nccl', but vLLM finds no NCCL where the trainer runs, or VLLM_DISABLE_PYNCCL "
                "tells it to do without; set it to 'files'"
            )

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """See [`Group`]."""
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            for tensor in tensors:
                here = tensor.contiguous().cuda(self._device)
                self._check()  # the copy waits for the transfer before, and returns if that was interrupted
                self._members.broadcast(here, src=0, stream=self._stream)
        self._stream.synchronize()
        self._check()

    def leave(self) -> None:
        """See [`Group`]."""
        self._is_left.set()
        self._members.destroy()

    def _check(self) -> None:
        if self._is_left.is_set():
            raise ConnectionError("the transfer was given up")


def nccl_join(device: torch.device) -> Join:
    """
    The function with which this process joins a server in an [`NCCLGroup`].

    Args:
        device (`torch.device`):
            The device that the policy trains on.

    Raises:
        ConfigurationError: If that is not a GPU, or vLLM cannot be imported where this process runs.
    """
    if device.type != "cuda":
        raise ConfigurationError(
            f"`vllm_weight_transfer`='nccl' sends weights from one GPU to others, and the policy trains on {device}; "
            "set it to 'files'"
        )
    try:
        trainer_init = compat.trainer_init()
    except Exception as error:  # it imports many libraries, of the versions that it was built for
        raise ConfigurationError(
            "`vllm_weight_transfer`='nccl' uses vLLM's own side of the transfer, which cannot be imported where the "
            f"trainer runs ({error}); install the servers' version of vLLM there, or set it to 'files'"
        ) from error
    return partial(NCCLGroup, trainer_init, torch.cuda.current_device() if device.index is None else device.index)


class Transfer:
    """
    This process's end of a group with one server. Used in the sampler's event loop only.

    Args:
        join (`Callable`):
            Makes the group, which may take as long as the server's side does.
    """

    def __init__(self, join: Join) -> None:
        self._join = join
        self._group: Group | None = None
        self._threads: list[threading.Thread] = []

    @property
    def is_joined(self) -> bool:
        """Whether there is a group, as far as this process knows."""
        return self._group is not None

    async def join(self, address: str, port: int, size: int, joined: Coroutine[None, None, object]) -> None:
        """Make the group, while `joined` asks the server to do so."""
        made = self._start(lambda: self._join(address, port, size))
        try:
            await _both(made, joined)
        except BaseException as error:
            made.add_done_callback(_leave)  # it may still succeed
            if "invalid usage" in str(error).lower():  # NCCL's message, from either side
                raise ConfigurationError(
                    "`vllm_weight_transfer`='nccl', and NCCL refuses a group of the trainer and the server at "
                    f"{address} ({error}); it does so where both are on one GPU. Give the server another GPU "
                    "(CUDA_VISIBLE_DEVICES), or set `vllm_weight_transfer` to 'files'"
                ) from error
            raise
        self._group = made.result()

    async def send(self, tensors: Iterable[torch.Tensor], received: Coroutine[None, None, object]) -> None:
        """Send tensors, while `received` asks the server to receive them."""
        group = self._group
        assert group is not None
        try:
            await _both(self._start(lambda: group.send(tensors)), received)
        except BaseException:
            self.leave()  # a member that still sends or receives waits for the others
            raise

    def leave(self) -> None:
        """End the group, if there is one. A running transfer fails."""
        group, self._group = self._group, None
        if group is not None:
            self._start(group.leave)

    async def close(self, timeout_s: float) -> None:
        """End the group. Returns when no transfer is running, or after `timeout_s`."""
        self.leave()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:  # a process that ends during a transfer may crash
            await asyncio.to_thread(thread.join, max(deadline - time.monotonic(), 0))

    def _start(self, act: Callable[[], T]) -> Future[T]:
        """Run what may hang in its own daemon thread, which delays neither the loop nor the end of the process."""
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(act())
            except BaseException as error:
                future.set_exception(error)

        self._threads = [thread for thread in self._threads if thread.is_alive()]
        self._threads.append(threading.Thread(target=run, name="weights", daemon=True))
        self._threads[-1].start()
        return future


async def _both(here: Future[T], asked: Coroutine[None, None, object]) -> None:
    """Wait for this process's part and the server's. If one fails, the other is not waited for."""
    tasks = asyncio.wrap_future(here), asyncio.ensure_future(asked)
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _leave(made: Future[Group]) -> None:
    if made.exception() is None:
        threading.Thread(target=made.result().leave, name="weights", daemon=True).start()


def meeting_place(url: str) -> tuple[str, int]:
    """This machine's IPv4 address as a server at `url` sees it, and a free port. May ask a name server."""
    parts = urlsplit(url)
    peer = socket.getaddrinfo(parts.hostname, parts.port or 80, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
        towards.connect(peer)  # which sends nothing
        address: str = towards.getsockname()[0]
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as free:
        free.bind((address, 0))
        return address, int(free.getsockname()[1])
