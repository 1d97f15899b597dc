import asyncio
import copy
import math
import sys

import pytest
from scripted import LookEnvironment, ScriptedSampler, call

from trl_steppo.environments import make_playable
from trl_steppo.errors import ConfigurationError, RolloutError
from trl_steppo.inference.base import SamplingParams
from trl_steppo.rollout import EpisodeLimits, EpisodeRequest, play_episodes, score_episodes
from trl_steppo.rollout.rewards import check_reward_funcs, within_float32
from trl_steppo.types import Episode, StopReason

LOOK, STOP = call("look", where="here"), call("stop")
FAILED = Episode("f", 9, 0, (), False, False, error="reset: ValueError: no", stop_reason=StopReason.ERROR)
ROWS = [{"prompt": [{"role": "user", "content": text}], "answer": text} for text in ("a", "b")]


@pytest.fixture(scope="module")
def episodes(chat):
    return play_episodes(
        [EpisodeRequest(row, index) for index, row in enumerate(ROWS)],
        lambda row: make_playable(LookEnvironment()),
        ScriptedSampler(chat, lambda order: [LOOK, STOP][order[2]]),
        chat=chat,
        limits=EpisodeLimits(),
        sampling=SamplingParams(max_new_tokens=200),
        run_seed=0,
    )


def test_a_reward_function_sees_what_grpo_trainer_shows_it(chat, episodes):
    seen = {}

    def remember(prompts, completions, completion_ids, answer, **kwargs):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, answer=answer, **kwargs)
        return [0.0, 0.0]

    score_episodes(
        [remember], None, [episodes[0], FAILED, episodes[1]], [ROWS[0], {}, ROWS[1]], chat=chat, extra={"x": 1}
    )
    assert seen["prompts"] == [row["prompt"] for row in ROWS]
    assert seen["answer"] == ["a", "b"]
    assert seen["x"] == 1
    assert [message["role"] for message in seen["completions"][0]] == ["assistant", "tool", "assistant", "tool"]
    assert seen["completions"][0][0]["tool_calls"][0]["function"] == {"name": "look", "arguments": {"where": "here"}}
    assert seen["completions"][0][1]["content"] == "nothing here"
    first, last = episodes[0].steps
    assert [*first.prompt_ids, *seen["completion_ids"][0]] == [*last.prompt_ids, *last.response_ids]


def test_the_weighted_sum_lands_on_the_last_step(chat, episodes):
    def one(prompts, **kwargs):
        return [1.0, 2.0]

    async def two(prompts, **kwargs):
        return [10.0, None]

    scored = score_episodes([one, two], [1.0, 0.5], [*episodes, FAILED], [*ROWS, {}], chat=chat)
    before = [[step.reward for step in episode.steps] for episode in episodes]
    assert [[step.reward for step in episode.steps] for episode in scored[:2]] == [
        [before[0][0], before[0][1] + 6.0],
        [before[1][0], before[1][1] + 2.0],
    ]
    assert {k: v for k, v in scored[0].metrics.items() if "/" in k} == {"rewards/one": 1.0, "rewards/two": 10.0}
    assert "rewards/two" not in scored[1].metrics
    assert scored[2] is FAILED


def test_two_functions_of_one_name_are_two_rewards(chat, episodes):
    funcs = [lambda prompts, **kwargs: [1.0, 1.0], lambda prompts, **kwargs: [2.0, 2.0]]
    scored = score_episodes(funcs, None, episodes, ROWS, chat=chat)
    assert [v for k, v in scored[0].metrics.items() if k.startswith("rewards/")] == [1.0, 2.0]


def test_text_prompts_have_text_completions(chat, episodes):
    seen = []

    def remember(prompts, completions, **kwargs):
        seen.extend(completions)
        return [0.0]

    score_episodes([remember], None, episodes[:1], [{"prompt": "a"}], chat=chat)
    assert seen[0].startswith("<tool_call>")
    assert "nothing here" in seen[0]
    score_episodes([remember], None, episodes[:1], [{"input_ids": [1]}], decode=lambda ids: f"{len(ids)} ids")
    assert seen[1].endswith(" ids")


def test_every_function_has_arguments_of_its_own(chat, episodes):
    """What one changes neither the next one nor the dataset sees; rows of one group hold the same objects."""
    facts = ["a"]
    rows = [{"prompt": ROWS[0]["prompt"], "facts": facts} for _ in ROWS]
    before = copy.deepcopy(rows)

    def takes(prompts, completions, completion_ids, facts, **kwargs):
        prompts[0].clear()
        completions[0].clear()
        completion_ids[0].clear()
        return [float(len(found) + len(found.pop())) for found in facts]

    for found in (score_episodes([takes], None, episodes, rows, chat=chat) for _ in range(2)):
        assert [episode.metrics["rewards/takes"] for episode in found[:2]] == [2.0, 2.0]
    twice = score_episodes([takes, takes], None, episodes, rows, chat=chat)
    assert twice[0].metrics["rewards/takes_2"] == 2.0
    assert rows == before


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_fails_its_episode(chat, episodes, reward):
    def odd(prompts, **kwargs):
        return [1.0, reward]

    scored = score_episodes([odd], None, episodes, ROWS, chat=chat)
    assert scored[0].valid
    assert "`odd` returned" in scored[1].error
    assert scored[1].stop_reason is StopReason.ERROR


