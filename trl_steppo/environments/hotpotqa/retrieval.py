"""Retrieval: what a search query finds. BM25 over titles and texts, in memory or in files that processes share."""

from __future__ import annotations

import json
import re
import unicodedata
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import bm25s
import numpy as np
from tqdm.auto import tqdm

from ...errors import ConfigurationError, DataError
from ...types import JsonObject

_WORD = re.compile(r"[^\W_]+")

INDEX = "index.json"
"""Name of the file that describes an index."""

_WORDS = "words.arrow"
_TOKENIZER = 1
"""Version of [`tokenize`]. Increased with every change of it, because older indices contain other words."""


@dataclass(frozen=True)
class Passage:
    """
    One document of a corpus.

    Args:
        title (`str`):
            Its title.
        text (`str`):
            Its text.
    """

    title: str
    text: str


class Retriever(Protocol):
    """Finds passages for a query. Many episodes call it concurrently."""

    def search(self, query: str, k: int) -> list[Passage]:
        """The `k` best passages, best first; fewer or none if no more match."""
        ...

    def search_many(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """The best passages of several queries at once."""
        ...


class Vocabulary(Protocol):
    """Ids of words, such as a `dict`."""

    def get(self, word: str, /) -> int | None:
        """The id, or `None` for an unknown word."""
        ...


class BM25Retriever:
    """
    BM25 over title and text. It is built once and then only read, so any number of threads may search it.

    A title counts `title_weight` times, so that a search for a title finds its passage before those that mention it.
    There are no stop words: titles such as "The Who" consist of them. Accents and case are ignored.

    [`~BM25Retriever.save`] writes the index into a directory. [`~BM25Retriever.open`] maps it into memory, where all
    processes of a machine that open it share its pages. Searches then give the same results as before.

    Args:
        passages (`Iterable[Passage]`):
            The corpus. Passages with equal scores are returned in this order. A sequence is not copied.
        title_weight (`int`, *optional*, defaults to `3`):
            Number of times that the words of a title are counted, at least 1.
        k1 (`float`, *optional*, defaults to `1.5`):
            How slowly repetitions of a word saturate.
        b (`float`, *optional*, defaults to `0.75`):
            How much long passages are penalized, from 0 to 1.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show progress bars while the index is built.

    Example:
    ```python
    >>> retriever = BM25Retriever([Passage("Lupe Vélez", "An actress."), Passage("Mexican Spitfire", "A film.")])
    >>> retriever.search("lupe velez", k=5)
    [Passage(title='Lupe Vélez', text='An actress.')]
    ```
    """

    def __init__(
        self,
        passages: Iterable[Passage],
        *,
        title_weight: int = 3,
        k1: float = 1.5,
        b: float = 0.75,
        show_progress: bool = False,
    ) -> None:
        check_bm25_settings(title_weight=title_weight, k1=k1, b=b)
        self._settings = {"title_weight": title_weight, "k1": k1, "b": b}
        self._passages = passages if isinstance(passages, Sequence) else list(passages)
        words: dict[str, int] = {}

        def learn(passage: Passage) -> array[int]:
            counted = tokenize(passage.title) * title_weight + tokenize(passage.text)
            return array("i", (words.setdefault(word, len(words)) for word in counted))

        documents = [learn(p) for p in tqdm(self._passages, "Reading passages", disable=not show_progress)]
        if not words:
            raise DataError(f"the corpus has {len(self._passages)} passages and no word; there is nothing to search")
        self._vocabulary: Vocabulary = words
        # "lucene" scores every match above 0, so 0 means that no word of the query occurs.
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene")
        # We number the words in the order in which they occur. The library would use the order of a set, which differs
        # between processes, and so would the rounding of sums and the order of near ties.
        self._index.index((documents, words), create_empty_token=False, show_progress=show_progress)

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, query: str, k: int) -> list[Passage]:
        """
        Find the passages that match the query best.

        Args:
            query (`str`):
                Any text. Each of its words counts once, so the work is bounded by the size of the vocabulary.
            k (`int`):
                Maximum number of passages, at least 1.

        Returns:
            `list[Passage]`: Best first. Empty if no word of the query occurs in the corpus.
        """
        check_num_passages(k)
        candidates = (self._vocabulary.get(word) for word in set(tokenize(query)))
        word_ids = sorted(word_id for word_id in candidates if word_id is not None)
        if not word_ids:
            return []
        return [self._passages[i] for i in _best(self._index.get_scores_from_ids(word_ids), k)]

    def search_many(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        Search for several queries, one after another.

        Args:
            queries (`Sequence[str]`):
                Any texts.
            k (`int`):
                Maximum number of passages for each query, at least 1.

        Returns:
            `list[list[Passage]]`: The result of [`~BM25Retriever.search`] for each query.
        """
        return [self.search(query, k) for query in queries]

    def save(self, directory: Path) -> None:
        """
        Write the index, without the passages.

        Args:
            directory (`Path`):
                A directory that no process reads yet. It is made if missing.
        """
        if not isinstance(self._vocabulary, dict):
            raise ConfigurationError("this index was opened from files; copy those instead of saving it")
        words = self._vocabulary
        self._index.vocab_dict = {}  # ours can be searched without reading all of it
        self._index.save(directory, show_progress=False)
        _MappedVocabulary.write(directory / _WORDS, words)
        about = {"tokenizer": _TOKENIZER, "num_passages": len(self), **self._settings}
        (directory / INDEX).write_text(json.dumps(about) + "\n")

    @classmethod
    def open(cls, directory: Path, passages: Sequence[Passage], **settings: float) -> BM25Retriever:
        """
        Map an index of [`~BM25Retriever.save`] into memory.

        Args:
            directory (`Path`):
                Where the index was written.
            passages (`Sequence[Passage]`):
                The corpus of the index, such as a [`MappedCorpus`].
            settings (`float`):
                Required values of `title_weight`, `k1` and `b`. Those left out may have any value.

        Returns:
            [`BM25Retriever`]: Ready to search.

        Raises:
            DataError: If the index was built with other settings or from another corpus.
        """
        about = check_index(directory, tokenizer=_TOKENIZER, num_passages=len(passages), **settings)
        retriever = cls.__new__(cls)
        retriever._settings = {name: about[name] for name in ("title_weight", "k1", "b")}
        retriever._passages = passages
        retriever._vocabulary = _MappedVocabulary(directory / _WORDS)
        retriever._index = bm25s.BM25.load(directory, mmap=True, load_vocab=False, show_progress=False)
        return retriever


class _MappedVocabulary:
    """Sorted words with their ids, in a memory-mapped file of which a lookup reads only a few pages."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self._words, self._ids = pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0).columns

    @staticmethod
    def write(path: Path, words: dict[str, int]) -> None:
        import pyarrow as pa

        in_order = sorted(words)
        columns = [pa.array(in_order, pa.large_string()), pa.array([words[word] for word in in_order], pa.int32())]
        batch = pa.record_batch(columns, ["word", "id"])
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)

    def get(self, word: str, /) -> int | None:
        i = bisect_left(self._words, word, key=lambda scalar: scalar.as_py())
        is_known = i < len(self._words) and self._words[i].as_py() == word
        return int(self._ids[i].as_py()) if is_known else None


