"""One vLLM server: what is known of it, what it is asked, and how it gets new weights."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError
from .base import SamplingParams
from .vllm_transfer import Join, Transfer, meeting_place

if TYPE_CHECKING:
    import aiohttp
    import torch

FIRST_VERSION = "default"  # a server's name for the weights that it was started with

_GENERATE = "/inference/v1/generate"  # token ids in and out, with the name of the weights
_WITHOUT_ENGINE = ("/health", "/metrics")  # paths that are answered without the engine
_EXTENSION = "trl_steppo.inference.vllm_worker.PacksOutputLayer"
# Metrics that change while an engine computes; with a long prompt the cache fills before the first token is counted.
_PROGRESS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:kv_cache_usage_perc")
_LOADING = "-loading"  # suffix of a version that is still being loaded
_RETRY_INTERVAL_S = 0.2  # between two requests to reset the prefix cache


@dataclass(frozen=True)
class Weights:
    """
    A version of the policy's weights.

    Args:
        name (`str`):
            A unique name: the run's, a hyphen, the version.
        version (`int`):
            Number of updates applied.
        directory (`str`, *optional*, defaults to `""`):
            Where servers read them: a checkpoint, or a LoRA adapter. Empty if they are not read.
        is_adapter (`bool`, *optional*, defaults to `False`):
            Whether they are an adapter on the weights that a server was started with.
        is_tied (`bool`, *optional*, defaults to `False`):
            Whether the output layer shares the embeddings' weights.
        tensors (`Mapping[str, torch.Tensor]`, *optional*):
            All weights, under the names of a checkpoint, where servers are sent them instead of reading them.
    """

    name: str
    version: int
    directory: str = ""
    is_adapter: bool = False
    is_tied: bool = False
    tensors: Mapping[str, torch.Tensor] | None = field(default=None, compare=False, repr=False)

    @property
    def run(self) -> str:
        """The name of the run that made them."""
        return self.name.rpartition("-")[0]


class AnswerError(Exception):
    """A server answered, but refused or did not give what it was asked for."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status


@dataclass(frozen=True)
class Sending:
    """Weights on their way to a server."""

    weights: Weights
    task: asyncio.Task[None]
    since: float


@dataclass(frozen=True)
class ServerOptions:
    """How a server was started."""

    max_tokens: int  # of prompt and response
    is_on_cpu: bool
    extension: str  # of its workers
    max_adapters: int  # in one batch; 0 if it takes none


