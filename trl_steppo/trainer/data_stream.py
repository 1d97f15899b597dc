"""The rows of a dataset as one endless stream, epoch after epoch, each in its own order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset

from ..errors import DataError


class RowStream:
    """
    The rows of a dataset, in the order in which they are played. Where the dataset is stored as Arrow tables, the
    nulls that its storage put into messages and tool schemas are taken out ([`without_filled_nulls`]).

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
        return row_of(self._dataset, 0)

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        return row_of(self._dataset, self.row_number(position))

    def row_number(self, position: int) -> int:
        """Which row of the dataset stands at a position of the stream."""
        epoch, index = divmod(position, self.num_rows)
        if epoch != self._epoch:
            # Far apart, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.num_rows, generator=generator).tolist()
            self._epoch = epoch
        return self._order[index]


def row_of(dataset: Any, number: int) -> Mapping[str, Any]:
    """A row of a dataset, as it was before Arrow stored it ([`without_filled_nulls`])."""
    row = dataset[number]
    if not isinstance(dataset, Dataset):
        return row  # its nulls were written by somebody
    return {name: without_filled_nulls(value, is_shown=name == "tools") for name, value in row.items()}


def without_filled_nulls(value: Any, *, is_shown: bool = False) -> Any:
    """
    A value of a row without the nulls that Arrow fills in. Arrow stores all objects of a column with the same keys, so
    that a tool call `{"where": "x"}` beside a call `{"n": 1}` comes back as `{"where": "x", "n": null}`.

    A key without a value is left out of what a chat template shows, however deep it lies in there: messages, which
    have `role` and `content`, with the tool calls in them; schemas, which have `function` or `properties`; and the
    column `tools`. A message's `content` stays, and so do items of lists and all other objects. An argument that is
    null on purpose is left out, too: write the arguments as a JSON string to keep it.

    Args:
        value (`Any`):
            The value of a column.
        is_shown (`bool`, *optional*, defaults to `False`):
            Whether all of it is shown by a template.
    """
    if isinstance(value, list):
        return [without_filled_nulls(item, is_shown=is_shown) for item in value]
    if not isinstance(value, dict):
        return value
    is_message = {"role", "content"} <= value.keys()
    is_shown = is_shown or is_message or not value.keys().isdisjoint({"function", "properties"})
    return {
        key: without_filled_nulls(item, is_shown=is_shown)
        for key, item in value.items()
        if item is not None or not is_shown or (is_message and key == "content")
    }


def column_names(dataset: Any) -> Sequence[str]:
    """The columns of a dataset; of a list of rows those that any row has; of anything else those of the first row."""
    names = getattr(dataset, "column_names", None)
    if names is not None:
        return names
    rows = dataset if isinstance(dataset, list | tuple) else [dataset[0]]
    return list(dict.fromkeys(name for row in rows for name in row))
