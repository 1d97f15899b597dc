"""Responses as pure translation: bodies in, requests; answers in, JSON and events out."""

from __future__ import annotations

from itertools import count

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.wire import ARGUMENTS, CALL, CALLED, CUT, PARAMETERS, SAID, SCORED, SEARCH, asked, events, read
from trl_steppo.gateway.conversation import RequestError, Wishes
from trl_steppo.gateway.responses import RESPONSES

TOOL = {"type": "function", "name": "search", "parameters": PARAMETERS}


def test_text_is_one_message_after_the_instructions():
    request = asked(
        RESPONSES, input="hello", instructions="Be brief.", max_output_tokens=5, temperature=0.5, top_p=0.9
    )
    assert request.messages == ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"})
    assert request.wishes == Wishes(5, 0.5, 0.9)
    assert (request.logprobs, request.tools, request.ignored) == (False, (), ())


def test_items_of_one_turn_are_one_message():
    call = {"type": "function_call", "call_id": "c1", "name": "search", "arguments": ARGUMENTS}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": "Let me see."},
        call,
        {**call, "call_id": "c2"},
        {"type": "function_call_output", "call_id": "c2", "output": "found"},
        {"role": "developer", "content": "Go on."},
        {"role": "assistant", "content": "Done."},
    ]
    request = asked(RESPONSES, input=items, tools=[TOOL])
    function = {"type": "function", "function": {"name": "search", "arguments": {"query": "Bonn", "count": 3}}}
    assert request.messages == (
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [function, function]},
        {"role": "tool", "name": "search", "content": "found"},
        {"role": "system", "content": "Go on."},
        {"role": "assistant", "content": "Done."},
    )
    assert (request.call_ids, request.tools) == (("c1", "c2"), (SEARCH,))


def test_what_has_no_effect_is_named():
    ignored = {"tool_choice": "required", "parallel_tool_calls": False, "reasoning": {"effort": "low"}}
    assert asked(RESPONSES, input="x", **ignored).ignored == tuple(ignored)
    assert asked(RESPONSES, input="x", tools=[TOOL], tool_choice="none").tools == ()
    assert asked(RESPONSES, input="x", include=["message.output_text.logprobs"]).logprobs


def test_a_whole_response():
    whole = RESPONSES.whole(SAID, read(RESPONSES, input="x", metadata={"a": "b"}))
    (item,) = whole["output"]
    part = {"type": "output_text", "text": SAID.text, "annotations": [], "logprobs": []}
    message = {"id": "msg_a1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    assert (whole["id"], whole["object"], whole["status"], whole["created_at"]) == (
        "resp_a1",
        "response",
        "completed",
        7,
    )
    assert (whole["metadata"], whole["incomplete_details"], item) == ({"a": "b"}, None, message)
    assert whole["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 13,
    }


def test_a_response_tells_what_it_was_asked_with():
    whole = RESPONSES.whole(SAID, read(RESPONSES, input="x", tools=[TOOL], tool_choice="auto", temperature=0.5))
    (tool,) = whole["tools"]
    assert {name: value for name, value in tool.items() if value is not None} == TOOL
    assert (whole["tool_choice"], whole["temperature"], whole["top_p"], whole["store"]) == ("auto", 0.5, None, False)


def test_thoughts_and_calls_are_items_of_their_own():
    thought, call = RESPONSES.whole(CALLED, read(RESPONSES, input="x"))["output"]
    assert thought == {
        "type": "reasoning",
        "id": "rs_a1",
        "summary": [{"type": "summary_text", "text": "Where is it?"}],
    }
    assert call == {
        "type": "function_call",
        "id": f"fc_{CALL['id']}",
        "call_id": CALL["id"],
        "name": "search",
        "arguments": ARGUMENTS,
        "status": "completed",
    }


def test_a_cut_response_is_incomplete():
    whole = RESPONSES.whole(CUT, read(RESPONSES, input="x"))
    assert (whole["status"], whole["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


@pytest.mark.parametrize("answer", [SAID, CALLED, CUT, SCORED], ids=["said", "called", "cut", "scored"])
def test_a_stream_adds_up_to_the_whole(answer):
    body = read(RESPONSES, input="x", stream=True)
    sent, whole = events(RESPONSES.stream(answer, body)), RESPONSES.whole(answer, body)
    assert [one["sequence_number"] for one in sent] == [number for number, _ in zip(count(), sent, strict=False)]
    assert [one["type"] for one in sent[:2]] == ["response.created", "response.in_progress"]
    assert sent[0]["response"] == {
        **whole,
        "status": "in_progress",
        "incomplete_details": None,
        "output": [],
        "usage": None,
    }
    assert (sent[-1]["type"], sent[-1]["response"]) == (f"response.{whole['status']}", whole)
    done = [one["item"] for one in sent if one["type"] == "response.output_item.done"]
    assert done == whole["output"]
    for index, item in enumerate(done):
        deltas = [one["delta"] for one in sent if one["type"].endswith(".delta") and one["output_index"] == index]
        (text,) = [part["text"] for part in item.get("content", ())] or [item.get("arguments", "")]
        assert "".join(deltas) == text


def test_a_failure_in_a_stream_is_an_event_with_its_message_in_two_places():
    (sent,) = events([RESPONSES.error_event(RequestError(502, "no", code="upstream"))])
    error = {"message": "no", "type": "server_error", "param": None, "code": "upstream"}
    shown = {"code": "upstream", "message": "no", "param": None}
    assert sent == {"type": "error", "sequence_number": 0, **shown, "error": error}
