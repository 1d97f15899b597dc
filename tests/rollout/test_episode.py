import asyncio
import itertools
import threading
from dataclasses import replace

import pytest

from tests.rollout.scripted import END, LookEnvironment, ScriptedSampler, call
from trl_steppo.environments import make_playable
from trl_steppo.environments.base import MISTAKES
from trl_steppo.episodes import EpisodeRecord, EpisodeSpec
from trl_steppo.errors import DataError, SamplerError
from trl_steppo.inference.base import SamplingParams
from trl_steppo.rollout import EpisodeLimits, run_episode, step_seed
from trl_steppo.types import StopReason

ROW = {"prompt": [{"role": "user", "content": "Find it."}], "answer": "there"}
LOOK, STOP = call("look", where="here"), call("stop")
SAMPLING = SamplingParams(max_new_tokens=100, temperature=0.7)


def play(chat, script, env="look", row=ROW, sampling=SAMPLING, sampler=None, playable=None, **limits):
    """One episode; the script is a text for each step."""
    sampler = sampler or ScriptedSampler(chat, script)
    environment = LookEnvironment() if env == "look" else env
    if environment is not None and playable is None:
        playable = make_playable(environment, tool_timeout_s=10)
    spec = EpisodeSpec(EpisodeLimits(**limits), sampling, run_seed=3, stream_position=5, generation_index=1)
    coroutine = run_episode(playable, row, EpisodeRecord(spec, spec.name), sampler=sampler, chat=chat)
    return asyncio.run(coroutine), sampler


def test_an_episode_from_the_first_prompt_to_the_reward(chat):
    environment = LookEnvironment()
    episode, sampler = play(chat, [LOOK, LOOK, STOP], environment)
    assert (episode.episode_id, episode.stream_position, episode.generation_index) == ("5-1", 5, 1)
    assert (episode.terminated, episode.truncated, episode.error) == (True, False, None)
    assert episode.stop_reason is StopReason.ENVIRONMENT
    assert episode.final_prompt_ids is None
    assert [step.reward for step in episode.steps] == [0.25, 0.25, 1.25]
    assert [step.step_index for step in episode.steps] == [0, 1, 2]
    assert [chat.decode(step.response_ids) + END for step in episode.steps] == [LOOK, LOOK, STOP]
    assert [set(step.rollout_logprobs) for step in episode.steps] == [{-1.0}, {-2.0}, {-3.0}]
    assert {(s.policy_version, s.temperature, s.stop_reason) for s in episode.steps} == {(7, 0.7, StopReason.STOP)}
    assert episode.steps[0].observation == [{"role": "tool", "name": "look", "content": "nothing here"}]
    assert episode.metrics == {"tool_calls": 3, **dict.fromkeys(MISTAKES, 0)}
    assert sampler.released == ["5-1"]
    assert environment.num_rewarded == 1
    assert environment.closed


def test_every_prompt_is_what_rendering_the_whole_conversation_gives(chat):
    episode, sampler = play(chat, [LOOK, LOOK + LOOK.replace(END, ""), STOP])
    messages = list(ROW["prompt"])
    for index, step in enumerate(episode.steps):
        assert step.prompt_ids == chat.render(messages)
        assert sampler.asked[5, 1, index][0] == step.prompt_ids.tolist()
        messages += [chat.parse(step.response_ids).message, *step.observation]


def test_without_a_limit_of_steps_an_episode_goes_on(chat):
    episode, _ = play(chat, [LOOK] * 9 + [STOP], max_interaction_steps=None)
    assert (len(episode.steps), episode.terminated) == (10, True)


def test_all_ids_of_an_episode_share_one_buffer(chat):
    episode, _ = play(chat, [LOOK] * 3, max_interaction_steps=3)
    ids = [x for step in episode.steps for x in (step.prompt_ids, step.response_ids)] + [episode.final_prompt_ids]
    assert len({id(x._storage) for x in ids}) == 1


