"""How the examples read their command line: settings are flags, and programs that train have a default recipe."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser
from trl import TrlParser

T = TypeVar("T")


def parse_flags(kind: type[T]) -> T:
    """An instance of a dataclass, from the flags."""
    parser = HfArgumentParser(kind)  # type: ignore[arg-type]
    (arguments,) = parser.parse_args_into_dataclasses()
    return arguments


def parse_arguments(classes: Sequence[type], recipe: Path) -> tuple[Any, ...]:
    """An instance of each dataclass, from the flags and `--config`. The recipe is the default of the latter."""
    parser = TrlParser(classes)  # type: ignore[arg-type]
    return parser.parse_args_and_config(with_default_config(sys.argv[1:], recipe))


def with_default_config(arguments: list[str], recipe: Path) -> list[str]:
    """The command line, with the recipe as `--config` if it has none."""
    return arguments if is_given("--config", arguments) else ["--config", str(recipe), *arguments]


def is_given(flag: str, arguments: Sequence[str]) -> bool:
    """Whether a command line has a flag, with its value in the same argument or in the next."""
    return any(argument.split("=")[0] == flag for argument in arguments)
