"""How much a body may consist of is counted before anything of it is validated."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.wire import chat_body
from trl_steppo.gateway.bodies import read_body
from trl_steppo.gateway.conversation import RequestError
from trl_steppo.gateway.limits import BodyLimits, check_structure
from trl_steppo.gateway.openai import ChatBody, CompletionBody

CONTEXT = 2048


HI = {"role": "user", "content": "hi"}
HOSTILE = {
    "malformed, 1.6 MB": chat_body(*[{}] * 400_000),
    "malformed, 7.6 MB": chat_body(*[{"role": 1, "content": 2}] * 240_000),
    "100,000 short messages": chat_body(*[HI] * 100_000),
    "200,000 ids": json.dumps({"model": "m", "prompt": [5] * 200_000}).encode(),
    "nested, 1 MB": b'{"model": "m", "messages": ' + b"[" * 2**20,
}


@pytest.mark.parametrize("body", HOSTILE.values(), ids=HOSTILE)
def test_too_much_is_refused_by_count_before_anything_is_validated(body, monkeypatch):
    for kind in (ChatBody, CompletionBody):
        monkeypatch.setattr(kind, "model_validate_json", None)
        with pytest.raises(RequestError) as refused:
            read_body(kind, body, BodyLimits.of(CONTEXT))
        assert refused.value.status == 400
        assert refused.value.code in ("context_length_exceeded", "too_deep")


@pytest.mark.parametrize(
    ("limits", "body", "code"),
    [
        (BodyLimits(max_values=20, max_items=5), [1] * 21, "context_length_exceeded"),
        (BodyLimits(max_values=20, max_items=5), [1] * 19, None),
        (BodyLimits(max_items=5), [{"a": {"b": 1}}] * 6, "context_length_exceeded"),
        (BodyLimits(max_items=5), [{"a": {"b": 1}}] * 5, None),
        (BodyLimits(max_fields=5), {str(i): i for i in range(6)}, "too_many_fields"),
        (BodyLimits(max_fields=5), {str(i): [0] * 9 for i in range(5)}, None),
        (BodyLimits(max_depth=3), [[[[]]]], "too_deep"),
        (BodyLimits(max_depth=3), [[[]], [[]], [[]], [[]]], None),
        (BodyLimits(max_items=2, max_depth=2, max_values=9), ['[{"[{\\', "{{{,,,,,,,,,", "\\\\"], None),
    ],
)
def test_the_parts_of_json_are_counted(limits, body, code):
    if code is None:
        check_structure(json.dumps(body).encode(), limits)
        return
    with pytest.raises(RequestError) as refused:
        check_structure(json.dumps(body).encode(), limits)
    assert refused.value.code == code


@pytest.mark.parametrize(
    "text", [b'"' * 99, b'["\\', b'[",' * 99, b"}" * 99, b"]]{,,", b'["\\"', b"\\" * 99, b'"a\\\\"']
)
def test_what_is_no_json_is_left_to_the_parser(text):
    check_structure(text, BodyLimits(max_items=0, max_depth=999))


def test_limits_leave_room_for_what_the_context_has_room_for():
    """A conversation of as many messages as fit, with what SDKs send beside them, in every escape."""
    for context in (256, 2048, 32_768):
        message = {"role": "assistant", "content": "\x01\x01", "refusal": None, "annotations": [], "audio": None}
        body = chat_body(*[message] * (context // 6))
        assert len(body) <= BodyLimits.of(context).max_bytes
        check_structure(body, BodyLimits.of(context))
        ids = json.dumps({"model": "m", "prompt": [151_000] * context}).encode()
        assert len(ids) <= BodyLimits.of(context).max_bytes
        check_structure(ids, BodyLimits.of(context))
