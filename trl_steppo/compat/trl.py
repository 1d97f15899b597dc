"""What this package uses of TRL beyond its documented interface. Nothing of TRL is imported before it is used."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from ..types import JsonObject, Tokenizer
from . import find


def ppo_bases() -> tuple[Any, Any]:
    """
    The classes that [`PPOConfig`] and [`PPOTrainer`] of this package extend: TRL's own where it has them (until 1.12),
    else those of transformers that TRL's were made of.
    """
    with warnings.catch_warnings():
        # That the module is experimental is our concern: it is imported here and nowhere else.
        warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
        if _has_ppo():
            from trl.experimental.ppo import PPOConfig, PPOTrainer

            return PPOConfig, PPOTrainer
    from transformers import Trainer, TrainingArguments

    return TrainingArguments, Trainer


def _has_ppo() -> bool:
    """Whether TRL has the module, which may still fail to import."""
    return bool(find_spec("trl.experimental")) and bool(find_spec("trl.experimental.ppo"))


def training_chat_template(tokenizer: Tokenizer) -> str | None:
    """TRL's training template for a tokenizer; `None`: its own can be used. Raises where TRL knows none."""
    template: str | None = find("trl.chat_template_utils.get_training_chat_template")(tokenizer)
    return template


def add_response_schema(tokenizer: Tokenizer) -> None:
    """Tell a tokenizer how its model writes tool calls. Raises a `ValueError` where TRL does not know it."""
    find("trl.chat_template_utils.add_response_schema")(tokenizer)


def parse_response(
    tokenizer: Tokenizer, response_ids: Sequence[int], *, prefix: Sequence[int] | None, tools: list[JsonObject]
) -> JsonObject:
    """
    The message that a response is, by the tokenizer's schema.

    Args:
        tokenizer (`PreTrainedTokenizerBase`):
            With a schema; see [`add_response_schema`].
        response_ids (`Sequence[int]`):
            What was sampled.
        prefix (`Sequence[int]`, *optional*):
            What it follows.
        tools (`list[dict]`):
            The JSON schemas of the tools. TRL from 1.16 reads the types of arguments in them.
    """
    parse = find("trl.chat_template_utils.parse_response")
    more = {"tools": tools or None} if "tools" in inspect.signature(parse).parameters else {}
    message: JsonObject = parse(tokenizer, list(response_ids), prefix=None if prefix is None else list(prefix), **more)
    return message


def pause_zero_hooks(engine: object) -> None:
    """Have a DeepSpeed engine no longer gather and part its weights around the passes of its layers."""
    find("trl.models.utils.remove_hooks")(engine)


def resume_zero_hooks(engine: object) -> None:
    """Undo [`pause_zero_hooks`]."""
    find("trl.models.utils.add_hooks")(engine)


def frozen_engine(model: object, accelerator: object) -> Any:
    """A DeepSpeed engine that runs a model and does not train it."""
    return find("trl.models.utils.prepare_deepspeed")(model, accelerator)
