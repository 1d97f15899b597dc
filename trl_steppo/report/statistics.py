"""Figures of several runs as one: their interquartile mean, and how sure it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .methods import Method
from .runs import Run

CONFIDENCE = 0.95
_NUM_RESAMPLES = 1_000
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
    row = np.asarray(values, dtype=float)[None]
    low, high = _interval(row)
    center = float(_interquartile_mean(row, axis=-1)[0])
    if row.shape[1] < 2:
        return Estimate(center, None, None)
    return Estimate(center, float(low[0]), float(high[0]))


def estimate_of_runs(method: Method, figure: Callable[[Run], float | None]) -> Estimate | None:
    """A figure of each run that has it, as one; `None` where none has it."""
    found = [value for value in map(figure, method.runs) if value is not None]
    return estimate(found) if found else None


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
        center[rows] = _interquartile_mean(chosen, axis=-1)
        if pattern.sum() >= 2:
            low[rows], high[rows] = _interval(chosen)
    episodes = np.array([np.mean(of_bin) for of_bin in bins]) * method.runs[0].episodes_per_update
    return Curve(episodes, center, low, high, width)


def _mean_of(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _interquartile_mean(values: np.ndarray, axis: int) -> np.ndarray:
    return stats.trim_mean(values, 0.25, axis=axis)


def _interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap over the last axis, the runs; the same at every call."""
    if values.shape[-1] < 2:
        nothing = np.full(values.shape[:-1], np.nan)
        return nothing, nothing
    found = stats.bootstrap(
        (values,),
        _interquartile_mean,
        axis=-1,
        confidence_level=CONFIDENCE,
        n_resamples=_NUM_RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return found.confidence_interval.low, found.confidence_interval.high
