from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from trl_steppo.environments.hotpotqa import BM25Retriever, Passage
from trl_steppo.errors import ConfigurationError, DataError

FOX, WHO, VELEZ, DOG = (
    Passage("Silent Foxes", "A band of the north."),
    Passage("The Who", "An English rock band."),
    Passage("Lupe Vélez", "An actress."),
    Passage("Dog", "An animal. The who is who of dogs: the dog, the hound."),
)
PASSAGES = [FOX, WHO, VELEZ, DOG]


@pytest.fixture(scope="module")
def retriever() -> BM25Retriever:
    return BM25Retriever(PASSAGES)


@pytest.mark.parametrize(
    ("query", "best"),
    [("Silent Foxes", FOX), ("the who", WHO), ("LUPE VELEZ", VELEZ), ("Lupe Ve\u0301lez", VELEZ), ("hound", DOG)],
)
def test_the_best_passage_comes_first(retriever: BM25Retriever, query: str, best: Passage) -> None:
    assert retriever.search(query, 2)[0] == best


@pytest.mark.parametrize("query", ["", "   ", "?!_-", "zebra", "🦊"])
def test_nothing_is_found_for_queries_without_known_words(retriever: BM25Retriever, query: str) -> None:
    assert retriever.search(query, 3) == []


def test_only_matches_are_returned_however_many_are_asked_for(retriever: BM25Retriever) -> None:
    assert retriever.search("foxes", 100) == [FOX]
    assert set(retriever.search("an", 100)) == {WHO, VELEZ, DOG}
    assert len(retriever.search("the an", 2)) == 2


@pytest.mark.parametrize("k", [1, 40, 100])
def test_ties_are_in_the_order_of_the_corpus(k: int) -> None:
    same = [Passage(f"Twin {number}", "alike") for number in range(100)]
    assert BM25Retriever(same).search("twin", k) == same[:k]
    assert BM25Retriever(same[::-1]).search("twin", k) == same[::-1][:k]


def test_a_word_counts_once_in_a_query(retriever: BM25Retriever) -> None:
    assert retriever.search("who who who silent foxes", 4) == retriever.search("silent foxes who", 4)


def test_a_query_of_ten_thousand_words_is_quick(retriever: BM25Retriever) -> None:
    query = " ".join(["the who", *(f"word{i}" for i in range(10_000))])
    start = time.perf_counter()
    assert retriever.search(query, 1) == [WHO]
    assert time.perf_counter() - start < 1.0


def test_threads_see_the_same_results(retriever: BM25Retriever) -> None:
    queries = [f"{passage.title} the an band" for passage in PASSAGES] * 100
    alone = [retriever.search(query, 3) for query in queries]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda query: retriever.search(query, 3), queries)) == alone


def test_nothing_is_printed_and_the_order_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "from trl_steppo.environments.hotpotqa import BM25Retriever, Passage\n"
        "r = BM25Retriever([Passage(f'T{i}', ' '.join(f'w{i * j % 13}' for j in range(9))) for i in range(60)])\n"
        "print([p.title for p in r.search(' '.join(f'w{i}' for i in range(13)), 60)])"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert [run.stderr for run in runs] == ["", ""]  # no progress bar


@pytest.mark.parametrize("passages", [[], [Passage("?", "...")]])
def test_a_corpus_without_words_raises(passages: list[Passage]) -> None:
    with pytest.raises(DataError, match=f"{len(passages)} passages and no word"):
        BM25Retriever(passages)


def test_settings_that_cannot_work_raise(retriever: BM25Retriever) -> None:
    with pytest.raises(ConfigurationError, match="k is 0"):
        retriever.search("dog", 0)
    with pytest.raises(ConfigurationError, match="title_weight is 0"):
        BM25Retriever(PASSAGES, title_weight=0)
