"""The policy in a process of its own: it samples while the trainer updates.

The process holds a copy of the model and samples with [`LocalSampler`], as the trainer itself would. New weights are
written to shared memory, from where the process takes them between two responses: it first answers the requests that
it has begun, and begins no others. So each response comes from one version of the weights, and no episode ends for it.

A process that dies, hangs, or says nothing for some seconds is started again with the weights that it was given last,
and asked again what it did not answer.

This is the trainer's side; `worker_process.py` is the process's. Nobody who samples ever waits for the process here:
what is sent to it goes to a queue, and what it says is taken in a thread, which also ends it and starts the next one.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import pickle
import queue
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import RolloutError
from ..numerics import Numerics, ProcessNumerics
from ..types import TokenIds
from .base import Sample, SamplingParams
from .local import samples_with_a_cache
from .shared_model import SharedModel
from .worker_process import (
    Answer,
    Ask,
    Cancel,
    Counts,
    Go,
    HandedOut,
    Pace,
    Release,
    Settings,
    Taken,
    Weights,
    serve,
)

logger = logging.getLogger(__name__)

_STARTS_S = 120.0  # a process that takes longer to start does not


class WorkerSampler:
    """
    A [`Sampler`] that samples in another process of this machine. Responses are those of [`LocalSampler`], token by
    token, in paced rollouts; without pacing, batches depend on timing, and with them the last bits of probabilities.

    Args:
        model (`PreTrainedModel`):
            What the process begins with: a causal language model on the CPU that is nobody else's, with an attention
            of transformers' own. Its weights move to shared memory.
        trained (`Sequence[str]`):
            Names of the parameters that change; all others are sent once.
        device (`torch.device`, *optional*):
            Where the process puts its copy. `None`: on the CPU, where it copies no more than `trained`.
        cache_tokens (`int`, *optional*, defaults to `262144`):
            As [`LocalSampler`]'s.
        allow_uncached (`bool`, *optional*, defaults to `False`):
            As [`LocalSampler`]'s.
        autocast (`torch.dtype`, *optional*):
            Type of mixed precision in forward passes; `None`: without.
        is_paced (`bool`, *optional*, defaults to `True`):
            Whether batches wait for quick environments, so that they are the same in every run; for one rollout at a
            time.
        silent_s (`float`, *optional*, defaults to `20.0`):
            A process that gives no sign of life for so long is given up. It gives them during forward passes, too.
        stuck_s (`float`, *optional*, defaults to `600.0`):
            A process whose forward pass takes so long, or its taking of new weights, ends itself, and prints where it
            was. To be longer than the longest prefill.
        max_restarts (`int`, *optional*, defaults to `3`):
            How often a process that died, or was given up, is started again with the same weights.

    Raises:
        ConfigurationError: If the model cannot be sampled with a cache and `allow_uncached` is not set.
        RolloutError: From `sample`, if the process died too often, or was closed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        trained: Sequence[str],
        device: torch.device | None = None,
        cache_tokens: int | None = 262_144,
        allow_uncached: bool = False,
        autocast: torch.dtype | None = None,
        is_paced: bool = True,
        silent_s: float = 20.0,
        stuck_s: float = 600.0,
        max_restarts: int = 3,
    ) -> None:
        self.is_paced = is_paced
        self.silent_s = silent_s
        self.max_restarts = max_restarts
        self.num_restarts = 0
        self._trained = tuple(trained)
        samples_with_a_cache(model, allow_uncached=allow_uncached)  # told here, before a process starts
        self._shared = SharedModel(model)
        self._settings = Settings(
            Numerics(device or torch.device("cpu"), autocast),
            cache_tokens,
            stuck_s,
            ProcessNumerics.of_this_process(),
            allow_uncached,
        )
        self._numbers = itertools.count()
        # Held for moments only: event loops take it. Notified when weights were taken, a process or the sampler ended.
        self._changed = threading.Condition()
        self._process: _Process | None = None  # the one that samples, or did last
        self._keeper: threading.Thread | None = None
        self._weights: Weights | None = Weights(next(self._numbers), 0)  # in shared memory; `None`: being written
        self._pending: dict[int, tuple[Ask, Future[Sample]]] = {}
        self._pacing: _Pacing | None = None
        self._restarts_left = max_restarts
        self._counts_before = Counts()  # of the processes before this one
        self._failure: RolloutError | None = RolloutError("the sampler was not started")

    @property
    def process_id(self) -> int:
        """Of the process that samples, or did last."""
        assert self._process is not None
        return self._process.id

    @property
    def sampled_tokens(self) -> int:
        """Tokens of all responses."""
        return self._counts().sampled_tokens

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return self._counts().prompt_tokens

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of prompts that were forwarded."""
        return self._counts().prefilled_tokens

    @property
    def uncached_rows(self) -> int:
        """Rows that were forwarded whole for one more token."""
        return self._counts().uncached_rows

    @property
    def forward_s(self) -> float:
        """Seconds in the model's forward passes."""
        return self._counts().forward_s

    def _counts(self) -> Counts:
        with self._changed:
            return self._counts_before + (self._process.counts if self._process is not None else Counts())

    # -- as a sampler -------------------------------------------------------------------------------------------------

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        """Continue `prompt_ids`; see [`Sampler`]. May be called from any event loop."""
        answer: Future[Sample] = Future()
        with self._changed:
            if self._failure is not None:
                raise self._failure
            ask = Ask(next(self._numbers), TokenIds(prompt_ids), params, episode_id, order)
            self._send(ask)
            self._pending[ask.number] = ask, answer
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            with self._changed:
                if self._pending.pop(ask.number, None) is not None:
                    self._send(Cancel(ask.number))
            raise

    def release(self, episode_id: str) -> None:
        """Forget the episode's cache."""
        self._send(Release(episode_id))

    def reset_cache(self) -> None:
        """Forget every waiting episode's keys and values; the process gives their memory back to its device."""
        self._send(Release(None))

    def pace(self, settled: Callable[[], Awaitable[None]] | None) -> None:
        """Have `settled()` awaited, in the running event loop, before each batch is formed; see [`Sampler`]."""
        if not self.is_paced:
            return
        with self._changed:
            self._pacing = _Pacing(settled, asyncio.get_running_loop()) if settled is not None else None
            self._send(Pace(settled is not None))

    def _send(self, message: Any) -> None:
        with self._changed:
            if self._process is not None:
                self._process.send(message)

    # -- a run --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """
        Start the process; it may be started again when it was closed. It begins with the weights that the model has,
        or that it was given last.

        Raises:
            RolloutError: It does not start.
        """
        with self._changed:
            self._failure, self._restarts_left = None, self.max_restarts
        try:
            process = self._launch()
            is_up = process is not None and process.receive() is not None
            trouble = process.trouble if process is not None else "closed meanwhile"
        except Exception as error:
            is_up, trouble = False, repr(error)
        if not is_up:
            failure = RolloutError(
                f"the sampler's process did not start ({trouble}; its own output says more). A script that starts one "
                'does its work under `if __name__ == "__main__":`'
            )
            self._fail(failure)
            raise failure
        self._keeper = threading.Thread(target=self._keep, args=(process,), name="sampler's keeper", daemon=True)
        self._keeper.start()

    def close(self) -> None:
        """End the process. Those who still wait for a response are told."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        with self._changed:
            self._fail(RolloutError("the sampler was closed"))
            process = self._process
        assert process is not None
        process.end()
        keeper.join()  # so that it sees nothing of a process that is started from now on

    # -- weights ------------------------------------------------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """
        Give the process new weights: what is asked for from now on is sampled with them. Returns when they are in the
        shared memory; the process takes them as soon as what it has begun is answered.

        Args:
            weights (`Iterable[tuple[str, torch.Tensor]]`):
                The trained parameters with their names, whole.
            version (`int`):
                Number of updates that made them.

        Raises:
            RolloutError: The process died too often, or was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or not self._is_read())
            if self._failure is not None:
                raise self._failure
            self._weights = None
        try:
            for name, weight in weights:
                self._shared.weights[name].copy_(weight.detach())
        except BaseException as error:
            self._fail(RolloutError(f"the sampler got but a part of its new weights: {error!r}"))
            raise
        with self._changed:
            self._weights = Weights(next(self._numbers), version)
            self._restarts_left = self.max_restarts  # a run of weeks may lose its process now and then
            if self._process is not None:
                self._process.send(self._weights)

    def _is_read(self) -> bool:
        """Whether a process may be reading the weights in the shared memory."""
        return self._process is not None and self._process.is_reading

    # -- the process --------------------------------------------------------------------------------------------------

    def _launch(self) -> _Process | None:
        """Start a process, and tell it all that it must know; `None` if this was closed meanwhile."""
        process = _Process(self._shared, self._trained, self._settings, self.silent_s)
        with self._changed:
            if self._process is not None:
                self._counts_before += self._process.counts
            self._process = process
            if self._pacing is not None:
                process.send(Pace(True))
            if self._weights is not None:
                process.send(self._weights)
            for ask, _ in self._pending.values():
                process.send(ask)
            is_wanted = self._failure is None
        if is_wanted:
            return process
        process.end()
        return None

    def _keep(self, process: _Process | None) -> None:
        """In a thread: take what the process says; when it says no more, start another one, until this is closed."""
        try:
            while process is not None:
                while (message := process.receive()) is not None:
                    self._take(process, message)
                process = self._replace(process)
        except Exception as error:
            logger.exception("the sampler's process is not looked after any more")
            self._fail(RolloutError(f"the sampler's process could not be started again, or heard: {error!r}"))

    def _take(self, process: _Process, message: Any) -> None:
        with self._changed:
            if isinstance(message, Answer):
                _, answer = self._pending.pop(message.number, (None, None))
                if answer is not None:
                    _settle(answer, message.outcome)
            elif isinstance(message, Counts):
                process.counts = message
            elif isinstance(message, Taken):
                process.taken = message.edition
                self._changed.notify_all()
            elif isinstance(message, HandedOut) and self._pacing is not None:
                self._pacing.when_settled(lambda: process.send(Go()))

    def _replace(self, process: _Process) -> _Process | None:
        """Another process for one that has ended; `None` if there is to be none."""
        with self._changed:
            self._changed.notify_all()  # it reads no more
            if self._failure is not None:
                return None
            died = f"the sampler's process {process.trouble}"
            if not self._restarts_left:
                self._fail(
                    RolloutError(
                        f"{died}, and was started again {self.max_restarts} times since it got these weights; its own "
                        "output says more, and the system's log where it was killed for its memory"
                    )
                )
                return None
            self.num_restarts += 1
            self._restarts_left -= 1
            num_pending = len(self._pending)
        logger.warning("%s; it is started again, and asked again for %d responses", died, num_pending)
        return self._launch()

    def _fail(self, error: RolloutError) -> None:
        with self._changed:
            self._failure = error
            waiting, self._pending = self._pending, {}
            self._changed.notify_all()
        for _, answer in waiting.values():
            _settle(answer, error)


