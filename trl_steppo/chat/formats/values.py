"""The values of a tool call's arguments: strict JSON, and text read as what a schema declares."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

MAX_LEVELS = 64  # of nested lists and objects; Python recursion fails at some hundreds

Schema = Mapping[str, Any]
"""A JSON schema."""


class UnreadableError(ValueError):
    """
    Text that is not a complete tool call.

    Args:
        reason (`str`):
            Why, in words that the model can act on.
        at (`int`, *optional*, defaults to `0`):
            Position up to which the text belongs to it: its end where the text breaks off within a call.
    """

    def __init__(self, reason: str, at: int = 0) -> None:
        super().__init__(reason)
        self.reason = reason
        self.at = at


def read_json(text: str, at: int) -> tuple[object, int]:
    """
    The JSON value that begins at `at`, and the position after it.

    Raises:
        UnreadableError: it is none, is not finite (`NaN`, `Infinity`, `1e999`), is nested too deeply, or the text
            breaks off before its end.
    """
    start, at = at, skip_space(text, at)
    try:
        value, end = _DECODER.raw_decode(text, at)
    except json.JSONDecodeError as error:
        breaks_off = error.pos >= len(text) or error.msg.startswith("Unterminated string")
        # Line, column and character count from where the value may begin, not from the start of the response.
        reason = json.JSONDecodeError(error.msg, text[start : error.pos], error.pos - start)
        raise UnreadableError(f"not valid JSON ({reason})", len(text) if breaks_off else error.pos) from error
    except ValueError as error:  # not finite, or an integer of thousands of digits
        raise UnreadableError(f"not valid JSON ({error})", at) from error
    except RecursionError as error:
        raise UnreadableError("not valid JSON (nested too deeply)", at) from error
    try:
        return check_value(value), end
    except UnreadableError as error:
        raise UnreadableError(f"not valid JSON ({error.reason})", end) from error


def skip_space(text: str, at: int) -> int:
    """The position of the next character that is not white space."""
    found = _SPACE.match(text, at)
    return found.end() if found else at


def check_value(value: object, levels: int = 0) -> object:
    """
    A value that is fit for a tool and for JSON: halves of surrogate pairs become U+FFFD.

    Raises:
        UnreadableError: it is not finite, or nested too deeply.
    """
    if levels > MAX_LEVELS:
        raise UnreadableError("nested too deeply")
    if isinstance(value, str):
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        raise UnreadableError(f"{value} is not a finite number")
    if isinstance(value, list | tuple):
        return [check_value(one, levels + 1) for one in value]
    if isinstance(value, dict):
        return {check_value(key): check_value(one, levels + 1) for key, one in value.items()}
    return value


def find_end(
    text: str, start: int, end: re.Pattern[str], *, begins: re.Pattern[str], closing: str
) -> re.Match[str] | None:
    """
    Where a value ends that is written without quotes.

    An end does not count after the beginning of another call (`begins`) that is not closed (`closing`) before it: the
    value quotes a call, and this is the end of the quoted one's value. So a response that breaks off after a quoted
    call is not taken for a whole one.
    """
    opened, at = 0, start
    for found in end.finditer(text, start):
        part = text[at : found.start()]
        opened += len(begins.findall(part)) - part.count(closing)
        if opened <= 0:
            return found
        at = found.start()
    return None


def read_text(text: str, schema: Schema | None) -> object:
    """
    What a text stands for, in a format that writes strings without quotes.

    It is what the schema declares: a declared string is taken to the letter (`02134`, `null`, `{"a": 1}`), a boolean
    may be written `true` or `True`, all else is JSON. Text that is nothing of what the schema declares stays text, so
    that the check of the arguments can name it.

    Args:
        text (`str`):
            The value as written.
        schema (`Mapping`, *optional*):
            The argument's JSON schema. `None`, or one that declares nothing: JSON if it can be, text otherwise.

    Raises:
        UnreadableError: it is a number that is not finite (`NaN`, `Infinity`, `1e999`) where a number is declared.
    """
    names = None if schema is None else _declared(schema)
    if names is None:
        values = [*_as_json(text), text]
        return values[0]
    choices = [choice for choice in _choices(schema or {}) if choice == text]
    if choices:
        return text
    if "null" in names and text.strip() in ("null", "None"):
        return None
    if "boolean" in names and text.strip() in _BOOLEANS:
        return _BOOLEANS[text.strip()]
    if names & {"number", "integer"} and "string" not in names and text.strip() in _NOT_FINITE:
        raise UnreadableError(f"{text.strip()} is not a finite number")
    for value in _as_json(text, is_strict="string" not in names and bool(names & {"number", "integer"})):
        if isinstance(value, str):  # a text's quotes are part of it
            continue
        if _name(value) in names or (isinstance(value, int) and _name(value) == "integer" and "number" in names):
            return value
    return text


_DECODER = json.JSONDecoder(
    parse_constant=lambda name: _refuse(name), parse_float=lambda text: _finite(text)
)  # `json` itself takes NaN, Infinity and 1e999
_SPACE = re.compile(r"\s*")
_BOOLEANS = {"true": True, "True": True, "false": False, "False": False}
_NOT_FINITE = {"NaN", "nan", "Infinity", "-Infinity", "inf", "-inf"}
_NAMES: dict[type, str] = {
    bool: "boolean",
    int: "integer",
    float: "number",
    list: "array",
    dict: "object",
    str: "string",
}


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a finite number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)


def _name(value: object) -> str:
    return _NAMES.get(type(value), "null")


def _as_json(text: str, *, is_strict: bool = False) -> list[object]:
    """The JSON value that the whole text is; none if it is none."""
    try:
        value, end = read_json(text, 0)
    except UnreadableError as error:
        if is_strict and "not a finite number" in error.reason:
            raise
        return []
    return [value] if not text[end:].strip() else []


def _options(schema: Schema) -> list[Schema]:
    options = schema.get("anyOf") or schema.get("oneOf") or ()
    return [option for option in options if isinstance(option, Mapping)]


def _declared(schema: Schema) -> set[str] | None:
    """The JSON types that a schema allows; `None` where it allows any."""
    options = _options(schema)
    if options:
        declared = [_declared(option) for option in options]
        if any(one is None for one in declared):
            return None
        names = {name for one in declared if one is not None for name in one}
    elif "type" in schema:
        names = {schema["type"]} if isinstance(schema["type"], str) else set(schema["type"])
    elif "enum" in schema or "const" in schema:
        names = {_name(choice) for choice in _choices(schema)}
    else:
        return None
    return names | {"null"} if schema.get("nullable") else names


def _choices(schema: Schema) -> list[object]:
    own = list(schema.get("enum", ())) + ([schema["const"]] if "const" in schema else [])
    return own + [choice for option in _options(schema) for choice in _choices(option)]
