"""A request's place in what a session has recorded: kept ids stay as they are, only what is new is tokenized."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

from ..chat import ChatFormat
from ..episodes import Observation, as_observation
from ..errors import ChatTemplateError
from .conversation import (
    Message,
    ModelRequest,
    RequestError,
    context_error,
    prefix_keys,
    stops_at,
    text_keys,
    tools_key,
)
from .sessions import Session
from .work import INLINE_BYTES

_MOST_FORMATS = 64

History = Literal["first", "continued", "branch", "rewritten"]


@dataclass(frozen=True)
class Placement:
    """
    Where a request stands.

    Args:
        parent (`int`, *optional*):
            Position of the recorded step that it continues; `None`: of none.
        new_ids (`list[int]`):
            What follows that step's response; the whole prompt where there is none.
        observed (`str` or `list[dict]`):
            What the step was answered.
        history (`str`):
            `"first"` of its session; `"continued"`: it goes on from a response; `"branch"`: it starts anew, or from a
            response that others continue already; `"rewritten"`: it says that the model answered what it was asked by
            what was not recorded.
        key (`bytes`, *optional*):
            Of the conversation up to here; `None` where the prompt is no messages.
        chat ([`~chat.ChatFormat`]):
            How its messages are rendered.
        rewritten (`int`, *optional*):
            Position of the step whose response it says was another.
        escaped (`int`, *optional*, defaults to `0`):
            How many control tokens the messages spell that are new, which are shown as text.
    """

    parent: int | None
    new_ids: list[int]
    observed: Observation
    history: History
    key: bytes | None
    chat: ChatFormat
    rewritten: int | None = None
    escaped: int = 0


class ChatFormats:
    """
    A tokenizer's chat format for every set of tools. May be used by several threads.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            Tokenizer with a chat template.
        chat_template_kwargs (`Mapping[str, Any]`, *optional*):
            Passed on to the template.
        end_token_ids (`Sequence[int]`, *optional*):
            Tokens that end a response beside those of the template, as the model's generation configuration names
            them.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        end_token_ids: Sequence[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._end_token_ids = tuple(end_token_ids)
        self._template_kwargs = chat_template_kwargs
        self._formats: OrderedDict[bytes, ChatFormat] = OrderedDict()
        self._lock = threading.Lock()
        self.num_ids = len(tokenizer)

    def of(self, tools: Sequence[dict[str, Any]], *, key: bytes | None = None) -> ChatFormat:
        """The format that shows these tools, whose key may be known; a `RequestError` if the template cannot."""
        key = tools_key(tools) if key is None else key
        with self._lock:
            found = self._formats.get(key)
        if found is None:
            try:
                found = ChatFormat(
                    self._tokenizer,
                    tools=tools,
                    chat_template_kwargs=self._template_kwargs,
                    end_token_ids=self._end_token_ids,
                )
            except Exception as error:  # whatever jinja code raises about the client's tools
                raise RequestError(400, f"these tools cannot be shown: {error}", param="tools") from error
        with self._lock:
            self._formats[key] = found
            self._formats.move_to_end(key)
            if len(self._formats) > _MOST_FORMATS:
                self._formats.popitem(last=False)
        return found

    def knows(self, tools: Sequence[dict[str, Any]]) -> bool:
        """Whether [`of`] has these tools at hand, and does not have to try what the template makes of them."""
        with self._lock:
            return tools_key(tools) in self._formats

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)


Placing = Generator[Callable[[], Any], Any, Placement]


def place(request: ModelRequest, session: Session, formats: ChatFormats, context: int | None = None) -> Placement:
    """
    Find the longest recorded history that a request continues, and tokenize what it adds.

    Args:
        request ([`ModelRequest`]):
            What is asked.
        session ([`Session`]):
            What is recorded.
        formats ([`ChatFormats`]):
            Messages to ids.
        context (`int`, *optional*):
            Tokens that a prompt has to be shorter than: a text that is not, however it is tokenized, never is.

    Raises:
        RequestError: The messages cannot be rendered, or are too long.
    """
    placing, done = placing_of(request, session, formats, context), None
    while True:
        try:
            done = placing.send(done)()
        except StopIteration as end:
            return cast(Placement, end.value)


async def place_beside(
    request: ModelRequest,
    session: Session,
    formats: ChatFormats,
    context: int | None,
    run: Callable[[Callable[[], Any]], Awaitable[Any]],
) -> Placement:
    """[`place`], where `run` does what takes as long as the request is long: somewhere else, without the session."""
    placing, done = placing_of(request, session, formats, context), None
    while True:
        try:
            work = placing.send(done)
        except StopIteration as end:
            return cast(Placement, end.value)
        done = await run(work)


