"""Messages <-> token ids: chat templates, and what a model wrote read as a message."""

from __future__ import annotations

from .chat_format import ChatFormat
from .messages import extended
from .parsing import Message, ParsedResponse, parse_hermes

__all__ = ["ChatFormat", "Message", "ParsedResponse", "extended", "parse_hermes"]
