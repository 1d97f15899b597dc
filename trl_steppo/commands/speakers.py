"""
What answers instead of a local model while an environment is looked at: an OpenAI-compatible endpoint, a person, or
texts from the command line.

The rollout works with token ids. Here one byte is a token: prompts are written in a plain form, which is read back
into messages without a loss, and responses are written as Hermes writes them.
"""

from __future__ import annotations

import ast
import asyncio
import json
import sys
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass

from ..episodes.printing import visible
from ..errors import ConfigurationError
from ..http_json import RequestError, request_json
from ..inference.base import Sample, SamplingParams
from ..testing import END_OF_TURN, MESSAGES_TEMPLATE, byte_tokenizer, tool_call
from ..types import JsonObject, Message, StopReason, TokenIds, Tokenizer

_START = "<|im_start|>"
_TEMPLATE = (
    """\
{%- if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}
"""
    + MESSAGES_TEMPLATE
)
_MAX_KEPT = 10_000  # replies that are remembered as they came
_TIMEOUT_S = 600.0  # of one response


@dataclass(frozen=True)
class Conversation:
    """
    What a speaker is asked.

    Args:
        messages (`list[dict]`):
            All messages so far. Text without a chat template is one message of the user.
        tools (`list[dict]`):
            JSON schemas of the tools.
        order (`tuple[int, ...]`):
            Which row, which of its episodes, and which step this is.
    """

    messages: list[Message]
    tools: list[JsonObject]
    order: tuple[int, ...]

    @property
    def tool_names(self) -> list[str]:
        """Names of the tools."""
        return [tool["function"]["name"] for tool in self.tools]


@dataclass(frozen=True)
class Reply:
    """
    What a speaker says.

    Args:
        text (`str`):
            The response, with its tool calls as Hermes writes them.
        is_cut (`bool`, *optional*, defaults to `False`):
            Whether it ended at its maximum length.
        message (`dict`, *optional*):
            The message that later requests say it with; by default the text.
    """

    text: str
    is_cut: bool = False
    message: Message | None = None


class Speaker:
    """A sampler that reads messages and says text. Its token ids mean nothing, and it knows no log-probabilities."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer = byte_tokenizer()
        self.tokenizer.chat_template = _TEMPLATE
        self._start, self._end = (self.tokenizer.convert_tokens_to_ids(token) for token in (_START, END_OF_TURN))
        self._said: OrderedDict[str, Message] = OrderedDict()

    async def reply(self, conversation: Conversation, params: SamplingParams) -> Reply:
        """Say the next response. Each kind of speaker has its own."""
        raise NotImplementedError

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        """See [`~inference.base.Sampler`]."""
        messages, tools = self._read(prompt_ids)
        reply = await self.reply(Conversation(messages, tools, order), params)
        if reply.message is not None:
            self._said[reply.text] = reply.message
            if len(self._said) > _MAX_KEPT:
                self._said.popitem(last=False)
        # A control token that is spelled out in the reply is text.
        ids = list(self.tokenizer.encode(reply.text, add_special_tokens=False, split_special_tokens=True))
        if not reply.is_cut or not ids:
            ids.append(self._end)
        reason = StopReason.LENGTH if reply.is_cut else StopReason.STOP
        return Sample(TokenIds(ids), (0.0,) * len(ids), reason, policy_version=0)

    def release(self, episode_id: str) -> None:
        """Nothing is kept for an episode alone."""

    def pace(self, quiet: Callable[[], Awaitable[None]] | None) -> None:
        """Ignored: every request is answered by itself."""

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids as a reader would write them: each message with its role, without control tokens."""
        turns = list(self._turns(list(ids)))
        if not any(role for role, _ in turns):
            return "".join(text for _, text in turns)
        said = [(role, text) for role, text in turns if role != "tools" and (text.strip() or role == "user")]
        return "\n".join(f"{role}: {text}" if role else text.strip("\n") for role, text in said)

    def _read(self, prompt_ids: Sequence[int]) -> tuple[list[Message], list[JsonObject]]:
        """The messages and the tools of a prompt."""
        turns = list(self._turns(list(prompt_ids)))
        if not any(role for role, _ in turns):
            return [{"role": "user", "content": "".join(text for _, text in turns)}], []
        tools: list[JsonObject] = []
        messages: list[Message] = []
        for role, text in turns[:-1]:  # the last one is the response's own
            if role == "tools":
                tools = json.loads(text)
            elif role == "assistant":
                messages.append(self._said.get(text, {"role": "assistant", "content": text}))
            elif role:
                messages.append({"role": role, "content": text})
        return messages, tools

    def _turns(self, ids: list[int]) -> Iterator[tuple[str, str]]:
        """The role and the text of each turn; without a role what stands outside of turns."""
        at = 0
        while at < len(ids):
            if ids[at] != self._start:
                end = next((i for i in range(at, len(ids)) if ids[i] in (self._start, self._end)), len(ids))
                yield "", str(self.tokenizer.decode(ids[at:end]))
                at = end + 1 if end < len(ids) and ids[end] == self._end else end
                continue
            end = next((i for i in range(at + 1, len(ids)) if ids[i] in (self._start, self._end)), len(ids))
            role, _, text = str(self.tokenizer.decode(ids[at + 1 : end])).partition("\n")
            yield role, text
            at = end + 1 if end < len(ids) and ids[end] == self._end else end


