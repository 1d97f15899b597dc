"""What a client is told that has taken the wrong address, or asks when its session is over."""

from __future__ import annotations

import re

import httpx
import pytest

from tests.gateway.session_client import USER

BODIES = {
    "chat/completions": {"messages": [USER]},
    "completions": {"prompt": "hello"},
    "responses": {"input": "hello"},
    "messages": {"messages": [USER], "max_tokens": 9},
}


@pytest.mark.parametrize("prefix", ["", "/v1/v1"])
@pytest.mark.parametrize("path", BODIES)
def test_a_base_url_without_or_with_two_v1_is_answered(client, path, prefix):
    assert client.post(f"{prefix}/{path}", {"model": "m", **BODIES[path]}).status_code == 200
    refused = client.post(f"{prefix}/{path}", {"model": "m", **BODIES[path], "nonsense": 1})
    assert refused.status_code == 400
    assert (refused.json().get("type") == "error") is (path == "messages"), "an error in the API's own form"
    assert client.http.get(f"{prefix}/models").status_code == 200


def test_a_path_that_is_not_there_says_what_the_addresses_are(client):
    origin = client.server.origin
    refused = client.post("/api/chat", {})
    assert refused.status_code == 404
    message = refused.json()["error"]["message"]
    assert "there is nothing at '/api/chat'" in message
    assert f"OpenAI's clients is {origin}/v1" in message
    assert f"Anthropic's {origin};" in message


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("kept", [True, False])
def test_a_finished_session_s_key_says_how_it_ended(client, path, kept):
    """Also where the gateway has forgotten all but the record, as after a restart, or the record itself."""
    gateway = client.server.gateway
    client.say([USER])
    client.post("/sessions/current/finish", {"reward": 1.0})
    if kept:
        gateway._ended.clear()
    else:
        client.server.call(gateway.collect(client.session, keep=False))
    refused = client.post(f"/v1/{path}", {"model": "m", **BODIES[path]})
    assert refused.status_code == 401
    message = refused.json()["error"]["message"]
    pattern = r"the session of this key is over since \d\d:\d\d:\d\d \(\d s ago\), with 1 steps: it was finished"
    assert re.match(pattern, message), message
    for name in ("reward",):
        assert "is over" in client.post(f"/sessions/current/{name}", {"reward": 1.0}).json()["error"]["message"]
    assert "is over" in client.http.get("/v1/models").json()["error"]["message"]


def test_a_session_that_failed_says_why(client):
    client.say([USER])
    client.post("/sessions/current/abort", {"error": "the board fell over"})
    assert "it failed: the board fell over" in client.chat([USER]).json()["error"]["message"]


def test_a_key_that_never_was_is_not_valid(client):
    refused = httpx.post(f"{client.server.base_url}/chat/completions", headers={"authorization": "Bearer sk-none"})
    assert refused.json()["error"]["message"] == "this key is not valid here"


@pytest.mark.parametrize(
    ("path", "wish", "name"),
    [
        ("chat/completions", {"response_format": {"type": "json_object"}}, "response_format"),
        ("responses", {"text": {"format": {"type": "json_object"}}}, "text.format"),
    ],
)
def test_json_is_asked_for_by_the_prompt(client, path, wish, name):
    body = {"model": "m", **BODIES[path], **wish}
    first, second = client.post(f"/v1/{path}", body), client.post(f"/v1/{path}", {**body, "user": "again"})
    assert (first.status_code, second.status_code) == (200, 200)
    assert first.headers["x-steppo-note"].startswith(f"{name} is not used: the response is sampled freely")
    assert "x-steppo-note" not in second.headers


@pytest.mark.parametrize(
    ("path", "wish"),
    [
        ("chat/completions", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}}),
        ("responses", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {}, "strict": True}}}),
    ],
)
def test_a_schema_that_the_policy_would_never_read_is_refused(client, path, wish):
    refused = client.post(f"/v1/{path}", {"model": "m", **BODIES[path], **wish})
    assert refused.status_code == 400
    assert "does not see the schema. Say in the prompt" in refused.json()["error"]["message"]
    assert client.session.steps == []
