"""The networks: one forward pass -> per-token log-probabilities, or state values."""

from pathlib import Path

from .adapters import (
    AdapterReference,
    adapter_changes_model,
    add_adapter,
    as_reference,
    critic_adapter,
    freeze_copy,
    is_peft_model,
    plain_model,
    saved_with_adapter,
)
from .agreement import agrees_on_tries
from .attention import prepare_for_tries, register_attention, takes_tries
from .context import context_length
from .critic import build_critic, check_critic
from .dropout import disable_dropout
from .endings import end_token_ids, stored_end_token_ids
from .forward import Critic, PolicyScorer, rows_at_once
from .reward import score_sequences
from .sharding import (
    gathered,
    is_sharded,
    shard_like,
    take_shards,
    whole_parameters,
    whole_shape,
    whole_state_dict,
    whole_tensor,
)

__all__ = [
    "MINI_WIKI_POLICY",
    "MINI_WIKI_THINKING_POLICY",
    "ROOMS_POLICY",
    "AdapterReference",
    "Critic",
    "PolicyScorer",
    "adapter_changes_model",
    "add_adapter",
    "agrees_on_tries",
    "as_reference",
    "build_critic",
    "check_critic",
    "context_length",
    "critic_adapter",
    "disable_dropout",
    "end_token_ids",
    "freeze_copy",
    "gathered",
    "is_peft_model",
    "is_sharded",
    "locate_model",
    "plain_model",
    "prepare_for_tries",
    "register_attention",
    "rows_at_once",
    "saved_with_adapter",
    "score_sequences",
    "shard_like",
    "stored_end_token_ids",
    "take_shards",
    "takes_tries",
    "whole_parameters",
    "whole_shape",
    "whole_state_dict",
    "whole_tensor",
]

MINI_WIKI_POLICY = str(Path(__file__).parent / "mini_wiki")
"""Directory of the built-in policy, made by `examples/make_mini_wiki_policy.py`."""

MINI_WIKI_THINKING_POLICY = str(Path(__file__).parent / "mini_wiki_thinking")
"""The same of a policy that says what it found and needs before each call."""

ROOMS_POLICY = str(Path(__file__).parent / "rooms")
"""Directory of the rooms' policy, made by `examples/make_rooms_policy.py`."""


def locate_model(name: str) -> str:
    """The directory of a built-in policy of the mini wiki, by its name; any other name or directory as it is."""
    return {"mini_wiki": MINI_WIKI_POLICY, "mini_wiki_thinking": MINI_WIKI_THINKING_POLICY}.get(name, name)
