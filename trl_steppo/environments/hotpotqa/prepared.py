"""
A prepared data set: a directory that is either complete or not there.

```
manifest.json              settings, counts, and the size and SHA-256 of every other file
data/train.parquet         training questions, without their contexts
data/validation.parquet    evaluation questions
data/corpus.arrow          every distinct paragraph of all contexts
bm25/                      the index of `BM25Retriever`
dense/                     the index of `DenseRetriever`, if an encoder was named
```
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from ...compat.datasets import of_table
from ...errors import ConfigurationError, DataError
from ...types import JsonObject
from .corpus import MappedCorpus
from .dense import DenseRetriever
from .retrieval import BM25Retriever, Retriever

if TYPE_CHECKING:
    from datasets import Dataset

MANIFEST = "manifest.json"
TRAIN, VALIDATION, CORPUS = "data/train.parquet", "data/validation.parquet", "data/corpus.arrow"
BM25, DENSE = "bm25", "dense"

_FORMAT = 1
_BLOCK = 1 << 20


class FileMark(NamedTuple):
    """
    Size and hash of a file.

    Args:
        num_bytes (`int`):
            Its size.
        sha256 (`str`):
            Hash of its content.
    """

    num_bytes: int
    sha256: str


@dataclass
class Manifest:
    """
    Description of a prepared directory.

    Args:
        settings (`dict`):
            Settings it was prepared with.
        counts (`dict[str, int]`):
            Numbers of `train` and `validation` questions and of `passages`.
        files (`dict[str, FileMark]`):
            Every file, by its path in the directory.
    """

    settings: JsonObject
    counts: dict[str, int] = field(default_factory=dict)
    files: dict[str, FileMark] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, **asdict(self)}, indent=2) + "\n"


def is_prepared(directory: Path) -> bool:
    """Whether a directory was prepared. Its files are not checked."""
    return (directory / MANIFEST).is_file()


def open_prepared(
    directory: Path, *, retriever: Literal["bm25", "dense"] | None = None
) -> tuple[Dataset, Dataset, Retriever]:
    """
    Check a prepared directory and open it.

    Corpus and index are mapped into memory: ranks of one machine that open the same directory share its pages.

    Args:
        directory (`Path`):
            A directory that `trl-steppo hotpotqa prepare` wrote.
        retriever (`str`, *optional*):
            `"bm25"` or `"dense"`; `None`: dense if it was prepared, else BM25.

    Returns:
        `tuple`: Training rows (empty if none were prepared), evaluation rows, and the retriever of both.

    Raises:
        DataError: If a file is missing or differs from what was written.
        ConfigurationError: If `retriever` was not prepared.
    """
    manifest = read_manifest(directory)
    check_files(directory, manifest.files)
    model = manifest.settings["dense_model"]
    if retriever == "dense" and model is None:
        raise ConfigurationError(f"{directory}: prepared without embeddings; prepare it with --dense MODEL")
    passages = MappedCorpus(directory / CORPUS)
    searcher: Retriever
    if model is not None and retriever != "bm25":
        searcher = DenseRetriever.open(directory / DENSE, passages, model=model)
    else:
        searcher = BM25Retriever.open(directory / BM25, passages, **manifest.settings["bm25"])
    evaluation = _read_rows(directory / VALIDATION)
    train = _read_rows(directory / TRAIN) if TRAIN in manifest.files else evaluation.select([])
    return train, evaluation, searcher


def read_manifest(directory: Path) -> Manifest:
    """
    Read a directory's manifest.

    Args:
        directory (`Path`):
            A prepared directory, or one that is being prepared.

    Returns:
        [`Manifest`]: Its content. The files are not checked.

    Raises:
        DataError: If the manifest is missing or damaged, or was written by another version of this package.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_text())
        if content["format"] != _FORMAT:
            raise DataError(
                f"{path}: its format is {content['format']!r}, and this version reads {_FORMAT}; {_again(directory)}"
            )
        files = {name: FileMark(*mark) for name, mark in content["files"].items()}
        return Manifest(content["settings"], content["counts"], files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: this is not a manifest: {error!r}; {_again(directory)}") from error


def check_files(directory: Path, files: Mapping[str, FileMark]) -> None:
    """
    Raise a `DataError` for the first file that has changed since it was written.

    Args:
        directory (`Path`):
            Where the files are.
        files (`Mapping[str, FileMark]`):
            Expected size and hash of each.
    """
    for name, mark in files.items():
        path = directory / name
        if not path.is_file():
            raise DataError(f"{path}: the file is missing; {_again(directory)}")
        if (size := path.stat().st_size) != mark.num_bytes:
            raise DataError(f"{path}: it has {size} bytes and had {mark.num_bytes} when written; {_again(directory)}")
        if mark_of(path) != mark:
            raise DataError(f"{path}: its content has changed since it was written; {_again(directory)}")


def mark_of(path: Path) -> FileMark:
    """
    Measure a file.

    Args:
        path (`Path`):
            The file.

    Returns:
        [`FileMark`]: Its size and hash.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            num_bytes += len(block)
    return FileMark(num_bytes, digest.hexdigest())


def _again(directory: Path) -> str:
    return f"remove {directory} and run `trl-steppo hotpotqa prepare` again"


def _read_rows(path: Path) -> Dataset:
    import pyarrow.parquet

    rows: Dataset = of_table(pyarrow.parquet.read_table(path))
    return rows
