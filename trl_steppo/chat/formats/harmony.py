"""Turns of several messages, each with a header that says whom it is for: gpt-oss, Muse Glimmer."""

from __future__ import annotations

import re

from .base import Piece, PieceKind, Schemas, tool_call
from .tags import add_argument
from .values import UnreadableError, find_end, read_json, skip_space


class HarmonyFormat:
    """
    gpt-oss: `<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>`.

    A message with a recipient (`to=functions.search`) is a tool call, wherever in the header the recipient stands;
    the template writes it before the channel, the model mostly after it.
    """

    framing = frozenset(
        f"<|{name}|>" for name in ("start", "channel", "constrain", "message", "end", "call", "return")
    )
    opens_thought = "<|channel|>analysis<|message|>"
    form = "write <|channel|>commentary to=functions.<tool name> <|constrain|>json<|message|><object><|call|>"

    def read(self, text: str, schemas: Schemas, *, opens_thinking: bool = False) -> list[Piece]:
        """Divide a response into its parts; see [`~chat.formats.base.CallFormat`]."""
        pieces: list[Piece] = []
        at = 0
        if opens_thinking:
            at = self._read_text(text, 0, "thought", pieces)
        while at < len(text):
            header = _HEADER.match(text, skip_space(text, at))
            if header is None:
                pieces.append(self._read_headless(text[at:]))
                break
            recipient = _RECIPIENT.search(header["head"])
            if recipient is not None:
                at = self._read_call(text, header, recipient["to"], pieces)
            else:
                kind: PieceKind = "thought" if "<|channel|>analysis" in header["head"] else "text"
                at = self._read_text(text, header.end(), kind, pieces)
        if text.rstrip().endswith("<|call|>") and all(piece.kind in ("text", "thought") for piece in pieces):
            last = next((piece.text for piece in reversed(pieces) if piece.kind == "text"), "") or "<|call|>"
            pieces = [piece for piece in pieces if piece.kind == "thought"]
            pieces.append(Piece("malformed", last, problem=f"<|call|> ends a message for no tool; {self.form}"))
        return pieces

    def _read_headless(self, text: str) -> Piece:
        if _RECIPIENT.search(text) and _HEADER_START.match(text):
            return Piece("malformed", text, problem=f"the header of a tool call is cut; {self.form}")
        return Piece("text", _without_turn_end(text))

    def _read_text(self, text: str, at: int, kind: PieceKind, pieces: list[Piece]) -> int:
        end = _TEXT_END.search(text, at)
        pieces.append(Piece(kind, text[at : end.start()] if end else text[at:]))
        return end.end() if end else len(text)

    def _read_call(self, text: str, header: re.Match[str], recipient: str, pieces: list[Piece]) -> int:
        try:
            arguments, end = read_json(text, header.end())
            if not isinstance(arguments, dict):
                raise UnreadableError("the arguments are not a JSON object", end)
            end = skip_space(text, end)
            if not text.startswith("<|call|>", end):
                raise UnreadableError("<|call|> is missing behind the arguments", end)
        except UnreadableError as error:
            end_of_message = _TEXT_END.search(text, max(error.at, header.end()))
            end = end_of_message.end() if end_of_message else len(text)
            pieces.append(Piece("malformed", text[header.start() : end], problem=f"{error.reason}; {self.form}"))
            return end
        end += len("<|call|>")
        call = tool_call(recipient.removeprefix("functions."), arguments)
        pieces.append(Piece("calls", text[header.start() : end], (call,)))
        return end


class MuseFormat:
    """
    Muse Glimmer: ` to=self<|message|>...<|eom|><|start|>assistant to=user<|message|>...<|eot|>`; a message to a tool
    holds `<atem:function_calls><atem:invoke name="tool"><atem:parameter name="key">value</atem:parameter>...`.
    """

    framing = frozenset({"<|start|>", "<|message|>", "<|eom|>", "<|eot|>"})
    opens_thought = "to=self<|message|>"
    form = (
        'write  to=<tool name><|message|><atem:function_calls>\n<atem:invoke name="tool name">\n'
        '<atem:parameter name="argument name">value</atem:parameter>\n</atem:invoke>\n</atem:function_calls>'
    )

    def read(self, text: str, schemas: Schemas, *, opens_thinking: bool = False) -> list[Piece]:
        """Divide a response into its parts; see [`~chat.formats.base.CallFormat`]."""
        pieces: list[Piece] = []
        at = self._read_text(text, 0, "thought", pieces) if opens_thinking else 0
        while at < len(text):
            header = _MUSE_HEADER.match(text, at)
            if header is None:
                pieces.append(self._read_headless(text[at:]))
                break
            if header["to"] in (None, "user", "self"):
                kind: PieceKind = "thought" if header["to"] == "self" else "text"
                at = self._read_text(text, header.end(), kind, pieces)
            else:
                at = self._read_calls(text, header, schemas, pieces)
        return pieces

    def _read_headless(self, text: str) -> Piece:
        to = re.match(r"(?:\s*<\|start\|>assistant)?\s*to=(\S*)\s*\Z", text)
        if to and not any(name.startswith(to[1]) for name in ("self", "user")):
            return Piece("malformed", text, problem=f"the header of a tool call is cut; {self.form}")
        return Piece("text", _without_turn_end(text))

    def _read_text(self, text: str, at: int, kind: PieceKind, pieces: list[Piece]) -> int:
        end = _MUSE_END.search(text, at)
        pieces.append(Piece(kind, text[at : end.start()] if end else text[at:]))
        return end.end() if end else len(text)

    def _read_calls(self, text: str, header: re.Match[str], schemas: Schemas, pieces: list[Piece]) -> int:
        try:
            calls, end = _read_atem(text, header.end(), schemas)
            tail = re.compile(r"\s*(?:<\|eom\|>|<\|eot\|>|\Z)").match(text, end)
            if tail is None:
                raise UnreadableError("text behind </atem:function_calls>", end)
        except UnreadableError as error:
            end_of_message = _MUSE_END.search(text, max(error.at, header.end()))
            end = end_of_message.end() if end_of_message else len(text)
            pieces.append(Piece("malformed", text[header.start() : end], problem=f"{error.reason}; {self.form}"))
            return end
        pieces.append(Piece("calls", text[header.start() : tail.end()], tuple(calls)))
        return tail.end()


