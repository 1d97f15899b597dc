"""TRL's `GRPOConfig` here: what becomes of every setting of it."""

from __future__ import annotations

import re
import typing
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import TrainingArguments
from trl import GRPOConfig

from tests.trainer.tiny import TINY, TOKENIZER, Endless, make_model, message_rows
from trl_steppo import PPOConfig, PPOTrainer, StepPOConfig, StepPOTrainer
from trl_steppo.errors import ConfigurationError
from trl_steppo.losses import kl_estimate
from trl_steppo.trainer.grpo_settings import COUNTERPARTS

INHERITED = {f.name for f in fields(TrainingArguments)}
OWN = {f.name: f for f in fields(GRPOConfig) if f.name not in INHERITED}
PAGE = Path(__file__).parents[2] / "docs" / "get_started" / "from_grpo_trainer.md"


def grpo_config(directory: Path, **settings: Any) -> GRPOConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of deprecated names
        return GRPOConfig(output_dir=str(directory), use_cpu=True, report_to="none", **settings)


def convert(directory: Path, **settings: Any) -> StepPOConfig:
    return StepPOConfig.from_grpo_config(grpo_config(directory, **settings))


# -- the table --------------------------------------------------------------------------------------------------------


def test_every_setting_of_this_trl_has_a_counterpart():
    """A TRL with a new setting fails here: put it into the table."""
    assert set(OWN) - set(COUNTERPARTS) == set()


def test_counterparts_are_settings_there_are():
    own = {f.name for f in fields(StepPOConfig)}
    assert {c.field for c in COUNTERPARTS.values() if c.field} <= own
    assert not {name for name, c in COUNTERPARTS.items() if not c.taken} & own
    named = {word for c in COUNTERPARTS.values() for word in re.findall(r"`([a-z_0-9]+)`", c.words)}
    assert named - own - set(COUNTERPARTS) - {"trust_remote_code"} == set()


def test_the_page_has_every_setting():
    section = PAGE.read_text().partition("## Settings")[2]
    assert [name for name in COUNTERPARTS if f"`{name}`" not in section] == []


# -- what is copied ---------------------------------------------------------------------------------------------------


def test_defaults_become_those_of_grpo_config(tmp_path):
    config = convert(tmp_path)
    assert (config.advantage_estimator, config.importance_sampling_level, config.aggregation) == (
        *("grpo", "token", "token"),
    )
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps, config.num_generations) == (
        8,
        1,
        8,
    )
    assert (config.num_generations, config.max_interaction_steps) == (8, None)
    assert config.response_length == OWN["max_completion_length"].default
    assert config.learning_rate == 1e-6
    assert (config.temperature, config.top_p, config.top_k, config.num_ppo_epochs) == (1.0, 1.0, 0, 1)
    assert (config.uses_reference, config.correction, config.num_sample_generations, config.bf16) == (
        *(False, "none", 0, False),
    )


