"""A corpus in one memory-mapped file, whose pages any number of processes share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import overload

from .retrieval import Passage

_PASSAGES_PER_WRITE = 10_000


def write_corpus(path: Path, passages: Iterable[Passage]) -> int:
    """
    Write passages to an Arrow file.

    Args:
        path (`Path`):
            Where to write. No process may have the file open.
        passages (`Iterable[Passage]`):
            The passages, which are numbered in this order. They need not fit into memory.

    Returns:
        `int`: The number of passages.
    """
    import pyarrow as pa

    schema = pa.schema([("title", pa.large_string()), ("text", pa.large_string())])
    num_passages, remaining = 0, iter(passages)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        while block := list(islice(remaining, _PASSAGES_PER_WRITE)):
            columns = {"title": [passage.title for passage in block], "text": [passage.text for passage in block]}
            writer.write_table(pa.table(columns, schema))
            num_passages += len(block)
    return num_passages


class MappedCorpus(Sequence[Passage]):
    """
    The passages in a file that [`write_corpus`] wrote. A passage becomes a Python object when it is read.

    Args:
        path (`Path`):
            The file. While it is open it may be replaced, but not changed.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()

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
