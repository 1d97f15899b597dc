"""What tests of the gateway's translators share: bodies in, answers, and server-sent events out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from trl_steppo.gateway.bodies import read_body
from trl_steppo.gateway.conversation import Answer, ModelRequest
from trl_steppo.gateway.dialect import Dialect
from trl_steppo.gateway.limits import BodyLimits

SAID = Answer(
    answer_id="a1",
    created=7,
    model="m",
    text="It is a rather long answer.",
    tool_calls=(),
    reasoning="",
    finish_reason="stop",
    stop_sequence=None,
    prompt_tokens=10,
    kept_tokens=4,
    completion_tokens=3,
    tokens=(),
    logprobs=(),
)
CALL = {"id": "call_a1_0", "name": "search", "arguments": {"query": "Bonn", "count": 3}}
ARGUMENTS = '{"query": "Bonn", "count": 3}'
CALLED = replace(SAID, text="", tool_calls=(CALL,), reasoning="Where is it?", finish_reason="tool_calls")
CUT = replace(SAID, text="It", finish_reason="length", completion_tokens=1)
SCORED = replace(SAID, text="aä", tokens=("a", "\ufffd", "\ufffd"), logprobs=(-0.5, -1.0, -2.0))
PARAMETERS = {"type": "object", "properties": {"query": {"type": "string"}}}
SEARCH = {"type": "function", "function": {"name": "search", "parameters": PARAMETERS}}


def chat_body(*messages: Any, **fields: Any) -> bytes:
    """A body of chat completions, as a client sends it."""
    return json.dumps({"model": "m", "messages": messages, **fields}).encode()


def read(dialect: Dialect[Any], **fields: Any) -> Any:
    """A body, as a client sends it."""
    return read_body(dialect.body, json.dumps({"model": "m", **fields}).encode(), BodyLimits())


def asked(dialect: Dialect[Any], **fields: Any) -> ModelRequest:
    """What a body asks for."""
    request: ModelRequest = read(dialect, **fields).request(BodyLimits())
    return request


def events(stream: Iterable[bytes]) -> list[Any]:
    """The data of server-sent events; each names its type where its API has names."""
    found = []
    for sent in stream:
        lines = sent.decode().splitlines()
        assert sent.endswith(b"\n\n")
        name = lines.pop(0).removeprefix("event: ") if lines[0].startswith("event: ") else None
        data = lines[0].removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
        assert name is None or found[-1]["type"] == name
    return found
