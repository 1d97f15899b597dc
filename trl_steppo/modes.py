"""Context managers for the training and evaluation mode of networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(*networks: nn.Module) -> Iterator[None]:
    """Restore the mode (training or evaluation) of each module of these networks after the block."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Put these networks into evaluation mode (no dropout) within the block, and restore their modes after it."""
    with modes_kept(*networks):
        for network in networks:
            network.eval()
        yield
