"""What the settings of TRL's `GRPOConfig` are called here."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import MISSING, Field, fields
from typing import Any

from ..errors import ConfigurationError
from ..finite import shown
from .ppo_config import accelerator_has_bf16

RENAMED = {
    "max_completion_length": "response_length",
    "beta": "kl_loss_coef",
    "epsilon": "cliprange",
    "epsilon_high": "cliprange_high",
    "num_iterations": "num_ppo_epochs",
}
"""Settings of `GRPOConfig` that have another name here, and the same meaning."""

_CHOICES: dict[str, dict[Any, dict[str, Any]]] = {
    "importance_sampling_level": {
        "token": {"importance_sampling_level": "token"},
        "sequence": {"importance_sampling_level": "step"},
    },
    "loss_type": {
        "grpo": {"loss_aggregation": "episode"},
        "bnpo": {"loss_aggregation": "token"},
        "dapo": {"loss_aggregation": "token"},
    },
}

_WITHOUT_EFFECT = {  # on what is trained, or of parts that do not exist here
    *("cache_implementation", "disable_dropout", "log_multimodal", "log_unique_prompts", "num_completions_to_print"),
    *("num_generations_eval", "pad_to_multiple_of", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("remove_unused_columns", "router_aux_loss_coef", "use_bias_correction_kl", "use_transformers_paged"),
    *("sapo_temperature_neg", "sapo_temperature_pos", "vespo_k_neg", "vespo_k_pos", "vespo_lambda_neg"),
    *("vespo_lambda_pos", "entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"),
    *("use_transformers_continuous_batching", "transformers_continuous_batching_config"),
    *("vllm_mode", "vllm_server_host", "vllm_server_port", "vllm_group_port", "vllm_model_impl"),
    *("vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size"),
    *("vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_cap"),
    *("vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min"),
}

_READ_BELOW = {
    *("generation_batch_size", "gradient_accumulation_steps", "steps_per_generation", "max_steps", "bf16"),
    *("log_completions", "max_tool_calling_iterations", "model_init_kwargs", "temperature", "top_k", "top_p"),
    *("trust_remote_code", "use_vllm", "vllm_server_base_url", "vllm_server_timeout"),
}

_CURES = {
    "cast_lm_head_to_fp32": "load the model in float32",
    "entropy_coef_min": "set `entropy_coef`",
    "generation_kwargs": "set `temperature`, `top_p` or `top_k`",
    "log_completions_hub_repo": "upload the run's folder `episodes`",
    "loss_type": "set `loss_type` to 'grpo', 'bnpo' or 'dapo'",
    "multi_objective_aggregation": "add the rewards up in one function",
    "scale_rewards": "set `scale_rewards` to 'group'",
    "shuffle_dataset": "rows are always shuffled, by `data_seed`",
    "sync_ref_model": "the reference stays as it is",
    "use_adaptive_entropy": "set `entropy_coef`",
    "vllm_structured_outputs_regex": "check a response in the environment",
}


def from_grpo_settings(args: Any, known: Collection[str]) -> dict[str, Any]:
    """
    The settings of a [`StepPOConfig`] that mean what those of a `GRPOConfig` mean.

    Args:
        args (`GRPOConfig`):
            TRL's configuration.
        known (`Collection[str]`):
            Names of the settings that there are here.

    Returns:
        `dict[str, Any]`: keyword arguments.

    Raises:
        ConfigurationError: settings differ from their defaults, and there is nothing like them here; names all of
            them, and the cures.
    """
    values: dict[str, Any] = {"advantage_estimator": "grpo"}
    refused: dict[str, Any] = {}
    for setting in fields(args):
        name, value = setting.name, getattr(args, setting.name)
        if not setting.init or name in _READ_BELOW or name in _WITHOUT_EFFECT:
            continue
        if name in RENAMED:
            values[RENAMED[name]] = value
        elif name in _CHOICES and value in _CHOICES[name]:
            values.update(_CHOICES[name][value])
        elif name in known and name not in _CHOICES:
            values[name] = value
        elif value != _default(setting):
            refused[name] = value
    if refused:
        listed = "; ".join(
            f"`{name}`={shown(value)} ({_CURES.get(name, 'leave it out')})" for name, value in refused.items()
        )
        raise ConfigurationError(f"settings of `{type(args).__name__}` that have no counterpart here: {listed}")
    values.update(_batches(args))
    values.update(_sampling(args))
    # `GRPOConfig` turns bf16 on by default, on a CPU too, where it is then ignored.
    values["bf16"] = bool(args.bf16) and not args.use_cpu and accelerator_has_bf16()
    if args.model_init_kwargs or args.trust_remote_code:
        kwargs = dict(args.model_init_kwargs or {})
        values["model_init_kwargs"] = kwargs | ({"trust_remote_code": True} if args.trust_remote_code else {})
    if args.log_completions:
        values["log_episodes"] = args.per_device_train_batch_size * values["gradient_accumulation_steps"]
    else:
        values["num_sample_generations"] = 0
    return values


def _default(setting: Field[Any]) -> Any:
    factory: Callable[[], Any] | Any = setting.default_factory
    return factory() if factory is not MISSING else setting.default


def _batches(args: Any) -> dict[str, Any]:
    """An update is what is made of the episodes that were generated together; its optimizer steps are mini-batches."""
    num_mini_batches, rest = divmod(args.steps_per_generation, args.gradient_accumulation_steps)
    if rest:
        raise ConfigurationError(
            f"`steps_per_generation`={args.steps_per_generation} is no multiple of `gradient_accumulation_steps`="
            f"{args.gradient_accumulation_steps}: an update's episodes are split into mini-batches of one size"
        )
    steps = num_mini_batches * args.num_iterations  # of the optimizer, an update
    return {
        "gradient_accumulation_steps": args.steps_per_generation,
        "num_mini_batches": num_mini_batches,
        "max_steps": -(-args.max_steps // steps) if args.max_steps > 0 else args.max_steps,
    }


def _sampling(args: Any) -> dict[str, Any]:
    calls = args.max_tool_calling_iterations
    values: dict[str, Any] = {
        "temperature": args.temperature,
        "top_p": 1.0 if args.top_p is None else args.top_p,
        "top_k": args.top_k or 0,
        "max_interaction_steps": None if calls is None else calls + 1,  # and the response after the last call
    }
    if args.use_vllm and args.vllm_mode == "server":
        url = args.vllm_server_base_url or f"http://{args.vllm_server_host}:{args.vllm_server_port}"
        values |= {"use_vllm": True, "vllm_server_base_url": url, "vllm_server_timeout": args.vllm_server_timeout}
    return values
