"""Figures of several runs as one: their interquartile mean, and how sure it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from .methods import Method

CONFIDENCE = 0.95
NUM_RESAMPLES = 2_000
_MOST_POINTS = 120  # of a curve


@dataclass(frozen=True)
class Estimate:
    """The interquartile mean of some runs; `low` and `high` bound it where there are at least two."""

    center: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Curve:
    """
    A metric of a method over episodes. `low` and `high` are not numbers where fewer than two runs have a value.

    Args:
        episodes, center, low, high (`np.ndarray`):
            One entry a point.
        updates_per_point (`int`):
            How many logs were averaged into a point, so that there are not too many.
    """

    episodes: np.ndarray
    center: np.ndarray
    low: np.ndarray
    high: np.ndarray
    updates_per_point: int


def estimate(values: Sequence[float]) -> Estimate:
    """
    The interquartile mean, which for fewer than four values is the mean, with a bootstrap interval.

    Args:
        values (`Sequence[float]`):
            One of each run; at least one.
    """
    row = np.asarray(values, dtype=float)
    low, high = bootstrap_interval(interquartile_mean, row)
    low, high = (None if bound is None else float(bound) for bound in (low, high))
    return Estimate(float(interquartile_mean(row)), low, high)


def final_values(method: Method, metric: str, last: int) -> list[float]:
    """
    Of each run that has the metric: the mean of its last values, up to where all of these runs have come.

    Args:
        method ([`Method`]):
            Whose runs.
        metric (`str`):
            Its name.
        last (`int`):
            How many values; 0 means all.
    """
    series = [found for found in (run.series(metric) for run in method.runs) if found]
    end = min((max(found) for found in series), default=0)
    values = ([found[step] for step in sorted(found) if step <= end][-last:] for found in series)
    return [sum(of_run) / len(of_run) for of_run in values if of_run]


def curve(method: Method, metric: str) -> Curve | None:
    """A metric of a method's runs over the episodes played; `None` where no run has it."""
    series = [run.series(metric) for run in method.runs]
    steps = sorted({step for one in series for step in one})
    if not steps:
        return None
    width = -(-len(steps) // _MOST_POINTS)
    bins = [steps[start : start + width] for start in range(0, len(steps), width)]
    values = np.array([[_mean_of([one[s] for s in of_bin if s in one]) for one in series] for of_bin in bins])
    center, low, high = (np.full(len(bins), np.nan) for _ in range(3))
    known = ~np.isnan(values)  # runs may have ended early, or have logged a metric now and then
    for pattern in np.unique(known, axis=0):
        rows = (known == pattern).all(axis=1)
        chosen = values[np.ix_(rows, pattern)]
        center[rows] = interquartile_mean(chosen, axis=-1)
        if pattern.sum() >= 2:
            low[rows], high[rows] = bootstrap_interval(interquartile_mean, chosen)
    episodes = np.array([np.mean(of_bin) for of_bin in bins]) * method.runs[0].episodes_per_update
    return Curve(episodes, center, low, high, width)


def _mean_of(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def interquartile_mean(values: Any, axis: int = -1) -> Any:
    """The mean of the middle half: what lies in the lowest and the highest quarter is left out."""
    return stats.trim_mean(np.asarray(values, dtype=float), 0.25, axis=axis)


def bootstrap_interval(statistic: Callable[..., Any], *samples: Any) -> tuple[Any, Any]:
    """
    Percentile bootstrap over the last axis, the runs; the same at every call.

    Args:
        statistic (`Callable`):
            Of the samples and an `axis`.
        samples (`array`):
            (..., runs), each drawn anew by itself.

    Returns:
        `tuple`: Low and high, of the shape without the last axis; `None` where a sample is of one run, which says
        nothing about others.
    """
    arrays = [np.asarray(sample, dtype=float) for sample in samples]
    if min(array.shape[-1] for array in arrays) < 2:
        return None, None
    found = stats.bootstrap(
        arrays,
        statistic,
        axis=-1,
        confidence_level=CONFIDENCE,
        n_resamples=NUM_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return found.confidence_interval.low, found.confidence_interval.high
