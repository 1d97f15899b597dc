"""Token ids that a model wrote -> a message: which format reads a template's tool calls, and reading by it."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from ..compat.trl import add_response_schema, parse_response
from ..errors import ChatTemplateError
from ..types import JsonObject, Tokenizer, num_shared
from .formats import FORMATS, LLAMA, PLAIN, CallFormat, Piece
from .parsing import ParsedResponse, check_tool_calls, join_pieces, split_pieces, tool_call
from .templates import PROBE, USER, Template, name_of
from .tokenizing import WRITTEN, TextEncoder

_PROBE_ARGUMENTS = {"key": "a\\b 'c' \"d\"", "count": 2}  # the formats differ in how they write what is quoted
_PROBE_SCHEMA = {"properties": {"key": {"type": "string"}, "count": {"type": "integer"}}}

Parser = Callable[[Sequence[int], "Sequence[int] | None"], ParsedResponse]
"""Reads a response's ids, after those of its prompt."""


@dataclass(frozen=True)
class TurnEnds:
    """
    The tokens that end a response.

    Args:
        of_template (`tuple[int, ...]`):
            Those of the template: the end of a turn, then that of a turn of tool calls where it is another.
        others (`tuple[int, ...]`):
            Tokens that end a response besides.
    """

    of_template: tuple[int, ...]
    others: tuple[int, ...]

    @cached_property
    def all(self) -> tuple[int, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys([*self.of_template, *self.others]))

    @property
    def of_calls(self) -> int | None:
        """The end of a turn of tool calls where it is another than that of other turns."""
        return self.of_template[-1] if len(self.of_template) > 1 else None

    def ends_otherwise(self, ids: Sequence[int]) -> bool:
        """Whether a response was ended by a token that is not one of the template's."""
        return len(ids) > 0 and ids[-1] in self.all and ids[-1] not in self.of_template


