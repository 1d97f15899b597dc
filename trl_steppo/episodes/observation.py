"""Observations: text, or messages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..types import Message, TextOrMessages


def as_messages(observation: str | Iterable[Message]) -> list[Message]:
    """Messages of an observation; text becomes a user message."""
    return [{"role": "user", "content": observation}] if isinstance(observation, str) else list(observation)


def as_observation(messages: Sequence[Message]) -> TextOrMessages:
    """Observation of these messages: the text alone where they are one user message."""
    if len(messages) == 1 and messages[0]["role"] == "user":
        text: str = messages[0]["content"]
        return text
    return list(messages)
