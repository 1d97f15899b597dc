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
        if isinstance(getattr(module, "attention_dropout", None), float):  # a probability, as most attentions keep it
            module.attention_dropout = 0.0  # type: ignore[assignment]
