"""Tool calls in special notations: Gemma 4 (`call:name{key:value}`) and LFM2.5 (`name(key=value)`)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...types import Message
from .base import Schemas, TaggedFormat, ThoughtTags, tool_call
from .values import MAX_LEVELS, UnreadableError, check_value, find_end, read_json, skip_space

_CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
_WORD = re.compile(r"[\w.+-]+")


class GemmaFormat(TaggedFormat):
    """Gemma 4: `<|tool_call>call:name{key:<|"|>text<|"|>,other:[1,2]}<tool_call|>`."""

    framing = frozenset({"<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"})
    thought = ThoughtTags("<|channel>thought\n", "<channel|>", anywhere=True)
    opening = re.compile(r"<\|tool_call>")
    closing = "<tool_call|>"
    form = 'write <|tool_call>call:<tool name>{<argument name>:<|"|>text<|"|>,<argument name>:<number>}<tool_call|>'

    def read_calls(self, text: str, begin: re.Match[str], schemas: Schemas) -> tuple[Sequence[Message], int]:
        head = _GEMMA_HEAD.match(text, begin.end())
        if head is None:
            raise UnreadableError("call:<tool name>{ is missing behind <|tool_call>", begin.end())
        value, at = _read_value(text, head.end() - 1, _GEMMA)
        at = skip_space(text, at)
        if not text.startswith(self.closing, at):
            raise UnreadableError("<tool_call|> is missing behind the arguments", at)
        arguments = check_value(value)
        assert isinstance(arguments, dict), "the head ends with an opening brace"
        return [tool_call(head["name"], arguments)], at + len(self.closing)


class PythonicFormat(TaggedFormat):
    """
    LFM2.5: `<|tool_call_start|>[name(key='text', other=[1, 2])]<|tool_call_end|>`.

    Args:
        escapes (`bool`):
            Whether backslashes in a text escape what follows. Of LFM2.5's two templates one writes texts as they are.
    """

    framing = frozenset({"<|tool_call_start|>", "<|tool_call_end|>", "<think>", "</think>"})
    opening = re.compile(r"<\|tool_call_start\|>")
    closing = "<|tool_call_end|>"
    form = "write <|tool_call_start|>[<tool name>(<argument name>='text', <argument name>=<number>)]<|tool_call_end|>"

    def __init__(self, *, escapes: bool) -> None:
        self._escapes = escapes

    def read_calls(self, text: str, begin: re.Match[str], schemas: Schemas) -> tuple[Sequence[Message], int]:
        calls: list[Message] = []
        at = _expect(text, skip_space(text, begin.end()), "[")
        while True:
            head = _CALL_HEAD.match(text, at)
            if head is None:
                raise UnreadableError("<tool name>( is missing", at)
            arguments, at = self._read_arguments(text, head.end())
            calls.append(tool_call(head["name"], arguments))
            at = skip_space(text, at)
            if not text.startswith(",", at):
                break
            at += 1
        at = skip_space(text, _expect(text, at, "]"))
        return calls, _expect(text, at, self.closing)

    def _read_arguments(self, text: str, at: int) -> tuple[dict[str, object], int]:
        arguments: dict[str, object] = {}
        at = skip_space(text, at)
        if text.startswith(")", at):
            return arguments, at + 1
        while True:
            key = _ARGUMENT.match(text, at)
            if key is None:
                raise UnreadableError("<argument name>= is missing", at)
            if key["key"] in arguments:
                raise UnreadableError(f"the argument {key['key']!r} is given twice", at)
            value, at = self._read_argument(text, key.end())
            arguments[key["key"]] = check_value(value)
            at = skip_space(text, at)
            if text.startswith(")", at):
                return arguments, at + 1
            at = _expect(text, at, ",")

    def _read_argument(self, text: str, at: int) -> tuple[object, int]:
        if text.startswith(("[", "{"), at):  # JSON, or a list as Python writes it
            try:
                return read_json(text, at)
            except UnreadableError:
                return _read_value(text, at, _PYTHON)
        if self._escapes or not text.startswith(("'", '"'), at):
            return _read_value(text, at, _PYTHON)
        # Text as it is: a quote ends it only where an argument, a call or the calls continue after it.
        pattern = re.compile(text[at] + _TEXT_TAIL)
        end = find_end(text, at + 1, pattern, begins=_PYTHONIC_CALL, closing=self.closing)
        if end is None:
            raise UnreadableError("the closing quote of a text is missing", len(text))
        return text[at + 1 : end.start()], end.start() + 1


@dataclass(frozen=True)
class _Notation:
    """How values are written: what text begins with, how it is read, and how a key with its colon is."""

    quotes: tuple[str, ...]
    read_text: Callable[[str, int], tuple[str, int]]
    read_key: Callable[[str, int], tuple[str, int]]


def _read_value(text: str, at: int, notation: _Notation, levels: int = 0) -> tuple[object, int]:
    """A value, and the position after it."""
    if levels > MAX_LEVELS:
        raise UnreadableError("nested too deeply", at)
    at = skip_space(text, at)
    if text.startswith(notation.quotes, at):
        return notation.read_text(text, at)
    if text.startswith("[", at):
        items: list[object] = []
        at = skip_space(text, at + 1)
        while not text.startswith("]", at):
            item, at = _read_value(text, at, notation, levels + 1)
            items.append(item)
            at = _next_item(text, at, "]")
        return items, at + 1
    if text.startswith("{", at):
        members: dict[str, object] = {}
        at = skip_space(text, at + 1)
        while not text.startswith("}", at):
            key, at = notation.read_key(text, at)
            if key in members:
                raise UnreadableError(f"{key!r} is given twice", at)
            members[key], at = _read_value(text, at, notation, levels + 1)
            at = _next_item(text, at, "}")
        return members, at + 1
    return _read_word(text, at)


def _read_gemma_text(text: str, at: int) -> tuple[str, int]:
    end = find_end(text, at + len(_QUOTE), _GEMMA_TEXT_END, begins=_GEMMA_CALL, closing="<tool_call|>")
    if end is None:
        raise UnreadableError(f"the closing {_QUOTE} of a text is missing", len(text))
    return text[at + len(_QUOTE) : end.start()], end.end()


def _read_gemma_key(text: str, at: int) -> tuple[str, int]:
    key = _GEMMA_KEY.match(text, at)
    if key is None:
        raise UnreadableError("<argument name>: is missing", at)
    return key["quoted"] if key["quoted"] is not None else key["bare"], key.end()


def _read_python_key(text: str, at: int) -> tuple[str, int]:
    at = skip_space(text, at)
    if not text.startswith(_PYTHON.quotes, at):
        raise UnreadableError("a key is not text", at)
    key, at = _read_python_text(text, at)
    return key, _expect(text, skip_space(text, at), ":")


def _read_python_text(text: str, at: int) -> tuple[str, int]:
    quoted = _PYTHON_TEXT.match(text, at)
    if quoted is None:
        raise UnreadableError("the closing quote of a text is missing", len(text))
    return _ESCAPE.sub(_unescape, quoted[0][1:-1]), quoted.end()


def _unescape(escape: re.Match[str]) -> str:
    if escape["code"]:
        number = int(escape["code"][1:], 16)
        return chr(number) if number < 0x110000 else "\N{REPLACEMENT CHARACTER}"
    return _ESCAPED.get(escape["character"], escape[0])


def _read_word(text: str, at: int) -> tuple[object, int]:
    word = _WORD.match(text, at)
    if word is None:
        raise UnreadableError("a value is missing", at)
    if word[0] in _CONSTANTS:
        return _CONSTANTS[word[0]], word.end()
    try:
        value, end = read_json(text, at)
    except UnreadableError as error:
        raise UnreadableError(f"{word[0]:.80} is not a value ({error.reason})", word.end()) from error
    if end != word.end():
        raise UnreadableError(f"{word[0]:.80} is not a value", word.end())
    return value, end


def _next_item(text: str, at: int, closing: str) -> int:
    at = skip_space(text, at)
    return at if text.startswith(closing, at) else skip_space(text, _expect(text, at, ","))


def _expect(text: str, at: int, what: str) -> int:
    if not text.startswith(what, at):
        raise UnreadableError(f"{what} is missing", at)
    return at + len(what)


_QUOTE = '<|"|>'
_GEMMA_CALL = re.compile(r"<\|tool_call>call:")
_PYTHONIC_CALL = re.compile(r"<\|tool_call_start\|>\[[\w.-]+\(")
_GEMMA_HEAD = re.compile(r"\s*call:(?P<name>[^{\s]+)\{")
_GEMMA_TEXT_END = re.compile(r'<\|"\|>(?=\s*[,\]}])')
_GEMMA_KEY = re.compile(
    r'\s*(?:<\|"\|>(?P<quoted>.*?)<\|"\|>|(?P<bare>[^:{}\[\],\s]+(?:\s+[^:{}\[\],\s]+)*))\s*:', re.DOTALL
)
_CALL_HEAD = re.compile(r"\s*(?P<name>[^\W\d][\w.-]*)\(")
_ARGUMENT = re.compile(r"\s*(?P<key>[^\W\d]\w*)\s*=\s*")
_TEXT_TAIL = r"(?=\s*(?:,\s*[^\W\d]\w*\s*=|\)\s*(?:,\s*[^\W\d][\w.-]*\(|\]\s*<\|tool_call_end\|>)))"
_PYTHON_TEXT = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_ESCAPE = re.compile(r"\\(?:(?P<code>x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8})|(?P<character>.))", re.DOTALL)
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t", "\\": "\\", "'": "'", '"': '"'}
_GEMMA = _Notation((_QUOTE,), _read_gemma_text, _read_gemma_key)
_PYTHON = _Notation(("'", '"'), _read_python_text, _read_python_key)

GEMMA = GemmaFormat()
PYTHONIC = PythonicFormat(escapes=False)
PYTHONIC_ESCAPED = PythonicFormat(escapes=True)
