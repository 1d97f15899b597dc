"""The processes of `retrieval.py`: one makes the index, others open it. They import the library's retrieval alone."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from trl_steppo.environments.hotpotqa import BM25Retriever, MappedCorpus
from trl_steppo.environments.hotpotqa.prepared import check_files, mark_of
from trl_steppo.environments.hotpotqa.retrieval import tokenize

K = 3
QUERY_WORDS = (4, 12)
CORPUS, INDEX = "corpus.arrow", "bm25"


def memory_mb() -> dict[str, float]:
    """This process's memory: its share of what it has in common with others, and what is its alone."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    kb = {name.rstrip(":"): int(number) for name, number, _ in map(str.split, lines)}
    return {"pss": kb["Pss"] / 1e3, "private": (kb["Private_Clean"] + kb["Private_Dirty"]) / 1e3}


def build(directory: Path) -> dict[str, float]:
    start = time.perf_counter()
    BM25Retriever(MappedCorpus(directory / CORPUS)).save(directory / INDEX)
    seconds = time.perf_counter() - start
    return {"build_s": seconds, "build_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


def make_queries(retriever: BM25Retriever, corpus: MappedCorpus, number: int) -> list[str]:
    """Words of a passage in their order, the common ones among them; each query finds something."""
    rng = random.Random(0)
    queries = []
    for _ in range(number):
        words = tokenize(corpus[rng.randrange(len(corpus))].text)
        first, length = rng.randrange(len(words)), rng.randint(*QUERY_WORDS)
        queries.append(" ".join(words[first : first + length]))
    assert all(retriever.search_many(queries[:10], K))
    return queries


def search(retriever: BM25Retriever, queries: Sequence[str], at_once: int) -> dict[str, float]:
    """Queries per second with `at_once` threads that search all the time, as episodes do, and how long each waits."""

    def timed(query: str) -> float:
        start = time.perf_counter()
        retriever.search(query, K)
        return time.perf_counter() - start

    start = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        waited = list(pool.map(timed, queries))
    seconds = time.perf_counter() - start
    p50, p99 = np.percentile(waited, [50, 99]) * 1e3
    return {"queries_per_s": len(queries) / seconds, "p50_ms": float(p50), "p99_ms": float(p99)}


def serve(directory: Path, num_queries: int) -> None:
    """Open, search, and then answer each line of input with the memory that is used now."""
    marks = {
        str(path.relative_to(directory)): mark_of(path) for path in sorted(directory.rglob("*.*")) if path.is_file()
    }
    before = memory_mb()
    start = time.perf_counter()
    check_files(directory, marks)  # as `open_prepared` does
    corpus = MappedCorpus(directory / CORPUS)
    retriever = BM25Retriever.open(directory / INDEX, corpus)
    load_s = time.perf_counter() - start
    queries = make_queries(retriever, corpus, num_queries)
    searches = {at_once: search(retriever, queries, at_once) for at_once in (1, 64)}
    print(json.dumps({"load_s": load_s, "before": before, "searches": searches}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(memory_mb()), flush=True)


if __name__ == "__main__":
    task, folder, *rest = sys.argv[1:]
    if task == "build":
        print(json.dumps(build(Path(folder))))
    else:
        serve(Path(folder), int(rest[0]))
