"""Sequences -> rows: which tokens are forwarded together, and where each sequence's tokens stand.

A sequence is a step's prompt and response. Sequences that begin with the same tokens can share these:

- [`row_per_step`]: nothing is shared. O(T²) tokens for the T steps of an append-only episode.
- [`chains`]: a sequence that continues the one before it takes over its row. For models that only know causal rows.
- [`share_prefixes`]: all sequences as one trie, flattened into one row in which every token attends to its ancestors.
  No token twice, no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

Ids = np.ndarray  # (tokens,) int32

_CHAINS_COST = (
    1.03  # tokens of causal rows, for each of a trie, that take no longer: one call of attention for all rows
)


@dataclass(frozen=True)
class Segment:
    """
    Consecutive tokens of a flattened trie, from a branch to a leaf.

    Args:
        start, stop (`int`):
            Where they stand in the row.
        ancestors (`tuple[tuple[int, int], ...]`):
            The spans (start, stop) of the row that come before them, from the root on; empty at a root.
    """

    start: int
    stop: int
    ancestors: tuple[tuple[int, int], ...]

    @property
    def num_ancestors(self) -> int:
        """Number of tokens before the segment."""
        return sum(stop - start for start, stop in self.ancestors)


@dataclass
class Layout:
    """
    R rows of L tokens, and how to find a sequence's tokens in them.

    A *position* is an index into the flattened rows (r·L + l).

    Args:
        input_ids, position_ids (`np.ndarray`):
            (R, L), padded on the right; positions count from the start of a sequence.
        attention_mask (`np.ndarray`):
            (R, L), `True` for tokens.
        segments (`tuple[Segment, ...]`, *optional*):
            Of a flattened trie, which is one row, its branches. `None`: plain causal rows.
        find (`Callable[[int, int, int], np.ndarray]`):
            Positions of a sequence's tokens `start` to `stop`; see [`positions`].
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    attention_mask: np.ndarray
    segments: tuple[Segment, ...] | None
    find: Callable[[int, int, int], np.ndarray]

    def positions(self, sequence: int, start: int, stop: int) -> np.ndarray:
        """Where the tokens `start` to `stop` of a sequence stand."""
        return self.find(sequence, start, stop)


def row_per_step(sequences: Sequence[Ids]) -> Layout:
    """A row for each sequence."""
    return _padded_rows(sequences, list(range(len(sequences))))


def chains(sequences: Sequence[Ids]) -> Layout:
    """A row for each sequence that does not continue the one before it."""
    rows: list[Ids] = []
    row_of_sequence: list[int] = []
    for ids in sequences:
        if rows and len(rows[-1]) <= len(ids) and np.array_equal(rows[-1], ids[: len(rows[-1])]):
            rows[-1] = ids
        else:
            rows.append(ids)
        row_of_sequence.append(len(rows) - 1)
    return _padded_rows(rows, row_of_sequence)


def _padded_rows(rows: Sequence[Ids], row_of_sequence: Sequence[int]) -> Layout:
    R, L = len(rows), max(map(len, rows))
    input_ids = np.zeros((R, L), dtype=np.int64)
    for row, ids in zip(input_ids, rows, strict=True):
        row[: len(ids)] = ids
    lengths = np.array([len(ids) for ids in rows])
    return Layout(
        input_ids,
        np.tile(np.arange(L), (R, 1)),
        np.arange(L) < lengths[:, None],
        None,
        lambda sequence, start, stop: np.arange(start, stop) + row_of_sequence[sequence] * L,
    )


def share_prefixes(sequences: Sequence[Ids]) -> Layout:
    """
    All sequences as one trie, flattened into one row without padding; or as [`chains`], where these cost less.

    Args:
        sequences (`Sequence[np.ndarray]`):
            Token ids, none empty. Any of them may begin with (a part of) another, or be equal to it.

    Returns:
        [`Layout`]: One row in which every distinct prefix stands once, or causal rows of hardly more tokens.
    """
    trie = Trie()
    for ids in sequences:
        trie.insert(ids)
    rows = chains(sequences)
    return rows if rows.input_ids.size <= _CHAINS_COST * trie.num_tokens else trie.flatten()


@dataclass(eq=False)  # nodes are themselves, not what they hold
class _Node:
    """Tokens without a branch between them, `depth` tokens below the root."""

    ids: Ids
    depth: int
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)  # by their first token
    place: int = 0  # in the row

    @property
    def end(self) -> int:
        return self.depth + len(self.ids)


