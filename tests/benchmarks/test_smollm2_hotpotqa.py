"""What the small model's benchmark makes of its episodes."""

import pytest
import smollm2_hotpotqa as benchmark

from trl_steppo import Episode, Step, StopReason
from trl_steppo.types import TokenIds


def episode(question: int, share: float) -> Episode:
    step = Step(TokenIds([question, 300]), TokenIds([5]), (-0.1,), 0.0, 0, 0, 1.0, StopReason.STOP)
    return Episode("id", 0, 0, (step,), terminated=True, truncated=False, metrics={"rewards/valid_calls": share})


def test_only_questions_that_were_played_again_have_a_gain():
    played = [episode(1, 0.0), episode(2, 0.5), episode(1, 0.25), episode(1, 1.0), episode(3, 1.0), episode(2, 0.0)]
    assert benchmark.gains_of_questions(played) == [1.0, -0.5]


def test_an_interval_surrounds_the_difference_of_the_means():
    low, middle, high = benchmark.interval([1.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 0.0])
    assert middle == 0.5
    assert -1.0 <= low < middle < high <= 1.0


def test_values_that_are_all_the_same_have_no_width():
    assert benchmark.interval([0.5, 0.5, 0.5]) == pytest.approx([0.5, 0.5, 0.5])
