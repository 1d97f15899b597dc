"""How a run is spread over processes, and what DeepSpeed and FSDP cannot do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..compat.accelerate import is_fsdp2
from ..compat.torch import knows_fsdp2
from ..errors import ConfigurationError
from ..types import JsonObject
from .steppo_config import StepPOConfig

_FSDP_OPTIONS: dict[str, tuple[bool, object, str]] = {
    # What an option has to be, what accelerate's launcher has without it, and why another value has no effect
    "reshard_after_forward": (True, True, "weights are gathered again in the backward pass"),
    "offload_params": (False, False, "`zero3_offload` has that"),
    "activation_checkpointing": (False, False, "set the run's `gradient_checkpointing`"),
    "cpu_ram_efficient_loading": (False, True, "every rank copies its model's weights"),
    "ignored_modules": (False, None, "every parameter is kept in shards"),
}


@dataclass(frozen=True)
class Distribution:
    """
    How accelerate distributes a run, as far as settings may contradict it.

    Args:
        kind (`str`):
            accelerate's `distributed_type`, e.g. `"DEEPSPEED"`.
        zero_stage (`int`, *optional*):
            The stage of DeepSpeed.
        is_fsdp2 (`bool`, *optional*, defaults to `False`):
            Whether FSDP is in its version 2.
        fsdp_options (`Mapping[str, object]`, *optional*):
            Options of FSDP's version 2: those of `fsdp_config`, without `fsdp_`.
    """

    kind: str
    zero_stage: int | None = None
    is_fsdp2: bool = False
    fsdp_options: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def from_accelerator(cls, accelerator: Accelerator) -> Distribution:
        """How a run is distributed that has been launched."""
        kind = str(accelerator.distributed_type.value)
        if kind == "DEEPSPEED":
            return cls(kind, zero_stage=accelerator.deepspeed_plugin.zero_stage)
        if kind != "FSDP" or not is_fsdp2(accelerator):
            return cls(kind)
        from torch.distributed.fsdp import CPUOffloadPolicy

        plugin: Any = accelerator.state.fsdp_plugin
        options = {name: getattr(plugin, name) for name in _FSDP_OPTIONS if name != "offload_params"}
        options["offload_params"] = isinstance(plugin.cpu_offload, CPUOffloadPolicy)
        return cls(kind, is_fsdp2=True, fsdp_options=options)

    @classmethod
    def from_file(cls, file: JsonObject) -> Distribution:
        """How a run will be distributed that is launched with the settings of an accelerate file."""
        kind = str(file.get("distributed_type", "NO"))
        if kind == "DEEPSPEED":
            return cls(kind, zero_stage=deepspeed_settings(file)["stage"])
        section = file.get("fsdp_config") or {}
        if kind != "FSDP" or int(section.get("fsdp_version", 1)) != 2:
            return cls(kind)
        options = {name: section.get(f"fsdp_{name}", default) for name, (_, default, _) in _FSDP_OPTIONS.items()}
        return cls(kind, is_fsdp2=True, fsdp_options=options)


def deepspeed_settings(file: JsonObject) -> JsonObject:
    """
    DeepSpeed's settings in an accelerate file, or in the file that it points to, by DeepSpeed's own names; `stage` is
    that of ZeRO.
    """
    section = file.get("deepspeed_config") or {}
    other = section.get("deepspeed_config_file")
    if other is None:
        return {**section, "stage": section.get("zero_stage", 2)}
    content: JsonObject = json.loads(Path(other).read_text())
    return {**content, "stage": content.get("zero_optimization", {}).get("stage", 0)}


def check_distribution(
    args: StepPOConfig, distribution: Distribution, optimizers: tuple[object, object] = (None, None)
) -> None:
    """
    Raise a `ConfigurationError` for a distribution that is not supported, and for settings that it cannot have.

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        distribution ([`Distribution`]):
            How it is distributed.
        optimizers (`tuple`, *optional*):
            The optimizer and the schedule that the trainer is given; `None` where there is none.
    """
    if distribution.kind == "MEGATRON_LM":
        raise ConfigurationError(
            f"accelerate was launched with {distribution.kind}, and this version trains in one process, with DDP, "
            "with FSDP2, or with DeepSpeed's ZeRO; choose one of these (`trl-steppo config`)"
        )
    if distribution.kind == "FSDP":
        _check_fsdp(distribution)
        _check_apart_in_shards(args, optimizers, "FSDP2")
    if distribution.kind == "DEEPSPEED":
        _check_deepspeed(args, distribution, optimizers)


def _check_deepspeed(args: StepPOConfig, distribution: Distribution, optimizers: tuple[object, object]) -> None:
    if distribution.zero_stage == 0:
        raise ConfigurationError("DeepSpeed's stage 0 shards nothing; choose stage 2 or 3, or DDP without DeepSpeed")
    _check_apart_in_shards(args, optimizers, "DeepSpeed")
    if distribution.zero_stage == 3 and not args.ds3_gather_for_generation:
        raise ConfigurationError(
            "`ds3_gather_for_generation` is False: layers would be gathered for every token, by all ranks together, "
            "and their episodes have different lengths; leave it at True"
        )
    config: Any = getattr(args, "hf_deepspeed_config", None)
    mismatches = config.mismatches if config is not None else ()
    if mismatches:
        raise ConfigurationError(
            "the DeepSpeed configuration contradicts the run's settings; write 'auto' there:\n" + "\n".join(mismatches)
        )


def _check_fsdp(distribution: Distribution) -> None:
    """FSDP's version 1, and settings of accelerate that would change what version 2 does here."""
    if not distribution.is_fsdp2:
        raise ConfigurationError(
            "accelerate was launched with FSDP in its version 1; set `fsdp_version: 2` in the configuration's "
            "`fsdp_config` (`trl-steppo config fsdp2`)"
        )
    if not knows_fsdp2():
        raise ConfigurationError(f"torch {torch.__version__} is too old for FSDP2 here; upgrade it (2.13 will do)")
    for name, (needed, _, why) in _FSDP_OPTIONS.items():
        value = distribution.fsdp_options[name]
        if bool(value) != needed:
            raise ConfigurationError(
                f"`fsdp_{name}` is {value!r} in the configuration's `fsdp_config`, which has no effect here: {why}; "
                "leave it out (`trl-steppo config fsdp2`)"
            )


def _check_apart_in_shards(args: StepPOConfig, optimizers: tuple[object, object], library: str) -> None:
    """What networks cannot share where each has shards of its own."""
    if any(given is not None for given in optimizers):
        raise ConfigurationError(
            f"`optimizers` is set, and {library} has shards with an optimizer of their own for each network; leave it "
            "out, and set `optim`, `learning_rate` and `critic_learning_rate`"
        )
    if args.critic_shares_base:
        raise ConfigurationError(
            f"`critic_shares_base` is set, and two networks cannot share parameters under {library}; leave it out"
        )
