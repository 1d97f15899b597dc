"""
What the public names of an environment's class are: hooks that the rollout calls, or tools that the model may call.

Tools are found as in TRL's `GRPOTrainer`: the plain functions of the class, inherited ones and static methods
included. Class methods, properties and attributes of the instance are none. `reset` and `get_reward` are never tools.
The other hooks, which TRL does not know, are told from tools by their parameters.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from functools import cached_property
from typing import Any

from ..calls import containing
from ..errors import ConfigurationError
from .arguments import JsonSchema
from .base import HOOKS, Environment

Tool = Callable[..., Any]

COMPUTED = (property, cached_property)


def tools_of(environment: Any) -> dict[str, Tool]:
    """
    An environment's tools by name, which is their `__name__`, sorted by the names in the class.

    Nothing of the instance is evaluated but the tools themselves.

    Raises:
        ConfigurationError: two of them have the same name.
    """
    found: dict[str, Tool] = {}
    with containing():  # looking a method up may run code of the environment's
        methods = [(name, getattr(environment, name)) for name in _class_functions(type(environment))]
    for name, tool in methods:
        if not callable(tool) or (name in HOOKS and is_hook(environment, name, tool)):
            continue
        known = found.setdefault(tool_name(tool), tool)
        if known != tool:
            raise ConfigurationError(_same_name(tool_name(tool)))
    return found


def functions_by_name(tools: Any, *, taken: Any) -> dict[str, Tool]:
    """
    Plain functions as tools, by name.

    Raises:
        ConfigurationError: one has no name, or that of another tool.
    """
    functions: dict[str, Tool] = {}
    for tool in tools:
        name = tool_name(tool)
        if name in functions or name in taken:
            raise ConfigurationError(_same_name(name))
        functions[name] = tool
    return functions


def _same_name(name: str) -> str:
    return f"two tools are named `{name}`; the model could not tell them apart"


def tool_name(tool: Tool) -> str:
    """The name that the model calls a tool by."""
    name = getattr(tool, "__name__", None)
    if not isinstance(name, str):
        raise ConfigurationError(
            f"the tool {tool!r:.80} has no `__name__` to be called by; wrap it in a function with a docstring"
        )
    return name


def is_hook(environment: Any, name: str, method: Any) -> bool:
    """
    Whether the rollout calls an environment's method of a reserved name.

    It does where the method has exactly the parameters that the rollout gives it. Parameters with a default do not
    count in a method that cannot be a tool, for want of a docstring. The first parameter of `step` may have any name
    in a class that inherits from [`Environment`].
    """
    expected = HOOKS[name]
    if expected is None:
        return True
    try:
        parameters = signature_of(method).parameters.values()
    except (TypeError, ValueError):  # written in C: it is tried
        return True
    named = [one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]
    if not named and len(parameters):
        return True
    if name == "step" and Environment in type(environment).__mro__:
        return True
    if tuple(one.name for one in named) == expected:
        return True
    required = tuple(one.name for one in named if one.default is one.empty)
    return required == expected and not _has_schema(method)


def schema_of(name: str, tool: Tool) -> JsonSchema:
    """
    A tool's JSON schema.

    Raises:
        ConfigurationError: it has no docstring, or an argument without a description or a type hint.
    """
    from transformers.utils import get_json_schema

    function = getattr(tool, "__func__", tool)
    try:
        if function not in _schemas:
            _schemas[function] = get_json_schema(tool)
        return _schemas[function]
    except Exception as error:
        expected = HOOKS.get(name) if inspect.ismethod(tool) else None
        form = f"{name}({', '.join(expected)})" if expected is not None else ""
        cure = (
            f"not meant for the model? it is called as `{form}`" if form else "not meant for the model? begin its name"
        )
        raise ConfigurationError(
            f"the tool `{getattr(function, '__qualname__', name)}` needs type hints and a docstring that describes "
            f"every argument: {error} ({cure}{'' if form else ' with an underscore'})"
        ) from error


def signature_of(tool: Tool) -> inspect.Signature:
    """A function's signature, or that of a bound method."""
    function = getattr(tool, "__func__", tool)
    try:
        if function not in _signatures:
            _signatures[function] = inspect.signature(tool)
        return _signatures[function]
    except TypeError:  # it cannot be a key
        return inspect.signature(tool)


_schemas: weakref.WeakKeyDictionary[Any, JsonSchema] = weakref.WeakKeyDictionary()
"""Schemas by function: an environment is made for every episode, its docstrings are read once."""

_signatures: weakref.WeakKeyDictionary[Any, inspect.Signature] = weakref.WeakKeyDictionary()
"""Signatures by function, or by a method's; reading one takes longer than most calls."""


def _has_schema(method: Any) -> bool:
    try:
        schema_of("", method)
    except ConfigurationError:
        return False
    return True


def _class_functions(cls: type) -> list[str]:
    """The public names of a class that stand for plain functions."""
    names = []
    for name in dir(cls):
        try:
            if not name.startswith("_") and inspect.isfunction(getattr(cls, name)):
                names.append(name)
        except Exception:  # of a descriptor
            continue
    return names