def placing_of(request: ModelRequest, session: Session, formats: ChatFormats, context: int | None) -> Placing:
    """
    The steps of [`place`]: gives out, as functions, what takes long and needs nothing that may change, and is sent
    what they return. What lies between looks at the session.
    """
    if request.messages is None:
        return (yield from _placing_text(request, session, formats, context))
    messages = request.messages

    def prepare() -> tuple[list[bytes], ChatFormat]:
        keys = prefix_keys(tools_key(request.tools), messages)
        return keys, formats.of(request.tools, key=keys[0])

    keys, chat = yield prepare
    known = (n for n in range(len(messages), 0, -1) if keys[n] in session.by_key)
    count = next(known, 0)
    parent = session.ending_with(keys[count], request.call_ids) if count else None
    added = list(messages[count:])
    answered = (keys[n] for n in range(len(messages) - 1, count - 1, -1) if messages[n]["role"] == "assistant")
    rewritten = next((session.by_asked_key[key] for key in answered if key in session.by_asked_key), None)
    response_ids = None if parent is None else session.steps[parent].response_ids
    kept = session.state_length(parent)

    def tokenize() -> tuple[bool, list[int], int]:
        try:
            if response_ids is not None:
                try:
                    _check_fits(request, kept, added, chat, context)
                    ids = chat.close(response_ids) + chat.append(added, tool_call_names=_tool_names(added))
                    return True, ids, chat.count_control_tokens(added)
                except ChatTemplateError:  # such messages change how those before them are rendered
                    pass
            _check_fits(request, 0, messages, chat, context)
            return False, chat.render(messages), chat.count_control_tokens(messages)
        except RequestError:
            raise
        except Exception as error:  # whatever jinja code raises
            raise RequestError(400, f"the messages cannot be rendered: {error}", param="messages") from error

    continues, new_ids, escaped = yield tokenize
    parent = parent if continues else None
    history = _history(session, parent, rewritten)
    return Placement(parent, new_ids, as_observation(added), history, keys[-1], chat, rewritten, escaped)


def _placing_text(request: ModelRequest, session: Session, formats: ChatFormats, context: int | None) -> Placing:
    prompt, lengths = request.prompt, frozenset(session.text_lengths)

    def prepare() -> tuple[ChatFormat, dict[int, bytes]]:
        return formats.of(()), text_keys(prompt, lengths) if isinstance(prompt, str) else {}

    chat, keys = yield prepare
    if isinstance(prompt, tuple):
        if max(prompt) >= formats.num_ids:
            problem = f"`prompt` has the token id {max(prompt)}; the tokenizer has {formats.num_ids}"
            raise RequestError(400, problem, param="prompt")
        return Placement(None, list(prompt), "", _history(session, None), None, chat)
    assert prompt is not None
    known = [length for length, key in keys.items() if key in session.by_key]
    if not known:
        new_ids = yield lambda: _encode(request, 0, prompt, chat, context, add_special_tokens=True)
        if not new_ids:
            raise RequestError(400, "the prompt is empty; there is nothing to continue", param="prompt")
        return Placement(None, new_ids, "", _history(session, None), None, chat)
    length = max(known)
    parent, added = session.ending_with(keys[length], ()), prompt[length:]
    kept = session.state_length(parent)
    new_ids = (yield lambda: _encode(request, kept, added, chat, context, add_special_tokens=False)) if added else []
    return Placement(parent, new_ids, added, _history(session, parent), None, chat)


def _encode(
    request: ModelRequest,
    kept: int,
    text: str,
    chat: ChatFormat,
    context: int | None,
    *,
    add_special_tokens: bool,
) -> list[int]:
    _check_fits(request, kept, text, chat, context)
    return chat.encode_text(text, add_special_tokens=add_special_tokens)


def _check_fits(
    request: ModelRequest, kept: int, added: str | Sequence[Message], chat: ChatFormat, context: int | None
) -> None:
    """Refuse a long text that cannot fit behind so many kept tokens, before it is rendered or tokenized."""
    if context is None or request.size <= INLINE_BYTES:
        return
    length = kept + chat.min_tokens(added)
    if length >= context:
        raise context_error(context, f"this prompt has at least {length}", request)


def _history(session: Session, parent: int | None, rewritten: int | None = None) -> History:
    if not session.steps:
        return "first"
    if rewritten is not None:
        return "rewritten"
    if parent is None or session.has_child(parent):
        return "branch"
    return "continued"


def _tool_names(messages: Sequence[Message]) -> list[str]:
    return [message.get("name", "") for message in messages if message["role"] == "tool"]


@dataclass(frozen=True)
class Reading:
    """A response as text and tool calls: its ids, cut behind a stop text, and that text."""

    response_ids: list[int]
    text: str
    tool_calls: tuple[dict[str, Any], ...]
    reasoning: str
    stop_sequence: str | None


def read_response(
    chat: ChatFormat, request: ModelRequest, prompt_ids: Sequence[int], ids: list[int], *, name: str
) -> Reading:
    """
    What the client is shown of a response: what it thought apart from what it said, with and without tools. Without
    tools in the request a tool call is text; so is one that cannot be read. A prompt that is text or ids is continued
    by the response's text as it is.
    """
    stop = stops_at(ids, request.wishes.stop, chat.decode)
    stop_sequence = None
    if stop is not None:
        ids, stop_sequence = ids[: stop[0]], stop[1]
    text = chat.decode(ids)
    shown = text if stop_sequence is None else text[: text.index(stop_sequence)]
    if request.messages is None or (stop_sequence is not None and not shown):
        return Reading(ids, shown, (), "", stop_sequence)
    if not request.tools:
        reasoning, content = chat.split_thoughts(ids, prompt_ids, until=stop_sequence)
        return Reading(ids, content, (), reasoning, stop_sequence)
    parsed = chat.parse(ids, prompt_ids, until=stop_sequence)
    calls = tuple(
        {"id": f"call_{name}_{index}", **one["function"]}
        for index, one in enumerate(parsed.message.get("tool_calls") or ())
    )
    content = parsed.message.get("content") or ""
    return Reading(ids, content, calls, parsed.message.get("reasoning_content", ""), stop_sequence)


def token_texts(chat: ChatFormat, ids: Sequence[int], formats: ChatFormats) -> tuple[str, ...]:
    """The text of each token."""
    return tuple(formats.decode([token_id]) for token_id in ids)