def check_bm25_settings(*, title_weight: int, k1: float, b: float) -> None:
    """Raise a `ConfigurationError` for invalid settings of [`BM25Retriever`]."""
    if title_weight < 1:
        raise ConfigurationError(f"title_weight is {title_weight}; a title has to count at least once")
    if k1 < 0:
        raise ConfigurationError(f"k1 is {k1}; it has to be at least 0")
    if not 0 <= b <= 1:
        raise ConfigurationError(f"b is {b}; it has to be between 0 and 1")


def check_num_passages(k: int) -> None:
    """Raise a `ConfigurationError` for an invalid number of passages."""
    if k < 1:
        raise ConfigurationError(f"k is {k}; a search has to ask for at least 1 passage")


def check_index(directory: Path, **wanted: object) -> JsonObject:
    """
    Read the description of an index, and check its settings.

    Args:
        directory (`Path`):
            Where the index was written.
        wanted (`object`):
            Required values of its settings.

    Returns:
        `dict`: All of its settings.

    Raises:
        DataError: If there is no index, or it has other settings.
    """
    path = directory / INDEX
    if not path.is_file():
        raise DataError(f"{directory}: there is no index here ({INDEX} is missing); make one")
    about: JsonObject = json.loads(path.read_text())
    for name, value in wanted.items():
        if about.get(name) != value:
            raise DataError(
                f"{directory}: the index was made with {name} = {about.get(name)!r}, and {value!r} is wanted; make it "
                f"again, or ask for what it was made with"
            )
    return about


def tokenize(text: str) -> list[str]:
    """
    Split a text into words: runs of letters and digits, without case and accents.

    Args:
        text (`str`):
            Any text.

    Returns:
        `list[str]`: The words, in order.

    Example:
    ```python
    >>> tokenize("Lupe Vélez's 1940 film")
    ['lupe', 'velez', 's', '1940', 'film']
    ```
    """
    if text.isascii():
        return _WORD.findall(text.lower())
    decomposed = unicodedata.normalize("NFKD", text.casefold())
    return _WORD.findall("".join(char for char in decomposed if not unicodedata.combining(char)))


def _best(scores: np.ndarray, k: int) -> list[int]:
    """Indices of the `k` highest scores above 0, highest first; equal scores in the order of the corpus."""
    matches = np.flatnonzero(scores > 0)
    if len(matches) > k:
        kth_score = np.partition(scores[matches], len(matches) - k)[len(matches) - k]
        matches = matches[scores[matches] >= kth_score]  # with all ties at the limit, which the sort below decides
    order = np.argsort(-scores[matches], kind="stable")[:k]
    best: list[int] = matches[order].tolist()
    return best
