"""What this package uses of torch beyond its documented interface."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from . import attribute

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.tensor import DTensor

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: object) -> bool:
    """Whether a call of a module does more than its `forward`."""
    return any(attribute("torch", module, name) for name in _HOOKS)


def own_parameters(module: nn.Module) -> dict[str, torch.Tensor]:
    """Where a module keeps its own parameters by name; a tensor put in there is what its forward pass reads."""
    parameters: dict[str, torch.Tensor] = attribute("torch", module, "_parameters")
    return parameters


def in_shards(tensor: object) -> TypeGuard[DTensor]:
    """Whether a tensor is a `DTensor`, as FSDP2's parameters, their gradients and their optimizer's states are."""
    return hasattr(tensor, "full_tensor")


def become_root(module: object) -> None:
    """Have FSDP2 take a module for the root of its shards now, and not the one that runs first."""
    state = attribute("torch", module, "_get_fsdp_state")()
    attribute("torch", state, "_lazy_init")()


def knows_fsdp2() -> bool:
    """Whether this version's FSDP2 has what is needed here: a root that can be made to forget a broken iteration."""
    from torch.distributed.fsdp import FSDPModule

    return hasattr(FSDPModule, "reset_iter_state")
