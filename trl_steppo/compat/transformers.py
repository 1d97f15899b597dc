"""What this package reads of transformers beyond its documented interface.

The names differ between versions, and some are private. Whatever cannot be found is an error here, with the version
that lacks it: a default would change what is computed, or how fast, without a word.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from ..errors import ConfigurationError

_CACHE_ARGUMENTS = ("cache", "past_key_values")  # transformers from 5.24, and before


def attention_of(config: Any) -> str:
    """
    The attention implementation that a configuration names, e.g. `"sdpa"`.

    Raises:
        ConfigurationError: If this version of transformers keeps it elsewhere.
    """
    try:
        return str(config._attn_implementation)
    except AttributeError as error:
        raise _unknown(f"`_attn_implementation` of a {type(config).__name__}") from error


def source_of(config: Any) -> str | None:
    """Where the weights of a model with this configuration were loaded from: a name or a directory, if any."""
    return getattr(config, "_name_or_path", None) or None


def exchange_attention(model: Any, name: str) -> None:
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
        if module is not model and _follows(model, module) and hasattr(module, "set_attn_implementation"):
            module.set_attn_implementation(name)
    left = [layer for layer, module in model.named_modules() if _follows(model, module) and _reads(module) != name]
    if left:
        raise ConfigurationError(
            f"{type(model).__name__}: {left[0]!r} ({len(left)} modules in all) keeps its attention with transformers "
            f"{version('transformers')} where {name!r} was set; give wrapper and backbone one configuration"
        )


def _follows(model: Any, module: Any) -> bool:
    """Whether a module has a configuration of the language model's kind."""
    config = getattr(module, "config", None)
    return config is not None and type(config) in (type(model.config), type(model.config.get_text_config()))


def _reads(module: Any) -> str:
    return attention_of(module.config)


def special_attention(config: Any) -> Iterator[str]:
    """What keeps the layers of a model from attending to all tokens before them; nothing for most models."""
    layers = sorted(set(getattr(config, "layer_types", None) or ["full_attention"]))
    if layers != ["full_attention"]:
        yield f"layers of {', '.join(layers)}"
    if getattr(config, "sliding_window", None) and not hasattr(config, "layer_types"):
        yield f"a sliding window of {config.sliding_window}"
    if getattr(config, "alibi", False):
        yield "ALiBi instead of positions"


def cache_argument(model: Any) -> str | None:
    """What a model's forward pass calls its cache of keys and values; `None` where it takes none that is known."""
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in parameters), None)


def takes_positions(model: Any) -> bool:
    """Whether a model's forward pass takes `position_ids`."""
    return "position_ids" in inspect.signature(model.forward).parameters


def decoder_layers(model: Any) -> list[Any]:
    """
    The modules of a model that stay in one piece when it is sharded: its decoder layers.

    Raises:
        ConfigurationError: If the model does not name them, or has none of that name.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise ConfigurationError(
            f"{type(model).__name__} names no decoder layers (`_no_split_modules` is {sorted(names)}) in "
            f"transformers {version('transformers')}: one shard would hold it all; use ZeRO or DDP"
        )
    return layers


def deviates(found: Any, expected: Any, mistake: Any) -> bool:
    """
    Whether a computation that may have ignored what it was told differs from the same one done in a plain way by more
    than rounding does. Where the plain one gives no finite numbers, nothing is known, and the answer is no.

    Args:
        found (`torch.Tensor`), expected (`torch.Tensor`):
            (tokens, features) of both.
        mistake (`torch.Tensor`):
            (any, features), how far off a plain computation of something else is: the scale of a real difference.
    """
    import torch

    dtype = expected.dtype
    if torch.is_autocast_enabled(expected.device.type):
        dtype = torch.get_autocast_dtype(expected.device.type)
    # Medians over tokens: with experts, rounding may send single tokens elsewhere.
    error, real, size = (x.float().norm(dim=-1).median() for x in (found - expected, mistake, expected))
    if not torch.isfinite(size):
        return False
    return not bool(error <= torch.maximum(0.2 * real, size * torch.finfo(dtype).eps ** 0.5))


def _unknown(what: str) -> ConfigurationError:
    return ConfigurationError(
        f"{what} is not there in transformers {version('transformers')}, which this version of trl-steppo does not "
        "know; install one that its requirements name"
    )
