"""Attention over a flattened trie: every token attends to its ancestors and to itself.

Two ways lead there, and the model's own `attn_implementation` chooses between them:

- `sdpa`: each run of the trie (see [`batching.rows`]) is one call of scaled-dot-product attention, its queries against
  the keys of its ancestors and its own. No pair of tokens from different branches is ever computed, and no mask is
  larger than a block of queries against the keys before them.
- `flex_attention`: one call of FlexAttention for all runs, whose block mask leaves out every block of queries and keys
  that have nothing to do with each other. It learns on a GPU alone; elsewhere such a model attends run by run, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from ..compat.transformers import (
    AttentionMaskInterface,
    attention_of,
    exchange_attention,
    sdpa_attention_forward,
    sdpa_mask,
    special_attention,
    supports_attention_backend,
)
from ..errors import ConfigurationError

NAMES = {"sdpa": "sdpa_tree", "flex_attention": "flex_tree"}
"""What attention over tries is called among transformers' attention implementations, by what it takes the place of."""

_BLOCK = 1024  # queries of a run with ancestors that are worked on at a time: a mask has so many rows at most


class Run(Protocol):
    """Tokens that follow one another, from a branch to a leaf, and the spans of those before them."""

    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...
    @property
    def ancestors(self) -> Sequence[tuple[int, int]]: ...


def takes_tries(model: nn.Module) -> bool:
    """
    Whether every layer of a model attends to all tokens before it by transformers' exchangeable attention, and takes
    positions: no sliding windows, no state-space layers, no ALiBi.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    return (
        not any(special_attention(config))
        and supports_attention_backend(model)
        and attention_of(config) in (*NAMES, *NAMES.values())
        and hasattr(config, "rope_parameters")
    )


def prepare_for_tries(model: Any) -> None:
    """
    Have a model attend by [`run_attention`] or [`block_attention`], which are `sdpa` wherever no trie is given.

    Raises:
        ConfigurationError: If its attention cannot be exchanged; see [`takes_tries`] and [`exchange_attention`].
    """
    attention = attention_of(model.config)
    if attention in NAMES.values():
        return
    if not takes_tries(model):
        raise ConfigurationError(
            f"{type(model).__name__} with {attention!r} attention cannot attend to a trie of prefixes; collate with "
            "`layout='chains'`"
        )
    exchange_attention(model, NAMES[attention])


def forward_arguments(model: Any, runs: Sequence[Run] | None) -> dict[str, Any]:
    """What a model's backbone takes beside ids and positions; `runs` is `None` for plain causal rows."""
    if runs is None:
        return {}
    prepare_for_tries(model)
    if attention_of(model.config) == NAMES["flex_attention"] and model.device.type == "cuda":
        return _mask_argument(model) | {"trie_mask": block_mask(runs, model.device)}
    return run_arguments(model, runs)


def run_arguments(model: Any, runs: Sequence[Run]) -> dict[str, Any]:
    """The arguments with which a prepared model attends run by run, whichever implementation it has."""
    return _mask_argument(model) | {"trie_runs": runs}