def test_a_function_that_breaks_is_named(chat, episodes):
    def breaks(prompts, **kwargs):
        raise ValueError("on purpose")

    async def breaks_later(prompts, **kwargs):
        raise ValueError("on purpose")

    def too_few(prompts, **kwargs):
        return [1.0]

    for func in (breaks, breaks_later, too_few, lambda prompts, **kwargs: ["x", "y"]):
        with pytest.raises(RolloutError, match=f"`{func.__name__}`"):
            score_episodes([func], None, episodes, ROWS, chat=chat)


def test_as_many_weights_as_functions(chat, episodes):
    with pytest.raises(ConfigurationError, match=r"`reward_weights` has 2 entries and `reward_funcs` 1"):
        score_episodes([print], [1.0, 2.0], episodes, ROWS, chat=chat)


def test_nothing_to_score_calls_nothing(chat):
    assert score_episodes([None], None, [FAILED], [{}], chat=chat) == [FAILED]


def test_a_malformed_call_reaches_a_reward_function_as_its_raw_text(chat):
    malformed = '<tool_call>\n{"name": "look", "arguments": {"where": NaN}}\n</tool_call>'
    (episode,) = play_episodes(
        [EpisodeRequest(ROWS[0], 0)],
        lambda row: make_playable(LookEnvironment()),
        ScriptedSampler(chat, lambda order: [malformed + "<|im_end|>", STOP][order[2]]),
        chat=chat,
        limits=EpisodeLimits(),
        sampling=SamplingParams(max_new_tokens=200),
        run_seed=0,
    )
    seen = []

    def remember(completions, **kwargs):
        seen.extend(completions)
        return [0.0]

    score_episodes([remember], None, [episode], ROWS[:1], chat=chat)
    assert seen[0][0] == {"role": "assistant", "content": malformed}
    assert episode.metrics["malformed_tool_calls"] == 1


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), asyncio.CancelledError(), StopIteration()])
def test_a_function_that_would_end_the_run_is_named(chat, episodes, error):
    def leaves(prompts, **kwargs):
        raise error

    async def leaves_later(prompts, **kwargs):
        raise error

    def leaves_while_it_yields(prompts, **kwargs):
        yield 1.0
        raise error

    for func in (leaves, leaves_later, leaves_while_it_yields):
        with pytest.raises(RolloutError, match=f"`{func.__name__}` failed"):
            score_episodes([func], None, episodes, ROWS, chat=chat)


def test_rewards_may_come_one_by_one(chat, episodes):
    def yields(prompts, **kwargs):
        yield from (1.0, 2.0)

    async def yields_later(prompts, **kwargs):
        yield 1.0
        yield 2.0

    for func in (yields, yields_later, lambda prompts, **kwargs: map(float, (1, 2))):
        scored = score_episodes([func], None, episodes, ROWS, chat=chat)
        assert [episode.metrics[f"rewards/{func.__name__}"] for episode in scored] == [1.0, 2.0]


@pytest.mark.parametrize("reward", [1e300, 1e20, -1e20, 10**400])
def test_a_reward_that_float32_cannot_compute_with_fails_its_episode(chat, episodes, reward):
    scored = score_episodes([lambda prompts, **kwargs: [1.0, reward]], None, episodes, ROWS, chat=chat)
    assert scored[0].valid
    assert "in magnitude" in scored[1].error


def test_rewards_that_are_too_large_together_fail_their_episode(chat, episodes):
    twice = [lambda prompts, **kwargs: [1.0, 1e19]] * 2
    scored = [within_float32(episode) for episode in score_episodes(twice, None, episodes, ROWS, chat=chat)]
    assert scored[0].valid
    assert "add up to 2e+19" in scored[1].error


class Leaves:
    def __float__(self):
        sys.exit(0)

    def __iter__(self):
        sys.exit(0)


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("rewards", [[1.0, Leaves()], Leaves()], ids=["one", "all"])
def test_rewards_whose_own_code_would_end_the_run_are_an_error(chat, episodes, rewards, is_async):
    async def later(prompts, **kwargs):
        return rewards

    func = later if is_async else lambda prompts, **kwargs: rewards
    with pytest.raises(RolloutError, match="SystemExit: 0"):
        score_episodes([func], None, episodes, ROWS, chat=chat)


@pytest.mark.parametrize("weight", [float("nan"), 1e300, "1", None])
def test_weights_are_numbers(chat, episodes, weight):
    with pytest.raises(ConfigurationError, match=r"`reward_weights`\[1\] is"):
        score_episodes([print, print], [1.0, weight], episodes, ROWS, chat=chat)


def test_what_cannot_be_called_is_known_before():
    def needs(completions, answer, difficulty, **kwargs): ...

    def takes_no_more(completions): ...

    columns = ["prompt", "answer"]
    with pytest.raises(ConfigurationError, match=r"`needs`.*'difficulty'.*`prompts`.*\['answer'\]"):
        check_reward_funcs([needs], columns)
    with pytest.raises(ConfigurationError, match=r"`takes_no_more`.*unexpected keyword argument"):
        check_reward_funcs([takes_no_more], columns)
    with pytest.raises(ConfigurationError, match="column `completions`"):
        check_reward_funcs([print], ["prompt", "completions"])
    with pytest.raises(ConfigurationError, match=r"str 'OpenAssistant/reward'.*`reward_model`"):
        check_reward_funcs(["OpenAssistant/reward"], columns)
    check_reward_funcs([needs], [*columns, "difficulty"])
    check_reward_funcs([], ["completions"])
