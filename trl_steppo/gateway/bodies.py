"""What the bodies of all APIs have in common: how they are read, and how a mistake in one is told."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from .conversation import Message, RequestError
from .limits import BodyLimits, check_structure

B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """A body of which every field is known: one that is not is refused by its name, unless it is null."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, protected_namespaces=())
    __pydantic_extra__: dict[str, None] = Field(init=False)


def _check_finite(value: Any) -> Any:
    if not is_finite(value):
        raise ValueError("NaN and infinite numbers are no JSON")
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_check_finite)]
"""An object with anything in it that is JSON."""

JsonList = Annotated[list[Any], AfterValidator(_check_finite)]
"""The same, as a list."""

FIRST_ERROR = Field(fail_fast=True)
"""Of a list: what is wrong behind the first mistake is not looked for, however long the list is."""


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
    annotations: JsonList | None = None
    logprobs: JsonList | None = None
    citations: JsonList | None = None
    cache_control: JsonObject | None = None
    prompt_cache_breakpoint: JsonObject | None = None


Content = str | Annotated[list[Part], FIRST_ERROR]


def read_body(kind: type[B], body: bytes, limits: BodyLimits) -> B:
    """
    A body as its API describes it.

    Args:
        kind (`type[Body]`):
            What it should be.
        body (`bytes`):
            What was sent.
        limits ([`~gateway.limits.BodyLimits`]):
            What it may consist of, which is looked at first.

    Raises:
        RequestError: It is not; names the first field that is wrong.
    """
    check_structure(body, limits)
    body = whole_characters(body)
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = ".".join(str(part) for part in first["loc"] if not _names_a_type(part)) or None
        if first["type"] == "none_required":  # unknown fields, and those that may only be left out
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


def _names_a_type(part: Any) -> bool:
    """Whether a part of a field's place is no field, but which of several types was tried."""
    return isinstance(part, str) and (part in ("str", "none") or "[" in part or part[:1].isupper())


def text_of(content: Content | None) -> str:
    """The text of a message; its parts stand on lines of their own."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)


def arguments_of(text: str, param: str, limits: BodyLimits) -> dict[str, Any]:
    """The arguments of a tool call that a client sends back."""
    check_structure(text.encode("utf-8", "surrogatepass"), limits)
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict) or not is_finite(arguments):
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


def is_finite(value: Any) -> bool:
    """Whether JSON can say a value: NaN and infinite numbers have no form there."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, dict):
            left.extend(one.values())
        elif isinstance(one, list | tuple):
            left.extend(one)
        elif isinstance(one, float) and not math.isfinite(one):
            return False
    return True


def finite(value: Any) -> Any:
    """A value with null in the place of each NaN and infinite number."""
    if is_finite(value):
        return value
    if isinstance(value, dict):
        return {name: finite(one) for name, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, list | tuple) else None


def dumps(value: Any, *, compact: bool = False) -> str:
    """
    JSON for a client; null where a number is none. In ASCII: a model may escape half a character in a tool call,
    which no encoding has.
    """
    separators = (",", ":") if compact else None
    try:
        return json.dumps(value, separators=separators, allow_nan=False)
    except ValueError:
        return json.dumps(finite(value), separators=separators, allow_nan=False)


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event."""
    text = data if isinstance(data, str) else dumps(data, compact=True)
    return (f"event: {name}\n" if name is not None else "").encode() + f"data: {text}\n\n".encode()
