"""The policy on vLLM servers: token ids in, token ids and log-probabilities out, over HTTP.

Each server has a keeper here: a coroutine that checks on it, and has it ready again whatever happens to it. *Ready*
means that it answers, that it was started with the options that sampling needs, and that it has the newest weights. A
server that died, hangs or was started again is not, until its keeper has seen to it; its requests are asked again, of
another server or of this one when it is back. Within a limit of time its keeper says that it is ready, or what its
trouble is; one in trouble is not waited for.

Weights have a name that no other ones have. With each response a server says the name of those that it sampled from,
so that none is taken which came from others, such as those that a server begins with.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

from ..calls import CallTimeoutError, within
from ..errors import ConfigurationError, DataError, RolloutError
from ..types import StopReason, TokenIds
from .base import Sample, SamplingParams, check_request
from .vllm_server import FIRST_VERSION, Answered, Sending, Server, Weights
from .vllm_transfer import Join

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ATTEMPTS = 5  # of one request: one that breaks every server must not break them for ever
_RETRY_S = 0.2  # between two looks at a server that is not ready
_CONNECT_S = 5.0
_KEPT_S = 2.0  # an idle connection; vLLM closes them after 5 s, and a request may cross that


class VLLMSampler:
    """
    A [`Sampler`] that asks vLLM servers (0.32 or newer). An episode stays on the server that it began on, where its
    prefix is cached; new ones go where the fewest are.

    Args:
        urls (`Sequence[str]`):
            Of the servers, each of them `vllm serve` with `VLLM_SERVER_DEV_MODE=1`, whose endpoints take new weights,
            `--enable-scale-out` and `--logprobs-mode processed_logprobs`; for adapters with `--enable-lora --max-loras
            2`; on a CPU perhaps with an extension ([`PacksOutputLayer`]). `VLLM_API_KEY` is their key, if they have
            one.
        timeout_s (`float`, *optional*, defaults to `240.0`):
            How long an attempt waits for a server while none is ready. One that takes half as long for new weights
            is done without until it has them; one that computes nothing for half as long, although it has something
            to do, is given up.
        sends_weights (`bool`, *optional*, defaults to `True`):
            Whether this process sends weights to servers; else another one has sent them before each [`update`] here.
            At its end it has them forget its adapters.
        silent_s (`float`, *optional*, defaults to `20.0`):
            A server that does not answer a health check for so long is given up until it does.
        poll_s (`float`, *optional*, defaults to `1.0`):
            Between two health checks.
        retry_s (`float`, *optional*, defaults to `0.2`):
            Before a request that was answered with an error is asked again; five times as long before the next time,
            and so on.
        join (`Callable`, *optional*):
            Makes a group of this process and a server's, in which whole weights are sent ([`NCCLGroup`]). `None`:
            servers read them in a directory.
        vocabulary_size (`int`, *optional*):
            How many token ids the policy can read; prompts with others are refused here. `None`: not known.

    Raises:
        ConfigurationError: From the first `update`, if a server lacks an option; from `sample`, if prompt and response
            are longer than it takes, a number of its [`SamplingParams`] is outside of its range, or `top_p` or
            `top_k` is set.
        DataError: From `sample`, if servers answer other prompts, but not this one.
        RolloutError: If no server is ready for `timeout_s`, none has the options that it needs, servers answer nothing
            in five attempts, or this sampler was closed.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout_s: float = 240.0,
        sends_weights: bool = True,
        silent_s: float = 20.0,
        poll_s: float = 1.0,
        retry_s: float = _RETRY_S,
        join: Join | None = None,
        vocabulary_size: int | None = None,
    ) -> None:
        try:
            import aiohttp  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                '`use_vllm` is set, but aiohttp is not installed: pip install "trl-steppo[vllm]"'
            ) from error
        self.timeout_s = timeout_s
        self.vocabulary_size = vocabulary_size
        self.sends_weights = sends_weights
        self.silent_s = silent_s
        self.poll_s = poll_s
        self.retry_s = retry_s
        self.sampled_tokens = 0
        self.prompt_tokens = 0  # of responses whose server says how many of them were cached
        self.prefilled_tokens = 0
        self.uncached_rows = 0
        self.forward_s = 0.0  # seconds in which servers had something to do
        self.num_retries = 0  # requests that were asked again
        self._servers = [Server(url.rstrip("/"), silent_s, join) for url in urls]
        self._homes: dict[str, Server] = {}
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

    def pace(self, settled: Any) -> None:
        """Servers form their batches themselves."""

    @property
    def context(self) -> int | None:
        """Most tokens of a prompt with its response that every server takes; `None` until one has said it."""
        known = [server.options.max_tokens for server in self._servers if server.options is not None]
        return min(known, default=None)

    # -- a run --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look after the servers, again if this was closed before. Weights come with [`update`]."""
        assert self._loop is None
        self._failure = None
        self._is_held = False
        self._loop = loop = asyncio.new_event_loop()
        threading.Thread(target=_run, args=(loop,), name="vLLM", daemon=True).start()
        self._submit(self._open()).result()

    def close(self) -> None:
        """Whoever waits is told; servers go on."""
        loop, self._loop = self._loop, None
        if loop is not None:
            asyncio.run_coroutine_threadsafe(self._close(), loop).result()
            loop.call_soon_threadsafe(loop.stop)

    def hold(self) -> None:
        """Return when all that servers have begun is answered; nothing is begun until the next [`update`]."""
        self._submit(self._hold()).result()

    def settle(self) -> None:
        """Return when all that servers have begun with other weights than the newest is answered."""
        self._submit(self._settle()).result()

    def update(self, weights: Weights) -> None:
        """
        Sample from these weights from now on; nothing is begun until each server has them or is in trouble. Whole
        weights take the others' place: whatever runs anywhere is waited for before ([`hold`]). Adapters do not: what
        runs ends with the old one. Servers keep two; what runs with one before is waited for ([`settle`]).

        Args:
            weights ([`Weights`]):
                Which all processes that share the servers give, first the one that sends them.
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
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEPT_S),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._session, self._changed = session, asyncio.Event()
        self._homes.clear()
        for server in self._servers:
            server.open(session)
        self._keepers = [asyncio.ensure_future(self._keep(server)) for server in self._servers]

    async def _close(self) -> None:
        under_way = [server.sending.task for server in self._servers if server.sending and server.is_sent_weights]
        if under_way:  # a server does not survive a transfer that is broken off
            await asyncio.wait(under_way, timeout=self.silent_s)
        ready = [server for server in self._servers if server.is_ready]
        self._failure = RolloutError("the sampler was closed")
        for keeper in self._keepers:
            keeper.cancel()
        for server in self._servers:
            server.lose(self._failure)
        self._tell()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        if rest:
            await asyncio.wait(rest, timeout=_CONNECT_S)
        weights = self._weights
        if self.sends_weights and weights is not None:
            parting = (asyncio.wait_for(server.part(weights), self.silent_s) for server in ready)
            await asyncio.gather(*parting, return_exceptions=True)
        await asyncio.gather(*(server.close(self.silent_s) for server in self._servers))
        self._weights = self._adapter_before = None
        await self._session.close()

    async def _hold(self) -> None:
        self._is_held = True
        await self._until_answered(lambda: not self._running)

    async def _settle(self) -> None:
        await self._until_answered(lambda: set(self._running) <= {self._weights})

    async def _until_answered(self, holds: Callable[[], bool]) -> None:
        """However long responses take: their servers' keepers see to it that those of one that is stuck end."""
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
            server.doubt()
        try:
            await self._until(
                lambda: self._any_ready() and all(server.is_ready or server.trouble for server in self._servers),
                self.timeout_s,
                refuses=is_first,
            )
        finally:
            self._is_held = False
            self._tell()

    async def _keep(self, server: Server) -> None:
        """For as long as this is open: have a server ready again as soon as it can be."""
        while self._failure is None:
            trouble = server.trouble
            try:
                await self._check(server)
            except Exception as error:  # one that ended with its server in trouble would leave it there
                server.lose(error)
            if trouble is None and server.trouble is not None:
                logger.warning("vLLM at %s: %s", server.url, server.trouble)
            self._tell()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(server.doubted.wait(), self.poll_s if server.is_ready else _RETRY_S)
            server.doubted.clear()

    async def _check(self, server: Server) -> None:
        limit_s = self.timeout_s / 2
        await _said_in(limit_s, self._look(server, limit_s))
        if server.sending is not None:
            await self._take_sent(server, server.sending, limit_s)

    async def _look(self, server: Server, limit_s: float) -> None:
        """See how it is; begin to send it weights that it has not."""
        await server.ask("GET", "/health")
        if server.num_running:  # else there is nothing that it could be stuck with
            await server.check_progress(limit_s)
        weights = self._weights
        if weights is None or server.sending is not None:
            return
        if server.is_ready and (server.num_running or not self.sends_weights):  # else others may rely on it
            return
        if not self.sends_weights and not await server.has(weights):  # nor is it asked anything else meanwhile
            server.trouble = RolloutError(f"it does not have the weights {weights.name}, which another rank sends")
            return
        if server.options is None:
            await server.check_options()
        if self.sends_weights and not await server.has(weights):
            server.is_ready = False
            server.send(weights, self._adapter_before)
        elif weights is self._weights:
            server.win()

    async def _take_sent(self, server: Server, sending: Sending, limit_s: float) -> None:
        """A server goes on loading when nobody waits any more; so what is begun is waited for, in trouble or not."""
        left_s = sending.since + limit_s - time.monotonic()
        if not (await asyncio.wait({sending.task}, timeout=max(left_s, _RETRY_S)))[0]:
            server.trouble = ConnectionError(f"it has been taking new weights for more than {limit_s:g} s")
            if server.is_sent_weights:  # a transfer that hangs does not end by itself
                raise server.trouble
            return
        server.sending = None
        sending.task.result()
        if not await _said_in(limit_s, server.has(sending.weights)):
            raise RolloutError(f"it did not take the weights {sending.weights.name}")
        if sending.weights is self._weights:
            server.win()

    async def _sample(self, prompt_ids: list[int], params: SamplingParams, episode_id: str) -> Sample:
        trouble: Exception | None = None
        failed: list[Server] = []
        for attempt in range(_ATTEMPTS):
            self.num_retries += attempt > 0
            if isinstance(trouble, Answered):  # at once, and so may the next one be
                await asyncio.sleep(self.retry_s * 5 ** (attempt - 1))
            server = await self._place(episode_id, failed)
            weights = self._weights
            assert weights is not None
            server.check_length(len(prompt_ids), params)
            try:
                with self._counted(server, weights):
                    answer = await server.generate(prompt_ids, params, weights)
                return self._take(answer, params, weights)
            except (Answered, OSError) as error:
                if isinstance(error, Answered) and error.status == 400:
                    raise DataError(f"vLLM at {server.url}: {error}") from None
                trouble = error
                failed.append(server)
                server.doubt()
        is_of_prompt = isinstance(trouble, Answered) and trouble.status >= 500 and await self._answers(server)
        raise (DataError if is_of_prompt else RolloutError)(
            f"a response was given up after {_ATTEMPTS} attempts; vLLM at {server.url}: {trouble}"
        )

    async def _answers(self, server: Server) -> bool:
        """Whether it continues a prompt that can break nothing; no, if it is not the time to ask."""
        if self._is_held or self._weights is None:
            return False
        with self._counted(server, self._weights), suppress(Answered, OSError, asyncio.TimeoutError):
            await asyncio.wait_for(server.try_out(), self.timeout_s / 2)
            return True
        return False

    def _take(self, answer: Any, params: SamplingParams, weights: Weights) -> Sample:
        choice = answer["choices"][0]
        versions = {span["version"] for span in choice.get("weight_versions") or ()}
        expected = FIRST_VERSION if weights.is_adapter else weights.name  # an adapter's own name was asked for
        if versions != {expected}:
            raise Answered(200, f"a response from the weights {sorted(versions)} instead of {expected}")
        token_ids, usage = choice["token_ids"], answer["usage"]
        is_stopped = bool(token_ids) and token_ids[-1] in params.stop_token_ids
        if not is_stopped and len(token_ids) != params.max_new_tokens:
            raise Answered(200, f"a response that ended with {choice.get('finish_reason')!r}")
        details = usage.get("prompt_tokens_details")
        self.sampled_tokens += len(token_ids)
        self.prefilled_tokens += usage["prompt_tokens"]
        if details is not None:
            self.prompt_tokens += usage["prompt_tokens"]
            self.prefilled_tokens -= details["cached_tokens"] or 0
        return Sample(
            TokenIds(token_ids),
            tuple(entry["logprob"] for entry in choice["logprobs"]["content"]),
            StopReason.STOP if is_stopped else StopReason.LENGTH,
            weights.version,
        )

    async def _place(self, episode_id: str, failed: Sequence[Server]) -> Server:
        """
        A server that is ready: the episode's own, for as long as it is in no trouble and has not `failed` twice, or
        the one with the fewest episodes and requests.
        """
        home = self._homes.get(episode_id)

        def is_left() -> bool:
            return home is None or home.trouble is not None or failed.count(home) > 1

        def has_place() -> bool:
            return self._any_ready() if home is None or is_left() else home.is_ready

        while self._is_held or not has_place():
            await self._until(lambda: not self._is_held)  # an update, which has its own patience
            if not await self._until(lambda: self._is_held or has_place(), self.timeout_s):
                break  # it has waited long enough for its own
        if home is None or not home.is_ready or is_left():
            homes = list(self._homes.values())
            ready = (server for server in self._servers if server.is_ready)
            home = min(ready, key=lambda server: (failed.count(server), homes.count(server), server.num_running))
            self._homes[episode_id] = home
        return home

    def _any_ready(self) -> bool:
        return any(server.is_ready for server in self._servers)

    @contextmanager
    def _counted(self, server: Server, weights: Weights) -> Iterator[None]:
        """Around a request that the server has begun."""
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
                self.forward_s += time.perf_counter() - self._busy_since

    async def _until(
        self, holds: Callable[[], bool], timeout_s: float | None = None, *, refuses: bool = False
    ) -> bool:
        """
        Wait for something that somebody tells of. If it does not come in time, a server that is ready is enough to go
        on without. A server that lacks an option is done without, too, unless this `refuses` it.

        Returns:
            Whether it came.
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
            if left is not None and len(wrong) == len(self._servers):  # which no waiting mends
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