def _with_call_ids(messages: Sequence[Message]) -> list[Message]:
    """Messages in which every answer of a tool names its call, and every call has an answer, as endpoints demand."""
    complete: list[Message] = []
    open_ids: list[str] = []
    for message in messages:
        if message["role"] == "tool" and open_ids:
            complete.append({**message, "tool_call_id": open_ids.pop(0)})
            continue
        if message["role"] == "tool":
            message = {**message, "role": "user"}
        complete += _unanswered(open_ids)
        open_ids = [call["id"] for call in message.get("tool_calls") or ()]
        complete.append(message)
    return [*complete, *_unanswered(open_ids)]


def _unanswered(call_ids: Sequence[str]) -> list[Message]:
    return [{"role": "tool", "tool_call_id": call_id, "content": "(not answered)"} for call_id in call_ids]


# -- an endpoint ------------------------------------------------------------------------------------------------------


class Endpoint(Speaker):
    """
    A model behind an OpenAI-compatible API for chat completions.

    Args:
        base_url (`str`):
            Its address, as OpenAI's clients take it, most often with `/v1` at the end.
        model (`str`):
            The name of the model there.
        api_key (`str`, *optional*):
            The key.
        sends_temperature (`bool`, *optional*, defaults to `True`):
            Whether requests name a temperature. Some models take their own only.
    """

    def __init__(
        self, base_url: str, model: str, *, api_key: str | None = None, sends_temperature: bool = True
    ) -> None:
        super().__init__()
        if not base_url.startswith(("http://", "https://")):
            raise ConfigurationError(f"`--endpoint` is {base_url!r}; give a URL as in 'http://localhost:8000/v1'")
        self.base_url = base_url.rstrip("/")
        self.model = model
        self._api_key = api_key
        self._sends_temperature = sends_temperature
        self._length_name = "max_tokens"

    async def reply(self, conversation: Conversation, params: SamplingParams) -> Reply:
        """One request to the endpoint."""
        body: JsonObject = {"model": self.model, "messages": _with_call_ids(conversation.messages)}
        if conversation.tools:
            body["tools"] = conversation.tools
        if self._sends_temperature:
            body["temperature"] = params.temperature
        answer = await asyncio.to_thread(self._ask, body, params.max_new_tokens)
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            calls = message.get("tool_calls") or []
            text = (message.get("content") or "") + "".join(
                f"<tool_call>\n{_hermes(call['function'])}\n</tool_call>" for call in calls
            )
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ConfigurationError(
                f"{self.base_url} answered {json.dumps(answer)[:300]}, which is not a chat completion; is it an "
                "OpenAI-compatible API?"
            ) from error
        said: Message = {"role": "assistant", "content": message.get("content")}
        if calls:
            said["tool_calls"] = calls
        return Reply(text, is_cut=choice.get("finish_reason") == "length", message=said)

    def _ask(self, body: JsonObject, max_tokens: int) -> JsonObject:
        try:
            return self._post({**body, self._length_name: max_tokens})
        except ConfigurationError as error:
            if self._length_name == "max_tokens" and "max_completion_tokens" in str(error):  # OpenAI's newer models
                self._length_name = "max_completion_tokens"
                return self._post({**body, self._length_name: max_tokens})
            raise

    def _post(self, body: JsonObject) -> JsonObject:
        url = f"{self.base_url}/chat/completions"
        try:
            return request_json(url, body, api_key=self._api_key, timeout_s=_TIMEOUT_S)
        except RequestError as error:
            if error.status is None:
                raise ConfigurationError(f"{url} cannot be asked: {error}") from error
            said = f"{url} answered {error.status}: {_message(error.body)}"
            if error.may_pass:
                raise RuntimeError(said) from error
            raise ConfigurationError(f"{said}{self._hint(error.status, said)}") from error

    def _hint(self, status: int, said: str) -> str:
        if status in (401, 403) and not self._api_key:
            return ". No key was sent: set OPENAI_API_KEY, or name another variable that is set: `--api_key_env NAME`"
        if "this episode is over" in said or "session of this key is over" in said:
            return ". A key of this gateway is one episode: open a session for each (`POST /sessions`)"
        if status == 404 and not self.base_url.endswith("/v1"):
            return f". Most addresses end in /v1: `--endpoint {self.base_url}/v1`"
        return ""


