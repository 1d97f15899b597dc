"""The process that samples while the trainer updates, and its messages. The trainer's side: `worker.py`.

Requests are begun in the order in which they were sent. New weights are taken between responses: first the requests
that were begun are answered, and no others are begun. So each response comes from one version of the weights.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection

import torch

from ..errors import SamplerError, StepPOError
from ..numerics import Numerics, ProcessNumerics, give_back_memory, use_device
from ..types import TokenIds
from .base import Counts, Sample, SamplingParams
from .local import LocalSampler
from .shared_model import SharedModel

logger = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0  # between two signs of life


@dataclass(frozen=True)
class Ask:
    """Sample a response."""

    number: int
    prompt_ids: TokenIds
    params: SamplingParams
    episode_id: str
    order: tuple[int, ...]


@dataclass(frozen=True)
class Sampled:
    """A response, or why there is none."""

    number: int
    outcome: Sample | StepPOError


@dataclass(frozen=True)
class Cancel:
    """That response is no longer wanted."""

    number: int


@dataclass(frozen=True)
class Release:
    """Forget an episode's cache; `None`: that of all episodes."""

    episode_id: str | None


@dataclass(frozen=True)
class Pace:
    """Whether each batch waits for a `Quiet` after responses were sent."""

    on: bool


@dataclass(frozen=True)
class AwaitQuiet:
    """Responses were sent, and the next batch waits for a `Quiet`."""


@dataclass(frozen=True)
class Quiet:
    """No quick episode is away from the sampler any more; see [`Pacer`]."""


@dataclass(frozen=True)
class NewWeights:
    """New weights are in the shared memory. Requests after this message are sampled with them."""

    edition: int  # a unique number, while a version may be sent twice
    version: int


@dataclass(frozen=True)
class WeightsTaken:
    """The new weights were copied from the shared memory."""

    edition: int


@dataclass(frozen=True)
class WorkerSettings:
    """Settings of the process; see [`WorkerSampler`]."""

    numerics: Numerics
    cache_tokens: int | None
    stuck_s: float
    process: ProcessNumerics
    allow_uncached: bool = False


