"""The policy on vLLM servers: token ids in, token ids and log-probabilities out, over HTTP.

Each server has a keeper here: a coroutine that checks the server and makes it ready again after any failure. *Ready*
means that the server answers, that it was started with the options that sampling needs, and that it has the newest
weights. A server that died, hangs or was started again is not ready until its keeper has checked it. Its requests are
sent again, to another server or to this one when it is back. Within a time limit a keeper says that its server is
ready, or what its trouble is. Nothing waits for a server in trouble.

Each set of weights has a unique name. With each response a server reports the name of the weights that it sampled
from, so that no response of other weights is taken, such as those that a server was started with.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ..calls import CallTimeoutError, within
from ..errors import ConfigurationError, DataError, RolloutError
from ..extras import install_command
from ..types import StopReason, TokenIds
from .base import Counts, Sample, SamplingParams, check_request
from .vllm_server import FIRST_VERSION, AnswerError, Sending, VLLMServer, Weights
from .vllm_transfer import Join

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_ATTEMPTS = 5  # of one request, which may break every server
_RETRY_INTERVAL_S = 0.2  # between two checks of a server that is not ready
_CONNECT_TIMEOUT_S = 5.0
_KEEPALIVE_S = 2.0  # of an idle connection; vLLM closes it after 5 s, and a request may be on its way then


class VLLMSampler:
    """
    A [`Sampler`] that asks vLLM servers (0.32 or newer). An episode stays on the server that it began on, where its
    prefix is cached. New episodes go to the least loaded server.

    Args:
        urls (`Sequence[str]`):
            URLs of the servers. Each is started as `vllm serve` with `VLLM_SERVER_DEV_MODE=1`, whose endpoints take
            new weights, `--enable-scale-out` and `--logprobs-mode processed_logprobs`; for adapters with
            `--enable-lora --max-loras 2`; on a CPU perhaps with an extension ([`PacksOutputLayer`]). The environment
            variable `VLLM_API_KEY` is their key, if they have one.
        timeout_s (`float`, *optional*, defaults to `240.0`):
            How long an attempt waits for a server while none is ready. A server that takes half as long for new
            weights is left out until it has them. A server that computes nothing for half as long, although it has
            requests, is given up.
        sends_weights (`bool`, *optional*, defaults to `True`):
            Whether this process sends weights to servers, and unloads its adapters at the end. `False`: another
            process has sent them before each [`update`] here.
        silent_s (`float`, *optional*, defaults to `20.0`):
            A server that does not answer a health check for this long is given up until it does.
        poll_s (`float`, *optional*, defaults to `1.0`):
            Time between two health checks.
        retry_s (`float`, *optional*, defaults to `0.2`):
            Time before a request that was answered with an error is sent again, each time five times as long.
        join (`Callable`, *optional*):
            Makes a group of this process and a server's workers, in which whole weights are sent ([`NCCLGroup`]).
            `None`: servers read them in a directory.
        vocabulary_size (`int`, *optional*):
            Number of token ids that the policy can read; prompts with other ids are refused here. `None`: not known.

    Raises:
        ConfigurationError: From the first `update`, if a server lacks an option; from `sample`, if prompt and response
            are longer than the server takes, a number of the [`SamplingParams`] is outside of its range, or `top_p` or
            `top_k` is set.
        DataError: From `sample`, if servers answer other prompts, but not this one.
        RolloutError: If no server is ready for `timeout_s`, no server has the options that sampling needs, servers do
            not answer in five attempts, or this sampler was closed.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout_s: float = 240.0,
        sends_weights: bool = True,
        silent_s: float = 20.0,
        poll_s: float = 1.0,
        retry_s: float = _RETRY_INTERVAL_S,
        join: Join | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        try:
            import aiohttp  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                f"`use_vllm` is set, but aiohttp is not installed: {install_command('vllm')}"
            ) from error
        self.timeout_s = timeout_s
        self.vocabulary_size = vocabulary_size
        self.sends_weights = sends_weights
        self.silent_s = silent_s
        self.poll_s = poll_s
        self.retry_s = retry_s
        self.counts = Counts()
        self.num_retries = 0  # requests that were asked again
        # With `/v1`, as clients of the OpenAI API write it, every request would be answered with a 404.
        self._servers = [VLLMServer(url.rstrip("/").removesuffix("/v1"), silent_s, join) for url in urls]
        self._homes: dict[str, VLLMServer] = {}
        self._weights: Weights | None = None
        self._adapter_before: Weights | None = None
        self._is_held = False
        self._running: Counter[Weights] = Counter()  # requests that servers have begun
        self._busy_since = 0.0
        self._failure: RolloutError | None = None
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- as a sampler -------------------------------------------------------------------------------------------------

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        """Continue `prompt_ids`; see [`Sampler`]. May be called from any event loop."""
        check_request(prompt_ids, params, episode_id=episode_id, vocabulary_size=self.vocabulary_size)
        if params.top_p != 1 or params.top_k != 0:
            raise ConfigurationError(
                f"`top_p` is {params.top_p} and `top_k` {params.top_k}: vLLM's log-probabilities are then of what "
                "these leave; leave them out"
            )
        return await asyncio.wrap_future(self._submit(self._sample(list(prompt_ids), params, episode_id)))

    def release(self, episode_id: str) -> None:
        """The episode is over."""
        loop = self._loop
        if loop is not None:
            with suppress(RuntimeError):  # it was closed in between
                loop.call_soon_threadsafe(self._homes.pop, episode_id, None)

    def pace(self, quiet: Callable[[], Awaitable[None]] | None) -> None:
        """Servers form their batches themselves."""

    @property
    def context(self) -> int | None:
        """Maximum number of tokens of a prompt and its response that every server takes; `None` while unknown."""
        known = [server.options.max_tokens for server in self._servers if server.options is not None]
        return min(known, default=None)

    # -- a run --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to check the servers. May be called again after [`close`]. Weights come with [`update`]."""
        assert self._loop is None
        self._failure = None
        self._is_held = False
        self._loop = loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(loop,), name="vLLM", daemon=True).start()
        self._submit(self._open()).result()

    def close(self) -> None:
        """Stop checking the servers, which go on. Requests that wait fail with a `RolloutError`."""
        loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    def hold(self) -> None:
        """Return when every request that servers have begun is answered. No other begins until the next [`update`]."""
        self._submit(self._hold()).result()

    def settle(self) -> None:
        """Return when every request that servers have begun with other weights than the newest is answered."""
        self._submit(self._settle()).result()

    def update(self, weights: Weights) -> None:
        """
        Sample from these weights from now on. No request begins until each server has them or is in trouble.

        Whole weights replace the ones before, so every running request has to end first ([`hold`]). Adapters do not:
        running requests end with the old adapter. Servers keep two adapters, so requests that run with a third one
        have to end first ([`settle`]).

        Args:
            weights ([`Weights`]):
                The weights. All processes that share the servers call this, first the one that sends them.
        """
        self._submit(self._update(weights)).result()

    def _submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if self._loop is None:
            coroutine.close()
            raise RolloutError("the sampler was closed")
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    # -- in the thread ------------------------------------------------------------------------------------------------

    async def _open(self) -> None:
        import aiohttp

        key = os.environ.get("VLLM_API_KEY")
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._session, self._changed = session, asyncio.Event()
        self._homes.clear()
        for server in self._servers:
            server.open(session)
        self._keepers = [asyncio.ensure_future(self._keep(server)) for server in self._servers]

    async def _close(self) -> None:
        under_way = [server.sending.task for server in self._servers if server.sending and server.is_sent_weights]
        if under_way:  # a server does not survive an interrupted transfer
            await asyncio.wait(under_way, timeout=self.silent_s)
        ready = [server for server in self._servers if server.is_ready]
        self._failure = RolloutError("the sampler was closed")
        for keeper in self._keepers:
            keeper.cancel()
        for server in self._servers:
            server.give_up(self._failure)
        self._tell()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        if rest:
            await asyncio.wait(rest, timeout=_CONNECT_TIMEOUT_S)
        weights = self._weights
        if self.sends_weights and weights is not None:
            endings = (asyncio.wait_for(server.end_run(weights), self.silent_s) for server in ready)
            await asyncio.gather(*endings, return_exceptions=True)
        await asyncio.gather(*(server.close(self.silent_s) for server in self._servers))
        self._weights = self._adapter_before = None
        await self._session.close()

    async def _hold(self) -> None:
        self._is_held = True
        await self._until_answered(lambda: not self._running)

    async def _settle(self) -> None:
        await self._until_answered(lambda: set(self._running) <= {self._weights})

    async def _until_answered(self, holds: Callable[[], bool]) -> None:
        """Wait without a limit: keepers end the requests of a server that is stuck."""
        answered = asyncio.ensure_future(self._until(holds))
        while not (await asyncio.wait({answered}, timeout=self.timeout_s))[0]:
            running = [f"{server.num_running} of {server.url}" for server in self._servers if server.num_running]
            logger.warning("new weights wait for responses: %s", ", ".join(running))
        await answered

    async def _update(self, weights: Weights) -> None:
        is_first = self._weights is None
        self._adapter_before = self._weights if weights.is_adapter else None
        self._weights = weights
        self._is_held = True
        for server in self._servers:
            server.request_check()
        try:
            await self._until(
                lambda: self._any_ready() and all(server.is_ready or server.trouble for server in self._servers),
                self.timeout_s,
                refuses=is_first,
            )
        finally:
            self._is_held = False
            self._tell()

    async def _keep(self, server: VLLMServer) -> None:
        """While the sampler is open: make a server ready again as soon as possible."""
        while self._failure is None:
            trouble = server.trouble
            try:
                await self._check(server)
            except Exception as error:  # a keeper that ended would leave its server in trouble
                server.give_up(error)
            if trouble is None and server.trouble is not None:
                logger.warning("vLLM at %s: %s", server.url, server.trouble)
            self._tell()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(
                    server.check_requested.wait(), self.poll_s if server.is_ready else _RETRY_INTERVAL_S
                )
            server.check_requested.clear()

    async def _check(self, server: VLLMServer) -> None:
        limit_s = self.timeout_s / 2
        await _said_in(limit_s, self._look(server, limit_s))
        if server.sending is not None:
            await self._take_sent(server, server.sending, limit_s)

    async def _look(self, server: VLLMServer, limit_s: float) -> None:
        """Check a server, and begin to send it the weights that it lacks."""
        await server.ask("GET", "/health")
        if server.num_running:  # only with requests can it be stuck
            await server.check_progress(limit_s)
        weights = self._weights
        if weights is None or server.sending is not None:
            return
        if server.is_ready and (server.num_running or not self.sends_weights):  # else other processes may rely on it
            return
        if not self.sends_weights and not await server.has(weights):  # it is asked nothing else meanwhile
            server.trouble = RolloutError(f"it does not have the weights {weights.name}, which another rank sends")
            return
        if server.options is None:
            await server.check_options()
        if self.sends_weights and not await server.has(weights):
            server.is_ready = False
            server.send(weights, self._adapter_before)
        elif weights is self._weights:
            server.set_ready()

    async def _take_sent(self, server: VLLMServer, sending: Sending, limit_s: float) -> None:
        """Wait for weights on their way, even if the server is in trouble: it goes on loading in any case."""
        left_s = sending.since + limit_s - time.monotonic()
        if not (await asyncio.wait({sending.task}, timeout=max(left_s, _RETRY_INTERVAL_S)))[0]:
            server.trouble = ConnectionError(f"it has been taking new weights for more than {limit_s:g} s")
            if server.is_sent_weights:  # a transfer that hangs does not end by itself
                raise server.trouble
            return
        server.sending = None
        sending.task.result()
        if not await _said_in(limit_s, server.has(sending.weights)):
            raise RolloutError(f"it did not take the weights {sending.weights.name}")
        if sending.weights is self._weights:
            server.set_ready()

    async def _sample(self, prompt_ids: list[int], params: SamplingParams, episode_id: str) -> Sample:
        trouble: Exception | None = None
        failed: list[VLLMServer] = []
        for attempt in range(_MAX_ATTEMPTS):
            self.num_retries += attempt > 0
            if isinstance(trouble, AnswerError):  # it came at once, and the next one may, too
                await asyncio.sleep(self.retry_s * 5 ** (attempt - 1))
            server = await self._place(episode_id, failed)
            weights = self._weights
            assert weights is not None
            server.check_length(len(prompt_ids), params)
            try:
                with self._counted(server, weights):
                    answer = await server.generate(prompt_ids, params, weights)
                return self._take(answer, params, weights)
            except (AnswerError, OSError) as error:
                if isinstance(error, AnswerError) and error.status == 400:
                    raise DataError(f"vLLM at {server.url}: {error}") from None
                trouble = error
                failed.append(server)
                server.request_check()
        is_of_prompt = isinstance(trouble, AnswerError) and trouble.status >= 500 and await self._answers(server)
        raise (DataError if is_of_prompt else RolloutError)(
            f"a response was given up after {_MAX_ATTEMPTS} attempts; vLLM at {server.url}: {trouble}"
        )

    async def _answers(self, server: VLLMServer) -> bool:
        """Whether a server continues a harmless prompt; `False` while requests are held back."""
        if self._is_held or self._weights is None:
            return False
        with self._counted(server, self._weights), suppress(AnswerError, OSError, asyncio.TimeoutError):
            await asyncio.wait_for(server.try_out(), self.timeout_s / 2)
            return True
        return False

    def _take(self, answer: Any, params: SamplingParams, weights: Weights) -> Sample:
        choice = answer["choices"][0]
        versions = {span["version"] for span in choice.get("weight_versions") or ()}
        expected = FIRST_VERSION if weights.is_adapter else weights.name  # an adapter's own name was asked for
        if versions != {expected}:
            raise AnswerError(200, f"a response from the weights {sorted(versions)} instead of {expected}")
        token_ids, usage = choice["token_ids"], answer["usage"]
        is_stopped = bool(token_ids) and token_ids[-1] in params.stop_token_ids
        if not is_stopped and len(token_ids) != params.max_new_tokens:
            raise AnswerError(200, f"a response that ended with {choice.get('finish_reason')!r}")
        details = usage.get("prompt_tokens_details")
        cached_tokens = (details["cached_tokens"] or 0) if details is not None else 0
        self.counts += Counts(
            sampled_tokens=len(token_ids),
            prompt_tokens=usage["prompt_tokens"] if details is not None else 0,
            prefilled_tokens=usage["prompt_tokens"] - cached_tokens,
        )
        return Sample(
            TokenIds(token_ids),
            tuple(entry["logprob"] for entry in choice["logprobs"]["content"]),
            StopReason.STOP if is_stopped else StopReason.LENGTH,
            weights.version,
        )

    async def _place(self, episode_id: str, failed: Sequence[VLLMServer]) -> VLLMServer:
        """
        A server that is ready: the episode's own while it is not in trouble and has not `failed` twice, else the one
        with the fewest episodes and requests.
        """
        home = self._homes.get(episode_id)

        def is_left() -> bool:
            return home is None or home.trouble is not None or failed.count(home) > 1

        def has_place() -> bool:
            return self._any_ready() if home is None or is_left() else home.is_ready

        while self._is_held or not has_place():
            await self._until(lambda: not self._is_held)  # an update, which has its own time limit
            if not await self._until(lambda: self._is_held or has_place(), self.timeout_s):
                break  # the episode has waited long enough for its own server
        if home is None or not home.is_ready or is_left():
            homes = list(self._homes.values())
            ready = (server for server in self._servers if server.is_ready)
            home = min(ready, key=lambda server: (failed.count(server), homes.count(server), server.num_running))
            self._homes[episode_id] = home
        return home

    def _any_ready(self) -> bool:
        return any(server.is_ready for server in self._servers)

    @contextmanager
    def _counted(self, server: VLLMServer, weights: Weights) -> Iterator[None]:
        """Counts a request of the server as running."""
        if not self._running:
            self._busy_since = time.perf_counter()
        self._running[weights] += 1
        server.begin()
        try:
            yield
        finally:
            server.num_running -= 1
            self._running[weights] -= 1
            if not self._running[weights]:
                del self._running[weights]
                self._tell()
            if not self._running:
                self.counts += Counts(forward_s=time.perf_counter() - self._busy_since)

    async def _until(
        self, holds: Callable[[], bool], timeout_s: float | None = None, *, refuses: bool = False
    ) -> bool:
        """
        Wait until a condition holds, which is checked after each [`_tell`]. If it does not hold in time, any server
        that is ready is enough to go on. A server that lacks an option is left out, unless this `refuses` it.

        Returns:
            Whether the condition holds.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._failure is not None:
                raise self._failure
            if holds():
                return True
            left = None if deadline is None else deadline - time.monotonic()
            wrong = [server.trouble for server in self._servers if isinstance(server.trouble, ConfigurationError)]
            if wrong and refuses:
                raise wrong[0]
            if left is not None and len(wrong) == len(self._servers):  # waiting does not help
                raise RolloutError(str(wrong[0]))
            if left is not None and left <= 0:
                if self._any_ready():
                    return False
                troubles = [f"{server.url}: {server.trouble or 'no answer yet'}" for server in self._servers]
                raise RolloutError(
                    f"no vLLM server was ready for {timeout_s:g} s (`vllm_server_timeout`); " + "; ".join(troubles)
                )
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    def _tell(self) -> None:
        """Wake all that wait in [`_until`]."""
        self._changed.set()
        self._changed = asyncio.Event()


async def _said_in(limit_s: float, question: Coroutine[Any, Any, T]) -> T:
    try:
        return await within(question, limit_s, "the question")
    except CallTimeoutError:
        raise ConnectionError(f"it has not said in {limit_s:g} s what it is and what weights it has") from None


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.close()
