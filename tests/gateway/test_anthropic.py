"""Anthropic's messages as pure translation: bodies in, requests; answers in, JSON and events out."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.wire import ARGUMENTS, CALL, CALLED, CUT, PARAMETERS, SAID, SEARCH, asked, events, read
from trl_steppo.gateway.anthropic import MESSAGES, error_body
from trl_steppo.gateway.conversation import RequestError, Wishes

USER = {"role": "user", "content": "hello"}
TOOL = {"name": "search", "input_schema": PARAMETERS}


def test_a_conversation_becomes_messages_in_our_own_form():
    """Tools' answers come before what the user says."""
    messages = [
        USER,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "c1", "name": "search", "input": CALL["arguments"]},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "and?"},
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "found"}]},
            ],
        },
    ]
    request = asked(
        MESSAGES, max_tokens=5, messages=messages, system=[{"type": "text", "text": "Be brief."}], tools=[TOOL]
    )
    function = {"name": "search", "arguments": CALL["arguments"]}
    assert request.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [{"type": "function", "function": function}],
        },
        {"role": "tool", "name": "search", "content": "found"},
        {"role": "user", "content": "and?"},
    )
    assert (request.call_ids, request.tools) == (("c1",), (SEARCH,))


def test_wishes_are_taken_and_what_has_no_effect_is_named():
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "stop_sequences": ["x", ""]}
    request = asked(MESSAGES, max_tokens=5, messages=[USER], **sampling)
    assert (request.wishes, request.ignored) == (Wishes(5, 0.5, 0.9, 3, None, ("x",)), ())
    ignored = {"tool_choice": {"type": "any"}, "thinking": {"type": "enabled"}}
    assert asked(MESSAGES, max_tokens=5, messages=[USER], **ignored).ignored == tuple(ignored)
    none = asked(MESSAGES, max_tokens=5, messages=[USER], tools=[TOOL], tool_choice={"type": "none"})
    assert (none.tools, none.ignored) == ((), ())


def test_a_response_cannot_be_begun_for_the_model():
    with pytest.raises(RequestError, match="the last of `messages`") as refused:
        asked(MESSAGES, max_tokens=5, messages=[USER, {"role": "assistant", "content": "{"}])
    assert (refused.value.status, refused.value.param) == (400, "messages")


def test_a_whole_message():
    body = read(MESSAGES, max_tokens=5, messages=[USER])
    assert MESSAGES.whole(SAID, body) == {
        "id": "msg_a1",
        "type": "message",
        "role": "assistant",
        "model": "m",
        "content": [{"type": "text", "text": SAID.text}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 6,
            "cache_read_input_tokens": 4,
            "cache_creation_input_tokens": 0,
            "output_tokens": 3,
        },
    }


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (CALLED, "tool_use"),
        (CUT, "max_tokens"),
        (replace(SAID, stop_sequence="x"), "stop_sequence"),
    ],
    ids=["called", "cut", "stopped"],
)
def test_why_a_message_ends(answer, reason):
    whole = MESSAGES.whole(answer, read(MESSAGES, max_tokens=5, messages=[USER]))
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, answer.stop_sequence)


def test_thoughts_and_calls_are_blocks_of_their_own():
    assert MESSAGES.whole(CALLED, read(MESSAGES, max_tokens=5, messages=[USER]))["content"] == [
        {"type": "thinking", "thinking": "Where is it?", "signature": ""},
        {"type": "tool_use", "id": CALL["id"], "name": "search", "input": CALL["arguments"]},
    ]


@pytest.mark.parametrize("answer", [SAID, CALLED, CUT], ids=["said", "called", "cut"])
def test_a_stream_adds_up_to_the_whole(answer):
    body = read(MESSAGES, max_tokens=5, messages=[USER], stream=True)
    sent, whole = events(MESSAGES.stream(answer, body)), MESSAGES.whole(answer, body)
    start, *blocks, delta, stop = sent
    empty = {
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**whole["usage"], "output_tokens": 0},
    }
    assert start == {"type": "message_start", "message": {**whole, **empty}}
    assert delta["delta"] == {"stop_reason": whole["stop_reason"], "stop_sequence": whole["stop_sequence"]}
    assert (delta["usage"], stop) == (whole["usage"], {"type": "message_stop"})
    for index, block in enumerate(whole["content"]):
        opening, *deltas, closing = [one for one in blocks if one["index"] == index]
        field, text = {
            "text": ("text", block.get("text")),
            "thinking": ("thinking", block.get("thinking")),
            "tool_use": ("partial_json", ARGUMENTS),
        }[block["type"]]
        emptied = {"input": {}} if block["type"] == "tool_use" else {field: ""}
        assert opening == {"type": "content_block_start", "index": index, "content_block": {**block, **emptied}}
        assert "".join(one["delta"][field] for one in deltas) == text
        assert closing == {"type": "content_block_stop", "index": index}


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (502, "api_error"),
    ],
)
def test_a_refusal_says_what_kind_it_is(status, kind):
    error = RequestError(status, "no", param="p", code="c")
    assert MESSAGES.error(error) == error_body(error) == {"type": "error", "error": {"type": kind, "message": "no"}}
    assert events([MESSAGES.error_event(error)]) == [error_body(error)]
