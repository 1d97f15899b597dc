"""A critic starts as the policy's twin that values everything at 0."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn

from trl_steppo.batching import StepRolloutCollator
from trl_steppo.errors import ConfigurationError
from trl_steppo.models import Critic, build_critic, check_critic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["Llama", "Qwen2", "Qwen3"])
def test_starts_from_the_policy_and_values_everything_at_0(tiny_model, random_episode, architecture, dtype):
    policy = tiny_model(architecture, dtype)
    critic = build_critic(policy)
    check_critic(critic)
    batch = StepRolloutCollator()([random_episode(seed) for seed in range(4)])
    assert not Critic(critic)(batch, torch.arange(batch.input_ids.numel())).any()
    backbone = critic.model.state_dict()
    assert backbone.keys() == policy.model.state_dict().keys()
    for name, tensor in policy.model.state_dict().items():
        assert torch.equal(backbone[name], tensor), name
        assert backbone[name].dtype == tensor.dtype == dtype


def test_shares_nothing_with_the_policy(tiny_model):
    policy = tiny_model("Qwen2", tie_word_embeddings=True)
    before = copy.deepcopy(policy.state_dict())
    settings = policy.config.to_dict()
    critic = build_critic(policy)
    storages = {parameter.data_ptr() for parameter in policy.parameters()}
    assert storages.isdisjoint(parameter.data_ptr() for parameter in critic.parameters())
    for parameter in critic.parameters():
        parameter.data.add_(1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert policy.config.to_dict() == settings
    assert critic.config.num_labels == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_keeps_the_policys_attention(tiny_model, attention):
    critic = build_critic(tiny_model("Llama", attn_implementation=attention))
    assert critic.config._attn_implementation == attention


def test_trains_from_its_first_step(tiny_model, random_episode):
    """The head's gradient does not vanish with its weights; the backbone's follows once they have moved."""
    critic = build_critic(tiny_model("Llama"))
    batch = StepRolloutCollator()([random_episode(0)])
    Critic(critic)(batch, batch.value_positions).sum().backward()
    assert critic.score.weight.grad.any()


def test_survives_a_checkpoint(tiny_model, tmp_path):
    critic = build_critic(tiny_model("Qwen3", torch.float32))
    critic.score.weight.data.fill_(0.5)
    critic.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    check_critic(loaded)
    assert all(torch.equal(tensor, critic.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_an_architecture_without_a_classifier_is_refused():
    config = transformers.CodeGenConfig(vocab_size=64, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=32)
    with pytest.raises(ConfigurationError, match="no sequence classifier for CodeGenForCausalLM"):
        build_critic(transformers.CodeGenForCausalLM(config))


class Headless(nn.Module):
    base_model_prefix = "model"

    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


@pytest.mark.parametrize(
    "model",
    [
        Headless(model=nn.Identity()),
        Headless(score=nn.Linear(4, 1)),
        Headless(model=nn.Identity(), score=nn.Linear(4, 2)),
        Headless(model=nn.Identity(), score=nn.Sequential(nn.Linear(4, 1))),
        nn.Linear(4, 1),
    ],
    ids=["no head", "no backbone", "two outputs", "not linear", "no transformers model"],
)
def test_an_object_that_is_not_a_critic_is_named(model):
    with pytest.raises(ConfigurationError, match=f"`value_model` is a {type(model).__name__}"):
        check_critic(model)
