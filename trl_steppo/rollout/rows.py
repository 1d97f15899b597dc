"""Dataset rows as they are handed to code that is not ours: each episode and each function has its own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

from ..calls import containing

logger = logging.getLogger(__name__)

_shared: set[str] = set()  # what was warned of


def own(value: Any, name: str) -> Any:
    """
    A copy that shares nothing mutable with the value. What cannot be copied (a lock, an open file) is handed out as it
    is, with one warning.

    Args:
        value (`Any`):
            Of a row, an environment or a reward function's argument.
        name (`str`):
            What it is called, for the warning.
    """
    if isinstance(value, str | int | float | bool | None):
        return value
    try:
        with containing():
            return copy.deepcopy(value)
    except Exception as error:
        if name not in _shared:
            _shared.add(name)
            logger.warning(
                "%r holds a %s that cannot be copied (%s), so episodes share it: do not change it (told once)",
                *(name, type(value).__name__, error),
            )
        return value


def own_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row whose values nobody else can see or change ([`own`])."""
    return {name: own(value, name) for name, value in row.items()}


EMPTY_PROMPT: list[dict[str, Any]] = [{"role": "user", "content": ""}]
"""`GRPOTrainer`'s, for rows that leave their prompt to `reset`."""


def prompt_of(row: Mapping[str, Any]) -> str | list[dict[str, Any]] | None:
    """
    What the policy is asked, before `reset` adds to it; `None` for a row of token ids. A `prompt` that is `None` is
    missing: Arrow fills it in where only other rows have one.
    """
    prompt: str | list[dict[str, Any]] | None = row.get("prompt")
    if prompt is not None:
        return prompt
    return None if "input_ids" in row else EMPTY_PROMPT


def question_of(row: Mapping[str, Any]) -> str | list[dict[str, Any]] | None:
    """What a row asks: its `prompt`, or its `question` where it has none; `None` unless that is text or messages."""
    question = row.get("prompt")
    if question is None:
        question = row.get("question")
    return question if isinstance(question, str | list) else None
