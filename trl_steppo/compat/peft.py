"""What this package uses of peft beyond its documented interface. It is not imported before it is used."""

from __future__ import annotations

from typing import Any

from . import find


def unwrapped(head: Any) -> Any:
    """The module that an adapter trains a copy of; any other as it is."""
    return getattr(head, "original_module", head)


def load_weights(directory: str) -> dict[str, Any]:
    """The weights of a saved adapter, on the CPU."""
    weights: dict[str, Any] = find("peft.load_peft_weights")(directory, device="cpu")
    return weights
