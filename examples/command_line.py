"""How the examples that train read their command line: every setting is a flag, and there is a recipe by default."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl import TrlParser


def parse_arguments(classes: Sequence[type], recipe: Path) -> tuple[Any, ...]:
    """An instance of each class, from the flags and the configuration that they name, or else the recipe."""
    parser = TrlParser(classes)  # type: ignore[arg-type]
    return parser.parse_args_and_config(with_default_config(sys.argv[1:], recipe))


def with_default_config(arguments: list[str], recipe: Path) -> list[str]:
    """The command line with a `--config`: where it names none, the recipe."""
    return arguments if is_given("--config", arguments) else ["--config", str(recipe), *arguments]


def is_given(flag: str, arguments: Sequence[str]) -> bool:
    """Whether a command line has a flag, its value in the same word or in the next."""
    return any(argument.split("=")[0] == flag for argument in arguments)
