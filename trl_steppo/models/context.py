"""How many tokens a model can read: its context, from its configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_SCALED = ("linear", "dynamic", "yarn")  # kinds of rope scaling that lengthen the context by their factor


def context_length(config: PretrainedConfig) -> int | None:
    """
    The maximum number of tokens of a prompt and its response together.

    Args:
        config (`PretrainedConfig`):
            The model's configuration; of a model of several parts, that of its text is looked at.

    Returns:
        `int` or `None`: Positions that the model was made for, rope scaling included; `None` where its configuration
        names no bound, as of state-space models.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if not isinstance(positions, int) or positions < 1:
        return None
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return max(positions, _scaled(positions, scaling)) if isinstance(scaling, dict) else positions


def _scaled(positions: int, scaling: dict[str, object]) -> int:
    """
    The positions that rope scaling reaches. Some models count them in `max_position_embeddings` already; those with
    other scaling for each kind of layer all do.
    """
    factor = scaling.get("factor")
    if scaling.get("rope_type", scaling.get("type")) not in _SCALED or not isinstance(factor, int | float):
        return positions
    original = scaling.get("original_max_position_embeddings", positions)
    assert isinstance(original, int | float)
    return int(original * factor)
