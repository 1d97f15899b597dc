"""What the bodies of all APIs have in common: how they are read, and how a mistake in one is told."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .conversation import Message, RequestError

B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """A body of which every field is known: one that is not is refused by its name."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


class OpenAIOptions(Body):
    """What chat completions and responses may both say beside what they ask for."""

    parallel_tool_calls: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Part(Body):
    """A part of a message's content: text. `cache_control` is taken and has no effect."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None
    citations: list[Any] | None = None
    cache_control: dict[str, Any] | None = None
    prompt_cache_breakpoint: dict[str, Any] | None = None


Content = str | list[Part]


def read_body(kind: type[B], body: bytes) -> B:
    """
    A body as its API describes it. A field that is not known and null is as good as absent.

    Raises:
        RequestError: It is not; names the first field that is wrong.
    """
    body = whole_characters(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        data, has_nulls = None, False
        for one in error.errors(include_url=False):
            if one["type"] == "extra_forbidden" and one["input"] is None:
                data = json.loads(body) if data is None else data
                has_nulls |= _remove_null(data, one["loc"])
        if has_nulls:
            return read_body(kind, json.dumps(data).encode())
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"] if not _names_a_type(part)) or None
        if first["type"] == "extra_forbidden":
            raise RequestError(400, f"`{param}` is not supported", param=param) from None
        what = first["msg"]
        raise RequestError(400, f"`{param}`: {what}" if param else what, param=param) from None


_ESCAPES = re.compile(
    rb"\\\\|\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)
"""In JSON: an escaped backslash, a surrogate pair, or (the group) half of one."""


def whole_characters(body: bytes) -> bytes:
    """JSON in which half a surrogate pair, which a client may have cut out of a text, is U+FFFD."""
    if b"\\ud" not in body and b"\\uD" not in body:
        return body
    return _ESCAPES.sub(lambda found: found[0] if found[1] is None else b"\\ufffd", body)


def _remove_null(data: Any, place: Sequence[Any]) -> bool:
    """Remove a null from JSON; parts of its place that are no field say which of several types was tried."""
    first, *rest = place
    is_there = (isinstance(data, dict) and first in data) or (isinstance(data, list) and isinstance(first, int))
    if not rest:
        if not isinstance(data, dict) or first not in data or data[first] is not None:
            return False
        del data[first]
        return True
    return (is_there and _remove_null(data[first], rest)) or _remove_null(data, rest)


def _names_a_type(part: Any) -> bool:
    """Whether a part of a field's place is no field, but which of several types was tried."""
    return isinstance(part, str) and (part in ("str", "none") or "[" in part or part[:1].isupper())


def text_of(content: Content | None) -> str:
    """The text of a message; its parts stand on lines of their own."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def arguments_of(text: str, param: str) -> dict[str, Any]:
    """The arguments of a tool call that a client sends back."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(400, f"`{param}` is no JSON object", param=param)
    return arguments


def call_message(content: str, calls: list[tuple[str, dict[str, Any]]]) -> Message:
    """An assistant's message in our own form."""
    message: Message = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls
        ]
    return message


def dumps(value: Any) -> str:
    """JSON for a client. In ASCII: a model may escape half a character in a tool call, which no encoding has."""
    return json.dumps(value)


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return (f"event: {name}\n" if name is not None else "").encode() + f"data: {text}\n\n".encode()
