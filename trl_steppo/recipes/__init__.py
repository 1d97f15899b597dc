"""The recipes that come with the package: YAML files of settings that were chosen together, found by their names."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ..errors import ConfigurationError

logger = logging.getLogger(__name__)

__all__ = ["RECIPES", "Recipe", "closest", "find_recipe", "read_header", "recipe_names"]

RECIPES = Path(__file__).parent
"""The directory of the recipes."""

_FORMER_DIRECTORY = ("examples", "configs")  # where they were until version 0.1


@dataclass(frozen=True)
class Recipe:
    """
    What a recipe is for.

    Args:
        name (`str`):
            Its name, which `--config` takes.
        summary (`str`):
            What it trains, in one line.
        model (`str`):
            The policy: built in, a directory, or a name on the hub.
        gpus (`str`):
            How many GPUs it is made for; "none" for a CPU.
    """

    name: str
    summary: str
    model: str
    gpus: str


def recipe_names() -> list[str]:
    """Names of the recipes, sorted."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """
    Find a recipe.

    Args:
        name (`str` or `Path`):
            The path of a YAML file, or the name of a recipe that comes with the package.

    Returns:
        `Path`: The file.

    Raises:
        ConfigurationError: If there is no such file and no such recipe. The message names those that there are.
    """
    path, names = Path(name), recipe_names()
    if path.is_file():
        return path
    if str(name) in names:
        return RECIPES / f"{name}.yaml"
    if path.parent.parts[-2:] == _FORMER_DIRECTORY and path.stem in names:
        _warn_of_former_path(str(name), path.stem)
        return RECIPES / path.name
    near = closest(path.stem if path.suffix in (".yaml", ".yml") else str(name), names)
    raise ConfigurationError(
        f"{str(name)!r} is neither a file nor the name of a recipe{near}\n"
        f"The recipes are {', '.join(names)}; `trl-steppo recipes` describes them."
    )


@cache  # once for each name
def _warn_of_former_path(path: str, name: str) -> None:
    logger.warning("%s has moved into the package: write `%s`. The next release will not find the path.", path, name)


def read_header(name: str) -> Recipe:
    """What the recipe of this name says of itself in its first lines."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    summary = text.partition("\n")[0].removeprefix("# ")
    model = re.search(r"^(?:# Model|model_name_or_path): (.+)$", text, re.MULTILINE)
    gpus = re.search(r"^# GPUs: (.+)$", text, re.MULTILINE)
    assert model is not None
    assert gpus is not None
    return Recipe(name, summary, model[1], gpus[1])


def closest(name: str, names: Iterable[str]) -> str:
    """The end of an error about an unknown name: which known one may be meant. Empty if none is like it."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f"; did you mean `{near[0]}`?" if near else ""