def test_each_step_has_a_seed_and_stops_of_its_own(chat):
    _, sampler = play(chat, [LOOK, LOOK, STOP])
    params = [params for _, params in sampler.asked.values()]
    assert [p.seed for p in params] == [step_seed(3, 5, 1, index) for index in range(3)]
    assert {replace(p, seed=0) for p in params} == {replace(SAMPLING, stop_token_ids=chat.stop_token_ids)}


def test_given_stop_tokens_are_kept(chat):
    stop = chat.encode_text("e", add_special_tokens=False)[-1]
    _, sampler = play(chat, ["x"], sampling=replace(SAMPLING, stop_token_ids=(stop,)))
    assert sampler.asked[5, 1, 0][1].stop_token_ids == (stop,)


def test_seeds_differ_in_every_component():
    grid = list(itertools.product(range(4), repeat=4))
    seeds = {step_seed(*point) for point in grid}
    assert len(seeds) == len(grid)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(-1, 0, 0, 0) != step_seed(1, 0, 0, 0)
    assert step_seed(42, 7, 3, 2) == 5055445609920911171  # the same on every machine


def test_text_prompts_are_continued_as_text(chat):
    episode, _ = play(chat, [f"nowhere{END}"], row={"prompt": "Where?"})
    assert episode.steps[0].prompt_ids == chat.encode_text("Where?")
    assert episode.terminated


def test_what_reset_returns_is_in_the_prompt(chat):
    episode, _ = play(chat, [STOP], LookEnvironment(reset=lambda: " Look up."))
    assert episode.steps[0].prompt_ids == chat.prepare(ROW["prompt"], " Look up.")


def test_a_row_without_a_prompt_leaves_it_to_reset(chat):
    episode, _ = play(chat, [STOP], LookEnvironment(reset=lambda: "Look up."), row={"answer": "x"})
    assert episode.steps[0].prompt_ids == chat.render([{"role": "user", "content": "Look up."}])


def test_a_row_of_input_ids_is_one_step_without_stop_tokens(chat):
    for env in (None, "look"):
        episode, sampler = play(chat, [LOOK * 3], env, {"input_ids": [5, 6, 7]}, replace(SAMPLING, max_new_tokens=60))
        assert episode.error is None
        assert episode.steps[0].prompt_ids == [5, 6, 7]
        assert sampler.asked[5, 1, 0][1].stop_token_ids == ()
        assert len(episode.steps[0].response_ids) == 60
        assert episode.steps[0].stop_reason is StopReason.LENGTH
        assert (len(episode.steps), episode.terminated) == (1, True)
        assert episode.steps[0].reward == (0.0 if env is None else 1.25)


def test_a_text_observation_becomes_a_user_message_and_the_state_key_is_kept(chat):
    class Guess:
        def reset(self, **row):
            self.guesses = 0

        def step(self, response):
            self.guesses += 1
            return f"wrong {self.guesses}", 0.5, self.guesses == 2

        def state_key(self):
            return ("guesses", self.guesses)

    episode, _ = play(chat, [f"a{END}", f"b{END}"], Guess())
    assert [step.observation for step in episode.steps] == ["wrong 1", "wrong 2"]
    assert [step.info for step in episode.steps] == [{"state_key": ("guesses", 0)}, {"state_key": ("guesses", 1)}]
    said = [*ROW["prompt"], {"role": "assistant", "content": "a"}, {"role": "user", "content": "wrong 1"}]
    assert episode.steps[1].prompt_ids == chat.render(said)


def test_a_rewritten_prompt_is_what_the_environment_says_and_sampled_ids_stay_as_they_are(chat):
    class Notes(LookEnvironment):
        def state_prompt(self, observation):
            seen = "" if observation == "" else observation[0]["content"]
            return [{"role": "user", "content": f"Notes: {seen}"}]

    episode, sampler = play(chat, [LOOK, LOOK, LOOK], Notes(reset=lambda: " Go on."), max_interaction_steps=3)
    notes = [{"role": "user", "content": "Notes: nothing here"}]
    prompts = [chat.render([{"role": "user", "content": "Notes:  Go on."}]), chat.render(notes), chat.render(notes)]
    assert [step.prompt_ids for step in episode.steps] == prompts
    assert [sampler.asked[5, 1, index][0] for index in range(3)] == prompts
    assert [chat.decode(step.response_ids) + END for step in episode.steps] == [LOOK] * 3
    assert episode.final_prompt_ids == chat.render(notes)


