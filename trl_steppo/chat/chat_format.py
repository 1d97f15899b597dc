"""Messages <-> token ids. A conversation only ever grows: what was sampled is never rendered or tokenized again.

```
prompt ids      = render(messages)                                       the whole template, once per episode
next prompt ids = prompt ids + response ids + close(response ids) + append(observation messages)
```

`append` renders the new messages behind a two-message dummy conversation and keeps what follows the dummy's end of
turn, so its cost does not depend on how long the history is. That is only right for templates that render earlier
messages the same way whatever follows them; construction checks it.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import Any

from ..compat.trl import add_response_schema, parse_response, training_chat_template
from ..errors import ChatTemplateError
from ..types import num_shared, writable
from .formats import FORMATS, LLAMA, PLAIN, CallFormat, Piece
from .parsing import Message, ParsedResponse, check_tool_calls, join_pieces, split_pieces, tool_call
from .tokenizing import THINKING, WRITTEN, Guarded, TextEncoder, characters_per_token

_PROBE = "probe_7d1f"  # appears in no template, so that its position in a rendering is known
_USER: Message = {"role": "user", "content": "dummy"}
_THOUGHT = f"<think>\nthought\n</think>\n\n{_PROBE}"  # templates that drop earlier thinking have to be found out
_FOLLOW_UP: dict[str, Message] = {
    "user": {"role": "user", "content": _PROBE},
    "tool": {"role": "tool", "name": _PROBE, "content": _PROBE},
}
_TOOLS_IN_TEXT = """\
{%- set text = namespace(messages=[], tools='') -%}
{%- if tools -%}
{%- set text.tools = 'Tools, as JSON schemas:' -%}
{%- for tool in tools -%}{%- set text.tools = text.tools + '\\n' + (tool | tojson) -%}{%- endfor -%}
{%- set text.tools = text.tools + '\\n\\nTo call a tool, write its name and arguments as JSON, like this:' -%}
{%- for tool in tools -%}
{%- set text.tools = text.tools + '\\n<tool_call>\\n{"name": ' + (tool.function.name | tojson) + ', "arguments": {' -%}
{%- for name in tool.function.parameters.properties -%}
{%- set text.tools = text.tools + (name | tojson) + ': ...' + ('' if loop.last else ', ') -%}
{%- endfor -%}
{%- set text.tools = text.tools + '}}\\n</tool_call>' -%}
{%- endfor -%}
{%- if messages[0].role != 'system' -%}
{%- set text.messages = [{'role': 'system', 'content': text.tools}] -%}
{%- endif -%}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' and loop.first and text.tools -%}
{%- set text.messages = [{'role': 'system', 'content': message.content + '\\n\\n' + text.tools}] -%}
{%- elif message.role == 'tool' -%}
{%- set answer = '<tool_response>\\n' + message.content + '\\n</tool_response>' -%}
{%- if loop.previtem is defined and loop.previtem.role == 'tool' -%}
{%- set answer = text.messages[-1].content + '\\n' + answer -%}
{%- set text.messages = text.messages[:-1] -%}
{%- endif -%}
{%- set text.messages = text.messages + [{'role': 'user', 'content': answer}] -%}
{%- elif message.tool_calls -%}
{%- set calls = namespace(text=message.content or '') -%}
{%- for call in message.tool_calls -%}
{%- set calls.text = calls.text + ('\\n' if calls.text else '') + '<tool_call>\\n{"name": '
  + (call.function.name | tojson) + ', "arguments": ' + (call.function.arguments | tojson) + '}\\n</tool_call>' -%}
{%- endfor -%}
{%- set text.messages = text.messages + [{'role': message.role, 'content': calls.text}] -%}
{%- else -%}
{%- set text.messages = text.messages + [message] -%}
{%- endif -%}
{%- endfor -%}
{%- set messages = text.messages -%}
"""
"""Stands before a template that knows no tools: rewrites the messages into some without tools, calls and answers."""

_PROBE_ARGUMENTS = {"key": "a\\b 'c' \"d\"", "count": 2}  # the formats differ in how they write what is quoted
_PROBE_SCHEMA = {"properties": {"key": {"type": "string"}, "count": {"type": "integer"}}}

_FAILS_TO_RENDER = "it fails to render"
_LEAVES_OUT = {"user": "leaves out what was said", "tool": "leaves out tool calls or the tools' answers"}


def _reply(kind: str, name: str = _PROBE, content: str = "dummy") -> Message:
    """A dummy assistant turn of the kind that messages of role `kind` answer."""
    if kind == "tool":
        return {"role": "assistant", "content": "", "tool_calls": [tool_call(name, {})]}
    return {"role": "assistant", "content": content}


_Items = Sequence[tuple[str, Any]]

_MOST_KEPT_CHARS = 8192  # of an answer whose ids are kept: longer ones would take memory, and hardly come twice


class ChatFormat:
    """
    A tokenizer's chat template, used append-only.

    A template that renders earlier messages differently when later ones follow (Qwen3 drops earlier thinking) is
    replaced by TRL's training variant of it; the tokenizer itself is left as it is. A template that knows no tools is
    told in text: their schemas stand in the system message, calls in the response as Hermes writes them, answers in a
    user message.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
        tools (`Sequence[Callable | dict]`, *optional*):
            Tools to show in the prompt: functions with type hints and a docstring, or JSON schemas.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Passed on to the template, e.g. `{"enable_thinking": False}`.
        multi_turn (`bool`, *optional*, defaults to `True`):
            Whether anything will be appended. `False` takes any template that ends an assistant turn.
        end_token_ids (`Sequence[int]`, *optional*):
            Tokens that end a response beside those of the template, as the model's generation configuration names
            them ([`~models.end_token_ids`]). What such a token ended gets the template's own end in addition, as
            context for what follows.

    Raises:
        ChatTemplateError: the tokenizer has no chat template; the template cannot be appended to and TRL has no
            training variant; it does not end an assistant turn with a token of its own; or `tools` are given and
            nobody knows how to parse its tool calls.

    Example:
    ```python
    >>> chat = ChatFormat(tokenizer)
    >>> prompt_ids = chat.render([{"role": "user", "content": "What is 2 + 2?"}])
    >>> next_prompt_ids = prompt_ids + response_ids + chat.append([{"role": "user", "content": "Are you sure?"}])
    ```
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        tools: Sequence[Callable[..., Any] | dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        multi_turn: bool = True,
        end_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._multi_turn = multi_turn or bool(tools)
        self.tools = [tool if isinstance(tool, dict) else _json_schema(tool) for tool in tools or ()]
        self._template_kwargs = dict(chat_template_kwargs or {})
        self._added_ids = frozenset(tokenizer.get_added_vocab().values()) | frozenset(tokenizer.all_special_ids)
        self._hidden_ids = self._find_hidden_ids()
        self._encoder = TextEncoder(tokenizer)  # for the template's own text, while it is looked at
        self.template = self._choose_template()
        self._encoder = TextEncoder(tokenizer, self.template)
        self._encoder.warm_up()
        kinds = ("user", "tool") if self.tools else ("user",)
        ends = [self._find_end_of_turn(self.template, kind) for kind in kinds]
        self.end_of_turn_id: int = ends[0]
        """The token that ends an assistant turn; not always the tokenizer's `eos_token_id`."""
        self._turn_ends = tuple(dict.fromkeys(ends))
        self.stop_token_ids: tuple[int, ...] = tuple(dict.fromkeys([*ends, *end_token_ids]))
        """`end_of_turn_id`, the token that ends a turn of tool calls where it is another, and `end_token_ids`."""
        self._call_end_id = ends[-1] if ends[-1] != ends[0] else None
        self._framing_ids = lru_cache(maxsize=None)(
            lambda texts: frozenset(map(tokenizer.convert_tokens_to_ids, texts))
        )
        self._head = lru_cache(maxsize=256)(self._render_head)  # keyed by tool names, which the model may invent
        self._appended = lru_cache(maxsize=256)(self._render_appended)  # many episodes see the same answer
        self._schemas = {
            function["name"]: function.get("parameters") or {}
            for function in (tool.get("function", tool) for tool in self.tools)
        }
        self._format = self._find_format()
        prompt = self._text([_USER], generation_prompt=True)
        self._opens_thinking = self._format is not None and _opens_thought(self._format, prompt)
        self._parser = self._find_parser() if self._format is None else None

    # -- messages -> ids ----------------------------------------------------------------------------------------------

    def render(self, messages: Sequence[Message]) -> list[int]:
        """
        The prompt for a conversation: tools first, generation prompt last. Only the template writes control tokens:
        where a message or a tool spells one, it is tokenized as the characters that it is.
        """
        guarded = self._guard(messages, **({} if self._tools_are_harmless else {"tools": self.tools}))
        tools = guarded.value.get("tools", self.tools)
        text = self._text(guarded.value["messages"], tools=tools, generation_prompt=True)
        return self._encoder.encode(text, guarded)

    def prepare(
        self, prompt: str | Sequence[Message], extra: str | None = None, *, is_observed: bool = False
    ) -> list[int]:
        """
        The first prompt of an episode.

        Args:
            prompt (`str` or `Sequence[dict]`):
                Plain text, or messages. Control tokens that are written in plain text are what they say.
            extra (`str`, *optional*):
                What the environment's `reset` returned: goes to the end of the last user message (of the text), as
                in TRL without a separator. Control tokens in it are tokenized as the characters that they are.
            is_observed (`bool`, *optional*, defaults to `False`):
                Whether the prompt was made by the environment of what it observed: then that holds for all of it.
        """
        if not isinstance(prompt, str):
            return self.render(extended(prompt, extra) if extra else prompt)
        return self.encode_text(prompt, extra or "", is_observed=is_observed)

    def encode_text(
        self, text: str, extra: str = "", *, add_special_tokens: bool = True, is_observed: bool = False
    ) -> list[int]:
        """
        Ids of plain text, tokenized as the tokenizer does by itself (with a BOS where it adds one and the text does
        not begin with it).

        Args:
            text (`str`):
                The text. Control tokens in it are what they say.
            extra (`str`, *optional*):
                What follows it; control tokens in it are tokenized as the characters that they are.
            add_special_tokens (`bool`, *optional*, defaults to `True`):
                Whether the tokenizer adds what it adds by itself.
            is_observed (`bool`, *optional*, defaults to `False`):
                Whether all of the text is treated like `extra`.
        """
        text, extra = ("", text + extra) if is_observed else (writable(text), extra)
        guarded = self._encoder.guard(extra) if extra else None
        whole = text if guarded is None else text + guarded.value
        ids = self._encoder.encode(whole, guarded, add_special_tokens=add_special_tokens)
        bos, bos_id = self._tokenizer.bos_token, self._tokenizer.bos_token_id
        is_doubled = add_special_tokens and bos and text.startswith(bos) and ids[:2] == [bos_id, bos_id]
        return ids[1:] if is_doubled else ids

    def count_control_tokens(self, shown: Any) -> int:
        """How many control tokens a text, messages or any nested value of texts spells, which are shown as text."""
        return self._encoder.count(shown)

    def append(self, observation_messages: Sequence[Message], *, tool_call_names: Sequence[str] = ()) -> list[int]:
        """
        The ids that follow a finished assistant turn, that is, its end-of-turn token: whatever the template puts
        between turns, the new messages, the generation prompt.

        Args:
            observation_messages (`Sequence[dict]`):
                The environment's answer, of role `tool` or `user`.
            tool_call_names (`Sequence[str]`, *optional*):
                Names of the tools that the turn called; some templates repeat them in the answer's header.

        Raises:
            ChatTemplateError: the template renders the turn before these messages differently because of them.
        """
        messages = tuple(tuple(message.items()) for message in observation_messages)
        values = [value for message in messages for _, value in message]
        is_kept = all(type(value) is str for value in values) and sum(map(len, values)) <= _MOST_KEPT_CHARS
        return list((self._appended if is_kept else self._render_appended)(messages, tuple(tool_call_names[:1])))

    def _render_appended(self, observation_messages: Sequence[_Items], names: Sequence[str]) -> tuple[int, ...]:
        """See [`append`]; messages as their items, and at most one name."""
        messages = [dict(message) for message in observation_messages]
        kind = "tool" if messages and messages[0].get("role") == "tool" else "user"
        # One call is enough for the header, and some templates refuse several in one turn.
        guarded = self._guard(messages, name=names[0] if kind == "tool" and names else _PROBE)
        dummy, head = (self._head if guarded.mark is None else self._render_head)(kind, guarded.value["name"])
        text = self._text([*dummy, *guarded.value["messages"]], generation_prompt=True)
        if not text.startswith(head):
            raise ChatTemplateError(guarded.unmarked(self._difference(head, text, f"{kind} messages")))
        return tuple(self._encode_after_turn(text[len(head) :], kind, guarded))

    def close(self, response_ids: Sequence[int]) -> list[int]:
        """
        The end-of-turn token that a response lacks which was cut by length, or ended by another token than the
        template's: context for what follows, not an action.
        """
        return [] if len(response_ids) and response_ids[-1] in self._turn_ends else [self.end_of_turn_id]

    def _ends_otherwise(self, ids: Sequence[int]) -> bool:
        """Whether a response was ended by a token that is none of the template's."""
        return len(ids) > 0 and ids[-1] in self.stop_token_ids and ids[-1] not in self._turn_ends

    def min_tokens(self, shown: str | Sequence[Message]) -> int:
        """
        A lower bound on the number of tokens of a text, or of messages once they are rendered. It is found from the
        number of characters, thousands of times faster than by tokenizing: what cannot fit needs no tokenizing.

        Args:
            shown (`str` or `Sequence[dict]`):
                The text, or the messages. Those of the assistant count as nothing, as templates leave parts of them
                out.

        Returns:
            `int`: The bound; 0 where the tokenizer allows none, as one with a token for any unknown word.
        """
        texts = [shown] if isinstance(shown, str) else [text for message in shown for text in _shown_texts(message)]
        return math.ceil(sum(map(len, texts)) / characters_per_token(self._tokenizer))

    # -- ids -> messages ----------------------------------------------------------------------------------------------

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens (those that frame a tool call stay)."""
        kept = ids[:-1] if self._ends_otherwise(ids) else ids
        visible = [token_id for token_id in kept if token_id not in self._hidden_ids]
        return self._tokenizer.decode(visible, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def parse(
        self,
        response_ids: Sequence[int],
        prompt_ids: Sequence[int] | None = None,
        *,
        until: str | None = None,
    ) -> ParsedResponse:
        """
        Read a response as a message.

        It is read by the first of [`~chat.formats.FORMATS`] that reads what the template writes. A value that a format
        writes without quotes is read as what the tool's schema declares. Any other form goes through
        `trl.chat_template_utils`, which needs the tokenizer's `response_template` (or `response_schema`), or a
        template that TRL knows.

        A response that holds the beginning of a tool call and no whole one is malformed. So is one that ends with the
        token that ends a turn of tool calls and holds none.

        Args:
            response_ids (`Sequence[int]`):
                The sampled ids.
            prompt_ids (`Sequence[int]`, *optional*):
                What they continue: it may have begun a thought. `None`: the template's own prompt.
            until (`str`, *optional*):
                A text that ended the response; it and what follows are left out.
        """
        if self._format is None:
            assert self._parser is not None, "one of the two is there"
            ids = (
                response_ids if until is None else self._encoder.encode(self.decode(response_ids).partition(until)[0])
            )
            if self._ends_otherwise(ids):  # the parsers know the template's end alone
                ids = [*ids[:-1], self.end_of_turn_id]
            parsed = self._parser(ids, prompt_ids)
        else:
            parsed = join_pieces(self._read(self._format, response_ids, prompt_ids, until))
        is_call = len(response_ids) > 0 and response_ids[-1] == self._call_end_id
        if is_call and until is None and not parsed.malformed and "tool_calls" not in parsed.message:
            end = self._token_text(response_ids[-1])
            return ParsedResponse(parsed.message, (f"{end} ends a turn of tool calls, and there is none in it",))
        return parsed

    def split_thoughts(
        self,
        response_ids: Sequence[int],
        prompt_ids: Sequence[int] | None = None,
        *,
        until: str | None = None,
    ) -> tuple[str, str]:
        """
        What a response thought, and what it said. Tool calls count as text. The arguments are those of `parse`.
        """
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
        opens_thinking = self._opens_thinking
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
        if visible and visible[-1] in self.stop_token_ids and visible[-1] not in framing:
            visible.pop()
        return self._decode(visible)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    # -- the template -------------------------------------------------------------------------------------------------

    def _text(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool = False,
        tools: Sequence[dict[str, Any]] = (),
        template: str | None = None,
    ) -> str:
        def apply(some: Sequence[Message]) -> str:
            return self._tokenizer.apply_chat_template(
                list(some),
                tools=list(tools) or None,
                chat_template=template or self.template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self._template_kwargs,
            )

        try:
            return apply(messages)
        except Exception as error:  # whatever jinja code raises
            identified = _with_call_ids(messages)
            if identified == list(messages):
                raise
            try:
                return apply(identified)  # some templates demand ids of tool calls
            except Exception:
                raise error from None

    def _guard(self, messages: Sequence[Message], **more: Any) -> Guarded:
        """Messages, and what else is shown with them, as data."""
        shown = [self._in_text(_without_nulls(message)) for message in messages]
        if any(message.get("tool_calls") for message in shown) and self._quotes_arguments:
            shown = [_with_objects_as_arguments(message) for message in shown]
        split = [_split_thought(message, self._opens_thinking) for message in shown]
        data = {"messages": [message for message, _, _ in split], "thoughts": [inside for _, _, inside in split]}
        guarded = self._encoder.guard({**data, **more})
        parts = zip(guarded.value["messages"], split, guarded.value["thoughts"], strict=True)
        joined = [_join_thought(message, opening, inside) for message, (_, opening, _), inside in parts]
        return replace(guarded, value={**guarded.value, "messages": joined})

    def _in_text(self, message: Message) -> Message:
        """A message whose content is a list, as text: always of a tool; else where the template reads no blocks."""
        content = message.get("content")
        if not isinstance(content, list | tuple) or (message.get("role") != "tool" and self._reads_blocks):
            return message
        return {**message, "content": _text_of(content)}

    @cached_property
    def _reads_blocks(self) -> bool:
        """Whether the template shows a content in blocks as the text of these."""
        blocks = [{"type": "text", "text": _PROBE}, {"type": "text", "text": _PROBE}]
        try:
            return _PROBE * 2 in self._text([{"role": "user", "content": blocks}])
        except Exception:  # it wants text
            return False

    @cached_property
    def _tools_are_harmless(self) -> bool:
        """Whether no text of the tools, which are the same for every prompt, has to be guarded."""
        return self._encoder.guard(self.tools).value is self.tools

    @cached_property
    def _quotes_arguments(self) -> bool:
        """Whether the template shows arguments that are a JSON string as a string, in quotes, and not as an object."""
        call = {"type": "function", "function": {"name": _PROBE, "arguments": '{"key": "value"}'}}
        try:
            return '\\"key\\"' in self._text([_USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
        except Exception:  # it wants objects
            return True

    def _encode_after_turn(self, text: str, kind: str, guarded: Guarded) -> list[int]:
        # The end-of-turn token goes in front and comes off again: some tokenizers treat the start of a text specially.
        end_id = self._turn_ends[-1] if kind == "tool" else self.end_of_turn_id
        ids = self._encoder.encode(self._token_text(end_id) + text, guarded)
        assert ids[0] == end_id, "an end-of-turn token always stands alone"
        return ids[1:]

    def _token_text(self, token_id: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(token_id)

    def _find_hidden_ids(self) -> frozenset[int]:
        decoder = self._tokenizer.added_tokens_decoder
        special = {token_id for token_id, token in decoder.items() if token.special}
        framing = {token_id for token_id, token in decoder.items() if token.content in WRITTEN}
        return frozenset((special | set(self._tokenizer.all_special_ids)) - framing)

    def _choose_template(self) -> str:
        if not self._tokenizer.chat_template:
            raise ChatTemplateError(
                f"the tokenizer {self._name()} has no chat template; set `tokenizer.chat_template`, or give rows with "
                "`input_ids` instead of `prompt`"
            )
        template = self._tokenizer.get_chat_template(None, self.tools or None)
        if not self._multi_turn:
            return template
        own = self._telling_tools(template)
        # Tools are answered by tool messages: better if user messages can follow as well, but they need not.
        for kinds in (("tool", "user"), ("tool",)) if self.tools else (("user",),):
            if self._takes(own, kinds):
                return own
            training = self._training_template()  # which loads TRL, so it comes second
            if training is not None and self._takes(self._telling_tools(training), kinds):
                return self._telling_tools(training)
        problem = self._find_problem(own, "tool" if self.tools else "user") or ""
        raises = problem.startswith(_FAILS_TO_RENDER)
        cure = "takes such messages" if raises else "renders each message the same way whatever follows it"
        raise ChatTemplateError(
            f"the chat template of {self._name()} cannot be used for multi-turn training, and TRL has no training "
            f"variant of it that can: {problem}. Set `tokenizer.chat_template` to one that {cure}"
        )

    def _telling_tools(self, template: str) -> str:
        return template if self._shows_tools(template) else _TOOLS_IN_TEXT + template

    def _takes(self, template: str, kinds: Sequence[str]) -> bool:
        return not any(self._find_problem(template, kind) for kind in kinds)

    def _shows_tools(self, template: str) -> bool:
        """Whether the tools make a difference to a prompt, where there are any."""
        messages = [{"role": "system", "content": "dummy"}, _USER]  # some show them only in a system message
        try:
            bare = self._text(messages, template=template)
            return not self.tools or self._text(messages, tools=self.tools, template=template) != bare
        except Exception:  # whatever jinja code raises: a template that refuses a system message has no place for them
            return True

    def _training_template(self) -> str | None:
        try:
            return training_chat_template(self._tokenizer)
        except Exception:  # unknown to TRL, or it fails to render TRL's own probes
            return None

    def _find_problem(self, template: str, kind: str) -> str | None:
        """Why messages of role `kind` cannot be appended with this template; `None` where they can."""
        replies = [_reply(kind)] if kind == "tool" else [_reply(kind), _reply(kind, content=_THOUGHT)]
        try:
            return next(filter(None, (self._problem_after(template, reply, kind) for reply in replies)), None)
        except ChatTemplateError as error:
            return str(error).replace(f"the chat template of {self._name()}", "it")
        except Exception as error:  # whatever jinja code raises
            return f"{_FAILS_TO_RENDER} {kind} messages ({type(error).__name__}: {error})"

    def _problem_after(self, template: str, reply: Message, kind: str) -> str | None:
        head = self._cut_head(template, [_USER, reply], kind, self.tools)
        messages = [_USER, reply, _FOLLOW_UP[kind]]
        full = self._text(messages, generation_prompt=True, tools=self.tools, template=template)
        if not full.startswith(head):
            return self._difference(head, full, f"{kind} messages")
        if _PROBE not in full[len(head) :] or (kind == "tool" and _PROBE not in head):
            return f"it {_LEAVES_OUT[kind]}"
        # `append` leaves the tools out of its dummy conversation; that must make no difference behind the turn.
        bare_head = self._cut_head(template, [_USER, reply], kind, ())
        bare_tail = self._text(messages, generation_prompt=True, template=template)[len(bare_head) :]
        if full[len(head) :] != bare_tail:
            return f"what it writes after a turn depends on the tools in the prompt: {bare_tail!r}"
        return None

    def _render_head(self, kind: str, name: str) -> tuple[list[Message], str]:
        """A dummy conversation that messages of role `kind` can follow, and its text up to the end of the turn."""
        dummy = [_USER, _reply(kind, name)]
        return dummy, self._cut_head(self.template, dummy, kind, ())

    def _cut_head(self, template: str, messages: Sequence[Message], kind: str, tools: Sequence[dict[str, Any]]) -> str:
        text = self._text(messages, tools=tools, template=template)
        end = self._token_text(self._find_end_of_turn(template, kind))
        return text[: text.rindex(end) + len(end)]

    def _find_end_of_turn(self, template: str, kind: str) -> int:
        text = self._text([_USER, _reply(kind, content=_PROBE)], template=template)
        if _PROBE not in text:
            raise ChatTemplateError(f"the chat template of {self._name()} {_LEAVES_OUT[kind]}")
        tail = self._encoder.encode(text[text.rindex(_PROBE) + len(_PROBE) :])
        tail = self._kept_when_followed(template, tail, kind)  # some end the whole conversation with one more token
        ends = [i for i in tail if i in self._added_ids and self._token_text(i) not in WRITTEN]
        if not ends:
            raise ChatTemplateError(
                f"the chat template of {self._name()} does not end an assistant turn with a special token; it ends "
                f"with {text[-40:]!r}, so a finished response could not be told from a cut one"
            )
        return ends[-1]

    def _kept_when_followed(self, template: str, tail: list[int], kind: str) -> list[int]:
        """What of the ids behind a reply is still there when it is answered; all of it if nothing is."""
        answer = _USER if kind == "user" else _FOLLOW_UP[kind]
        try:
            text = self._text([_USER, _reply(kind, content=_PROBE), answer], template=template)
        except Exception:  # a template for a single turn
            return tail
        followed = self._encoder.encode(text.partition(_PROBE)[2])
        return tail[: num_shared(tail, followed)] or tail

    def _difference(self, expected: str, found: str, what: str) -> str:
        at = num_shared(expected, found)
        start = max(0, at - 20)
        return (
            f"it renders an earlier turn differently when {what} follow: {expected[start : at + 60]!r} becomes "
            f"{found[start : at + 60]!r}"
        )

    def _name(self) -> str:
        return repr(self._tokenizer.name_or_path or type(self._tokenizer).__name__)

    # -- parsers ------------------------------------------------------------------------------------------------------

    def _find_format(self) -> CallFormat | None:
        """The format that reads a tool call as the template writes it; `None` where TRL's parser has to."""
        call = tool_call(_PROBE, _PROBE_ARGUMENTS)
        schemas = {_PROBE: _PROBE_SCHEMA}
        try:
            prompt = self._text([_USER], generation_prompt=True)
            text = self._text([_USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
        except Exception as error:  # a template without tool calls
            self._call_error = f"{type(error).__name__}: {error}"
            return PLAIN if not self.tools else None
        self._call_error = ""
        prompt = _common_start(prompt, text)
        response_ids = self._encoder.encode(text[len(prompt) :])
        for form in FORMATS:
            text = self._framed_text(form, response_ids)
            pieces = form.read(text, schemas, opens_thinking=_opens_thought(form, prompt))
            message = join_pieces(pieces).message
            read = [one["function"] for one in message.get("tool_calls", ())]
            # Llama's has no delimiters: what stands before a call in it belongs to another form.
            if read == [call["function"]] and (form is not LLAMA or not message["content"]):
                return form
        return PLAIN if not self.tools and not _has_response_format(self._tokenizer) else None

    def _find_parser(self) -> Callable[[Sequence[int], Sequence[int] | None], ParsedResponse]:
        tokenizer = copy.copy(self._tokenizer)  # the schema is set on the copy, the user's tokenizer stays as it is
        if not _has_response_format(tokenizer):
            try:
                add_response_schema(tokenizer)
            except ValueError as error:
                if self.tools:
                    raised = f" The template fails to render one ({self._call_error})." if self._call_error else ""
                    raise ChatTemplateError(
                        f"the tool calls of the chat template of {self._name()} cannot be parsed: they are written in "
                        f"no form that is known here or to TRL.{raised} Set `tokenizer.response_template`, or use a "
                        'template that writes <tool_call>{"name": ..., "arguments": {...}}</tool_call>'
                    ) from error
                return lambda response_ids, prompt_ids: ParsedResponse(
                    {"role": "assistant", "content": self.decode(response_ids)}
                )
        return lambda response_ids, prompt_ids: self._parse_with_trl(tokenizer, response_ids, prompt_ids)

    def _parse_with_trl(
        self, tokenizer: Any, response_ids: Sequence[int], prompt_ids: Sequence[int] | None
    ) -> ParsedResponse:
        parsed = parse_response(tokenizer, response_ids, prefix=prompt_ids, tools=self.tools)
        message = {"role": "assistant", **parsed}
        thought = message.pop("thinking", None)
        if thought and not message.get("reasoning_content"):
            message["reasoning_content"] = thought
        found = message.pop("tool_calls", None) or []
        calls, malformed = check_tool_calls(found, self._schemas)
        if calls:
            message["tool_calls"] = calls
        if malformed and not message["content"]:
            message["content"] = self.decode(response_ids)
        elif not found and _opens_tool_call(tokenizer, message["content"]):
            malformed = ["it cannot be read"]  # TRL returns such a response as plain text
        return ParsedResponse(message, tuple(malformed))


def _has_response_format(tokenizer: Any) -> bool:
    return any(getattr(tokenizer, name, None) is not None for name in ("response_template", "response_schema"))


def _opens_tool_call(tokenizer: Any, text: str) -> bool:
    template = getattr(tokenizer, "response_template", None)
    if not isinstance(template, Mapping):
        return False
    field = template.get("fields", {}).get("tool_calls", {})
    pattern = field.get("open_pattern") or re.escape(field.get("open", ""))
    return bool(pattern) and re.search(pattern, text) is not None


def _without_nulls(message: Message) -> Message:
    """A message without the keys that have no value, which some templates would show as `None`."""
    return {key: value for key, value in message.items() if value is not None}


def _with_objects_as_arguments(message: Message) -> Message:
    """A message whose tool calls have objects as arguments where they had them as JSON strings."""
    calls = message.get("tool_calls")
    return {**message, "tool_calls": list(map(_with_object, calls))} if isinstance(calls, list | tuple) else message


def _with_object(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_object(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


def _split_thought(message: Message, opens_thinking: bool) -> tuple[Message, str, str | None]:
    """
    An assistant's message without the thought that its text begins with, what opened that thought, and the thought.
    There the marks `<think>` and `</think>` are what they say, as templates look for them in the text.
    """
    content = message.get("content")
    if message.get("role") != "assistant" or not isinstance(content, str):
        return message, "", None
    thought, closing, answer = content.partition(THINKING[1])
    before, opening, inside = thought.partition(THINKING[0])
    if not closing or not (opens_thinking or opening) or (opening and before.strip()):
        return message, "", None
    return {**message, "content": answer}, before + opening if opening else "", inside if opening else thought


def _join_thought(message: Message, opening: str, inside: str | None) -> Message:
    return message if inside is None else {**message, "content": opening + inside + THINKING[1] + message["content"]}


def _text_of(content: Sequence[Any]) -> str:
    """A content that is a list: the texts of its blocks, as templates show them; of any other list, `str` of it."""
    if content and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        return "".join(str(part.get("text") or "") for part in content)
    return str(content)


def _shown_texts(message: Message) -> list[str]:
    """What of a message every template shows, without the white space that some take off at its ends."""
    if message.get("role") not in ("user", "tool"):
        return []
    content = message.get("content")
    if message["role"] == "tool" and isinstance(content, list | tuple):
        return [_text_of(content).strip()]
    parts = content if isinstance(content, list) else [{"text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict)]
    return [text.strip() for text in texts if isinstance(text, str)]


def extended(messages: Sequence[Message], extra: str) -> list[Message]:
    """The messages with `extra` at the end of the last user message; the row's own messages stay untouched."""
    index = next((i for i in reversed(range(len(messages))) if messages[i]["role"] == "user"), None)
    if index is None:
        return [*messages, {"role": "user", "content": extra}]
    content = messages[index].get("content") or ""
    longer = content + extra if isinstance(content, str) else [*content, {"type": "text", "text": extra}]
    return [*messages[:index], {**messages[index], "content": longer}, *messages[index + 1 :]]


def _json_schema(tool: Callable[..., Any]) -> dict[str, Any]:
    from transformers.utils import get_json_schema

    return get_json_schema(tool)


def _with_call_ids(messages: Sequence[Message]) -> list[Message]:
    """
    The messages with an id of nine digits for every tool call that has none of that form, and for its answer.

    The ids count the calls of one turn, so that a turn is rendered in the same way wherever it stands.
    """
    identified: list[Message] = []
    ids: list[str] = []
    renamed: dict[Any, str] = {}
    answered = 0
    for message in messages:
        if message.get("tool_calls"):
            calls = list(enumerate(message["tool_calls"]))
            ids = [call["id"] if _is_call_id(call.get("id")) else f"{index:09d}" for index, call in calls]
            renamed = {call.get("id"): call_id for (_, call), call_id in zip(calls, ids, strict=True)}
            message = {**message, "tool_calls": [{**call, "id": ids[index]} for index, call in calls]}
            answered = 0
        elif message.get("role") == "tool":
            given = message.get("tool_call_id")
            in_order = ids[answered] if answered < len(ids) else f"{answered:09d}"
            if not _is_call_id(given):
                message = {**message, "tool_call_id": renamed.get(given, in_order) if given else in_order}
            answered += 1
        identified.append(message)
    return identified


def _is_call_id(call_id: Any) -> bool:
    return isinstance(call_id, str) and len(call_id) == 9 and call_id.isascii() and call_id.isalnum()


def _opens_thought(form: CallFormat, prompt: str) -> bool:
    return prompt.rstrip().endswith(form.opens_thought.rstrip())


def _common_start(prompt: str, text: str) -> str:
    """What two texts begin with, without a tag that only one of them goes on with."""
    common = prompt[: num_shared(prompt, text)]
    return common if common.rfind(">") >= common.rfind("<") else common[: common.rindex("<")]