def _message(refusal: str) -> str:
    """What an API's refusal says."""
    try:
        return str(json.loads(refusal)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return refusal[:500]


def _hermes(function: JsonObject) -> str:
    """A call as Hermes writes it. Arguments that are not JSON stay as they are: the call is malformed."""
    arguments = function.get("arguments") or "{}"
    return f'{{"name": {json.dumps(function["name"])}, "arguments": {arguments}}}'


# -- a person, or texts -----------------------------------------------------------------------------------------------


class Person(Speaker):
    """Asks for each response on the terminal. `name(argument=value)` calls a tool; anything else is text."""

    def __init__(self) -> None:
        super().__init__()
        self._num_seen: dict[tuple[int, ...], int] = {}

    async def reply(self, conversation: Conversation, params: SamplingParams) -> Reply:
        """What the person types."""
        episode = conversation.order[:2]
        seen = self._num_seen.get(episode, 0)
        self._num_seen[episode] = len(conversation.messages) + 1  # with the answer that is given now
        for message in conversation.messages[seen:]:
            print(visible(f"{message['role']}: {message.get('content') or ''}"), file=sys.stderr)
        tools = f" (tools: {', '.join(conversation.tool_names)})" if conversation.tools else ""
        try:
            text = await asyncio.to_thread(input, f"your response{tools}> ")
        except EOFError as error:
            raise ConfigurationError("the input has ended, and the episode asks for another response") from error
        return Reply(call_or_text(text, conversation.tool_names))


class Script(Speaker):
    """
    Says the same texts in every episode, one in each step.

    Args:
        texts (`Sequence[str]`):
            What to say; `name(argument=value)` calls a tool.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        super().__init__()
        self._texts = texts

    async def reply(self, conversation: Conversation, params: SamplingParams) -> Reply:
        """The text of the step."""
        index = conversation.order[-1]
        if index >= len(self._texts):
            raise ConfigurationError(
                f"`--say` has {len(self._texts)} responses, and the episode asks for another one; add it, or end the "
                "episode earlier with `--max_interaction_steps`"
            )
        return Reply(call_or_text(self._texts[index], conversation.tool_names))


def call_or_text(text: str, tool_names: Sequence[str]) -> str:
    """
    A response as a person writes it: `look_up(name="Ada")` is a call of that tool, if there is such a tool and every
    argument is a plain value with a name. Anything else is text.
    """
    try:
        expression = ast.parse(text.strip(), mode="eval").body
        if not isinstance(expression, ast.Call) or not isinstance(expression.func, ast.Name) or expression.args:
            return text
        if expression.func.id not in tool_names:
            return text
        arguments = {keyword.arg or "": ast.literal_eval(keyword.value) for keyword in expression.keywords}
        return text if "" in arguments else tool_call(expression.func.id, **arguments)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return text
