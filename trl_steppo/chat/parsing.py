"""What a model wrote -> a message: its text, its thoughts, its tool calls, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..types import Message
from .formats.base import Piece, Schemas, tool_call
from .formats.hermes import HERMES
from .formats.values import UnreadableError, check_value, read_text

__all__ = ["Message", "ParsedResponse", "check_tool_calls", "join_pieces", "parse_hermes", "split_pieces", "tool_call"]


@dataclass(frozen=True)
class ParsedResponse:
    """
    One response, read as a message.

    Args:
        message (`dict`):
            `role`, `content`; `tool_calls` where there are any, and `reasoning_content` where the response thought.
            The raw text of a call that cannot be read stays in `content`.
        malformed (`tuple[str, ...]`):
            For each tool call that cannot be read: why, in words that the model can act on.
    """

    message: Message
    malformed: tuple[str, ...] = ()


def parse_hermes(text: str, *, opens_thinking: bool = False) -> ParsedResponse:
    """
    Read a response that writes tool calls as JSON between `<tool_call>` and `</tool_call>`.

    Args:
        text (`str`):
            The decoded response.
        opens_thinking (`bool`, *optional*, defaults to `False`):
            Whether the prompt has already written `<think>`. What is thought is never read as a tool call.
    """
    return join_pieces(HERMES.read(text, {}, opens_thinking=opens_thinking))


def join_pieces(pieces: Sequence[Piece]) -> ParsedResponse:
    """The message that the parts of a response make up."""
    said = [piece.text.strip() for piece in pieces if piece.kind in ("text", "malformed")]
    message: Message = {"role": "assistant", "content": "\n".join(filter(None, said))}
    thoughts = [piece.text.strip() for piece in pieces if piece.kind == "thought"]
    if any(thoughts):
        message["reasoning_content"] = "\n".join(filter(None, thoughts))
    calls = [call for piece in pieces for call in piece.calls]
    if calls:
        message["tool_calls"] = calls
    return ParsedResponse(message, tuple(piece.problem for piece in pieces if piece.kind == "malformed"))


def split_pieces(pieces: Sequence[Piece]) -> tuple[str, str]:
    """What a response thought, and all that it said, where tool calls are the text that they are."""
    thoughts = [piece.text.strip() for piece in pieces if piece.kind == "thought"]
    said = "".join(piece.text for piece in pieces if piece.kind != "thought")
    return "\n".join(filter(None, thoughts)), said.lstrip() if thoughts else said


def check_tool_calls(tool_calls: Sequence[Any], schemas: Schemas) -> tuple[list[Message], list[str]]:
    """
    Sort the tool calls of another parser into good ones and reasons against the others.

    A parser that does not know the schemas may leave numbers, booleans and lists as text; they become what the schema
    of their tool declares.
    """
    calls: list[Message] = []
    malformed: list[str] = []
    for one in tool_calls:
        function = one.get("function", one) if isinstance(one, dict) else one
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            malformed.append('"name" is missing or not a string')
        elif not isinstance(function.get("arguments"), dict):
            malformed.append('"arguments" is missing or not an object')
        else:
            declared = schemas.get(function["name"], {}).get("properties", {})
            try:
                arguments = {
                    name: read_text(value, declared[name])
                    if isinstance(value, str) and name in declared
                    else check_value(value)
                    for name, value in function["arguments"].items()
                }
            except UnreadableError as error:
                malformed.append(error.reason)
            else:
                calls.append(tool_call(function["name"], arguments))
    return calls, malformed
