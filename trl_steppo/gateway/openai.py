"""OpenAI's chat completions and completions: pure translation between their bodies and our own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from ..types import JsonObject, Message
from .bodies import (
    FIRST_ERROR,
    Body,
    Content,
    FiniteList,
    FiniteObject,
    OpenAIOptions,
    arguments_of,
    call_message,
    check_form,
    dumps,
    event,
    text_of,
)
from .conversation import Answer, ModelRequest, RequestError, Wishes, pieces, token_logprobs
from .dialect import Dialect, ModelBody
from .limits import BodyLimits


class Function(Body):
    """A tool's schema; `return` as transformers writes it."""

    name: str
    description: str | None = None
    parameters: FiniteObject | None = None
    returns: Annotated[FiniteObject | None, Field(alias="return")] = None
    strict: bool | None = None

    def schema_dict(self) -> JsonObject:
        """The schema as a chat template shows it."""
        fields = {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "return": self.returns,
            "strict": self.strict,
        }
        return {name: value for name, value in fields.items() if value is not None}


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"] = "function"
    function: Function


class CalledFunction(Body):
    """Which tool was called, and with what."""

    name: str
    arguments: str = "{}"


class ToolCall(Body):
    """A tool call that a client sends back."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Body):
    """One message of a conversation. What a model thought before is taken and has no effect."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], FIRST_ERROR] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    annotations: FiniteList | None = None
    audio: None = None
    function_call: None = None


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(Body):
    """What the response should be. It is text: a grammar would change what is sampled."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: FiniteObject | None = None


class NamedFunction(Body):
    """A tool's name."""

    name: str


class ToolChoice(Body):
    """One tool that a client would like called."""

    type: Literal["function"] = "function"
    function: NamedFunction


