"""Preparing a data set, and opening what was prepared."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.environments.hotpotqa.test_hotpotqa_data import REAL_ROWS, ROWS, make_row, write_rows
from trl_steppo.cli import main
from trl_steppo.environments.hotpotqa import (
    BM25Retriever,
    HotpotQAEnvironment,
    MappedCorpus,
    Passage,
    hotpotqa_dataset,
    load_rows,
    make_corpus,
    open_prepared,
    prepare,
    write_corpus,
)
from trl_steppo.errors import ConfigurationError, DataError


def _prepare(directory: Path, rows: str, **settings: Any) -> list[str]:
    said: list[str] = []
    prepare(directory, train=[rows], show_progress=False, report=said.append, **settings)
    return said


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def prepared(tmp_path: Path, rows: str) -> Path:
    _prepare(tmp_path / "prepared", rows)
    return tmp_path / "prepared"


# -- what is prepared equals what is built from rows ------------------------------------------------------------------


def test_a_prepared_directory_gives_what_the_rows_give(prepared: Path, rows: str) -> None:
    given, anew = hotpotqa_dataset(str(prepared)), hotpotqa_dataset(rows)
    assert given.train_dataset.to_list() == anew.train_dataset.to_list()
    assert given.eval_dataset.to_list() == anew.eval_dataset.to_list()
    for query in ("book 3", "writer of the thin paper", "WRITER 7!", "nothing known", ""):
        assert given.retriever.search(query, 5) == anew.retriever.search(query, 5), query


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_the_command_reads_several_files(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [write_rows(tmp_path / f"part{i}{suffix}", ROWS[i : i + 3]) for i in (0, 3)]
    evaluation = write_rows(tmp_path / f"eval{suffix}", ROWS[6:])
    directory = tmp_path / "prepared"
    command = ["hotpotqa", "prepare", str(directory), "--train", *parts, "--validation", evaluation]
    assert main(command) == 0
    assert "6 train, 4 validation, 11 passages" in capsys.readouterr().out
    train, validation, _ = open_prepared(directory)
    assert (train["id"][:], validation["id"][:]) == ([r["id"] for r in ROWS[:6]], [r["id"] for r in ROWS[6:]])
    assert main(command) == 0
    assert "prepared already" in capsys.readouterr().out


def test_only_evaluation_rows(tmp_path: Path, rows: str) -> None:
    prepare(tmp_path / "p", validation=[rows], show_progress=False, report=lambda line: None)
    train, evaluation, _ = hotpotqa_dataset(str(tmp_path / "p"))
    assert (len(train), len(evaluation)) == (0, 10)
    assert train.column_names == evaluation.column_names


# -- other data sets --------------------------------------------------------------------------------------------------

TWO_WIKI = {
    "_id": "13f5ad2c",
    "type": "compositional",
    "question": "Where was the director of Film A born?",
    "context": [["Film A", ["Film A is a film.", " Ann Lee directed it."]], ["Ann Lee", ["She was born in the USA."]]],
    "supporting_facts": [["Film A", 1], ["Ann Lee", 0]],
    "evidences": [["Film A", "director", "Ann Lee"], ["Ann Lee", "place of birth", "USA"]],
    "answer": "United States",
    "answer_id": "Q30",
}
MUSIQUE = {
    "id": "2hop__1_2",
    "paragraphs": [
        {"idx": 0, "title": "Film A", "paragraph_text": "Ann Lee directed Film A.", "is_supporting": True},
        {"idx": 1, "title": "Film B", "paragraph_text": "A film.", "is_supporting": False},
        {"idx": 2, "title": "Film B", "paragraph_text": "Another film of that name.", "is_supporting": True},
    ],
    "question": "Where was the director of Film A born?",
    "question_decomposition": [{"id": 1, "question": "Film A >> director", "answer": "Ann Lee"}],
    "answer": "United States",
    "answer_aliases": ["USA", "U.S.", "United States"],
    "answerable": True,
}


@pytest.mark.parametrize("as_text", [False, True])
def test_2wikimultihopqa_keeps_the_answers_aliases(tmp_path: Path, as_text: bool) -> None:
    columns = ("context", "supporting_facts", "evidences")
    row = {**TWO_WIKI, **({column: json.dumps(TWO_WIKI[column]) for column in columns} if as_text else {})}
    rows = write_rows(tmp_path / "dev.json", [row, {**row, "_id": "other", "answer_id": None}])
    entries = [{"Q_id": "Q30", "aliases": ["USA", "U.S."], "demonyms": ["American"]}]
    aliases = write_rows(tmp_path / "id_aliases.jsonl", entries)
    command = ["hotpotqa", "prepare", str(tmp_path / "p"), "--dataset", "2wikimultihopqa", "--validation", rows]
    assert main([*command, "--aliases", aliases]) == 0
    _, evaluation, retriever = open_prepared(tmp_path / "p")
    assert evaluation[0] == {
        "id": "13f5ad2c",
        "question": TWO_WIKI["question"],
        "answer": "United States",
        "type": "compositional",
        "supporting_facts": {"title": ["Film A", "Ann Lee"], "sent_id": [1, 0]},
        "answer_aliases": ["USA", "U.S.", "American"],
    }
    assert evaluation[1]["answer_aliases"] == []
    assert retriever.search("Film A", 1) == [Passage("Film A", "Film A is a film. Ann Lee directed it.")]
    environment = HotpotQAEnvironment(retriever)
    environment.reset(**evaluation[0])
    environment.answer("the U.S.")
    assert environment.get_reward() == 1.0


def test_musique_keeps_the_answers_aliases(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "dev.jsonl", [MUSIQUE])
    prepare(tmp_path / "p", "musique", validation=[rows], show_progress=False, report=lambda line: None)
    _, evaluation, retriever = open_prepared(tmp_path / "p")
    assert evaluation[0]["answer_aliases"] == ["USA", "U.S."]
    assert evaluation[0]["type"] == "2hop"
    assert evaluation[0]["supporting_facts"] == {"title": ["Film A", "Film B"], "sent_id": [0, 0]}
    assert len(retriever.search("film", 10)) == 3  # two paragraphs under one title


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**MUSIQUE, "answerable": False}, "MuSiQue-Ans"),
        ({**MUSIQUE, "paragraphs": [{"title": "A"}]}, "`paragraphs` has to be a list of objects"),
        ({**MUSIQUE, "answer": None}, "the column 'answer' has to hold text"),
        ({**TWO_WIKI, "context": "[["}, "`context` has to be a list of pairs"),
        ({**TWO_WIKI, "supporting_facts": [["Film A"]]}, "`supporting_facts` has to be a list of pairs"),
    ],
)
def test_broken_rows_of_other_layouts_are_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"dev.jsonl, row 0.*{message}"):
        load_rows(write_rows(tmp_path / "dev.jsonl", [row]), "validation")


def test_a_broken_file_of_aliases_is_named(tmp_path: Path) -> None:
    aliases = write_rows(tmp_path / "aliases.jsonl", [{"Q_id": "Q30"}])
    with pytest.raises(DataError, match=r"aliases\.jsonl, line 1: .*Q_id, aliases and demonyms"):
        load_rows(write_rows(tmp_path / "dev.json", [TWO_WIKI]), "validation", aliases_file=aliases)


# -- nothing half-written is used -------------------------------------------------------------------------------------


def test_a_run_that_was_stopped_goes_on(
    tmp_path: Path, rows: str, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save_half(self: BM25Retriever, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        (directory / "index.json").write_text("{")
        raise KeyboardInterrupt

    directory = tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(BM25Retriever, "save", save_half)
        with pytest.raises(KeyboardInterrupt):
            _prepare(directory, rows)
    assert not directory.exists()
    written = (tmp_path / "again.partial" / "data" / "corpus.arrow").stat().st_mtime_ns
    assert _prepare(directory, rows)[:2] == ["data: there already", "bm25: being made"]
    assert (directory / "data" / "corpus.arrow").stat().st_mtime_ns == written
    assert not (tmp_path / "again.partial").exists()
    assert _files(directory) == _files(prepared)


def test_leftovers_of_a_run_with_other_settings_are_not_used(
    tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(BM25Retriever, "save", lambda self, directory: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _prepare(tmp_path / "p", rows)
    assert _prepare(tmp_path / "p", rows, seed=1)[0] == "data: being made"


def test_a_damaged_leftover_is_named(tmp_path: Path, rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(BM25Retriever, "save", lambda self, directory: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _prepare(tmp_path / "p", rows)
    (tmp_path / "p.partial" / "data" / "corpus.arrow").write_bytes(b"")
    with pytest.raises(DataError, match=r"corpus.arrow: it has 0 bytes .*remove .*p.partial"):
        _prepare(tmp_path / "p", rows)


def test_two_processes_do_not_prepare_the_same(tmp_path: Path, rows: str) -> None:
    program = (
        "import fcntl, os, sys, time\n"
        "fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    )
    (tmp_path / "p.partial").mkdir()
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "p.partial")], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConfigurationError, match="being prepared by another process"):
            _prepare(tmp_path / "p", rows)
    finally:
        other.kill()
        other.communicate()
    assert _prepare(tmp_path / "p", rows)[0] == "data: being made"  # the lock is gone with its process


def _files(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (make_row(10, answer=""), "row 10: the column 'answer' has to hold text"),
        (make_row(10, context={"title": [], "sentences": []}), "row 10: `context` is empty"),
        (make_row(3), "row 10: the id 'row-3' is that of row 3 already"),
    ],
)
def test_a_broken_row_leaves_nothing(
    tmp_path: Path, row: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS, row])
    assert main(["hotpotqa", "prepare", str(tmp_path / "p"), "--train", rows]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p").exists()


def test_a_corrupted_parquet_file_is_named(tmp_path: Path, rows: str) -> None:
    path = Path(write_rows(tmp_path / "rows.parquet", ROWS))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"rows\.parquet: this is not a Parquet file"):
        _prepare(tmp_path / "p", str(path))


@pytest.mark.parametrize("name", ["data/train.parquet", "data/corpus.arrow", "bm25/data.csc.index.npy"])
def test_a_file_that_changed_is_named(prepared: Path, name: str) -> None:
    content = bytearray((prepared / name).read_bytes())
    content[len(content) // 2] ^= 1
    (prepared / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: its content has changed .*hotpotqa prepare"):
        hotpotqa_dataset(str(prepared))
    (prepared / name).write_bytes(content[:-1])
    with pytest.raises(DataError, match=f"{name}: it has {len(content) - 1} bytes and had {len(content)}"):
        hotpotqa_dataset(str(prepared))
    (prepared / name).unlink()
    with pytest.raises(DataError, match=f"{name}: the file is missing"):
        hotpotqa_dataset(str(prepared))


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not a manifest"), ("{}", "not a manifest"), ('{"format": 99}', "its format is 99")]
)
def test_a_damaged_manifest_is_named(prepared: Path, content: str, message: str) -> None:
    (prepared / "manifest.json").write_text(content)
    with pytest.raises(DataError, match=message):
        hotpotqa_dataset(str(prepared))


def test_other_settings_are_named(tmp_path: Path, rows: str, prepared: Path) -> None:
    before = _files(prepared)
    with pytest.raises(ConfigurationError, match=r"'title_weight': 3.*now .*'title_weight': 5.*another directory"):
        _prepare(prepared, rows, title_weight=5)
    write_rows(tmp_path / "rows.jsonl", ROWS[:5])
    with pytest.raises(ConfigurationError, match=r"train = \['rows.jsonl sha256:"):
        _prepare(prepared, rows)
    assert _files(prepared) == before


def test_an_index_of_other_settings_or_another_corpus_is_refused(prepared: Path) -> None:
    corpus = MappedCorpus(prepared / "data" / "corpus.arrow")
    BM25Retriever.open(prepared / "bm25", corpus, title_weight=3, k1=1.5, b=0.75)
    with pytest.raises(DataError, match=r"made with k1 = 1.5, and 2.0 is wanted"):
        BM25Retriever.open(prepared / "bm25", corpus, k1=2.0)
    with pytest.raises(DataError, match=r"made with num_passages = 11, and 3 is wanted"):
        BM25Retriever.open(prepared / "bm25", corpus[:3])
    with pytest.raises(DataError, match="there is no index here"):
        BM25Retriever.open(prepared / "data", corpus)


def test_a_directory_with_something_else_in_it_is_refused(tmp_path: Path, rows: str) -> None:
    with pytest.raises(ConfigurationError, match="nothing was prepared in it"):
        _prepare(tmp_path, rows)


def test_an_evaluation_set_beside_a_prepared_directory_is_refused(prepared: Path, rows: str) -> None:
    with pytest.raises(ConfigurationError, match="eval_dataset_name"):
        hotpotqa_dataset(str(prepared), eval_dataset_name=rows)
    with pytest.raises(ConfigurationError, match="--dense MODEL"):
        open_prepared(prepared, retriever="dense")


def test_counts_are_checked(tmp_path: Path, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["hotpotqa", "prepare", str(tmp_path / "p"), "--train", rows]
    assert main([*command, "--check_counts"]) == 1
    assert "9 train instead of 90,447, 1 validation instead of 7,405, 11 passages instead of 509,308" in (
        capsys.readouterr().err
    )
    assert main(command) == 0


def test_counts_of_the_hub_s_own_rows_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        calls.append((name, config, split, revision))
        return datasets.Dataset.from_list(ROWS[:6] if split == "train" else ROWS[6:])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings: dict[str, Any] = {"revision": "v1", "show_progress": False, "report": lambda line: None}
    with pytest.raises(DataError, match=r"6 train instead of 90,447.*--no_check_counts"):
        prepare(tmp_path / "p", **settings)
    hub = "hotpotqa/hotpot_qa"
    assert calls == [(hub, "distractor", "train", "v1"), (hub, "distractor", "validation", "v1")]
    assert prepare(tmp_path / "p", check_counts=False, **settings).counts == {
        "train": 6,
        "validation": 4,
        "passages": 11,
    }


# -- sharing ----------------------------------------------------------------------------------------------------------


def test_a_corpus_is_read_as_it_was_written(tmp_path: Path) -> None:
    passages = [Passage(f"Títle {i}", f"Text {i} 🦊" * (i % 3)) for i in range(25_000)]
    assert write_corpus(tmp_path / "corpus.arrow", iter(passages)) == 25_000
    corpus = MappedCorpus(tmp_path / "corpus.arrow")
    assert len(corpus) == 25_000
    assert list(corpus) == passages
    assert [corpus[0], corpus[24_999], corpus[-1]] == [passages[0], passages[-1], passages[-1]]
    assert corpus[9_998:10_003] == passages[9_998:10_003]


def test_an_opened_index_stays_in_the_page_cache(prepared: Path) -> None:
    """Its pages are file pages, mapped and not copied: a second process has no copy of its own."""
    _, _, retriever = open_prepared(prepared)
    assert retriever.search("book", 1)
    mapped = Path("/proc/self/maps").read_text()
    for name in ("data/corpus.arrow", "bm25/data.csc.index.npy", "bm25/indices.csc.index.npy", "bm25/words.arrow"):
        assert str(prepared / name) in mapped, name


def test_an_opened_index_answers_a_query_of_ten_thousand_words_and_an_empty_one(prepared: Path) -> None:
    _, _, retriever = open_prepared(prepared)
    start = time.perf_counter()
    query = " ".join(["paper", *(f"word{i}" for i in range(10_000))])
    assert retriever.search(query, 1) == [Passage("Paper", "Paper is thin.")]
    assert time.perf_counter() - start < 5.0
    assert retriever.search_many(["", "?!", query], 1) == [[], [], retriever.search(query, 1)]
    with pytest.raises(ConfigurationError, match="k is 0"):
        retriever.search("paper", 0)
    with pytest.raises(ConfigurationError, match="opened from files"):
        retriever.save(prepared / "copy")
    environment = HotpotQAEnvironment(retriever)
    environment.reset(answer="x")
    assert environment.search("") == "No results."


# -- the real rows ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL_ROWS.is_file(), reason=f"needs the real HotpotQA rows, {REAL_ROWS.name}")
def test_real_rows_are_prepared_searched_played_and_scored(tmp_path: Path) -> None:
    """The policy is scripted: it asks for the first supporting title, then for the next, and knows the answer."""
    manifest = prepare(tmp_path / "p", train=[str(REAL_ROWS)], show_progress=False, report=lambda line: None)
    assert manifest.counts == {"train": 54, "validation": 6, "passages": 600}
    train, evaluation, retriever = hotpotqa_dataset(str(tmp_path / "p"))
    assert len(make_corpus(load_rows(str(REAL_ROWS), "train"))) == 600
    environment = HotpotQAEnvironment(retriever, top_k=3, reward="f1")
    scores, found = [], []
    for row in [*train, *evaluation]:
        environment.reset(**row)
        titles = list(dict.fromkeys(row["supporting_facts"]["title"]))
        found += [f"] {title}: " in environment.search(title) for title in titles]
        environment.answer(f"The {row['answer']}.")
        assert environment.done
        scores.append(environment.get_reward())
    assert scores == [1.0] * 60
    assert sum(found) / len(found) > 0.95  # some titles are names that other passages are full of
