"""A model that attends to tries is one whose layers all do, as tried out and as they say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trl_steppo.compat.transformers import attention_of, exchange_attention
from trl_steppo.errors import ConfigurationError
from trl_steppo.models import agreement, agrees_on_tries, attention, build_critic, prepare_for_tries
from trl_steppo.numerics import deviates

ARCHITECTURES = ["Llama", "Qwen2", "Qwen3"]


@pytest.fixture(autouse=True)
def _untried(monkeypatch) -> None:
    monkeypatch.setattr(agreement, "_known", {})


def layers_of(model: nn.Module) -> list[str]:
    """What each attention layer itself reads."""
    return [attention_of(m.config) for m in model.modules() if type(m).__name__.endswith("Attention")]


def two_configurations(critic: Any) -> Any:
    """A critic whose wrapper and backbone have a configuration each, as one put together by hand has."""
    critic.config = copy.deepcopy(critic.config)
    return critic


@pytest.mark.parametrize("share_weights", [False, True])
def test_a_critic_has_one_configuration_and_the_policy_another(tiny_model, share_weights):
    policy = tiny_model("Qwen2")
    critic = build_critic(policy, share_weights=share_weights)
    configurations = {id(m.config) for m in critic.modules() if hasattr(m, "config")}
    assert configurations == {id(critic.config)}
    prepare_for_tries(critic)
    assert layers_of(critic) == ["sdpa_tree"] * 2
    assert layers_of(policy) == ["sdpa"] * 2
    assert policy.config.num_labels != critic.config.num_labels == 1


def test_layers_with_a_configuration_of_their_own_are_prepared_too(tiny_model):
    critic = two_configurations(build_critic(tiny_model("Llama")))
    prepare_for_tries(critic)
    assert layers_of(critic) == ["sdpa_tree"] * 2
    assert agrees_on_tries(critic)


def test_a_layer_that_keeps_its_attention_is_an_error(tiny_model):
    model = tiny_model("Llama")
    model.model.layers[1].self_attn.config = copy.deepcopy(model.config)
    attention.register_attention()
    with pytest.raises(ConfigurationError, match=r"'model\.layers\.1\.self_attn' \(1 modules in all\) keeps"):
        exchange_attention(model, "sdpa_tree")


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "Mixtral"])
def test_rounding_is_not_a_disagreement(tiny_model, architecture, dtype, implementation):
    for seed in range(5):
        agreement._known.clear()
        model = tiny_model(architecture, dtype, seed=seed, attn_implementation=implementation)
        assert agrees_on_tries(model)
        assert agrees_on_tries(build_critic(model))


def without_branches(*args: Any, trie_segments: Any = None, **kwargs: Any) -> Any:
    return attention.segment_attention(*args, **kwargs)


def causal(*args: Any, trie_segments: Any = None, **kwargs: Any) -> Any:
    module, query, key, value, _ = args
    return attention.segment_attention(module, query, key, value, None, **kwargs)


@pytest.mark.parametrize("ignoring", [without_branches, causal])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_that_ignores_branches_is_found(tiny_model, monkeypatch, architecture, ignoring):
    """One that attends to everything, as the mask it is given says, and one that attends to all that comes before."""
    attention.register_attention()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa_tree", ignoring)
    for seed in range(5):
        agreement._known.clear()
        assert not agrees_on_tries(tiny_model(architecture, torch.float32, seed=seed))


def test_a_model_that_ignores_positions_is_found(tiny_model, monkeypatch):
    model = tiny_model("Llama", torch.float32)
    original = type(model.model).forward
    monkeypatch.setattr(
        type(model.model),
        "forward",
        lambda self, *args, position_ids=None, **kwargs: original(self, *args, **kwargs),
    )
    assert not agrees_on_tries(model)


def test_each_class_is_tried_once(tiny_model):
    passes: list[Any] = []
    for _ in range(3):
        model = tiny_model("Llama")
        model.model.register_forward_hook(lambda *args: passes.append(args))
        assert agrees_on_tries(model)
    assert len(passes) == 3  # of the first: in rows, as a trie, and as what a trie is not


@pytest.mark.parametrize(
    ("error", "expected"), [(0.0, False), (1e-6, False), (0.05, False), (0.5, True), (float("nan"), True)]
)
def test_a_deviation_is_more_than_rounding_and_less_than_a_mistake(error, expected):
    plain, mistake = torch.ones(3, 8), torch.full((3, 8), 0.5)
    assert deviates(plain + error, plain, mistake) is expected
    assert deviates(plain + error, plain * float("nan"), mistake) is False  # nothing is known
