"""Dense retrieval with a tiny encoder that is made here: an embedding for each word, and their mean."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trl_steppo.environments.hotpotqa import DenseRetriever, Passage, open_prepared, prepare
from trl_steppo.errors import ConfigurationError, DataError

FOX, DOG, PAPER = Passage("Fox", "red animal"), Passage("Dog", "loud animal"), Passage("Paper", "thin white sheet")
WORDS = ["[UNK]", "fox", "red", "animal", "dog", "loud", "paper", "thin", "white", "sheet"]

pytest.importorskip("faiss", reason="the extra `dense` is not installed")
sentence_transformers = pytest.importorskip("sentence_transformers", reason="the extra `dense` is not installed")


def _make_encoder(path: Path, seed: int = 0) -> str:
    import numpy as np
    from sentence_transformers.models import StaticEmbedding
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = Lowercase(), Whitespace()
    weights = np.random.default_rng(seed).normal(size=(len(WORDS), 32)).astype(np.float32)
    sentence_transformers.SentenceTransformer(modules=[StaticEmbedding(tokenizer, weights)], device="cpu").save(
        str(path)
    )
    return str(path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return _make_encoder(tmp_path_factory.mktemp("encoder") / "tiny")


def test_the_closest_passage_comes_first(encoder: str) -> None:
    retriever = DenseRetriever([FOX, DOG, PAPER], encoder)
    assert retriever.search("red fox", 1) == [FOX]
    assert retriever.search("thin sheet", 3)[0] == PAPER
    assert len(retriever.search("dog", 100)) == 3
    assert retriever.search_many(["loud dog", " ", "white paper"], 1) == [[DOG], [], [PAPER]]
    assert retriever.search(" ".join(["dog"] * 10_000), 1) == [DOG]
    with pytest.raises(ConfigurationError, match="k is 0"):
        retriever.search("dog", 0)
    with pytest.raises(DataError, match="no passages"):
        DenseRetriever([], encoder)


def test_a_saved_index_finds_the_same_passages(tmp_path: Path, encoder: str) -> None:
    made = DenseRetriever([FOX, DOG, PAPER], encoder)
    made.save(tmp_path / "dense")
    opened = DenseRetriever.open(tmp_path / "dense", [FOX, DOG, PAPER])
    queries = ["animal", "red sheet", "loud thin", "dog"] * 20
    expected = made.search_many(queries, 3)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: opened.search(query, 3), queries)) == expected
    with pytest.raises(DataError, match="num_passages = 3, and 2 is wanted"):
        DenseRetriever.open(tmp_path / "dense", [FOX, DOG])
    other = _make_encoder(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="gives other embeddings"):
        DenseRetriever.open(tmp_path / "dense", [FOX, DOG, PAPER], model=other)


def test_a_directory_prepared_with_an_encoder_is_searched_with_it(tmp_path: Path, encoder: str) -> None:
    row = {"id": "1", "question": "Which animal is red?", "answer": "fox"}
    row["context"] = {"title": [p.title for p in (FOX, DOG)], "sentences": [[p.text] for p in (FOX, DOG)]}
    (tmp_path / "rows.json").write_text(json.dumps([row]))
    prepare(
        tmp_path / "p",
        validation=[str(tmp_path / "rows.json")],
        dense_model=encoder,
        show_progress=False,
        report=lambda line: None,
    )
    retriever = open_prepared(tmp_path / "p")[2]
    assert isinstance(retriever, DenseRetriever)
    assert retriever.search("red fox", 1) == [FOX]
    assert open_prepared(tmp_path / "p", retriever="bm25")[2].search("loud", 5) == [DOG]
