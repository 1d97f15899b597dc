"""The sampler on vLLM servers, against small ones over real HTTP: where requests go, and what becomes of them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.inference.fake_vllm import (
    GENERATE,
    FakeVLLM,
    fails,
    hangs,
    no_answer_to,
    refuses_prompts,
    refuses_weights,
    without_adapters,
    without_dev_mode,
    without_scale_out,
)
from tests.inference.gloo_group import GlooGroup
from trl_steppo.errors import ConfigurationError, DataError, RolloutError
from trl_steppo.inference.base import Sample, SamplingParams
from trl_steppo.inference.vllm import VLLMSampler
from trl_steppo.inference.vllm_server import Weights
from trl_steppo.inference.vllm_transfer import NCCLGroup, Transfer, meeting_place, nccl_join
from trl_steppo.types import StopReason

SAMPLED = SamplingParams(max_new_tokens=4, seed=7)


@pytest.fixture
def serve() -> Iterator[Callable[..., FakeVLLM]]:
    servers: list[FakeVLLM] = []

    def start(**options: Any) -> FakeVLLM:
        servers.append(FakeVLLM(**options))
        return servers[-1]

    yield start
    for server in servers:
        server.faults.clear()
        server.kill()


@pytest.fixture
def connect(tmp_path: Path) -> Iterator[Callable[..., VLLMSampler]]:
    samplers: list[VLLMSampler] = []

    def start(*servers: FakeVLLM, version: int | None = 0, **kwargs: Any) -> VLLMSampler:
        settings = {"timeout_s": 100.0, "poll_s": 0.05, **kwargs}
        sampler = VLLMSampler([server.url for server in servers], **settings)
        samplers.append(sampler)
        sampler.start()
        if version is not None:
            sampler.update(weights(tmp_path, version))
        return sampler

    yield start
    for sampler in samplers:
        sampler.close()


def weights(directory: Path, version: int, *, is_adapter: bool = False) -> Weights:
    path = directory / f"run-{version}"
    path.mkdir(exist_ok=True)
    return Weights(f"run-{version}", version, str(path), is_adapter)


def ask(sampler: VLLMSampler, count: int, params: SamplingParams = SAMPLED, *, first: int = 0) -> list[Sample]:
    async def all_of_them() -> list[Sample]:
        numbers = range(first, first + count)
        return await asyncio.gather(*(sampler.sample([1, 2, 3], params, episode_id=f"e{n}") for n in numbers))

    return asyncio.run(all_of_them())


def until(holds: Callable[[], object]) -> None:
    """Wait for something that takes as long as the machine is busy."""
    deadline = time.monotonic() + 100
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def later(delay_s: float, act: Callable[[], object]) -> threading.Thread:
    thread = threading.Timer(delay_s, act)
    thread.start()
    return thread


def test_a_response_is_what_the_server_sampled_with_the_version_of_its_weights(serve, connect):
    server = serve()
    sampler = connect(server, version=3)
    (sample,) = ask(sampler, 1)
    assert sample.token_ids.tolist() == [3, 4, 5, 6]
    assert sample.logprobs == (-3.0, -4.0, -5.0, -6.0)
    assert (sample.stop_reason, sample.policy_version) == (StopReason.LENGTH, 3)
    asked = server.asked[0]
    assert asked["sampling_params"] == {
        "max_tokens": 4,
        "temperature": 1.0,
        "seed": 7,
        "stop_token_ids": [],
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    (stopped,) = ask(sampler, 1, replace(SAMPLED, stop_token_ids=(4,)))
    assert (stopped.token_ids.tolist(), stopped.stop_reason) == ([3, 4], StopReason.STOP)


def test_an_address_may_be_that_of_the_openai_api(serve, connect):
    server = serve()
    sampler = connect(SimpleNamespace(url=f"{server.url}/v1/"))
    assert ask(sampler, 1)[0].token_ids.tolist() == [3, 4, 5, 6]


def test_tokens_are_counted_and_those_in_the_cache_are_not_prefilled(serve, connect):
    server = serve()
    sampler = connect(server)
    ask(sampler, 1)
    assert (sampler.counts.sampled_tokens, sampler.counts.prompt_tokens, sampler.counts.prefilled_tokens) == (4, 3, 3)
    asyncio.run(sampler.sample([1, 2, 3, 3, 4, 5, 6, 9], SAMPLED, episode_id="e0"))
    assert (sampler.counts.sampled_tokens, sampler.counts.prompt_tokens, sampler.counts.prefilled_tokens) == (8, 11, 5)
    assert sampler.counts.forward_s > 0
    server.counts_cached = False  # without `--enable-prompt-tokens-details`
    ask(sampler, 1)
    assert (sampler.counts.prompt_tokens, sampler.counts.prefilled_tokens) == (11, 8)


def test_episodes_are_spread_evenly_and_stay_where_they_are(serve, connect):
    servers = [serve(), serve(), serve()]
    sampler = connect(*servers)
    for _ in range(3):
        ask(sampler, 6)
    assert [len(server.asked) for server in servers] == [6, 6, 6]
    for n in range(6):
        sampler.release(f"e{n}")
    ask(sampler, 3, first=6)
    assert [len(server.asked) for server in servers] == [7, 7, 7]


def test_episodes_stay_where_they_are_over_an_update(serve, connect, tmp_path):
    servers = [serve(), serve()]
    sampler = connect(*servers)
    ask(sampler, 8)
    sampler.hold()
    samples: list[Sample] = []
    held = later(0, lambda: samples.extend(ask(sampler, 8)))
    servers[1].may_load.clear()
    update = later(0, lambda: sampler.update(weights(tmp_path, 1)))
    until(lambda: servers[0].version == "run-1" and servers[1].called.count("reload_weights") == 2)
    assert [len(server.asked) for server in servers] == [4, 4]  # the second still loads; its episodes wait for it
    servers[1].may_load.set()
    for thread in (update, held):
        thread.join()
    assert [sample.policy_version for sample in samples] == [1] * 8
    ask(sampler, 8)
    assert [len(server.asked) for server in servers] == [12, 12]


def test_an_episode_stays_where_one_response_failed_but_not_where_two_did(serve, connect):
    servers = [serve(), serve()]
    sampler = connect(*servers)
    ask(sampler, 4)
    servers[0].faults = [fails(1)]
    ask(sampler, 4)
    assert [len(server.asked) for server in servers] == [5, 4]
    servers[0].faults = [fails(99)]
    for _ in range(2):
        ask(sampler, 4)
    assert [len(server.asked) for server in servers] == [5 + 4, 4 + 4 + 4]


def test_a_dead_server_s_requests_are_answered_by_another(serve, connect):
    servers = [serve(), serve()]
    for server in servers:
        server.token_s = 0.1
    sampler = connect(*servers)
    killer = later(0.2, servers[0].kill)
    assert len(ask(sampler, 4)) == 4
    killer.join()
    assert sampler.num_retries == 2
    before = len(servers[1].asked)
    ask(sampler, 4)  # the dead one's episodes moved
    assert len(servers[1].asked) == before + 4


def test_a_server_that_was_started_again_gets_the_weights_before_anything_is_taken_from_it(serve, connect, tmp_path):
    server = serve()
    sampler = connect(server, version=5, poll_s=60.0)  # no health check sees it
    server.kill()
    server.start()
    assert [sample.policy_version for sample in ask(sampler, 3)] == [5, 5, 5]
    assert server.loaded == [str(tmp_path / "run-5")] * 2
    assert sampler.num_retries >= 1


def test_requests_survive_a_restart_of_their_only_server(serve, connect):
    server = serve()
    server.token_s = 0.1
    sampler = connect(server)
    later(0.1, server.kill)
    starter = later(0.8, server.start)
    assert [sample.policy_version for sample in ask(sampler, 2)] == [0, 0]
    starter.join()


def test_a_server_that_hangs_is_given_up_until_it_answers(serve, connect):
    servers = [serve(), serve()]
    sampler = connect(*servers, silent_s=1.0)
    servers[0].faults = [hangs()]
    assert len(ask(sampler, 4)) == 4
    assert not servers[0].asked
    servers[0].faults = []
    numbers = itertools.count(4)
    until(lambda: ask(sampler, 1, first=next(numbers)) and servers[0].asked)


@pytest.mark.parametrize("num_stuck", [1, 2])
def test_a_stuck_engine_is_given_up_although_its_server_answers(serve, connect, tmp_path, caplog, num_stuck):
    servers = [serve(), serve()]
    sampler = connect(*servers, timeout_s=2.0)
    for server in servers[:num_stuck]:
        server.faults = [no_answer_to(GENERATE)]
    samples: list[Sample] = []
    asking = later(0, lambda: samples.extend(ask(sampler, 4)))
    until(lambda: sum(server.num_waiting for server in servers) == 2 * num_stuck)
    with caplog.at_level(logging.WARNING):
        sampler.hold()  # returns
    assert f"vLLM at {servers[0].url}: it has computed no token for 1 s, although it has 2 requests" in caplog.text
    for server in servers[num_stuck:] or servers:
        server.faults.clear()
    sampler.update(weights(tmp_path, 1))
    asking.join()
    assert [sample.policy_version for sample in samples].count(1) == 2 * num_stuck
    assert sampler.num_retries == 2 * num_stuck


def test_a_slow_engine_is_not_given_up_and_a_warning_says_what_is_waited_for(serve, connect, caplog):
    server = serve()
    server.token_s = 0.5
    sampler = connect(server, timeout_s=2.0)
    asking = later(0, lambda: ask(sampler, 1, replace(SAMPLED, max_new_tokens=6)))
    until(lambda: server.num_running)
    with caplog.at_level(logging.WARNING):
        sampler.hold()
    asking.join()
    assert caplog.messages == [f"new weights wait for responses: 1 of {server.url}"]
    assert sampler.num_retries == 0


def test_a_server_that_does_not_report_its_weights_is_not_used(serve, connect):
    servers = [serve(), serve()]
    servers[1].faults = [no_answer_to("/weight_info")]
    sampler = connect(*servers, silent_s=0.5, timeout_s=4.0)
    assert [sample.policy_version for sample in ask(sampler, 2)] == [0, 0]
    assert len(servers[0].asked) == 2
    servers[1].faults.clear()
    numbers = itertools.count(2)
    until(lambda: ask(sampler, 1, first=next(numbers)) and servers[1].asked)


def test_an_update_waits_once_for_a_server_that_hangs(serve, connect, tmp_path):
    servers = [serve(), serve()]
    sampler = connect(*servers, silent_s=1.0, timeout_s=4.0)
    servers[1].faults = [hangs()]
    sampler.update(weights(tmp_path, 1))
    for server in sampler._servers:
        server._silent_s = 1_000.0  # from here on its silence is never long enough
    for version in (2, 3, 4):
        sampler.update(weights(tmp_path, version))
        assert [sample.policy_version for sample in ask(sampler, 2)] == [version] * 2
    servers[1].faults = []
    numbers = itertools.count(2)
    until(lambda: ask(sampler, 1, first=next(numbers)) and servers[1].asked)
    assert servers[1].loaded[-1] == str(tmp_path / "run-4")


def test_without_a_server_requests_fail_in_time_and_say_which(serve, connect):
    server = serve()
    sampler = connect(server)
    sampler.timeout_s = 0.5
    server.kill()
    with pytest.raises(
        RolloutError, match=rf"no vLLM server was ready for 0.5 s \(`vllm_server_timeout`\); {server.url}"
    ):
        ask(sampler, 1)
    server.start()
    until(lambda: len(server.loaded) == 2)
    assert len(ask(sampler, 1)) == 1


def test_a_request_that_breaks_every_server_is_given_up(serve, connect):
    server = serve()
    sampler = connect(server, retry_s=0.01)
    server.faults = [fails(99)]
    with pytest.raises(RolloutError, match=rf"given up after 5 attempts; vLLM at {server.url}: .* 500: .*broken"):
        ask(sampler, 1)


@pytest.mark.parametrize(("status", "words"), [(500, "given up after 5 attempts"), (400, "400")])
def test_a_prompt_that_fails_while_others_succeed_fails_its_episode(serve, connect, status, words):
    server = serve()
    server.faults = [refuses_prompts(9, status)]
    sampler = connect(server, retry_s=0.01)
    with pytest.raises(DataError, match=words):
        asyncio.run(sampler.sample([9, 9], SAMPLED, episode_id="refused"))
    assert len(ask(sampler, 1)) == 1


def test_a_server_that_fails_for_a_while_is_asked_later(serve, connect):
    server = serve()
    sampler = connect(server)
    server.faults = [fails(99)]
    mending = later(0.5, lambda: server.faults.clear())
    assert len(ask(sampler, 1)) == 1
    mending.join()


def test_an_adapter_does_not_go_on_another_runs_base(serve, connect, tmp_path):
    server = serve()
    connect(server)
    sampler = connect(server, version=None)
    with pytest.raises(ConfigurationError, match=r"has the weights run-0 of another run.*start it again"):
        sampler.update(weights(tmp_path, 0, is_adapter=True))


def test_the_error_of_a_refused_adapter_names_its_cause(serve, connect, tmp_path):
    server = serve()
    sampler = connect(server, version=None)
    elsewhere = replace(weights(tmp_path, 0, is_adapter=True), directory="/not/here")
    with pytest.raises(ConfigurationError, match="finds no adapter at /not/here; set `vllm_weights_dir`"):
        sampler.update(elsewhere)
    server.faults = [without_adapters()]
    with pytest.raises(ConfigurationError, match="VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        connect(server, version=None).update(weights(tmp_path, 1, is_adapter=True))


def test_a_server_that_takes_long_to_load_is_waited_for_and_asked_once(serve, connect, tmp_path):
    servers = [serve(), serve()]
    sampler = connect(*servers, timeout_s=2.0)
    servers[1].may_load.clear()
    sampler.update(weights(tmp_path, 1))
    assert "taking new weights for more than 1 s" in str(sampler._servers[1].trouble)
    assert servers[1].called == ["reload_weights"] * 2
    servers[1].may_load.set()
    until(lambda: sampler._servers[1].is_ready)
    assert servers[1].called == ["reload_weights"] * 2
    assert servers[1].version == "run-1"


def test_a_server_that_lost_an_option_is_no_longer_used(serve, connect, tmp_path):
    servers = [serve(), serve()]
    sampler = connect(*servers)
    servers[1].kill()
    servers[1].options["logprobs_mode"] = "raw_logprobs"
    servers[1].start()
    until(lambda: isinstance(sampler._servers[1].trouble, ConfigurationError))
    assert len(ask(sampler, 4)) == 4
    sampler.update(weights(tmp_path, 1))
    servers[0].kill()
    servers[0].options["logprobs_mode"] = "raw_logprobs"
    servers[0].start()
    with pytest.raises(RolloutError, match="--logprobs-mode processed_logprobs"):
        ask(sampler, 1)


@pytest.mark.parametrize("is_adapter", [False, True])
def test_new_weights_come_between_responses_and_no_response_is_given_up(serve, connect, tmp_path, is_adapter):
    servers = [serve(), serve()]
    for server in servers:
        server.token_s = 0.3
    sampler = connect(*servers, version=None)
    sampler.update(weights(tmp_path, 0, is_adapter=is_adapter))

    samples: list[Sample] = []
    early = later(0.0, lambda: samples.extend(ask(sampler, 4)))
    until(lambda: sum(server.num_running for server in servers) == 4)
    if not is_adapter:
        sampler.hold()
    sampler.update(weights(tmp_path, 1, is_adapter=is_adapter))
    assert [sample.policy_version for sample in ask(sampler, 4, first=4)] == [1] * 4
    early.join()
    assert [sample.policy_version for sample in samples] == [0] * 4
    assert sampler.num_retries == 0
    assert [server.most_running_in_change for server in servers] == [0, 0]


def test_unused_adapters_are_unloaded(serve, connect, tmp_path):
    server = serve()
    sampler = connect(server, version=None)
    for version in range(4):
        sampler.update(weights(tmp_path, version, is_adapter=True))
        ask(sampler, 1)
    assert list(server.adapters) == ["run-2", "run-3"]
    assert [asked["model"] for asked in server.asked] == ["run-0", "run-1", "run-2", "run-3"]
    server.kill()
    server.start()
    assert [sample.policy_version for sample in ask(sampler, 1)] == [3]
    assert list(server.adapters) == ["run-3"]


def test_an_adapter_is_kept_until_the_last_response_of_it(serve, connect, tmp_path):
    server = serve()
    sampler = connect(server, version=None)
    sampler.update(weights(tmp_path, 0, is_adapter=True))
    answer, respond = threading.Event(), server.respond

    async def respond_later(prompt: list[int], params: dict[str, Any], adapter: str | None) -> Any:
        while adapter == str(tmp_path / "run-0") and not answer.is_set():
            await asyncio.sleep(0.02)
        return await respond(prompt, params, adapter)

    server.respond = respond_later
    samples: list[Sample] = []
    asking = later(0, lambda: samples.extend(ask(sampler, 1)))
    until(lambda: server.num_running)
    sampler.settle()  # it is of the newest
    sampler.update(weights(tmp_path, 1, is_adapter=True))
    assert [sample.policy_version for sample in ask(sampler, 1, first=1)] == [1]
    settling = later(0, sampler.settle)
    settling.join(0.2)
    assert settling.is_alive()
    assert list(server.adapters) == ["run-0", "run-1"]
    answer.set()
    for thread in (settling, asking):
        thread.join()
    assert [sample.policy_version for sample in samples] == [0]
    sampler.update(weights(tmp_path, 2, is_adapter=True))
    assert list(server.adapters) == ["run-1", "run-2"]
    assert server.most_adapters == 2
    sampler.close()
    assert not server.adapters


def test_a_server_that_cannot_take_weights_is_done_without_by_all_processes(serve, connect, tmp_path):
    servers = [serve(), serve()]
    sender = connect(*servers, version=None)
    others = [connect(*servers, version=None, sends_weights=False) for _ in range(2)]
    for version, is_adapter in ((0, True), (1, True), (2, False)):
        servers[1].faults = [refuses_weights()] if version > 0 else []
        for sampler in (sender, *others):  # in this order, as ranks do
            sampler.update(weights(tmp_path, version, is_adapter=is_adapter))
        for sampler in (sender, *others):
            assert [sample.policy_version for sample in ask(sampler, 2)] == [version] * 2
    assert len(servers[1].asked) == 3
    servers[1].faults = []
    numbers = itertools.count(2)
    for sampler in (sender, *others):
        before = len(servers[1].asked)
        until(lambda s=sampler, b=before: ask(s, 1, first=next(numbers)) and len(servers[1].asked) > b)


def test_one_process_sends_weights_and_the_others_wait_for_them(serve, connect, tmp_path):
    server = serve()
    sender, other = connect(server, version=None), connect(server, version=None, sends_weights=False)
    updates = [later(delay, lambda s=s: s.update(weights(tmp_path, 2))) for delay, s in ((0.3, sender), (0, other))]
    assert [sample.policy_version for sample in ask(other, 1)] == [2]
    for update in updates:
        update.join()
    server.kill()
    server.start()
    assert [sample.policy_version for sample in ask(other, 1)] == [2]
    assert server.loaded == [str(tmp_path / "run-2")] * 2


def test_an_update_skips_a_server_that_is_down(serve, connect, tmp_path):
    servers = [serve(), serve()]
    sampler = connect(*servers)
    servers[0].kill()
    sampler.hold()
    sampler.update(weights(tmp_path, 1))
    assert [sample.policy_version for sample in ask(sampler, 2)] == [1, 1]
    servers[0].start()
    numbers = itertools.count(2)
    until(lambda: ask(sampler, 1, first=next(numbers)) and servers[0].asked)
    assert servers[0].loaded[-1] == str(tmp_path / "run-1")


def test_weights_that_no_server_can_read_end_the_update_with_the_servers_message(serve, connect, tmp_path):
    server = serve()
    sampler = connect(server, version=None, timeout_s=2.0)
    with pytest.raises(RolloutError, match=r"POST /collective_rpc was answered with 500: .*no such directory"):
        sampler.update(Weights("run-0", 0, str(tmp_path / "nowhere")))


def test_a_server_without_a_needed_option_is_refused_at_the_start(serve, connect, tmp_path):
    server = serve(logprobs_mode="raw_logprobs")
    with pytest.raises(ConfigurationError, match=rf"{server.url} reports .*'raw_logprobs'.*--logprobs-mode"):
        connect(server)
    server = serve()
    server.faults = [without_scale_out()]
    with pytest.raises(ConfigurationError, match=rf"{server.url} takes no token ids.*--enable-scale-out"):
        connect(server)
    server = serve()
    server.counts_tokens = False
    with pytest.raises(ConfigurationError, match=rf"{server.url} does not count its tokens.*--disable-log-stats"):
        connect(server)
    server = serve()
    for server.max_loras in (None, 1):
        with pytest.raises(ConfigurationError, match=rf"{server.url} takes . LoRA adapters .*--max-loras 2"):
            connect(server, version=None).update(weights(tmp_path, 0, is_adapter=True))
    server = serve()
    server.faults = [without_dev_mode()]
    with pytest.raises(ConfigurationError, match=rf"{server.url} has no endpoints that take weights.*DEV_MODE=1"):
        connect(server)


def test_a_shared_output_layer_is_packed_again_on_a_cpu(serve, connect, tmp_path):
    server = serve()
    sampler = connect(server)
    tied = replace(weights(tmp_path, 1), is_tied=True)
    sampler.update(tied)
    assert server.called == ["reload_weights"] * 2  # on a GPU nothing else is needed
    server.device = "cpu"
    server.kill()
    server.start()
    with pytest.raises(RolloutError, match=r"does not reload the output layer .*--worker-extension-cls trl_st"):
        ask(sampler, 1)
    server.extension = "trl_steppo.inference.vllm_worker.PacksOutputLayer"
    until(lambda: "pack_output_layer" in server.called)
    assert server.called[2:] == ["reload_weights", "pack_output_layer"]


def test_requests_that_no_server_can_sample_are_refused(serve, connect):
    sampler = connect(serve(max_model_len=6))
    with pytest.raises(
        ConfigurationError, match=r"a prompt of 3 tokens with up to 4 new ones exceeds the 6 .*--max-mo"
    ):
        ask(sampler, 1)
    for limits in ({"top_p": 0.9}, {"top_k": 5}):
        with pytest.raises(ConfigurationError, match="vLLM's log-probabilities are then of what these leave"):
            ask(sampler, 1, replace(SAMPLED, **limits))
    with pytest.raises(DataError, match="the prompt of episode 'e' is empty"):
        asyncio.run(sampler.sample([], SAMPLED, episode_id="e"))


def test_a_cancelled_request_is_given_up(serve, connect):
    server = serve()
    server.token_s = 10.0
    sampler = connect(server)

    async def run() -> None:
        task = asyncio.ensure_future(sampler.sample([1], SAMPLED, episode_id="e"))
        while not server.num_running:
            await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(run())
    until(lambda: server.num_cancelled == 1)
    sampler.hold()  # returns: nothing runs


def test_waiting_requests_fail_when_the_sampler_is_closed(serve, connect):
    server = serve()
    server.token_s = 10.0
    sampler = connect(server)
    later(0.2, sampler.close)
    with pytest.raises(RolloutError, match="was closed"):
        ask(sampler, 1)
    with pytest.raises(RolloutError, match="was closed"):
        ask(sampler, 1)


# -- weights that are sent, not read ----------------------------------------------------------------------------------


@pytest.fixture
def sent(serve, connect) -> Callable[..., tuple[VLLMSampler, list[dict[str, torch.Tensor]], list[FakeVLLM]]]:
    """A sampler whose servers are sent weights, what each load of a server's was, and the servers."""

    def start(num_servers: int = 1, **kwargs: Any) -> tuple[VLLMSampler, list[Any], list[FakeVLLM]]:
        loads: list[dict[str, torch.Tensor]] = []

        def load(directory: Path | None) -> None:
            if directory is not None:
                loads.append(load_file(directory / "model.safetensors"))

        servers = [serve(load=load) for _ in range(num_servers)]
        for server in servers:
            server.backend = "nccl"
        return connect(*servers, version=None, join=GlooGroup, **kwargs), loads, servers

    return start


