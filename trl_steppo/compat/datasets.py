"""What this package uses of datasets beyond its documented interface. It is not imported before it is used."""

from __future__ import annotations

from typing import Any

from . import attribute, find


def is_in_stored_order(dataset: object) -> bool:
    """Whether a dataset's rows are those of its table, in the same order."""
    return attribute("datasets", dataset, "_indices") is None


def of_table(table: Any) -> Any:
    """A `Dataset` of a `pyarrow.Table` in memory, without a copy on the disk."""
    from datasets import Dataset

    return Dataset(find("datasets.table.InMemoryTable")(table))
