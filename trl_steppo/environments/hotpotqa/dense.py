"""Dense retrieval: finds passages whose embeddings are close to that of the query. Needs the extra `dense`."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ConfigurationError, DataError
from ...extras import install_command
from .retrieval import INDEX, Passage, check_index, check_num_passages

_VECTORS = "vectors.faiss"
_PROBE = "Who directed the film?"


class DenseRetriever:
    """
    Finds the exact nearest neighbours of a query among the embeddings of "title: text", by cosine similarity.

    Like [`BM25Retriever`], it is built once and then only read. [`~DenseRetriever.open`] maps the vectors into memory,
    where all processes of a machine share their pages. Every process has an encoder of its own.

    Args:
        passages (`Sequence[Passage]`):
            The corpus.
        model (`str`):
            The encoder: a `SentenceTransformer`, as a directory or a name on the hub. Its own prompts for queries and
            documents are used.
        batch_size (`int`, *optional*, defaults to `64`):
            Texts that are encoded together.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar while passages are encoded.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        model: str,
        *,
        batch_size: int = 64,
        show_progress: bool = False,
    ) -> None:
        if not passages:
            raise DataError("the corpus has no passages; there is nothing to search")
        self._start(passages, model, batch_size)
        vectors = self._encoder.encode_document(
            [f"{passage.title}: {passage.text}" for passage in passages],
            batch_size=batch_size,
            normalize_embeddings=True,
            show_progress_bar=show_progress,
        )
        self._index = self._faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(np.ascontiguousarray(vectors, np.float32))

    def __len__(self) -> int:
        return len(self._passages)

    def search(self, query: str, k: int) -> list[Passage]:
        """See [`~DenseRetriever.search_many`]."""
        return self.search_many([query], k)[0]

    def search_many(self, queries: Sequence[str], k: int) -> list[list[Passage]]:
        """
        Find the passages closest to each query; the queries are encoded together.

        Args:
            queries (`Sequence[str]`):
                Any texts. The encoder cuts what is too long for it.
            k (`int`):
                Maximum number of passages for each query, at least 1.

        Returns:
            `list[list[Passage]]`: Best first. Empty for a query without text.
        """
        check_num_passages(k)
        results: list[list[Passage]] = [[] for _ in queries]
        asked = [i for i, query in enumerate(queries) if query.strip()]
        if asked:
            _, nearest = self._index.search(self._encode([queries[i] for i in asked]), min(k, len(self)))
            for i, passage_ids in zip(asked, nearest.tolist(), strict=True):
                results[i] = [self._passages[passage_id] for passage_id in passage_ids]
        return results

    def save(self, directory: Path) -> None:
        """
        Write the vectors, without the passages and the encoder.

        Args:
            directory (`Path`):
                A directory that no process reads yet. It is made if missing.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self._faiss.write_index(self._index, str(directory / _VECTORS))
        about = {"num_passages": len(self), "model": self._model, "probe": self._encode([_PROBE])[0].tolist()}
        (directory / INDEX).write_text(json.dumps(about) + "\n")

    @classmethod
    def open(cls, directory: Path, passages: Sequence[Passage], *, model: str | None = None) -> DenseRetriever:
        """
        Map the vectors of [`~DenseRetriever.save`] into memory, and load their encoder.

        Args:
            directory (`Path`):
                Where the vectors were written.
            passages (`Sequence[Passage]`):
                The corpus of the vectors, such as a [`MappedCorpus`].
            model (`str`, *optional*):
                The encoder, if it has moved since.

        Returns:
            [`DenseRetriever`]: Ready to search.

        Raises:
            DataError: If they belong to another corpus or another encoder. To check the latter, one text is encoded.
        """
        about = check_index(directory, num_passages=len(passages))
        retriever = cls.__new__(cls)
        retriever._start(passages, model or about["model"])
        faiss = retriever._faiss
        retriever._index = faiss.read_index(str(directory / _VECTORS), faiss.IO_FLAG_MMAP_IFC)
        probe, now = np.asarray(about["probe"], np.float32), retriever._encode([_PROBE])[0]
        # Rounding differs between machines and batch sizes, but far less than between encoders.
        if probe.shape != now.shape or float(probe @ now) < 0.99:
            raise DataError(
                f"{directory}: the index was made with the encoder {about['model']!r}, and {retriever._model!r} gives "
                "other embeddings; name the right `model`, or make the index again"
            )
        return retriever

    def _start(self, passages: Sequence[Passage], model: str, batch_size: int = 64) -> None:
        self._faiss, load = _import()
        self._passages = passages
        self._model = model
        self._encoder: Any = load(model)
        self._batch_size = batch_size
        self._lock = threading.Lock()  # a tokenizer must not be used by two threads at once

    def _encode(self, queries: list[str]) -> np.ndarray:
        with self._lock:
            vectors = self._encoder.encode_query(
                queries, batch_size=self._batch_size, normalize_embeddings=True, show_progress_bar=False
            )
        return np.ascontiguousarray(vectors, np.float32)


def _import() -> tuple[Any, Any]:
    try:
        import faiss
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigurationError(
            f"dense retrieval needs the extra `dense`: {install_command('dense')} ({error})"
        ) from error
    return faiss, SentenceTransformer
