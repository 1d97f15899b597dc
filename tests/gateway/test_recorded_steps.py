"""What of a response is recorded, and what its client is told of it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.gateway_policy import END, Policy, call
from tests.gateway.session_client import SEARCH, USER, Client, text
from trl_steppo.gateway.sampling import SamplerLoop
from trl_steppo.types import StopReason


def test_tool_calls_and_their_answers(server):
    def script(prompt: str, order: tuple[int, ...]) -> str:
        return "let me see " + call("search", query="Bonn") if order[2] == 0 else "It is Bonn."

    server.resume(SamplerLoop(Policy(script)))
    client = Client(server)
    completion = client.chat([USER], tools=[SEARCH]).json()
    (choice,) = completion["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (made,) = choice["message"]["tool_calls"]
    assert choice["message"]["content"] == "let me see"
    assert (made["function"]["name"], json.loads(made["function"]["arguments"])) == ("search", {"query": "Bonn"})
    answer = {"role": "tool", "tool_call_id": made["id"], "content": "Bonn is a city."}
    assert client.say([USER, choice["message"], answer], tools=[SEARCH])["content"] == "It is Bonn."
    first, second = client.episode().steps
    assert first.observation == [{"role": "tool", "name": "search", "content": "Bonn is a city."}]
    assert second.prompt_ids.tolist()[: len(first.prompt_ids) + len(first.response_ids)] == [
        *first.prompt_ids,
        *first.response_ids,
    ]


def test_a_stop_text_cuts_the_recorded_response_where_sampling_would_have_ended(server):
    server.resume(SamplerLoop(Policy(lambda prompt, order: "Thought: yes\nObservation: made up")))
    client = Client(server)
    completion = client.chat([USER], stop=["Observation:"]).json()
    assert completion["choices"][0]["message"]["content"] == "Thought: yes\n"
    (step,) = client.episode().steps
    assert text(step.response_ids) == "Thought: yes\nObservation:"
    assert step.stop_reason is StopReason.STOP
    assert len(step.rollout_logprobs) == len(step.response_ids)


def test_the_response_ends_with_the_end_of_its_turn(client):
    client.say([USER])
    (step,) = client.episode().steps
    assert text(step.response_ids).endswith(END)
    assert step.stop_reason is StopReason.STOP


def test_logprobs_are_the_recorded_ones(client):
    completion = client.chat([USER], logprobs=True).json()
    tokens = completion["choices"][0]["logprobs"]["content"]
    (step,) = client.episode().steps
    assert tuple(token["logprob"] for token in tokens) == step.rollout_logprobs
    assert "".join(token["token"] for token in tokens) == text(step.response_ids)


def test_bytes_are_told_of_whole_characters_alone(server):
    server.resume(SamplerLoop(Policy(lambda prompt, order: "aä")))
    client = Client(server)
    chat = client.chat([USER], logprobs=True).json()["choices"][0]["logprobs"]["content"]
    include = {"include": ["message.output_text.logprobs"]}
    other = client.post("/v1/responses", {"model": "m", "input": "x", **include}).json()
    for tokens in (chat, other["output"][0]["content"][0]["logprobs"]):
        assert [token["bytes"] for token in tokens] == [[97], None, None, list(END.encode())]
