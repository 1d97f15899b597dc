from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import pytest

from trl_steppo.environments.hotpotqa import BM25Retriever, MiniWiki, make_mini_wiki
from trl_steppo.environments.hotpotqa.data import check_rows
from trl_steppo.environments.hotpotqa.mini_wiki import TEMPTING_RELATION

SEEDS = (0, 1)


@pytest.fixture(scope="module", params=SEEDS)
def wiki(request: pytest.FixtureRequest) -> MiniWiki:
    return make_mini_wiki(request.param)


def _digest(wiki: MiniWiki) -> str:
    passages = [(passage.title, passage.text) for passage in wiki.passages]
    content = json.dumps([passages, wiki.train, wiki.validation, wiki.facts, wiki.kinds])
    return hashlib.sha256(content.encode()).hexdigest()


def _edges(row: dict) -> set[tuple[str, str]]:
    """Every pair of neighbours on the path, the answer included."""
    stops = [*row["path"], row["answer"]]
    return set(pairwise(stops))


def test_the_same_seed_makes_the_same_wiki_in_every_process() -> None:
    program = (
        "import hashlib, json\n"
        "from trl_steppo.environments.hotpotqa import make_mini_wiki\n"
        "w = make_mini_wiki(3)\n"
        "content = json.dumps([[(p.title, p.text) for p in w.passages], w.train, w.validation, w.facts, w.kinds])\n"
        "print(hashlib.sha256(content.encode()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        ).stdout.strip()
        for hash_seed in ("0", "12345")
    }
    assert digests == {_digest(make_mini_wiki(3))}


def test_seeds_make_different_wikis_of_the_same_words() -> None:
    one, other = make_mini_wiki(0), make_mini_wiki(1)
    assert _digest(one) != _digest(other)

    def words(wiki: MiniWiki) -> set[str]:
        return set(re.findall(r"\w+", " ".join(passage.text for passage in wiki.passages)))

    assert words(one) == words(other)


def test_the_wiki_has_the_size_that_is_asked_for(wiki: MiniWiki) -> None:
    assert Counter(wiki.kinds.values()) == {"country": 20, "city": 140, "person": 480, "film": 240, "band": 140}
    assert len({passage.title for passage in wiki.passages}) == len(wiki.passages) == len(wiki.facts) == 1020
    assert len(wiki.train) >= 2000
    assert len(wiki.validation) == 300
    assert set(Counter(row["hops"] for row in wiki.train)) == {2, 3}
    assert {row["kind"] for row in wiki.validation} == {row["kind"] for row in wiki.train}


def test_rows_are_in_the_schema_of_hotpotqa(wiki: MiniWiki) -> None:
    rows = wiki.train + wiki.validation
    check_rows(rows, "mini_wiki")
    assert {row["type"] for row in rows} == {"bridge", "comparison"}
    text_of = {passage.title: passage.text for passage in wiki.passages}
    for row in rows:
        for title, parts in zip(row["context"]["title"], row["context"]["sentences"], strict=True):
            assert "".join(parts) == text_of[title]


def test_names_are_plain_capitalised_words(wiki: MiniWiki) -> None:
    assert all(re.fullmatch(r"[A-Z][a-z]+", word) for title in wiki.kinds for word in title.split())


def test_no_question_occurs_twice(wiki: MiniWiki) -> None:
    questions = [row["question"] for row in wiki.train + wiki.validation]
    assert len(set(questions)) == len(questions)
    comparisons = [
        (row["kind"], *sorted(row["path"])) for row in wiki.train + wiki.validation if row["type"] == "comparison"
    ]
    assert len(set(comparisons)) == len(comparisons)


def test_no_part_of_a_validation_path_occurs_in_training(wiki: MiniWiki) -> None:
    trained_titles = {title for row in wiki.train for title in row["path"] if wiki.kinds[title] != "country"}
    trained_edges = {edge for row in wiki.train for edge in _edges(row) if wiki.kinds[edge[0]] != "country"}
    for row in wiki.validation:
        own_titles = [title for title in row["path"] if wiki.kinds[title] != "country"]
        assert own_titles[0] == row["path"][0]  # the start is never shared
        assert trained_titles.isdisjoint(own_titles)
        assert trained_edges.isdisjoint(_edges(row))


def test_validation_needs_no_word_that_training_does_not_show(wiki: MiniWiki) -> None:
    text_of = {passage.title: f"{passage.title} {passage.text}" for passage in wiki.passages}

    def words(rows: list[dict]) -> set[str]:
        texts = [row["question"] for row in rows] + [text_of[title] for row in rows for title in row["path"]]
        return set(re.findall(r"\w+", " ".join(texts)))

    assert words(wiki.validation) <= words(wiki.train)


def test_every_answer_is_found_by_following_the_path(wiki: MiniWiki) -> None:
    text_of = {passage.title: passage.text for passage in wiki.passages}
    for row in wiki.train + wiki.validation:
        assert len(row["path"]) == len(row["relations"]) == row["hops"]
        values = [wiki.facts[title][relation] for title, relation in zip(row["path"], row["relations"], strict=True)]
        for title, sentence, value in zip(row["path"], row["supporting_facts"]["sent_id"], values, strict=True):
            assert value in text_of[title]
            supporting = row["context"]["sentences"][row["path"].index(title)][sentence]
            assert value in supporting
        if row["type"] == "bridge":
            assert values == [*row["path"][1:], row["answer"]]
            assert wiki.follow(row["path"][0], row["relations"]) == (row["path"], row["answer"])
            assert row["path"][0] in row["question"]
            assert row["answer"] not in row["question"]
        elif row["relations"] == ["country", "country"]:
            assert row["answer"] == ("yes" if values[0] == values[1] else "no")
        else:
            assert values[0] != values[1]
            assert row["answer"] == row["path"][values.index(min(values))]


def test_comparisons_cannot_be_guessed_from_their_form(wiki: MiniWiki) -> None:
    rows = [row for row in wiki.train if row["type"] == "comparison"]
    first = [row["answer"] == row["path"][0] for row in rows if row["answer"] in row["path"]]
    assert 0.4 < sum(first) / len(first) < 0.6
    closed = Counter(row["answer"] for row in rows if row["relations"] == ["country", "country"])
    assert closed["yes"] == closed["no"] > 0


def test_the_tempting_link_leads_to_a_wrong_answer(wiki: MiniWiki) -> None:
    rows = [row for row in wiki.train + wiki.validation if row["relations"][0] in TEMPTING_RELATION]
    assert len(rows) > 1000
    for row in rows:
        wrong = [TEMPTING_RELATION[row["relations"][0]], *row["relations"][1:]]
        assert wiki.follow(row["path"][0], wrong)[1] != row["answer"]


def test_every_title_finds_its_passage_first(wiki: MiniWiki) -> None:
    retriever = BM25Retriever(wiki.passages)
    assert [passage.title for passage in wiki.passages if retriever.search(passage.title, 1) != [passage]] == []
