"""Which tokens stand where, drawn by hand and on random forests."""

from __future__ import annotations

import random

import numpy as np
import pytest

from trl_steppo.batching import Layout, Trie, chains, row_per_step, share_prefixes


def arrays(*sequences: list[int]) -> list[np.ndarray]:
    return [np.array(ids, dtype=np.int32) for ids in sequences]


def random_forest(seed: int, *, vocabulary: int = 3) -> list[np.ndarray]:
    """Sequences that begin as others do: continued, cut at any token, repeated, or unrelated."""
    rng = random.Random(seed)
    sequences: list[list[int]] = []
    for _ in range(rng.randint(1, 12)):
        start: list[int] = []
        if sequences and rng.random() < 0.8:
            other = rng.choice(sequences)
            start = other[: rng.randint(0, len(other))]
        sequences.append(start + [rng.randrange(vocabulary) for _ in range(rng.randint(0 if start else 1, 5))])
    return arrays(*sequences)


def flattened(sequences: list[np.ndarray]) -> Layout:
    trie = Trie()
    for ids in sequences:
        trie.insert(ids)
    return trie.flatten()


# name: (sequences, rows of `chains`, row of `share_prefixes`, its runs as (start, stop, ancestors))
CASES = {
    "append-only": (
        arrays([1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]),
        [[1, 2, 3, 4, 5, 6]],
        ([1, 2, 3, 4, 5, 6], [(0, 6, ())]),
    ),
    "branches": (
        # 1 2 3 4
        #  \ 5 6
        arrays([1, 2, 3, 4], [1, 5, 6]),
        [[1, 2, 3, 4], [1, 5, 6]],
        ([1, 2, 3, 4, 5, 6], [(0, 4, ()), (4, 6, ((0, 1),))]),
    ),
    "the longest branch comes first": (
        arrays([1, 5, 6], [1, 2, 3, 4]),
        [[1, 5, 6], [1, 2, 3, 4]],
        ([1, 2, 3, 4, 5, 6], [(0, 4, ()), (4, 6, ((0, 1),))]),
    ),
    "a branch of a branch": (
        # 1 2 3 4 5
        #  \ 6 7 8
        #     \ 9
        arrays([1, 2, 3, 4, 5], [1, 6, 7, 8], [1, 6, 9]),
        [[1, 2, 3, 4, 5], [1, 6, 7, 8], [1, 6, 9]],
        ([1, 2, 3, 4, 5, 6, 7, 8, 9], [(0, 5, ()), (5, 8, ((0, 1),)), (8, 9, ((0, 1), (5, 6)))]),
    ),
    "two trees": (arrays([1], [2, 3]), [[1], [2, 3]], ([1, 2, 3], [(0, 1, ()), (1, 3, ())])),
    "the same twice": (arrays([1, 2], [1, 2]), [[1, 2]], ([1, 2], [(0, 2, ())])),
    "a part of another": (arrays([1, 2, 3], [1, 2]), [[1, 2, 3], [1, 2]], ([1, 2, 3], [(0, 3, ())])),
}


@pytest.mark.parametrize("name", CASES)
def test_by_hand(name):
    sequences, expected_chains, (expected_row, expected_runs) = CASES[name]
    rows = chains(sequences)
    found = [row[mask].tolist() for row, mask in zip(rows.input_ids, rows.attention_mask, strict=True)]
    assert found == expected_chains
    layout = flattened(sequences)
    assert layout.input_ids.tolist() == [expected_row]
    assert [(run.start, run.stop, run.ancestors) for run in layout.segments or ()] == expected_runs


def assert_finds_every_token(layout: Layout, sequences: list[np.ndarray]) -> None:
    flat_ids, flat_depths = layout.input_ids.flatten(), layout.position_ids.flatten()
    for number, ids in enumerate(sequences):
        positions = layout.positions(number, 0, len(ids))
        assert flat_ids[positions].tolist() == ids.tolist()
        assert flat_depths[positions].tolist() == list(range(len(ids)))
        assert layout.attention_mask.flatten()[positions].all()
        for start in range(len(ids)):
            assert layout.positions(number, start, len(ids)).tolist() == positions[start:].tolist()


@pytest.mark.parametrize("lay_out", [row_per_step, chains, share_prefixes])
def test_every_token_is_found(lay_out):
    for seed in range(200):
        sequences = random_forest(seed)
        assert_finds_every_token(lay_out(sequences), sequences)


@pytest.mark.parametrize("lay_out", [row_per_step, chains])
def test_causal_rows_hold_each_sequence_from_the_row_s_start(lay_out):
    for seed in range(200):
        sequences = random_forest(seed)
        layout = lay_out(sequences)
        assert layout.segments is None
        assert (layout.input_ids[~layout.attention_mask] == 0).all()
        for number, ids in enumerate(sequences):
            positions = layout.positions(number, 0, len(ids))
            assert positions[0] % layout.input_ids.shape[1] == 0
            assert (np.diff(positions) == 1).all()


def test_a_trie_holds_every_prefix_once_behind_its_ancestors():
    for seed in range(500):
        sequences = random_forest(seed)
        layout = flattened(sequences)
        prefixes = {tuple(ids[:stop].tolist()) for ids in sequences for stop in range(1, len(ids) + 1)}
        assert layout.input_ids.shape == (1, len(prefixes))
        assert layout.attention_mask.all()
        seen: dict[int, list[int]] = {}  # token: what it attends to
        for run in layout.segments or ():
            before = [i for start, stop in run.ancestors for i in range(start, stop)]
            assert run.num_ancestors == len(before)
            seen |= {i: [*before, *range(run.start, i + 1)] for i in range(run.start, run.stop)}
        assert sorted(seen) == list(range(len(prefixes)))
        for number, ids in enumerate(sequences):
            positions = layout.positions(number, 0, len(ids)).tolist()
            assert seen[positions[-1]] == positions


def test_num_shared_is_the_longest_common_prefix():
    for seed in range(200):
        *sequences, last = random_forest(seed)
        trie = Trie()
        for ids in sequences:
            trie.insert(ids)
        shared = max(
            (n for ids in sequences for n in range(len(last) + 1) if ids[:n].tolist() == last[:n].tolist()), default=0
        )
        assert trie.num_shared(last) == shared
        before = trie.num_tokens
        trie.insert(last)
        assert trie.num_tokens - before == len(last) - shared


def test_the_cheaper_layout_is_chosen():
    def ids(count: int, first: int) -> np.ndarray:
        return np.arange(first, first + count, dtype=np.int32)

    alone = [ids(50, 100), ids(50, 200)]  # nothing is shared, nothing is padded
    assert share_prefixes(alone).segments is None
    assert share_prefixes([ids(50, 100), ids(49, 200)]).segments is None, "one token of padding"
    assert share_prefixes([ids(50, 100), ids(30, 200)]).segments is not None, "much padding"
    assert share_prefixes([ids(50, 100), np.append(ids(10, 100), ids(40, 200))]).segments is not None, (
        "a shared prefix"
    )
    assert share_prefixes([ids(20, 100), ids(50, 100)]).segments is None, "an episode that only grew"