class _Process:
    """
    One process that samples: what is sent to it and what it says, from its start to its end.

    Attributes:
        trouble (`str`): What happened to it, when [`receive`] returned `None`.
        counts (`Counts`): The last that it said.
        taken (`int`): Edition of the weights that it has read last.
    """

    def __init__(self, shared: SharedModel, trained: Sequence[str], settings: Settings, silent_s: float) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        with theirs:  # closed here, so that the end of the process is the end of the connection
            self._process = context.Process(
                target=serve, args=(theirs, shared, trained, settings), name="sampler", daemon=True
            )
            self._process.start()
        self._silent_s, self._patience_s = silent_s, _STARTS_S
        self._ending = threading.Lock()
        self._has_ended = False
        self._sent: int | None = None
        self.taken: int | None = None
        self.counts = Counts()
        self.trouble = ""
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=self._write, name="sampler's requests", daemon=True).start()

    @property
    def id(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def is_reading(self) -> bool:
        """Whether it was sent weights that it has not taken."""
        return not self._has_ended and self.taken != self._sent

    def send(self, message: Any) -> None:
        """Returns at once; what is sent to a process that has died is lost."""
        if isinstance(message, Weights):
            self._sent = message.edition
        self._outbox.put(pickle.dumps(message))

    def receive(self) -> Any | None:
        """The next that it says; `None` if it has died, or says nothing for too long, and is ended then."""
        hangs, unreadable = False, ""
        try:
            if self._connection.poll(self._patience_s):
                message = self._connection.recv()
                self._patience_s = self._silent_s
                return message
            hangs = True
        except (EOFError, OSError):
            pass
        except Exception as error:
            unreadable = repr(error)
        self.end()
        self.trouble = f"died (exit status {self._process.exitcode})"
        if hangs:
            self.trouble = f"gave no sign of life in {self._patience_s:g} s"
        elif unreadable:
            self.trouble = f"said what cannot be read ({unreadable})"
        return None

    def end(self) -> None:
        """End it, whatever it is doing; it may have ended. Any thread may call this."""
        with self._ending:
            self._process.kill()
            self._process.join()
            self._has_ended = True
        self._outbox.put(None)

    def _write(self) -> None:
        """In a thread: a process that does not read holds up nobody but this."""
        with suppress(OSError):  # it has died; whoever receives notices
            while (message := self._outbox.get()) is not None:
                self._connection.send_bytes(message)


@dataclass(frozen=True)
class _Pacing:
    settled: Callable[[], Awaitable[None]]
    loop: asyncio.AbstractEventLoop

    def when_settled(self, go: Callable[[], None]) -> None:
        async def wait() -> None:
            try:
                await self.settled()
            finally:
                go()  # whatever broke there: the batch waits for it

        waiting = wait()
        try:
            asyncio.run_coroutine_threadsafe(waiting, self.loop)
        except RuntimeError:  # the rollout is over, and its loop closed
            waiting.close()


def _settle(answer: Future[Sample], outcome: Sample | Exception) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)
