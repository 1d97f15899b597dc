"""The demonstrations that the built-in policies are warm-started on."""

import random

import pytest

from tests.examples.scripts import load_script
from trl_steppo.environments.hotpotqa import make_mini_wiki


@pytest.fixture(scope="module")
def script():
    return load_script("make_mini_wiki_policy")


@pytest.fixture(scope="module")
def wiki():
    return make_mini_wiki()


def walk_of(script, row):
    return script.Walk(list(zip(row["path"], row["relations"], strict=True)), row["answer"])


def test_a_demonstration_that_thinks_says_what_it_found_and_what_it_needs(script, wiki):
    row = next(row for row in wiki.train if row["kind"] == "film.director.born_in")
    film, director = row["path"]
    assert script.to_calls(wiki, walk_of(script, row), thinks=True) == [
        ("search", film, f"I need the director of {film}.\n"),
        ("search", director, f"The director of {film} is {director}. I need the born city of {director}.\n"),
        (
            "answer",
            row["answer"],
            f"The born city of {director} is {row['answer']}. So the answer is {row['answer']}.\n",
        ),
    ]


def test_one_that_does_not_makes_the_same_calls(script, wiki):
    for row in wiki.train[:50]:
        thinking, silent = (script.to_calls(wiki, walk_of(script, row), thinks=thinks) for thinks in (True, False))
        assert [call[:2] for call in thinking] == [call[:2] for call in silent]
        assert not any(call.thought for call in silent)


def test_demonstrations_are_right_as_often_as_is_asked_and_know_what_they_say(script, wiki):
    args, rng = script.Arguments(output_dir=""), random.Random(0)
    walks = [(row, script.choose_walk(wiki, row, args, rng)) for row in wiki.train]
    right = sum(walk.answer == row["answer"] for row, walk in walks) / len(walks)
    assert args.share_right <= right < args.share_right + 0.1  # half of a comparison's answers are right by chance
    for row, walk in walks:
        titles = [title for title, _ in walk.looked_up]
        assert titles[0] == row["path"][0]
        if row["type"] == "bridge":
            found = [wiki.facts[title][relation] for title, relation in walk.looked_up]
            assert [*titles[1:], walk.answer] == found
