from __future__ import annotations

import copy
import inspect
from functools import partial

import pytest
from transformers.utils import get_json_schema

from trl_steppo.environments.base import RESERVED_NAMES, ToolEnvironment
from trl_steppo.environments.hotpotqa import BM25Retriever, HotpotQAEnvironment, MiniWiki, Passage, make_mini_wiki
from trl_steppo.environments.hotpotqa.mini_wiki import TEMPTING_RELATION
from trl_steppo.errors import ConfigurationError, DataError

PASSAGES = [Passage("Silent Foxes", "A band."), Passage("The Who", "A rock band."), Passage("Dog", "An animal.")]


@pytest.fixture(scope="module")
def wiki() -> MiniWiki:
    return make_mini_wiki(0)


@pytest.fixture
def environment() -> HotpotQAEnvironment:
    environment = HotpotQAEnvironment(BM25Retriever(PASSAGES), top_k=2)
    environment.reset(question="Which band?", answer="Silent Foxes", prompt=[], id="row-0")
    return environment


def test_search_returns_numbered_lines(environment: HotpotQAEnvironment) -> None:
    assert environment.search("who band") == "[1] The Who: A rock band.\n[2] Silent Foxes: A band."
    assert environment.search("zebra") == environment.search("") == "No results."
    assert environment.metrics()["num_searches"] == 3.0
    assert not environment.done


@pytest.mark.parametrize(
    ("reward", "text", "expected"),
    [
        ("exact_match", "the silent foxes.", 1.0),
        ("exact_match", "foxes", 0.0),
        ("f1", "foxes", 2 / 3),
        ("f1", "dogs", 0.0),
    ],
)
def test_the_answer_is_scored(reward: str, text: str, expected: float) -> None:
    environment = HotpotQAEnvironment(BM25Retriever(PASSAGES), reward=reward)
    environment.reset(answer="Silent Foxes")
    environment.answer(text)
    assert environment.done
    assert environment.get_reward() == pytest.approx(expected)
    assert environment.metrics()[reward] == pytest.approx(expected)
    assert environment.metrics()["answered"] == 1.0


def test_an_episode_without_an_answer_scores_nothing(environment: HotpotQAEnvironment) -> None:
    environment.search("silent foxes")
    assert environment.get_reward() == 0.0
    assert environment.metrics() == {"exact_match": 0.0, "f1": 0.0, "answered": 0.0, "num_searches": 1.0}


def test_the_first_answer_counts_and_nothing_follows_it(environment: HotpotQAEnvironment) -> None:
    environment.answer("The Who")
    environment.answer("Silent Foxes")
    assert environment.search("dog") == "Answered."
    assert environment.get_reward() == 0.0
    assert environment.metrics()["num_searches"] == 0.0
    assert environment.state_key() == ()


def test_arguments_that_are_numbers_are_read_as_text(environment: HotpotQAEnvironment) -> None:
    environment.reset(answer="1975")
    assert environment.search(1975) == "No results."  # type: ignore[arg-type]
    environment.answer(1975)  # type: ignore[arg-type]
    assert environment.get_reward() == 1.0


def test_the_state_is_what_was_seen_in_any_order(environment: HotpotQAEnvironment) -> None:
    other = HotpotQAEnvironment(BM25Retriever(PASSAGES), top_k=2)
    other.reset(answer="Silent Foxes")
    assert environment.state_key() == other.state_key()
    for query in ("dog", "foxes", "foxes"):
        environment.search(query)
    assert environment.state_key() != other.state_key()
    for query in ("silent", "zebra", "animal"):
        other.search(query)
    assert environment.state_key() == other.state_key()
    assert hash(environment.state_key()) == hash(other.state_key())


def test_reset_starts_afresh(environment: HotpotQAEnvironment) -> None:
    fresh = environment.state_key(), environment.metrics()
    environment.search("dog")
    environment.answer("Silent Foxes")
    environment.reset(answer="Dog")
    assert not environment.done
    assert (environment.state_key(), environment.metrics()) == fresh


@pytest.mark.parametrize("answer", [None, "", " ", 7])
def test_a_row_without_an_answer_is_named(environment: HotpotQAEnvironment, answer: object) -> None:
    with pytest.raises(DataError, match=r"row 'row-3' has the answer .*column `answer`"):
        environment.reset(answer=answer, id="row-3")  # type: ignore[arg-type]


def test_settings_that_cannot_work_raise() -> None:
    retriever = BM25Retriever(PASSAGES)
    with pytest.raises(ConfigurationError, match=r"reward is 'em'; .*'exact_match', 'f1'"):
        HotpotQAEnvironment(retriever, reward="em")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="top_k is 0"):
        HotpotQAEnvironment(retriever, top_k=0)