def test_a_rewritten_prompt_may_be_left_to_the_chat(chat):
    class Sometimes(LookEnvironment):
        def state_prompt(self, observation):
            return "Begin." if observation == "" else None

    episode, _ = play(chat, [LOOK, STOP], Sometimes())
    first, second = episode.steps
    assert first.prompt_ids == chat.encode_text("Begin.")
    after = chat.append(first.observation, tool_call_names=["look"])
    assert second.prompt_ids == [*first.prompt_ids, *first.response_ids, *after]
    broken, _ = play(chat, [STOP], type("Broken", (LookEnvironment,), {"state_prompt": lambda self, observation: 3})())
    assert "TypeError: state_prompt() returned int" in broken.error


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_a_cut_response_is_played_and_its_end_of_turn_is_context(chat):
    budget = len(chat.encode_text(LOOK, add_special_tokens=False)) - 3
    episode, _ = play(chat, [LOOK, "done"], sampling=replace(SAMPLING, max_new_tokens=budget))
    cut, after = episode.steps
    assert cut.stop_reason is StopReason.LENGTH
    assert "closing </tool_call> is missing" in cut.observation[0]["content"]
    between = after.prompt_ids[len(cut.prompt_ids) + budget :].tolist()
    assert between == [chat.end_of_turn_id, *chat.append(cut.observation, tool_call_names=["error"])]
    assert episode.metrics["malformed_tool_calls"] == 1


def test_the_interaction_limit_truncates_and_keeps_the_state(chat):
    environment = LookEnvironment()
    episode, _ = play(chat, [LOOK] * 9, environment, max_interaction_steps=2)
    assert (episode.truncated, episode.terminated, len(episode.steps)) == (True, False, 2)
    assert episode.stop_reason is StopReason.MAX_INTERACTION_STEPS
    last = episode.steps[-1]
    after = chat.append(last.observation, tool_call_names=["look"])
    assert episode.final_prompt_ids == [*last.prompt_ids, *last.response_ids, *after]
    assert (last.reward, environment.num_rewarded) == (1.25, 1)


def test_a_state_beyond_the_prompt_length_truncates(chat):
    prompt_length = len(chat.render(ROW["prompt"]))
    episode, _ = play(chat, [LOOK] * 9, max_prompt_length=prompt_length + 1)
    assert (episode.truncated, episode.stop_reason, len(episode.steps)) == (True, StopReason.MAX_PROMPT_LENGTH, 1)
    assert len(episode.final_prompt_ids) > prompt_length + 1


def test_a_first_prompt_beyond_a_budget_fails_with_both_numbers(chat):
    prompt_length = len(chat.render(ROW["prompt"]))
    for budget in ("max_prompt_length", "max_episode_tokens"):
        episode, sampler = play(chat, [LOOK], **{budget: 10})
        assert f"{prompt_length} tokens; `{budget}` is 10" in episode.error
        assert episode.stop_reason is StopReason.ERROR
        assert (episode.steps, sampler.asked, sampler.released) == ((), {}, ["5-1"])


def test_an_episode_ends_before_a_step_that_has_no_tokens_left(chat):
    whole, _ = play(chat, [LOOK] * 2, max_interaction_steps=2)
    episode, _ = play(chat, [LOOK] * 9, max_episode_tokens=len(whole.steps[1].prompt_ids))
    assert (len(episode.steps), episode.stop_reason) == (1, StopReason.MAX_EPISODE_TOKENS)
    assert episode.final_prompt_ids == whole.steps[1].prompt_ids


