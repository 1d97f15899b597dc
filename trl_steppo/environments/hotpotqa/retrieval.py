"""Retrieval: what a search query finds. BM25 over titles and texts, in memory."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import bm25s
import numpy as np

from ...errors import ConfigurationError, DataError

_WORD = re.compile(r"[^\W_]+")


@dataclass(frozen=True)
class Passage:
    """
    One document of a corpus.

    Args:
        title (`str`):
            What it is about.
        text (`str`):
            What it says.
    """

    title: str
    text: str


class Retriever(Protocol):
    """Anything that finds passages for a query; called concurrently by many episodes."""

    def search(self, query: str, k: int) -> list[Passage]:
        """The `k` best passages, best first; fewer, or none, where no more match."""
        ...


class BM25Retriever:
    """
    BM25 over title and text. Built once, then only read, so that any number of threads may search it.

    A title counts `title_weight` times, because a search for a title should find its passage before those that mention
    it. No word is dropped as a stop word: titles such as "The Who" consist of them. Accents and case are ignored.

    Args:
        passages (`Iterable[Passage]`):
            The corpus. Passages that score the same are found in this order.
        title_weight (`int`, *optional*, defaults to `3`):
            How many times the words of a title are counted, at least 1.
        k1 (`float`, *optional*, defaults to `1.5`):
            How slowly the repetition of a word saturates.
        b (`float`, *optional*, defaults to `0.75`):
            How much long passages are marked down, from 0 to 1.

    Example:
    ```python
    >>> retriever = BM25Retriever([Passage("Lupe Vélez", "An actress."), Passage("Mexican Spitfire", "A film.")])
    >>> retriever.search("lupe velez", k=5)
    [Passage(title='Lupe Vélez', text='An actress.')]
    ```
    """

    def __init__(
        self, passages: Iterable[Passage], *, title_weight: int = 3, k1: float = 1.5, b: float = 0.75
    ) -> None:
        if title_weight < 1:
            raise ConfigurationError(f"title_weight is {title_weight}; a title has to count at least once")
        self._passages = list(passages)
        self._vocabulary: dict[str, int] = {}
        documents = [
            self._learn(tokenize(passage.title) * title_weight + tokenize(passage.text)) for passage in self._passages
        ]
        if not self._vocabulary:
            raise DataError(f"the corpus has {len(self._passages)} passages and no word; there is nothing to search")
        # "lucene" scores every match above 0, so that 0 means that no word of the query occurs.
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene")
        # Ids of our own in first-seen order: the library numbers words in the order of a set, which differs between
        # processes, and with it the rounding of sums and the order of near ties.
        self._index.index((documents, self._vocabulary), create_empty_token=False, show_progress=False)

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, query: str, k: int) -> list[Passage]:
        """
        Find the passages that share the most telling words with the query.

        Args:
            query (`str`):
                Any text; each of its words counts once, which bounds the work by the size of the vocabulary.
            k (`int`):
                How many passages to return at most, at least 1.

        Returns:
            `list[Passage]`: Best first. Empty where no word of the query occurs in the corpus.
        """
        if k < 1:
            raise ConfigurationError(f"k is {k}; a search has to ask for at least 1 passage")
        word_ids = sorted({self._vocabulary[word] for word in tokenize(query) if word in self._vocabulary})
        if not word_ids:
            return []
        return [self._passages[i] for i in _best(self._index.get_scores_from_ids(word_ids), k)]

    def _learn(self, words: Sequence[str]) -> list[int]:
        return [self._vocabulary.setdefault(word, len(self._vocabulary)) for word in words]


def tokenize(text: str) -> list[str]:
    """
    The words of a text as they are compared: runs of letters and digits, without case and accents.

    Args:
        text (`str`):
            Any text.

    Returns:
        `list[str]`: The words in order.

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
        matches = matches[scores[matches] >= kth_score]  # every tie at the edge, so that the sort below decides
    order = np.argsort(-scores[matches], kind="stable")[:k]
    return matches[order].tolist()
