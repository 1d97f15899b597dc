"""Shared by the programs that make the built-in policies: the shape of a small model, and its training."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Protocol

import torch

from trl_steppo.types import JsonObject, Tokenizer


class Shape(Protocol):
    """The flags that decide the size of a model."""

    hidden_size: int
    num_layers: int
    num_heads: int


def small_config(shape: Shape, tokenizer: Tokenizer, *, max_position_embeddings: int) -> JsonObject:
    """Settings of a transformers configuration for a small model. Every head has its own keys and values."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.hidden_size * 2,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_heads,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": True,
        "initializer_range": shape.hidden_size**-0.5,  # the default is for wide models
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def descend(model: torch.nn.Module, losses: Iterable[torch.Tensor], *, learning_rate: float, num_steps: int) -> None:
    """Take `num_steps` AdamW steps, with warm-up and decay, on losses that are computed one by one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=num_steps, pct_start=0.05)
    for loss in islice(losses, num_steps):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