def test_a_response_cut_by_the_episodes_budget_is_played_and_truncates(chat):
    prompt_length = len(chat.render(ROW["prompt"]))
    episode, sampler = play(chat, ["long" * 99], max_episode_tokens=prompt_length + 4)
    assert sampler.asked[5, 1, 0][1].max_new_tokens == 4
    assert len(episode.steps[0].response_ids) == 4
    assert (episode.truncated, episode.stop_reason) == (True, StopReason.MAX_EPISODE_TOKENS)
    cut = episode.steps[0]
    assert episode.final_prompt_ids == [*cut.prompt_ids, *cut.response_ids]  # it called no tool: nothing follows


def test_a_response_that_fits_into_what_is_left_does_not_truncate(chat):
    length = len(chat.render(ROW["prompt"])) + len(chat.encode_text(STOP, add_special_tokens=False))
    episode, _ = play(chat, [STOP], max_episode_tokens=length)
    assert episode.terminated


class Answers:
    """Takes the whole response; ends the episode with it or does not."""

    def __init__(self, done):
        self.done = done

    def reset(self, **row):
        return None

    def step(self, response):
        return "go on", 1.0, self.done


CUT = replace(SAMPLING, max_new_tokens=40)
LONG = "it is there " * 40


@pytest.mark.parametrize(
    ("script", "env", "row", "sampling", "reason"),
    [
        # One step: only a complete response ends it by itself
        (LONG, None, ROW, CUT, StopReason.RESPONSE_LENGTH),
        (f"there{END}", None, ROW, CUT, StopReason.ENVIRONMENT),
        (LONG, None, {"prompt": "Where?"}, CUT, StopReason.RESPONSE_LENGTH),
        # Tools: the first response that calls none ends it, if it is complete
        (LONG, "look", ROW, CUT, StopReason.RESPONSE_LENGTH),
        (f"there{END}", "look", ROW, CUT, StopReason.ENVIRONMENT),
        # The environment ends it, whatever the response
        (STOP.removesuffix(END) + LONG, "look", ROW, CUT, StopReason.ENVIRONMENT),
        (LONG, Answers(True), ROW, CUT, StopReason.ENVIRONMENT),
        # Ids without an end token: their full length is planned
        (LONG, None, {"input_ids": [5, 6]}, CUT, StopReason.ENVIRONMENT),
        (LONG, Answers(False), {"input_ids": [5, 6]}, CUT, StopReason.ENVIRONMENT),
        # Ids with one
        (LONG, None, {"input_ids": [5, 6]}, replace(CUT, stop_token_ids=(0,)), StopReason.RESPONSE_LENGTH),
        (LONG, Answers(False), {"input_ids": [5, 6]}, replace(CUT, stop_token_ids=(0,)), StopReason.RESPONSE_LENGTH),
        (LONG, Answers(True), {"input_ids": [5, 6]}, replace(CUT, stop_token_ids=(0,)), StopReason.ENVIRONMENT),
    ],
)
def test_a_cut_last_response_truncates_unless_the_environment_ended_the_episode(
    chat, script, env, row, sampling, reason
):
    episode, _ = play(chat, [script], env, row, sampling)
    (step,) = episode.steps
    assert (episode.error, episode.stop_reason) == (None, reason)
    assert episode.truncated == (reason is StopReason.RESPONSE_LENGTH)
    assert episode.terminated == (reason is StopReason.ENVIRONMENT)
    assert episode.final_prompt_ids == ([*step.prompt_ids, *step.response_ids] if episode.truncated else None)


def test_an_environment_that_ends_the_episode_outranks_a_budget_that_cut_the_response(chat):
    prompt_length = len(chat.render(ROW["prompt"]))
    for done, reason in ((True, StopReason.ENVIRONMENT), (False, StopReason.MAX_EPISODE_TOKENS)):
        episode, _ = play(chat, [LONG], Answers(done), max_episode_tokens=prompt_length + 4)
        assert (episode.stop_reason, len(episode.steps)) == (reason, 1)


def test_ids_that_the_episodes_budget_cuts_are_truncated(chat):
    """Their planned length is `response_length`, and not what the episode's budget leaves."""
    episode, _ = play(chat, [LONG], None, {"input_ids": [5, 6]}, CUT, max_episode_tokens=12)
    assert (episode.stop_reason, len(episode.steps[0].response_ids)) == (StopReason.MAX_EPISODE_TOKENS, 10)


