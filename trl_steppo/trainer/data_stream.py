"""The rows of a run as one endless stream, whatever they come from."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol

import torch
from datasets import Dataset, IterableDataset

from ..errors import DataError
from ..learning.ranks import gather_objects

_FIRST_ROWS = 16  # which tell the order of a stream from another


class Rows(Protocol):
    """
    The rows of a run, in the order in which they are played. A position in this order is all that a checkpoint has to
    remember. Where rows are stored as Arrow tables, the nulls that their storage put into messages and tool schemas
    are taken out ([`without_filled_nulls`]).
    """

    seed: int

    @property
    def num_rows(self) -> int | None:
        """Rows of an epoch; `None`: not known."""
        ...

    @property
    def columns(self) -> Sequence[str]:
        """What the rows have."""
        ...

    @property
    def order(self) -> str | None:
        """A checksum of the first rows, where the dataset has an order of its own; `None`: the seed decides."""
        ...

    @property
    def example(self) -> Mapping[str, Any]:
        """The first row."""
        ...

    def __getitem__(self, position: int) -> Mapping[str, Any]: ...

    def row_number(self, position: int) -> int | None:
        """Which row of the dataset stands at a position; `None`: not known."""
        ...


def make_rows(dataset: Any, *, seed: int) -> Rows:
    """
    The rows of what a trainer is given as `train_dataset`.

    Args:
        dataset (`Dataset`, `Sequence[dict]`, [`~datasets.IterableDataset`] or `None`):
            What the user passed.
        seed (`int`):
            Seed of the order of every epoch, where the dataset has no order of its own.

    Raises:
        DataError: If the dataset is empty.
    """
    if dataset is None:
        return EmptyRows(seed)
    return StreamedRows(dataset, seed=seed) if isinstance(dataset, IterableDataset) else RowStream(dataset, seed=seed)


class RowStream:
    """
    The rows of a dataset with a length: epoch after epoch, each in its own order, which `(seed, position)` decides.

    Args:
        dataset (`Dataset` or `Sequence[dict]`):
            The rows.
        seed (`int`):
            Seed of the order of every epoch.

    Raises:
        DataError: If the dataset is empty.
    """

    num_rows: int
    order = None

    def __init__(self, dataset: Any, *, seed: int) -> None:
        self.num_rows = len(dataset)
        if self.num_rows == 0:
            raise no_rows("train_dataset")
        self._dataset = dataset
        self.seed = seed
        self._epoch = -1
        self._order: list[int] = []

    @property
    def columns(self) -> Sequence[str]:
        return column_names(self._dataset)

    @property
    def example(self) -> Mapping[str, Any]:
        return row_of(self._dataset, 0)

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        return row_of(self._dataset, self.row_number(position))

    def row_number(self, position: int) -> int:
        epoch, index = divmod(position, self.num_rows)
        if epoch != self._epoch:
            # Far apart, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(self.num_rows, generator=generator).tolist()
            self._epoch = epoch
        return self._order[index]


class StreamedRows:
    """
    The rows of a streamed dataset, in its own order: that of its shuffle buffer where it has one, which `set_epoch`
    changes from epoch to epoch. To get to a position, all rows before it are read, but for the first few, which are
    kept.

    Args:
        dataset ([`~datasets.IterableDataset`]):
            The rows. It gives the same ones whenever it is read again.
        seed (`int`):
            The run's; the order does not depend on it.
    """

    num_rows = None

    def __init__(self, dataset: IterableDataset, *, seed: int) -> None:
        self._dataset = dataset
        self.seed = seed
        self._first: list[Mapping[str, Any]] = []
        self._begin()

    @property
    def columns(self) -> Sequence[str]:
        return self._dataset.column_names or list(self.example)

    @property
    def order(self) -> str:
        return checksum(self[position] for position in range(_FIRST_ROWS))

    @property
    def example(self) -> Mapping[str, Any]:
        return self[0]

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        if position < len(self._first):
            return self._first[position]
        if position < self._position:
            self._begin()
        while self._position < position:
            self._read()
        return self._row

    def row_number(self, position: int) -> int | None:
        return None

    def _begin(self) -> None:
        self._position, self._epoch = -1, -1
        self._rows: Iterator[Any] = iter(())
        self._row: Mapping[str, Any] = {}

    def _read(self) -> None:
        row = next(self._rows, None)
        if row is None:
            self._epoch += 1
            self._dataset.set_epoch(self._epoch)
            self._rows = iter(self._dataset)
            row = next(self._rows, None)
            if row is None:
                raise no_rows("train_dataset")
        self._position += 1
        self._row = _as_written(self._dataset, row)
        if self._position == len(self._first) < _FIRST_ROWS:
            self._first.append(self._row)


class EmptyRows:
    """
    Endless rows that ask nothing, for environments whose `reset` gives the prompt: those that `GRPOTrainer` makes up
    where it has no dataset.
    """

    num_rows = None
    columns: Sequence[str] = ("prompt",)
    order = None

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @property
    def example(self) -> Mapping[str, Any]:
        return self[0]

    def __getitem__(self, position: int) -> Mapping[str, Any]:
        return {"prompt": [{"role": "user", "content": ""}]}

    def row_number(self, position: int) -> int | None:
        return None


def numbered_rows(dataset: Any, *, first: int = 0, every: int = 1) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """
    Rows of a dataset with their indices, in its own order.

    Args:
        dataset (`Dataset`, `Sequence[dict]` or [`~datasets.IterableDataset`]):
            The rows.
        first (`int`, *optional*, defaults to `0`), every (`int`, *optional*, defaults to `1`):
            Which rows: as of `range(first, len(dataset), every)`.
    """
    if isinstance(dataset, IterableDataset):
        for index, row in enumerate(dataset):
            if index >= first and (index - first) % every == 0:
                yield index, _as_written(dataset, row)
    else:
        for index in range(first, len(dataset), every):
            yield index, row_of(dataset, index)


def check_same_order(order: str | None, name: str) -> None:
    """
    Compare the order of a stream over the ranks, each of which plays its own positions of it. Every rank must call it.

    Args:
        order (`str`, *optional*):
            A checksum of this rank's first rows ([`checksum`]). `None`, on all ranks: it is no stream.
        name (`str`):
            What the user passed the stream as.

    Raises:
        DataError: If the first rows are not the same on all ranks.
    """
    if order is not None and len(set(gather_objects([order]))) > 1:
        raise DataError(
            f"the first rows of `{name}` are not the same on all ranks, so that some rows would be played twice and "
            "others never. Give a shuffled stream a seed (`dataset.shuffle(seed=..., buffer_size=...)`), and every "
            "rank the whole of it"
        )


def checksum(rows: Iterable[Mapping[str, Any]]) -> str:
    """A short text that tells rows from others; objects that JSON does not know count by their type."""
    plain = [dict(row) for row in rows]
    written = json.dumps(plain, default=lambda value: type(value).__name__, skipkeys=True)
    return f"{zlib.crc32(written.encode()):08x}"


def first_rows(dataset: Any) -> Iterator[Mapping[str, Any]]:
    """The rows that the order of a stream is told by."""
    return (row for _, row in islice(numbered_rows(dataset), _FIRST_ROWS))


def no_rows(name: str) -> DataError:
    """The error for a dataset, by the argument that it is passed as, that has no rows."""
    return DataError(f"`{name}` has no rows")


def row_of(dataset: Any, number: int) -> Mapping[str, Any]:
    """A row of a dataset, as it was before Arrow stored it ([`without_filled_nulls`])."""
    return _as_written(dataset, dataset[number])


def _as_written(dataset: Any, row: Mapping[str, Any]) -> Mapping[str, Any]:
    is_stored = isinstance(dataset, Dataset | IterableDataset) and dataset.features is not None
    if not is_stored:
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
    rows = dataset if isinstance(dataset, list | tuple) else [row for _, row in islice(numbered_rows(dataset), 1)]
    return list(dict.fromkeys(name for row in rows for name in row))
