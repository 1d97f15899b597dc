"""Tool calls whose arguments stand between tags, as text: Qwen3.5 to 3.8, Qwen3-Coder, Nemotron 3; GLM-4.5."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...types import Message
from .base import Schemas, TaggedFormat, tool_call
from .values import UnreadableError, find_end, read_text, skip_space


class XmlFormat(TaggedFormat):
    """`<tool_call><function=name><parameter=key>value</parameter></function></tool_call>`."""

    framing = frozenset({"<tool_call>", "</tool_call>", "<think>", "</think>"})
    opening = re.compile("<tool_call>")
    closing = "</tool_call>"
    form = (
        "write <tool_call>\n<function=tool name>\n<parameter=argument name>\nvalue\n</parameter>\n</function>\n"
        "</tool_call>"
    )

    def read_calls(self, text: str, begin: re.Match[str], schemas: Schemas) -> tuple[Sequence[Message], int]:
        head = _FUNCTION.match(text, begin.end())
        if head is None:
            raise UnreadableError("<function=...> is missing behind <tool_call>", begin.end())
        arguments: dict[str, object] = {}
        at = head.end()
        while (key := _PARAMETER.match(text, at)) is not None:
            # A value on lines of its own ends with a line of its own; any other `</parameter>` is part of it.
            on_lines = text.startswith("\n", key.end())
            start = key.end() + on_lines
            pattern = _LINE_END if on_lines else _VALUE_END
            end = find_end(text, key.end(), pattern, begins=_XML_CALL, closing=self.closing)
            if end is None:
                raise UnreadableError(f"</parameter> is missing behind the value of {key['key']!r}", len(text))
            value = text[start : max(start, end.start())]
            add_argument(arguments, key["key"], value, schemas, head["name"], at=end.end())
            at = end.end()
        tail = _FUNCTION_END.match(text, at)
        if tail is None:
            raise UnreadableError("</function> and </tool_call> are missing behind the parameters", at)
        return [tool_call(head["name"], arguments)], tail.end()


class GlmFormat(TaggedFormat):
    """`<tool_call>name<arg_key>key</arg_key><arg_value>value</arg_value></tool_call>`."""

    framing = frozenset(
        ("<tool_call>", "</tool_call>", "<think>", "</think>", "<arg_key>", "</arg_key>", "<arg_value>")
    ) | {"</arg_value>"}
    opening = re.compile("<tool_call>")
    closing = "</tool_call>"
    form = "write <tool_call>tool name\n<arg_key>argument name</arg_key>\n<arg_value>value</arg_value>\n</tool_call>"

    def read_calls(self, text: str, begin: re.Match[str], schemas: Schemas) -> tuple[Sequence[Message], int]:
        head = _GLM_NAME.match(text, begin.end())
        if head is None:
            raise UnreadableError("the tool's name is missing behind <tool_call>", begin.end())
        arguments: dict[str, object] = {}
        at = head.end()
        while (key := _GLM_KEY.match(text, at)) is not None:
            end = find_end(text, key.end(), _GLM_VALUE_END, begins=_GLM_CALL, closing=self.closing)
            if end is None:
                raise UnreadableError(f"</arg_value> is missing behind the value of {key['key']!r}", len(text))
            value = text[key.end() : end.start()]
            add_argument(arguments, key["key"], value, schemas, head["name"], at=end.end())
            at = end.end()
        at = skip_space(text, at)
        if not text.startswith(self.closing, at):
            raise UnreadableError("</tool_call> is missing behind the arguments", at)
        return [tool_call(head["name"], arguments)], at + len(self.closing)


def add_argument(arguments: dict[str, object], key: str, value: str, schemas: Schemas, tool: str, *, at: int) -> None:
    """
    Add an argument that was written as text up to `at`.

    Raises:
        UnreadableError: there is one of this name already, or its value is not finite.
    """
    if key in arguments:
        raise UnreadableError(f"the argument {key!r} is given twice", at)
    try:
        arguments[key] = read_text(value, schemas.get(tool, {}).get("properties", {}).get(key))
    except UnreadableError as error:
        raise UnreadableError(f"the argument {key!r}: {error.reason}", at) from error


_FUNCTION = re.compile(r"\s*<function=(?P<name>[^>\n]+)>")
_PARAMETER = re.compile(r"\s*<parameter=(?P<key>[^>\n]+)>")
_VALUE_END = re.compile(r"</parameter>\s*(?=<parameter=|</function>)")
_LINE_END = re.compile(r"\n</parameter>\n\s*(?=<parameter=|</function>)")
_FUNCTION_END = re.compile(r"\s*</function>\s*</tool_call>")
_XML_CALL = re.compile(r"<tool_call>\s*<function=")
_GLM_CALL = re.compile(r"<tool_call>\s*[^\s<]+\s*(?:<arg_key>|</tool_call>)")
_GLM_NAME = re.compile(r"\s*(?P<name>[^\s<]+)")
_GLM_KEY = re.compile(r"\s*<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>")
_GLM_VALUE_END = re.compile(r"</arg_value>\s*(?=<arg_key>|</tool_call>)")

XML = XmlFormat()
GLM = GlmFormat()