def test_training_arguments_are_copied(tmp_path):
    settings: dict[str, Any] = {
        "seed": 7,
        "weight_decay": 0.3,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 1e-7},
        "num_train_epochs": 2.0,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "no",
        "max_grad_norm": 0.5,
        "gradient_checkpointing": False,
    }
    config = convert(tmp_path, **settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_settings_with_another_name_are_copied(tmp_path):
    values: dict[str, Any] = {
        "num_generations": 4,
        "temperature": 0.6,
        "top_p": 0.9,
        "chat_template_kwargs": {"enable_thinking": False},
        "ds3_gather_for_generation": False,
        "beta": 0.04,
        "num_iterations": 3,
        "epsilon": 0.1,
        "epsilon_high": 0.28,
        "reward_weights": [1.0, 2.0],
        "mask_truncated_completions": True,
        "entropy_coef": 0.01,
        "model_init_kwargs": {"revision": "main"},
    }
    copied = {name: c.field for name, c in COUNTERPARTS.items() if c.field}
    assert set(values) == set(copied)
    config = convert(tmp_path, **values)
    for name, value in values.items():
        assert getattr(config, copied[name]) == value != OWN[name].default


# -- what is converted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_tool_calling_iterations": 3}, {"max_interaction_steps": 4}),
        ({"max_tool_calling_iterations": 0}, {"max_interaction_steps": 1}),
        ({"max_completion_length": 99}, {"response_length": 99}),
        (
            {"beta": 0.1, "use_bias_correction_kl": True},
            {"kl_loss_coef": 0.1, "kl_loss_estimator": "k2", "kl_coef": 0.0},
        ),
        ({"beta": 0.1, "use_bias_correction_kl": False}, {"kl_loss_estimator": "k3"}),
        ({"loss_type": "bnpo"}, {"aggregation": "token"}),
        (
            {"loss_type": "grpo", "importance_sampling_level": "sequence"},
            {"aggregation": "episode", "importance_sampling_level": "step"},
        ),
        ({"log_completions": True, "num_completions_to_print": 3}, {"log_episodes": 3, "num_sample_generations": 10}),
        ({"log_completions": True}, {"log_episodes": 8}),
        ({"disable_dropout": True, "log_multimodal": False}, {}),
        ({"use_transformers_continuous_batching": True}, {}),
        ({"vllm_mode": "server", "vllm_server_port": 9}, {"use_vllm": False, "vllm_server_base_url": None}),
        ({"use_vllm": True, "vllm_gpu_memory_utilization": 0.2}, {"use_vllm": False}),
        (
            {"trust_remote_code": True, "model_init_kwargs": {"dtype": "bfloat16"}},
            {"model_init_kwargs": {"trust_remote_code": True, "dtype": "bfloat16"}},
        ),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_port": 9},
            {"use_vllm": True, "vllm_server_base_url": "http://localhost:9", "rollout_correction": None},
        ),
        (
            {
                "use_vllm": True,
                "vllm_mode": "server",
                "vllm_server_base_url": "http://a:1",
                "vllm_server_timeout": 9.0,
                "vllm_importance_sampling_correction": False,
            },
            {"vllm_urls": ["http://a:1"], "vllm_server_timeout": 9.0, "rollout_correction": "none"},
        ),
        (
            {
                "use_vllm": True,
                "vllm_mode": "server",
                "vllm_importance_sampling_mode": "token_truncate",
                "vllm_importance_sampling_cap": 5.0,
            },
            {"rollout_correction": "truncate", "rollout_correction_level": "token", "rollout_correction_cap": 5.0},
        ),
    ],
)
def test_settings_become_their_counterparts(tmp_path, settings, expected):
    config = convert(tmp_path, **settings)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("settings", "accumulation", "mini_batches", "prompts"),
    [  # of 4 episodes a micro-batch, and 2 a prompt
        ({"gradient_accumulation_steps": 3}, 3, 1, 6),
        ({"generation_batch_size": 24, "gradient_accumulation_steps": 2}, 6, 3, 12),
        ({"steps_per_generation": 4, "num_iterations": 2}, 4, 4, 8),
        ({"steps_per_generation": 2, "gradient_accumulation_steps": 4}, 4, 1, 8),
    ],
)
def test_an_update_has_as_many_prompts_and_optimizer_steps(tmp_path, settings, accumulation, mini_batches, prompts):
    config = convert(tmp_path, per_device_train_batch_size=4, num_generations=2, **settings)
    assert (config.gradient_accumulation_steps, config.num_mini_batches) == (accumulation, mini_batches)
    assert config.per_device_train_batch_size * accumulation // config.num_generations == prompts


