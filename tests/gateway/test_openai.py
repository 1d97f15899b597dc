"""Chat completions and completions as pure translation: bodies in, requests; answers in, JSON and events out."""

from __future__ import annotations

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.wire import ARGUMENTS, CALL, CALLED, CUT, SAID, SCORED, SEARCH, asked, events, read
from trl_steppo.gateway.conversation import RequestError, Wishes
from trl_steppo.gateway.openai import CHAT_COMPLETIONS, COMPLETIONS, error_body

USER = {"role": "user", "content": "hello"}
USAGE = {
    "prompt_tokens": 10,
    "completion_tokens": 3,
    "total_tokens": 13,
    "prompt_tokens_details": {"cached_tokens": 4},
}


# -- requests ---------------------------------------------------------------------------------------------------------


def test_a_conversation_becomes_messages_in_our_own_form():
    call = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": ARGUMENTS}}
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "c1", "content": "found"},
    ]
    request = asked(CHAT_COMPLETIONS, messages=messages, tools=[SEARCH])
    function = {"name": "search", "arguments": {"query": "Bonn", "count": 3}}
    assert request.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "name": "search", "content": "found"},
    )
    assert (request.model, request.prompt, request.call_ids, request.tools) == ("m", None, ("c1",), (SEARCH,))


def test_wishes_are_taken_and_what_has_no_effect_is_named():
    sampling = {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": -1, "stop": ["x", ""], "max_tokens": 5}
    request = asked(CHAT_COMPLETIONS, messages=[USER], logprobs=True, **sampling)
    assert request.wishes == Wishes(5, 0.5, 0.9, 3, -1, ("x",))
    assert (request.logprobs, request.ignored) == (True, ())
    ignored = {"tool_choice": "required", "parallel_tool_calls": False, "reasoning_effort": "low", "verbosity": "low"}
    assert asked(CHAT_COMPLETIONS, messages=[USER], **ignored).ignored == tuple(ignored)
    assert asked(CHAT_COMPLETIONS, messages=[USER], max_tokens=5, max_completion_tokens=9).wishes.max_tokens == 9


def test_tools_are_not_shown_where_none_may_be_called():
    assert asked(CHAT_COMPLETIONS, messages=[USER], tools=[SEARCH], tool_choice="none").tools == ()


def test_the_arguments_of_a_call_have_to_be_an_object():
    call = {"id": "c1", "function": {"name": "search", "arguments": "[1]"}}
    with pytest.raises(RequestError, match=r"`messages\.1\.tool_calls\.0\.function\.arguments` is not a JSON object"):
        asked(CHAT_COMPLETIONS, messages=[USER, {"role": "assistant", "tool_calls": [call]}])


@pytest.mark.parametrize(("prompt", "read_as"), [("Once", "Once"), (["Once"], "Once"), ([5, 6], (5, 6)), ([5], (5,))])
def test_a_prompt_is_text_or_token_ids(prompt, read_as):
    request = asked(COMPLETIONS, prompt=prompt, logprobs=0, stop="x")
    assert (request.prompt, request.messages, request.logprobs) == (read_as, None, True)
    assert request.wishes == Wishes(stop=("x",))


@pytest.mark.parametrize("prompt", ["", [], [""]])
def test_an_empty_prompt_is_refused(prompt):
    with pytest.raises(RequestError, match="`prompt` is empty") as refused:
        asked(COMPLETIONS, prompt=prompt)
    assert (refused.value.status, refused.value.param) == (400, "prompt")


# -- responses --------------------------------------------------------------------------------------------------------


def test_a_whole_chat_completion():
    body = read(CHAT_COMPLETIONS, messages=[USER])
    message = {"role": "assistant", "content": SAID.text, "refusal": None}
    assert CHAT_COMPLETIONS.whole(SAID, body) == {
        "id": "chatcmpl-a1",
        "object": "chat.completion",
        "created": 7,
        "model": "m",
        "system_fingerprint": None,
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}],
        "usage": USAGE,
    }


