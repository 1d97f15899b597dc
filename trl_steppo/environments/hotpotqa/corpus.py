"""A corpus as one file that any number of processes read: memory-mapped, so that they share its pages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, overload

from .retrieval import Passage

_PASSAGES_PER_WRITE = 10_000


def write_corpus(path: Path, passages: Iterable[Passage]) -> int:
    """
    Write passages to an Arrow file.

    Args:
        path (`Path`):
            The file, which must not be in use.
        passages (`Iterable[Passage]`):
            Passages in the order that indices refer to; never all in memory at once.

    Returns:
        `int`: How many there were.
    """
    import pyarrow as pa

    schema = pa.schema([("title", pa.large_string()), ("text", pa.large_string())])
    num_passages, remaining = 0, iter(passages)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while some := list(islice(remaining, _PASSAGES_PER_WRITE)):
            columns = {"title": [passage.title for passage in some], "text": [passage.text for passage in some]}
            writer.write_table(pa.table(columns, schema))
            num_passages += len(some)
    return num_passages


class MappedCorpus(Sequence[Passage]):
    """
    The passages of a file of [`write_corpus`]. Only those that are asked for become Python objects.

    Args:
        path (`Path`):
            The file; it may be replaced, but not changed, while this is in use.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._table: Any = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Passage: ...
    @overload
    def __getitem__(self, index: slice) -> list[Passage]: ...
    def __getitem__(self, index: int | slice) -> Passage | list[Passage]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        title, text = (column[index].as_py() for column in self._table.columns)
        return Passage(title, text)

    def __iter__(self) -> Iterator[Passage]:
        for batch in self._table.to_batches():
            yield from map(Passage, *(column.to_pylist() for column in batch.columns))
