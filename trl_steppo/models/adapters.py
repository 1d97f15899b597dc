"""Adapters (LoRA and similar): one for the policy, one for the critic, none for the reference."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel

from ..batching import StepBatch
from ..errors import ConfigurationError
from ..extras import install_command
from ..modes import evaluating
from ..types import Model
from .forward import EntropyMode, LogprobsAndEntropy

if TYPE_CHECKING:
    from peft import PeftModel


def is_peft_model(model: object) -> TypeGuard[PeftModel]:
    """Whether a model carries adapters. Does not import peft, which has been imported where one was made."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def plain_model(model: Any) -> Any:
    """The transformers model itself, whose layers adapters wrap where it has any. A forward pass goes to it."""
    return model.get_base_model() if is_peft_model(model) else model


def add_adapter(model: Model, peft_config: object, *, name: str = "default") -> PeftModel:
    """
    Put a new adapter on a model; everything else is frozen.

    Args:
        model (`PreTrainedModel`):
            A model without adapters.
        peft_config ([`~peft.PeftConfig`]):
            LoRA, or another kind whose layers stand inside the model's.
        name (`str`, *optional*, defaults to `"default"`):
            The adapter's name.

    Returns:
        `PeftModel`: The model with the adapter.

    Raises:
        ConfigurationError: If `peft_config` is not one, is of a kind that changes the prompt, or the model carries an
            adapter already.
    """
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise ConfigurationError(
            f"`peft_config` is set, but peft is not installed: {install_command('peft')}"
        ) from error
    if not isinstance(peft_config, PeftConfig):
        raise ConfigurationError(
            f"`peft_config` is a {type(peft_config).__name__}; pass a `peft.PeftConfig`, e.g. `peft.LoraConfig(...)`"
        )
    if is_peft_model(model):
        raise ConfigurationError(
            "`model` carries an adapter already, and `peft_config` asks for another; leave `peft_config` out to train "
            "the one it has, or pass `model.merge_and_unload()`"
        )
    if peft_config.is_prompt_learning:
        raise ConfigurationError(
            f"`peft_config` is a {type(peft_config).__name__}, which puts virtual tokens before the prompt; choose "
            "an adapter inside the layers, e.g. `peft.LoraConfig(...)`"
        )
    return get_peft_model(model, peft_config, adapter_name=name)


def critic_adapter(peft_config: Any) -> Any:
    """The policy's adapter configuration, as a critic of the same architecture takes it: with its value head."""
    config = copy.deepcopy(peft_config)
    config.task_type = "SEQ_CLS"
    config.modules_to_save = sorted({*(config.modules_to_save or ()), "score"} - {"lm_head"})
    if isinstance(config.target_modules, set | list):
        config.target_modules = type(config.target_modules)(t for t in config.target_modules if t != "lm_head")
    return config


def saved_with_adapter(model: PeftModel) -> set[int]:
    """The memory of the parameters that `save_pretrained` writes for a `PeftModel`'s active adapter."""
    from peft import get_peft_model_state_dict

    weights = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    return {tensor.data_ptr() for tensor in weights.values()}


def shared_copy(model: Model) -> PreTrainedModel:
    """
    A second plain model, without adapters, whose parameters are the model's own: one copy of the weights in memory.

    Args:
        model (`PreTrainedModel` or `PeftModel`):
            What to copy; not changed.
    """
    # `deepcopy` takes what it finds in its memo for the copy of what it looks up there.
    copied: Any = copy.deepcopy(model, memo={id(parameter): parameter for parameter in model.parameters()})
    plain: PreTrainedModel = copied.unload() if is_peft_model(copied) else copied
    return plain


@torch.no_grad()
def adapter_changes_model(model: PeftModel) -> bool:
    """
    Whether the active adapter changes what a model computes. A new one does not: e.g. one factor of LoRA's is zero.

    Computes the logits of a few tokens with it and without, which holds for every kind of adapter.

    Args:
        model (`PeftModel`):
            A causal language model with adapters.
    """
    size = plain_model(model).config.get_text_config().vocab_size
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, size, (1, 16), generator=generator).to(device)
    with evaluating(model):
        with_adapter = plain_model(model)(input_ids=input_ids, use_cache=False).logits
        with model.disable_adapter():
            without_adapter = plain_model(model)(input_ids=input_ids, use_cache=False).logits
    return not torch.equal(with_adapter, without_adapter)


def freeze_copy(model: PeftModel, adapter: str) -> str:
    """
    Add a copy of an adapter that is not trained.

    Args:
        model (`PeftModel`):
            The model; the adapter that is active stays so.
        adapter (`str`):
            Name of the adapter.

    Returns:
        `str`: Name of the copy: `"reference"`, or with a number where there is one of that name.
    """
    names = ["reference", *(f"reference_{number}" for number in range(2, len(model.peft_config) + 3))]
    name = next(name for name in names if name not in model.peft_config)
    config = copy.deepcopy(model.peft_config[adapter])
    config.inference_mode = True
    model.add_adapter(name, config)
    copy_adapter(model, adapter, name)
    model.set_adapter(adapter)
    return name


def copy_adapter(model: PeftModel, source: str, target: str) -> None:
    """Give one adapter of a model the weights of another, of the same kind; it is frozen."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=source, save_embedding_layers=False)
    state = {name: tensor.detach().clone() for name, tensor in state.items()}
    set_peft_model_state_dict(model, state, adapter_name=target)
    for name, parameter in model.named_parameters():
        if target in name.split("."):
            parameter.requires_grad_(False)


@contextmanager
def as_reference(model: Any, policy_adapter: str, reference_adapter: str | None) -> Iterator[None]:
    """
    Within the block, a policy with adapters is its own reference. Not for anything with a gradient.

    Args:
        model (`PeftModel`):
            The policy, with its adapters.
        policy_adapter (`str`):
            Name of the adapter that is trained.
        reference_adapter (`str`, *optional*):
            Name of the one that is the reference; `None`: the base model without any.
    """
    if reference_adapter is None:
        with model.disable_adapter():
            yield
        return
    model.set_adapter(reference_adapter, inference_mode=True)
    try:
        yield
    finally:
        model.set_adapter(policy_adapter)


class AdapterReference(nn.Module):
    """
    The reference policy that a policy with adapters carries within itself.

    Args:
        scorer (`torch.nn.Module`):
            A [`PolicyScorer`] over the model, distributed or not.
        model, policy_adapter, reference_adapter:
            See [`as_reference`].
    """

    def __init__(self, scorer: nn.Module, model: Any, policy_adapter: str, reference_adapter: str | None) -> None:
        super().__init__()
        self.scorer = scorer
        self.reference_adapter = reference_adapter
        self._switched = partial(as_reference, model, policy_adapter)

    def forward(self, rows: StepBatch, *, entropy: EntropyMode = "skip") -> LogprobsAndEntropy:
        """See [`PolicyScorer.forward`]."""
        with self._switched(self.reference_adapter):
            scores: LogprobsAndEntropy = self.scorer(rows, entropy=entropy)
        return scores
