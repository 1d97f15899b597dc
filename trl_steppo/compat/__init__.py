"""What this package uses of other libraries beyond their documented interfaces: one module for each library.

Every such name is looked up here alone. One that has moved is an error with the version of the library that lacks it:
a default in its place would silently change what is computed, or how fast.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from ..errors import ConfigurationError


def find(name: str) -> Any:
    """
    What a library defines under a name.

    Args:
        name (`str`):
            With the module, e.g. `"transformers.masking_utils.sdpa_mask"`.

    Raises:
        ConfigurationError: If the installed version has no such module, or no such name in it.
        ImportError: If the library, or something that it needs itself, is not installed.
    """
    module, _, attribute = name.rpartition(".")
    library = module.split(".")[0]
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        is_ours = error.name is not None and f"{module}.".startswith(f"{error.name}.")
        if not is_ours or error.name == library:
            raise
        raise lacks(library, f"`{name}`") from error
    except AttributeError as error:
        raise lacks(library, f"`{name}`") from error


def attribute(library: str, thing: object, name: str) -> Any:
    """
    An attribute that objects of a library have.

    Args:
        library (`str`):
            The library's distribution, e.g. `"transformers"`.
        thing (`object`):
            The object.
        name (`str`):
            The attribute.

    Raises:
        ConfigurationError: If the object has none of that name.
    """
    try:
        return getattr(thing, name)
    except AttributeError as error:
        raise lacks(library, f"`{name}` in a {type(thing).__name__}") from error


def lacks(library: str, what: str) -> ConfigurationError:
    """The error for what the installed version of a library does not have."""
    try:
        installed = version(library)
    except PackageNotFoundError:  # it is there without its metadata
        installed = "(unknown version)"
    return ConfigurationError(
        f"{library} {installed} has no {what}, which this version of trl-steppo uses; install a version of {library} "
        "that its requirements name"
    )
