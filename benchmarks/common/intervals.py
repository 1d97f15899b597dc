"""
How runs of different seeds are summed up, as Agarwal et al. recommend (arXiv 2108.13264).

Interquartile means, and 95 % intervals by the percentile bootstrap over seeds, stratified: each method's runs are
drawn again from that method's runs. Both are the report's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trl_steppo.report.statistics import NUM_RESAMPLES, bootstrap_interval, interquartile_mean

Interval = list[float | None]
"""[low, estimate, high]; low and high are `None` where one seed says nothing about others."""

WINDOW = 5  # updates that a sampled score is averaged over


def interval(values: Sequence[float]) -> Interval:
    """
    Args:
        values (`Sequence[float]`):
            One for each seed.

    Returns:
        `list[float | None]`: The interquartile mean between the ends of its interval.
    """
    return _bootstrapped(interquartile_mean, values)


def curve_interval(curves: Sequence[Sequence[float]]) -> list[Interval]:
    """`interval` at each update, of curves of equal length, one for each seed."""
    return [interval(values) for values in np.asarray(curves, dtype=float).T]


def probability_of_improvement(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """
    How likely a run of ours beats one of theirs, over all pairs of seeds; a tie counts half.

    Args:
        ours (`Sequence[float]`):
            One value for each seed.
        theirs (`Sequence[float]`):
            One value for each seed, not necessarily as many.
    """

    def share(some: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
        some, others = some[..., :, None], others[..., None, :]
        wins: np.ndarray = ((some > others) + 0.5 * (some == others)).mean((-2, -1))
        return wins

    return _bootstrapped(share, ours, theirs)


def smoothed(curve: Any) -> np.ndarray:
    """(..., updates): the mean of each update and the up to `WINDOW` − 1 before it."""
    curve = np.asarray(curve, dtype=float)
    sums = np.cumsum(curve, axis=-1)
    sums[..., WINDOW:] -= sums[..., :-WINDOW].copy()
    return sums / np.minimum(np.arange(1, curve.shape[-1] + 1), WINDOW)


def episodes_to_reach(curves: Any, episodes: Sequence[int], threshold: float) -> float:
    """
    How many episodes it takes the interquartile mean over seeds to reach a score.

    Args:
        curves (`array`):
            (seeds, updates), the sampled score of each update.
        episodes (`Sequence[int]`):
            Episodes played by the end of each update.
        threshold (`float`):
            The score, of which the mean of the last `WINDOW` updates is taken.

    Returns:
        `float`: Infinite if it is not reached.
    """
    reached = interquartile_mean(smoothed(curves), axis=0)[WINDOW - 1 :] >= threshold
    return float(episodes[WINDOW - 1 + int(reached.argmax())]) if reached.any() else np.inf


def final_sampled(curves: Any) -> np.ndarray:
    """(seeds,): the mean of the last `WINDOW` updates."""
    return smoothed(curves)[..., -1]


def episodes_ratio(ours: Any, theirs: Any, episodes: Sequence[int]) -> Interval:
    """
    The episodes that our method takes to reach their final score, over those that theirs takes.

    Args:
        ours (`array`):
            (seeds, updates), the sampled score of each update.
        theirs (`array`):
            (seeds, updates), not necessarily as many seeds.
        episodes (`Sequence[int]`):
            Episodes played by the end of each update.

    Returns:
        `list[float | None]`: As `interval`. `None` stands for a score that is not reached, too.
    """
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)

    def ratio(some: np.ndarray, others: np.ndarray) -> float:
        # Less a rounding error: the last update of theirs reaches it by definition.
        threshold = interquartile_mean(final_sampled(others)) - 1e-9
        return episodes_to_reach(some, episodes, threshold) / episodes_to_reach(others, episodes, threshold)

    estimate = ratio(ours, theirs)
    if min(len(ours), len(theirs)) < 2:
        return _finite([None, estimate, None])
    rng = np.random.default_rng(0)
    resampled = [
        ratio(*(runs[rng.integers(len(runs), size=len(runs))] for runs in (ours, theirs)))
        for _ in range(NUM_RESAMPLES)
    ]
    # Of the values themselves: between a number and infinity there is nothing to interpolate.
    low, high = np.quantile(resampled, [0.025, 0.975], method="nearest")
    return _finite([low, estimate, high])


def _bootstrapped(statistic: Callable[..., Any], *samples: Sequence[float]) -> Interval:
    arrays = [np.asarray(sample, dtype=float) for sample in samples]
    estimate = float(statistic(*arrays))
    if min(len(array) for array in arrays) < 2:
        return [None, estimate, None]
    if all((array == array[0]).all() for array in arrays):
        return [estimate, estimate, estimate]
    low, high = bootstrap_interval(statistic, *arrays)
    return [float(low), estimate, float(high)]


def _finite(bounds: Sequence[float | None]) -> Interval:
    return [float(bound) if bound is not None and np.isfinite(bound) else None for bound in bounds]
