"""`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Hermes, Qwen2.5, Qwen3."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...types import Message
from .base import Schemas, TaggedFormat, tool_call
from .values import UnreadableError, read_json, skip_space


class HermesFormat(TaggedFormat):
    """JSON between `<tool_call>` and `</tool_call>`, read as JSON: the closing tag counts only after it."""

    framing = frozenset({"<tool_call>", "</tool_call>", "<think>", "</think>"})
    opening = re.compile("<tool_call>")
    closing = "</tool_call>"
    form = 'write <tool_call>\n{"name": <tool name>, "arguments": <object>}\n</tool_call>'

    def read_calls(self, text: str, begin: re.Match[str], schemas: Schemas) -> tuple[Sequence[Message], int]:
        try:
            value, end = read_json(text, begin.end())
        except UnreadableError as error:
            following = self.opening.search(text, begin.end())
            limit = following.start() if following else len(text)
            if text.find(self.closing, begin.end(), limit) < 0:
                raise UnreadableError("the closing </tool_call> is missing", error.at) from error
            raise
        at = skip_space(text, end)
        if not text.startswith(self.closing, at):
            follows = text.find(self.closing, at) if self.opening.search(text, at) is None else -1
            reason = "the closing </tool_call> is missing" if follows < 0 else "not valid JSON (text behind it)"
            raise UnreadableError(reason, at)
        at += len(self.closing)
        return [call_of_json(value, at)], at


def call_of_json(value: object, at: int, *, arguments: Sequence[str] = ("arguments",)) -> Message:
    """
    The tool call that a JSON object stands for; `arguments` are the names that its arguments may have.

    Raises:
        UnreadableError: it stands for none; it was read up to `at`.
    """
    if not isinstance(value, dict):
        raise UnreadableError("not a JSON object", at)
    if not isinstance(value.get("name"), str):
        raise UnreadableError('"name" is missing or not a string', at)
    given = next((value[name] for name in arguments if name in value), None)
    if not isinstance(given, dict):
        raise UnreadableError(f'"{arguments[0]}" is missing or not an object', at)
    return tool_call(value["name"], given)


HERMES = HermesFormat()
