"""Bodies as they are read, without HTTP: the first mistake is told, and numbers and characters are whole."""

from __future__ import annotations

import json
from typing import Any

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.wire import chat_body
from trl_steppo.gateway.bodies import (
    Part,
    arguments_of,
    call_message,
    dumps,
    event,
    read_body,
    text_of,
    whole_characters,
)
from trl_steppo.gateway.conversation import RequestError
from trl_steppo.gateway.limits import BodyLimits
from trl_steppo.gateway.openai import ChatBody
from trl_steppo.types import writable

MOST = BodyLimits(max_bytes=2**25)  # so that something else refuses


def test_only_one_mistake_of_a_list_is_looked_for():
    with pytest.raises(RequestError, match=r"messages\.0\.role"):
        read_body(ChatBody, chat_body(*[{"role": 1}] * 9), MOST)
    adapter_errors: list[Any] = []
    try:
        ChatBody.model_validate_json(chat_body(*[{"role": 1}] * 9))
    except ValueError as error:
        adapter_errors = error.errors()  # type: ignore[attr-defined]
    assert len(adapter_errors) == 1


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": [-Infinity]}', '{"a": 1e999}', "[" * 5000, '{"a": ' + "[" * 99])
def test_arguments_that_are_no_json_are_refused(text):
    with pytest.raises(RequestError):
        arguments_of(text, "arguments", BodyLimits())


def test_what_is_said_is_finite_json():
    assert json.loads(dumps({"a": [float("nan"), {"b": float("-inf")}, 1.5]})) == {"a": [None, {"b": None}, 1.5]}


@pytest.mark.parametrize(
    "text", ["\ud83d", "x\ude00y", "\ud83d\ud83d\ude00", "\\ud83d", "\\\ud83d", "😀", "\ud83du", '"\\']
)
def test_only_half_a_pair_is_replaced_in_a_body(text):
    body = json.dumps({"a": text}).encode()
    assert json.loads(whole_characters(body)) == {"a": writable(text)}
    assert json.loads(whole_characters(body.replace(b"d83d", b"D83D")))["a"] == writable(
        json.loads(body.replace(b"d83d", b"D83D"))["a"]
    )


# -- parts ------------------------------------------------------------------------------------------------------------


def test_the_parts_of_a_message_are_lines():
    parts = [Part(type="text", text="one"), Part(type="text", text="two")]
    assert [text_of(content) for content in (None, "", "one", [], parts)] == ["", "", "one", "", "one\ntwo"]


def test_arguments_are_an_object():
    assert arguments_of("", "arguments", BodyLimits()) == {}
    assert arguments_of('{"a": [1, "\ud83d"]}', "arguments", BodyLimits()) == {"a": [1, "\ud83d"]}
    with pytest.raises(RequestError, match="`arguments` is not a JSON object") as refused:
        arguments_of("[1]", "arguments", BodyLimits())
    assert (refused.value.status, refused.value.param) == (400, "arguments")


def test_a_message_without_calls_has_none():
    assert call_message("hello", []) == {"role": "assistant", "content": "hello"}
    (call,) = call_message("", [("search", {"query": "x"})])["tool_calls"]
    assert call == {"type": "function", "function": {"name": "search", "arguments": {"query": "x"}}}


def test_an_event_is_a_line_of_data():
    assert event({"a": [1, "ä"]}) == b'data: {"a":[1,"\\u00e4"]}\n\n'
    assert event("[DONE]") == b"data: [DONE]\n\n"
    assert event({"type": "x"}, "x") == b'event: x\ndata: {"type":"x"}\n\n'


def test_unknown_fields_are_refused_by_name_unless_they_are_null():
    body = {"messages": [{"role": "user", "content": "hi"}]}
    assert read_body(ChatBody, json.dumps({"model": "m", **body, "extra": None}).encode(), BodyLimits()).model == "m"
    with pytest.raises(RequestError, match="`extra` is not supported") as refused:
        read_body(ChatBody, json.dumps({"model": "m", **body, "extra": 1}).encode(), BodyLimits())
    assert refused.value.param == "extra"
