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


# -- HotpotQA's definition, read again: no code or regular expression of ours -----------------------------------------


def _words(text: str) -> list[str]:
    """
    Lower case; no ASCII punctuation; articles out, which stand between characters that no word has; split at white
    space. A word there is what `\\w` means: letters, digits and the underscore, which went as punctuation.
    """
    kept = "".join(char for char in text.lower() if char not in string.punctuation)
    pieces, piece = [], ""
    for char in kept:
        if char.isalnum():
            piece += char
        else:
            pieces += [piece, char]
            piece = ""
    return "".join(" " if piece in ("a", "an", "the") else piece for piece in [*pieces, piece]).split()


def _restated_em(prediction: str, answer: str) -> float:
    return 1.0 if _words(prediction) == _words(answer) else 0.0


def _restated_f1(prediction: str, answer: str) -> float:
    """Words crossed out one by one; yes, no and noanswer are right or wrong as a whole."""
    given, right = _words(prediction), _words(answer)
    if given != right and any(side in (["yes"], ["no"], ["noanswer"]) for side in (given, right)):
        return 0.0
    left, shared = list(right), 0
    for word in given:
        if word in left:
            left.remove(word)
            shared += 1
    return 2 * shared / (len(given) + len(right)) if shared else 0.0


def test_scores_are_those_of_the_definition_on_ten_thousand_random_pairs() -> None:
    rng = Random(0)
    pieces = [
        *("The", "a", "an", "AN", "the", "a.", "th-e", "(a)", "–the", "the–end", "a\u00a0b", "theatre", "\ta\n"),
        *("cat", "Cat,", "dog", "1940", "1,940", "--", "!?", "_", "“cat”", "", " "),
        *("yes", "Yes.", "no", "no,", "noanswer", "NoAnswer", "no answer"),
        *("été", "e\u0301te\u0301", "Straße", "İzmir", "ΣΑΣ", "東京", "🦊", "½", "٣", "M.", "U.S."),
    ]
    seen_em, seen_f1 = set(), set()
    for _ in range(10_000):
        answer = " ".join(rng.choices(pieces, k=rng.randrange(5)))
        changed = answer if rng.random() < 0.3 else " ".join(rng.choices(pieces, k=rng.randrange(5)))
        prediction = changed + rng.choice(["", "", ".", " the", "a"])
        assert exact_match(prediction, answer) == _restated_em(prediction, answer), (prediction, answer)
        assert f1(prediction, answer) == pytest.approx(_restated_f1(prediction, answer)), (prediction, answer)
        seen_em.add(exact_match(prediction, answer))
        seen_f1.add(f1(prediction, answer))
    assert seen_em == {0.0, 1.0}
    assert {0.0, 1.0} < seen_f1  # partial scores occurred as well


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