class ResponseReader:
    """
    Reads responses as messages, by the format in which the template writes tool calls.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer. It stays as it is.
        template ([`Template`]):
            The chat template.
        encoder ([`TextEncoder`]):
            The tokenizer with that template.
        ends ([`TurnEnds`]):
            What ends a response.
        tools (`Sequence[dict]`):
            The JSON schemas of the tools.

    Raises:
        ChatTemplateError: `tools` are given and no parser knows the template's tool calls.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: Template,
        encoder: TextEncoder,
        ends: TurnEnds,
        tools: list[JsonObject],
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._encoder = encoder
        self._ends = ends
        self._tools = tools
        self._hidden_ids = _hidden_ids(tokenizer)
        self._framing_ids = lru_cache(maxsize=None)(
            lambda texts: frozenset(map(tokenizer.convert_tokens_to_ids, texts))
        )
        self._schemas = {
            function["name"]: function.get("parameters") or {}
            for function in (tool.get("function", tool) for tool in tools)
        }
        self._format = self._find_format()
        prompt = template.text([USER], generation_prompt=True)
        self.opens_thinking = self._format is not None and _opens_thought(self._format, prompt)
        """Whether the template's generation prompt has already begun a thought."""
        self._parser = self._find_parser() if self._format is None else None

    def decode(self, ids: Sequence[int]) -> str:
        """See [`ChatFormat.decode`]."""
        kept = ids[:-1] if self._ends.ends_otherwise(ids) else ids
        return self._decode([token_id for token_id in kept if token_id not in self._hidden_ids])

    def parse(
        self, response_ids: Sequence[int], prompt_ids: Sequence[int] | None = None, *, until: str | None = None
    ) -> ParsedResponse:
        """See [`ChatFormat.parse`]."""
        if self._format is None:
            assert self._parser is not None, "one of the two is there"
            ids = (
                response_ids if until is None else self._encoder.encode(self.decode(response_ids).partition(until)[0])
            )
            if self._ends.ends_otherwise(ids):  # the parsers know the template's end alone
                ids = [*ids[:-1], self._ends.of_template[0]]
            parsed = self._parser(ids, prompt_ids)
        else:
            parsed = join_pieces(self._read(self._format, response_ids, prompt_ids, until))
        is_call = len(response_ids) > 0 and response_ids[-1] == self._ends.of_calls
        if is_call and until is None and not parsed.malformed and "tool_calls" not in parsed.message:
            end = self._template.token_text(response_ids[-1])
            return ParsedResponse(parsed.message, (f"{end} ends a turn of tool calls, and there is none in it",))
        return parsed

    def split_thoughts(
        self, response_ids: Sequence[int], prompt_ids: Sequence[int] | None = None, *, until: str | None = None
    ) -> tuple[str, str]:
        """See [`ChatFormat.split_thoughts`]."""
        if self._format is not None:
            return split_pieces(self._read(self._format, response_ids, prompt_ids, until))
        parsed = self.parse(response_ids, prompt_ids, until=until)
        if parsed.malformed or "tool_calls" in parsed.message:
            text = self.decode(response_ids)
            return "", text if until is None else text.partition(until)[0]
        return parsed.message.get("reasoning_content", ""), parsed.message["content"]

    def _read(
        self, form: CallFormat, response_ids: Sequence[int], prompt_ids: Sequence[int] | None, until: str | None
    ) -> list[Piece]:
        opens_thinking = self.opens_thinking
        if prompt_ids is not None:  # as many ids as may have written the beginning of a thought
            tail = list(prompt_ids[-len(form.opens_thought.encode()) - 8 :])
            opens_thinking = _opens_thought(form, self._decode(tail))
        text = self._framed_text(form, response_ids)
        text = text if until is None else text.partition(until)[0]
        return form.read(text, self._schemas, opens_thinking=opens_thinking)

    def _framed_text(self, form: CallFormat, ids: Sequence[int]) -> str:
        """Text of token ids, with the special tokens that the format is made of."""
        framing = self._framing_ids(form.framing)
        visible = [token_id for token_id in ids if token_id in framing or token_id not in self._hidden_ids]
        if visible and visible[-1] in self._ends.all and visible[-1] not in framing:
            visible.pop()
        return self._decode(visible)

    def _decode(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    # -- formats and parsers ------------------------------------------------------------------------------------------

    def _find_format(self) -> CallFormat | None:
        """The format that reads a tool call as the template writes it; `None` where TRL's parser has to."""
        call = tool_call(PROBE, _PROBE_ARGUMENTS)
        schemas = {PROBE: _PROBE_SCHEMA}
        try:
            prompt = self._template.text([USER], generation_prompt=True)
            text = self._template.text([USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
        except Exception as error:  # a template without tool calls
            self._call_error = f"{type(error).__name__}: {error}"
            return PLAIN if not self._tools else None
        self._call_error = ""
        prompt = _common_start(prompt, text)
        response_ids = self._encoder.encode(text[len(prompt) :])
        for form in FORMATS:
            text = self._framed_text(form, response_ids)
            pieces = form.read(text, schemas, opens_thinking=_opens_thought(form, prompt))
            message = join_pieces(pieces).message
            functions = [read_call["function"] for read_call in message.get("tool_calls", ())]
            # Llama's has no delimiters: what stands before a call in it belongs to another form.
            if functions == [call["function"]] and (form is not LLAMA or not message["content"]):
                return form
        return PLAIN if not self._tools and not _has_response_format(self._tokenizer) else None

    def _find_parser(self) -> Parser:
        tokenizer = copy.copy(self._tokenizer)  # the schema is set on the copy, the user's tokenizer stays as it is
        if not _has_response_format(tokenizer):
            try:
                add_response_schema(tokenizer)
            except ValueError as error:
                if self._tools:
                    raised = f" The template fails to render one ({self._call_error})." if self._call_error else ""
                    raise ChatTemplateError(
                        f"the tool calls of the chat template of {name_of(tokenizer)} cannot be parsed: they are "
                        f"written in no form that is known here or to TRL.{raised} Set `tokenizer.response_template`, "
                        'or use a template that writes <tool_call>{"name": ..., "arguments": {...}}</tool_call>'
                    ) from error
                return lambda response_ids, prompt_ids: ParsedResponse(
                    {"role": "assistant", "content": self.decode(response_ids)}
                )
        return lambda response_ids, prompt_ids: self._parse_with_trl(tokenizer, response_ids, prompt_ids)

    def _parse_with_trl(
        self, tokenizer: Tokenizer, response_ids: Sequence[int], prompt_ids: Sequence[int] | None
    ) -> ParsedResponse:
        parsed = parse_response(tokenizer, response_ids, prefix=prompt_ids, tools=self._tools)
        message = {"role": "assistant", **parsed}
        thought = message.pop("thinking", None)
        if thought and not message.get("reasoning_content"):
            message["reasoning_content"] = thought
        parsed_calls = message.pop("tool_calls", None) or []
        calls, malformed = check_tool_calls(parsed_calls, self._schemas)
        if calls:
            message["tool_calls"] = calls
        if malformed and not message["content"]:
            message["content"] = self.decode(response_ids)
        elif not parsed_calls and _opens_tool_call(tokenizer, message["content"]):
            malformed = ["it cannot be read"]  # TRL returns such a response as plain text
        return ParsedResponse(message, tuple(malformed))


def _hidden_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """The special tokens that text is shown without."""
    decoder = tokenizer.added_tokens_decoder
    special = {token_id for token_id, token in decoder.items() if token.special}
    framing = {token_id for token_id, token in decoder.items() if token.content in WRITTEN}
    return frozenset((special | set(tokenizer.all_special_ids)) - framing)


def _has_response_format(tokenizer: Tokenizer) -> bool:
    return any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))


def _opens_tool_call(tokenizer: Tokenizer, text: str) -> bool:
    template = getattr(tokenizer, "response_template", None)
    if not isinstance(template, Mapping):
        return False
    field = template.get("fields", {}).get("tool_calls", {})
    pattern = field.get("open_pattern") or re.escape(field.get("open", ""))
    return bool(pattern) and re.search(pattern, text) is not None


def _opens_thought(form: CallFormat, prompt: str) -> bool:
    return prompt.rstrip().endswith(form.opens_thought.rstrip())


def _common_start(prompt: str, text: str) -> str:
    """What two texts begin with, without a tag that only one of them goes on with."""
    common = prompt[: num_shared(prompt, text)]
    return common if common.rfind(">") >= common.rfind("<") else common[: common.rindex("<")]
