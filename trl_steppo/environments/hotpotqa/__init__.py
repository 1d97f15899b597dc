"""HotpotQA: a search environment, retrieval, the official scores, data, and a mini wiki that needs no download."""

from .corpus import MappedCorpus, write_corpus
from .data import SYSTEM_PROMPT, HotpotQAData, hotpotqa_dataset, load_rows, make_corpus
from .dense import DenseRetriever
from .environment import HotpotQAEnvironment
from .mini_wiki import MiniWiki, make_mini_wiki
from .prepare import Preparation, prepare
from .prepared import open_prepared
from .recipe import EnvironmentArguments, HotpotQARecipe
from .retrieval import BM25Retriever, Passage, Retriever
from .scoring import exact_match, f1, normalize_answer, valid_calls

__all__ = [
    "SYSTEM_PROMPT",
    "BM25Retriever",
    "DenseRetriever",
    "EnvironmentArguments",
    "HotpotQAData",
    "HotpotQAEnvironment",
    "HotpotQARecipe",
    "MappedCorpus",
    "MiniWiki",
    "Passage",
    "Preparation",
    "Retriever",
    "exact_match",
    "f1",
    "hotpotqa_dataset",
    "load_rows",
    "make_corpus",
    "make_mini_wiki",
    "normalize_answer",
    "open_prepared",
    "prepare",
    "valid_calls",
    "write_corpus",
]
