"""Models whose parameters DeepSpeed's ZeRO-3 or FSDP2 keeps in shards: seeing them whole for a while.

Collective: every rank must call what reads parameters, in the same order. For models that are not sharded it does
nothing, and deepspeed is not imported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..compat.deepspeed import in_zero, zero_shape
from ..compat.torch import in_shards

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether this rank holds no more than a shard of a parameter."""
    return in_zero(parameter) or in_shards(parameter)


def whole_shape(parameter: torch.Tensor) -> list[int]:
    """A parameter's shape, sharded or not."""
    return zero_shape(parameter) if in_zero(parameter) else list(parameter.shape)


@contextmanager
def gathered(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Within, every rank holds the whole of those parameters that ZeRO-3 shards, to read."""
    sharded = [parameter for parameter in parameters if in_zero(parameter)]
    if not sharded:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(sharded):
        yield


def read_together(module: nn.Module, parameters: Iterable[torch.Tensor]) -> None:
    """
    Have ZeRO-3 gather parameters of modules within `module` around its own forward and backward pass: for those that
    it reads itself, without a call of the module that owns them.
    """
    sharded = [parameter for parameter in parameters if in_zero(parameter)]
    if sharded:
        import deepspeed

        for parameter in sharded:
            deepspeed.zero.register_external_parameter(module, parameter)


def whole_state_dict(model: nn.Module, *, keep: bool) -> dict[str, torch.Tensor] | None:
    """
    A model's state dict with whole parameters, on the CPU. They are gathered one by one, so that no device holds all.

    Args:
        model (`torch.nn.Module`):
            Sharded or not.
        keep (`bool`):
            Whether this rank keeps it. Collective: every rank must call this.

    Returns:
        `dict` of tensors; `None` if it is not kept, or nothing is sharded and the model's own state dict will do.
    """
    if not any(map(is_sharded, model.parameters())):
        return None
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        with gathered([tensor]):
            whole = whole_tensor(tensor.detach())
            if keep:
                state[name] = whole.cpu().clone()
    return state if keep else None


def whole_parameters(
    named: Iterable[tuple[str, torch.nn.Parameter]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """
    Parameters with their names, each whole until the next one is asked for. Collective: every rank must go through all
    of them.
    """
    for name, parameter in named:
        with gathered([parameter]):
            yield name, whole_tensor(parameter.detach())


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP2 shards; any other tensor as it is."""
    return tensor.full_tensor() if in_shards(tensor) else tensor


def shard_like(whole: torch.Tensor, parameter: DTensor) -> torch.Tensor:
    """This rank's shard of a tensor that all ranks hold, cut as FSDP2 has cut a parameter. Does not communicate."""
    from torch.distributed.tensor import distribute_tensor

    whole = whole.to(parameter.device)
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def take_shards(module: nn.Module, state_dict: dict[str, torch.Tensor], prefix: str, *_: object) -> None:
    """A hook before loading: a module in FSDP2's shards takes its shards of the whole tensors of a state dict."""
    for name, parameter in module.named_parameters(recurse=False):
        whole = state_dict.get(prefix + name)
        if whole is not None and in_shards(parameter) and not in_shards(whole):
            state_dict[prefix + name] = shard_like(whole, parameter)
