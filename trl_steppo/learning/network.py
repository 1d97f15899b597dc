"""A network in training, and what updates it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from ..compat.accelerate import autocasts
from ..numerics import Numerics

HALF_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of mixed precision, by accelerate's names."""


@dataclass
class Network:
    """
    A network on one device or under DDP. Subclasses are for engines that shard networks.

    Args:
        module (`torch.nn.Module`):
            The network, as accelerate has wrapped it.
        optimizer ([`~torch.optim.Optimizer`]):
            Two networks may share one.
        scheduler ([`~torch.optim.lr_scheduler.LambdaLR`]):
            The optimizer's learning rates over updates.
        accelerator ([`~accelerate.Accelerator`]):
            Scales, reduces and clips gradients.
    """

    module: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LambdaLR
    accelerator: Accelerator

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Context of one micro-batch's forward and backward pass; the last micro-batch ends its mini-batch."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.module)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of one micro-batch's part of a loss that is summed over all ranks and micro-batches."""
        # Gradients are averaged over ranks, and accelerate divides by a number of its own.
        self.accelerator.backward(loss * self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps)

    def step(self, max_grad_norm: float, agree: Callable[[bool], bool], before: Callable[[], None]) -> float | None:
        """
        Take one step of the optimizer, unless the gradient is not finite. Collective: every rank must call this.

        Args:
            max_grad_norm (`float`):
                Where the gradient's norm is clipped; 0: nowhere.
            agree (`Callable[[bool], bool]`):
                Whether something is true on all ranks.
            before (`Callable`):
                Called between clipping and the step.

        Returns:
            `float` or `None`: The gradient's norm before clipping; `None` if no step was taken.
        """
        norm = self._clip(max_grad_norm or math.inf)
        is_finite = agree(math.isfinite(norm))
        before()
        if is_finite:
            self.optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # with fp16 a step is skipped so that the next has a smaller scale
        self.optimizer.zero_grad()
        return norm if is_finite else None

    def _clip(self, max_norm: float) -> float:
        """Clip the gradient, and return the norm that it had."""
        return float(self.accelerator.clip_grad_norm_(self.module.parameters(), max_norm))

    def whole(self) -> AbstractContextManager[object]:
        """
        A context in which each rank may run the model independently of the others, any number of times, because
        episodes have different lengths. Collective: every rank must enter it.
        """
        return nullcontext()


def end_update(networks: Iterable[Network]) -> None:
    """Advance the schedules to the learning rates of the next update."""
    with warnings.catch_warnings():
        # While the critic warms up, the policy's schedule advances without a step of its optimizer.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for scheduler in {id(network.scheduler): network.scheduler for network in networks}.values():
            scheduler.step()


def numerics_of(accelerator: Accelerator) -> Numerics:
    """
    How all forward passes of a run compute, with and without a gradient.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Knows the device and the mixed precision, and whether autocast does that or an engine (DeepSpeed).
    """
    autocast = HALF_DTYPES.get(accelerator.mixed_precision, torch.bfloat16) if autocasts(accelerator) else None
    return Numerics(accelerator.device, autocast)
