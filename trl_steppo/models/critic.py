"""Building the critic: the policy's backbone with a value head that starts at zero."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from ..errors import ConfigurationError


def build_critic(policy: PreTrainedModel) -> PreTrainedModel:
    """
    A critic of the policy's architecture that starts from its weights and values every state at 0.

    Args:
        policy (`PreTrainedModel`):
            The causal language model to copy the backbone of.

    Returns:
        `PreTrainedModel`: A sequence classifier with one label, separate from the policy.

    Raises:
        ConfigurationError: If transformers has no sequence classifier for this architecture.
    """
    config = copy.deepcopy(policy.config)
    config.num_labels = 1
    try:
        critic = AutoModelForSequenceClassification.from_config(config, dtype=policy.dtype)
    except ValueError as error:
        raise ConfigurationError(
            f"transformers has no sequence classifier for {type(policy).__name__}, so no critic can be built from it; "
            "pass `value_model` (a backbone at its `base_model_prefix`, and a head named `score`)"
        ) from error
    backbone: Any = getattr(critic, critic.base_model_prefix)
    backbone.load_state_dict(getattr(policy, policy.base_model_prefix).state_dict())
    check_critic(critic)
    with torch.no_grad():
        for parameter in critic.score.parameters():
            parameter.zero_()
    return critic.to(policy.device)


def check_critic(model: nn.Module, name: str = "value_model") -> None:
    """
    Check that a model reads one number from a sequence.

    Args:
        model (`torch.nn.Module`):
            The critic or the reward model.
        name (`str`, *optional*, defaults to `"value_model"`):
            What the message calls it.

    Raises:
        ConfigurationError: If the model lacks what a critic needs.
    """
    prefix = getattr(model, "base_model_prefix", None)
    head = getattr(model, "score", None)
    if not prefix or not hasattr(model, prefix) or not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ConfigurationError(
            f"`{name}` is a {type(model).__name__}; it needs a backbone at its `base_model_prefix` and a "
            "linear head `score` with one output, as `AutoModelForSequenceClassification.from_pretrained(..., "
            "num_labels=1)` gives"
        )