def whole(version: int) -> Weights:
    tensors = {"a.weight": torch.full((2, 3), version, dtype=torch.bfloat16), "b": torch.arange(4.0) + version}
    return Weights(f"run-{version}", version, tensors=tensors)


def same(a: dict[str, torch.Tensor], b: Weights) -> bool:
    assert b.tensors is not None
    return set(a) == set(b.tensors) and all(torch.equal(a[name], b.tensors[name]) for name in a)


def test_weights_are_sent_from_here_in_one_group_for_each_server(sent):
    sampler, loads, servers = sent(2)
    for version in range(3):
        sampler.hold()
        sampler.update(whole(version))
        assert [sample.policy_version for sample in ask(sampler, 2)] == [version] * 2
        assert len(loads) == 2 * version + 2
        assert all(same(load, whole(version)) for load in loads[-2:])
    sampler.close()
    for server in servers:
        assert server.num_joined == 1
        assert server.group is None


def test_a_server_that_was_started_again_is_sent_them_again(sent):
    sampler, loads, (server,) = sent()
    sampler.update(whole(4))
    server.kill()
    server.start()
    assert ask(sampler, 1)[0].policy_version == 4
    assert server.num_joined == 2
    assert len(loads) == 2
    assert same(loads[1], whole(4))


def test_a_server_that_dies_while_it_is_sent_weights_holds_up_no_other(sent):
    sampler, loads, servers = sent(2)
    sampler.update(whole(0))
    servers[0].may_load.clear()
    killed = later(0.3, servers[0].kill)
    sampler.hold()
    sampler.update(whole(1))
    assert [sample.policy_version for sample in ask(sampler, 2)] == [1, 1]
    killed.join()
    servers[0].may_load.set()
    servers[0].start()
    until(lambda: len(loads) == 4)
    assert same(loads[-1], whole(1))


