"""Policy and critic in training: what updates each of them, and how fast."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from torch import nn
from transformers import Trainer

from ..errors import ConfigurationError
from .steppo_config import StepPOConfig


@dataclass
class Network:
    """A network in training: as the distributed engine wrapped it, with what updates it."""

    module: nn.Module
    optimizer: Any
    scheduler: Any

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])


def end_update(networks: list[Network]) -> None:
    """On to the learning rates of the next update."""
    with warnings.catch_warnings():
        # While the critic warms up, the policy's schedule goes on without a step of its optimizer.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for scheduler in {id(network.scheduler): network.scheduler for network in networks}.values():
            scheduler.step()


def build_networks(
    args: StepPOConfig,
    accelerator: Accelerator,
    policy: nn.Module,
    critic: nn.Module | None,
    *,
    optimizers: tuple[Any, Any],
    decay_parameter_names: Callable[[nn.Module], list[str]],
) -> tuple[Network, Network | None]:
    """
    Place policy and critic on the device, with an optimizer and a schedule of its own each, or with one that the user
    made for both.

    Args:
        args ([`StepPOConfig`]):
            `optim`, `learning_rate`, `critic_learning_rate`, `weight_decay`, and the schedule's settings.
        accelerator ([`~accelerate.Accelerator`]):
            Wraps what it is given for distributed training.
        policy (`torch.nn.Module`), critic (`torch.nn.Module`, *optional*):
            What to train.
        optimizers (`tuple`):
            The trainer's argument: an optimizer over the parameters of both, and its scheduler; each may be `None`.
        decay_parameter_names (`Callable`):
            Names of a network's parameters that weight decay applies to.

    Raises:
        ConfigurationError: If the given optimizer holds none of a network's parameters, or there is a scheduler
            without one.
    """
    networks = [network.to(accelerator.device) for network in (policy, critic) if network is not None]
    given, given_scheduler = optimizers
    if given is not None:
        _check_optimizer(args, given, policy, critic)
        scheduler = given_scheduler if given_scheduler is not None else make_scheduler(args, given)
        *prepared, optimizer = accelerator.prepare(*networks, given)
        found = [Network(module, optimizer, scheduler) for module in prepared]
    elif given_scheduler is not None:
        raise ConfigurationError(
            "`optimizers` has a scheduler without an optimizer; pass both, or choose a schedule by `lr_scheduler_type`"
        )
    else:
        critic_rate = args.learning_rate if args.critic_learning_rate is None else args.critic_learning_rate
        found = []
        for network, learning_rate in zip(networks, (args.learning_rate, critic_rate), strict=False):
            optimizer = make_optimizer(args, network, learning_rate, set(decay_parameter_names(network)))
            scheduler = make_scheduler(args, optimizer)
            module, optimizer = accelerator.prepare(network, optimizer)
            found.append(Network(module, optimizer, scheduler))
    return found[0], found[1] if critic is not None else None


def make_optimizer(args: StepPOConfig, network: nn.Module, learning_rate: float, decays: set[str]) -> Any:
    """As `TrainingArguments` choose it, over the parameters that require a gradient."""
    trained = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for n, p in trained if n in decays], "weight_decay": args.weight_decay},
        {"params": [p for n, p in trained if n not in decays], "weight_decay": 0.0},
    ]
    optimizer_class, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    return optimizer_class([group for group in groups if group["params"]], **{**kwargs, "lr": learning_rate})


def make_scheduler(args: StepPOConfig, optimizer: Any) -> Any:
    """A schedule over the run's updates."""
    total = args.num_total_batches
    assert total is not None
    return transformers.get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(total),
        num_training_steps=total,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs,  # type: ignore[arg-type]
    )


def _check_optimizer(args: StepPOConfig, optimizer: Any, policy: nn.Module, critic: nn.Module | None) -> None:
    """One optimizer for two networks, as `PPOTrainer` has it."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigurationError(
            f"`optimizers` has a {type(optimizer).__name__}; pass a `torch.optim.Optimizer` and its scheduler, or None"
        )
    if args.critic_learning_rate is not None:
        raise ConfigurationError(
            f"`critic_learning_rate`={args.critic_learning_rate} has no effect together with `optimizers`, whose "
            "parameter groups have learning rates of their own; remove one of the two"
        )
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, network in (("model", policy), ("value_model", critic)):
        trained = [p for p in network.parameters() if p.requires_grad] if network is not None else []
        if network is not None and not any(id(parameter) in held for parameter in trained):
            raise ConfigurationError(
                f"`optimizers` has an optimizer that holds no parameter of `{name}` that is trained; build it over "
                "those of both, [*model.parameters(), *value_model.parameters()], pass that `value_model`, and a "
                "`PeftModel` instead of `peft_config`"
            )
