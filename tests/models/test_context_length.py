"""The context is read from any model's configuration."""

from __future__ import annotations

import pytest
from transformers import BloomConfig, Gemma3Config, GPT2Config, GptOssConfig, MambaConfig, MptConfig, Qwen2Config

from trl_steppo.models import context_length


def qwen(positions: int, **scaling: object) -> Qwen2Config:
    return Qwen2Config(max_position_embeddings=positions, rope_scaling=scaling)


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (Qwen2Config(max_position_embeddings=64), 64),
        (GPT2Config(n_positions=512), 512),
        (MptConfig(max_seq_len=1024), 1024),
        (Gemma3Config(), 131_072),  # of its text
        (GptOssConfig(), 131_072),  # counts its rope scaling already
        (qwen(32_768, rope_type="yarn", factor=4.0, original_max_position_embeddings=32_768), 131_072),
        (qwen(32_768, rope_type="yarn", factor=4.0), 131_072),
        (qwen(2048, rope_type="dynamic", factor=4.0), 8192),
        (qwen(2048, rope_type="linear", factor=2.0), 4096),
        (MambaConfig(), None),
        (BloomConfig(), None),
    ],
)
def test_the_context_of_a_configuration(config, length):
    assert context_length(config) == length
