"""`trl-steppo gateway`: a model behind a gateway, in a process of its own."""

from __future__ import annotations

import asyncio
import gc
import os
import secrets
import signal
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

from .episodes import EpisodeSpec
from .errors import ConfigurationError
from .gateway import GatewayServer
from .gateway.sampling import SamplerLoop
from .gateway.tokens import ChatFormats
from .inference.base import SamplingParams
from .types import EpisodeLimits


def serve(
    model_name: str,
    *,
    host: str,
    port: int,
    directory: Path,
    dtype: str = "auto",
    response_length: int = 512,
    temperature: float = 1.0,
    max_interaction_steps: int | None = 5,
    idle_s: float | None = 3600.0,
    allow_uncached_sampling: bool = False,
) -> None:
    """
    Serve a model until a signal ends it. Sessions are opened with the admin's key, which is written to a file that its
    owner alone may read; those that were running when the gateway was last stopped go on.

    Args:
        model_name (`str`):
            `"mini_wiki"`, a directory, or a name on the hub.
        host (`str`), port (`int`):
            Where to listen.
        directory (`Path`):
            Where sessions are kept, and the key.
        dtype (`str`, *optional*, defaults to `"auto"`):
            The weights' type.
        response_length, temperature, max_interaction_steps:
            What a session is allowed that does not say.
        idle_s (`float`, *optional*, defaults to `3600.0`):
            How long an agent may ask for nothing before its session is finished; `None`: for ever.
        allow_uncached_sampling (`bool`, *optional*, defaults to `False`):
            Whether a model that cannot be sampled with a cache is served all the same, many times slower.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from .inference.local import LocalSampler
    from .models import context_length, locate_model, stored_end_token_ids

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigurationError(f"`--dtype` is {dtype!r}; it is auto, or a type of torch such as bfloat16")
    name = locate_model(model_name)
    context = context_length(AutoConfig.from_pretrained(name))
    if context is not None and response_length >= context:
        raise ConfigurationError(
            f"`--response_length` is {response_length}, and {model_name} has a context of {context} tokens for a "
            "prompt and its response; give less"
        )
    key_file, admin_key = directory / "admin_key", f"sk-admin-{secrets.token_urlsafe(32)}"
    server = GatewayServer(
        ChatFormats(AutoTokenizer.from_pretrained(name), end_token_ids=stored_end_token_ids(name)),
        host=host,
        port=port,
        store=directory / "sessions.sqlite",
        admin_key=admin_key,
        default=EpisodeSpec(
            EpisodeLimits(max_interaction_steps=max_interaction_steps),
            SamplingParams(response_length, temperature=temperature),
        ),
        model_name=model_name,
        context=context,
        idle_s=idle_s,
    )
    with closing(server):  # its port is had before the model is loaded, which takes longer
        torch_dtype = dtype if dtype == "auto" else getattr(torch, dtype)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch_dtype)
        model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        write_key(key_file, admin_key)
        gc.collect()
        gc.freeze()  # what is loaded by now stays, and no later collection looks at it again
        server.start()
        server.resume(SamplerLoop(LocalSampler(model, allow_uncached=allow_uncached_sampling), _loop_in_a_thread()))
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: server.stop())
        print(f"serving {model_name} on {server.base_url}; the admin's key is in {key_file}", flush=True)
        server.wait()


def write_key(path: Path, key: str) -> None:
    """Write a key where its owner alone can read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as file:
        file.write(key + "\n")


def _loop_in_a_thread() -> asyncio.AbstractEventLoop:
    """Where a model's forward passes do not hold up the gateway."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="sampler", daemon=True).start()
    return loop
