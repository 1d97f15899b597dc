"""What the vocabulary computes of its own."""

from __future__ import annotations

import pytest

from trl_steppo.types import Episode, Step, StopReason, TokenIds, num_shared


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ([], [], 0),
        ([], [1], 0),
        ([1, 2, 3], [1, 2, 3], 3),
        ([1, 2], [1, 2, 3], 2),
        ([1, 2, 3], [1, 2], 2),
        ([1, 2, 3], [1, 5, 3], 1),
        ([5, 2], [1, 2], 0),
        (TokenIds([1, 2, 3]), [1, 2, 4], 2),
        ([1, 2, 3], TokenIds([1, 2]), 2),
        ("abc", "abd", 2),
    ],
)
def test_how_many_elements_sequences_share(first, second, expected):
    assert num_shared(first, second) == expected


def test_a_reward_is_added_to_that_of_the_last_step():
    def step(index: int, reward: float) -> Step:
        return Step([1], [2], [0.0], reward, index, 0, 1.0, StopReason.STOP)  # type: ignore[arg-type]

    episode = Episode("0/0", 0, 0, (step(0, 1.0), step(1, 2.0)), terminated=True, truncated=False)
    assert [s.reward for s in episode.paid(0.5).steps] == [1.0, 2.5]
    assert episode.paid(0.0) == episode
