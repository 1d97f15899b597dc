"""A tokenizer's chat template: messages -> text, and which templates later messages can be appended to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from ..compat.trl import training_chat_template
from ..errors import ChatTemplateError
from ..types import JsonObject, Message, Tokenizer, num_shared
from .messages import with_call_ids
from .parsing import tool_call
from .tokenizing import WRITTEN

PROBE = "probe_7d1f"  # appears in no template, so that its position in a rendering is known
USER: Message = {"role": "user", "content": "dummy"}
_THOUGHT = f"<think>\nthought\n</think>\n\n{PROBE}"  # finds out templates that drop earlier thinking
_FOLLOW_UP: dict[str, Message] = {
    "user": {"role": "user", "content": PROBE},
    "tool": {"role": "tool", "name": PROBE, "content": PROBE},
}
_FAILS_TO_RENDER = "it fails to render"
_LEAVES_OUT = {"user": "leaves out what was said", "tool": "leaves out tool calls or the tools' answers"}

TOOLS_IN_TEXT = Path(__file__).with_name("tools_in_text.jinja").read_text(encoding="utf-8")
"""Stands before a template that knows no tools: rewrites the messages into some without tools, calls and answers."""


class Template:
    """
    A chat template with its arguments.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The tokenizer that renders it.
        source (`str`):
            The template, in jinja.
        arguments (`Mapping[str, object]`):
            Passed on to the template.
    """

    def __init__(self, tokenizer: Tokenizer, source: str, arguments: Mapping[str, Any]) -> None:
        self.source = source
        self._tokenizer = tokenizer
        self._arguments = arguments

    def text(
        self, messages: Sequence[Message], *, generation_prompt: bool = False, tools: Sequence[JsonObject] = ()
    ) -> str:
        """Render messages. Tool calls get ids where the template demands them."""

        def apply(some: Sequence[Message]) -> str:
            rendered = self._tokenizer.apply_chat_template(
                list(some),
                tools=list(tools) or None,
                chat_template=self.source,
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **self._arguments,
            )
            assert isinstance(rendered, str)
            return rendered

        try:
            return apply(messages)
        except Exception as error:  # whatever jinja code raises
            identified = with_call_ids(messages)
            if identified == list(messages):
                raise
            try:
                return apply(identified)
            except Exception:
                raise error from None

    def telling_tools(self, tools: Sequence[JsonObject]) -> Template:
        """This template where it shows tools; else one that tells of them in text."""
        if self._shows_tools(tools):
            return self
        return Template(self._tokenizer, TOOLS_IN_TEXT + self.source, self._arguments)

    def _shows_tools(self, tools: Sequence[JsonObject]) -> bool:
        """Whether the tools make a difference to a prompt, where there are any."""
        messages = [{"role": "system", "content": "dummy"}, USER]  # some show them only in a system message
        try:
            bare = self.text(messages)
            return not tools or self.text(messages, tools=tools) != bare
        except Exception:  # whatever jinja code raises: a template that refuses a system message has no place for them
            return True

    @cached_property
    def reads_blocks(self) -> bool:
        """Whether the template shows a content in blocks as the text of these."""
        blocks = [{"type": "text", "text": PROBE}, {"type": "text", "text": PROBE}]
        try:
            return PROBE * 2 in self.text([{"role": "user", "content": blocks}])
        except Exception:  # it wants text
            return False

    @cached_property
    def quotes_arguments(self) -> bool:
        """Whether the template shows arguments that are a JSON string as a string, in quotes, and not as an object."""
        call = {"type": "function", "function": {"name": PROBE, "arguments": '{"key": "value"}'}}
        try:
            return '\\"key\\"' in self.text([USER, {"role": "assistant", "content": "", "tool_calls": [call]}])
        except Exception:  # it wants objects
            return True

    # -- where a turn ends --------------------------------------------------------------------------------------------

    def end_of_turn(self, kind: str) -> int:
        """
        The token that ends an assistant turn which messages of role `kind` answer.

        Raises:
            ChatTemplateError: the template leaves the turn out, or ends it with no special token.
        """
        text = self.text([USER, _reply(kind, content=PROBE)])
        if PROBE not in text:
            raise ChatTemplateError(f"the chat template of {name_of(self._tokenizer)} {_LEAVES_OUT[kind]}")
        tail = self._encode(text[text.rindex(PROBE) + len(PROBE) :])
        tail = self._kept_when_followed(tail, kind)  # some end the whole conversation with one more token
        ends = [i for i in tail if i in self._added_ids and self.token_text(i) not in WRITTEN]
        if not ends:
            raise ChatTemplateError(
                f"the chat template of {name_of(self._tokenizer)} does not end an assistant turn with a special "
                f"token; it ends with {text[-40:]!r}, so a finished response could not be told from a cut one"
            )
        return ends[-1]

    def token_text(self, token_id: int) -> str:
        """The text of one token."""
        text = self._tokenizer.convert_ids_to_tokens(token_id)
        assert isinstance(text, str)
        return text

    @cached_property
    def _added_ids(self) -> frozenset[int]:
        return frozenset(self._tokenizer.get_added_vocab().values()) | frozenset(self._tokenizer.all_special_ids)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _kept_when_followed(self, tail: list[int], kind: str) -> list[int]:
        """The ids after a reply that are still there when it is answered; all of them if none is."""
        answer = USER if kind == "user" else _FOLLOW_UP[kind]
        try:
            text = self.text([USER, _reply(kind, content=PROBE), answer])
        except Exception:  # a template for a single turn
            return tail
        followed = self._encode(text.partition(PROBE)[2])
        return tail[: num_shared(tail, followed)] or tail

    # -- appending ----------------------------------------------------------------------------------------------------

    def head(self, kind: str, name: str = PROBE) -> tuple[list[Message], str]:
        """A dummy conversation that messages of role `kind` can follow, and its text up to the end of the turn."""
        dummy = [USER, _reply(kind, name)]
        return dummy, self._cut_head(dummy, kind, ())

    def _cut_head(self, messages: Sequence[Message], kind: str, tools: Sequence[JsonObject]) -> str:
        text = self.text(messages, tools=tools)
        end = self.token_text(self.end_of_turn(kind))
        return text[: text.rindex(end) + len(end)]

    def takes(self, kinds: Sequence[str], tools: Sequence[JsonObject]) -> bool:
        """Whether messages of all these roles can be appended."""
        return not any(self.problem(kind, tools) for kind in kinds)

    def problem(self, kind: str, tools: Sequence[JsonObject]) -> str | None:
        """Why messages of role `kind` cannot be appended with this template; `None` where they can."""
        replies = [_reply(kind)] if kind == "tool" else [_reply(kind), _reply(kind, content=_THOUGHT)]
        try:
            return next(filter(None, (self._problem_after(reply, kind, tools) for reply in replies)), None)
        except ChatTemplateError as error:
            return str(error).replace(f"the chat template of {name_of(self._tokenizer)}", "it")
        except Exception as error:  # whatever jinja code raises
            return f"{_FAILS_TO_RENDER} {kind} messages ({type(error).__name__}: {error})"

    def _problem_after(self, reply: Message, kind: str, tools: Sequence[JsonObject]) -> str | None:
        head = self._cut_head([USER, reply], kind, tools)
        messages = [USER, reply, _FOLLOW_UP[kind]]
        full = self.text(messages, generation_prompt=True, tools=tools)
        if not full.startswith(head):
            return difference(head, full, f"{kind} messages")
        if PROBE not in full[len(head) :] or (kind == "tool" and PROBE not in head):
            return f"it {_LEAVES_OUT[kind]}"
        # `append` leaves the tools out of its dummy conversation; that must make no difference after the turn.
        bare_head = self._cut_head([USER, reply], kind, ())
        bare_tail = self.text(messages, generation_prompt=True)[len(bare_head) :]
        if full[len(head) :] != bare_tail:
            return f"what it writes after a turn depends on the tools in the prompt: {bare_tail!r}"
        return None


def choose_template(
    tokenizer: Tokenizer,
    tools: Sequence[JsonObject],
    arguments: Mapping[str, Any],
    *,
    multi_turn: bool,
) -> Template:
    """
    The tokenizer's own template, told of tools in text where it knows none; or TRL's training variant of it.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
        tools (`Sequence[dict]`):
            The JSON schemas of the tools.
        arguments (`Mapping[str, object]`):
            Passed on to the template.
        multi_turn (`bool`):
            Whether anything will be appended. `False` takes any template.

    Raises:
        ChatTemplateError: the tokenizer has no chat template, or none that can be appended to.
    """
    if not tokenizer.chat_template:
        raise ChatTemplateError(
            f"the tokenizer {name_of(tokenizer)} has no chat template; set `tokenizer.chat_template`, or give rows "
            "with `input_ids` instead of `prompt`"
        )
    template = Template(tokenizer, tokenizer.get_chat_template(None, list(tools) or None), arguments)
    if not multi_turn:
        return template
    own = template.telling_tools(tools)
    # Tools are answered by tool messages: better if user messages can follow as well, but they need not.
    for kinds in (("tool", "user"), ("tool",)) if tools else (("user",),):
        if own.takes(kinds, tools):
            return own
        source = _training_source(tokenizer)  # which loads TRL, so it comes second
        if source is None:
            continue
        training = Template(tokenizer, source, arguments).telling_tools(tools)
        if training.takes(kinds, tools):
            return training
    problem = own.problem("tool" if tools else "user", tools) or ""
    raises = problem.startswith(_FAILS_TO_RENDER)
    cure = "takes such messages" if raises else "renders each message the same way whatever follows it"
    raise ChatTemplateError(
        f"the chat template of {name_of(tokenizer)} cannot be used for multi-turn training, and TRL has no training "
        f"variant of it that can: {problem}. Set `tokenizer.chat_template` to one that {cure}"
    )


def _training_source(tokenizer: Tokenizer) -> str | None:
    try:
        return training_chat_template(tokenizer)
    except Exception:  # unknown to TRL, or it fails to render TRL's own probes
        return None


def name_of(tokenizer: Tokenizer) -> str:
    """What messages call a tokenizer."""
    return repr(tokenizer.name_or_path or type(tokenizer).__name__)


def difference(expected: str, text: str, what: str) -> str:
    """Where a text does not begin as expected, in words."""
    at = num_shared(expected, text)
    start = max(0, at - 20)
    return (
        f"it renders an earlier turn differently when {what} follow: {expected[start : at + 60]!r} becomes "
        f"{text[start : at + 60]!r}"
    )


def _reply(kind: str, name: str = PROBE, content: str = "dummy") -> Message:
    """A dummy assistant turn of the kind that messages of role `kind` answer."""
    if kind == "tool":
        return {"role": "assistant", "content": "", "tool_calls": [tool_call(name, {})]}
    return {"role": "assistant", "content": content}
