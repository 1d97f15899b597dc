"""Mini-batches are a seeded split; micro-batches hold every episode once, within their bounds."""

from __future__ import annotations

import random

import pytest

from trl_steppo.batching import micro_batches, mini_batches


@pytest.mark.parametrize(("num_episodes", "parts"), [(12, 1), (12, 4), (13, 4), (3, 5), (0, 2), (1, 1)])
def test_mini_batches_split_all_episodes_evenly(num_episodes, parts):
    batches = mini_batches(num_episodes, parts, seed=3)
    sizes = [len(batch) for batch in batches]
    assert len(batches) == parts
    assert sorted(index for batch in batches for index in batch) == list(range(num_episodes))
    assert max(sizes) - min(sizes) <= 1


def test_mini_batches_depend_on_the_seed_alone():
    assert mini_batches(50, 4, seed=1) == mini_batches(50, 4, seed=1)
    assert mini_batches(50, 4, seed=1) != mini_batches(50, 4, seed=2)


def test_mini_batches_are_shuffled():
    """Over many seeds every episode falls into every part equally often."""
    counts = [0] * 8
    for seed in range(800):
        for index in mini_batches(8, 4, seed=seed)[0]:
            counts[index] += 1
    assert all(abs(count - 200) < 5 * (800 * 0.25 * 0.75) ** 0.5 for count in counts)


@pytest.mark.parametrize(
    ("max_episodes", "max_tokens", "expected"),
    [
        # tokens:           10   20   30   40   100   of the episodes 3, 1, 4, 0, 2
        (2, None, [[3, 1], [4, 0], [2]]),
        (5, None, [[3, 1, 4, 0, 2]]),
        (1, None, [[3], [1], [4], [0], [2]]),
        (1, 90, [[3, 1, 4], [0], [2]]),  # three of 30; 100 alone, though it exceeds the bound
        (1, 89, [[3, 1], [4, 0], [2]]),
        (1, 500, [[3, 1, 4, 0, 2]]),
    ],
)
def test_micro_batches_by_hand(max_episodes, max_tokens, expected):
    num_tokens = [40, 20, 100, 10, 30]
    assert micro_batches(range(5), num_tokens, max_episodes=max_episodes, max_tokens=max_tokens) == expected


@pytest.mark.parametrize("max_tokens", [None, 50, 200])
def test_micro_batches_cover_within_bounds(max_tokens):
    rng = random.Random(0)
    for _ in range(50):
        num_tokens = [rng.randint(1, 120) for _ in range(rng.randint(1, 30))]
        chosen = rng.sample(range(len(num_tokens)), rng.randint(0, len(num_tokens)))
        groups = micro_batches(chosen, num_tokens, max_episodes=4, max_tokens=max_tokens)
        assert sorted(index for group in groups for index in group) == sorted(chosen)
        assert all(groups)
        for group in groups:
            if max_tokens is None:
                assert len(group) <= 4
            else:
                assert len(group) == 1 or len(group) * max(num_tokens[index] for index in group) <= max_tokens
        shuffled = rng.sample(chosen, len(chosen))
        assert micro_batches(shuffled, num_tokens, max_episodes=4, max_tokens=max_tokens) == groups