def _read_atem(text: str, at: int, schemas: Schemas) -> tuple[list[dict[str, object]], int]:
    opening = _ATEM_OPEN.match(text, at)
    if opening is None:
        raise UnreadableError("<atem:function_calls> is missing", at)
    calls: list[dict[str, object]] = []
    at = opening.end()
    while (invoke := _ATEM_INVOKE.match(text, at)) is not None:
        arguments: dict[str, object] = {}
        at = invoke.end()
        while (key := _ATEM_PARAMETER.match(text, at)) is not None:
            end = find_end(text, key.end(), _ATEM_VALUE_END, begins=_ATEM_OPEN, closing="</atem:function_calls>")
            if end is None:
                raise UnreadableError(f"</atem:parameter> is missing behind the value of {key['key']!r}", len(text))
            add_argument(arguments, key["key"], text[key.end() : end.start()], schemas, invoke["name"], at=end.end())
            at = end.end()
        closing = _ATEM_INVOKE_END.match(text, at)
        if closing is None:
            raise UnreadableError("</atem:invoke> is missing behind the parameters", at)
        calls.append(tool_call(invoke["name"], arguments))
        at = closing.end()
    end_of_calls = _ATEM_CLOSE.match(text, at)
    if end_of_calls is None or not calls:
        raise UnreadableError("a whole <atem:invoke> and </atem:function_calls> are missing", at)
    return calls, end_of_calls.end()


def _without_turn_end(text: str) -> str:
    end = _TURN_END.search(text)
    return text if end is None else text[: end.start()].rstrip()


# In none of these may two parts share a run of white space between them, or its length counts squared.
_HEADER_START = re.compile(r"(?:\s*<\|start\|>assistant)?\s*(?:to=|<\|channel\|>)")
_WORDS = r"[^<\n]*(?:\n\s*(?=<\|constrain\|>))?"
_HEADER = re.compile(
    r"(?:<\|start\|>assistant\s*)?(?P<head>"
    rf"(?:to={_WORDS})?(?:<\|channel\|>{_WORDS})?(?:<\|constrain\|>[^<\n]*)?)<\|message\|>"
)
_RECIPIENT = re.compile(r"(?:^|\s|>)to=(?P<to>[^\s<]+)")
# The end of a message is followed by the next one's start, or by nothing; elsewhere it is part of the text.
_TEXT_END = re.compile(r"<\|end\|>\s*(?=<\|start\|>|\Z)|<\|(?:return|call)\|>\s*\Z")
_TURN_END = re.compile(r"<\|(?:end|return|call|eom|eot)\|>\s*\Z")
_MUSE_HEADER = re.compile(r"(?:\s*<\|start\|>assistant)?(?:\s*to=(?P<to>[^\s<]+))?\s*<\|message\|>")
_MUSE_END = re.compile(r"<\|eom\|>\s*(?=<\|start\|>|\Z)|<\|eot\|>\s*\Z")
_ATEM_OPEN = re.compile(r"\s*<atem:function_calls>")
_ATEM_INVOKE = re.compile(r'\s*<atem:invoke name="(?P<name>[^"\n]+)">')
_ATEM_PARAMETER = re.compile(r'\s*<atem:parameter name="(?P<key>[^"\n]+)">')
_ATEM_VALUE_END = re.compile(r"</atem:parameter>\s*(?=<atem:parameter name=|</atem:invoke>)")
_ATEM_INVOKE_END = re.compile(r"\s*</atem:invoke>")
_ATEM_CLOSE = re.compile(r"\s*</atem:function_calls>")

HARMONY = HarmonyFormat()
MUSE = MuseFormat()