def _mask_argument(model: Any) -> dict[str, Any]:
    """A mask of four dimensions is handed on as it is: this one only keeps the model from making another."""
    return {"attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)}


# -- a call for each run ----------------------------------------------------------------------------------------------


def run_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    trie_runs: Sequence[Run] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Args:
        module, query, key, value, attention_mask, kwargs:
            As transformers calls its attention implementations: (1, heads, L, head size).
        trie_runs (`Sequence[Run]`, *optional*):
            The branches of a flattened trie; `None`: plain `sdpa`.

    Returns:
        `tuple[torch.Tensor, None]`: (1, L, heads, head size).
    """
    if trie_runs is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    kwargs.pop("is_causal", None)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return sdpa_attention_forward(module, q, k, v, mask, is_causal=mask is None, **kwargs)[0]

    outputs = []
    for run in trie_runs:
        queries = query[:, :, run.start : run.stop]
        own_keys, own_values = key[:, :, run.start : run.stop], value[:, :, run.start : run.stop]
        if not run.ancestors:
            outputs.append(attend(queries, own_keys, own_values, None))
            continue
        keys = torch.cat([*(key[:, :, start:stop] for start, stop in run.ancestors), own_keys], dim=2)
        values = torch.cat([*(value[:, :, start:stop] for start, stop in run.ancestors), own_values], dim=2)
        before = keys.shape[2] - own_keys.shape[2]
        for start in range(0, queries.shape[2], _BLOCK):
            block = queries[:, :, start : start + _BLOCK]
            seen = before + start + block.shape[2]
            mask = _causal(block.shape[2], seen, query.device)
            outputs.append(attend(block, keys[:, :, :seen], values[:, :, :seen], mask))
    return torch.cat(outputs, dim=1), None


def _causal(num_queries: int, num_keys: int, device: torch.device) -> torch.Tensor:
    """(1, 1, queries, keys): the last query sees all keys, the one before it all but the last, ..."""
    keys = torch.arange(num_keys, device=device)
    queries = torch.arange(num_keys - num_queries, num_keys, device=device)
    return (keys <= queries[:, None])[None, None]


# -- one call for all -------------------------------------------------------------------------------------------------


def subtree_ends(runs: Sequence[Run]) -> torch.Tensor:
    """
    Where the subtree of each token of a flattened trie ends: a row runs through it depth first, so token k is an
    ancestor of token q, or q itself, exactly if k <= q < end of k.

    Args:
        runs (`Sequence[Run]`):
            The branches, in the order of the row.

    Returns:
        `torch.Tensor`: (L,), positions in the row.
    """
    length = runs[-1].stop
    ends = torch.full((length,), length)
    for run in runs:
        parent = run.ancestors[-1][1] - 1 if run.ancestors else -1
        closed = ends[parent + 1 : run.start]  # all after the parent that is still open ends here
        closed[closed == length] = run.start
    return ends


def block_mask(runs: Sequence[Run], device: torch.device) -> Any:
    """The `BlockMask` of a flattened trie: which blocks of queries and keys have an ancestor in common."""
    from torch.nn.attention.flex_attention import create_block_mask

    ends = subtree_ends(runs).to(device)
    length = len(ends)

    def sees(batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= query) & (query < ends[key])

    return _compiled(create_block_mask, device)(sees, None, None, length, length, device=device)


def block_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    trie_mask: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """
    Args:
        module, query, key, value, attention_mask, scaling, kwargs:
            As transformers calls its attention implementations: (1, heads, L, head size).
        trie_mask (`BlockMask`, *optional*):
            Of a flattened trie, see [`block_mask`]; `None`: as [`run_attention`].

    Returns:
        `tuple[torch.Tensor, None]`: (1, L, heads, head size).
    """
    if trie_mask is None:
        return run_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    changed = [name for name in ("softcap", "s_aux", "position_bias") if kwargs.get(name) is not None]
    if changed:
        raise ConfigurationError(
            f"{type(module).__name__} changes its attention by {', '.join(changed)}, which is not built for tries; "
            "set `attn_implementation` to 'eager'"
        )
    from torch.nn.attention.flex_attention import flex_attention

    grouped = query.shape[1] != key.shape[1]
    attend = _compiled(flex_attention, query.device)
    output = attend(query, key, value, block_mask=trie_mask, scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2).contiguous(), None


def _compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """FlexAttention is meant to be compiled, and is where it learns."""
    return _compile_once(function) if device.type == "cuda" else function


_compile_once = cache(torch.compile)

AttentionInterface.register(NAMES["sdpa"], run_attention)
AttentionInterface.register(NAMES["flex_attention"], block_attention)
for _name in NAMES.values():
    AttentionMaskInterface.register(_name, sdpa_mask)
