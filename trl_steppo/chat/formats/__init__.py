"""The ways in which chat templates write thoughts, text and tool calls; one small module for each family."""

from __future__ import annotations

from ...types import Message
from .base import CallFormat, Piece, PlainFormat, Schemas, tool_call
from .harmony import HARMONY, MUSE
from .hermes import HERMES
from .json_blocks import DEEPSEEK, MISTRAL
from .literals import GEMMA, PYTHONIC, PYTHONIC_ESCAPED
from .llama import LLAMA
from .tags import GLM, XML
from .values import UnreadableError

FORMATS: tuple[CallFormat, ...] = (
    *(HERMES, XML, GLM, HARMONY, GEMMA, PYTHONIC, PYTHONIC_ESCAPED, MUSE, DEEPSEEK, MISTRAL, LLAMA),
)
"""All formats; a template's own is the first that reads what the template writes."""
PLAIN: CallFormat = PlainFormat()
"""Thoughts and text alone, for templates that write no tool calls."""

__all__ = ["FORMATS", "LLAMA", "PLAIN", "CallFormat", "Message", "Piece", "Schemas", "UnreadableError", "tool_call"]
