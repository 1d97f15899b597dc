"""Which tokens end a model's responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GenerationConfig


def end_token_ids(generation_config: GenerationConfig | None) -> tuple[int, ...]:
    """
    The tokens that a model was trained to end with, which may be several.

    Args:
        generation_config ([`~transformers.GenerationConfig`], *optional*):
            The model's.

    Returns:
        `tuple[int, ...]`: `eos_token_id`, which is one id, a list of them, or `None`.
    """
    eos = getattr(generation_config, "eos_token_id", None)
    return tuple(map(int, eos)) if isinstance(eos, Sequence) else () if eos is None else (int(eos),)


def stored_end_token_ids(name: str) -> tuple[int, ...]:
    """[`end_token_ids`] of a model that is not loaded yet, by its directory or its name on the hub."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return end_token_ids(GenerationConfig.from_pretrained(name))
    except OSError:  # it has none; its configuration says the same, as for a model that is loaded
        return end_token_ids(GenerationConfig.from_model_config(AutoConfig.from_pretrained(name)))
