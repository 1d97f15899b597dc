"""The gateway's APIs over templates of every form of tool calls: thoughts, text and calls each in their place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.chat.formats.call_writers import OPEN_THOUGHT, WRITERS, make_tokenizer
from tests.gateway.gateway_policy import ADMIN, make_spec
from trl_steppo.gateway import GatewayServer
from trl_steppo.gateway.sampling import SamplerLoop
from trl_steppo.gateway.tokens import ChatFormats
from trl_steppo.testing import ScriptedSampler

TEMPLATES = ("qwen3", "qwen3_5_think", "glm4moe", "llama3_1", "gptoss", "gemma4", "lfm2_2_5", "muse_glimmer", "phi3")
# Behind what was thought, these write an earlier answer differently; without tools they cannot be appended to.
NEEDS_TOOLS = ("glm4moe", "gptoss", "lfm2_2_5")
PARAMETERS = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "description": "What."},
        "count": {"type": "integer", "description": "How often."},
    },
    "required": ["text"],
}
TOOLS = [{"type": "function", "function": {"name": "act", "description": "Act.", "parameters": PARAMETERS}}]
ARGUMENTS = {"text": "02134", "count": 3}


class Session:
    """A client of one session, and what the model says to it."""

    def __init__(self, server: GatewayServer, policy: ScriptedSampler, template: str) -> None:
        self.policy, self.writer = policy, WRITERS[template]
        self.has_toolless = template not in NEEDS_TOOLS
        self.asked = 0
        self.opened = template in OPEN_THOUGHT
        session, key = server.call(server.gateway.open_session(make_spec(response_length=2000)))
        self.session = session
        self.http = httpx.Client(base_url=server.origin, headers={"authorization": f"Bearer {key}"}, timeout=20)

    def says(self, *parts: Any) -> None:
        written = self.writer.turn(parts)
        self.policy.script = written.removeprefix("<think>\n") if self.opened else written

    def user(self) -> dict[str, str]:
        """A new message: the same request again would be taken for a retry."""
        self.asked += 1
        return {"role": "user", "content": f"Do it, {self.asked}."}

    def post(self, path: str, **body: Any) -> Any:
        response = self.http.post(path, json={"model": "m", **body})
        assert response.status_code == 200, response.text
        return json.loads(response.text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.fixture(params=TEMPLATES)
def session(request: Any) -> Iterator[Session]:
    tokenizer = make_tokenizer(request.param)
    policy = ScriptedSampler("", tokenizer=tokenizer, ends_turns=False)
    server = GatewayServer(ChatFormats(tokenizer), default=make_spec(), admin_key=ADMIN).start()
    server.resume(SamplerLoop(policy))
    yield Session(server, policy, request.param)
    server.close()


THOUGHT, ANSWER = ("think", "Hm, <b>."), ("text", "In Paris.")
CALL = ("call", "act", ARGUMENTS)
BROKEN = ("call", "act", {"text": "x", "count": float("nan")})


def test_chat_completions(session: Session) -> None:
    for more in [{}, {"tools": TOOLS}][not session.has_toolless :]:
        session.says(THOUGHT, ANSWER)
        message = session.post("/v1/chat/completions", messages=[session.user()], **more)["choices"][0]["message"]
        assert (message["content"], message["reasoning_content"]) == ("In Paris.", "Hm, <b>.")
    session.says(THOUGHT, CALL)
    message = session.post("/v1/chat/completions", messages=[session.user()], tools=TOOLS)["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm, <b>."
    function = message["tool_calls"][0]["function"]
    assert (function["name"], json.loads(function["arguments"])) == ("act", ARGUMENTS)
    session.says(THOUGHT, BROKEN)
    message = session.post("/v1/chat/completions", messages=[session.user()], tools=TOOLS)["choices"][0]["message"]
    assert "tool_calls" not in message
    assert "act" in message["content"]


def test_messages(session: Session) -> None:
    tools = [{"name": "act", "description": "Act.", "input_schema": PARAMETERS}]
    for more in [{}, {"tools": tools}][not session.has_toolless :]:
        session.says(THOUGHT, ANSWER)
        blocks = session.post("/v1/messages", messages=[session.user()], max_tokens=2000, **more)["content"]
        assert [(one["type"], one.get("text") or one["thinking"]) for one in blocks] == [
            ("thinking", "Hm, <b>."),
            ("text", "In Paris."),
        ]
    session.says(THOUGHT, CALL)
    block = session.post("/v1/messages", messages=[session.user()], max_tokens=2000, tools=tools)["content"][-1]
    assert (block["type"], block["name"], block["input"]) == ("tool_use", "act", ARGUMENTS)
    session.says(THOUGHT, BROKEN)
    block = session.post("/v1/messages", messages=[session.user()], max_tokens=2000, tools=tools)["content"][-1]
    assert block["type"] == "text"


def test_responses(session: Session) -> None:
    tools = [{"type": "function", "name": "act", "description": "Act.", "parameters": PARAMETERS}]
    for more in [{}, {"tools": tools}][not session.has_toolless :]:
        session.says(THOUGHT, ANSWER)
        thought, said = session.post("/v1/responses", input=[session.user()], **more)["output"]
        assert thought["summary"][0]["text"] == "Hm, <b>."
        assert said["content"][0]["text"] == "In Paris."
    session.says(THOUGHT, CALL)
    item = session.post("/v1/responses", input=[session.user()], tools=tools)["output"][-1]
    assert (item["type"], item["name"], json.loads(item["arguments"])) == ("function_call", "act", ARGUMENTS)
    session.says(THOUGHT, BROKEN)
    assert session.post("/v1/responses", input=[session.user()], tools=tools)["output"][-1]["type"] == "message"


def test_completions_continue_a_text_as_it_is(session: Session) -> None:
    if not session.has_toolless:
        pytest.skip("the template cannot be used without tools")
    session.says(ANSWER)
    text = session.post("/v1/completions", prompt="Where?")["choices"][0]["text"]
    assert "In Paris." in text


def test_a_history_without_the_thoughts_goes_on(session: Session) -> None:
    session.says(THOUGHT, ANSWER)
    if not session.has_toolless:
        pytest.skip("the template cannot be used without tools")
    user = session.user()
    reply = session.post("/v1/chat/completions", messages=[user])["choices"][0]["message"]
    messages = [user, {"role": "assistant", "content": reply["content"]}, {"role": "user", "content": "Sure?"}]
    session.post("/v1/chat/completions", messages=messages)
    assert session.session.steps[1].parent == 0


def test_a_stop_text_ends_what_was_said(session: Session) -> None:
    session.says(THOUGHT, ANSWER)
    body = {"messages": [session.user()], "stop": ["Paris"], "tools": TOOLS}
    message = session.post("/v1/chat/completions", **body)["choices"][0]["message"]
    assert (message["content"].strip(), message["reasoning_content"]) == ("In", "Hm, <b>.")
