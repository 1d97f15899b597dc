from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from trl_steppo.environments.hotpotqa import (
    BM25Retriever,
    Passage,
    exact_match,
    f1,
    hotpotqa_dataset,
    load_rows,
    make_corpus,
    make_mini_wiki,
)
from trl_steppo.environments.hotpotqa.data import SYSTEM_PROMPT
from trl_steppo.errors import ConfigurationError, DataError

REAL_ROWS = Path(__file__).parents[4] / "shared" / "data" / "hotpotqa_distractor_60.jsonl"
needs_real_rows = pytest.mark.skipif(not REAL_ROWS.is_file(), reason=f"needs the real HotpotQA rows, {REAL_ROWS.name}")


def make_row(number: int, **changes: Any) -> dict[str, Any]:
    row = {
        "id": f"row-{number}",
        "question": f"Who wrote book {number}?",
        "answer": f"Writer {number}",
        "type": "bridge",
        "level": "hard",
        "supporting_facts": {"title": [f"Book {number}"], "sent_id": [0]},
        "context": {
            "title": [f"Book {number}", "Paper"],
            "sentences": [[f"Book {number} is long.", f" Writer {number} wrote it."], ["Paper is thin."]],
        },
    }
    return {**row, **changes}


ROWS = [make_row(number) for number in range(10)]


def write_rows(path: Path, rows: list[Any]) -> str:
    if path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_a_local_file_gives_its_rows_for_either_split(tmp_path: Path, suffix: str) -> None:
    name = write_rows(tmp_path / f"rows{suffix}", ROWS)
    assert load_rows(name, "train").to_list() == ROWS
    assert load_rows(name, "validation").to_list() == ROWS


def test_make_corpus_keeps_distinct_paragraphs_in_order() -> None:
    other_paper = copy.deepcopy(ROWS[1])
    other_paper["context"]["sentences"][1] = ["Paper is white."]
    assert make_corpus([ROWS[0], ROWS[0], other_paper]) == [
        Passage("Book 0", "Book 0 is long. Writer 0 wrote it."),
        Passage("Paper", "Paper is thin."),
        Passage("Book 1", "Book 1 is long. Writer 1 wrote it."),
        Passage("Paper", "Paper is white."),
    ]


def test_the_mini_wiki_is_the_default() -> None:
    wiki = make_mini_wiki(0)
    train, evaluation, retriever = hotpotqa_dataset()
    assert train["id"] == [row["id"] for row in wiki.train]
    assert evaluation["path"] == [row["path"] for row in wiki.validation]
    assert train[0]["prompt"] == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": wiki.train[0]["question"]},
    ]
    assert len(retriever) == len(wiki.passages)
    assert len(SYSTEM_PROMPT.split()) <= 15
    other = hotpotqa_dataset("mini_wiki", mini_wiki_seed=1, system_prompt="").train_dataset
    assert other[0]["prompt"] == [{"role": "user", "content": make_mini_wiki(1).train[0]["question"]}]


def test_a_local_file_is_dealt_by_the_seed(tmp_path: Path) -> None:
    name = write_rows(tmp_path / "rows.jsonl", ROWS)
    train, evaluation, retriever = hotpotqa_dataset(name, eval_share=0.3, seed=0)
    assert (len(train), len(evaluation)) == (7, 3)
    assert sorted([*train["id"], *evaluation["id"]]) == [row["id"] for row in ROWS]
    eval_ids = [list(hotpotqa_dataset(name, eval_share=0.3, seed=seed).eval_dataset["id"]) for seed in (0, 1, 2)]
    assert list(evaluation["id"]) == eval_ids[0]
    assert any(ids != eval_ids[0] for ids in eval_ids)
    assert "context" not in train.column_names
    assert len(retriever) == 11  # ten books and one paper: the evaluation's passages are searched as well
    assert len(hotpotqa_dataset(name, eval_share=0.01).eval_dataset) == 1


def test_evaluation_rows_may_come_from_elsewhere(tmp_path: Path) -> None:
    name = write_rows(tmp_path / "train.jsonl", ROWS[:6])
    eval_name = write_rows(tmp_path / "eval.json", ROWS[6:])
    data = hotpotqa_dataset(name, eval_dataset_name=eval_name)
    assert (len(data.train_dataset), data.eval_dataset["id"]) == (6, [row["id"] for row in ROWS[6:]])
    assert len(data.retriever) == 11
    data = hotpotqa_dataset(name, eval_dataset_name="mini_wiki")
    assert (len(data.train_dataset), len(data.eval_dataset), len(data.retriever)) == (6, 300, 1027)


def test_hub_names_use_the_distractor_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        assert revision is None
        calls.append((name, config, split))
        return datasets.Dataset.from_list(ROWS[:5] if split == "train" else ROWS[5:])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    train, evaluation, _ = hotpotqa_dataset("hotpotqa/hotpot_qa")
    assert calls == [("hotpotqa/hotpot_qa", "distractor", "train"), ("hotpotqa/hotpot_qa", "distractor", "validation")]
    assert (train["id"], evaluation["id"]) == ([r["id"] for r in ROWS[:5]], [r["id"] for r in ROWS[5:]])
    load_rows("someone/else", "train")
    assert calls[-1] == ("someone/else", None, "train")


