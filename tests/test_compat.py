"""What is read of transformers under names that it may change: found where it is, and an error where it is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trl_steppo.compat.transformers import (
    attention_of,
    cache_argument,
    decoder_layers,
    deviates,
    special_attention,
    takes_positions,
)
from trl_steppo.errors import ConfigurationError
from trl_steppo.models import build_critic

ARCHITECTURES = ["Llama", "Qwen2", "Qwen3", "Mixtral"]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_this_version_has_what_is_looked_for(tiny_model, architecture):
    model = tiny_model(architecture, torch.float32, attn_implementation="eager")
    assert attention_of(model.config) == "eager"
    assert cache_argument(model) in ("cache", "past_key_values")
    assert takes_positions(model)
    assert not list(special_attention(model.config))
    for network in (model, build_critic(model)):
        assert [type(layer).__name__ for layer in decoder_layers(network)] == [f"{architecture}DecoderLayer"] * 2


def test_what_is_missing_is_named():
    with pytest.raises(ConfigurationError, match=r"`_attn_implementation` of a SimpleNamespace.*transformers \d"):
        attention_of(SimpleNamespace())
    with pytest.raises(ConfigurationError, match="Linear names no decoder layers"):
        decoder_layers(nn.Linear(2, 2))


def test_special_attention_is_listed():
    config = SimpleNamespace(layer_types=["full_attention", "sliding_attention"], sliding_window=8, alibi=True)
    assert list(special_attention(config)) == [
        "layers of full_attention, sliding_attention",
        "ALiBi instead of positions",
    ]
    assert list(special_attention(SimpleNamespace(sliding_window=8))) == ["a sliding window of 8"]
    assert not list(special_attention(SimpleNamespace(layer_types=["full_attention"], sliding_window=8)))


@pytest.mark.parametrize(
    ("error", "expected"), [(0.0, False), (1e-6, False), (0.05, False), (0.5, True), (float("nan"), True)]
)
def test_a_deviation_is_more_than_rounding_and_less_than_a_mistake(error, expected):
    plain, mistake = torch.ones(3, 8), torch.full((3, 8), 0.5)
    assert deviates(plain + error, plain, mistake) is expected
    assert deviates(plain + error, plain * float("nan"), mistake) is False  # nothing is known
