"""A small vLLM server over real HTTP: the endpoints that [`VLLMSampler`] uses, with faults on demand."""

from __future__ import annotations

import asyncio
import socket
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvicorn
from safetensors.torch import save_file
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.inference.gloo_group import GlooGroup

GENERATE = "/inference/v1/generate"
RELOAD = "/collective_rpc"
RECEIVE = "/update_weights"
LOAD_ADAPTER = "/v1/load_lora_adapter"
PLAIN = ("/health", "/metrics", GENERATE)  # there without VLLM_SERVER_DEV_MODE

Respond = Callable[[list[int], dict[str, Any], str | None], Awaitable[tuple[list[int], list[float]]]]


@dataclass(eq=False)
class Fault:
    """
    What is wrong with requests as long as it is among a server's `faults`.

    Args:
        concerns (`Callable[[str, dict], bool]`):
            Whether a request is one of them, by its path and its body.
        status (`int`, *optional*):
            Status of the answer. `None`: there is no answer until the fault is mended.
        error (`str`, *optional*, defaults to `"broken"`):
            What the answer says.
        times (`int`, *optional*):
            Number of requests after which it is mended by itself.
    """

    concerns: Callable[[str, dict[str, Any]], bool]
    status: int | None = None
    error: str = "broken"
    times: int | None = None


def hangs() -> Fault:
    """Nothing is answered."""
    return Fault(lambda path, body: True)


def no_answer_to(silent: str) -> Fault:
    """Requests of one path are not answered."""
    return Fault(lambda path, body: path == silent)


def fails(times: int) -> Fault:
    """So many responses fail."""
    return Fault(lambda path, body: path == GENERATE, 500, times=times)


def refuses_prompts(first_token: int, status: int) -> Fault:
    """Prompts that begin with a token are never answered."""
    return Fault(lambda path, body: path == GENERATE and body.get("token_ids", [None])[0] == first_token, status)


def refuses_weights() -> Fault:
    """New weights fail to load, in whichever way they come."""
    paths = (RELOAD, RECEIVE, LOAD_ADAPTER)

    def loads(path: str, body: dict[str, Any]) -> bool:
        return path in paths and body.get("method") != "pack_output_layer"

    return Fault(loads, 500, "not initialized")


def without_adapters() -> Fault:
    """Started without VLLM_ALLOW_RUNTIME_LORA_UPDATING."""
    return Fault(lambda path, body: path == LOAD_ADAPTER, 404, "Not Found")


def without_dev_mode() -> Fault:
    """Started without VLLM_SERVER_DEV_MODE."""
    return Fault(lambda path, body: path not in PLAIN, 404, "Not Found")


def without_scale_out() -> Fault:
    """Started without `--enable-scale-out`."""
    return Fault(lambda path, body: path == GENERATE, 403, "disabled")


