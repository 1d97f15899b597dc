"""The door for agents that we do not control: they speak the OpenAI or Anthropic API, we record steps.

| file | what it is |
|---|---|
| `conversation.py` | what all APIs have in common: a request, an answer, the keys of a history |
| `openai.py`, `responses.py`, `anthropic.py` | pure translation: an API's body <-> a request, an answer |
| `tokens.py` | a request's place in what is recorded: only what is new is tokenized |
| `sessions.py` | one episode: its record, what its client was told of, what may still be asked |
| `store.py`, `stored.py` | all of it on the disk, before a client sees it; its JSON form |
| `sampling.py` | requests into a sampler, held while weights change |
| `service.py` | these put together: one request in, one recorded step out |
| `app.py`, `openapi.py`, `monitor.py` | HTTP: routes, the document that describes them, metrics |
| `late.py` | streams that begin before their response is there |
| `limits.py`, `work.py` | how much a body may consist of; a thread for what takes long, beside the event loop |
| `connections.py` | silent and endless connections are closed |
| `server.py` | a thread that serves |

Nothing here loads torch.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..episodes import EpisodeSpec
    from .server import GatewayServer
    from .service import Gateway

_HOME = {"GatewayServer": ".server", "Gateway": ".service", "EpisodeSpec": "..episodes"}

__all__ = ["EpisodeSpec", "Gateway", "GatewayServer"]


def __getattr__(name: str) -> Any:
    if name == "SessionSpec":
        warnings.warn("`SessionSpec` is now called `EpisodeSpec`", DeprecationWarning, stacklevel=2)
        name = "EpisodeSpec"
    if name in _HOME:
        try:
            return getattr(import_module(_HOME[name], __name__), name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
                raise ModuleNotFoundError(
                    f'the gateway needs `{error.name}`, which is not installed: pip install "trl-steppo[gateway]"',
                    name=error.name,
                ) from error
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
