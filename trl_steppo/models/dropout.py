"""Dropout, which a policy gradient cannot use."""

from __future__ import annotations

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """
    Turn dropout off for good, as `PPOTrainer` does: with it, the importance ratios of a policy that has not moved
    would not be 1.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # probabilities that attentions and layers keep to use themselves
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
