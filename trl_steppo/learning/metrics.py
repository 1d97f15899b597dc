"""Metrics of an update: means over micro-batches, episodes and ranks, and times."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .ranks import gather_objects


class Means:
    """Weighted means by name. `add` any number of times on any rank, then read all of them with `reduced`."""

    def __init__(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, float] = defaultdict(float)

    def add(self, name: str, total: float | torch.Tensor, count: float | torch.Tensor = 1.0) -> None:
        """Add a sum over `count` elements."""
        self._sums[name] += float(total)
        self._counts[name] += float(count)

    def merge(self, other: Means) -> None:
        """Add all sums and counts of `other`."""
        for name, total in other._sums.items():
            self.add(name, total, other._counts[name])

    def reduced(self) -> dict[str, float]:
        """The means over all ranks, without names that have no element. Collective: every rank must call this."""
        sums: defaultdict[str, float] = defaultdict(float)
        counts: defaultdict[str, float] = defaultdict(float)
        for rank_sums, rank_counts in gather_objects([(dict(self._sums), dict(self._counts))]):
            for name, total in rank_sums.items():
                sums[name] += total
                counts[name] += rank_counts[name]
        return {name: sums[name] / counts[name] for name in sums if counts[name]}


class Clock:
    """Seconds spent, by name."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Add the time that the block takes."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
