"""What this package uses of transformers beyond its documented interface, or under names that have changed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ConfigurationError
from . import attribute, find

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.hf_argparser import DataClass as DataClass
    from transformers.hf_argparser import DataClassType as DataClassType
    from transformers.trainer_utils import SaveStrategy as SaveStrategy
    from transformers.trainer_utils import TrainOutput as TrainOutput

    class CacheLayerMixin:
        """The base class of a layer of a cache of keys and values, as far as it is used here."""

        is_initialized: bool

        def __init__(self) -> None: ...

else:
    CacheLayerMixin = find("transformers.cache_utils.CacheLayerMixin")
    SaveStrategy = find("transformers.trainer_utils.SaveStrategy")
    TrainOutput = find("transformers.trainer_utils.TrainOutput")

AttentionMaskInterface = find("transformers.masking_utils.AttentionMaskInterface")
"""Where the masks of attention implementations are registered."""

sdpa_mask = find("transformers.masking_utils.sdpa_mask")
"""The mask of `sdpa` attention."""

sdpa_attention_forward: Callable[..., tuple[torch.Tensor, None]] = find(
    "transformers.integrations.sdpa_attention.sdpa_attention_forward"
)
"""`sdpa` attention, as transformers calls its attention implementations."""

ExportableState = find("transformers.trainer_callback.ExportableState")
"""Callbacks whose state is part of a checkpoint."""

speed_metrics = find("transformers.trainer_utils.speed_metrics")
"""What `Trainer` logs of a run's time."""

_CACHE_ARGUMENTS = ("cache", "past_key_values")  # transformers from 5.24, and before


def attention_of(config: object) -> str:
    """
    The attention implementation that a configuration names, e.g. `"sdpa"`.

    Raises:
        ConfigurationError: If this version of transformers keeps it elsewhere.
    """
    return str(attribute("transformers", config, "_attn_implementation"))


def source_of(config: object) -> str | None:
    """Where the weights of a model with this configuration were loaded from: a name or a directory, if any."""
    return getattr(config, "_name_or_path", None) or None


def exchange_attention(model: PreTrainedModel, name: str) -> None:
    """
    Have every attention layer of a model use another implementation, and make sure that each does: each layer reads a
    configuration of its own, and versions differ in which of them `set_attn_implementation` reaches.

    Args:
        model (`PreTrainedModel`):
            Changed in place.
        name (`str`):
            A name that is registered in transformers' `AttentionInterface`.

    Raises:
        ConfigurationError: If a layer keeps its implementation.
    """
    model.set_attn_implementation(name)
    for module in model.modules():  # a backbone with a configuration of its own is not reached before 5.19
        exchange: Callable[[str], object] | None = getattr(module, "set_attn_implementation", None)
        if module is not model and _follows(model, module) and exchange is not None:
            exchange(name)
    left = [layer for layer, module in model.named_modules() if _follows(model, module) and _reads(module) != name]
    if left:
        raise ConfigurationError(
            f"{type(model).__name__}: {left[0]!r} ({len(left)} modules in all) keeps its attention with transformers "
            f"{version('transformers')} where {name!r} was set; give wrapper and backbone one configuration"
        )


def _follows(model: PreTrainedModel, module: nn.Module) -> bool:
    """Whether a module has a configuration of the language model's kind."""
    config = getattr(module, "config", None)
    return config is not None and type(config) in (type(model.config), type(model.config.get_text_config()))


def _reads(module: nn.Module) -> str:
    return attention_of(module.config)


def special_attention(config: object) -> Iterator[str]:
    """What keeps the layers of a model from attending to all tokens before them; nothing for most models."""
    layers = sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))
    if layers != ["full_attention"]:
        yield f"layers of {', '.join(layers)}"
    window = getattr(config, "sliding_window", None)
    if window and not hasattr(config, "layer_types"):
        yield f"a sliding window of {window}"
    if getattr(config, "alibi", False):
        yield "ALiBi instead of positions"


def cache_argument(model: nn.Module) -> str | None:
    """The name of the cache argument of a model's forward pass; `None` if it has no known one."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in parameters), None)


def takes_positions(model: nn.Module) -> bool:
    """Whether a model's forward pass takes `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters


