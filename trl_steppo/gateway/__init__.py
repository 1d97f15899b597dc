"""The door for agents that we do not control: they speak the OpenAI or Anthropic API, we record steps.

| file | what it is |
|---|---|
| `conversation.py` | what all APIs have in common: a request, an answer, the keys of a history |
| `openai.py`, `responses.py`, `anthropic.py` | pure translation: an API's body <-> a request, an answer |
| `tokens.py` | a request's place in what is recorded: only what is new is tokenized |
| `sessions.py` | one episode: what may be asked, what was recorded, how it ended |
| `store.py` | all of it on the disk, before a client sees it |
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

from typing import TYPE_CHECKING

from ..names import lazy_names

if TYPE_CHECKING:
    from .server import GatewayServer
    from .service import Gateway
    from .sessions import SessionSpec

__all__ = ["Gateway", "GatewayServer", "SessionSpec"]

_find = lazy_names(__name__, {"GatewayServer": ".server", "Gateway": ".service", "SessionSpec": ".sessions"})


def __getattr__(name: str) -> object:
    try:
        return _find(name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("starlette", "uvicorn", "pydantic", "prometheus_client"):
            raise ModuleNotFoundError(
                f'the gateway needs `{error.name}`, which is not installed: pip install "trl-steppo[gateway]"',
                name=error.name,
            ) from error
        raise
