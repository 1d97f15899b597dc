"""What this package uses of vLLM beyond its servers' interface. It is not imported before it is used."""

from __future__ import annotations

from typing import Any

from . import find


def trainer_init() -> Any:
    """The function with which a trainer joins a server in an NCCL group. vLLM fails to import for many reasons."""
    return find("vllm.distributed.weight_transfer.nccl_common.trainer_init")