class _Sampling(ModelBody):
    """What both APIs say of sampling. Settings that cannot be sampled, or not be scored, must have their defaults."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    n: Annotated[int, Field(ge=1, le=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end a response."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in stop if text)

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(_Sampling, OpenAIOptions):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tools: Annotated[list[Tool], FIRST_ERROR] | None = None
    tool_choice: Literal["auto", "none", "required"] | ToolChoice | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None

    def request(self, limits: BodyLimits) -> ModelRequest:
        """What is asked, in our own form."""
        tools = () if self.tool_choice == "none" else self.tools or ()
        form = "text" if self.response_format is None else self.response_format.type
        check_form(form, "response_format")
        ignored = {
            "response_format": form == "json_object",
            "tool_choice": self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice),
            "parallel_tool_calls": self.parallel_tool_calls is False,
            "reasoning_effort": self.reasoning_effort is not None,
            "verbosity": self.verbosity is not None,
            "name": any(message.name is not None and message.role != "tool" for message in self.messages),
            "refusal": any(message.refusal is not None for message in self.messages),
        }
        calls = (call for message in self.messages for call in message.tool_calls or ())
        return ModelRequest(
            self.model,
            messages=tuple(_messages(self.messages, limits)),
            tools=tuple({"type": "function", "function": tool.function.schema_dict()} for tool in tools),
            wishes=Wishes(
                self.max_completion_tokens or self.max_tokens,
                self.temperature,
                self.top_p,
                self.top_k,
                self.seed,
                self.stop_texts(),
            ),
            logprobs=bool(self.logprobs),
            call_ids=tuple(call.id for call in calls if call.id),
            ignored=tuple(name for name, is_ignored in ignored.items() if is_ignored),
        )


class CompletionBody(_Sampling):
    """`POST /v1/completions`."""

    prompt: (
        str
        | Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], FIRST_ERROR]
        | Annotated[list[str], Field(min_length=1, max_length=1, fail_fast=True)]
    )
    echo: Literal[False] | None = None
    suffix: None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=1)] | None = None

    def request(self, limits: BodyLimits) -> ModelRequest:
        """What is asked, in our own form."""
        prompt: str | tuple[int, ...]
        if isinstance(self.prompt, str):
            prompt = self.prompt
        elif self.prompt and isinstance(self.prompt[0], str):
            prompt = self.prompt[0]
        else:
            prompt = tuple(int(token_id) for token_id in self.prompt)
        if not prompt:
            raise RequestError(400, "`prompt` is empty; there is nothing to continue", param="prompt")
        return ModelRequest(
            self.model,
            prompt=prompt,
            wishes=Wishes(self.max_tokens, self.temperature, self.top_p, self.top_k, self.seed, self.stop_texts()),
            logprobs=self.logprobs is not None,
        )


def _messages(messages: list[ChatMessage], limits: BodyLimits) -> Iterator[Message]:
    names: dict[str, str] = {}
    for index, message in enumerate(messages):
        content = text_of(message.content)
        if message.role == "assistant":
            calls = []
            for number, call in enumerate(message.tool_calls or ()):
                param = f"messages.{index}.tool_calls.{number}.function.arguments"
                calls.append((call.function.name, arguments_of(call.function.arguments, param, limits)))
                names[call.id or ""] = call.function.name
            yield call_message(content, calls)
        elif message.role == "tool":
            name = names.get(message.tool_call_id or "", message.name or "")
            yield {"role": "tool", "name": name, "content": content}
        else:
            yield {"role": "system" if message.role == "developer" else message.role, "content": content}


# -- chat completions -------------------------------------------------------------------------------------------------


def chat_completion(answer: Answer) -> JsonObject:
    """A whole response."""
    message: JsonObject = {
        "role": "assistant",
        "content": answer.text if answer.text or not answer.tool_calls else None,
        "refusal": None,
    }
    if answer.tool_calls:
        message["tool_calls"] = [_tool_call(call) for call in answer.tool_calls]
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason, "logprobs": _logprobs(answer)}
    return {**_chat_head(answer, "chat.completion"), "choices": [choice], "usage": usage(answer)}


def chat_stream(answer: Answer, *, include_usage: bool) -> Iterator[bytes]:
    """The same response as a stream."""
    head = _chat_head(answer, "chat.completion.chunk")
    if include_usage:
        head["usage"] = None

    def chunk(delta: JsonObject, finish_reason: str | None = None, logprobs: JsonObject | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": logprobs}
        return event({**head, "choices": [choice]})

    yield chunk({"role": "assistant", "content": "" if not answer.tool_calls else None}, None, _logprobs(answer))
    for piece in pieces(answer.reasoning):
        yield chunk({"reasoning_content": piece})
    for piece in pieces(answer.text):
        yield chunk({"content": piece})
    for index, call in enumerate(answer.tool_calls):
        whole = _tool_call(call)
        opening = {**whole, "index": index, "function": {"name": call["name"], "arguments": ""}}
        yield chunk({"tool_calls": [opening]})
        for piece in pieces(whole["function"]["arguments"]):
            yield chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
    yield chunk({}, answer.finish_reason)
    if include_usage:
        yield event({**head, "choices": [], "usage": usage(answer)})
    yield event("[DONE]")


def _chat_head(answer: Answer, kind: str) -> JsonObject:
    return {
        "id": f"chatcmpl-{answer.answer_id}",
        "object": kind,
        "created": answer.created,
        "model": answer.model,
        "system_fingerprint": None,
    }


def _tool_call(call: JsonObject) -> JsonObject:
    function = {"name": call["name"], "arguments": dumps(call["arguments"])}
    return {"id": call["id"], "type": "function", "function": function}


def _logprobs(answer: Answer) -> JsonObject | None:
    if not answer.tokens:
        return None
    return {"content": token_logprobs(answer), "refusal": None}


def usage(answer: Answer) -> JsonObject:
    """Numbers of tokens of the prompt and the response."""
    return {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": answer.kept_tokens},
    }


# -- completions ------------------------------------------------------------------------------------------------------


def completion(answer: Answer) -> JsonObject:
    """A whole response."""
    choice = _text_choice(answer.text, answer.finish_reason, _text_logprobs(answer))
    return {**_text_head(answer), "choices": [choice], "usage": usage(answer)}


def completion_stream(answer: Answer, *, include_usage: bool) -> Iterator[bytes]:
    """The same response as a stream."""
    head = _text_head(answer)
    if include_usage:
        head["usage"] = None
    for piece in pieces(answer.text):
        yield event({**head, "choices": [_text_choice(piece, None, None)]})
    yield event({**head, "choices": [_text_choice("", answer.finish_reason, _text_logprobs(answer))]})
    if include_usage:
        yield event({**head, "choices": [], "usage": usage(answer)})
    yield event("[DONE]")


def _text_head(answer: Answer) -> JsonObject:
    return {
        "id": f"cmpl-{answer.answer_id}",
        "object": "text_completion",
        "created": answer.created,
        "model": answer.model,
    }


def _text_choice(text: str, finish_reason: str | None, logprobs: JsonObject | None) -> JsonObject:
    return {"index": 0, "text": text, "finish_reason": finish_reason, "logprobs": logprobs}


def _text_logprobs(answer: Answer) -> JsonObject | None:
    if not answer.tokens:
        return None
    offsets, length = [], 0
    for token in answer.tokens:
        offsets.append(length)
        length += len(token)
    return {
        "tokens": list(answer.tokens),
        "token_logprobs": list(answer.logprobs),
        "top_logprobs": None,
        "text_offset": offsets,
    }


# -- errors -----------------------------------------------------------------------------------------------------------

_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


def error_body(error: RequestError) -> JsonObject:
    """A refusal in the form of OpenAI's APIs."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}


def error_event(error: RequestError) -> bytes:
    """A failure within a stream."""
    return event(error_body(error))


# -- the APIs ---------------------------------------------------------------------------------------------------------

CHAT_COMPLETIONS = Dialect(
    "/v1/chat/completions",
    "OpenAI: chat completions",
    ChatBody,
    whole=lambda answer, body: chat_completion(answer),
    stream=lambda answer, body: chat_stream(answer, include_usage=body.includes_usage),
    error=error_body,
    error_event=error_event,
)

COMPLETIONS = Dialect(
    "/v1/completions",
    "OpenAI: completions",
    CompletionBody,
    whole=lambda answer, body: completion(answer),
    stream=lambda answer, body: completion_stream(answer, include_usage=body.includes_usage),
    error=error_body,
    error_event=error_event,
)
