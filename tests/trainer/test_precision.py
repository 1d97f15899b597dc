"""Mixed precision on a CPU: every kind of sampler sees new weights, and trained weights are held in float32."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.inference.fake_vllm import FakeVLLM
from tests.trainer.served_policy import Policy
from tests.trainer.tiny import (
    Endless,
    distance,
    make_classifier,
    make_model,
    make_trainer,
    message_rows,
    same,
    weights,
)
from trl_steppo import StepPOTrainer
from trl_steppo.inference.base import Sample, SamplingParams

UPDATES = 4
MOST_KL = 1e-3  # of two passes in bfloat16 over the same weights; over weights of an update before, it is 0.1 and more


def lora(**changes: Any) -> LoraConfig:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 64, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**settings, **changes})


def run(directory: Path, **settings: Any) -> StepPOTrainer:
    trainer = make_trainer(
        directory,
        **{
            "bf16": True,
            "train_dataset": message_rows(),
            "environment_factory": Endless,
            "max_steps": UPDATES,
            "learning_rate": 1e-3,
            **settings,
        },
    )
    trainer.train()
    return trainer


def mismatches(trainer: StepPOTrainer) -> list[float]:
    """Of each update: how far the sampler's log-probabilities are from the scorer's."""
    return [abs(logs["rollout/mismatch_kl"]) for logs in trainer.state.log_history if "episode" in logs]


@pytest.fixture
def server_url() -> Iterator[str]:
    policy = Policy(torch.bfloat16)
    server = FakeVLLM(policy.respond, policy.load, max_model_len=4096)
    yield server.url
    server.kill()


@pytest.mark.parametrize("is_lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("place", ["trainer", "worker", "vllm"])
def test_the_sampler_has_the_policy_s_weights_in_every_update(tmp_path, place, is_lora, request) -> None:
    settings: dict[str, Any] = {"num_ppo_epochs": 2}
    if is_lora:
        settings["peft_config"] = lora()
    if place == "worker":
        settings["use_rollout_worker"] = True
    elif place == "vllm":
        settings |= {"use_vllm": True, "vllm_server_base_url": request.getfixturevalue("server_url")}
    trainer = run(tmp_path, **settings)
    found = mismatches(trainer)
    assert len(found) == UPDATES
    assert max(found) < MOST_KL, found
    moved = [logs["policy/approxkl_avg"] for logs in trainer.state.log_history if "episode" in logs]
    assert max(moved) > MOST_KL, "the policy has to move, for old weights to show"


# -- trained weights are held in float32 ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"kl_coef": 0.1}, {"use_rollout_worker": True}, {"value_model": make_classifier}],
    ids=["", "reference", "worker", "value_model"],
)
def test_weights_loaded_in_bfloat16_train_as_those_loaded_in_float32(tmp_path, settings) -> None:
    """Bit for bit: what is trained is float32, and so are the copies made of it."""
    settings = {**settings, "max_steps": 2, "learning_rate": 1e-6}

    def trained(dtype: torch.dtype, name: str) -> StepPOTrainer:
        given = dict(settings)
        if "value_model" in given:
            given["value_model"] = rounded(make_classifier()).to(dtype)
        return run(tmp_path / name, model=rounded(make_model()).to(dtype), **given)

    half, whole = trained(torch.bfloat16, "half"), trained(torch.float32, "whole")
    for network in (half.model, half.value_model):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    assert same(weights(half.model), weights(whole.model))
    assert same(weights(half.value_model), weights(whole.value_model))
    assert distance(weights(half.model), weights(rounded(make_model()))) > 0
    if "kl_coef" in settings:
        assert half.state.log_history[0]["objective/kl"] == 0


def rounded(model: Any) -> Any:
    """With weights that bfloat16 has."""
    return model.to(torch.bfloat16).to(torch.float32)


def test_most_weights_move_at_a_learning_rate_of_a_millionth(tmp_path) -> None:
    model = make_model().to(torch.bfloat16)
    before = {name: value.float() for name, value in weights(model).items()}
    trainer = run(tmp_path, model=model, learning_rate=1e-6)
    after = weights(trainer.model)
    name = "model.layers.0.mlp.up_proj.weight"
    changes = (after[name] - before[name]).abs()
    assert (changes > 0).float().mean() > 0.95
    assert 1e-6 < float(changes.mean()) < UPDATES * 1e-6


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False])
def test_of_a_policy_with_an_adapter_the_base_stays_as_it_was_loaded(tmp_path, autocast_adapter_dtype) -> None:
    model = get_peft_model(make_model().to(torch.bfloat16), lora(), autocast_adapter_dtype=autocast_adapter_dtype)
    trainer = run(tmp_path, model=model, max_steps=2)
    for network in (trainer.model, trainer.value_model):
        dtypes = {p.dtype for p in network.parameters() if p.requires_grad}
        assert dtypes == {torch.float32}
        assert {p.dtype for n, p in network.named_parameters() if "base_layer" in n} == {torch.bfloat16}
    assert max(mismatches(trainer)) < MOST_KL


def test_without_mixed_precision_construction_says_what_to_set(tmp_path, caplog) -> None:
    caplog.set_level(logging.WARNING, logger="trl_steppo")
    make_trainer(tmp_path, model=make_model().to(torch.bfloat16))
    assert "`model` trains weights in bfloat16 without mixed precision" in caplog.text
    assert "`value_model` trains weights in bfloat16" in caplog.text
    assert "Set `bf16=True`" in caplog.text
    caplog.clear()
    make_trainer(tmp_path)
    make_trainer(tmp_path, bf16=True, model=make_model().to(torch.bfloat16))
    adapted = get_peft_model(make_model().to(torch.bfloat16), lora())  # whose adapter is float32
    make_trainer(tmp_path, model=adapted, advantage_estimator="grpo", num_generations=2)
    assert not caplog.text


# -- what belongs to a thread -----------------------------------------------------------------------------------------


def test_a_run_within_an_event_loop_computes_as_any_other(tmp_path) -> None:
    """As in a notebook: rollouts are then played in another thread."""

    async def notebook() -> StepPOTrainer:
        return run(tmp_path / "notebook")

    inside, outside = asyncio.run(notebook()), run(tmp_path / "script")
    assert same(weights(inside.model), weights(outside.model))
    assert max(mismatches(inside)) < MOST_KL


@pytest.mark.parametrize("bf16", [False, True])
def test_a_run_within_autocast_computes_as_any_other(tmp_path, bf16) -> None:
    """The user's context ends after the run; what it keeps of weights would be old after the first update."""
    settings: dict[str, Any] = {"bf16": bf16, "num_ppo_epochs": 2, "kl_coef": 0.1}
    with torch.autocast("cpu", torch.bfloat16):
        inside = run(tmp_path / "inside", **settings)
    outside = run(tmp_path / "outside", **settings)
    assert same(weights(inside.model), weights(outside.model))
    assert max(mismatches(inside)) < MOST_KL


