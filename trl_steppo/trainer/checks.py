"""What can be known to be wrong before the first episode: arguments of the trainer that do not fit together."""

from __future__ import annotations

from typing import Any

from accelerate import DistributedType
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_utils import SchedulerType

from ..errors import ConfigurationError
from ..models import check_critic, is_peft_model
from .steppo_config import CRITIC_ESTIMATORS, StepPOConfig


def refuse_unsupported(args: StepPOConfig) -> None:
    """Settings of `TrainingArguments` that mean nothing here."""
    for name, unset in (
        ("neftune_noise_alpha", None),
        ("label_smoothing_factor", 0.0),
        ("auto_find_batch_size", False),
    ):
        if getattr(args, name) != unset:
            raise ConfigurationError(f"`{name}`={getattr(args, name)!r} has no effect in this trainer; leave it out")
    if args.lr_scheduler_type == SchedulerType.REDUCE_ON_PLATEAU:
        raise ConfigurationError(
            "`lr_scheduler_type` is 'reduce_lr_on_plateau', which waits for a metric; choose a schedule over updates"
        )


def check_distribution(distributed_type: DistributedType) -> None:
    """Engines that this version does not know."""
    if distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
        raise ConfigurationError(
            f"accelerate was launched with {distributed_type.value}, and this version trains in one process or with "
            "DDP; choose one of these with `accelerate config`"
        )


def check_models(
    args: StepPOConfig,
    model: PreTrainedModel,
    ref_model: PreTrainedModel | None,
    value_model: PreTrainedModel | None,
    reward_model: nn.Module | None,
) -> None:
    """Models that are missing, of the wrong kind, given twice, or without use."""
    if value_model is not None and value_model is reward_model:
        raise ConfigurationError(
            "`value_model` is the `reward_model` itself, which must not be trained; load it twice, or leave "
            "`value_model` out to have a critic built"
        )
    if ref_model is model:
        raise ConfigurationError(
            "`ref_model` is the policy itself, which training changes; leave it out to have a copy made"
        )
    if ref_model is not None and not args.uses_reference:
        raise ConfigurationError(
            "`ref_model` has no effect: `kl_coef` and `kl_loss_coef` are both 0; set one of them, or leave it out"
        )
    if value_model is not None and not args.uses_critic:
        raise ConfigurationError(
            f"`value_model` has no effect with `advantage_estimator`={args.advantage_estimator!r}, which has no "
            f"critic; leave it out, or choose one of {CRITIC_ESTIMATORS}"
        )
    if value_model is not None:
        check_critic(value_model, "value_model")
    if reward_model is not None:
        check_critic(reward_model, "reward_model")


def check_adapters(args: StepPOConfig, model: Any, value_model: Any) -> None:
    """Settings about adapters, and the adapters that the policy has."""
    if not is_peft_model(model):
        for name in ("model_adapter_name", "ref_adapter_name", "critic_shares_base"):
            if getattr(args, name):
                raise ConfigurationError(
                    f"`{name}`={getattr(args, name)!r} has no effect: `model` has no adapters. Pass `peft_config`, or "
                    "a `PeftModel`, or leave it out"
                )
        return
    for name in ("model_adapter_name", "ref_adapter_name"):
        if getattr(args, name) is not None and getattr(args, name) not in model.peft_config:
            raise ConfigurationError(
                f"`{name}` is {getattr(args, name)!r}, and the adapters of `model` are {list(model.peft_config)}"
            )
    if args.ref_adapter_name is not None and not args.uses_reference:
        raise ConfigurationError(
            f"`ref_adapter_name`={args.ref_adapter_name!r} has no effect: `kl_coef` and `kl_loss_coef` are both 0; "
            "set one of them, or leave it out"
        )
    if args.critic_shares_base and value_model is not None:
        raise ConfigurationError(
            "`critic_shares_base` is set, and a `value_model` is given, which has a base of its own; remove one"
        )
    if args.critic_shares_base and not args.uses_critic:
        raise ConfigurationError(
            f"`critic_shares_base` has no effect with `advantage_estimator`={args.advantage_estimator!r}, which has "
            "no critic; leave it out"
        )


def check_trainable(model: nn.Module, name: str) -> None:
    """A network that training cannot change."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError(
            f"no parameter of `{name}` requires a gradient, so there is nothing to train; load its adapter with "
            "`is_trainable=True`, or choose one with `model_adapter_name`"
        )