def test_a_tool_call_has_its_arguments_as_text_and_no_content():
    body = read(CHAT_COMPLETIONS, messages=[USER])
    (choice,) = CHAT_COMPLETIONS.whole(CALLED, body)["choices"]
    function = {"name": "search", "arguments": ARGUMENTS}
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "tool_calls": [{"id": CALL["id"], "type": "function", "function": function}],
        "reasoning_content": "Where is it?",
    }


@pytest.mark.parametrize("answer", [SAID, CALLED, CUT, SCORED], ids=["said", "called", "cut", "scored"])
def test_a_chat_stream_adds_up_to_the_whole(answer):
    body = read(CHAT_COMPLETIONS, messages=[USER], stream=True)
    *chunks, done = events(CHAT_COMPLETIONS.stream(answer, body))
    (whole,) = CHAT_COMPLETIONS.whole(answer, body)["choices"]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    deltas = [choice["delta"] for choice in choices]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert done == "[DONE]"
    assert {(chunk["id"], chunk["object"]) for chunk in chunks} == {("chatcmpl-a1", "chat.completion.chunk")}
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + [answer.finish_reason]
    assert "".join(delta.get("content") or "" for delta in deltas) == answer.text
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == answer.reasoning
    assert choices[0]["logprobs"] == whole["logprobs"]
    if calls:
        opening, *rest = calls
        assert (opening["id"], opening["function"]["name"], opening["index"]) == (CALL["id"], "search", 0)
        assert "".join(call["function"]["arguments"] for call in rest) == ARGUMENTS


@pytest.mark.parametrize(
    ("dialect", "asks"), [(CHAT_COMPLETIONS, {"messages": [USER]}), (COMPLETIONS, {"prompt": "x"})]
)
def test_a_stream_ends_with_the_numbers_of_tokens_where_they_are_asked_for(dialect, asks):
    body = read(dialect, stream=True, stream_options={"include_usage": True}, **asks)
    *chunks, last, done = events(dialect.stream(SAID, body))
    assert (last["choices"], last["usage"], done) == ([], USAGE, "[DONE]")
    assert {chunk["usage"] for chunk in chunks} == {None}


def test_logprobs_name_each_token_with_its_bytes_where_it_has_some():
    body = read(CHAT_COMPLETIONS, messages=[USER], logprobs=True)
    (choice,) = CHAT_COMPLETIONS.whole(SCORED, body)["choices"]
    tokens = choice["logprobs"]["content"]
    assert [(token["token"], token["logprob"], token["bytes"]) for token in tokens] == [
        ("a", -0.5, [97]),
        ("\ufffd", -1.0, None),
        ("\ufffd", -2.0, None),
    ]


def test_a_whole_completion():
    body = read(COMPLETIONS, prompt="Once", logprobs=1)
    logprobs = {
        "tokens": ["a", "\ufffd", "\ufffd"],
        "token_logprobs": [-0.5, -1.0, -2.0],
        "top_logprobs": None,
        "text_offset": [0, 1, 2],
    }
    assert COMPLETIONS.whole(SCORED, body) == {
        "id": "cmpl-a1",
        "object": "text_completion",
        "created": 7,
        "model": "m",
        "choices": [{"index": 0, "text": "aä", "finish_reason": "stop", "logprobs": logprobs}],
        "usage": USAGE,
    }


def test_a_completion_stream_adds_up_to_the_whole():
    body = read(COMPLETIONS, prompt="Once", stream=True)
    *chunks, done = events(COMPLETIONS.stream(CUT, body))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert done == "[DONE]"
    assert "".join(choice["text"] for choice in choices) == CUT.text
    assert [choice["finish_reason"] for choice in choices] == [None, "length"]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (413, "invalid_request_error"),
        (429, "rate_limit_error"),
        (502, "server_error"),
    ],
)
def test_a_refusal_says_what_kind_it_is(status, kind):
    error = RequestError(status, "no", param="p", code="c")
    assert error_body(error) == {"error": {"message": "no", "type": kind, "param": "p", "code": "c"}}
    for dialect in (CHAT_COMPLETIONS, COMPLETIONS):
        assert dialect.error(error) == error_body(error)
        assert events([dialect.error_event(error)]) == [error_body(error)]
