"""Settings of TRL's `GRPOConfig` under the names that they have here."""

from __future__ import annotations

from dataclasses import fields

import pytest
import tiny
from transformers import TrainingArguments
from trl import GRPOConfig

from trl_steppo import StepPOConfig
from trl_steppo.errors import ConfigurationError
from trl_steppo.trainer import grpo_settings


def grpo(tmp_path, **settings):
    return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_what_the_defaults_mean(tmp_path):
    config = StepPOConfig.from_grpo_config(grpo(tmp_path))
    assert config.advantage_estimator == "grpo"
    assert config.importance_sampling_level == config.aggregation == "token"
    assert (config.learning_rate, config.num_generations, config.response_length) == (1e-6, 8, 512)
    assert (config.max_interaction_steps, config.log_episodes, config.num_sample_generations) == (None, 0, 0)
    assert config.output_dir == str(tmp_path)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"max_completion_length": 99, "temperature": 0.7}, {"response_length": 99, "temperature": 0.7}),
        ({"beta": 0.1, "epsilon": 0.3, "epsilon_high": 0.4}, {"kl_loss_coef": 0.1, "cliprange": 0.3}),
        ({"max_tool_calling_iterations": 3}, {"max_interaction_steps": 4}),
        ({"importance_sampling_level": "sequence", "loss_type": "grpo"}, {"importance_sampling_level": "step"}),
        ({"loss_type": "grpo"}, {"loss_aggregation": "episode"}),
        ({"top_p": None, "top_k": 10}, {"top_p": 1.0, "top_k": 10}),
        ({"use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.2}, {"use_vllm": False}),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://there:1"},
            {"use_vllm": True, "vllm_server_base_url": "http://there:1"},
        ),
        ({"log_completions": True, "gradient_accumulation_steps": 2}, {"log_episodes": 16, "batch": 16}),
        (
            {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "max_steps": 10, "num_iterations": 2},
            {"gradient_accumulation_steps": 4, "num_mini_batches": 2, "max_steps": 3, "num_ppo_epochs": 2},
        ),
        ({"reward_weights": [1.0, 0.5], "chat_template_kwargs": {"a": 1}}, {"reward_weights": [1.0, 0.5]}),
    ],
)
def test_another_name(tmp_path, theirs, ours):
    config = StepPOConfig.from_grpo_config(grpo(tmp_path, **theirs))
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    assert {name: batch if name == "batch" else getattr(config, name) for name in ours} == ours


def test_settings_take_the_place_of_those(tmp_path):
    config = StepPOConfig.from_grpo_config(grpo(tmp_path), advantage_estimator="step_gae", max_interaction_steps=7)
    assert (config.advantage_estimator, config.max_interaction_steps) == ("step_gae", 7)


def test_what_is_not_there_is_refused_in_one_message(tmp_path):
    with pytest.raises(ConfigurationError) as refused:
        StepPOConfig.from_grpo_config(grpo(tmp_path, loss_type="dr_grpo", scale_rewards="none", min_p=0.1))
    for part in (
        "`loss_type`='dr_grpo' (set `loss_type` to 'grpo'",
        "`scale_rewards`='none'",
        "`min_p`=0.1 (leave",
    ):
        assert part in str(refused.value)
    with pytest.raises(ConfigurationError, match="`steps_per_generation`=3 is no multiple of"):
        StepPOConfig.from_grpo_config(grpo(tmp_path, steps_per_generation=3, gradient_accumulation_steps=2))


def test_every_setting_of_the_installed_version_is_known_about(tmp_path):
    theirs = {f.name for f in fields(GRPOConfig)} - {f.name for f in fields(TrainingArguments)}
    known = {f.name for f in fields(StepPOConfig)} | set(grpo_settings.RENAMED) | grpo_settings._WITHOUT_EFFECT
    refused = theirs - known - grpo_settings._READ_BELOW - set(grpo_settings._CHOICES)
    assert refused <= {
        *("cast_lm_head_to_fp32", "delta", "generation_kwargs", "log_completions_hub_repo", "min_p"),
        *("multi_objective_aggregation", "off_policy_mask_threshold", "repetition_penalty", "scale_rewards"),
        *("shuffle_dataset", "sync_ref_model", "top_entropy_quantile", "use_adaptive_entropy"),
        "vllm_structured_outputs_regex",
    }


def test_a_trainer_takes_it_as_it_is(tmp_path):
    settings = {"max_steps": 1, "num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 6}
    args = grpo(tmp_path, report_to="none", save_strategy="no", disable_tqdm=True, **settings)
    trainer = tiny.make_trainer(tmp_path, args=args)
    assert trainer.args.advantage_estimator == "grpo"
    trainer.train()
    assert trainer.state.global_step == 1


def test_no_limit_of_steps(tmp_path):
    class Long(tiny.Endless):
        def step(self, response):
            self.steps = getattr(self, "steps", 0) + 1
            return "go on", 0.5, self.steps == 9

    trainer = tiny.make_trainer(tmp_path, environment_factory=Long, max_interaction_steps=None, total_episodes=8)
    trainer.train()
    assert trainer.state.log_history[0]["env/episode_steps"] == 9
