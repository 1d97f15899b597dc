"""A network in training: what updates it, and how it computes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..compat.accelerate import autocasts
from ..numerics import Numerics

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Types of mixed precision, by accelerate's names."""


@dataclass
class Network:
    """A network in training: as the distributed engine wrapped it, with what updates it."""

    module: nn.Module
    optimizer: Any
    scheduler: Any
    accelerator: Accelerator

    @property
    def learning_rate(self) -> float:
        return float(self.scheduler.get_last_lr()[0])

    def accumulating(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Around the forward and backward pass of a micro-batch, of which the last one ends its mini-batch."""
        return nullcontext() if is_last else self.accelerator.no_sync(self.module)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of a loss whose sum runs over all ranks and micro-batches already."""
        # Gradients are averaged over ranks, and accelerate divides by a number of its own.
        self.accelerator.backward(loss * self.accelerator.num_processes * self.accelerator.gradient_accumulation_steps)

    def step(self, max_grad_norm: float, agree: Callable[[bool], bool], before: Callable[[], None]) -> float | None:
        """
        One step of the optimizer.

        Args:
            max_grad_norm (`float`):
                Where the gradient's norm is clipped; 0: nowhere.
            agree (`Callable[[bool], bool]`):
                Whether all ranks see what this one sees.
            before (`Callable`):
                Called between clipping and the step.

        Returns:
            `float` or `None`: The gradient's norm before clipping; `None` where it is not a number, and nothing moved.
        """
        norm = self._clip(max_grad_norm or math.inf)
        finite = agree(math.isfinite(norm))
        before()
        if finite:
            self.optimizer.step()
        elif self.accelerator.scaler is not None:
            self.accelerator.scaler.update()  # with fp16 a step is skipped so that the next has a smaller scale
        self.optimizer.zero_grad()
        return norm if finite else None

    def _clip(self, max_norm: float) -> float:
        """Scale the gradient down to a norm, and tell the one that it had."""
        return float(self.accelerator.clip_grad_norm_(self.module.parameters(), max_norm))

    def whole(self) -> AbstractContextManager[Any]:
        """
        Within, every rank runs the network's model without a word to the others, as often as it likes: episodes have
        different lengths. All ranks call it.
        """
        return nullcontext()


def end_update(networks: list[Network]) -> None:
    """On to the learning rates of the next update."""
    with warnings.catch_warnings():
        # While the critic warms up, the policy's schedule goes on without a step of its optimizer.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        for scheduler in {id(network.scheduler): network.scheduler for network in networks}.values():
            scheduler.step()


def numerics_of(accelerator: Accelerator) -> Numerics:
    """
    How all forward passes of a run compute, training's as well as those without a gradient.

    Args:
        accelerator ([`~accelerate.Accelerator`]):
            Knows the device and the mixed precision, and whether autocast does that or an engine (DeepSpeed).
    """
    autocast = HALVES.get(accelerator.mixed_precision, torch.bfloat16) if autocasts(accelerator) else None
    return Numerics(accelerator.device, autocast)
