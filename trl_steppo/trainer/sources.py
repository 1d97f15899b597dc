"""Hashes of the code that a run is given: two functions of one name are told apart by them."""

from __future__ import annotations

import ast
import hashlib
import inspect
import shlex
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = [sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_PLAIN = (str, int, float, bool, type(None))
_HASH_CHARS = 12
_MAX_FILE_BYTES = 1_000_000


def source_hash(*given: object) -> str | None:
    """
    A hash of the source of functions, classes and commands that are a user's own.

    It covers functions and base classes of the same module that the code uses, plain values that a closure or a
    `partial` holds (without seeds), and the scripts that a command names. Comments, layout and docstrings do not
    count. Nor does what is installed as a package, this one included: its name says what it is.

    Args:
        given (`Callable`, `str` or `Sequence[str]`):
            Functions, classes, callable objects, or commands.

    Returns:
        `str`: 12 hexadecimal digits; `None` if there is no source to read.
    """
    seen: set[int] = set()
    parts = [part for one in given for part in _parts(one, seen)]
    if not parts:
        return None
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:_HASH_CHARS]


def _parts(given: object, seen: set[int]) -> Iterator[str]:
    """What is hashed of one object."""
    if id(given) in seen:
        return
    seen.add(id(given))
    if isinstance(given, str):
        yield from _scripts(shlex.split(given))
    elif isinstance(given, Sequence):
        yield from _scripts([str(word) for word in given])
    elif isinstance(given, partial):
        yield from _parts(given.func, seen)
        yield from _values({**{str(i): value for i, value in enumerate(given.args)}, **given.keywords}, seen)
    elif inspect.ismethod(given):
        yield from _parts(given.__func__, seen)
        yield from _parts(given.__self__, seen)
    elif inspect.isfunction(given):
        yield from _of_function(inspect.unwrap(given), seen)
    elif inspect.isclass(given):
        yield from _of_class(given)
    elif _is_users(type(given)) or _is_ours(type(given)):
        yield from _of_class(type(given))
        yield from _values(getattr(given, "__dict__", {}), seen)


def _of_function(function: Callable[..., object], seen: set[int]) -> Iterator[str]:
    source = _source(function) if _is_users(function) else None
    if source is None:
        return
    yield source
    try:
        found = inspect.getclosurevars(function)
    except (TypeError, ValueError):
        return
    yield from _values(dict(found.nonlocals), seen)
    for helper in found.globals.values():
        if inspect.isfunction(helper) and helper.__module__ == function.__module__:
            yield from _parts(helper, seen)


def _of_class(cls: type) -> Iterator[str]:
    """The class and its bases, as far as they are a user's."""
    for base in filter(_is_users, cls.__mro__):
        source = _source(base)
        # Of a class in a notebook, the source of its methods is known.
        sources = [_source(part) for part in vars(base).values() if inspect.isfunction(part)]
        yield from filter(None, sources if source is None else [source])


def _values(values: Mapping[str, object], seen: set[int]) -> Iterator[str]:
    """Plain values by their names, and the code of values that are callable. Runs that differ in a seed are equal."""
    for name, value in values.items():
        if isinstance(value, _PLAIN) and "seed" not in name.lower():
            yield f"{name}={value!r}"
        elif callable(value):
            yield from _parts(value, seen)


def _scripts(words: Sequence[str]) -> Iterator[str]:
    """The contents of the files that a command names, without its interpreter."""
    for word in words[1:] or words:
        path = Path(word)
        try:
            if path.is_file() and path.stat().st_size <= _MAX_FILE_BYTES:
                yield path.read_bytes().decode(errors="replace")
        except OSError:
            continue


def _is_ours(given: object) -> bool:
    return str(getattr(given, "__module__", "")).partition(".")[0] == _PACKAGE


def _is_users(given: Callable[..., object] | type) -> bool:
    """Whether code is neither this package's nor that of an installed library."""
    if _is_ours(given):
        return False
    try:
        file = Path(inspect.getsourcefile(given) or "")
    except TypeError:  # it is built in
        return False
    except OSError:  # a class that was defined in a notebook
        return True
    return not any(file.is_relative_to(folder) for folder in _LIBRARIES)


def _source(given: Callable[..., object] | type) -> str | None:
    """The code without comments, layout and docstrings; `None` if there is none, as of what is typed into Python."""
    try:
        text = textwrap.dedent(inspect.getsource(given))
    except (OSError, TypeError):
        return None
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a `lambda`, whose source is the lines that it stands in
        return text.strip()
    documented = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
