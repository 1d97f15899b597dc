"""
Scores of answers and of tool calls.

Answers are scored as in HotpotQA's official evaluation: exact match and token F1 after a normalization.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from ...types import Message

_ARTICLE = re.compile(r"\b(?:a|an|the)\b")
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_CLOSED_ANSWERS = ("yes", "no", "noanswer")


def normalize_answer(text: str) -> str:
    """
    Normalize an answer: lower case, without ASCII punctuation, without the articles a, an and the, single spaces.

    Args:
        text (`str`):
            An answer as it was written.

    Returns:
        `str`: The text to compare; it may be empty.

    Example:
    ```python
    >>> normalize_answer("The  Grapes of Wrath!")
    'grapes of wrath'
    ```
    """
    bare = text.lower().translate(_WITHOUT_PUNCTUATION)
    return " ".join(_ARTICLE.sub(" ", bare).split())


def exact_match(prediction: str, answer: str) -> float:
    """
    Whether both answers are the same after [`normalize_answer`].

    Args:
        prediction (`str`):
            The given answer.
        answer (`str`):
            The right answer.

    Returns:
        `float`: 1.0 or 0.0.
    """
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1(prediction: str, answer: str) -> float:
    """
    Harmonic mean of the precision and the recall of the words, counted with their multiplicity.

    The answers yes, no and noanswer are right or wrong as a whole: if one side is one of them and the other side
    differs, the score is 0. It is also 0 if no word is shared, for example between two empty answers.

    Args:
        prediction (`str`):
            The given answer.
        answer (`str`):
            The right answer.

    Returns:
        `float`: Between 0.0 and 1.0.
    """
    given, right = normalize_answer(prediction), normalize_answer(answer)
    if given != right and (given in _CLOSED_ANSWERS or right in _CLOSED_ANSWERS):
        return 0.0
    given_words, right_words = given.split(), right.split()
    num_shared = (Counter(given_words) & Counter(right_words)).total()
    if num_shared == 0:
        return 0.0
    precision, recall = num_shared / len(given_words), num_shared / len(right_words)
    return 2 * precision * recall / (precision + recall)


def valid_calls(completions: Sequence[Sequence[Message]], **columns: object) -> list[float]:
    """
    Reward function: the share of an episode's responses whose tool calls all ran.

    A response without a call is not valid, nor is one with a call that is malformed, unknown, refused or failed.

    Args:
        completions (`Sequence[Sequence[dict]]`):
            For each episode its messages, responses and tool answers.

    Returns:
        `list[float]`: Between 0.0 and 1.0, one for each episode.
    """
    return [_valid_share(messages) for messages in completions]


def _valid_share(messages: Sequence[Message]) -> float:
    valid: list[bool] = []
    for message in messages:
        if message["role"] == "assistant":
            valid.append(bool(message.get("tool_calls")))
        elif str(message["content"]).startswith("Error:"):
            valid[-1] = False
    return sum(valid) / len(valid)
