"""OpenAI's responses: pure translation between its bodies and our own. No call can refer to an earlier one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag

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
from .openai import error_body


class InputMessage(Body):
    """A message; the type may be left out."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class FunctionCall(Body):
    """A tool call that a client sends back."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None
    namespace: str | None = None
    caller: FiniteObject | None = None


class FunctionCallOutput(Body):
    """What a tool answered."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: str | None = None
    caller: FiniteObject | None = None


class ReasoningItem(Body):
    """What the model thought; it is taken and has no effect."""

    type: Literal["reasoning"]
    id: str | None = None
    summary: FiniteList | None = None
    content: FiniteList | None = None
    encrypted_content: str | None = None
    status: str | None = None


def _kind(item: object) -> str | None:
    """The type of an item. Messages may leave it out."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return kind if isinstance(kind, str) else None


Item = Annotated[
    Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")]
    | Annotated[InputMessage, Tag("message")],
    Discriminator(_kind),
]


class ResponseTool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: FiniteObject | None = None
    strict: bool | None = None
    defer_loading: Literal[False] | None = None


class TextFormat(Body):
    """What the response should be. It is text: a grammar would change what is sampled."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Annotated[FiniteObject | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
    """How text is written; `verbosity` has no effect."""

    format: TextFormat | None = None
    verbosity: str | None = None


class ResponseToolChoice(Body):
    """One tool that a client would like called."""

    type: Literal["function"]
    name: str


