"""The world: a response in, an observation and a reward out."""

from .base import RESERVED_NAMES, Environment, Outcome, Playable, Response, ToolEnvironment
from .tools import ResponsePlayable, ToolPlayable, make_playable

__all__ = [
    "RESERVED_NAMES",
    "Environment",
    "Outcome",
    "Playable",
    "Response",
    "ResponsePlayable",
    "ToolEnvironment",
    "ToolPlayable",
    "make_playable",
]
