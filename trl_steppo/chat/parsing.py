"""What a model wrote -> a message: its text, its thoughts, its tool calls, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Message = dict[str, Any]


def tool_call(name: str, arguments: Mapping[str, Any]) -> Message:
    return {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}


@dataclass(frozen=True)
class ParsedResponse:
    """
    One response, read as a message.

    Args:
        message (`dict`):
            `role`, `content`; `tool_calls` where there are any, and `reasoning_content` where the response thought.
        malformed (`tuple[str, ...]`):
            For each tool call that cannot be read: why, in words that the model can act on.
    """

    message: Message
    malformed: tuple[str, ...] = ()


_HERMES_FORM = 'write <tool_call>\n{"name": <tool name>, "arguments": <object>}\n</tool_call>'


def parse_hermes(text: str, *, opens_thinking: bool = False) -> ParsedResponse:
    """
    Read a response that writes tool calls as JSON between `<tool_call>` and `</tool_call>`.

    Args:
        text (`str`):
            The decoded response.
        opens_thinking (`bool`, *optional*, defaults to `False`):
            Whether the prompt has already written `<think>`. What is thought is never read as a tool call.
    """
    reasoning, text = _split_thinking(text, opens_thinking)
    content, *blocks = text.split("<tool_call>")
    calls: list[Message] = []
    malformed: list[str] = []
    for block in blocks:
        inside, closing, after = block.partition("</tool_call>")
        content += after.strip()
        reading = _read_call(inside) if closing else "the closing </tool_call> is missing"
        if isinstance(reading, str):
            malformed.append(f"{reading}; {_HERMES_FORM}")
        else:
            calls.append(reading)
    message: Message = {"role": "assistant", "content": content.strip()}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return ParsedResponse(message, tuple(malformed))


def _split_thinking(text: str, opens_thinking: bool) -> tuple[str, str]:
    thought, closing, rest = text.partition("</think>")
    if closing:
        return thought.replace("<think>", "", 1).strip(), rest.lstrip()
    if opens_thinking or text.lstrip().startswith("<think>"):
        return text.replace("<think>", "", 1).strip(), ""  # cut before the thought ended
    return "", text


def _read_call(inside: str) -> Message | str:
    """The tool call, or what is wrong with it."""
    try:
        call = json.loads(inside)
    except ValueError as error:
        return f"not valid JSON ({error})"
    except RecursionError:
        return "not valid JSON (nested too deeply)"
    return _check_call(call) or tool_call(call["name"], call["arguments"])


def _check_call(call: Any) -> str | None:
    if not isinstance(call, dict):
        return "not a JSON object"
    if not isinstance(call.get("name"), str):
        return '"name" is missing or not a string'
    if not isinstance(call.get("arguments"), dict):
        return '"arguments" is missing or not an object'
    return None


def sort_tool_calls(tool_calls: Sequence[Any]) -> tuple[list[Message], list[str]]:
    calls: list[Message] = []
    malformed: list[str] = []
    for one in tool_calls:
        function = one.get("function", one) if isinstance(one, dict) else one
        problem = _check_call(function)
        if problem is None:
            calls.append(tool_call(function["name"], function["arguments"]))
        else:
            malformed.append(problem)
    return calls, malformed
