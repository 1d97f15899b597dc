"""
Searching a corpus of HotpotQA's size: making the index, opening it, what a second process costs, and how fast it is.

The corpus is made up: 520,000 passages (the full data set has 509,308) whose titles and texts are as long as those of
real HotpotQA rows, of words drawn by Zipf's law. The index is made by one process and opened by two more, as ranks of
one machine do; files are in the page cache, as after the first rank.

    python benchmarks/retrieval.py [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from common.record import BenchmarkArguments, parse_arguments, print_table, write_record
from common.retrieval_process import CORPUS

from trl_steppo.environments.hotpotqa import Passage, load_rows, make_corpus, write_corpus
from trl_steppo.environments.hotpotqa.retrieval import tokenize
from trl_steppo.types import JsonObject

PROCESS = [sys.executable, str(Path(__file__).with_name("common") / "retrieval_process.py")]
QUICK_PASSAGES, QUICK_QUERIES = 20_000, 200
NUM_WORDS = 500_000
"""By Zipf's law with exponent 1 the most common of so many words is 7.3 % of a text; in the 600 passages of 60 real
rows it is 6.8 %."""


@dataclass(frozen=True)
class Lengths:
    """
    How long passages are, in words: mean and standard deviation of the logarithm, of titles and texts.

    The defaults are those of the 600 passages of 60 real HotpotQA rows.
    """

    title_log_mean: float = 1.04
    title_log_std: float = 0.4658
    text_log_mean: float = 4.4051
    text_log_std: float = 0.5503

    @classmethod
    def of(cls, passages: list[Passage]) -> Lengths:
        titles, texts = (
            np.log([max(1, len(tokenize(getattr(passage, part)))) for passage in passages])
            for part in ("title", "text")
        )
        return cls(*(round(float(x), 4) for x in (titles.mean(), titles.std(), texts.mean(), texts.std())))


@dataclass
class RetrievalArguments(BenchmarkArguments):
    """
    Args:
        passages (`int`, *optional*, defaults to `520000`):
            Size of the corpus; `--quick` takes 20,000.
        queries (`int`, *optional*, defaults to `1000`):
            Queries of each measurement; `--quick` takes 200.
        rows (`str`, *optional*):
            File of real HotpotQA rows to measure lengths on, instead of the built-in figures.
    """

    passages: int = field(default=520_000, metadata={"help": "Size of the corpus; --quick takes 20,000."})
    queries: int = field(default=1000, metadata={"help": "Queries of each measurement; --quick takes 200."})
    rows: str | None = field(default=None, metadata={"help": "Real HotpotQA rows to measure lengths on."})


def make_passages(number: int, lengths: Lengths, seed: int) -> Iterator[Passage]:
    rng = np.random.default_rng(seed)
    shares = np.cumsum(1.0 / np.arange(1, NUM_WORDS + 1))
    words = [f"w{i}" for i in range(NUM_WORDS)]

    def sizes(mean: float, std: float) -> np.ndarray:
        return np.maximum(1, np.rint(rng.lognormal(mean, std, number))).astype(int)

    titles = sizes(lengths.title_log_mean, lengths.title_log_std)
    texts = sizes(lengths.text_log_mean, lengths.text_log_std)
    for num_title, num_text in zip(titles, texts, strict=True):
        drawn = np.searchsorted(shares, rng.random(num_title + num_text) * shares[-1]).tolist()
        title, text = drawn[:num_title], drawn[num_title:]
        yield Passage(" ".join(words[i] for i in title), " ".join(words[i] for i in text) + ".")


class Opener:
    """A process that opened the index, searched, and still has it open."""

    def __init__(self, directory: Path, num_queries: int) -> None:
        command = [*PROCESS, "serve", str(directory), str(num_queries)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.figures: JsonObject = self._read()

    def memory_mb(self) -> dict[str, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> JsonObject:
        assert self._process.stdout is not None
        answer: JsonObject = json.loads(self._process.stdout.readline())
        return answer


def main(args: RetrievalArguments) -> None:
    num_passages, num_queries = (QUICK_PASSAGES, QUICK_QUERIES) if args.quick else (args.passages, args.queries)
    lengths = Lengths.of(make_corpus(load_rows(args.rows, "train"))) if args.rows else Lengths()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write_corpus(directory / CORPUS, make_passages(num_passages, lengths, args.seed))
        built = json.loads(subprocess.check_output([*PROCESS, "build", name], text=True))
        disk_mb = sum(path.stat().st_size for path in directory.rglob("*.*") if path.is_file()) / 1e6
        first = Opener(directory, num_queries)
        alone_mb = first.memory_mb()["pss"]
        second = Opener(directory, num_queries)
        first_mb, second_mb = first.memory_mb(), second.memory_mb()
        first.close()
        second.close()
    figures = {
        **built,
        "disk_mb": disk_mb,
        "load_s": [first.figures["load_s"], second.figures["load_s"]],
        "first_process_mb": first_mb,
        "second_process_mb": second_mb,
        "second_process_before_opening_mb": second.figures["before"],
        "more_with_second_process_mb": first_mb["pss"] + second_mb["pss"] - alone_mb,
        "searches": first.figures["searches"],
        "passages": num_passages,
        "queries": num_queries,
        "vocabulary": NUM_WORDS,
        "lengths": asdict(lengths),
    }
    rows = [
        ["making the index", f"{built['build_s']:.1f} s, peak {built['build_peak_gb']:.2f} GB"],
        ["corpus and index on the disk", f"{disk_mb:,.0f} MB"],
        ["opening it, first and second process", " ".join(f"{load_s:.2f} s" for load_s in figures["load_s"])],
        ["memory, with a second process", f"{figures['more_with_second_process_mb']:,.0f} MB more"],
        ["its private memory", f"{second_mb['private']:,.0f} MB"],
        *(
            [
                f"{at_once} at once",
                "{queries_per_s:,.0f} queries/s, p50 {p50_ms:.1f} ms, p99 {p99_ms:.1f} ms".format(**s),
            ]
            for at_once, s in figures["searches"].items()
        ),
    ]
    print_table(f"BM25 over {num_passages:,} passages", ["", "figure"], rows)
    write_record(args.json, figures)


if __name__ == "__main__":
    main(parse_arguments(RetrievalArguments))