def test_steps_of_the_optimizer_become_updates(tmp_path):
    """Two optimizer steps, twice, are made of what is sampled at once."""
    steps = {"max_steps": 10, "warmup_steps": 8, "logging_steps": 1, "save_steps": 500, "eval_steps": 4}
    settings: dict[str, Any] = {"steps_per_generation": 2, "num_iterations": 2, "per_device_train_batch_size": 8}
    config = convert(tmp_path, **settings, **steps)
    assert {name: getattr(config, name) for name in steps} == {
        "max_steps": 3,
        "warmup_steps": 2,
        "logging_steps": 1,
        "save_steps": 125,
        "eval_steps": 1,
    }
    late = {"eval_strategy": "steps", "eval_delay": 6, "lr_scheduler_kwargs": {"num_decay_steps": 9, "num_cycles": 2}}
    config = convert(tmp_path, **settings, **late, warmup_steps=3)
    assert (config.warmup_steps, config.eval_delay) == (0, 2)  # no update without learning because of three steps
    assert config.lr_scheduler_kwargs == {"num_decay_steps": 3, "num_cycles": 2}
    parts = convert(tmp_path, **settings, logging_steps=0.1, warmup_steps=0.05)
    assert (parts.logging_steps, parts.warmup_steps, parts.max_steps) == (0.1, 0.05, -1)


def test_the_gradient_of_the_corrected_kl_is_that_of_k2():
    """Before the weights have moved: TRL's loss is ratio · k3."""
    torch.manual_seed(0)
    new, ref, mask = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    theirs = (new - new.detach()).exp() * kl_estimate(new, ref, mask, "k3")
    gradients = [torch.autograd.grad(loss.sum(), new)[0] for loss in (theirs, kl_estimate(new, ref, mask, "k2"))]
    torch.testing.assert_close(*gradients)


def test_another_estimator_and_further_settings(tmp_path):
    """`scale_rewards` is a matter of `grpo` alone."""
    args = grpo_config(tmp_path, scale_rewards=False)
    config = StepPOConfig.from_grpo_config(args, advantage_estimator="step_gae", max_interaction_steps=8, lam=0.9)
    assert (config.advantage_estimator, config.max_interaction_steps, config.lam) == ("step_gae", 8, 0.9)
    assert StepPOConfig.from_grpo_config(args, advantage_estimator="rloo").num_generations == 8


@pytest.mark.parametrize(
    ("settings", "level", "aggregation"),
    [
        ({}, "step", None),  # as a plain StepPOConfig has it
        ({"loss_type": "grpo"}, "step", "episode"),
        ({"importance_sampling_level": "sequence"}, "step", None),
    ],
)
def test_steppo_has_its_own_ratio_and_average(tmp_path, settings, level, aggregation):
    args = grpo_config(tmp_path, **settings)
    config = StepPOConfig.from_grpo_config(args, advantage_estimator="step_gae")
    assert (config.importance_sampling_level, config.loss_aggregation) == (level, aggregation)
    assert StepPOConfig.from_grpo_config(args).loss_aggregation == (aggregation or "token")


@pytest.mark.parametrize("args", [{"seed": 1}, TrainingArguments("runs")])
def test_only_a_grpo_config_is_converted(args):
    with pytest.raises(ConfigurationError, match=f"`args` is a {type(args).__name__}; `from_grpo_config` takes TRL's"):
        StepPOConfig.from_grpo_config(args)


# -- what is refused --------------------------------------------------------------------------------------------------


def test_one_error_has_all_that_is_refused(tmp_path):
    args = grpo_config(tmp_path)
    refused = [name for name, counterpart in COUNTERPARTS.items() if not counterpart.taken and name in OWN]
    for name in refused:
        now, hint = getattr(args, name), typing.get_type_hints(GRPOConfig)[name]
        setattr(args, name, not now if hint is bool else "nonsense" if isinstance(now, str) else 77)
    with pytest.raises(ConfigurationError) as error:
        StepPOConfig.from_grpo_config(args)
    for name in refused:
        assert f"- `{name}`={getattr(args, name)!r}: {COUNTERPARTS[name].words}" in str(error.value)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"loss_type": "cispo", "scale_rewards": "none"}, ["loss_type", "scale_rewards"]),
        ({"max_completion_length": None}, ["max_completion_length"]),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2}, ["steps_per_generation"]),
        (
            {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "num_iterations": 2},
            ["steps_per_generation"],
        ),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_mode": "sequence_truncate"},
            ["vllm_importance_sampling_mode"],
        ),
        (  # whose ratios have no lower bound there
            {"use_vllm": True, "vllm_mode": "server", "vllm_importance_sampling_mode": "token_mask"},
            ["vllm_importance_sampling_mode"],
        ),
    ],
)
def test_values_that_have_no_place(tmp_path, settings, names):
    with pytest.raises(ConfigurationError) as error:
        convert(tmp_path, **settings)
    assert re.findall(r"^- `([a-z_]+)`=", str(error.value), flags=re.MULTILINE) == names


