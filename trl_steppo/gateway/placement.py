"""A request's place in what a session has recorded: kept ids stay as they are, only what is new is tokenized."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

from ..chat import ChatFormat
from ..episodes import as_observation
from ..errors import ChatTemplateError
from ..types import Message, TextOrMessages
from .conversation import (
    ModelRequest,
    RequestError,
    context_error,
    prefix_keys,
    text_keys,
    tools_key,
)
from .sessions import Session
from .tokens import ChatFormats
from .work import INLINE_BYTES

T = TypeVar("T")

History = Literal["first", "continued", "branch", "rewritten"]


@dataclass(frozen=True)
class Placement:
    """
    The place of a request in the record of its session.

    Args:
        parent (`int`, *optional*):
            Position of the recorded step that the request continues; `None` if it continues none.
        new_ids (`list[int]`):
            Ids after that step's response; the whole prompt where there is no parent.
        observed (`str` or `list[dict]`):
            What the parent was answered.
        history (`str`):
            `"first"`: the session's first request; `"continued"`: it continues a response; `"branch"`: it begins
            another conversation, or continues a response that another step continues already; `"rewritten"`: it says
            that the model gave another answer than the recorded one.
        key (`bytes`, *optional*):
            Key of the conversation so far; `None` where the prompt is text or ids.
        chat ([`~chat.ChatFormat`]):
            How its messages are rendered.
        rewritten (`int`, *optional*):
            Position of the step whose response was rewritten.
        escaped (`int`, *optional*, defaults to `0`):
            Number of control tokens that the new messages spell, and that are shown as text.
    """

    parent: int | None
    new_ids: list[int]
    observed: TextOrMessages
    history: History
    key: bytes | None
    chat: ChatFormat
    rewritten: int | None = None
    escaped: int = 0


class Runner(Protocol):
    """Runs work whose time grows with a request's size."""

    def __call__(self, work: Callable[[], T], /) -> Awaitable[T]:
        """The result of the work."""
        ...


