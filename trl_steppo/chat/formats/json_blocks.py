"""Other tool calls with arguments in JSON: DeepSeek V3 and R1, Mistral."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...types import Message
from .base import Schemas, TaggedFormat, ThoughtTags, tool_call
from .hermes import call_of_json
from .values import UnreadableError, read_json


class DeepSeekFormat(TaggedFormat):
    """`<｜tool▁call▁begin｜>` with the tool's name, `<｜tool▁sep｜>`, and the arguments in a code block or bare."""

    framing = frozenset(
        f"<｜tool▁{name}｜>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
    ) | {"<think>", "</think>"}
    opening = re.compile("<｜tool▁calls▁begin｜>|<｜tool▁call▁begin｜>")
    closing = "<｜tool▁call▁end｜>"
    form = (
        "write <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>tool name\n```json\n<object>\n```"
        "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )

    def read_calls(self, text: str, begin: re.Match[str], schemas: Schemas) -> tuple[Sequence[Message], int]:
        head = _DEEPSEEK_HEAD.match(text, begin.start())
        if head is None:
            raise UnreadableError("the tool's name or its arguments are missing", begin.end())
        arguments, end = read_json(text, head.end())
        if not isinstance(arguments, dict):
            raise UnreadableError("the arguments are not a JSON object", end)
        tail = _DEEPSEEK_TAIL.match(text, end)
        if tail is None:
            raise UnreadableError("<｜tool▁call▁end｜> is missing behind the arguments", end)
        return [tool_call(head["fenced"] or head["bare"], arguments)], tail.end()


class MistralFormat(TaggedFormat):
    """`[TOOL_CALLS]` with a JSON list of calls after it, or with `name[ARGS]{...}`; calls may have ids."""

    framing = frozenset({"[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"})
    thought = ThoughtTags("[THINK]", "[/THINK]")
    opening = re.compile(r"\[TOOL_CALLS\]")
    form = 'write [TOOL_CALLS][{"name": <tool name>, "arguments": <object>}]'

    def read_calls(self, text: str, begin: re.Match[str], schemas: Schemas) -> tuple[Sequence[Message], int]:
        head = _MISTRAL_HEAD.match(text, begin.end())
        value, end = read_json(text, head.end() if head else begin.end())
        if head is not None:
            if not isinstance(value, dict):
                raise UnreadableError("the arguments are not a JSON object", end)
            return [tool_call(head["name"], value, head["id"])], end
        if not isinstance(value, list) or not value:
            raise UnreadableError("not a JSON list of tool calls", end)
        return [_with_id(call_of_json(one, end), one.get("id")) for one in value], end


def _with_id(call: Message, call_id: object) -> Message:
    return {**call, "id": call_id} if isinstance(call_id, str) else call


_DEEPSEEK_HEAD = re.compile(
    r"\s*(?:<｜tool▁calls▁begin｜>)?\s*<｜tool▁call▁begin｜>"
    r"(?:function<｜tool▁sep｜>(?P<fenced>[^\n<]+)\n```json\n|(?P<bare>[^\n<]+)<｜tool▁sep｜>)"
)
_DEEPSEEK_TAIL = re.compile(r"\s*(?:```)?\s*<｜tool▁call▁end｜>\s*(?:<｜tool▁calls▁end｜>)?")
_MISTRAL_HEAD = re.compile(r"\s*(?P<name>[\w.-]+)(?:\[CALL_ID\](?P<id>\w+))?(?:\[ARGS\])?(?=\s*\{)")

DEEPSEEK = DeepSeekFormat()
MISTRAL = MistralFormat()