def test_a_prompt_that_ranks_would_share_is_refused(tmp_path, monkeypatch):
    """Two ranks play 4 of its 8 episodes each there."""
    monkeypatch.setattr(GRPOConfig, "world_size", 2)
    args = grpo_config(tmp_path, per_device_train_batch_size=4, num_generations=8)
    with pytest.raises(ConfigurationError, match=r"`num_generations`=8: .* since a row's episodes stay on one rank"):
        StepPOConfig.from_grpo_config(args)


def test_episodes_without_a_budget_are_told_of(tmp_path, caplog):
    transformers.utils.logging.warning_once.cache_clear()
    with caplog.at_level("WARNING"):
        convert(tmp_path, max_tool_calling_iterations=3)
        assert "max_episode_tokens" not in caplog.text
        convert(tmp_path)
    assert "unless `max_episode_tokens` or `max_interaction_steps` is set" in caplog.text


def test_unknown_settings_are_named_at_once(tmp_path):
    with pytest.raises(ConfigurationError) as error:
        StepPOConfig(output_dir=str(tmp_path), epsilon=0.1, max_completion_length=9, num_generation=4, nonsense=1)
    for words in (
        "from_grpo_config",
        "- `epsilon` (of GRPOConfig): `cliprange`",
        "- `max_completion_length` (of GRPOConfig): `response_length`",
        "- `num_generation`: did you mean `num_generations`?",
        "- `nonsense`",
    ):
        assert words in str(error.value)


def test_unknown_settings_of_ppo_config_are_named(tmp_path):
    with pytest.raises(ConfigurationError, match="`clip_range`: did you mean `cliprange`") as error:
        PPOConfig(output_dir=str(tmp_path), clip_range=0.1)
    assert "from_grpo_config" not in str(error.value)


@pytest.mark.parametrize("trainer", [PPOTrainer, StepPOTrainer])
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (grpo_config, r"`args` is a GRPOConfig; `StepPOTrainer` takes `StepPOConfig.from_grpo_config\(args\)`"),
        (lambda directory: TrainingArguments(str(directory)), "`args` is a TrainingArguments; pass a PPOConfig"),
        (lambda directory: {"seed": 1}, "`args` is a dict"),
    ],
)
def test_other_configurations_are_refused(tmp_path, trainer, make, words):
    with pytest.raises(ConfigurationError, match=words):
        trainer(make(tmp_path), TOKENIZER, make_model(), None, object(), [], None)


# -- a run ------------------------------------------------------------------------------------------------------------


def test_a_converted_configuration_trains(tmp_path):
    """Without a limit of steps, episodes go on until another budget ends them."""
    settings = {name: value for name, value in TINY.items() if name in INHERITED - {"use_cpu", "report_to"}}
    args = grpo_config(
        tmp_path, **settings, num_generations=4, max_completion_length=6, max_steps=2, steps_per_generation=2
    )
    config = StepPOConfig.from_grpo_config(args, max_prompt_length=400)
    trainer = StepPOTrainer(config, TOKENIZER, make_model(), train_dataset=message_rows(), environment_factory=Endless)
    trainer.train()
    assert trainer.state.global_step == 1  # of two optimizer steps
    logs = trainer.state.log_history[0]
    assert logs["episode"] == 16
    assert logs["env/episode_steps"] > 5
