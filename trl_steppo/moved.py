"""Public names that moved: for one release they can still be imported from their old place, with a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from importlib import import_module


def moved_names(module: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """
    Make the `__getattr__` of a module from which names have moved.

    Args:
        module (`str`):
            The module: its `__name__`.
        homes (`Mapping[str, str]`):
            For each name that moved, the module that has it now.

    Returns:
        `Callable[[str], object]`: Returns a moved name from its new module, with a `DeprecationWarning`.

    Example:
    ```python
    __getattr__ = moved_names(__name__, {"locate_model": "trl_steppo.assets"})
    ```
    """

    def resolve(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"`{module}.{name}` has moved to `{homes[name]}`, and will not be found here from the next release on; "
            f"use `from {homes[name]} import {name}`",
            DeprecationWarning,
            stacklevel=2,
        )
        value: object = getattr(import_module(homes[name]), name)
        return value

    return resolve
