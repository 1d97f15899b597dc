"""The search environment: look things up in a corpus step by step, then answer."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal

from ...errors import ConfigurationError, DataError
from .retrieval import Passage, Retriever
from .scoring import exact_match, f1

_ANSWERED = "Answered."
_SCORES: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match, "f1": f1}


class HotpotQAEnvironment:
    """
    Question answering over a corpus, as a TRL environment: the tools are `search` and `answer`.

    The episode is over when `answer` is called (`done` becomes true); the first answer counts. An episode that ends
    without one scores 0. Give the trainer a factory: every episode in flight needs an environment of its own, and all
    of them may share one retriever.

    Args:
        retriever ([`Retriever`]):
            What `search` asks.
        top_k (`int`, *optional*, defaults to `3`):
            Passages that a search returns at most.
        reward (`str`, *optional*, defaults to `"exact_match"`):
            What `get_reward` returns for the answer: `"exact_match"` or `"f1"`.

    Example:
    ```python
    from functools import partial

    from trl_steppo.environments.hotpotqa import HotpotQAEnvironment, hotpotqa_dataset

    train_dataset, eval_dataset, retriever = hotpotqa_dataset("mini_wiki")
    environment_factory = partial(HotpotQAEnvironment, retriever=retriever)
    ```
    """

    def __init__(
        self, retriever: Retriever, top_k: int = 3, reward: Literal["exact_match", "f1"] = "exact_match"
    ) -> None:
        if top_k < 1:
            raise ConfigurationError(f"top_k is {top_k}; a search has to return at least 1 passage")
        if reward not in _SCORES:
            raise ConfigurationError(f"reward is {reward!r}; it has to be one of {', '.join(map(repr, _SCORES))}")
        self._retriever = retriever
        self._top_k = top_k
        self._reward = reward
        # Attributes and not methods: TRL's trainers, too, play this class, and offer every public method as a tool.
        self.metrics: Callable[[], dict[str, float]] = partial(self._metrics)
        self.state_key: Callable[[], Hashable] = partial(self._state_key)
        self.done = False
        self._right_answers: list[str] = []
        self._given_answer: str | None = None
        self._num_searches = 0
        self._seen_titles: set[str] = set()

    def reset(self, answer: str | None = None, answer_aliases: Sequence[str] | None = None, **row: Any) -> None:
        """Start an episode from a dataset row; its `answer`, or one of `answer_aliases`, is what has to be found."""
        if not isinstance(answer, str) or not answer.strip():
            raise DataError(
                f"the row {row.get('id', '')!r} has the answer {answer!r}; `HotpotQAEnvironment` scores against a "
                "column `answer` that holds text"
            )
        self.done = False
        self._right_answers = [answer, *(answer_aliases or [])]
        self._given_answer = None
        self._num_searches = 0
        self._seen_titles = set()

    def search(self, query: str) -> str:
        """
        Search the wiki.

        Args:
            query: What to look up.

        Returns:
            The best passages.
        """
        if self.done:
            return _ANSWERED
        passages = self._retriever.search(str(query), self._top_k)
        self._num_searches += 1
        self._seen_titles.update(passage.title for passage in passages)
        return format_passages(passages)

    def answer(self, text: str) -> str:
        """
        Give the final answer.

        Args:
            text: The answer alone, as short as possible.

        Returns:
            A confirmation.
        """
        if not self.done:
            self._given_answer = str(text)  # a model may well send a year as a number
            self.done = True
        return _ANSWERED

    def get_reward(self) -> float:
        """The score of the given answer; 0.0 where none was given."""
        return self._score(_SCORES[self._reward])

    def _metrics(self) -> dict[str, float]:
        return {
            "exact_match": self._score(exact_match),
            "f1": self._score(f1),
            "answered": float(self._given_answer is not None),
            "num_searches": float(self._num_searches),
        }

    def _state_key(self) -> Hashable:
        # What is known, however it was found: two orders of the same searches are one state.
        return tuple(sorted(self._seen_titles))

    def _score(self, score: Callable[[str, str], float]) -> float:
        given = self._given_answer
        return 0.0 if given is None else max(score(given, right) for right in self._right_answers)


def format_passages(passages: Sequence[Passage]) -> str:
    """
    Passages as the model reads them: one numbered line each.

    Args:
        passages (`Sequence[Passage]`):
            What a search found.

    Returns:
        `str`: Lines `[1] Title: text`, or `No results.`
    """
    lines = (f"[{i}] {passage.title}: {passage.text}" for i, passage in enumerate(passages, start=1))
    return "\n".join(lines) or "No results."
