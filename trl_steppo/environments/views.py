"""Environments as other threads may use them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

_SPECIAL = (
    "__repr__",
    "__str__",
    "__len__",
    "__iter__",
    "__getitem__",
    "__contains__",
    "__call__",
    "__eq__",
    "__hash__",
)


def view_of(environment: Any, run: Callable[[Callable[[], Any]], Any]) -> Any:
    """
    An object that stands for an environment: its attributes are read and its methods called in the thread that the
    environment lives in, since what it holds may work there alone, as a connection of `sqlite3` does. What an
    attribute or a method gives is handed out as it is.

    Args:
        environment (`Any`):
            What the user wrote.
        run (`Callable[[Callable[[], Any]], Any]`):
            Runs a function in that thread, and waits for it. Raises what it raises.
    """
    kind = type(environment)

    class View:
        def __getattribute__(self, name: str) -> Any:
            return kind if name == "__class__" else at_home(lambda: getattr(environment, name))

        def __setattr__(self, name: str, value: Any) -> None:
            run(lambda: setattr(environment, name, value))

    def at_home(read: Callable[[], Any]) -> Any:
        value = run(read)
        if not (inspect.ismethod(value) and value.__self__ is environment):
            return value

        @functools.wraps(value)
        def call(*args: Any, **kwargs: Any) -> Any:
            return run(lambda: value(*args, **kwargs))

        return call

    def special(name: str) -> Callable[..., Any]:
        return lambda self, *args: run(lambda: getattr(environment, name)(*args))

    for name in _SPECIAL:
        if getattr(kind, name, None) is not None:
            setattr(View, name, special(name))
    View.__name__, View.__qualname__, View.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return View()