def serve(connection: Connection, shared: SharedModel, trained: Sequence[str], settings: WorkerSettings) -> None:
    """The process's main function: sample until the connection ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the trainer, which ends this process
    use_device(settings.numerics.device)
    settings.process.apply()
    asyncio.run(_Worker(connection, shared, trained, settings).run())


ToWorker = Ask | Cancel | Release | Pace | Quiet | NewWeights
FromWorker = Sampled | Counts | WeightsTaken | AwaitQuiet


class _Worker:
    def __init__(
        self, connection: Connection, shared: SharedModel, trained: Sequence[str], settings: WorkerSettings
    ) -> None:
        self.connection = connection
        self.settings = settings
        model = shared.load(settings.numerics.device, private=set(trained))
        parameters = dict(model.named_parameters())
        self.trained = [(parameters[name], shared.weights[name]) for name in trained]
        self._copy_weights()  # they are needed to try out whether the model can be sampled with a cache
        self.sampler = LocalSampler(
            model,
            cache_tokens=settings.cache_tokens,
            allow_uncached=settings.allow_uncached,
            numerics=settings.numerics,
        )
        self.sending = threading.Lock()  # the event loop and the heartbeat's thread send
        self.asked: dict[int, Ask] = {}  # not begun yet
        self.begun: dict[int, asyncio.Task[None]] = {}
        self.coming: NewWeights | None = None  # to be taken when nothing is being sampled
        self.has_weights = False
        self.has_answered = False
        self.is_quiet = asyncio.Event()

    async def run(self) -> None:
        """Handle messages. An exception here ends the process, which the trainer's side notices."""
        inbox: asyncio.Queue[ToWorker | _Over] = asyncio.Queue()
        loop = asyncio.get_running_loop()
        self.inbox = inbox

        def read() -> None:
            while True:
                try:
                    message = self.connection.recv()
                except (EOFError, OSError):
                    os._exit(0)  # the trainer has ended, or was killed; a forward pass may still be running
                loop.call_soon_threadsafe(inbox.put_nowait, message)

        for target in (read, self._beat):
            threading.Thread(target=target, name=target.__name__, daemon=True).start()
        self.watch = asyncio.ensure_future(self._watch())
        while True:
            self._take(await inbox.get())
            self._begin()

    def _take(self, message: ToWorker | _Over) -> None:
        if isinstance(message, Ask):
            self.asked[message.number] = message
        elif isinstance(message, Cancel):
            self.asked.pop(message.number, None)
            if message.number in self.begun:
                self.begun[message.number].cancel()
        elif isinstance(message, Release):
            if message.episode_id is None:
                self.sampler.reset_cache()
                give_back_memory(self.settings.numerics.device)
            else:
                self.sampler.release(message.episode_id)
        elif isinstance(message, Pace):
            self.has_answered = message.on  # at first every episode is away
            self.sampler.pace(self._quiet if message.on else None)
            self.is_quiet.set()
        elif isinstance(message, Quiet):
            self.is_quiet.set()
        elif isinstance(message, NewWeights):
            self.coming = message
        elif isinstance(message, _Over):
            task = self.begun.pop(message.number)
            if not task.cancelled():
                task.result()

    def _begin(self) -> None:
        """Begin the requests. If there are new weights, take them first, once nothing is being sampled."""
        if self.coming is not None and not self.begun:
            self._take_weights(self.coming)
            self.coming = None
        if self.coming is not None or not self.has_weights:
            return
        for number, ask in self.asked.items():
            self.begun[number] = task = asyncio.ensure_future(self._answer(ask))
            task.add_done_callback(partial(self._note_end, number))
        self.asked.clear()

    def _note_end(self, number: int, task: asyncio.Task[None]) -> None:
        self.inbox.put_nowait(_Over(number))

    def _take_weights(self, weights: NewWeights) -> None:
        self._copy_weights()
        self.sampler.reset_cache()
        self.sampler.policy_version = weights.version
        self.has_weights = True
        self._send(WeightsTaken(weights.edition))

    @torch.no_grad()
    def _copy_weights(self) -> None:
        for own, shared in self.trained:
            own.copy_(shared)

    async def _answer(self, ask: Ask) -> None:
        outcome: Sample | StepPOError
        try:
            outcome = await self.sampler.sample(
                ask.prompt_ids.tolist(), ask.params, episode_id=ask.episode_id, order=ask.order
            )
        except StepPOError as error:
            outcome = type(error)(str(error))
        except Exception as error:  # not every exception can be pickled, but its text can
            logger.exception("a response could not be sampled")
            outcome = SamplerError("".join(traceback.format_exception_only(error)).strip())
        self.has_answered = True
        self._send(self.sampler.counts)  # before the response: after the last one the rollout may read the counts
        self._send(Sampled(ask.number, outcome))

    async def _quiet(self) -> None:
        """Wait until the trainer's side says that it is quiet, if responses were sent since the last time."""
        if not self.has_answered:
            return
        self.has_answered = False
        self.is_quiet.clear()
        self._send(AwaitQuiet())
        await self.is_quiet.wait()

    def _beat(self) -> None:
        """In its own thread: send signs of life, also during a long forward pass."""
        trainer = multiprocessing.parent_process()
        assert trainer is not None
        while True:
            if os.getppid() != trainer.pid:  # a process that it forked may still hold its end of the connection
                os._exit(0)
            self._send(self.sampler.counts)
            time.sleep(_HEARTBEAT_S)

    async def _watch(self) -> None:
        """End the process with a traceback when one turn of the event loop takes too long."""
        while True:
            faulthandler.dump_traceback_later(self.settings.stuck_s, exit=True)
            await asyncio.sleep(min(_HEARTBEAT_S, self.settings.stuck_s / 2))

    def _send(self, message: FromWorker) -> None:
        with self.sending:
            try:
                self.connection.send(message)
            except OSError:
                os._exit(0)  # the trainer has ended


@dataclass(frozen=True)
class _Over:
    """A message to itself: a response was sent, or is no longer wanted."""

    number: int
