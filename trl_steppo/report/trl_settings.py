"""The settings of TRL's GRPOTrainer and RLOOTrainer by our names, so that a report compares them with ours."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil

from ..types import JsonObject

RENAMED = {
    "beta": "kl_loss_coef",
    "num_iterations": "num_ppo_epochs",
    "epsilon": "cliprange",
    "epsilon_high": "cliprange_high",
}
"""Our names of settings that take the same values, as in `trl_steppo.trainer.grpo_settings`, which loads torch."""
EQUAL = (
    *("num_generations", "temperature", "top_p", "chat_template_kwargs", "reward_weights", "entropy_coef"),
    *("mask_truncated_completions", "model_init_kwargs"),
)
"""Settings of online trainers that both libraries have, with the same names and values."""
_TRAINING = (
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "optim", "optim_args", "weight_decay"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16", "fp16", "num_train_epochs"),
)
"""Settings of `TrainingArguments` that change what is learned."""
_ESTIMATORS = {"trl.GRPO": "grpo", "trl.AsyncGRPO": "grpo", "trl.RLOO": "rloo"}
_AGGREGATIONS = {"dapo": "token", "bnpo": "token", "grpo": "episode"}
_LEVELS = {"token": "token", "sequence": "step"}


def as_our_settings(settings: JsonObject) -> JsonObject:
    """
    The settings of one of TRL's trainers that have a counterpart in a `StepPOConfig`, by its names and in its units:
    an update is all that the trainer samples at a time.

    Args:
        settings (`dict`):
            The trainer's settings, with its `trainer`, as in "trl.GRPO".
    """
    ours = {name: settings[name] for name in (*_TRAINING, *EQUAL) if name in settings}
    ours |= {our_name: settings[name] for name, our_name in RENAMED.items() if name in settings}
    for names, convert in _CONVERTED:
        if all(name in settings for name in names):
            ours |= convert(settings)
    return ours


def _responses(settings: JsonObject) -> JsonObject:
    return {"response_length": settings["max_completion_length"]}


def _turns(settings: JsonObject) -> JsonObject:
    turns = settings["max_tool_calling_iterations"]
    return {"max_interaction_steps": None if turns is None else turns + 1}


def _top_k(settings: JsonObject) -> JsonObject:
    return {"top_k": max(settings["top_k"] or 0, 0)}


def _algorithm(settings: JsonObject) -> JsonObject:
    trainer = str(settings["trainer"])
    return {"advantage_estimator": _ESTIMATORS.get(trainer, trainer.removeprefix("trl."))}


def _aggregation(settings: JsonObject) -> JsonObject:
    return {"loss_aggregation": _AGGREGATIONS.get(settings["loss_type"], settings["loss_type"])}


def _level(settings: JsonObject) -> JsonObject:
    level = settings["importance_sampling_level"]
    return {"importance_sampling_level": _LEVELS.get(level, level)}


def _sizes(settings: JsonObject) -> JsonObject:
    sampled, repeated = settings["generation_batch_size"], settings["steps_per_generation"]
    accumulated = settings["gradient_accumulation_steps"]
    if not (sampled and repeated and accumulated):
        return {}
    mini_batches = max(1, repeated // accumulated)
    steps = mini_batches * (settings.get("num_iterations") or 1)
    most, warmup = settings.get("max_steps"), settings.get("warmup_steps")
    return {
        "batch_size": sampled * max(1, accumulated // repeated),
        "num_mini_batches": mini_batches,
        # -1 means no limit; a warm-up below 1 is a part of the run.
        "max_steps": ceil(most / steps) if most and most >= 1 else most,
        "warmup_steps": warmup // steps if warmup and warmup >= 1 else warmup,
    }


_CONVERTED: tuple[tuple[tuple[str, ...], Callable[[JsonObject], JsonObject]], ...] = (
    (("trainer",), _algorithm),
    (("max_completion_length",), _responses),
    (("max_tool_calling_iterations",), _turns),
    (("top_k",), _top_k),
    (("loss_type",), _aggregation),
    (("importance_sampling_level",), _level),
    (("generation_batch_size", "steps_per_generation", "gradient_accumulation_steps"), _sizes),
)
