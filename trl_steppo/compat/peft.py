"""What this package uses of peft beyond its documented interface. It is not imported before it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import find

if TYPE_CHECKING:
    import torch


def unwrapped(head: Any) -> Any:
    """The module that an adapter trains a copy of; any other as it is."""
    return getattr(head, "original_module", head)


def load_weights(directory: str) -> dict[str, torch.Tensor]:
    """The weights of a saved adapter, on the CPU."""
    weights: dict[str, torch.Tensor] = find("peft.load_peft_weights")(directory, device="cpu")
    return weights