def output_head(model: Any) -> nn.Module:
    """The module that makes a language model's logits of its hidden states."""
    head: nn.Module = model.get_output_embeddings()
    return head


def supports_attention_backend(model: object) -> bool:
    """Whether a model's layers attend by an implementation that can be exchanged."""
    return bool(attribute("transformers", model, "_supports_attention_backend"))


def enable_checkpointing(model: object, kwargs: object) -> None:
    """Have a model compute activations again in its backward pass. transformers from 5.24 has another name for it."""
    name = "activation_checkpointing_enable"
    if not hasattr(model, name):
        name = "gradient_checkpointing_enable"
    attribute("transformers", model, name)(kwargs)


def follow_checkpointing(args: Any) -> None:
    """
    Set the newer name of `gradient_checkpointing` (transformers from 5.24), whose default differs here, to what that
    says, so that users are not warned of a name that they did not use.
    """
    if getattr(args, "activation_checkpointing", True) is None:
        args.activation_checkpointing = args.gradient_checkpointing


def as_saved(model: object, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `save_pretrained` writes of a state dict. Tensors that it leaves out are taken out of `state`."""
    ignored = attribute("transformers", model, "_keys_to_ignore_on_save") or ()
    for name in (*attribute("transformers", model, "all_tied_weights_keys"), *ignored):
        state.pop(name, None)
    saved: dict[str, torch.Tensor] = find("transformers.core_model_loading.revert_weight_conversion")(model, state)
    return saved


@contextmanager
def without_zero() -> Iterator[None]:
    """Within, transformers makes models as if DeepSpeed's ZeRO-3 were not there."""
    of_deepspeed = "transformers.integrations.deepspeed."
    reference = find(of_deepspeed + "_hf_deepspeed_config_weak_ref")
    config = reference() if reference is not None else None
    find(of_deepspeed + "unset_hf_deepspeed_config")()
    try:
        yield
    finally:
        if config is not None:
            find(of_deepspeed + "set_hf_deepspeed_config")(config)


def json_fields(config_class: object) -> list[str]:
    """The fields of training arguments that the command line gives as JSON."""
    return list(attribute("transformers", config_class, "_VALID_DICT_FIELDS"))


# -- of a `Trainer` ---------------------------------------------------------------------------------------------------


def save_policy(trainer: object, directory: str, state_dict: dict[str, torch.Tensor] | None) -> None:
    """Write a trainer's model, its tokenizer and its arguments, on this rank alone."""
    attribute("transformers", trainer, "_save")(directory, state_dict=state_dict)


def push_checkpoint(trainer: object, directory: str) -> None:
    """Upload a checkpoint to the Hub, as `hub_strategy` says."""
    attribute("transformers", trainer, "_push_from_checkpoint")(directory)


def save_scaler_and_generators(trainer: object, directory: str) -> None:
    """Write the gradient scaler of fp16, and the states of this rank's random generators."""
    attribute("transformers", trainer, "_save_scaler")(directory)
    attribute("transformers", trainer, "_save_rng_state")(directory)


def load_scaler(trainer: object, directory: str) -> None:
    """Read the gradient scaler of a checkpoint."""
    attribute("transformers", trainer, "_load_scaler")(directory)


def load_generators(trainer: object, directory: str) -> None:
    """Read the states of this rank's random generators."""
    attribute("transformers", trainer, "_load_rng_state")(directory)


def load_callback_states(trainer: object) -> None:
    """Give callbacks the states that `trainer.state` holds."""
    attribute("transformers", trainer, "_load_callback_state")()


def note_best(trainer: object, metrics: dict[str, float]) -> bool:
    """Whether metrics are the best so far; `trainer.state` then holds them."""
    return bool(attribute("transformers", trainer, "_determine_best_metric")(metrics=metrics, trial=None))


def decoder_layers(model: Any) -> list[nn.Module]:
    """
    The modules of a model that stay in one piece when it is sharded: its decoder layers.

    Raises:
        ConfigurationError: If the model does not name them, or has none of that name.
    """
    names = set(attribute("transformers", model, "_no_split_modules") or ()) if hasattr(model, "config") else set()
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigurationError(
            f"{type(model).__name__} names no decoder layers (`_no_split_modules` is {sorted(names)}) in "
            f"transformers {version('transformers')}: one shard would hold it all; use ZeRO or DDP"
        )
    return layers
