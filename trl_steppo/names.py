"""Public names: those that are imported when they are first used, and those that have moved or been renamed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

C = TypeVar("C", bound=Callable[..., object])
T = TypeVar("T")


def lazy_names(module: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """
    A module's `__getattr__` for names that are imported when they are first used.

    Args:
        module (`str`):
            The module's `__name__`.
        homes (`Mapping[str, str]`):
            The module that each name is in, relative to `module`.

    Example:
    ```python
    __getattr__ = lazy_names(__name__, {"StepPOTrainer": ".trainer.steppo_trainer"})
    ```
    """

    def find(name: str) -> object:
        if name not in homes:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(import_module(homes[name], module), name)

    return find


def moved_names(module: str, homes: Mapping[str, str]) -> Callable[[str], object]:
    """
    A module's `__getattr__` for names that stood in it before. Using one warns of its deprecation.

    Args:
        module (`str`):
            The module's `__name__`.
        homes (`Mapping[str, str]`):
            The module that each name is in now, by its full name.
    """
    find_in_home = lazy_names(module, homes)

    def find(name: str) -> object:
        if name in homes:
            warnings.warn(f"`{module}.{name}` is now `{homes[name]}.{name}`", DeprecationWarning, stacklevel=2)
        return find_in_home(name)

    return find


def renamed_keyword(old: str, new: str) -> Callable[[C], C]:
    """
    Decorator: a function, or the constructor of a class, still takes the keyword `old`, with a `DeprecationWarning`.
    Type checkers see the new name alone.

    Args:
        old (`str`):
            The name that callers may still use.
        new (`str`):
            The parameter's name.
    """

    def renamed(function: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(function)
        def call(*args: object, **kwargs: object) -> T:
            if old in kwargs:
                if new in kwargs:
                    raise TypeError(f"`{old}` is the old name of `{new}`; give one of them")
                warnings.warn(f"`{old}` is now called `{new}`", DeprecationWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    def decorate(target: Any) -> Any:
        if not isinstance(target, type):
            return renamed(target)
        target.__init__ = renamed(target.__init__)  # type: ignore[misc]
        return target

    return decorate
