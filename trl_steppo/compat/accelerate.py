"""What this package uses of accelerate beyond its documented interface. It is not imported before it is used."""

from __future__ import annotations

import os
from typing import Any

from . import attribute


def is_fsdp2(accelerator: object) -> bool:
    """Whether accelerate was launched with FSDP in its version 2."""
    return bool(attribute("accelerate", accelerator, "is_fsdp2"))


def autocasts(accelerator: object) -> bool:
    """Whether mixed precision is autocast's, and not an engine's."""
    return bool(attribute("accelerate", accelerator, "native_amp"))


def forget_engine(accelerator: Any) -> None:
    """Have accelerate prepare another DeepSpeed engine: its own loop has one, ours calls each itself."""
    attribute("accelerate", accelerator, "deepspeed_engine_wrapped")
    accelerator.deepspeed_engine_wrapped = None


def find_fsdp(accelerator: Any) -> None:
    """Have CPU ranks shard where accelerate was launched with FSDP, where it would silently use DDP."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState

    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU and os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for part in (state, PartialState()):  # whose values are copied into new instances of the other
            part.distributed_type = DistributedType.FSDP
