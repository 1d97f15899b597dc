"""Whole weights from this process's memory to the GPUs of a vLLM server, without files: vLLM's own transfer over NCCL.

This process and each server form a group of their own, so that a server that dies holds up no other.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

import torch

from ..compat import vllm as compat
from ..errors import ConfigurationError

T = TypeVar("T")


class Group(Protocol):
    """This process, as the first, and the workers of a server."""

    def send(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give these to all others, one after another; return when they have them."""
        ...

    def leave(self) -> None:
        """End it, and with it what is being sent. May be called from another thread."""
        ...


Join = Callable[[str, int, int], Group]  # the address and the port where its members meet, and how many they are


class NCCLGroup:
    """
    A [`Group`] over NCCL, made when all of its members are there.

    Args:
        open_endpoint (`Callable`):
            vLLM's `trainer_init`: meets the others, and returns the communicator.
        device (`int`):
            The index of this process's GPU.
        address (`str`):
            Of this process, as the others see it.
        port (`int`):
            Where this process waits for them.
        size (`int`):
            How many they are, with this one.

    Raises:
        ConfigurationError: If NCCL is not to be had here.
    """

    def __init__(
        self, open_endpoint: Callable[[dict[str, Any]], Any], device: int, address: str, port: int, size: int
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
                self._check()  # a copy waits for what was sent before, and goes on where that was broken off
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
    How this process joins a server in an [`NCCLGroup`].

    Args:
        device (`torch.device`):
            What the policy trains on.

    Raises:
        ConfigurationError: If that is no GPU, or vLLM cannot be imported where this process runs.
    """
    if device.type != "cuda":
        raise ConfigurationError(
            f"`vllm_weight_transfer`='nccl' sends weights from one GPU to others, and the policy trains on {device}; "
            "set it to 'files'"
        )
    try:
        trainer_init = compat.trainer_init()
    except Exception as error:  # it imports much, of the versions that it was built for
        raise ConfigurationError(
            "`vllm_weight_transfer`='nccl' uses vLLM's own side of the transfer, which cannot be imported where the "
            f"trainer runs ({error}); install the servers' version of vLLM there, or set it to 'files'"
        ) from error
    return partial(NCCLGroup, trainer_init, torch.cuda.current_device() if device.index is None else device.index)


class Transfer:
    """
    This process's end of a group with one server. Lives in the sampler's loop.

    Args:
        join (`Callable`):
            Makes the group; it may take as long as the server does.
    """

    def __init__(self, join: Join) -> None:
        self._join = join
        self._group: Group | None = None
        self._threads: list[threading.Thread] = []

    @property
    def is_joined(self) -> bool:
        """Whether there is a group, as far as is known here."""
        return self._group is not None

    async def join(self, address: str, port: int, size: int, joined: Coroutine[Any, Any, Any]) -> None:
        """Make the group, while the server is asked to do so."""
        made = self._start(lambda: self._join(address, port, size))
        try:
            await _both(made, joined)
        except BaseException as error:
            made.add_done_callback(_leave)  # it may still come about
            if "invalid usage" in str(error).lower():  # NCCL's word for it, from either side
                raise ConfigurationError(
                    "`vllm_weight_transfer`='nccl', and NCCL refuses a group of the trainer and the server at "
                    f"{address} ({error}); it does so where both are on one GPU. Give the server another GPU "
                    "(CUDA_VISIBLE_DEVICES), or set `vllm_weight_transfer` to 'files'"
                ) from error
            raise
        self._group = made.result()

    async def send(self, tensors: Iterable[torch.Tensor], received: Coroutine[Any, Any, Any]) -> None:
        """Send these, while the server is asked to receive them."""
        group = self._group
        assert group is not None
        try:
            await _both(self._start(lambda: group.send(tensors)), received)
        except BaseException:
            self.leave()  # whoever still sends or receives waits for the others
            raise

    def leave(self) -> None:
        """End the group, if there is one; whatever is under way fails."""
        group, self._group = self._group, None
        if group is not None:
            self._start(group.leave)

    async def close(self, timeout_s: float) -> None:
        """End the group; return when nothing is under way any more, or after `timeout_s`."""
        self.leave()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:  # a process that ends in the midst of it may crash
            await asyncio.to_thread(thread.join, max(deadline - time.monotonic(), 0))

    def _start(self, act: Callable[[], T]) -> Future[T]:
        """Do what may hang in a thread of its own, which holds up neither the loop nor the end of the process."""
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


async def _both(here: Future[Any], asked: Coroutine[Any, Any, Any]) -> None:
    """What is done here, and meanwhile there; if one fails, the other is not waited for."""
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
    """This machine's IPv4 address as a server at `url` sees it, and a port that is free; may ask a name server."""
    parts = urlsplit(url)
    peer = socket.getaddrinfo(parts.hostname, parts.port or 80, socket.AF_INET, socket.SOCK_DGRAM)[0][4]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as towards:
        towards.connect(peer)  # which sends nothing
        address: str = towards.getsockname()[0]
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as free:
        free.bind((address, 0))
        return address, int(free.getsockname()[1])
