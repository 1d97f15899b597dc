"""Mini-batches of one optimizer step, and micro-batches that fit into memory. Both hold whole episodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def mini_batches(num_episodes: int, num_mini_batches: int, *, seed: int) -> list[list[int]]:
    """
    Split episodes by a seeded permutation into parts whose sizes differ by at most one.

    Args:
        num_episodes (`int`):
            Number of episodes.
        num_mini_batches (`int`):
            Number of parts; some are empty if there are fewer episodes.
        seed (`int`):
            Seed of the permutation.

    Returns:
        `list[list[int]]`: Indices of the episodes of each mini-batch.
    """
    order = torch.randperm(num_episodes, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[i::num_mini_batches] for i in range(num_mini_batches)]


def micro_batches(
    episode_indices: Sequence[int], num_tokens: Sequence[int], *, max_episodes: int, max_tokens: int | None = None
) -> list[list[int]]:
    """
    Split episodes into groups of similar length, so that little is padded.

    Args:
        episode_indices (`Sequence[int]`):
            The episodes to split.
        num_tokens (`Sequence[int]`):
            Tokens of every episode's rows, indexed by episode.
        max_episodes (`int`):
            Most episodes of a group.
        max_tokens (`int`, *optional*):
            Most tokens of a group, padding included (episodes × longest); instead of `max_episodes`. A longer episode
            stands alone: its steps are never torn apart.

    Returns:
        `list[list[int]]`: Indices of the episodes of each micro-batch.
    """
    groups: list[list[int]] = []
    for index in sorted(episode_indices, key=lambda i: (num_tokens[i], i)):
        if groups:
            size = len(groups[-1]) + 1
            fits = size <= max_episodes if max_tokens is None else size * num_tokens[index] <= max_tokens
            if fits:
                groups[-1].append(index)
                continue
        groups.append([index])
    return groups