class Looking(Endless):
    """Notes in which precision its own torch code would compute."""

    seen: set[bool] = set()  # noqa: RUF012

    async def step(self, response: str) -> tuple[str, float, bool]:  # type: ignore[override]
        self.seen.add(torch.is_autocast_enabled("cpu"))
        return super().step(response)


def test_mixed_precision_is_of_the_run_s_networks_alone(tmp_path) -> None:
    """Environments and reward functions may run models of their own."""

    def reward(completions: Any, **kwargs: Any) -> list[float]:
        Looking.seen.add(torch.is_autocast_enabled("cpu"))
        return [0.0] * len(completions)

    Looking.seen.clear()
    run(tmp_path, environment_factory=Looking, reward_funcs=reward, reward_model=make_classifier(), max_steps=1)
    assert Looking.seen == {False}


# -- checkpoints, evaluation, shown episodes --------------------------------------------------------------------------


@pytest.mark.parametrize("worker", [False, True])
def test_a_run_that_goes_on_is_the_one_that_was_not_interrupted(tmp_path, worker) -> None:
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "use_rollout_worker": worker}
    settings |= {"peft_config": lora(), "kl_coef": 0.1}
    half = {"model": make_model().to(torch.bfloat16)}
    whole = run(tmp_path / "whole", **half, **settings)
    rest = make_trainer(
        tmp_path / "rest",
        bf16=True,
        train_dataset=message_rows(),
        environment_factory=Endless,
        max_steps=UPDATES,
        model=make_model().to(torch.bfloat16),
        **{"learning_rate": 1e-3, **settings},
    )
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(weights(rest.model), weights(whole.model))
    assert same(weights(rest.value_model), weights(whole.value_model))
    assert max(mismatches(rest)) < MOST_KL


def test_evaluation_plays_with_the_newest_weights(tmp_path) -> None:
    """The worker plays after the last update what a new trainer with these weights plays."""
    settings: dict[str, Any] = {"eval_dataset": message_rows(4), "learning_rate": 1e-2}
    trained = run(tmp_path / "run", use_rollout_worker=True, eval_strategy="steps", eval_steps=1, **settings)
    shown = [logs for logs in trained.state.log_history if "eval_reward" in logs]
    assert len(shown) == UPDATES
    other = make_trainer(
        tmp_path / "other", bf16=True, environment_factory=Endless, **{"model": trained.model, **settings}
    )
    assert other.evaluate()["eval_reward"] == pytest.approx(shown[-1]["eval_reward"], abs=1e-12)
    ids = asyncio.run(sampled(other)).token_ids
    assert len(ids) > 0


async def sampled(trainer: StepPOTrainer) -> Sample:
    """Of the sampler by itself, outside any rollout of the trainer's."""
    return await trainer.sampler.sample([3, 4, 5], SamplingParams(4), episode_id="x")
