"""How clients would like their responses sampled: what holds, what is refused, what they are told."""

from __future__ import annotations

from dataclasses import replace

import httpx
import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
from tests.gateway.gateway_policy import ADMIN, make_spec
from tests.gateway.session_client import SEARCH, USER, Client
from trl_steppo.gateway.conversation import ModelRequest, RequestError, Wishes
from trl_steppo.gateway.wishes import check_wishes, sampling_params, unmet_wishes


def test_the_runs_own_sampling_holds_and_the_client_is_told_once(client, policy):
    asked = {"temperature": 0.3, "seed": 5, "max_tokens": 9000, "tool_choice": "required", "tools": [SEARCH]}
    first, second = client.chat([USER], **asked), client.chat([USER, {"role": "user", "content": "b"}], **asked)
    for field in ("temperature", "seed", "200 tokens", "tool_choice"):
        assert field in first.headers["x-steppo-note"]
    assert "x-steppo-note" not in second.headers
    params = policy.asked[0][1]
    assert (params.temperature, params.max_new_tokens) == (1.0, 200)
    assert client.chat([USER], max_completion_tokens=4).json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/chat/completions", {"top_p": 0.9}, "top_p"),
        ("/v1/chat/completions", {"top_k": 5}, "top_k"),
        ("/v1/chat/completions", {"n": 2}, "n"),
        ("/v1/chat/completions", {"presence_penalty": 0.1}, "presence_penalty"),
        ("/v1/chat/completions", {"frequency_penalty": -0.1}, "frequency_penalty"),
        ("/v1/chat/completions", {"logit_bias": {"5": 1.0}}, "logit_bias"),
        ("/v1/chat/completions", {"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format"),
        (
            "/v1/responses",
            {"input": "x", "messages": None, "text": {"format": {"type": "json_schema", "name": "x", "schema": {}}}},
            "text.format",
        ),
        ("/v1/chat/completions", {"no_such_field": 1}, "no_such_field"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ("/v1/responses", {"input": "x", "messages": None, "previous_response_id": "resp_1"}, "previous_response_id"),
        ("/v1/messages", {"max_tokens": 5, "top_k": 3}, "top_k"),
        ("/v1/messages", {"max_tokens": 5, "container": "c"}, "container"),
    ],
)
def test_what_cannot_be_scored_or_is_not_supported_is_refused_by_name(client, path, body, field):
    whole = {name: value for name, value in {"model": "m", "messages": [USER], **body}.items() if value is not None}
    refused = client.post(path, whole)
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert field in error["message"]
    if path == "/v1/messages":
        assert refused.json()["type"] == "error"
        assert error["type"] == "invalid_request_error"
    else:
        assert error["param"].startswith(field)
    assert client.session.steps == []


def test_outside_of_training_clients_choose(server, policy):
    client = Client(server, make_spec(training=False))
    client.say([USER], temperature=0.3, top_p=0.9, top_k=4, seed=11)
    params = policy.asked[0][1]
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (0.3, 0.9, 4, 11)


def test_an_odd_number_of_a_client_is_its_own_matter(server, policy):
    """Seeds are taken as they come; what no sampler can divide by is refused before it gets there."""
    client = Client(server, make_spec(training=False))
    client.say([USER], seed=-1)
    assert policy.asked[0][1].seed == 2**63 - 1
    refused = client.chat([USER, USER], temperature=1e-50)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
    assert client.say([USER, USER], temperature=0.0)
    Client(server).say([USER], temperature=1e-50)  # the run's own temperature holds there
    admin = httpx.Client(base_url=server.origin, headers={"authorization": f"Bearer {ADMIN}"})
    refused = admin.post("/sessions", json={"temperature": 1e-50})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")


def test_sessions_that_say_no_seed_are_sampled_apart(server, policy):
    admin = httpx.Client(base_url=server.origin, headers={"authorization": f"Bearer {ADMIN}"})
    for body in ({}, {}, {"seed": 3}, {"seed": 3}):
        own = {"authorization": f"Bearer {admin.post('/sessions', json=body).json()['api_key']}"}
        httpx.post(f"{server.base_url}/chat/completions", json={"model": "m", "messages": [USER]}, headers=own)
    first, second, third, fourth = (params.seed for _, params, _ in policy.asked)
    assert len({first, second, third}) == 3
    assert third == fourth


def test_what_of_a_message_has_no_effect_is_told(client):
    answer = client.chat([{**USER, "name": "Ann"}, {"role": "assistant", "refusal": "no"}, USER])
    assert "name is not used" in answer.headers["x-steppo-note"]
    assert "refusal is not used" in answer.headers["x-steppo-note"]


# -- without HTTP -----------------------------------------------------------------------------------------------------


def test_a_response_has_the_smallest_of_its_budgets():
    spec = make_spec(max_episode_tokens=100, response_length=50)
    for max_tokens, prompt_length, context, budget in [
        (None, 10, None, 50),
        (20, 10, None, 20),
        (None, 80, None, 20),
        (None, 10, 40, 30),
        (500, 10, None, 50),
    ]:
        params = sampling_params(spec, Wishes(max_tokens), 0, prompt_length, context=context)
        assert params.max_new_tokens == budget


def test_wishes_hold_outside_of_training_alone():
    wishes = Wishes(temperature=0.3, top_p=0.9, top_k=4, seed=-1)
    spec = make_spec(run_seed=7)
    run, free = (sampling_params(replace(spec, training=training), wishes, 2, 10) for training in (True, False))
    assert run == sampling_params(spec, Wishes(), 2, 10)
    assert (free.temperature, free.top_p, free.top_k, free.seed) == (0.3, 0.9, 4, 2**63 - 1)
    assert sampling_params(spec, Wishes(), 3, 10).seed != run.seed


def test_what_does_not_hold_is_told_by_the_name_of_its_field():
    wishes = Wishes(max_tokens=900, temperature=0.3, seed=1)
    request = ModelRequest("m", prompt="x", wishes=wishes, ignored=("verbosity",))
    unmet = unmet_wishes(make_spec(), request)
    assert list(unmet) == ["verbosity", "max_tokens", "temperature", "seed"]
    assert list(unmet_wishes(make_spec(training=False), request)) == ["verbosity", "max_tokens"]
    assert unmet_wishes(make_spec(), ModelRequest("m", prompt="x", wishes=Wishes(200, 1.0))) == {}


@pytest.mark.parametrize(
    ("training", "wishes", "field"),
    [
        (True, Wishes(top_p=0.9), "top_p"),
        (True, Wishes(top_k=5), "top_k"),
        (True, Wishes(top_p=1.0, top_k=0, temperature=1e-50), None),
        (False, Wishes(top_p=0.9, top_k=5, temperature=0.0), None),
        (False, Wishes(temperature=1e-50), "temperature"),
    ],
)
def test_what_cannot_be_scored_or_sampled_is_refused(training, wishes, field):
    spec = make_spec(training=training)
    if field is None:
        check_wishes(spec, wishes)
        return
    with pytest.raises(RequestError, match=f"`{field}`") as refused:
        check_wishes(spec, wishes)
    assert (refused.value.status, refused.value.param) == (400, field)