class VLLMServer:
    """
    One server, and what is known of it. Used in the sampler's event loop only.

    Args:
        url (`str`):
            Address of the server.
        silent_s (`float`):
            Time limit of answers that do not need the engine.
        join (`Callable`, *optional*):
            Makes a group of this process and the server's workers, to which whole weights are sent. `None`: the server
            reads them.
    """

    def __init__(self, url: str, silent_s: float, join: Join | None) -> None:
        self.url = url
        self.is_ready = False
        self.trouble: Exception | None = None  # why the last attempt to make it ready failed
        self.options: ServerOptions | None = None  # `None` until they were checked
        self.num_running = 0
        self.sending: Sending | None = None
        self._silent_s = silent_s
        self._transfer = None if join is None else Transfer(join)
        self._progress = ""  # metrics of its engine at the last check
        self._progress_at = 0.0

    def open(self, session: aiohttp.ClientSession) -> None:
        """Use an HTTP session from now on."""
        self._session = session
        self.check_requested = asyncio.Event()
        self._given_up = asyncio.get_running_loop().create_future()
        self.give_up(None)

    @property
    def is_sent_weights(self) -> bool:
        """Whether the server is sent whole weights from this process's memory instead of reading them."""
        return self._transfer is not None

    def request_check(self) -> None:
        """Have the keeper check the server before it gets another request."""
        self.is_ready = False
        self.check_requested.set()

    def begin(self) -> None:
        """Count one more running request."""
        if not self.num_running:
            self._progress_at = time.monotonic()
        self.num_running += 1

    async def check_progress(self, limit_s: float) -> None:
        """Raise if the engine has computed nothing for `limit_s`. A stuck engine still answers health checks."""
        progress = await self._count()
        if progress != self._progress:
            self._progress, self._progress_at = progress, time.monotonic()
        elif time.monotonic() - self._progress_at > limit_s:
            raise ConnectionError(
                f"it has computed no token for {limit_s:g} s, although it has {self.num_running} requests"
            )

    def send(self, weights: Weights, before: Weights | None) -> None:
        """Begin to load these weights."""
        sent = self._take_adapter(weights, before) if weights.is_adapter else self._take_whole(weights)
        self.sending = Sending(weights, asyncio.ensure_future(sent), time.monotonic())

    def set_ready(self) -> None:
        """The server may get requests."""
        self.is_ready, self.trouble = True, None

    def give_up(self, trouble: Exception | None) -> None:
        """The server may be gone, with all that it knew. Requests that wait for it fail."""
        self.is_ready, self.trouble, self.options = False, trouble, None
        if self.sending is not None:
            self.sending.task.cancel()
            self.sending = None
        if self._transfer is not None:
            self._transfer.leave()
        self._given_up.set_result(None)
        self._given_up = asyncio.get_running_loop().create_future()

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """
        Send a request, and return the content of the answer's JSON, or its text. Only answers that do not need the
        engine have a time limit here.

        Raises:
            OSError: The server cannot be reached.
            AnswerError: The server refuses.
        """
        import aiohttp

        # vLLM closes a connection after an internal error, and the next request would be sent over it.
        headers = {"Connection": "close"} if method == "POST" and path != _GENERATE else {}

        async def exchange() -> tuple[int, str]:
            async with self._session.request(method, self.url + path, json=body, headers=headers) as response:
                return response.status, await response.text()

        try:
            status, text = await asyncio.wait_for(exchange(), self._silent_s if path in _WITHOUT_ENGINE else None)
        except aiohttp.ClientError as error:  # first: some are timeouts, too
            raise ConnectionError(f"{method} {path}: {error}" if str(error) else f"{method} {path} failed") from None
        except asyncio.TimeoutError:
            raise ConnectionError(f"no answer to {method} {path} for {self._silent_s:g} s") from None
        if status >= 400:
            raise AnswerError(status, f"{method} {path} was answered with {status}: {text[:2000].strip()}")
        with suppress(json.JSONDecodeError):
            return json.loads(text)
        return text

    async def generate(self, prompt_ids: list[int], params: SamplingParams, weights: Weights) -> Any:
        """Sample one response. Fails as soon as the server is given up."""
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
        given_up = self._given_up
        answer = asyncio.ensure_future(self.ask("POST", _GENERATE, body))
        try:
            await asyncio.wait({answer, given_up}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise ConnectionError("it was given up")
            return answer.result()
        finally:
            answer.cancel()

    async def try_out(self) -> None:
        """Have the server continue a harmless prompt."""
        await self.ask("POST", _GENERATE, {"token_ids": [0], "sampling_params": {"max_tokens": 1}})

    # -- options and weights ------------------------------------------------------------------------------------------

    async def check_options(self) -> None:
        """Read how the server was started. Raises where it lacks an option that sampling needs."""
        try:
            info = await self.ask("GET", "/server_info?config_format=json")
            version = (await self.ask("GET", "/weight_info"))["weight_version"]
        except AnswerError as error:
            if error.status != 404:
                raise
            raise ConfigurationError(
                f"the server at {self.url} has no endpoints that take weights; start vLLM 0.32 or newer with "
                "VLLM_SERVER_DEV_MODE=1 in its environment"
            ) from None
        if version.endswith(_LOADING):
            await self._recover()
        try:
            await self.try_out()
        except AnswerError as error:
            if error.status not in (403, 404):
                raise
            raise ConfigurationError(
                f"the server at {self.url} takes no token ids ({_GENERATE}); start it with `--enable-scale-out`"
            ) from None
        config = info["vllm_config"]
        model = config["model_config"]
        if model["logprobs_mode"] != "processed_logprobs":
            raise ConfigurationError(
                f"the server at {self.url} reports log-probabilities in the mode {model['logprobs_mode']!r}, which "
                "leaves the temperature out; start it with `--logprobs-mode processed_logprobs`"
            )
        if not await self._count():
            raise ConfigurationError(
                f"the server at {self.url} does not count its tokens (/metrics), by which one that is stuck is told "
                "from one that is slow; start it without `--disable-log-stats`"
            )
        backend = (config.get("weight_transfer_config") or {}).get("backend")
        if self._transfer is not None and backend != "nccl":
            raise ConfigurationError(
                f"the server at {self.url} takes no weights over NCCL (its backend for them is {backend}); start it "
                """with `--weight-transfer-config '{"backend": "nccl"}'`, or set `vllm_weight_transfer` to 'files'"""
            )
        self.options = ServerOptions(
            int(model["max_model_len"]),
            is_on_cpu=config["device_config"]["device"] == "cpu",
            extension=config["parallel_config"]["worker_extension_cls"] or "",
            max_adapters=(config.get("lora_config") or {}).get("max_loras", 0),
        )

    async def _recover(self) -> None:
        """
        End an update of weights whose sender was killed or failed. The server samples nothing until then, and the part
        that it got would go into the next update.
        """
        for path in ("/start_weight_update", "/finish_weight_update"):
            with suppress(AnswerError):  # it is in an update, or takes no weights that are sent
                await self.ask("POST", path)

    def check_length(self, prompt_length: int, params: SamplingParams) -> None:
        """Raise if the server does not take a prompt of this length with its response."""
        if self.options is not None and prompt_length + params.max_new_tokens > self.options.max_tokens:
            raise ConfigurationError(
                f"a prompt of {prompt_length} tokens with up to {params.max_new_tokens} new ones exceeds the "
                f"{self.options.max_tokens} that the server at {self.url} takes; start it with a larger "
                "`--max-model-len`, or bound the prompt with `max_prompt_length`"
            )

    async def has(self, weights: Weights) -> bool:
        """Whether the server samples from these weights. Raises if an adapter's base is another run's weights."""
        version = (await self.ask("GET", "/weight_info"))["weight_version"]
        if not weights.is_adapter:
            return bool(version == weights.name)
        if version != FIRST_VERSION:
            raise ConfigurationError(
                f"the server at {self.url} has the weights {version} of another run, on which an adapter is not this "
                "policy; start it again"
            )
        return any(model["id"] == weights.name for model in (await self.ask("GET", "/v1/models"))["data"])

    async def _count(self) -> str:
        """The metrics that change while the engine computes; empty if the server does not count them."""
        counted = await self.ask("GET", "/metrics")
        return "\n".join(line for line in counted.splitlines() if line.startswith(_PROGRESS))

    # -- new weights --------------------------------------------------------------------------------------------------

    async def _take_adapter(self, weights: Weights, before: Weights | None) -> None:
        """Load an adapter. Keeps the one before, which may still be used, and unloads all older ones."""
        assert self.options is not None
        if self.options.max_adapters < 2:
            raise ConfigurationError(
                f"the server at {self.url} takes {self.options.max_adapters} LoRA adapters at once, where new "
                "responses begin while those of the adapter before end; start it with `--enable-lora --max-loras 2`"
            )
        await self._unload_adapters(weights.run, but=before)
        try:
            await self.ask(
                "POST", "/v1/load_lora_adapter", {"lora_name": weights.name, "lora_path": weights.directory}
            )
        except AnswerError as error:
            if error.status == 404 and "adapter" in str(error).partition(": ")[2]:
                raise ConfigurationError(
                    f"the server at {self.url} finds no adapter at {weights.directory}; set `vllm_weights_dir` to a "
                    f"directory that servers see under the same path. {error}"
                ) from None
            if error.status == 404:
                raise ConfigurationError(
                    f"the server at {self.url} takes no new LoRA adapter; start it with "
                    f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment. {error}"
                ) from None
            if error.status != 400:  # it may have it already, from a request whose answer was not waited for
                raise

    async def _unload_adapters(self, run: str, *, but: Weights | None = None) -> None:
        """Unload a run's adapters."""
        for model in (await self.ask("GET", "/v1/models"))["data"]:
            if model["id"].startswith(f"{run}-") and (but is None or model["id"] != but.name):
                with suppress(AnswerError):  # another process was quicker
                    await self.ask("POST", "/v1/unload_lora_adapter", {"lora_name": model["id"]})

    async def _take_whole(self, weights: Weights) -> None:
        """Load whole weights, and reset the caches of the ones before."""
        assert self.options is not None
        needs_packing = self.options.is_on_cpu and weights.is_tied
        if needs_packing and self.options.extension != _EXTENSION:
            raise ConfigurationError(
                f"the server at {self.url} runs on a CPU, where vLLM does not reload the output layer of a policy "
                f"whose embeddings it shares; start it with `--worker-extension-cls {_EXTENSION}`, and this package's "
                "parent directory in PYTHONPATH"
            )
        # A process that is killed in between leaves no partly loaded weights under a valid name.
        await self.ask("POST", "/update_weight_version", {"new_version": weights.name + _LOADING})
        if weights.tensors is None:
            reload = {"method": "reload_weights", "kwargs": {"weights_path": weights.directory}}
            await self.ask("POST", "/collective_rpc", reload)
        else:
            await self._send(weights.tensors)
        if needs_packing:
            await self.ask("POST", "/collective_rpc", {"method": "pack_output_layer"})
        # Refused while requests run, such as those that another process sent before it noticed a restart.
        while not (await self.ask("POST", "/reset_prefix_cache"))["success"]:
            await asyncio.sleep(_RETRY_INTERVAL_S)
        await self.ask("POST", "/update_weight_version", {"new_version": weights.name})

    async def _send(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Send tensors from this process's memory."""
        assert self._transfer is not None
        if not self._transfer.is_joined:
            size = 1 + (await self.ask("GET", "/get_world_size"))["world_size"]
            await self._end_transfers()
            address, port = await asyncio.to_thread(meeting_place, self.url)
            init = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": size}
            joined = self.ask("POST", "/init_weight_transfer_engine", {"init_info": init})
            await self._transfer.join(address, port, size, joined)
        await self.ask("POST", "/start_weight_update")
        info = {
            "names": list(tensors),
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()],
            "shapes": [list(tensor.shape) for tensor in tensors.values()],
        }
        received = self.ask("POST", "/update_weights", {"update_info": info})
        await self._transfer.send(tensors.values(), received)
        await self.ask("POST", "/finish_weight_update")

    async def end_run(self, weights: Weights) -> None:
        """At the end of a run: unload its adapters, or leave the transfer group."""
        if weights.is_adapter:
            await self._unload_adapters(weights.run)
        elif self._transfer is not None:
            await self._end_transfers()

    async def close(self, timeout_s: float) -> None:
        """Return when no transfer to the server is running, or after `timeout_s`."""
        if self._transfer is not None:
            await self._transfer.close(timeout_s)

    async def _end_transfers(self) -> None:
        """Have the server leave its transfer group, of this run or an earlier one, if it is in one."""
        with suppress(AnswerError):
            await self.ask("POST", "/shutdown_weight_transfer_engine")