def test_trl_finds_two_tools_and_no_more() -> None:
    environment = partial(HotpotQAEnvironment, retriever=BM25Retriever(PASSAGES))()
    assert isinstance(environment, ToolEnvironment)
    # As TRL's trainers look for them.
    methods = {name for name, _ in inspect.getmembers(environment, inspect.ismethod) if not name.startswith("_")}
    assert methods - {"reset", "get_reward"} == {"search", "answer"}
    assert {"reset", "get_reward", "done", "state_key"} <= RESERVED_NAMES
    for tool, argument in ((environment.search, "query"), (environment.answer, "text")):
        schema = get_json_schema(tool)["function"]
        assert list(schema["parameters"]["properties"]) == schema["parameters"]["required"] == [argument]


def test_a_copy_reports_its_own_episode(environment: HotpotQAEnvironment) -> None:
    copied = copy.deepcopy(environment)
    copied.search("dog")
    assert (environment.metrics()["num_searches"], copied.metrics()["num_searches"]) == (0.0, 1.0)
    assert copied.state_key() == ("Dog",)


def test_scripted_play_of_the_mini_wiki(wiki: MiniWiki) -> None:
    """The right path is always paid; stopping early or following the wrong link never is."""
    environment = HotpotQAEnvironment(BM25Retriever(wiki.passages), top_k=1)

    def play(row: dict, queries: list[str], answer: str) -> float:
        environment.reset(**row)
        for query in queries:
            assert environment.search(query).startswith(f"[1] {query}: ")
        environment.answer(answer)
        return environment.get_reward()

    for row in wiki.train + wiki.validation:
        assert play(row, row["path"], row["answer"]) == 1.0
        if row["type"] == "bridge":
            assert play(row, row["path"][:-1], row["path"][-1]) == 0.0
        if row["relations"][0] in TEMPTING_RELATION:
            relations = [TEMPTING_RELATION[row["relations"][0]], *row["relations"][1:]]
            assert play(row, *wiki.follow(row["path"][0], relations)) == 0.0


# -- two ways to show the state ---------------------------------------------------------------------------------------

ROW = {"question": "Which dog?", "answer": "Dog", "prompt": [{"role": "system", "content": "Search."}]}


def test_a_rewritten_state_shows_what_was_found_and_what_went_wrong() -> None:
    environment = HotpotQAEnvironment(BM25Retriever(PASSAGES), top_k=1, state="rewritten")
    assert environment.reset(**ROW) is None
    system, user = environment.state_prompt("")
    assert system == ROW["prompt"][0]
    assert user["content"] == (
        "Question:\nWhich dog?\n\nSearches so far:\nNone\n\nPassages:\nNone\n\nLast errors:\nNone"
    )
    for query in ("dog", "foxes", "a dog"):
        environment.search(query)
    observation = [{"role": "tool", "name": "x", "content": f"Error: {number}"} for number in range(5)]
    (_, user) = environment.state_prompt([{"role": "tool", "name": "search", "content": "[1] ..."}, *observation])
    assert user["content"] == (
        "Question:\nWhich dog?\n\nSearches so far:\ndog\nfoxes\na dog\n\n"
        "Passages:\n[1] Dog: An animal.\n[2] Silent Foxes: A band.\n\n"
        "Last errors:\nError: 2\nError: 3\nError: 4"
    )


@pytest.mark.parametrize("state", ["chat", "rewritten"])
def test_the_first_search_is_forced(state: str) -> None:
    environment = HotpotQAEnvironment(BM25Retriever(PASSAGES), top_k=1, state=state, force_first_search=True)
    extra = environment.reset(**ROW)
    shown = extra if state == "chat" else environment.state_prompt("")[1]["content"]
    assert "[1] Dog: An animal." in shown
    assert (extra is None) == (state == "rewritten")
    assert environment.state_key() == ("Dog",)


def test_what_is_shown_needs_a_question() -> None:
    environment = HotpotQAEnvironment(BM25Retriever(PASSAGES), state="rewritten")
    with pytest.raises(DataError, match="no column `question`"):
        environment.reset(answer="Dog", id="row-7")
    with pytest.raises(ConfigurationError, match="state is 'rebuilt'"):
        HotpotQAEnvironment(BM25Retriever(PASSAGES), state="rebuilt")  # type: ignore[arg-type]


def test_the_chat_state_is_no_rewritten_one() -> None:
    assert not hasattr(HotpotQAEnvironment(BM25Retriever(PASSAGES)), "state_prompt")