def test_time_up_before_the_next_prompt_is_known_ends_behind_the_response(chat):
    class Slow(LookEnvironment):
        def state_prompt(self, observation):
            if observation != "":
                threading.Event().wait()

    episode, _ = play(chat, [LOOK], Slow(), max_episode_s=0.2)
    (step,) = episode.steps
    assert episode.stop_reason is StopReason.MAX_EPISODE_S
    assert episode.final_prompt_ids == [*step.prompt_ids, *step.response_ids]


class Forever(ScriptedSampler):
    """Answers the first step; the others never."""

    async def sample(self, prompt_ids, params, **kwargs):
        if kwargs["order"][2] >= self.answers:
            await asyncio.Event().wait()
        return await super().sample(prompt_ids, params, **kwargs)

    answers = 1


def test_time_up_truncates_behind_the_last_complete_step(chat):
    hangs = LookEnvironment(look=threading.Event().wait)
    for sampler, environment in (
        (Forever(chat, LOOK), LookEnvironment()),
        (ScriptedSampler(chat, [call("look", wher="x"), LOOK]), hangs),
    ):
        episode, _ = play(chat, None, environment, sampler=sampler, max_episode_s=0.2)
        assert (episode.truncated, episode.stop_reason) == (True, StopReason.MAX_EPISODE_S)
        assert len(episode.steps) == 1
        assert len(episode.final_prompt_ids) > len(episode.steps[0].prompt_ids)
        assert episode.steps[0].reward == 1.25
        assert sampler.released == ["5-1"]


def test_time_up_before_the_first_step_is_complete_fails(chat):
    sampler = Forever(chat, LOOK)
    sampler.answers = 0
    episode, _ = play(chat, None, sampler=sampler, max_episode_s=0.05)
    assert "the episode took longer than 0.05 s" in episode.error
    assert sampler.released == ["5-1"]


def test_an_environments_own_time_limit_is_a_failure_and_no_budget(chat):
    environment = LookEnvironment()
    rewards = iter([lambda: 0.25, threading.Event().wait])
    environment.step_reward = lambda: next(rewards)()
    playable = make_playable(environment, environment_timeout_s=0.05)
    episode, _ = play(chat, [LOOK, LOOK], environment, playable=playable, max_episode_s=20)
    assert episode.error.startswith("environment step 1: CallTimeoutError: step_reward() took longer than 0.05 s")
    assert len(episode.steps) == 1


# -- what breaks ------------------------------------------------------------------------------------------------------


def test_an_error_fails_the_episode_and_keeps_its_steps(chat):
    def broken():
        raise ValueError("broken on purpose")

    for stage, num_steps in (("reset", 0), ("get_reward", 2)):
        environment = LookEnvironment(**{stage: broken})
        episode, sampler = play(chat, [LOOK, STOP], environment)
        assert episode.error.startswith(f"{stage}: ValueError: broken on purpose (")
        assert "test_episode.py" in episode.error
        assert (len(episode.steps), episode.stop_reason) == (num_steps, StopReason.ERROR)
        assert not episode.terminated
        assert not episode.truncated
        assert sampler.released == ["5-1"]
        assert environment.closed


def test_a_sampler_that_breaks_is_no_fault_of_the_episode(chat):
    environment = LookEnvironment()
    sampler = ScriptedSampler(chat, lambda order: [LOOK][order[2]])
    with pytest.raises(SamplerError, match="episode 5-1, sampling step 1: IndexError"):
        play(chat, None, environment, sampler=sampler)
    assert environment.closed


def test_a_request_that_no_sampler_can_answer_fails_the_episode(chat):
    def refuse(order):
        raise DataError("too long")

    episode, sampler = play(chat, None, sampler=ScriptedSampler(chat, refuse))
    assert episode.error.startswith("sampling step 0: DataError: too long")
    assert sampler.released == ["5-1"]


def test_an_empty_response_fails_the_episode(chat):
    class Empty(ScriptedSampler):
        async def sample(self, *args, **kwargs):
            return replace(await super().sample(*args, **kwargs), token_ids=(), logprobs=())

    episode, _ = play(chat, None, sampler=Empty(chat, LOOK))
    assert "empty response" in episode.error


