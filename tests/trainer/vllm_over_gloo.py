"""
Has a real vLLM server on a CPU make groups over gloo, where its own are over NCCL: `--worker-extension-cls
tests.trainer.vllm_over_gloo.Worker`. All else is vLLM's.
"""

from typing import Any

import torch
from vllm.distributed.weight_transfer import nccl_engine

from tests.inference.gloo_group import GlooGroup


class Worker:
    """An extension of the server's workers, of which it is enough that it is loaded."""


def join(given: Any, config: Any) -> GlooGroup:
    return GlooGroup(given.master_address, given.master_port, given.world_size, given.rank_offset + config.rank)


nccl_engine.worker_init_process_group = join
torch.cuda.current_stream = lambda device=None: None  # type: ignore[assignment,misc]
