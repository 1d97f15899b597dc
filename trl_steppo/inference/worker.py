"""The policy in its own process: it samples while the trainer updates.

The process holds a copy of the model and samples with [`LocalSampler`], as the trainer itself would. New weights are
written to shared memory. The process copies them from there between two responses: it first answers the requests that
it has begun, and begins no others. So each response comes from one version of the weights, and no episode ends early.

A process that dies, hangs, or gives no sign of life for some seconds is started again with the weights that it was
given last, and gets the unanswered requests again.

This is the trainer's side; `worker_process.py` is the process's side. No event loop ever waits for the process:
messages to it go to a queue, and its messages are received in a thread, which also ends the process and starts the
next one.
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

import torch
from transformers import PreTrainedModel

from ..errors import RolloutError
from ..numerics import Numerics, ProcessNumerics
from ..types import TokenIds
from .base import Counts, Sample, SamplingParams
from .cached_rows import samples_with_a_cache
from .shared_model import SharedModel
from .worker_process import (
    Ask,
    AwaitQuiet,
    Cancel,
    FromWorker,
    NewWeights,
    Pace,
    Quiet,
    Release,
    Sampled,
    ToWorker,
    WeightsTaken,
    WorkerSettings,
    serve,
)

logger = logging.getLogger(__name__)

_START_TIMEOUT_S = 120.0


class WorkerSampler:
    """
    A [`Sampler`] that samples in another process of this machine. Responses are those of [`LocalSampler`], token by
    token, in paced rollouts; without pacing, batches depend on timing, and with them the last bits of probabilities.

    Args:
        model (`PreTrainedModel`):
            The model that the process begins with: a causal language model on the CPU that is not used elsewhere, with
            an attention implementation of transformers. Its weights move to shared memory.
        trained (`Sequence[str]`):
            Names of the parameters that are trained; all others are sent once.
        device (`torch.device`, *optional*):
            Device of the process's copy. `None`: the CPU, where only `trained` is copied.
        cache_tokens (`int`, *optional*, defaults to `262144`):
            As [`LocalSampler`]'s.
        allow_uncached (`bool`, *optional*, defaults to `False`):
            As [`LocalSampler`]'s.
        autocast (`torch.dtype`, *optional*):
            Type of mixed precision in forward passes; `None`: no mixed precision.
        is_paced (`bool`, *optional*, defaults to `True`):
            Whether batches wait for quick environments, so that they are the same in every run. For one rollout at a
            time.
        silent_s (`float`, *optional*, defaults to `20.0`):
            A process that gives no sign of life for this long is given up. Signs also come during forward passes.
        stuck_s (`float`, *optional*, defaults to `600.0`):
            A process that needs this long for a forward pass, or for taking new weights, ends itself and prints a
            traceback. Choose it longer than the longest prefill.
        max_restarts (`int`, *optional*, defaults to `3`):
            Maximum number of times that the process is started again with the same weights after it died or was given
            up.

    Raises:
        ConfigurationError: If the model cannot be sampled with a cache and `allow_uncached` is not set.
        RolloutError: From `sample`, if the process died too often, or was closed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
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
        samples_with_a_cache(model, allow_uncached=allow_uncached)  # fails here, before a process starts
        self._shared = SharedModel(model)
        self._settings = WorkerSettings(
            Numerics(device or torch.device("cpu"), autocast),
            cache_tokens,
            stuck_s,
            ProcessNumerics.of_this_process(),
            allow_uncached,
        )
        self._numbers = itertools.count()
        # Held briefly: event-loop threads acquire it. Notified when weights were taken, or a process or this ended.
        self._changed = threading.Condition()
        self._process: _Process | None = None  # the current one, or the last
        self._keeper: threading.Thread | None = None
        self._weights: NewWeights | None = NewWeights(next(self._numbers), 0)  # `None` while they are written
        self._pending: dict[int, tuple[Ask, Future[Sample]]] = {}
        self._pacing: _Pacing | None = None
        self._restarts_left = max_restarts
        self._counts_before = Counts()  # of earlier processes
        self._failure: RolloutError | None = RolloutError("the sampler was not started")

    @property
    def process_id(self) -> int:
        """Id of the current process, or of the last one."""
        assert self._process is not None
        return self._process.id

    @property
    def counts(self) -> Counts:
        """What all processes of this sampler have done."""
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
        """Forget every waiting episode's keys and values. The process returns their memory to its device."""
        self._send(Release(None))

    def pace(self, quiet: Callable[[], Awaitable[None]] | None) -> None:
        """Have `quiet()` awaited, in the running event loop, before each batch is formed; see [`Sampler`]."""
        if not self.is_paced:
            return
        with self._changed:
            self._pacing = _Pacing(quiet, asyncio.get_running_loop()) if quiet is not None else None
            self._send(Pace(quiet is not None))

    def _send(self, message: ToWorker) -> None:
        with self._changed:
            if self._process is not None:
                self._process.send(message)

    # -- a run --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """
        Start the process, with the weights of the model, or those that were given last. May be called again after
        [`close`].

        Raises:
            RolloutError: The process does not start.
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
        """End the process. Requests that still wait fail with a `RolloutError`."""
        keeper, self._keeper = self._keeper, None
        if keeper is None:
            return
        with self._changed:
            self._fail(RolloutError("the sampler was closed"))
            process = self._process
        assert process is not None
        process.end()
        keeper.join()  # so that it does not see a process that is started later

    # -- weights ------------------------------------------------------------------------------------------------------

    def update_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """
        Give the process new weights. Requests from now on are sampled with them. Returns when they are in the shared
        memory; the process copies them as soon as the requests that it has begun are answered.

        Args:
            weights (`Iterable[tuple[str, torch.Tensor]]`):
                The trained parameters with their names, whole.
            version (`int`):
                Number of updates applied to them.

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
            self._weights = NewWeights(next(self._numbers), version)
            self._restarts_left = self.max_restarts  # a long run may lose its process now and then
            if self._process is not None:
                self._process.send(self._weights)

    def _is_read(self) -> bool:
        """Whether a process may be reading the weights in the shared memory."""
        return self._process is not None and self._process.is_reading

    # -- the process --------------------------------------------------------------------------------------------------

    def _launch(self) -> _Process | None:
        """Start a process, and send it the weights and the pending requests; `None` if this was closed meanwhile."""
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
        """In a thread: receive the process's messages; when it has ended, start another one, until this is closed."""
        try:
            while process is not None:
                while (message := process.receive()) is not None:
                    self._take(process, message)
                process = self._replace(process)
        except Exception as error:
            logger.exception("the sampler's process is not looked after any more")
            self._fail(RolloutError(f"the sampler's process could not be started again, or heard: {error!r}"))

    def _take(self, process: _Process, message: FromWorker) -> None:
        with self._changed:
            if isinstance(message, Sampled):
                _, answer = self._pending.pop(message.number, (None, None))
                if answer is not None:
                    _settle(answer, message.outcome)
            elif isinstance(message, Counts):
                process.counts = message
            elif isinstance(message, WeightsTaken):
                process.taken = message.edition
                self._changed.notify_all()
            elif isinstance(message, AwaitQuiet) and self._pacing is not None:
                self._pacing.when_quiet(lambda: process.send(Quiet()))

    def _replace(self, process: _Process) -> _Process | None:
        """Start another process after one has ended; `None` if there is to be none."""
        with self._changed:
            self._changed.notify_all()  # it no longer reads the shared memory
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
    One process that samples: its messages in both directions, from its start to its end.

    Attributes:
        trouble (`str`): Why it ended, once [`receive`] has returned `None`.
        counts (`Counts`): The last counts that it sent.
        taken (`int`): Edition of the weights that it has copied last.
    """

    def __init__(self, shared: SharedModel, trained: Sequence[str], settings: WorkerSettings, silent_s: float) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        with theirs:  # closed here, so that the connection ends with the process
            self._process = context.Process(
                target=serve, args=(theirs, shared, trained, settings), name="sampler", daemon=True
            )
            self._process.start()
        self._silent_s, self._patience_s = silent_s, _START_TIMEOUT_S
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
        """Whether it was sent weights that it has not copied yet."""
        return not self._has_ended and self.taken != self._sent

    def send(self, message: ToWorker) -> None:
        """Send a message. Returns at once; a message to a process that has died is lost."""
        if isinstance(message, NewWeights):
            self._sent = message.edition
        self._outbox.put(pickle.dumps(message))

    def receive(self) -> FromWorker | None:
        """Its next message; `None` if it has died, or was silent for too long and is ended."""
        hangs, unreadable = False, ""
        try:
            if self._connection.poll(self._patience_s):
                message: FromWorker = self._connection.recv()
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
        """Kill the process; it may have ended already. Any thread may call this."""
        with self._ending:
            self._process.kill()
            self._process.join()
            self._has_ended = True
        self._outbox.put(None)

    def _write(self) -> None:
        """In a thread: a process that does not read delays only this thread."""
        with suppress(OSError):  # it has died, which `receive` notices
            while (message := self._outbox.get()) is not None:
                self._connection.send_bytes(message)


@dataclass(frozen=True)
class _Pacing:
    """How to wait for quick environments, in the rollout's event loop; see [`Pacer`]."""

    quiet: Callable[[], Awaitable[None]]
    loop: asyncio.AbstractEventLoop

    def when_quiet(self, go: Callable[[], None]) -> None:
        """Call `go` when it is quiet, or the waiting fails."""

        async def wait() -> None:
            try:
                await self.quiet()
            finally:
                go()  # also after an error: the batch waits for it

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
