"""`{"name": ..., "parameters": {...}}` as the whole turn: Llama 3.1, 3.2, 3.3."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ...types import Message
from .base import Piece, Schemas, TaggedFormat
from .hermes import call_of_json
from .values import UnreadableError, read_json, skip_space

_TAG = "<|python_tag|>"
_STARTS = ('{"name":', '{"type":"function","name":')


class LlamaFormat(TaggedFormat):
    """
    A JSON object at the start of the turn or of a line, or after `<|python_tag|>`.

    A JSON object with a `name` may be an answer as well: it is one if it is whole, names no tool and has no
    parameters.
    """

    framing = frozenset({_TAG})
    opening = re.compile(
        r'<\|python_tag\|>|^[ \t]*(?:;[ \t]*)?\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"name"\s*:', re.MULTILINE
    )
    form = 'write {"name": <tool name>, "parameters": <object>}'

    def read_calls(self, text: str, begin: re.Match[str], schemas: Schemas) -> tuple[Sequence[Message], int]:
        start = text.find("{", begin.start())
        is_tagged = text.startswith(_TAG, begin.start())
        if start < 0 or (is_tagged and text[begin.end() : start].strip()):
            raise UnreadableError("no JSON object behind <|python_tag|>", begin.end())
        calls: list[Message] = []
        while True:
            value, end = read_json(text, start)
            calls.append(call_of_json(value, end, arguments=("parameters", "arguments")))
            # Several calls in one turn, which the template has no form for, are written with semicolons.
            at = skip_space(text, end)
            start = skip_space(text, at + 1) if text.startswith(";", at) else -1
            if start < 0 or not text.startswith("{", start):
                return calls, end

    def read(self, text: str, schemas: Schemas, *, opens_thinking: bool = False) -> list[Piece]:
        """Divide a response into its parts; see [`CallFormat`]."""
        written = "".join(text.split())
        if written and any(start.startswith(written) for start in _STARTS):
            return [Piece("malformed", text, problem=f"the JSON object is cut; {self.form}")]
        pieces = super().read(text, schemas, opens_thinking=opens_thinking)
        return [Piece("text", piece.text) if _is_answer(piece, schemas) else piece for piece in pieces]


def _is_answer(piece: Piece, schemas: Schemas) -> bool:
    if piece.kind != "malformed" or piece.text.lstrip().startswith(_TAG):
        return False
    try:
        value: object = read_json(piece.text, 0)[0]
    except UnreadableError:
        return False
    has_parameters = isinstance(value, dict) and ("parameters" in value or "arguments" in value)
    return isinstance(value, dict) and value.get("name") not in schemas and not has_parameters


LLAMA = LlamaFormat()
