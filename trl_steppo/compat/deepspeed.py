"""What this package uses of DeepSpeed beyond its documented interface. It is not imported before it is used."""

from __future__ import annotations

from typing import Any

from . import attribute


def in_zero(parameter: object) -> bool:
    """Whether ZeRO-3 holds a parameter, whose own shape then means nothing."""
    return hasattr(parameter, "ds_id")


def zero_shape(parameter: object) -> list[int]:
    """The shape of the whole of a parameter that ZeRO-3 holds."""
    return list(attribute("deepspeed", parameter, "ds_shape"))


def basic_optimizer(engine: object) -> Any:
    """The optimizer that an engine wraps, or has made to replace the one that it was given."""
    return attribute("deepspeed", engine, "basic_optimizer")


def overflowed(engine: object) -> bool:
    """Whether an engine's last step was skipped, because its gradient was not finite."""
    return bool(attribute("deepspeed", attribute("deepspeed", engine, "optimizer"), "overflow"))
