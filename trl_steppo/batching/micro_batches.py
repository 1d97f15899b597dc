"""Mini-batches of one optimizer step, and micro-batches that fit into memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from .collator import LayoutName
from .rows import Trie, chains

Part = tuple[int, list[int]]
"""An episode's index, and the indices of some of its steps."""


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
    chosen: Sequence[int],
    sequences: Sequence[Sequence[np.ndarray]],
    *,
    layout: LayoutName,
    max_episodes: int,
    max_tokens: int | None = None,
) -> list[list[Part]]:
    """
    Split episodes into groups that are forwarded together: neighbours in a dataset row's group where prefixes are
    shared between episodes, of similar length where rows are padded.

    Args:
        chosen (`Sequence[int]`):
            The episodes to split.
        sequences (`Sequence[Sequence[np.ndarray]]`):
            For every episode, the token ids of its steps, prompt and response.
        layout (`str`):
            How they will be laid out; see [`StepRolloutCollator`].
        max_episodes (`int`):
            Most episodes of a group.
        max_tokens (`int`, *optional*):
            Most tokens of a group, padding included (of a trie that is laid out as rows, 3 % more); instead of
            `max_episodes`. An episode that has more is cut
            between its steps, whose prompts then are forwarded again; a step that has more stands alone.

    Returns:
        `list[list[Part]]`: The parts of each micro-batch.
    """
    whole = {index: (index, list(range(len(sequences[index])))) for index in chosen}
    order = sorted(chosen)
    if layout != "trie":
        order.sort(key=lambda index: sum(map(len, sequences[index])))
    if max_tokens is None:
        return [
            [whole[i] for i in order[start : start + max_episodes]] for start in range(0, len(order), max_episodes)
        ]
    groups: list[list[Part]] = []
    size = _size_of(layout)
    for index in order:
        if groups and size.with_more(sequences[index]) <= max_tokens:
            groups[-1].append(whole[index])
            size.add(sequences[index])
            continue
        size = _size_of(layout)
        if size.with_more(sequences[index]) <= max_tokens:
            groups.append([whole[index]])
            size.add(sequences[index])
            continue
        groups.append([(index, [])])
        for number, ids in enumerate(sequences[index]):
            if groups[-1][0][1] and size.with_more([ids]) > max_tokens:
                groups.append([(index, [])])
                size = _size_of(layout)
            groups[-1][0][1].append(number)
            size.add([ids])
    return groups


def divide(
    chosen: Sequence[int],
    sequences: Sequence[Sequence[np.ndarray]],
    rows: Sequence[int],
    *,
    layout: LayoutName,
    num_ranks: int,
) -> list[list[int]]:
    """
    Divide episodes among ranks so that each has about as many tokens to forward. The episodes of a dataset row stay
    together where they share prefixes.

    Args:
        chosen (`Sequence[int]`):
            The episodes to divide.
        sequences (`Sequence[Sequence[np.ndarray]]`):
            For every episode, the token ids of its steps, prompt and response.
        rows (`Sequence[int]`):
            For every episode, the dataset row it was played from.
        layout (`str`):
            How they will be laid out; see [`StepRolloutCollator`].
        num_ranks (`int`):
            Number of shares; some are empty if there is less to divide.

    Returns:
        `list[list[int]]`: The episodes of each rank.
    """
    units: dict[int, list[int]] = {}
    for index in chosen:
        units.setdefault(rows[index] if layout == "trie" else index, []).append(index)
    members = list(units.values())
    costs = [_size_of(layout).with_more([ids for i in unit for ids in sequences[i]]) for unit in members]
    return [[index for unit in share for index in members[unit]] for share in longest_first(costs, num_ranks)]


def longest_first(costs: Sequence[int], num_shares: int) -> list[list[int]]:
    """
    Deal units out, the most costly first, each to the share that has the least so far. No share costs more than
    4/3 − 1/(3·`num_shares`) times what the largest must (Graham 1969, "Bounds on multiprocessing timing anomalies").

    Args:
        costs (`Sequence[int]`):
            Of each unit.
        num_shares (`int`):
            Number of shares.

    Returns:
        `list[list[int]]`: The units of each share.

    Example:
    ```python
    >>> longest_first([1, 5, 4, 2], 2)
    [[1, 0], [2, 3]]
    ```
    """
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    loads = [0] * num_shares
    for unit in sorted(range(len(costs)), key=lambda unit: -costs[unit]):
        least = loads.index(min(loads))
        shares[least].append(unit)
        loads[least] += costs[unit]
    return shares


class _Size(Protocol):
    """Tokens that a group of sequences takes in a layout."""

    def with_more(self, sequences: Sequence[np.ndarray]) -> int: ...
    def add(self, sequences: Sequence[np.ndarray]) -> None: ...


def _size_of(layout: LayoutName) -> _Size:
    return _TrieSize() if layout == "trie" else _PaddedSize(layout)


class _TrieSize:
    def __init__(self) -> None:
        self._trie = Trie()

    def with_more(self, sequences: Sequence[np.ndarray]) -> int:
        """At most so many: of what the sequences share with the trie, the longest prefix alone is counted once."""
        alone = Trie()
        for ids in sequences:
            alone.insert(ids)
        return self._trie.num_tokens + alone.num_tokens - max(map(self._trie.num_shared, sequences))

    def add(self, sequences: Sequence[np.ndarray]) -> None:
        for ids in sequences:
            self._trie.insert(ids)


class _PaddedSize:
    def __init__(self, layout: LayoutName) -> None:
        self._layout = layout
        self._sequences: list[np.ndarray] = []

    def with_more(self, sequences: Sequence[np.ndarray]) -> int:
        all_of_them = [*self._sequences, *sequences]
        if self._layout == "chains":
            return chains(all_of_them).input_ids.size
        return len(all_of_them) * max(map(len, all_of_them))

    def add(self, sequences: Sequence[np.ndarray]) -> None:
        self._sequences += sequences
