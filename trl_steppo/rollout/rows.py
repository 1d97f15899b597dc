"""Dataset rows as they are handed to code that is not ours: each episode and each function has its own copy."""

from __future__ import annotations

import copy
import logging
from typing import TypeVar

from ..calls import containing
from ..types import Message, Row, TextOrMessages

logger = logging.getLogger(__name__)

T = TypeVar("T")

_warned: set[str] = set()  # names of the values that are shared, which a warning was given of


def own(value: T, name: str) -> T:
    """
    Copy a value, so that the copy shares nothing mutable with it. What cannot be copied (a lock, an open file) is
    handed out as it is, with one warning.

    Args:
        value (`T`):
            A value of a row, of an environment or of a reward function's arguments.
        name (`str`):
            What it is called in the warning.
    """
    if isinstance(value, str | int | float | bool | None):
        return value
    try:
        with containing():
            return copy.deepcopy(value)
    except Exception as error:
        if name not in _warned:
            _warned.add(name)
            logger.warning(
                "%r holds a %s that cannot be copied (%s), so episodes share it: do not change it (told once)",
                *(name, type(value).__name__, error),
            )
        return value


def own_row(row: Row) -> dict[str, object]:
    """Copy a row, so that nobody else can see or change its values ([`own`])."""
    return {name: own(value, name) for name, value in row.items()}


EMPTY_PROMPT: list[Message] = [{"role": "user", "content": ""}]
"""`GRPOTrainer`'s prompt of rows that leave it to `reset`."""


def prompt_of(row: Row) -> TextOrMessages | None:
    """
    What the policy is asked, before `reset` adds to it; `None` for a row of token ids. A `prompt` that is `None` is
    missing: Arrow fills it in where only other rows have one.
    """
    prompt: TextOrMessages | None = row.get("prompt")
    if prompt is not None:
        return prompt
    return None if "input_ids" in row else EMPTY_PROMPT


def question_of(row: Row) -> TextOrMessages | None:
    """What a row asks: its `prompt`, or its `question` where it has none; `None` unless that is text or messages."""
    question = row.get("prompt")
    if question is None:
        question = row.get("question")
    return question if isinstance(question, str | list) else None
