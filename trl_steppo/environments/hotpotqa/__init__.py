"""HotpotQA: a search environment, retrieval, the official scores, data, and a mini wiki that needs no download."""

from .data import HotpotQAData, hotpotqa_dataset, load_rows, make_corpus
from .environment import HotpotQAEnvironment
from .mini_wiki import MiniWiki, make_mini_wiki
from .retrieval import BM25Retriever, Passage, Retriever
from .scoring import exact_match, f1, normalize_answer, valid_calls

__all__ = [
    "BM25Retriever",
    "HotpotQAData",
    "HotpotQAEnvironment",
    "MiniWiki",
    "Passage",
    "Retriever",
    "exact_match",
    "f1",
    "hotpotqa_dataset",
    "load_rows",
    "make_corpus",
    "make_mini_wiki",
    "normalize_answer",
    "valid_calls",
]
