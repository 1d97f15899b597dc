"""The policy in a process of its own: it samples while the trainer updates.

The process holds a copy of the model and samples with [`LocalSampler`], as the trainer itself would. New weights are
written to shared memory, from where the process takes them between two responses: it first answers the requests that
it has begun, and begins no others. So each response comes from one version of the weights, and no episode ends for it.

A process that dies, or says nothing for some seconds, is started again with the weights that it was given last, and
asked again what it did not answer.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import astuple, dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn

from ..errors import RolloutError
from ..types import TokenIds
from .base import Sample, SamplingParams
from .local import LocalSampler

logger = logging.getLogger(__name__)

_STARTS_S = 120.0  # a process that takes longer to start does not
_ENDS_S = 5.0  # from a polite end to an impolite one
_BEATS_S = 1.0  # between two signs of life


@dataclass(frozen=True)
class _Ask:
    """Sample a response."""

    number: int
    prompt_ids: TokenIds
    params: SamplingParams
    episode_id: str
    order: tuple[int, ...]


@dataclass(frozen=True)
class _Answer:
    """A response, or why there is none."""

    number: int
    outcome: Sample | Exception


@dataclass(frozen=True)
class _Cancel:
    """Nobody waits for that response any more."""

    number: int


@dataclass(frozen=True)
class _Release:
    """Forget an episode's cache; `None`: everybody's."""

    episode_id: str | None


@dataclass(frozen=True)
class _Pace:
    """Whether each batch waits for a `_Go` after responses were handed out, or not."""

    on: bool


@dataclass(frozen=True)
class _HandedOut:
    """Responses were handed out, and the next batch waits."""


@dataclass(frozen=True)
class _Go:
    """All who are quick are back."""


@dataclass(frozen=True)
class _Weights:
    """There are new weights in the shared memory; and the answer, that they were taken."""

    version: int


@dataclass(frozen=True)
class _Counts:
    """What was sampled since the process began; a sign of life."""

    sampled_tokens: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    forward_s: float = 0.0


class WorkerSampler:
    """
    A [`Sampler`] that samples in another process of this machine. Responses are those of [`LocalSampler`], token by
    token, in paced rollouts; without pacing, batches depend on timing, and with them the last bits of probabilities.

    Args:
        model (`PreTrainedModel`):
            What the process begins with: a causal language model on the CPU that is nobody else's, with an attention
            of transformers' own. It is moved to shared memory.
        trained (`Sequence[str]`):
            Names of the parameters that change; all others are sent once.
        device (`torch.device`, *optional*):
            Where the process puts its copy. `None`: on the CPU, in the shared memory itself.
        cache_tokens (`int`, *optional*, defaults to `262144`):
            As [`LocalSampler`]'s.
        autocast (`torch.dtype`, *optional*):
            Type of mixed precision in forward passes; `None`: without.
        is_paced (`bool`, *optional*, defaults to `True`):
            Whether batches wait for quick environments, so that they are the same in every run; for one rollout at a
            time.
        silent_s (`float`, *optional*, defaults to `20.0`):
            A process that gives no sign of life for so long is given up.
        max_restarts (`int`, *optional*, defaults to `3`):
            How often a process that died, or was given up, is started again with the same weights.

    Raises:
        RolloutError: From `sample`, if the process died too often, or was closed.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        trained: Sequence[str],
        device: torch.device | None = None,
        cache_tokens: int | None = 262_144,
        autocast: torch.dtype | None = None,
        is_paced: bool = True,
        silent_s: float = 20.0,
        max_restarts: int = 3,
    ) -> None:
        self.policy_version = 0
        self.is_paced = is_paced
        self.silent_s = silent_s
        self.max_restarts = max_restarts
        self.num_restarts = 0
        self._restarts_left = max_restarts
        self._counts = self._counts_before = _Counts()  # of this process, and of those before it
        parameters = dict(model.named_parameters())
        self._model = model.share_memory()
        self._news = {name: parameters[name].detach().clone().share_memory_() for name in trained}
        self._settings = _Settings(device, cache_tokens, autocast, torch.get_num_threads())
        self._numbers = itertools.count()
        self._pending: dict[int, tuple[_Ask, Future[Sample]]] = {}
        self._lock = threading.RLock()  # of all that both the reader and the callers change
        self._taken = threading.Event()  # the process has taken the newest weights
        self._taken.set()
        self._pacing: _Pacing | None = None
        self._failure: RolloutError | None = None
        self._is_closed = True

    @property
    def process_id(self) -> int:
        """Of the process that samples, or did last."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def sampled_tokens(self) -> int:
        """Tokens of all responses."""
        return self._counts_before.sampled_tokens + self._counts.sampled_tokens

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return self._counts_before.prompt_tokens + self._counts.prompt_tokens

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of prompts that were forwarded."""
        return self._counts_before.prefilled_tokens + self._counts.prefilled_tokens

    @property
    def forward_s(self) -> float:
        """Seconds in the model's forward passes."""
        return self._counts_before.forward_s + self._counts.forward_s

    # -- as a sampler -------------------------------------------------------------------------------------------------

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        """Continue `prompt_ids`; see [`Sampler`]. May be called from any event loop."""
        answer: Future[Sample] = Future()
        with self._lock:
            if self._failure is not None:
                raise self._failure
            ask = _Ask(next(self._numbers), TokenIds(prompt_ids), params, episode_id, order)
            self._pending[ask.number] = ask, answer
            self._send(ask)
        try:
            return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            with self._lock:
                if self._pending.pop(ask.number, None) is not None:
                    self._send(_Cancel(ask.number))
            raise

    def release(self, episode_id: str) -> None:
        """Forget the episode's cache."""
        self._send(_Release(episode_id))

    def reset_cache(self) -> None:
        """Forget every waiting episode's keys and values."""
        self._send(_Release(None))

    def pace(self, settled: Callable[[], Awaitable[None]] | None) -> None:
        """Have `settled()` awaited, in the running event loop, before each batch is formed; see [`Sampler`]."""
        if not self.is_paced:
            return
        with self._lock:
            self._pacing = _Pacing(settled, asyncio.get_running_loop()) if settled is not None else None
            self._send(_Pace(settled is not None))

    # -- a run --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """
        Start the process; it may be started again when it was closed. It begins with the weights that the model has,
        or that it was given last.

        Raises:
            RolloutError: It does not start.
        """
        with self._lock:
            self._failure, self._restarts_left = None, self.max_restarts
            self._start()
            self._is_closed = False
            self._send_weights()

    def close(self) -> None:
        """End the process. Those who still wait for a response are told."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            self._fail(RolloutError("the sampler was closed"))
        _end(self._process)

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
        """
        while not self._taken.wait(1.0):  # the last ones; nobody may write over what is being read
            if self._failure is not None:
                raise self._failure
        with self._lock:
            for name, weight in weights:
                self._news[name].copy_(weight.detach())
            self.policy_version = version
            self._restarts_left = self.max_restarts  # a run of weeks may lose its process now and then
            self._send_weights()

    def _send_weights(self) -> None:
        self._taken.clear()
        self._send(_Weights(self.policy_version))

    # -- the process --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, self._model, self._news, self._settings), name="sampler", daemon=True
        )
        self._process.start()
        theirs.close()  # so that the end of the process is the end of the connection
        try:
            is_up = self._connection.poll(_STARTS_S) and self._connection.recv() is not None
        except (EOFError, OSError):
            is_up = False
        if not is_up:
            _end(self._process)
            raise RolloutError(
                f"the sampler's process did not start (exit status {self._process.exitcode}; its own output says "
                'more). A script that starts one does its work under `if __name__ == "__main__":`'
            )
        threading.Thread(target=self._read, args=(self._connection,), name="sampler's answers", daemon=True).start()

    def _send(self, message: Any) -> None:
        with self._lock, suppress(OSError):  # of a process that died; the reader notices, and sees to it
            self._connection.send(message)

    def _read(self, connection: Connection) -> None:
        """In a thread: what the process says, until it says no more."""
        hangs = False
        with connection, suppress(EOFError, OSError):
            while connection.poll(self.silent_s):
                self._take(connection.recv())
            hangs = True
        self._revive(hangs=hangs)

    def _take(self, message: Any) -> None:
        if isinstance(message, _Answer):
            with self._lock:
                _, answer = self._pending.pop(message.number, (None, None))
            if answer is not None:
                _settle(answer, message.outcome)
        elif isinstance(message, _Counts):
            self._counts = message
        elif isinstance(message, _Weights):
            self._taken.set()
        elif isinstance(message, _HandedOut):
            pacing = self._pacing
            if pacing is not None:
                pacing.when_settled(lambda: self._send(_Go()))

    def _revive(self, *, hangs: bool) -> None:
        """The process has died, or does nothing: start another one, and ask it what is not answered."""
        with self._lock:
            if self._is_closed:
                return
            _end(self._process)
            died = f"the sampler's process died (exit status {self._process.exitcode})"
            if hangs:
                died = f"the sampler's process gave no sign of life in {self.silent_s:g} s"
            if not self._restarts_left:
                self._fail(
                    RolloutError(
                        f"{died}, and was started again {self.max_restarts} times since it got these weights; its own "
                        "output says more, and the system's log where it was killed for its memory"
                    )
                )
                return
            self.num_restarts += 1
            self._restarts_left -= 1
            before, last = self._counts_before, self._counts
            self._counts_before = _Counts(*map(sum, zip(astuple(before), astuple(last), strict=True)))
            self._counts = _Counts()
            logger.warning("%s; it is started again, and asked again for %d responses", died, len(self._pending))
            try:
                self._start()
            except RolloutError as error:
                self._fail(error)
                return
            if self._pacing is not None:
                self._send(_Pace(True))
            self._send_weights()
            for _, (ask, _) in sorted(self._pending.items()):
                self._send(ask)

    def _fail(self, error: RolloutError) -> None:
        self._failure = error
        waiting, self._pending = self._pending, {}
        for _, answer in waiting.values():
            _settle(answer, error)


@dataclass(frozen=True)
class _Pacing:
    settled: Callable[[], Awaitable[None]]
    loop: asyncio.AbstractEventLoop

    def when_settled(self, go: Callable[[], None]) -> None:
        async def wait() -> None:
            await self.settled()
            go()

        with suppress(RuntimeError):  # the rollout is over, and its loop closed
            asyncio.run_coroutine_threadsafe(wait(), self.loop)


@dataclass(frozen=True)
class _Settings:
    device: torch.device | None
    cache_tokens: int | None
    autocast: torch.dtype | None
    num_threads: int


def _settle(answer: Future[Sample], outcome: Sample | Exception) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    if isinstance(outcome, Exception):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


def _end(process: Any) -> None:
    """End a process that may have ended."""
    process.terminate()
    process.join(_ENDS_S)
    if process.is_alive():
        process.kill()
        process.join()


# -- in the process ---------------------------------------------------------------------------------------------------


def _serve(connection: Connection, model: nn.Module, news: dict[str, torch.Tensor], settings: _Settings) -> None:
    """What the process does, for as long as somebody listens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, whose end is ours
    torch.set_num_threads(settings.num_threads)
    if settings.device is not None:
        model = copy.deepcopy(model).to(settings.device)
    asyncio.run(_Worker(connection, model, news, settings).run())


