"""What the formats of tool calls have in common: the parts of a response, and how its text is divided into them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ...types import Message
from .values import Schema, UnreadableError

PieceKind = Literal["text", "thought", "calls", "malformed"]
Schemas = Mapping[str, Schema]
"""The parameters of each tool, as a JSON schema, by the tool's name."""


def tool_call(name: str, arguments: Mapping[str, object], call_id: str | None = None) -> Message:
    call: Message = {"type": "function", "function": {"name": name, "arguments": dict(arguments)}}
    return call if call_id is None else {**call, "id": call_id}


@dataclass(frozen=True)
class Piece:
    """
    One part of a response.

    Args:
        kind (`str`):
            `"text"`, `"thought"`, `"calls"`, or `"malformed"`: something that begins as a tool call and is none.
        text (`str`):
            As the model wrote it; of text and thoughts, without the delimiters.
        calls (`tuple[dict, ...]`, *optional*):
            The tool calls.
        problem (`str`, *optional*):
            Why it cannot be read, in words that the model can act on.
    """

    kind: PieceKind
    text: str
    calls: tuple[Message, ...] = ()
    problem: str = ""


class CallFormat(Protocol):
    """One way of writing thoughts, text and tool calls in a response."""

    @property
    def framing(self) -> frozenset[str]:
        """Special tokens that are part of the format: decoding a response must keep them."""

    @property
    def opens_thought(self) -> str:
        """What begins a thought; a prompt that ends with it has begun one."""

    def read(self, text: str, schemas: Schemas, *, opens_thinking: bool = False) -> list[Piece]:
        """
        Divide a response into its parts.

        Args:
            text (`str`):
                The decoded response, with the tokens in `framing`.
            schemas (`Mapping[str, Mapping]`):
                The parameters of each tool, by name. They say what a value is where the format does not.
            opens_thinking (`bool`, *optional*, defaults to `False`):
                Whether the prompt has already begun a thought.
        """
        ...


@dataclass(frozen=True)
class ThoughtTags:
    """
    What stands around a thought.

    Args:
        opening, closing (`str`):
            The delimiters.
        anywhere (`bool`, *optional*, defaults to `False`):
            Whether a thought may begin in the middle of a line. Otherwise the opening counts only at the start of the
            response or of a line, or after another part: elsewhere the text only mentions it.
    """

    opening: str = "<think>"
    closing: str = "</think>"
    anywhere: bool = False


class TaggedFormat:
    """
    A format whose tool calls stand in the text of the turn, each after an opening delimiter.

    A subclass says how one call is read; where thoughts and calls begin is decided here. A delimiter counts only where
    the format puts it: the closing one of a call after its arguments, that of a thought after the opening one.
    """

    framing: frozenset[str] = frozenset()
    thought = ThoughtTags()
    opening: re.Pattern[str]
    """Where a call begins."""
    closing: str = ""
    """What ends a call; after a call that cannot be read, reading continues after it."""
    form: str = ""
    """How a call is written, for the model to be told."""

    @property
    def opens_thought(self) -> str:
        return self.thought.opening

    def read_calls(self, text: str, begin: re.Match[str], schemas: Schemas) -> tuple[Sequence[Message], int]:
        """
        The tool calls that begin with `begin`, and the position after them.

        Raises:
            UnreadableError: this is not a complete call; the error has the position up to which that is certain.
        """
        raise NotImplementedError

    def read(self, text: str, schemas: Schemas, *, opens_thinking: bool = False) -> list[Piece]:
        """Divide a response into its parts; see [`CallFormat`]."""
        pieces: list[Piece] = []
        at = 0
        if opens_thinking:
            start = re.compile(rf"\s*{re.escape(self.thought.opening)}").match(text)
            at = self._read_thought(text, start.end() if start else 0, pieces)
        begins = self._begin_pattern()
        while at < len(text):
            begin = begins.search(text, at)
            if begin is None:
                pieces.append(Piece("text", text[at:]))
                break
            if begin["thought"] is not None and not self._may_think(text, at, begin.start()):
                pieces.append(Piece("text", text[at : begin.end()]))
                at = begin.end()
                continue
            if begin.start() > at:
                pieces.append(Piece("text", text[at : begin.start()]))
            if begin["thought"] is not None:
                at = self._read_thought(text, begin.end(), pieces)
            else:
                at = self._read_call(text, begin.start(), schemas, pieces)
        return _merge(pieces)

    def _begin_pattern(self) -> re.Pattern[str]:
        flags = self.opening.flags & ~re.UNICODE
        return re.compile(rf"(?P<thought>{re.escape(self.thought.opening)})|(?:{self.opening.pattern})", flags)

    def _may_think(self, text: str, part: int, at: int) -> bool:
        return self.thought.anywhere or not text[max(part, text.rfind("\n", 0, at) + 1) : at].strip()

    def _read_thought(self, text: str, at: int, pieces: list[Piece]) -> int:
        end = text.find(self.thought.closing, at)
        if end < 0:  # cut before the thought ended
            pieces.append(Piece("thought", text[at:]))
            return len(text)
        pieces.append(Piece("thought", text[at:end]))
        return end + len(self.thought.closing)

    def _read_call(self, text: str, start: int, schemas: Schemas, pieces: list[Piece]) -> int:
        begin = self.opening.match(text, start)
        assert begin is not None, "the place was found with the same pattern"
        try:
            calls, end = self.read_calls(text, begin, schemas)
        except UnreadableError as error:
            end = self._resume(text, max(error.at, begin.end()))
            pieces.append(Piece("malformed", text[start:end], problem=f"{error.reason}; {self.form}"))
        else:
            pieces.append(Piece("calls", text[start:end], tuple(calls)))
        return end

    def _resume(self, text: str, at: int) -> int:
        """Where reading goes on after a call that is unreadable up to `at`."""
        following = self.opening.search(text, at)
        limit = following.start() if following else len(text)
        closing = text.find(self.closing, at, limit) if self.closing else -1
        return limit if closing < 0 else closing + len(self.closing)


class PlainFormat(TaggedFormat):
    """Thoughts and text, of templates that write no tool calls."""

    opening = re.compile(r"(?!)")


def _merge(pieces: Sequence[Piece]) -> list[Piece]:
    """Neighbouring texts become one."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and piece.kind == merged[-1].kind == "text":
            merged[-1] = Piece("text", merged[-1].text + piece.text)
        else:
            merged.append(piece)
    return merged