class Placer:
    """
    Finds what requests continue in the record of one session.

    Args:
        session ([`Session`]):
            The session. Steps may be added to it later.
        formats ([`ChatFormats`]):
            Messages to ids.
        context (`int`, *optional*):
            Number of tokens that a prompt must be shorter than. A text that cannot be is refused before it is
            tokenized.
    """

    def __init__(self, session: Session, formats: ChatFormats, context: int | None = None) -> None:
        self._session = session
        self._formats = formats
        self._context = context
        self._num_indexed = 0
        self._ending: dict[bytes, list[int]] = {}  # by a conversation's key: the steps whose responses end it
        self._answering: dict[bytes, int] = {}  # by a conversation's key: the last step that answers it
        self._text_lengths: set[int] = set()  # of text prompts with their responses

    def place(self, request: ModelRequest) -> Placement:
        """
        Find the longest recorded history that a request continues, and tokenize what it adds.

        Raises:
            RequestError: The messages cannot be rendered, or are too long.
        """
        return _result(self.place_by(request, _at_once))

    async def place_by(self, request: ModelRequest, run: Runner) -> Placement:
        """[`place`], where `run` does the work that takes long. This work reads nothing that may change meanwhile."""
        if request.messages is None:
            return await self._place_prompt(request, run)
        return await self._place_messages(request, request.messages, run)

    async def _place_messages(self, request: ModelRequest, messages: Sequence[Message], run: Runner) -> Placement:
        def prepare() -> tuple[list[bytes], ChatFormat]:
            keys = prefix_keys(tools_key(request.tools), messages)
            return keys, self._formats.of(request.tools, key=keys[0])

        keys, chat = await run(prepare)
        self._index_new_steps()
        count = next((n for n in range(len(messages), 0, -1) if keys[n] in self._ending), 0)
        parent = self._parent(keys[count], request.call_ids) if count else None
        added = list(messages[count:])
        answered = (keys[n] for n in range(len(messages) - 1, count - 1, -1) if messages[n]["role"] == "assistant")
        rewritten = next((self._answering[key] for key in answered if key in self._answering), None)
        response_ids = None if parent is None else self._session.steps[parent].response_ids
        kept = self._session.state_length(parent)

        def tokenize() -> tuple[bool, list[int], int]:
            try:
                if response_ids is not None:
                    try:
                        self._check_fits(request, kept, added, chat)
                        ids = chat.close(response_ids) + chat.append(added, tool_call_names=_tool_names(added))
                        return True, ids, chat.count_control_tokens(added)
                    except ChatTemplateError:  # these messages change how earlier ones are rendered
                        pass
                self._check_fits(request, 0, messages, chat)
                return False, chat.render(messages), chat.count_control_tokens(messages)
            except RequestError:
                raise
            except Exception as error:  # jinja code may raise anything
                raise RequestError(400, f"the messages cannot be rendered: {error}", param="messages") from error

        continues, new_ids, escaped = await run(tokenize)
        parent = parent if continues else None
        history = self._history(parent, rewritten)
        return Placement(parent, new_ids, as_observation(added), history, keys[-1], chat, rewritten, escaped)

    async def _place_prompt(self, request: ModelRequest, run: Runner) -> Placement:
        self._index_new_steps()
        prompt, lengths = request.prompt, frozenset(self._text_lengths)
        assert prompt is not None

        def prepare() -> tuple[ChatFormat, dict[int, bytes]]:
            return self._formats.of(()), text_keys(prompt, lengths) if isinstance(prompt, str) else {}

        chat, keys = await run(prepare)
        self._index_new_steps()
        if isinstance(prompt, tuple):
            self._check_ids(prompt)
            return Placement(None, list(prompt), "", self._history(None), None, chat)
        length = max((length for length, key in keys.items() if key in self._ending), default=0)
        parent = self._parent(keys[length]) if length else None
        kept, added = self._session.state_length(parent), prompt[length:]

        def tokenize() -> list[int]:
            self._check_fits(request, kept, added, chat)
            return chat.encode_text(added, add_special_tokens=parent is None)

        new_ids = await run(tokenize) if added else []
        if parent is None and not new_ids:
            raise RequestError(400, "the prompt is empty; there is nothing to continue", param="prompt")
        return Placement(parent, new_ids, "" if parent is None else added, self._history(parent), None, chat)

    def _check_ids(self, prompt: tuple[int, ...]) -> None:
        if max(prompt) >= self._formats.num_ids:
            problem = f"`prompt` has the token id {max(prompt)}; the tokenizer has {self._formats.num_ids}"
            raise RequestError(400, problem, param="prompt")

    def _check_fits(self, request: ModelRequest, kept: int, added: str | Sequence[Message], chat: ChatFormat) -> None:
        """Refuse a long text that cannot fit after `kept` tokens, before it is rendered or tokenized."""
        if self._context is None or request.size <= INLINE_BYTES:
            return
        length = kept + chat.min_tokens(added)
        if length >= self._context:
            raise context_error(self._context, f"this prompt has at least {length}", request)

    def _index_new_steps(self) -> None:
        steps = self._session.steps
        for position in range(self._num_indexed, len(steps)):
            step = steps[position]
            self._ending.setdefault(bytes.fromhex(step.key), []).append(position)
            if step.asked_key is not None:
                self._answering[bytes.fromhex(step.asked_key)] = position
            if step.text_length is not None:
                self._text_lengths.add(step.text_length)
        self._num_indexed = len(steps)

    def _parent(self, key: bytes, call_ids: Collection[str] = ()) -> int:
        """
        The step whose response ends a conversation. If several steps said the same, it is the one whose tool calls the
        client sends back, by their ids; else one that its client was told of; else one that no step continues; else
        the last.
        """
        session, positions = self._session, self._ending[key]
        if len(positions) == 1:
            return positions[0]
        named = {call_id.removeprefix("call_").partition("_")[0] for call_id in call_ids}
        return max(
            positions,
            key=lambda p: (
                session.steps[p].answer.answer_id in named,
                not session.deliveries[p].is_untold,
                not session.has_child(p),
                p,
            ),
        )

    def _history(self, parent: int | None, rewritten: int | None = None) -> History:
        if not self._session.steps:
            return "first"
        if rewritten is not None:
            return "rewritten"
        if parent is None or self._session.has_child(parent):
            return "branch"
        return "continued"


async def _at_once(work: Callable[[], T], /) -> T:
    return work()


def _result(coroutine: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("the coroutine waits for something")


def _tool_names(messages: Sequence[Message]) -> list[str]:
    return [message.get("name", "") for message in messages if message["role"] == "tool"]