def test_a_server_whose_trainer_was_killed_before_it_sent_anything_takes_weights(sent):
    sampler, loads, (server,) = sent()
    server.version, server.received = "other-3-loading", {}
    sampler.update(whole(0))
    assert same(loads[-1], whole(0))


def test_closing_waits_for_a_transfer_in_progress(sent):
    sampler, loads, servers = sent(2)
    servers[0].kill()
    sampler.update(whole(0))
    servers[0].may_load.clear()
    servers[0].start()
    until(lambda: servers[0].received is not None)
    allowed = later(0.5, servers[0].may_load.set)
    sampler.close()
    allowed.join()
    assert len(loads) == 2
    assert servers[0].received is None


def test_an_nccl_group_sends_on_a_stream_of_its_own_until_it_is_left(monkeypatch):
    """With stand-ins for the GPU and for vLLM's communicator."""
    sent: list[Any] = []  # tensor, source and stream of each call
    stream = SimpleNamespace(synchronize=lambda: None)
    members = SimpleNamespace(disabled=False, destroy=lambda: sent.append("destroyed"))
    members.broadcast = lambda tensor, src, stream: sent.append((tensor, src, stream))
    for name, stand_in in {
        "set_device": lambda device: None,
        "Stream": lambda device: stream,
        "device": lambda device: nullcontext(),
        "stream": lambda stream: nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor, device: tensor)
    group = NCCLGroup(lambda given: members, 0, "127.0.0.1", 9, 2)
    turned = torch.arange(6.0).view(2, 3).T
    group.send([turned, torch.ones(1)])
    assert [(source, on) for _, source, on in sent] == [(0, stream)] * 2
    assert sent[0][0].is_contiguous()
    assert torch.equal(sent[0][0], turned)

    def tensors() -> Iterator[torch.Tensor]:
        yield torch.zeros(1)
        group.leave()
        yield torch.zeros(1)

    with pytest.raises(ConnectionError, match="given up"):
        group.send(tensors())
    assert len(sent) == 4
    assert sent[3] == "destroyed"
    members.disabled = True
    with pytest.raises(ConfigurationError, match="VLLM_DISABLE_PYNCCL"):
        NCCLGroup(lambda given: members, 0, "127.0.0.1", 9, 2)