def test_a_hub_that_cannot_be_reached_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"hotpotqa/hotpot_qa: the split 'train' .* offline.*mini_wiki"):
        load_rows("hotpotqa/hotpot_qa", "train")


def _broken(**changes: Any) -> dict[str, Any]:
    """The second row with columns replaced, or removed where the value is `...`."""
    row = {**ROWS[1], **changes}
    return {column: value for column, value in row.items() if value is not ...}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (_broken(answer=...), "row 1: the column 'answer' is missing"),
        (_broken(context=...), "row 1: the column 'context' is missing"),
        (_broken(id=...), r"row 1: the column 'id' is missing .*question.*hotpotqa/hotpot_qa"),
        (_broken(answer=" "), "row 1: the column 'answer' has to hold text, not ' '"),
        (_broken(answer=None), "row 1: the column 'answer' has to hold text, not None"),
        (_broken(question=7), "row 1: the column 'question' has to hold text, not 7"),
        (_broken(context={"title": [], "sentences": []}), "row 1: `context` is empty"),
        (_broken(context=7), "row 1: `context` has to hold the lists"),
        (_broken(context=[["Book"]]), "row 1: `context` has to be a list of pairs"),
        (_broken(answer_aliases=["Nobody", 7]), "row 1: `answer_aliases` has to be a list of texts"),
        (_broken(context={"title": ["Book"], "sentences": []}), "row 1: `context` has to hold a list of titles"),
        (_broken(context={"title": ["Book"], "sentences": ["Text."]}), "row 1: `context` has to hold a list of"),
        (_broken(context={"title": ["Book"], "sentences": [[1]]}), "row 1: the sentences of 'Book'"),
        (_broken(id="row-0"), "row 1: the id 'row-0' is that of row 0 already"),
        ("text", "row 1: a row has to be an object"),
    ],
)
def test_a_broken_row_is_named(tmp_path: Path, row: Any, message: str) -> None:
    name = write_rows(tmp_path / "rows.jsonl", [ROWS[0], row])
    with pytest.raises(DataError, match=f"rows.jsonl, {message}"):
        load_rows(name, "train")


@pytest.mark.parametrize(
    ("file_name", "content", "message"),
    [
        ("rows.jsonl", '{"id": 1}\n{"id"', "rows.jsonl, line 2: this is not JSON"),
        ("rows.jsonl", "\n", "rows.jsonl: there are no rows"),
        ("rows.json", '{"id": 1}', "rows.json: a .json file has to hold a list"),
        ("rows.json", '{"id": 1}\n{"id": 2}', r"rows.json: this is not JSON.*\.jsonl"),
        ("rows.parquet", "text", "rows.parquet: this is not a Parquet file"),
        ("rows.csv", "id,question", "rows.csv: rows are read from"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, file_name: str, content: str, message: str) -> None:
    (tmp_path / file_name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        load_rows(str(tmp_path / file_name), "train")


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"missing\.jsonl: there is no such file"):
        load_rows(str(tmp_path / "missing.jsonl"), "train")
    with pytest.raises(ConfigurationError, match="split is 'test'"):
        load_rows("mini_wiki", "test")
    name = write_rows(tmp_path / "mixed.jsonl", [{**ROWS[0], "level": 1}, {**ROWS[1], "level": "hard"}])
    with pytest.raises(DataError, match=r"mixed\.jsonl: a column holds values of different types"):
        load_rows(name, "train")
    name = write_rows(tmp_path / "one.jsonl", ROWS[:1])
    with pytest.raises(DataError, match="one row cannot be split"):
        hotpotqa_dataset(name)
    with pytest.raises(ConfigurationError, match="eval_share is 1"):
        hotpotqa_dataset(name, eval_share=1)


@needs_real_rows
def test_real_rows_load_and_score() -> None:
    rows = load_rows(str(REAL_ROWS), "train")
    assert len(rows) == 60
    assert len(make_corpus(rows)) == 600
    for answer in rows["answer"]:
        assert (exact_match(answer, answer), f1(answer, answer)) == (1.0, 1.0)
    data = hotpotqa_dataset(str(REAL_ROWS))
    assert (len(data.train_dataset), len(data.eval_dataset), len(data.retriever)) == (54, 6, 600)


@needs_real_rows
def test_real_supporting_titles_are_found() -> None:
    rows = load_rows(str(REAL_ROWS), "train")
    retriever = BM25Retriever(make_corpus(rows))
    titles = [title for facts in rows["supporting_facts"] for title in dict.fromkeys(facts["title"])]
    found = [title in [passage.title for passage in retriever.search(title, 5)] for title in titles]
    assert len(titles) == 120
    assert sum(found) / len(found) >= 0.95
