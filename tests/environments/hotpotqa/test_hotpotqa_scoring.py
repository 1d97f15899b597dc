from __future__ import annotations

import string
from random import Random

import pytest

from trl_steppo.environments.hotpotqa import exact_match, f1, normalize_answer, valid_calls


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("The Grapes of Wrath", "grapes of wrath"),
        ("  a  tale\tof an\nend ", "tale of end"),
        ('"Now and Then" (1995)', "now and then 1995"),
        ("M. Night Shyamalan", "m night shyamalan"),
        ("Theatre Anna", "theatre anna"),  # articles are whole words
        ("a.k.a.", "aka"),  # punctuation goes first: no article appears in between
        ("the-end", "theend"),
        ("the–end", "–end"),  # an en dash is no ASCII punctuation: it stays, and the article ends at it
        ("Gesellschaft mit beschränkter Haftung", "gesellschaft mit beschränkter haftung"),
        ("The", ""),
        ("", ""),
    ],
)
def test_normalize_answer(text: str, normalized: str) -> None:
    assert normalize_answer(text) == normalized


@pytest.mark.parametrize(
    ("prediction", "answer", "em", "score"),
    [
        ("the John Ford!", "John Ford", 1.0, 1.0),
        ("John", "John Ford", 0.0, 2 / 3),  # precision 1, recall 1/2
        ("John Ford and others", "John Ford", 0.0, 2 / 3),  # precision 1/2, recall 1
        ("John John", "John Ford", 0.0, 1 / 2),  # a repeated word counts once where it is asked for once
        ("Ford John", "John Ford", 0.0, 1.0),
        ("Howard Hawks", "John Ford", 0.0, 0.0),
        ("Yes.", "yes", 1.0, 1.0),
        ("yes he was", "yes", 0.0, 0.0),  # 1/2 if the words were counted
        ("no", "no country for old men", 0.0, 0.0),
        ("noanswer", "noanswer given", 0.0, 0.0),
        ("yes", "no", 0.0, 0.0),
        ("VÉLEZ", "vélez", 1.0, 1.0),
        ("Velez", "vélez", 0.0, 0.0),
        ("", "John Ford", 0.0, 0.0),
        ("", "the", 1.0, 0.0),  # the same, but no word is shared
    ],
)
def test_scores(prediction: str, answer: str, em: float, score: float) -> None:
    assert exact_match(prediction, answer) == em
    assert f1(prediction, answer) == pytest.approx(score)
    assert f1(answer, prediction) == pytest.approx(score)


def _restated_f1(prediction: str, answer: str) -> float:
    """The same by other means: words crossed out one by one, no regular expression, no counter."""

    def words(text: str) -> list[str]:
        kept = "".join(char for char in text.lower() if char not in string.punctuation)
        return [word for word in kept.split() if word not in ("a", "an", "the")]

    given, right = words(prediction), words(answer)
    if given != right and any(side in (["yes"], ["no"], ["noanswer"]) for side in (given, right)):
        return 0.0
    left, shared = list(right), 0
    for word in given:
        if word in left:
            left.remove(word)
            shared += 1
    return 2 * shared / (len(given) + len(right)) if shared else 0.0


def test_f1_matches_a_restatement_on_random_texts() -> None:
    rng = Random(0)
    pieces = ["The", "a", "an", "cat", "Cat,", "dog", "yes", "no", "no.", "noanswer", "été", "1940", "--", "(a)", ""]
    scores = []
    for _ in range(3000):
        prediction, answer = (" ".join(rng.choices(pieces, k=rng.randrange(5))) for _ in range(2))
        assert f1(prediction, answer) == pytest.approx(_restated_f1(prediction, answer)), (prediction, answer)
        scores.append(f1(prediction, answer))
    assert {0.0, 1.0} < set(scores)  # partial scores occurred as well


def test_valid_calls_are_counted_by_response():
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "search"}}]}
    found, failed = {"role": "tool", "content": "[1] Dog"}, {"role": "tool", "content": "Error: unknown tool"}
    said = {"role": "assistant", "content": "a dog"}
    episodes = [
        [call, found, call, found],
        [call, found, said],
        [call, found, failed, call, found],
        [said],
        [said, failed],
    ]
    assert valid_calls(completions=episodes, answer=["x"] * 5) == [1.0, 0.5, 0.5, 0.0, 0.0]
