"""Training and evaluation mode of networks, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def modes_kept(*networks: nn.Module) -> Iterator[None]:
    """After the block, each module of these networks is in training or evaluation mode as it was before."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Within the block, these networks are in evaluation mode (no dropout). After it, all is as it was."""
    with modes_kept(*networks):
        for network in networks:
            network.eval()
        yield