def test_a_transfer_that_fails_is_told_and_tried_again(sent):
    sampler, loads, (server,) = sent(timeout_s=2.0)
    server.faults = [refuses_weights()]
    with pytest.raises(RolloutError, match=r"POST /update_weights was answered with 500: .*not initialized"):
        sampler.update(whole(0))
    server.faults = []
    sampler.update(whole(1))
    assert same(loads[-1], whole(1))
    assert server.num_joined > 1


def test_servers_and_devices_that_cannot_transfer_weights_are_refused(sent, monkeypatch):
    sampler, _, (server,) = sent()
    server.backend = "ipc"
    with pytest.raises(
        ConfigurationError, match=r"its backend for them is ipc\); start it with `--weight-transfer-con"
    ):
        sampler.update(whole(0))
    with pytest.raises(ConfigurationError, match="the policy trains on cpu; set it to 'files'"):
        nccl_join(torch.device("cpu"))
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ConfigurationError, match="cannot be imported where the trainer runs"):
        nccl_join(torch.device("cuda", 0))


@pytest.mark.parametrize("side", ["trainer", "server"])
def test_a_transfer_group_on_one_gpu_is_refused_with_the_cure(side):
    """NCCL says no more than this, on both sides."""
    refused = RuntimeError("NCCL error: invalid usage (run with NCCL_DEBUG=WARN for details)")

    def join(address: str, port: int, size: int) -> Any:
        raise refused if side == "trainer" else RuntimeError("timed out")

    async def joined() -> None:
        if side == "server":
            raise refused
        await asyncio.sleep(60)

    with pytest.raises(ConfigurationError, match="both are on one GPU"):
        asyncio.run(Transfer(join if side == "trainer" else hanging).join("10.0.0.1", 9, 2, joined()))


def hanging(address: str, port: int, size: int) -> Any:
    """A member that waits for the others."""
    threading.Event().wait(1)
    raise RuntimeError("given up")


def test_the_meeting_place_suits_the_address_of_the_server():
    for host in ("localhost", "127.0.0.1"):
        address, port = meeting_place(f"http://{host}:8000")
        assert address == "127.0.0.1"
        with socket.socket() as free:
            free.bind((address, port))
