"""The policy on vLLM servers: token ids in, token ids and log-probabilities out, over HTTP.

Each server has a keeper here: a coroutine that checks on it, and has it ready again whatever happens to it. *Ready*
means that it answers, that it was started with the options that sampling needs, and that it has the newest weights. A
server that died, hangs or was started again is not, until its keeper has seen to it; its requests are asked again, of
another server or of this one when it is back.

Weights have a name that no other ones have. With each response a server says the name of those that it sampled from,
so that none is taken which came from others, such as those that a server begins with.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ConfigurationError, RolloutError
from ..types import StopReason, TokenIds
from .base import Sample, SamplingParams, check_request

if TYPE_CHECKING:
    import aiohttp

logger = logging.getLogger(__name__)

T = TypeVar("T")

_GENERATE = "/inference/v1/generate"  # token ids in and out, with the name of the weights
_EXTENSION = "trl_steppo.inference.vllm_worker.PacksOutputLayer"
_ATTEMPTS = 5  # of one request: one that breaks every server must not break them for ever
_RETRY_S = 0.2  # between two looks at a server that is not ready
_CONNECT_S = 5.0
_KEPT_S = 2.0  # an idle connection; vLLM closes them after 5 s, and a request may cross that


@dataclass(frozen=True)
class Weights:
    """
    What servers sample from.

    Args:
        name (`str`):
            That no other weights have: a run's, a hyphen, the version.
        version (`int`):
            Updates applied to them.
        directory (`str`):
            Where servers read them: a checkpoint, or a LoRA adapter.
        is_adapter (`bool`, *optional*, defaults to `False`):
            Whether they are an adapter on the weights that a server was started with.
        is_tied (`bool`, *optional*, defaults to `False`):
            Whether the output layer's are the embeddings'.
    """

    name: str
    version: int
    directory: str
    is_adapter: bool = False
    is_tied: bool = False


class VLLMSampler:
    """
    A [`Sampler`] that asks vLLM servers (0.32 or newer). An episode stays on the server that it began on, where its
    prefix is cached; new ones go where the fewest are.

    Args:
        urls (`Sequence[str]`):
            Of the servers, each of them `vllm serve` with `VLLM_SERVER_DEV_MODE=1`, whose endpoints take new weights,
            `--enable-scale-out` and `--logprobs-mode processed_logprobs`; on a CPU perhaps with an extension
            ([`PacksOutputLayer`]). `VLLM_API_KEY` is their key, if they have one.
        timeout_s (`float`, *optional*, defaults to `240.0`):
            How long to wait for a server while none is ready.
        sends_weights (`bool`, *optional*, defaults to `True`):
            Whether this process sends weights to servers; else it waits until they have them from another one.
        silent_s (`float`, *optional*, defaults to `20.0`):
            A server that does not answer a health check for so long is given up until it does.
        poll_s (`float`, *optional*, defaults to `1.0`):
            Between two health checks.

    Raises:
        ConfigurationError: From `update`, if a server lacks an option; from `sample`, if prompt and response are
            longer than it takes, a number of its [`SamplingParams`] is outside of its range, or `top_p` or `top_k` is
            set.
        RolloutError: If no server is ready for `timeout_s`, or this sampler was closed.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout_s: float = 240.0,
        sends_weights: bool = True,
        silent_s: float = 20.0,
        poll_s: float = 1.0,
    ) -> None:
        try:
            import aiohttp  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                '`use_vllm` is set, but aiohttp is not installed: pip install "trl-steppo[vllm]"'
            ) from error
        self.timeout_s = timeout_s
        self.sends_weights = sends_weights
        self.silent_s = silent_s
        self.poll_s = poll_s
        self.sampled_tokens = 0
        self.prompt_tokens = 0  # of responses whose server says how many of them were cached
        self.prefilled_tokens = 0
        self.forward_s = 0.0  # seconds in which servers had something to do
        self.num_retries = 0  # requests that were asked again
        self._servers = [_Server(url.rstrip("/")) for url in urls]
        self._homes: dict[str, _Server] = {}
        self._weights: Weights | None = None
        self._is_held = False
        self._num_running = 0
        self._busy_since = 0.0
        self._failure: RolloutError | None = None
        self._changed = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- as a sampler -------------------------------------------------------------------------------------------------

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        """Continue `prompt_ids`; see [`Sampler`]. May be called from any event loop."""
        check_request(prompt_ids, params, episode_id=episode_id)
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

    # -- a run --------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to look after the servers, again if this was closed before. Weights come with [`update`]."""
        assert self._loop is None
        self._weights, self._failure, self._is_held = None, None, False
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

    def update(self, weights: Weights) -> None:
        """
        Sample from these weights from now on. Whole weights take the others' place: whatever runs anywhere is
        waited for before ([`hold`]). Adapters do not: what runs ends with the old one.

        Args:
            weights ([`Weights`]):
                Which all processes that share the servers give.
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
        self._failure = RolloutError("the sampler was closed")
        for keeper in self._keepers:
            keeper.cancel()
        for server in self._servers:
            server.lose(self._failure)
        self._tell()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        if rest:
            await asyncio.wait(rest, timeout=_CONNECT_S)
        await self._session.close()

    async def _hold(self) -> None:
        self._is_held = True
        await self._until(lambda: self._num_running == 0)

    async def _update(self, weights: Weights) -> None:
        self._weights = weights
        for server in self._servers:
            server.expect()
        self._is_held = False
        await self._until(
            lambda: self._any_ready() and all(server.is_ready or server.trouble for server in self._servers),
            self.timeout_s,
        )

    async def _keep(self, server: _Server) -> None:
        """For as long as this is open: have a server ready again as soon as it can be."""
        while self._failure is None:
            try:
                await self._check(server)
            except Exception as error:  # one that ended with its server in trouble would leave it there
                if server.trouble is None:
                    logger.warning("vLLM at %s: %s", server.url, error)
                server.lose(error)
            self._tell()
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(server.doubted.wait(), self.poll_s if server.is_ready else _RETRY_S)
            server.doubted.clear()

    async def _check(self, server: _Server) -> None:
        await server.ask("GET", "/health", timeout_s=self.silent_s)
        weights = self._weights
        if server.is_ready or weights is None:
            return
        if server.options is None:
            server.options = await _check_options(server)
        if not await _has(server, weights):
            if not self.sends_weights:
                return
            try:
                await asyncio.wait_for(_send(server, weights), self.timeout_s / 2)
            except asyncio.TimeoutError:
                raise ConnectionError(f"it did not take new weights in {self.timeout_s / 2:g} s") from None
            if not await _has(server, weights):
                raise RolloutError(f"it did not take the weights {weights.name}")
        if weights is self._weights:
            server.win()

    async def _sample(self, prompt_ids: list[int], params: SamplingParams, episode_id: str) -> Sample:
        trouble: Exception | None = None
        for attempt in range(_ATTEMPTS):
            self.num_retries += attempt > 0
            server = await self._place(episode_id)
            weights = self._weights
            assert weights is not None
            _check_length(len(prompt_ids), params, server)
            try:
                with self._running(server):
                    answer = await server.generate(prompt_ids, params, weights)
                return self._take(answer, params, weights)
            except (_Answered, OSError) as error:
                if isinstance(error, _Answered) and error.status == 400:
                    raise RolloutError(f"vLLM at {server.url}: {error}") from None
                trouble = error
                server.doubt()
        raise RolloutError(f"a response was given up after {_ATTEMPTS} attempts; vLLM at {server.url}: {trouble}")

    def _take(self, answer: Any, params: SamplingParams, weights: Weights) -> Sample:
        choice = answer["choices"][0]
        if not weights.is_adapter:  # whose name is asked for
            versions = {span["version"] for span in choice.get("weight_versions") or ()}
            if versions != {weights.name}:
                raise _Answered(200, f"a response from the weights {sorted(versions)} instead of {weights.name}")
        token_ids, usage = choice["token_ids"], answer["usage"]
        is_stopped = bool(token_ids) and token_ids[-1] in params.stop_token_ids
        if not is_stopped and len(token_ids) != params.max_new_tokens:
            raise _Answered(200, f"a response that ended with {choice.get('finish_reason')!r}")
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

    async def _place(self, episode_id: str) -> _Server:
        """A server that is ready: the episode's own, or the one with the fewest episodes and requests."""
        home = self._homes.get(episode_id)
        while self._is_held or not self._any_ready():
            await self._until(lambda: not self._is_held)  # an update, which has its own patience
            await self._until(lambda: self._is_held or self._any_ready(), self.timeout_s)
        if home is None or not home.is_ready:
            homes = list(self._homes.values())
            ready = (server for server in self._servers if server.is_ready)
            home = min(ready, key=lambda server: (homes.count(server), server.num_running))
            self._homes[episode_id] = home
        return home

    def _any_ready(self) -> bool:
        return any(server.is_ready for server in self._servers)

    @contextmanager
    def _running(self, server: _Server) -> Iterator[None]:
        if not self._num_running:
            self._busy_since = time.perf_counter()
        self._num_running += 1
        server.num_running += 1
        try:
            yield
        finally:
            self._num_running -= 1
            server.num_running -= 1
            if not self._num_running:
                self.forward_s += time.perf_counter() - self._busy_since
                self._tell()

    async def _until(self, holds: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Wait for something that somebody tells of."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            if self._failure is not None:
                raise self._failure
            if holds():
                return
            left = None if deadline is None else deadline - time.monotonic()
            for server in self._servers if left is not None else ():
                if isinstance(server.trouble, ConfigurationError):  # which no waiting mends
                    raise server.trouble
            if left is not None and left <= 0:
                troubles = [f"{server.url}: {server.trouble or 'no answer yet'}" for server in self._servers]
                raise RolloutError(
                    f"no vLLM server was ready for {timeout_s:g} s (`vllm_server_timeout`); " + "; ".join(troubles)
                )
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), left)

    def _tell(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class _Answered(Exception):  # noqa: N818  (an answer is not always an error)
    """A server answered, but not what it was asked for."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status


class _Server:
    """One server, and what is known of it. Lives in the sampler's loop."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.is_ready = False
        self.trouble: Exception | None = None  # why it cannot be made ready
        self.options: _Options | None = None  # unknown until they were checked
        self.num_running = 0

    def open(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self.doubted = asyncio.Event()
        self._lost = asyncio.get_running_loop().create_future()
        self.lose(None)

    def doubt(self) -> None:
        """Have it checked before it is asked again."""
        self.is_ready = False
        self.doubted.set()

    def expect(self) -> None:
        """Have it made ready, for new weights."""
        self.trouble = None
        self.doubt()

    def win(self) -> None:
        self.is_ready, self.trouble = True, None

    def lose(self, trouble: Exception | None) -> None:
        """It may be gone, and with it all that it knew; whoever waits for it need not."""
        self.is_ready, self.trouble, self.options = False, trouble, None
        self._lost.set_result(None)
        self._lost = asyncio.get_running_loop().create_future()

    async def ask(self, method: str, path: str, body: Any = None, *, timeout_s: float | None = None) -> Any:
        """
        What it answers, as JSON.

        Raises:
            OSError: It cannot be reached.
            _Answered: It refuses.
        """
        import aiohttp

        async def exchange() -> tuple[int, str]:
            async with self._session.request(method, self.url + path, json=body) as response:
                return response.status, await response.text()

        try:
            status, text = await asyncio.wait_for(exchange(), timeout_s)
        except aiohttp.ClientError as error:  # first: some are timeouts, too
            raise ConnectionError(f"{method} {path}: {error}" if str(error) else f"{method} {path} failed") from None
        except asyncio.TimeoutError:
            raise ConnectionError(f"no answer to {method} {path} for {timeout_s} s") from None
        if status >= 400:
            raise _Answered(status, f"{method} {path} was answered with {status}: {text[:2000].strip()}")
        with suppress(json.JSONDecodeError):
            return json.loads(text)
        return None

    async def generate(self, prompt_ids: list[int], params: SamplingParams, weights: Weights) -> Any:
        """One response, for as long as the server is not given up."""
        body = {
            "model": weights.name if weights.is_adapter else None,
            "token_ids": prompt_ids,
            "sampling_params": {
                "max_tokens": params.max_new_tokens,
                "temperature": params.temperature,
                "seed": params.seed,
                "stop_token_ids": list(params.stop_token_ids),
                "ignore_eos": True,
                "logprobs": 0,  # those of the sampled tokens alone
                "detokenize": False,
            },
        }
        lost = self._lost
        answer = asyncio.ensure_future(self.ask("POST", _GENERATE, body))
        try:
            await asyncio.wait({answer, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ConnectionError("it was given up")
            return answer.result()
        finally:
            answer.cancel()


# -- what a server has, and gets --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    max_tokens: int  # of prompt and response
    is_on_cpu: bool
    extension: str  # of its workers


async def _check_options(server: _Server) -> _Options:
    """How a server was started; raises where that lacks what sampling needs."""
    try:
        info = await server.ask("GET", "/server_info?config_format=json")
        await server.ask("GET", "/weight_info")
    except _Answered as error:
        if error.status != 404:
            raise
        raise ConfigurationError(
            f"the server at {server.url} has no endpoints that take weights; start vLLM 0.32 or newer with "
            "VLLM_SERVER_DEV_MODE=1 in its environment"
        ) from None
    try:
        await server.ask("POST", _GENERATE, {"token_ids": [0], "sampling_params": {"max_tokens": 1}})
    except _Answered as error:
        if error.status not in (403, 404):
            raise
        raise ConfigurationError(
            f"the server at {server.url} takes no token ids ({_GENERATE}); start it with `--enable-scale-out`"
        ) from None
    config = info["vllm_config"]
    model = config["model_config"]
    if model["logprobs_mode"] != "processed_logprobs":
        raise ConfigurationError(
            f"the server at {server.url} reports log-probabilities in the mode {model['logprobs_mode']!r}, which "
            "leaves the temperature out; start it with `--logprobs-mode processed_logprobs`"
        )
    is_on_cpu = config["device_config"]["device"] == "cpu"
    return _Options(int(model["max_model_len"]), is_on_cpu, config["parallel_config"]["worker_extension_cls"] or "")


def _check_length(prompt_length: int, params: SamplingParams, server: _Server) -> None:
    if server.options is not None and prompt_length + params.max_new_tokens > server.options.max_tokens:
        raise ConfigurationError(
            f"a prompt of {prompt_length} tokens with up to {params.max_new_tokens} new ones exceeds the "
            f"{server.options.max_tokens} that the server at {server.url} takes; start it with a larger "
            "`--max-model-len`, or bound the prompt with `max_prompt_length`"
        )


async def _has(server: _Server, weights: Weights) -> bool:
    """Whether the server samples from these weights."""
    if weights.is_adapter:
        models = await server.ask("GET", "/v1/models")
        return any(model["id"] == weights.name for model in models["data"])
    return (await server.ask("GET", "/weight_info"))["weight_version"] == weights.name


async def _send(server: _Server, weights: Weights) -> None:
    """Have the server read the weights, and forget what it computed with others."""
    if weights.is_adapter:
        try:
            await server.ask(
                "POST", "/v1/load_lora_adapter", {"lora_name": weights.name, "lora_path": weights.directory}
            )
        except _Answered as error:
            if error.status >= 500:
                raise
            raise ConfigurationError(
                f"the server at {server.url} takes no LoRA adapter; start it with `--enable-lora` and "
                f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment. {error}"
            ) from None
        # What still runs may use the one before; those before it nobody does.
        run = weights.name.rpartition("-")[0]
        names = [model["id"] for model in (await server.ask("GET", "/v1/models"))["data"]]
        for name in [name for name in names if name.startswith(f"{run}-") and name != weights.name][:-1]:
            await server.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        return
    assert server.options is not None
    needs_packing = server.options.is_on_cpu and weights.is_tied
    if needs_packing and server.options.extension != _EXTENSION:
        raise ConfigurationError(
            f"the server at {server.url} runs on a CPU, where vLLM does not reload the output layer of a policy whose "
            f"embeddings it shares; start it with `--worker-extension-cls {_EXTENSION}`, and this package's parent "
            "directory in PYTHONPATH"
        )
    await server.ask(
        "POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": weights.directory}}
    )
    if needs_packing:
        await server.ask("POST", "/collective_rpc", {"method": "pack_output_layer"})
    # Not while anything still runs there, such as what another process asked before it noticed a restart.
    while not (await server.ask("POST", "/reset_prefix_cache"))["success"]:
        await asyncio.sleep(_RETRY_S)
    await server.ask("POST", "/update_weight_version", {"new_version": weights.name})


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.close()
