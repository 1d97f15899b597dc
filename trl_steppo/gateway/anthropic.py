"""Anthropic's messages: pure translation between its bodies and our own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from ..types import JsonObject, Message
from .bodies import FIRST_ERROR, Body, Content, FiniteObject, Part, call_message, dumps, event, text_of
from .conversation import Answer, ModelRequest, RequestError, Wishes, pieces
from .dialect import Dialect, ModelBody
from .limits import BodyLimits


class ToolUse(Body):
    """A tool call that a client sends back."""

    type: Literal["tool_use"]
    id: str
    name: str
    input: FiniteObject
    caller: FiniteObject | None = None
    cache_control: FiniteObject | None = None


class ToolResult(Body):
    """What a tool answered."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: Content | None = None
    is_error: bool | None = None
    cache_control: FiniteObject | None = None


class Thinking(Body):
    """What the model thought; it is taken and has no effect."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


Block = Annotated[Part | ToolUse | ToolResult | Thinking, Field(discriminator="type")]


class MessageParam(Body):
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    content: str | Annotated[list[Block], FIRST_ERROR]


class AnthropicTool(Body):
    """A tool that the model may call."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: FiniteObject
    cache_control: FiniteObject | None = None
    strict: bool | None = None


class AnthropicToolChoice(Body):
    """A wish for tools; but for `none` it has no effect."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingChoice(Body):
    """A wish for thoughts, which has no effect."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = None
    display: str | None = None