def test_a_row_with_nothing_to_read_fails_and_names_its_columns(chat):
    assert "['text']" in play(chat, ["x"], None, {"text": "x"})[0].error


def test_a_prompt_without_a_chat_format_fails(chat):
    episode, _ = play(None, None, None, sampler=ScriptedSampler(chat, "x"))
    assert "needs a chat format" in episode.error


def test_an_error_in_close_does_not_fail_the_episode(chat):
    environment = LookEnvironment()
    environment.close = lambda: 1 / 0
    assert play(chat, [STOP], environment)[0].valid


def test_keyboard_interrupts_are_not_caught(chat):
    def interrupt(order):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        play(chat, None, sampler=ScriptedSampler(chat, interrupt))


# -- texts that cannot fit --------------------------------------------------------------------------------------------


class Flood(LookEnvironment):
    """Answers every response with a text that no prompt can hold."""

    look = stop = None

    def __init__(self, text="x" * 4_000_000, **behaviour):
        super().__init__(**behaviour)
        self.text = text

    def step(self, response):
        return self.text, 1.0, False


def untouched(chat, monkeypatch, longest=10_000):
    """Fails if a long text is tokenized."""
    encode = chat._tokenizer.encode

    def checked(text, **settings):
        assert len(text) <= longest, "a text that cannot fit was tokenized"
        return encode(text, **settings)

    monkeypatch.setattr(chat._tokenizer, "encode", checked)


@pytest.mark.parametrize(("budget", "limit"), [("max_prompt_length", 200), ("max_episode_tokens", 300)])
@pytest.mark.parametrize("rewrites", [False, True])
def test_an_observation_that_cannot_fit_is_never_tokenized(chat, monkeypatch, budget, limit, rewrites):
    class Rewrites(Flood):
        def state_prompt(self, observation):
            return [{"role": "user", "content": observation}] if observation else "Go."

    untouched(chat, monkeypatch)
    episode, _ = play(chat, [f"a{END}"], (Rewrites if rewrites else Flood)(), row={"prompt": "Go."}, **{budget: limit})
    assert (episode.stop_reason, episode.truncated, episode.error) == (StopReason(budget), True, None)
    assert len(episode.final_prompt_ids or []) < 100  # nobody could read what was observed
    assert [step.reward for step in episode.steps] == [2.0]
    assert chat.decode(episode.steps[0].response_ids) == "a"


def test_the_last_step_ends_by_the_number_of_steps_whatever_is_observed(chat, monkeypatch):
    untouched(chat, monkeypatch)
    limits = {"max_prompt_length": 200, "max_interaction_steps": 1}
    episode, _ = play(chat, [f"a{END}"], Flood(), row={"prompt": "Go."}, **limits)
    assert episode.stop_reason is StopReason.MAX_INTERACTION_STEPS


@pytest.mark.parametrize("row", [{"prompt": "Go."}, {"prompt": [{"role": "user", "content": ""}]}, {"input_ids": [5]}])
def test_a_first_prompt_that_cannot_fit_is_never_tokenized(chat, monkeypatch, row):
    untouched(chat, monkeypatch)
    episode, _ = play(chat, [STOP], LookEnvironment(reset=lambda: "x" * 4_000_000), row=row, max_prompt_length=1000)
    assert "the first prompt has at least" in episode.error
    assert "`max_prompt_length` is 1000" in episode.error


def test_a_long_text_is_tokenized_beside_the_loop(chat, monkeypatch):
    threads = []
    encode = chat._tokenizer.encode
    monkeypatch.setattr(
        chat._tokenizer, "encode", lambda *args, **kw: threads.append(threading.get_ident()) or encode(*args, **kw)
    )
    play(chat, [f"a{END}"] * 2, Flood("x" * 100_000), row={"prompt": "Go."}, max_interaction_steps=1)
    assert threads[0] == threading.get_ident()
    assert threads[-1] != threading.get_ident()
