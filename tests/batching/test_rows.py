"""Which steps share a row, drawn by hand and on random episodes."""

from __future__ import annotations

import pytest

from trl_steppo.batching import num_row_tokens, row_per_step, share_prefixes
from trl_steppo.types import Episode, Step, StopReason


def make_steps(*pairs: tuple[list[int], list[int]]) -> list[Step]:
    return [
        Step(prompt, response, [-1.0] * len(response), 0.0, index, 0, 1.0, StopReason.STOP)
        for index, (prompt, response) in enumerate(pairs)
    ]


CASES = {
    "append-only": (
        [([1, 2], [3]), ([1, 2, 3, 4], [5, 6]), ([1, 2, 3, 4, 5, 6, 7], [8])],
        # 1 2 [3] 4 [5 6] 7 [8]
        [([1, 2, 3, 4, 5, 6, 7, 8], [(0, 2), (1, 4), (2, 7)])],
    ),
    "an empty observation": ([([1], [2]), ([1, 2], [3])], [([1, 2, 3], [(0, 1), (1, 2)])]),
    "rewritten in the middle": (
        [([1, 2], [3]), ([1, 9], [5]), ([1, 9, 5, 6], [7])],
        # 1 2 [3]   1 9 [5] 6 [7]
        [([1, 2, 3], [(0, 2)]), ([1, 9, 5, 6, 7], [(1, 2), (2, 4)])],
    ),
    "the response was cut from the prompt": (
        [([1, 2], [3, 4]), ([1, 2, 3], [5])],
        [([1, 2, 3, 4], [(0, 2)]), ([1, 2, 3, 5], [(1, 3)])],
    ),
    "the same prompt twice": ([([1, 2], [3]), ([1, 2], [3])], [([1, 2, 3], [(0, 2)]), ([1, 2, 3], [(1, 2)])]),
    "continues a row before the last": (
        [([1], [2]), ([5], [6]), ([1, 2, 3], [4])],
        [([1, 2], [(0, 1)]), ([5, 6], [(1, 1)]), ([1, 2, 3, 4], [(2, 3)])],
    ),
    "no step": ([], []),
}


@pytest.mark.parametrize("name", CASES)
def test_share_prefixes(name):
    pairs, expected = CASES[name]
    rows = share_prefixes(make_steps(*pairs))
    assert [(row.ids.tolist(), row.steps) for row in rows] == expected


def test_row_per_step():
    rows = row_per_step(make_steps(([1, 2], [3]), ([1, 2, 3, 4], [5, 6])))
    assert [(row.ids.tolist(), row.steps) for row in rows] == [([1, 2, 3], [(0, 2)]), ([1, 2, 3, 4, 5, 6], [(1, 4)])]


@pytest.mark.parametrize("rewritten", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("layout", [share_prefixes, row_per_step])
def test_every_step_stands_behind_its_own_prompt(random_episode, layout, rewritten):
    for seed in range(50):
        steps = random_episode(seed, rewritten=rewritten).steps
        rows = layout(steps)
        placed = [(position, row, start) for row in rows for position, start in row.steps]
        assert [position for position, _, _ in placed] == list(range(len(steps)))
        for position, row, start in placed:
            step = steps[position]
            assert row.ids[:start] == step.prompt_ids
            assert row.ids[start : start + len(step.response_ids)] == step.response_ids


def test_an_append_only_episode_is_one_row(random_episode):
    for seed in range(50):
        episode = random_episode(seed)
        last = episode.steps[-1]
        assert len(share_prefixes(episode.steps)) == 1
        assert num_row_tokens(episode, prefix_sharing=True) == len(last.prompt_ids) + len(last.response_ids)


def test_num_row_tokens():
    steps = make_steps(([1, 2], [3]), ([1, 2, 3, 4], [5, 6]), ([9], [8]))
    episode = Episode("e", 0, 0, tuple(steps), terminated=True, truncated=False)
    assert num_row_tokens(episode, prefix_sharing=True) == 6 + 2
    assert num_row_tokens(episode, prefix_sharing=False) == 3 + 6 + 2