class MessagesBody(ModelBody):
    """`POST /v1/messages`."""

    model: str
    messages: Annotated[list[MessageParam], Field(min_length=1, fail_fast=True)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    system: Content | None = None
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    stop_sequences: Annotated[list[str], Field(max_length=16, fail_fast=True)] | None = None
    stream: bool | None = None
    tools: Annotated[list[AnthropicTool], FIRST_ERROR] | None = None
    tool_choice: AnthropicToolChoice | None = None
    thinking: ThinkingChoice | None = None
    metadata: dict[str, str | None] | None = None
    service_tier: str | None = None
    cache_control: FiniteObject | None = None

    def request(self, limits: BodyLimits) -> ModelRequest:
        """What is asked, in our own form."""
        choice = self.tool_choice
        tools = () if choice is not None and choice.type == "none" else self.tools or ()
        ignored = {
            "tool_choice": choice is not None and choice.type in ("any", "tool"),
            "thinking": self.thinking is not None and self.thinking.type != "disabled",
        }
        if self.messages[-1].role == "assistant":
            problem = "the last of `messages` is the assistant's, but a response cannot be begun for it; leave it out"
            raise RequestError(400, problem, param="messages")
        blocks = (
            b for m in self.messages if m.role == "assistant" and not isinstance(m.content, str) for b in m.content
        )
        system: list[Message] = [{"role": "system", "content": text_of(self.system)}] if self.system else []
        return ModelRequest(
            self.model,
            messages=(*system, *_messages(self.messages)),
            tools=tuple(_tool(tool) for tool in tools),
            wishes=Wishes(
                self.max_tokens,
                self.temperature,
                self.top_p,
                self.top_k,
                None,
                tuple(text for text in self.stop_sequences or () if text),
            ),
            call_ids=tuple(block.id for block in blocks if isinstance(block, ToolUse)),
            ignored=tuple(name for name, is_ignored in ignored.items() if is_ignored),
        )


def _tool(tool: AnthropicTool) -> JsonObject:
    described = {} if tool.description is None else {"description": tool.description}
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": tool.input_schema}}


def _messages(messages: list[MessageParam]) -> Iterator[Message]:
    names: dict[str, str] = {}
    for message in messages:
        if isinstance(message.content, str):
            yield {"role": message.role, "content": message.content}
        elif message.role == "assistant":
            texts = [block for block in message.content if isinstance(block, Part)]
            uses = [block for block in message.content if isinstance(block, ToolUse)]
            names |= {use.id: use.name for use in uses}
            yield call_message(text_of(texts), [(use.name, use.input) for use in uses])
        else:
            yield from _user_messages(message.content, names)


def _user_messages(blocks: Sequence[Block], names: dict[str, str]) -> Iterator[Message]:
    """Messages of a user's turn. Tools' answers come before what the user says."""
    for block in blocks:
        if isinstance(block, ToolResult):
            yield {"role": "tool", "name": names.get(block.tool_use_id, ""), "content": text_of(block.content)}
    texts = [block for block in blocks if isinstance(block, Part)]
    if texts or not any(isinstance(block, ToolResult) for block in blocks):
        yield {"role": "user", "content": text_of(texts)}


# -- responses --------------------------------------------------------------------------------------------------------


def message(answer: Answer) -> JsonObject:
    """A whole response."""
    return {
        **_head(answer),
        "content": _content(answer),
        "stop_reason": _stop_reason(answer),
        "stop_sequence": answer.stop_sequence,
        "usage": _usage(answer, answer.completion_tokens),
    }


def message_stream(answer: Answer) -> Iterator[bytes]:
    """The same response as a stream."""

    def send(kind: str, **data: object) -> bytes:
        return event({"type": kind, **data}, kind)

    opening = {**_head(answer), "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(answer, 0)}
    yield send("message_start", message=opening)
    for index, block in enumerate(_content(answer)):
        kind = block["type"]
        empty: JsonObject = {**block, ("input" if kind == "tool_use" else kind): {} if kind == "tool_use" else ""}
        yield send("content_block_start", index=index, content_block=empty)
        text = dumps(block["input"]) if kind == "tool_use" else block[kind]
        name = {"tool_use": "input_json_delta", "text": "text_delta", "thinking": "thinking_delta"}[kind]
        field = "partial_json" if kind == "tool_use" else kind
        for piece in pieces(text):
            yield send("content_block_delta", index=index, delta={"type": name, field: piece})
        yield send("content_block_stop", index=index)
    delta = {"stop_reason": _stop_reason(answer), "stop_sequence": answer.stop_sequence}
    yield send("message_delta", delta=delta, usage=_usage(answer, answer.completion_tokens))
    yield send("message_stop")


def _head(answer: Answer) -> JsonObject:
    return {"id": f"msg_{answer.answer_id}", "type": "message", "role": "assistant", "model": answer.model}


def _content(answer: Answer) -> list[JsonObject]:
    blocks: list[JsonObject] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.text or not answer.tool_calls:
        blocks.append({"type": "text", "text": answer.text})
    blocks += [
        {"type": "tool_use", "id": call["id"], "name": call["name"], "input": call["arguments"]}
        for call in answer.tool_calls
    ]
    return blocks


def _stop_reason(answer: Answer) -> str:
    if answer.finish_reason == "length":
        return "max_tokens"
    if answer.finish_reason == "tool_calls":
        return "tool_use"
    return "stop_sequence" if answer.stop_sequence is not None else "end_turn"


def _usage(answer: Answer, output_tokens: int) -> JsonObject:
    return {
        "input_tokens": answer.prompt_tokens - answer.kept_tokens,
        "cache_read_input_tokens": answer.kept_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": output_tokens,
    }


_ERROR_TYPES = {401: "authentication_error", 404: "not_found_error", 413: "request_too_large", 429: "rate_limit_error"}


def error_body(error: RequestError) -> JsonObject:
    """A refusal in the form of Anthropic's API."""
    kind = _ERROR_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def error_event(error: RequestError) -> bytes:
    """A failure within a stream."""
    return event(error_body(error), "error")


# -- the API ----------------------------------------------------------------------------------------------------------

MESSAGES = Dialect(
    "/v1/messages",
    "Anthropic: messages",
    MessagesBody,
    whole=lambda answer, body: message(answer),
    stream=lambda answer, body: message_stream(answer),
    error=error_body,
    error_event=error_event,
)