class _Worker:
    def __init__(
        self, connection: Connection, model: nn.Module, news: dict[str, torch.Tensor], settings: _Settings
    ) -> None:
        self.connection = connection
        self.lock = threading.Lock()  # of the connection: the pulse is another thread's
        self.news = news
        self.parameters = dict(model.named_parameters())
        self.sampler = LocalSampler(model, cache_tokens=settings.cache_tokens)
        self.autocast = settings.autocast
        self.device_type = next(model.parameters()).device.type
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.num_sampling = 0
        self.gate = asyncio.Condition()
        self.is_changing = False
        self.change: asyncio.Task[None] | None = None
        self.handed_out = False
        self.went = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        over: asyncio.Future[None] = loop.create_future()

        def read() -> None:
            while True:
                try:
                    message = self.connection.recv()
                except (EOFError, OSError):  # the trainer has ended, or was killed
                    loop.call_soon_threadsafe(over.set_result, None)
                    return
                loop.call_soon_threadsafe(self.take, message)

        def beat() -> None:
            while not over.done():
                self._send(self._counts())
                time.sleep(_BEATS_S)

        for target in (read, beat):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()
        with self._numerics():
            await over

    def take(self, message: Any) -> None:
        """In the order in which they were sent."""
        if isinstance(message, _Ask):
            self.tasks[message.number] = asyncio.ensure_future(self._answer(message))
        elif isinstance(message, _Cancel):
            task = self.tasks.get(message.number)
            if task is not None:
                task.cancel()
        elif isinstance(message, _Release):
            if message.episode_id is None:
                self.sampler.reset_cache()
            else:
                self.sampler.release(message.episode_id)
        elif isinstance(message, _Pace):
            self.handed_out = message.on  # at first everybody is on the way
            self.sampler.pace(self._settled if message.on else None)
            self.went.set()
        elif isinstance(message, _Go):
            self.went.set()
        elif isinstance(message, _Weights):
            self.is_changing = True
            self.change = asyncio.ensure_future(self._change(message.version))

    async def _answer(self, ask: _Ask) -> None:
        try:
            async with self.gate:
                await self.gate.wait_for(lambda: not self.is_changing)
                self.num_sampling += 1
            try:
                outcome: Sample | Exception = await self.sampler.sample(
                    ask.prompt_ids.tolist(), ask.params, episode_id=ask.episode_id, order=ask.order
                )
            except Exception as error:
                outcome = error
            finally:
                self.num_sampling -= 1
                if self.is_changing:
                    async with self.gate:
                        self.gate.notify_all()
            self.handed_out = True
            self._send(self._counts())  # before the response, whose rollout may read them when it has the last one
            self._send(_Answer(ask.number, outcome))
        finally:
            del self.tasks[ask.number]

    async def _change(self, version: int) -> None:
        """Take the new weights, between responses."""
        async with self.gate:
            await self.gate.wait_for(lambda: self.num_sampling == 0)
            with torch.no_grad():
                for name, new in self.news.items():
                    self.parameters[name].copy_(new)
            self.sampler.reset_cache()
            self.sampler.policy_version = version
            self.is_changing = False
            self.gate.notify_all()
        self._send(_Weights(version))

    async def _settled(self) -> None:
        """Wait until the trainer's side says that all who were handed a response are back."""
        if not self.handed_out:
            return
        self.handed_out = False
        self.went.clear()
        self._send(_HandedOut())
        await self.went.wait()

    def _counts(self) -> _Counts:
        sampler = self.sampler
        return _Counts(sampler.sampled_tokens, sampler.prompt_tokens, sampler.prefilled_tokens, sampler.forward_s)

    def _send(self, message: Any) -> None:
        with self.lock, suppress(OSError):  # nobody listens any more
            self.connection.send(message)

    def _numerics(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast)
