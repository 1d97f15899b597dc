"""
The arguments of a tool call, as the tool's JSON schema declares them.

A model often writes a value in another type than the one declared: `"3"` or `3.0` for an integer. Where the value is
the same in both, it is converted. Any other value is refused, in words that the model can act on.

| declared | taken | converted | refused |
|---|---|---|---|
| integer | `3` | `3.0` below 2**53, `"3"`, `"3.0"` | `3.5`, `"3.5"`, `"three"`, `"03"`, `true` |
| number | `1`, `1.5` | `"1"`, `"1.5"`, as JSON reads it | `"1,5"`, `"NaN"`, `true` |
| boolean | `true` | `"true"`, `"False"` | `"yes"`, `1` |
| string | `"3"` | | `3` |
| array, object | as they are | their JSON as text, and the values inside | other text |
| null | `null` | `"null"`, where no text is declared | |
| choices | one of them | what converts to one of them | others |
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from ..calls import why_unbindable
from ..finite import not_finite_in, shown
from ..types import map_texts, writable

JsonSchema = dict[str, Any]


class WrongArgumentsError(ValueError):
    """Arguments that a tool cannot be called with; the message says why."""


def read_arguments(
    tool: Callable[..., Any], signature: inspect.Signature, schema: JsonSchema, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """
    The arguments to call a tool with.

    Args:
        tool (`Callable`), signature (`inspect.Signature`):
            The tool.
        schema (`dict`):
            The tool's JSON schema.
        arguments (`Mapping[str, Any]`):
            What the model wrote, as JSON values.

    Returns:
        `dict[str, Any]`: converted where they can be without loss.

    Raises:
        WrongArgumentsError: an argument is missing or unknown, is of another type, is none of the choices, or holds a
            number that is not finite.
    """
    problem = why_unbindable(tool, arguments, signature)
    if problem is not None:
        raise WrongArgumentsError(problem)
    properties = schema["function"]["parameters"]["properties"]
    read = {}
    for name, value in arguments.items():
        declared = properties.get(name, {})
        is_left_out = value is None and name in signature.parameters and signature.parameters[name].default is None
        read[name] = value if is_left_out else converted(value, declared)
        if read[name] is UNFIT:
            raise WrongArgumentsError(f"{name!r} must be {describe(declared)}, not {_kind(value, declared)}")
        odd = not_finite_in(read[name])
        if odd is not None:
            raise WrongArgumentsError(f"{name!r} has {odd}, which JSON does not know; numbers are finite")
    return read


UNFIT: Any = object()
"""What [`converted`] returns for a value that is nothing of what the schema declares."""


def converted(value: Any, schema: Mapping[str, Any]) -> Any:
    """
    A JSON value as the schema declares it: as it is, where it is that already; else converted, if nothing is lost.

    Args:
        value (`Any`):
            The JSON value.
        schema (`Mapping[str, Any]`):
            Types, choices, and what lists and objects hold; anything else in it is not looked at.

    Returns:
        `Any`: the value, or [`UNFIT`].

    Example:
    ```python
    >>> converted("3", {"type": "integer"})
    3
    ```
    """
    if value is None and schema.get("nullable"):
        return None
    for convert in (_as_it_is, _in_another_type):  # a type that needs no conversion comes before all others
        for option in _options(schema):
            found = convert(value, option)
            if found is not UNFIT:
                return found
    return None if schema.get("nullable") and value == "null" else UNFIT


def describe(schema: Mapping[str, Any]) -> str:
    """What a schema declares, in words: `integer`, `array of string`, `one of ['a', 'b']`."""
    if "enum" in schema:
        return f"one of {schema['enum']}"
    if "anyOf" in schema:
        return " or ".join(describe(option) for option in schema["anyOf"])
    names = schema.get("type", "any")
    text = names if isinstance(names, str) else " or ".join(names)
    return f"{text} of {describe(schema['items'])}" if text == "array" and schema.get("items") else text


_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}


def _kind(value: Any, declared: Mapping[str, Any]) -> str:
    if "enum" in declared or (isinstance(value, str) and declared.get("type") != "string"):
        return shown(value)
    return "null" if value is None else _NAMES.get(type(value), type(value).__name__)


def _options(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schemas of one type each that a value may fit."""
    if "anyOf" in schema:
        for option in schema["anyOf"]:
            yield from _options(option)
        return
    names = schema.get("type")
    for name in names if isinstance(names, list | tuple) else (names,):
        yield {**schema, "type": name}


def _as_it_is(value: Any, schema: Mapping[str, Any]) -> Any:
    """The value, if it has the declared type; lists and objects with what they hold converted."""
    name = schema["type"]
    if "enum" in schema:
        return next((choice for choice in schema["enum"] if choice == value and _is_same(choice, value)), UNFIT)
    # In Python a bool is an int; in JSON `true` is no number.
    if name in _TYPES and (not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and name != "boolean")):
        return UNFIT
    if isinstance(value, list | tuple) and name == "array":
        inner = schema.get("prefixItems")
        if inner is None:
            return _all_of([converted(one, schema.get("items") or {}) for one in value])
        fits = len(inner) == len(value)
        return _all_of([converted(*pair) for pair in zip(value, inner, strict=True)]) if fits else UNFIT
    if isinstance(value, dict) and isinstance(schema.get("additionalProperties"), Mapping):
        values = _all_of([converted(one, schema["additionalProperties"]) for one in value.values()])
        return UNFIT if values is UNFIT else dict(zip(value, values, strict=True))
    return value


_TYPES: dict[Any, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
    "null": (type(None),),
}


def _is_same(choice: Any, value: Any) -> bool:
    return isinstance(choice, bool) == isinstance(value, bool)  # `True == 1`


def _all_of(values: list[Any]) -> Any:
    return UNFIT if any(value is UNFIT for value in values) else values


def _in_another_type(value: Any, schema: Mapping[str, Any]) -> Any:
    """The value converted to the declared type, if nothing is lost."""
    name = schema["type"]
    if name in ("integer", "number"):
        found = _number(value, is_integer=name == "integer")
    elif name == "boolean":
        found = _BOOLEANS.get(value.strip().lower(), UNFIT) if isinstance(value, str) else UNFIT
    elif name in ("array", "object"):
        found = _json(value)
    else:
        found = None if name == "null" and value == "null" else UNFIT
    return UNFIT if found is UNFIT else _as_it_is(found, schema)


_BOOLEANS = {"true": True, "false": False}
_NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,99})(\.[0-9]{1,99})?([eE][+-]?[0-9]{1,3})?")  # as in JSON, up to 100 digits
_MOST = 10**100
_EXACT = 2**53  # below it a float is the number that was written, if that is an integer


def _number(value: Any, *, is_integer: bool) -> Any:
    """The integer that a text or a float is, exactly; where any number will do, what JSON reads in a text."""
    if isinstance(value, str):
        text = value.strip()
        if not _NUMBER.fullmatch(text):
            return UNFIT
        exact = Decimal(text)
        if is_integer or text.lstrip("-").isdigit():
            whole = int(exact)
            return whole if whole == exact and abs(whole) < _MOST else UNFIT
        value = float(text)
        return value if math.isfinite(value) else UNFIT
    is_exact = is_integer and isinstance(value, float) and value.is_integer() and abs(value) < _EXACT
    return int(value) if is_exact else UNFIT


def _json(value: Any) -> Any:
    """The list or object that a text is the JSON of."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return UNFIT
    try:
        return map_texts(json.loads(value), writable)
    except (ValueError, RecursionError):
        return UNFIT
