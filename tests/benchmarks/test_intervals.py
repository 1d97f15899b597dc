"""How seeds are summed up: values derived by hand, and what intervals must do."""

import math

import numpy as np
import pytest
from _intervals import (
    curve_interval,
    episodes_ratio,
    episodes_to_reach,
    final_sampled,
    interquartile_mean,
    interval,
    probability_of_improvement,
    smoothed,
)

EPISODES = [10, 20, 30, 40, 50, 60, 70, 80]


def test_the_interquartile_mean_leaves_out_the_lowest_and_the_highest_quarter():
    assert interquartile_mean([100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -100.0]) == pytest.approx(3.5)
    assert interquartile_mean([1.0, 2.0, 6.0]) == pytest.approx(3.0)  # of three there is no quarter to leave out


def test_an_interval_contains_its_estimate_and_stays_where_the_data_are():
    values = [0.2, 0.5, 0.4, 0.9, 0.3, 0.6, 0.55, 0.45]
    low, estimate, high = interval(values)
    assert min(values) <= low < estimate < high <= max(values)
    assert estimate == pytest.approx((0.4 + 0.45 + 0.5 + 0.55) / 4)
    assert interval(values) == [low, estimate, high]


def test_the_interval_of_many_is_as_wide_as_theory_says():
    low, estimate, high = interval(np.random.default_rng(1).uniform(size=400))
    # n times its variance, for a uniform variable: 4 * (0.5**3 / 12, the middle, + 2 * 0.25 * 0.25**2, the ends) = 1/6
    expected = 1.96 * math.sqrt(1 / 6 / 400)
    assert (high - low) / 2 == pytest.approx(expected, rel=0.15)
    assert low < estimate < high


def test_one_seed_says_nothing_about_others():
    assert interval([0.5]) == [None, 0.5, None]
    assert probability_of_improvement([0.5], [0.4, 0.6]) == [None, 0.5, None]


def test_equal_seeds_have_an_interval_of_no_width():
    assert interval([0.5, 0.5, 0.5]) == [0.5, 0.5, 0.5]


def test_the_probability_of_improvement_counts_pairs():
    assert probability_of_improvement([1.0, 2.0], [0.0, 2.0])[1] == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert probability_of_improvement([3.0, 4.0, 5.0], [0.0, 1.0]) == [1.0, 1.0, 1.0]
    low, estimate, high = probability_of_improvement([0.1, 0.4, 0.5, 0.9], [0.2, 0.3, 0.6])
    assert 0 <= low < estimate < high <= 1


def test_smoothing_averages_the_last_five_updates():
    assert smoothed([1.0, 2, 3, 4, 5, 6, 7]).tolist() == pytest.approx([1, 1.5, 2, 2.5, 3, 4, 5])
    assert final_sampled([[0.0, 0, 1, 1, 1, 1, 1], [9.0, 9, 0, 0, 0, 0, 5]]).tolist() == pytest.approx([1, 1])


def test_episodes_to_reach_a_score():
    curve = [0.0, 0, 0, 0, 1, 1, 1, 1]
    assert episodes_to_reach([curve], EPISODES, 0.2) == 50
    assert episodes_to_reach([curve], EPISODES, 0.75) == 80
    assert episodes_to_reach([curve], EPISODES, 0.9) == math.inf
    assert episodes_to_reach([[1.0] * 8], EPISODES, 0.9) == 50  # not before five updates have been averaged


def test_the_mean_over_seeds_has_to_reach_it():
    assert episodes_to_reach([[1.0] * 8, [0.0] * 8], EPISODES, 0.6) == math.inf
    assert episodes_to_reach([[1.0] * 8, [0.0] * 8], EPISODES, 0.5) == 50


def test_the_ratio_of_equal_curves_is_one():
    curves = [[0.0, 0, 0, 0, 0, 0, 0, 1]] * 3
    assert episodes_ratio(curves, curves, EPISODES) == [1.0, 1.0, 1.0]


def test_a_faster_method_has_a_smaller_ratio():
    slow = [[0.0, 0, 0, 0, 0, 0, 0, 1], [0.0, 0, 0, 0, 0, 0, 0.5, 1]]
    fast = [[0.0, 0, 0, 0, 1, 1, 1, 1], [0.0, 0, 0, 1, 1, 1, 1, 1]]
    low, estimate, high = episodes_ratio(fast, slow, EPISODES)
    assert estimate == pytest.approx(50 / 80)
    assert low <= estimate <= high < 1


def test_a_score_that_is_not_reached_has_no_ratio():
    low, estimate, high = episodes_ratio([[0.0] * 8] * 2, [[0.0] * 7 + [1.0]] * 2, EPISODES)
    assert (low, estimate, high) == (None, None, None)


def test_a_curve_has_an_interval_at_each_update():
    curves = [[0.1, 0.2], [0.3, 0.2], [0.2, 0.5]]
    assert curve_interval(curves) == [interval([0.1, 0.3, 0.2]), interval([0.2, 0.2, 0.5])]