class Trie:
    """
    Distinct prefixes of token sequences.

    Example:
    ```python
    >>> trie = Trie()
    >>> for ids in ([1, 2, 3], [1, 2, 4, 5], [1, 2, 3, 6]):
    ...     trie.insert(np.array(ids))
    >>> trie.num_tokens
    6
    ```
    """

    def __init__(self) -> None:
        self._root = _Node(np.zeros(0, dtype=np.int32), 0, None)
        self._ends: list[tuple[_Node, int]] = []  # of each sequence: a node at or below its last token, its length
        self.num_tokens = 0

    def insert(self, ids: Ids) -> None:
        """Add a sequence, which is numbered in the order of insertion."""
        node, matched = self._descend(ids)
        if matched < len(ids):
            if matched < node.end:
                node = self._split(node, matched)
            node = self._append(node, ids[matched:])
        self._ends.append((node, len(ids)))

    def num_shared(self, ids: Ids) -> int:
        """Number of tokens at the start of a sequence that are in the trie already."""
        return self._descend(ids)[1]

    def flatten(self) -> Layout:
        """One row, depth first: every token after its ancestors."""
        nodes = list(self._depth_first())
        place = 0
        for node in nodes:
            node.place = place
            place += len(node.ids)
        L = self.num_tokens
        return Layout(
            np.concatenate([node.ids for node in nodes]).astype(np.int64)[None],
            np.concatenate([np.arange(node.depth, node.end) for node in nodes])[None],
            np.ones((1, L), dtype=bool),
            tuple(self._segments(nodes)),
            self._find,
        )

    def _descend(self, ids: Ids) -> tuple[_Node, int]:
        """The node where a sequence leaves the trie, or ends, and how many of its tokens are in the trie."""
        node, matched = self._root, 0
        while matched < len(ids):
            child = node.children.get(int(ids[matched]))
            if child is None:
                break
            length = min(len(child.ids), len(ids) - matched)
            differs = child.ids[:length] != ids[matched : matched + length]
            node = child
            if differs.any():
                return node, matched + int(differs.argmax())
            matched += length
        return node, matched

    def _split(self, node: _Node, depth: int) -> _Node:
        """Cut a node in two; the new one is the upper. (The lower stays itself: sequences end at or above it.)"""
        assert node.parent is not None
        upper = _Node(node.ids[: depth - node.depth], node.depth, node.parent)
        node.parent.children[int(upper.ids[0])] = upper
        node.ids, node.depth, node.parent = node.ids[depth - node.depth :], depth, upper
        upper.children[int(node.ids[0])] = node
        return upper

    def _append(self, node: _Node, ids: Ids) -> _Node:
        self.num_tokens += len(ids)
        if not node.children and node is not self._root:  # a leaf grows
            node.ids = np.concatenate([node.ids, ids])
            return node
        child = _Node(ids, node.end, node)
        node.children[int(ids[0])] = child
        return child

    def _depth_first(self) -> Iterator[_Node]:
        """Parents before children; the child with the deepest leaf first, so that its segment is the longest."""
        bottom: dict[_Node, int] = {}
        order, stack = [], list(self._root.children.values())
        while stack:
            order.append(stack.pop())
            stack += order[-1].children.values()
        for node in reversed(order):
            bottom[node] = max((bottom[child] for child in node.children.values()), default=node.end)
        stack = list(reversed(self._root.children.values()))
        while stack:
            node = stack.pop()
            yield node
            stack += sorted(node.children.values(), key=lambda child: bottom[child])

    def _segments(self, nodes: Sequence[_Node]) -> Iterator[Segment]:
        """From each branch to a leaf; a first child continues its parent's segment."""
        start = 0
        for index, node in enumerate(nodes):
            stop = node.place + len(node.ids)
            if index + 1 < len(nodes) and nodes[index + 1].parent is node:
                continue
            top = node
            while top.place > start:
                assert top.parent is not None
                top = top.parent
            yield Segment(start, stop, _spans(top.parent))
            start = stop

    def _find(self, sequence: int, start: int, stop: int) -> np.ndarray:
        node: _Node | None
        node, length = self._ends[sequence]
        assert stop <= length
        parts = []
        while node is not None and node.end > start:
            low, high = max(start, node.depth), min(stop, node.end)
            if low < high:
                parts.append(np.arange(low, high) + (node.place - node.depth))
            node = node.parent
        return np.concatenate(parts[::-1]) if parts else np.zeros(0, dtype=np.int64)


def _spans(node: _Node | None) -> tuple[tuple[int, int], ...]:
    """Where a node and its ancestors stand, from the root on; neighbours as one."""
    spans: list[tuple[int, int]] = []
    while node is not None and node.parent is not None:
        start, stop = node.place, node.place + len(node.ids)
        if spans and spans[-1][0] == stop:
            spans[-1] = (start, spans[-1][1])
        else:
            spans.append((start, stop))
        node = node.parent
    return tuple(reversed(spans))
