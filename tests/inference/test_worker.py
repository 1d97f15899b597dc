"""The sampler in a process of its own says what the one in this process says, and outlives what happens to it."""

from __future__ import annotations

import asyncio
import copy
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedModel

from trl_steppo.errors import DataError, RolloutError
from trl_steppo.inference.base import Sample, Sampler, SamplingParams
from trl_steppo.inference.local import LocalSampler
from trl_steppo.inference.worker import WorkerSampler

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [11], [12, 13, 14, 15]]
SAMPLED = SamplingParams(max_new_tokens=9)
LONG = SamplingParams(max_new_tokens=3_000)


@pytest.fixture(scope="module")
def model(tiny_model: Callable[[str], PreTrainedModel]) -> PreTrainedModel:
    return tiny_model("Qwen2")


@pytest.fixture(scope="module")
def shared_worker(model: PreTrainedModel) -> Iterator[WorkerSampler]:
    sampler = make_worker(model)
    yield sampler
    sampler.close()


@pytest.fixture
def worker(shared_worker: WorkerSampler, model: PreTrainedModel) -> WorkerSampler:
    shared_worker.update_weights(model.named_parameters(), version=0)
    return shared_worker


def make_worker(model: PreTrainedModel, **kwargs: object) -> WorkerSampler:
    names = [name for name, _ in model.named_parameters()]
    worker = WorkerSampler(copy.deepcopy(model), trained=names, **kwargs)  # type: ignore[arg-type]
    worker.start()
    return worker


async def respond(
    sampler: Sampler, prompts: Sequence[Sequence[int]], params: SamplingParams = SAMPLED
) -> list[Sample]:
    tasks = [
        sampler.sample(prompt, replace(params, seed=number), episode_id=f"e{number}", order=(number,))
        for number, prompt in enumerate(prompts)
    ]
    return list(await asyncio.gather(*tasks))


def moved(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return other


def test_says_what_the_one_in_this_process_says_before_and_after_new_weights(model, worker) -> None:
    local = LocalSampler(model)
    expected = asyncio.run(respond(local, PROMPTS))
    assert asyncio.run(respond(worker, PROMPTS)) == expected
    assert (worker.sampled_tokens, worker.prefilled_tokens) == (local.sampled_tokens, local.prefilled_tokens)
    assert worker.forward_s > 0

    other = moved(model)
    worker.update_weights(other.named_parameters(), version=7)
    changed = asyncio.run(respond(worker, PROMPTS))
    assert [replace(sample, policy_version=0) for sample in changed] == asyncio.run(
        respond(LocalSampler(other), PROMPTS)
    )
    assert {sample.policy_version for sample in changed} == {7}
    assert changed != expected


def test_a_response_comes_from_one_version_and_none_is_given_up(model, worker) -> None:
    other = moved(model)

    async def run() -> tuple[list[Sample], list[Sample]]:
        long = [asyncio.ensure_future(respond(worker, [[1, 2, 3]], replace(LONG, max_new_tokens=400)))]
        await asyncio.sleep(0.05)
        worker.update_weights(other.named_parameters(), version=1)
        return (await respond(worker, [[1, 2, 3]])), await long[0]

    after, before = asyncio.run(run())
    old, new = (
        asyncio.run(respond(LocalSampler(m), [[1, 2, 3]], replace(LONG, max_new_tokens=400)))[0]
        for m in (model, other)
    )
    assert before[0] == old
    assert after[0].policy_version == 1
    assert after[0].token_ids.tolist() == new.token_ids.tolist()[:9]


def test_mistakes_come_back_as_they_are(worker) -> None:
    with pytest.raises(DataError, match="the prompt of episode 'e0' is empty"):
        asyncio.run(respond(worker, [[]]))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_one_that_dies_or_hangs_is_started_again_with_its_weights(model, how) -> None:
    worker, other = make_worker(model, silent_s=2.0), moved(model)
    try:
        worker.update_weights(other.named_parameters(), version=3)

        async def run() -> list[Sample]:
            task = asyncio.ensure_future(respond(worker, PROMPTS, replace(LONG, max_new_tokens=400)))
            await asyncio.sleep(0.2)
            os.kill(worker.process_id, how)
            return await task

        found = asyncio.run(run())
        assert [sample.policy_version for sample in found] == [3] * 4
        expected = asyncio.run(respond(LocalSampler(other), PROMPTS, replace(LONG, max_new_tokens=400)))
        assert [sample.token_ids for sample in found] == [sample.token_ids for sample in expected]
        assert worker.num_restarts == 1
    finally:
        worker.close()


def test_one_that_dies_too_often_fails_those_who_wait(model) -> None:
    worker = make_worker(model, max_restarts=0)

    async def run() -> None:
        task = asyncio.ensure_future(respond(worker, [[1]], LONG))
        await asyncio.sleep(0.1)
        os.kill(worker.process_id, signal.SIGKILL)
        await task

    with pytest.raises(RolloutError, match=r"died \(exit status -9\), and was started again 0 times since"):
        asyncio.run(run())
    with pytest.raises(RolloutError, match="died"):
        asyncio.run(respond(worker, [[1]]))
    worker.close()


def test_every_version_of_the_weights_may_lose_it_as_often(model) -> None:
    worker = make_worker(model, max_restarts=1)
    for version in (1, 2, 3):
        os.kill(worker.process_id, signal.SIGKILL)
        assert asyncio.run(respond(worker, [[1]]))
        worker.update_weights(model.named_parameters(), version)
    assert worker.num_restarts == 3
    worker.close()


def test_who_waits_is_told_of_the_end(model) -> None:
    worker = make_worker(model)

    async def run() -> None:
        task = asyncio.ensure_future(respond(worker, [[1]], LONG))
        await asyncio.sleep(0.1)
        worker.close()
        await task

    with pytest.raises(RolloutError, match="was closed"):
        asyncio.run(run())
    assert not _is_running(worker.process_id)


def test_what_nobody_waits_for_is_given_up(worker) -> None:
    async def run() -> list[Sample]:
        task = asyncio.ensure_future(respond(worker, [[1]], LONG))
        await asyncio.sleep(0.1)
        task.cancel()
        return await respond(worker, [[1]])

    asyncio.run(run())
    assert worker.sampled_tokens < LONG.max_new_tokens


def _is_running(process_id: int) -> bool:
    time.sleep(0.1)
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True
