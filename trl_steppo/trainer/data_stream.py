"""The rows of a dataset as one endless stream, epoch after epoch, each in its own order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..errors import DataError


class RowStream:
    """
    Row number `position` of the stream is decided by `(seed, position)` alone, so a position is all that a checkpoint
    has to remember.

    Args:
        dataset (`Dataset` or `Sequence[dict]`):
            The rows.
        seed (`int`):
            Seed of the order of every epoch.

    Raises:
        DataError: If the dataset is empty or has no length.
    """

    def __init__(self, dataset: Any, *, seed: int) -> None:
        try:
            self.num_rows = len(dataset)
        except TypeError as error:
            raise DataError(
                "`train_dataset` has no length; rows are shuffled over the whole dataset, so pass a map-style one"
            ) from error
        if self.num_rows == 0:
            raise DataError("`train_dataset` has no rows")
        self._dataset = dataset
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    @property
    def example(self) -> Mapping[str, Any]:
        """Any row."""
        return self._dataset[0]

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        return self._dataset[self.row_number(position)]

    def row_number(self, position: int) -> int:
        """Which row of the dataset stands at a position of the stream."""
        epoch, index = divmod(position, self.num_rows)
        if epoch != self._epoch:
            # Far apart, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.num_rows, generator=generator).tolist()
            self._epoch = epoch
        return self._order[index]


def column_names(dataset: Any) -> Sequence[str]:
    """The columns of a dataset; of a list of rows those that any row has; of anything else those of the first row."""
    names = getattr(dataset, "column_names", None)
    if names is not None:
        return names
    rows = dataset if isinstance(dataset, list | tuple) else [dataset[0]]
    return list(dict.fromkeys(name for row in rows for name in row))