class FakeVLLM:
    """
    Serves in a thread, on a port that it keeps over restarts.

    Args:
        respond (`Callable`, *optional*):
            `(prompt ids, sampling parameters, adapter's directory) -> (response ids, log-probabilities)`. `None`: as
            many tokens as are asked for, each the length of the prompt plus its place.
        load (`Callable`, *optional*):
            Called with the directory of new weights, and with `None` at each start.
        port (`int`, *optional*):
            Where; `None`: a free one.
        options:
            Changes of what the server was started with.
    """

    def __init__(
        self,
        respond: Respond | None = None,
        load: Callable[[Path | None], None] | None = None,
        port: int | None = None,
        **options: Any,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.respond = respond or _count
        self.load = load or (lambda directory: None)
        self.options = {"logprobs_mode": "processed_logprobs", "max_model_len": 1_000, **options}
        self.faults: list[Fault] = []
        self.counts_cached = True
        self.device, self.extension = "cuda", ""
        self.called: list[str] = []  # methods of its workers
        self.token_s = 0.0
        self.may_load = threading.Event()  # new weights
        self.may_load.set()
        self.counts_tokens = True
        self.max_loras: int | None = 2  # at once; `None`: it takes none
        self.most_adapters = 0
        self.num_waiting = 0  # for an answer that does not come
        self.num_tokens = 0
        self.asked: list[dict[str, Any]] = []
        self.num_cancelled = 0
        self.num_starts = 0
        self.loaded: list[str] = []
        self.backend: str | None = None  # of its weights' transfer
        self.num_joined = 0  # groups
        self.most_running_in_change = 0
        self.num_running = 0
        self._seen: set[tuple[int, ...]] = set()
        self.start()

    def start(self) -> FakeVLLM:
        self.version, self.adapters = "default", dict[str, str]()
        self.group: GlooGroup | None = None
        self.received: dict[str, torch.Tensor] | None = None  # `None`: it is not about to receive any
        self.is_spoilt = False  # by weights that it took in part, until an update without any is finished
        self.num_starts += 1
        self.load(None)
        config = uvicorn.Config(
            self._app(), "127.0.0.1", self.port, log_level="critical", lifespan="off", timeout_graceful_shutdown=0
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def kill(self) -> None:
        """What runs breaks off."""
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._seen.clear()

    def _app(self) -> Starlette:
        routes = {
            "GET /health": self._health,
            "GET /metrics": self._metrics,
            "GET /server_info": self._info,
            "GET /weight_info": self._weight_info,
            "GET /v1/models": self._models,
            f"POST {GENERATE}": self._generate,
            f"POST {RELOAD}": self._reload,
            "POST /reset_prefix_cache": self._reset,
            "POST /update_weight_version": self._name,
            "GET /get_world_size": lambda body: {"world_size": 1},
            "POST /init_weight_transfer_engine": self._join,
            "POST /shutdown_weight_transfer_engine": self._part,
            "POST /start_weight_update": self._begin,
            f"POST {RECEIVE}": self._receive,
            "POST /finish_weight_update": self._finish,
            f"POST {LOAD_ADAPTER}": self._load_adapter,
            "POST /v1/unload_lora_adapter": self._unload_adapter,
        }
        return Starlette(
            routes=[
                Route(route.split()[1], self._unless_broken(handler), methods=[route.split()[0]])
                for route, handler in routes.items()
            ]
        )

    def _unless_broken(self, handler: Callable[[Any], Any]) -> Callable[[Request], Awaitable[Response]]:
        async def handle(request: Request) -> Response:
            body = await request.json() if request.method == "POST" and await request.body() else {}
            path = request.url.path
            if await self._wait(request, lambda: self._fault(path, body, is_answered=False) is not None):
                return Response(status_code=499)
            if path == GENERATE and not _is_trial(body):
                self.asked.append(body)
            fault = self._fault(path, body, is_answered=True)
            answer = handler(body) if fault is None else self._refuse(fault, path, body)
            if asyncio.iscoroutine(answer):
                answer = await self._until_disconnected(request, answer)
            return answer if isinstance(answer, Response) else JSONResponse(answer)

        return handle

    def _fault(self, path: str, body: dict[str, Any], *, is_answered: bool) -> Fault | None:
        faults = (fault for fault in self.faults if (fault.status is not None) == is_answered)
        return next((fault for fault in faults if fault.concerns(path, body)), None)

    def _refuse(self, fault: Fault, path: str, body: dict[str, Any]) -> Response:
        if fault.times is not None and not _is_trial(body):
            fault.times -= 1
            if not fault.times:
                self.faults.remove(fault)
        if path == RECEIVE:
            self._spoil()
        return JSONResponse({"error": fault.error}, fault.status or 500)

    def _spoil(self) -> None:
        """Weights that were being received are lost; those that came before are in use."""
        self.is_spoilt = self.is_spoilt or self.received is not None
        self.received = None

    async def _wait(self, request: Request, holds: Callable[[], bool]) -> bool:
        """Whether the client disconnected while the condition held."""
        self.num_waiting += 1
        try:
            while holds():
                await asyncio.sleep(0.02)
                if await request.is_disconnected():
                    return True
            return False
        finally:
            self.num_waiting -= 1

    async def _until_disconnected(self, request: Request, answer: Any) -> Any:
        task = asyncio.ensure_future(answer)
        while not task.done():
            await asyncio.wait({task}, timeout=0.02)
            if await request.is_disconnected():
                task.cancel()
                self.num_cancelled += 1
                return Response(status_code=499)
        return task.result()

    # -- endpoints ----------------------------------------------------------------------------------------------------

    def _health(self, body: Any) -> Response:
        return Response()

    def _info(self, body: Any) -> Any:
        return {
            "vllm_config": {
                "model_config": self.options,
                "device_config": {"device": self.device},
                "parallel_config": {"worker_extension_cls": self.extension},
                "lora_config": None if self.max_loras is None else {"max_loras": self.max_loras},
                "weight_transfer_config": None if self.backend is None else {"backend": self.backend},
            }
        }

    def _metrics(self, body: Any) -> Response:
        counters = [f'vllm:{name}_tokens_total{{engine="0"}} {self.num_tokens}' for name in ("prompt", "generation")]
        return Response("\n".join(["# HELP of them", *(counters if self.counts_tokens else ())]))

    def _weight_info(self, body: Any) -> Any:
        return {"weight_version": self.version}

    def _models(self, body: Any) -> Any:
        return {"data": [{"id": "base"}, *({"id": name} for name in self.adapters)]}

    async def _generate(self, body: Any) -> Any:
        if _is_trial(body):
            return {}
        if body["model"] is not None and body["model"] not in self.adapters:
            return JSONResponse({"error": "no such model"}, 404)
        prompt, params, version = body["token_ids"], body["sampling_params"], self.version
        self.num_running += 1
        try:
            token_ids, logprobs = await self.respond(prompt, params, self.adapters.get(body["model"]))
            for _ in token_ids:
                await asyncio.sleep(self.token_s)
                self.num_tokens += 1
        finally:
            self.num_running -= 1
        cached = max((n for n in range(len(prompt)) if tuple(prompt[:n]) in self._seen), default=0)
        self._seen.update(tuple((prompt + token_ids)[:n]) for n in range(1, len(prompt + token_ids)))
        details = {"prompt_tokens_details": {"cached_tokens": cached}} if self.counts_cached else {}
        spans = [{"version": name, "start": 0, "end": 1} for name in dict.fromkeys((version, self.version))]
        return {
            "choices": [
                {
                    "token_ids": token_ids,
                    "finish_reason": "stop" if token_ids[-1] in params["stop_token_ids"] else "length",
                    "logprobs": {"content": [{"logprob": value} for value in logprobs]},
                    "weight_versions": spans,
                }
            ],
            "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(token_ids), **details},
        }

    async def _reload(self, body: Any) -> Any:
        self.called.append(body["method"])
        if body["method"] == "pack_output_layer":
            return {"results": [None]}
        path = Path(body["kwargs"]["weights_path"])
        while not self.may_load.is_set():
            await asyncio.sleep(0.02)
        if not path.is_dir():
            return JSONResponse({"error": f"no such directory: {path}"}, 500)
        self.most_running_in_change = max(self.most_running_in_change, self.num_running)
        self.load(path)
        self.loaded.append(str(path))
        return {"results": [None]}

    async def _join(self, body: Any) -> Any:
        given = body["init_info"]
        place = given["master_address"], given["master_port"], given["world_size"], given["rank_offset"]
        self.group = await asyncio.to_thread(GlooGroup, *place)
        self.num_joined += 1
        return {}

    def _part(self, body: Any) -> Any:
        if self.received is not None:
            return JSONResponse({"error": "during a weight update"}, 500)
        self.group = None
        return {}

    def _begin(self, body: Any) -> Any:
        if self.received is not None:
            return JSONResponse({"error": "already active"}, 500)
        self.received = {}
        return {}

    async def _receive(self, body: Any) -> Any:
        assert not self.is_spoilt
        group, info = self.group, body["update_info"]
        if group is None or self.received is None:
            self._spoil()
            return JSONResponse({"error": "not initialized"}, 500)
        while not self.may_load.is_set():
            await asyncio.sleep(0.02)
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            self.received[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            await asyncio.to_thread(group.broadcast, self.received[name])
        return {}

    def _finish(self, body: Any) -> Any:
        if self.received is None:
            return JSONResponse({"error": "not active"}, 500)
        state, self.received = self.received, None
        if not state:
            self.is_spoilt = False
            return {}
        self.most_running_in_change = max(self.most_running_in_change, self.num_running)
        with tempfile.TemporaryDirectory() as directory:
            save_file(state, Path(directory, "model.safetensors"))
            self.load(Path(directory))
        self.loaded.append("received")
        return {}

    def _reset(self, body: Any) -> Any:
        if not self.num_running:
            self._seen.clear()
        return {"success": not self.num_running}

    def _name(self, body: Any) -> Any:
        self.version = body["new_version"]
        return {"success": True}

    def _load_adapter(self, body: Any) -> Any:
        if body["lora_name"] in self.adapters:
            return JSONResponse({"error": "has already been loaded"}, 400)
        if not Path(body["lora_path"]).is_dir():
            return JSONResponse({"error": f"No adapter found for {body['lora_path']}"}, 404)
        self.adapters[body["lora_name"]] = body["lora_path"]
        self.most_adapters = max(self.most_adapters, len(self.adapters))
        self.loaded.append(body["lora_path"])
        return Response("loaded")

    def _unload_adapter(self, body: Any) -> Any:
        del self.adapters[body["lora_name"]]
        return Response("unloaded")


def _is_trial(body: dict[str, Any]) -> bool:
    """Whether somebody only tries whether it answers."""
    return body.get("sampling_params") == {"max_tokens": 1}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def _count(prompt: list[int], params: dict[str, Any], adapter: str | None) -> tuple[list[int], list[float]]:
    token_ids = [len(prompt) + place for place in range(params["max_tokens"])]
    for place, token in enumerate(token_ids):
        if token in params["stop_token_ids"]:
            token_ids = token_ids[: place + 1]
            break
    return token_ids, [-float(token) for token in token_ids]
