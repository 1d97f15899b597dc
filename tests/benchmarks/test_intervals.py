"""How seeds are summed up: values derived by hand, and what intervals must do."""

import math
from itertools import product

import numpy as np
import pytest
from common.intervals import (
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


def jump(update: int) -> list[float]:
    """A curve of eight updates that is 0, and 1 from one of them on."""
    return [0.0] * (update - 1) + [1.0] * (9 - update)


def test_eight_unequal_curves_reach_a_score_by_their_middle_half():
    curves = [[level] * 8 for level in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 9.0)]
    assert episodes_to_reach(curves, EPISODES, 0.34) == 50  # (0.2 + 0.3 + 0.4 + 0.5) / 4 = 0.35; the mean is 1.39
    assert episodes_to_reach(curves, EPISODES, 0.36) == math.inf


def test_the_ratio_of_eight_unequal_curves():
    """
    Of a curve that jumps at update s, the mean of updates u - 4 to u is (u - s + 1) / 5, between 0 and 1.

    Theirs end with 0.2 0.2 0.4 0.4 0.6 0.6 0.8 1, of whose middle half the mean is 0.5; one update before it was 0.3:
    they reach it with 80 episodes. Ours have 0 0.2 0.2 0.4 0.4 0.6 0.6 0.8 after update 5, in the middle 0.4, and
    0 0.4 0.4 0.6 0.6 0.8 0.8 1 after update 6, in the middle 0.6: they reach it with 60.
    """
    ours = [jump(update) for update in (2, 3, 3, 4, 4, 5, 5, 8)]
    theirs = [jump(update) for update in (4, 5, 6, 6, 7, 7, 8, 8)]
    low, estimate, high = episodes_ratio(ours, theirs, EPISODES)
    assert estimate == pytest.approx(60 / 80)
    assert 50 / 80 <= low < estimate < high <= 80 / 70


def test_the_interval_of_a_ratio_is_that_of_all_draws():
    """Of two seeds each there are 16 draws, with replacement; each is likelier than 2.5 %, so the ends are theirs."""
    ours, theirs = [jump(4), jump(6)], [jump(6), jump(7)]
    ratios = []
    for mine in product(ours, repeat=2):
        for yours in product(theirs, repeat=2):
            threshold = np.mean([final_sampled(curve) for curve in yours]) - 1e-9
            both = (episodes_to_reach(curves, EPISODES, threshold) for curves in (mine, yours))
            ratios.append(next(both) / next(both))
    low, _, high = episodes_ratio(ours, theirs, EPISODES)
    assert sum(ratio == min(ratios) for ratio in ratios) < 4 > sum(ratio == max(ratios) for ratio in ratios)
    assert (low, high) == pytest.approx((min(ratios), max(ratios)))


def test_a_score_that_is_not_reached_has_no_ratio():
    low, estimate, high = episodes_ratio([[0.0] * 8] * 2, [[0.0] * 7 + [1.0]] * 2, EPISODES)
    assert (low, estimate, high) == (None, None, None)


def test_a_curve_has_an_interval_at_each_update():
    curves = [[0.1, 0.2], [0.3, 0.2], [0.2, 0.5]]
    assert curve_interval(curves) == [interval([0.1, 0.3, 0.2]), interval([0.2, 0.2, 0.5])]