class ResponsesBody(ModelBody, OpenAIOptions):
    """`POST /v1/responses`."""

    model: str
    input: str | Annotated[list[Item], Field(min_length=1, fail_fast=True)]
    instructions: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    max_output_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    tools: Annotated[list[ResponseTool], FIRST_ERROR] | None = None
    tool_choice: Literal["auto", "none", "required"] | ResponseToolChoice | None = None
    stream: bool | None = None
    stream_options: dict[str, bool] | None = None
    text: TextOptions | None = None
    reasoning: dict[str, str | None] | None = None
    include: Annotated[list[str], FIRST_ERROR] | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    user: str | None = None

    def request(self, limits: BodyLimits) -> ModelRequest:
        """What is asked, in our own form."""
        tools = () if self.tool_choice == "none" else self.tools or ()
        form = "text" if self.text is None or self.text.format is None else self.text.format.type
        check_form(form, "text.format")
        ignored = {
            "text.format": form == "json_object",
            "tool_choice": self.tool_choice == "required" or isinstance(self.tool_choice, ResponseToolChoice),
            "parallel_tool_calls": self.parallel_tool_calls is False,
            "reasoning": bool(self.reasoning),
        }
        system: list[Message] = [{"role": "system", "content": self.instructions}] if self.instructions else []
        items = [InputMessage(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return ModelRequest(
            self.model,
            messages=(*system, *_messages(items, limits)),
            tools=tuple(_tool(tool) for tool in tools),
            wishes=Wishes(self.max_output_tokens, self.temperature, self.top_p),
            call_ids=tuple(item.call_id for item in items if isinstance(item, FunctionCall)),
            logprobs="message.output_text.logprobs" in (self.include or ()),
            ignored=tuple(name for name, is_ignored in ignored.items() if is_ignored),
        )


def _tool(tool: ResponseTool) -> JsonObject:
    fields = ("name", "description", "parameters", "strict")
    function = {name: getattr(tool, name) for name in fields if getattr(tool, name) is not None}
    return {"type": "function", "function": function}


def _messages(items: Sequence[Item], limits: BodyLimits) -> Iterator[Message]:
    """One turn of the model may be several items: its text, and each of its calls."""
    names: dict[str, str] = {}
    turn: tuple[list[str], list[tuple[str, JsonObject]]] | None = None
    for index, item in enumerate(items):
        if isinstance(item, ReasoningItem):
            continue
        if isinstance(item, FunctionCall) or (isinstance(item, InputMessage) and item.role == "assistant"):
            turn = turn or ([], [])
            if isinstance(item, FunctionCall):
                names[item.call_id] = item.name
                turn[1].append((item.name, arguments_of(item.arguments, f"input.{index}.arguments", limits)))
            else:
                turn[0].append(text_of(item.content))
            continue
        if turn is not None:
            yield call_message("\n".join(turn[0]), turn[1])
            turn = None
        if isinstance(item, FunctionCallOutput):
            yield {"role": "tool", "name": names.get(item.call_id, ""), "content": text_of(item.output)}
        else:
            role = "system" if item.role == "developer" else item.role
            yield {"role": role, "content": text_of(item.content)}
    if turn is not None:
        yield call_message("\n".join(turn[0]), turn[1])


# -- responses --------------------------------------------------------------------------------------------------------


def response(answer: Answer, body: ResponsesBody) -> JsonObject:
    """A whole response."""
    is_cut = answer.finish_reason == "length"
    return {
        **_head(answer, body),
        "status": "incomplete" if is_cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
        "output": _output(answer),
        "usage": {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {"cached_tokens": answer.kept_tokens, "cache_write_tokens": 0},
            "output_tokens": answer.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        },
    }


def response_stream(answer: Answer, body: ResponsesBody) -> Iterator[bytes]:
    """The same response as a stream."""
    numbers = count()

    def send(kind: str, **data: object) -> bytes:
        return event({"type": kind, "sequence_number": next(numbers), **data}, kind)

    whole = response(answer, body)
    opening = {**whole, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    yield send("response.created", response=opening)
    yield send("response.in_progress", response=opening)
    for index, item in enumerate(whole["output"]):
        at = {"output_index": index, "item_id": item["id"]}
        if item["type"] == "message":
            part = item["content"][0]
            opened = {**item, "content": [], **_IN_PROGRESS}
            yield send("response.output_item.added", output_index=index, item=opened)
            empty = {**part, "text": "", "logprobs": []}
            yield send("response.content_part.added", **at, content_index=0, part=empty)
            for piece in pieces(part["text"]):
                yield send("response.output_text.delta", **at, content_index=0, delta=piece, logprobs=[])
            yield send(
                "response.output_text.done",
                **at,
                content_index=0,
                text=part["text"],
                logprobs=part["logprobs"],
            )
            yield send("response.content_part.done", **at, content_index=0, part=part)
        elif item["type"] == "function_call":
            opened = {**item, "arguments": "", **_IN_PROGRESS}
            yield send("response.output_item.added", output_index=index, item=opened)
            for piece in pieces(item["arguments"]):
                yield send("response.function_call_arguments.delta", **at, delta=piece)
            yield send("response.function_call_arguments.done", **at, name=item["name"], arguments=item["arguments"])
        else:
            yield send("response.output_item.added", output_index=index, item=item)
        yield send("response.output_item.done", output_index=index, item=item)
    yield send(f"response.{whole['status']}", response=whole)


def error_event(error: RequestError) -> bytes:
    """A failure within a stream."""
    body = error_body(error)
    shown = {name: body["error"][name] for name in ("code", "message", "param")}
    return event({"type": "error", "sequence_number": 0, **shown, **body}, "error")


_IN_PROGRESS = {"status": "in_progress"}


def _output(answer: Answer) -> list[JsonObject]:
    items: list[JsonObject] = []
    if answer.reasoning:
        summary = [{"type": "summary_text", "text": answer.reasoning}]
        items.append({"type": "reasoning", "id": f"rs_{answer.answer_id}", "summary": summary})
    if answer.text or not answer.tool_calls:
        part = {
            "type": "output_text",
            "text": answer.text,
            "annotations": [],
            "logprobs": token_logprobs(answer),
        }
        items.append(
            {
                "type": "message",
                "id": f"msg_{answer.answer_id}",
                "role": "assistant",
                "status": "completed",
                "content": [part],
            }
        )
    for call in answer.tool_calls:
        items.append(
            {
                "type": "function_call",
                "id": f"fc_{call['id']}",
                "call_id": call["id"],
                "name": call["name"],
                "arguments": dumps(call["arguments"]),
                "status": "completed",
            }
        )
    return items


def _head(answer: Answer, body: ResponsesBody) -> JsonObject:
    return {
        "id": f"resp_{answer.answer_id}",
        "object": "response",
        "created_at": answer.created,
        "model": answer.model,
        "error": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": None,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto" if body.tool_choice is None else body.model_dump(include={"tool_choice"})["tool_choice"],
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "truncation": "disabled",
        "store": False,
    }


# -- the API ----------------------------------------------------------------------------------------------------------

RESPONSES = Dialect(
    "/v1/responses",
    "OpenAI: responses",
    ResponsesBody,
    whole=response,
    stream=response_stream,
    error=error_body,
    error_event=error_event,
)
