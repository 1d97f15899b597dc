"""Hashes of the code that a run is given: two functions of one name are told apart by them."""

from __future__ import annotations

import ast
import dis
import hashlib
import inspect
import shlex
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from types import CodeType

import numpy as np
import torch

_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = [sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype)
_HASH_CHARS = 12
_MAX_FILE_BYTES = 1_000_000
_MAX_PARTS = 10_000  # of one value; what is further back in a longer list does not count
_MAX_NUMBERS = 1_000_000  # of one tensor
_MAX_DEPTH = 16
_READ = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")


def source_hash(*given: object) -> str | None:
    """
    A hash of the source of functions, classes and commands that are a user's own.

    It covers functions of the same module that the code uses, base classes, and the scripts that a command names.
    It covers the values that the code reads from its module, a closure, a default, a `partial` or an attribute:
    numbers and texts, lists, tuples, sets and dicts of them, arrays and tensors. Values by the name of a seed do not
    count, nor what the code itself changes or trains. Comments, layout and docstrings do not count. Nor does what is
    installed as a package, this one included: its name says what it is.

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
        yield from _of_class(given, seen)
    elif _is_users(type(given)) or _is_ours(type(given)):
        yield from _of_class(type(given), seen)
        state = {name for base in filter(_is_users, type(given).__mro__) for name in _changed(base)}
        attributes = getattr(given, "__dict__", {})
        yield from _values({name: value for name, value in attributes.items() if name not in state}, seen)


def _of_function(function: Callable[..., object], seen: set[int]) -> Iterator[str]:
    source = _source(function) if _is_users(function) else None
    if source is None:
        return
    yield source
    yield from _used(function, seen)


def _of_class(cls: type, seen: set[int]) -> Iterator[str]:
    """The class and its bases, as far as they are a user's."""
    for base in filter(_is_users, cls.__mro__):
        source = _source(base)
        methods = [method for part in vars(base).values() for method in _methods(part)]
        # Of a class in a notebook, the source of its methods is known.
        yield from filter(None, map(_source, methods) if source is None else [source])
        for method in methods:
            if id(method) not in seen:
                seen.add(id(method))
                yield from _used(method, seen)


def _methods(attribute: object) -> list[Callable[..., object]]:
    """The functions of a class's attribute."""
    found: list[object] = [getattr(attribute, "__func__", attribute)]  # of a static method, or one of the class
    if isinstance(attribute, property):
        found = [attribute.fget, attribute.fset]
    methods = [inspect.unwrap(method) for method in found if inspect.isfunction(method)]
    return [method for method in methods if _is_users(method) and _source(method) is not None]


def _used(function: Callable[..., object], seen: set[int]) -> Iterator[str]:
    """What a function reads besides its arguments: helpers and values, those of its closure, and its defaults."""
    code: CodeType = function.__code__
    space: dict[str, object] = function.__globals__
    closed = {}
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            closed[name] = cell.cell_contents
        except ValueError:  # it has no value yet
            continue
    defaults = function.__defaults__ or ()
    with_default = code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount]
    state = _changed(function)
    read = {name: space[name] for name in sorted(_globals(code)) if name in space}
    outside = {name: value for name, value in {**closed, **read}.items() if name not in state and name[:2] != "__"}
    yield from _values({**dict(zip(with_default, defaults, strict=True)), **(function.__kwdefaults__ or {})}, seen)
    for name, value in outside.items():
        is_code = inspect.isfunction(value) or inspect.isclass(value)
        if name in closed or not is_code:
            yield from _values({name: value}, seen)
        elif inspect.isfunction(value) and value.__module__ == function.__module__:
            yield from _parts(value, seen)


def _globals(code: CodeType) -> set[str]:
    """Names of the module that a function, and functions in it, read."""
    read = {instruction.argval for instruction in dis.get_instructions(code) if instruction.opname in _READ}
    return read.union(*(_globals(inner) for inner in code.co_consts if isinstance(inner, CodeType)))


def _changed(given: Callable[..., object] | type) -> set[str]:
    """
    Names whose values code changes, apart from `__init__`, as counters and records: they are state, not settings. By
    the last part of a dotted name.
    """
    source = _source(given)
    try:
        nodes: list[ast.AST] = [ast.parse(source or "")]
    except SyntaxError:
        return set()
    changed: set[str | None] = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            continue
        nodes += ast.iter_child_nodes(node)
        if isinstance(node, ast.Global | ast.Nonlocal):
            changed |= set(node.names)
        elif isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            changed.add(_last_name(node))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):  # as `calls.append(x)`
            method = node.value.func
            changed.add(_last_name(method.value) if isinstance(method, ast.Attribute) else None)
    return {name for name in changed if name is not None}


def _last_name(node: ast.AST) -> str | None:
    """The last part of a dotted name, without indices: `c` of `a.b.c[0]`."""
    while isinstance(node, ast.Subscript):
        node = node.value
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def _values(values: Mapping[str, object], seen: set[int]) -> Iterator[str]:
    """Values by their names, and the code of values that are callable. Runs that differ in a seed are equal."""
    for name, value in values.items():
        if "seed" not in name.lower():
            parts = list(islice(_value(value, seen), _MAX_PARTS))
            if parts:
                yield f"{name}={' '.join(parts)}"


def _value(value: object, seen: set[int], depth: int = 0) -> Iterator[str]:
    """The parts of one value."""
    inner = depth + 1
    if isinstance(value, _PLAIN):
        yield repr(value)
    elif isinstance(value, torch.Tensor):
        yield from _numbers(value)
    elif isinstance(value, np.ndarray | np.generic):
        yield f"{value.dtype}{value.shape}"
        if value.dtype != object:
            yield hashlib.sha256(value.reshape(-1)[:_MAX_NUMBERS].tobytes()).hexdigest()
    elif isinstance(value, list | tuple | set | frozenset | dict):
        yield f"{type(value).__name__}[{len(value)}"
        if depth == _MAX_DEPTH:
            return
        if isinstance(value, dict):
            for key, item in value.items():
                if not (isinstance(key, str) and "seed" in key.lower()):
                    yield from _value(key, seen, inner)
                    yield from _value(item, seen, inner)
        else:
            for item in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
                yield from _value(item, seen, inner)
        yield "]"
    elif callable(value):
        yield from _parts(value, seen)


def _numbers(tensor: torch.Tensor) -> Iterator[str]:
    """The numbers of a tensor, unless it is trained or they cannot be read, as in a sparse one."""
    if tensor.requires_grad:
        return
    yield f"{tensor.dtype}{tuple(tensor.shape)}"
    if tensor.layout == torch.strided and tensor.device.type != "meta":
        numbers = tensor.detach().reshape(-1)[:_MAX_NUMBERS].cpu().resolve_conj().resolve_neg().contiguous()
        yield hashlib.sha256(numbers.view(torch.uint8).numpy().tobytes()).hexdigest()


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
