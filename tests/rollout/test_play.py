import asyncio
import signal
import threading
import time
from collections import Counter

import pytest

from tests.rollout.scripted import END, LookEnvironment, ScriptedSampler, call, play_in
from trl_steppo.calls import DaemonThread
from trl_steppo.calls import call as call_others
from trl_steppo.environments import make_playable
from trl_steppo.environments.base import Response
from trl_steppo.environments.slots import Slots
from trl_steppo.errors import RolloutError, SamplerError
from trl_steppo.rollout import EpisodeLimits, EpisodeRequest
from trl_steppo.rollout.loops import run_coroutine

LOOK, STOP = call("look", where="here"), call("stop")
PROMPT = [{"role": "user", "content": "Find it."}]


def play(chat, environments, sampler=None, *, tool_timeout_s=20.0, limits=None, **kwargs):
    """One episode for each environment (or function that makes one); each looks once and stops, unless scripted."""

    def make(row):
        environment = environments[row["index"]]
        return make_playable(
            environment() if callable(environment) else environment,
            tool_timeout_s=tool_timeout_s,
            environment_timeout_s=kwargs.get("environment_timeout_s", 20.0),
        )

    rows = [{"prompt": PROMPT, "index": index} for index in range(len(environments))]
    options = {key: value for key, value in kwargs.items() if key != "environment_timeout_s"}
    return play_in(
        make,
        [EpisodeRequest(row, stream_position=row["index"]) for row in rows],
        sampler or ScriptedSampler(chat, [LOOK, STOP]),
        chat,
        limits=limits or EpisodeLimits(),
        **options,
    )


def fingerprint(episode):
    return [(step.prompt_ids.tolist(), step.response_ids.tolist(), step.reward) for step in episode.steps]


def raises(*args, **row):
    raise ValueError("broken on purpose")


def test_episodes_come_back_in_the_order_of_the_requests(chat):
    sampler = ScriptedSampler(chat, [LOOK, STOP])
    episodes = play(chat, [LookEnvironment] * 5, sampler, id_prefix="eval-")
    assert [episode.episode_id for episode in episodes] == [f"eval-{index}-0" for index in range(5)]
    assert sampler.paced == [True, False]
    assert sorted(sampler.released) == [episode.episode_id for episode in episodes]
    assert play(chat, []) == []


def test_how_many_play_at_a_time_changes_nothing(chat):
    at_once = play(chat, [LookEnvironment] * 5)
    for limit in (1, 2, 9):
        assert play(chat, [LookEnvironment] * 5, max_concurrent_episodes=limit) == at_once


def test_episodes_know_their_row_and_their_question(chat):
    def play_rows(row, **known):
        sampler = ScriptedSampler(chat, f"there{END}")
        return play_in(
            lambda row: None,
            [EpisodeRequest(row, 7, **known)],
            sampler,
            chat,
            max_new_tokens=9,
        )[0]

    known = play_rows({"prompt": PROMPT}, dataset_row=3)
    assert (known.stream_position, known.dataset_row, known.question) == (7, 3, PROMPT)
    failed = play_rows({"question": "Where?"}, dataset_row=4)
    assert (failed.valid, failed.dataset_row, failed.question) == (False, 4, "Where?")
    unknown = play_rows({"prompt": PROMPT})
    assert unknown.dataset_row is None


class Takes(LookEnvironment):
    """Takes the facts out of its row, and adds to the prompt's messages."""

    def reset(self, facts, prompt, **row):
        self.facts = [facts.pop(), facts.pop()]
        prompt[0]["content"] += " Hurry!"

    def look(self, where: str) -> str:
        """
        Look somewhere.

        Args:
            where: The place.
        """
        return self.facts.pop()


@pytest.mark.parametrize("num_accidents", [0, 2])
def test_every_episode_has_a_row_of_its_own(chat, num_accidents):
    """Those of one row, and those that are played again after an accident of the sampler."""
    accidents = []

    def script(order):
        if order[2] == 1 and len(accidents) < num_accidents:
            accidents.append(order)
            raise OSError("out of memory")
        return [LOOK, STOP][order[2]]

    lock = threading.Lock()  # which cannot be copied
    row = {"prompt": [{"role": "user", "content": "Find it."}], "facts": ["a", "b"], "lock": lock}
    episodes = play_in(
        lambda row: make_playable(Takes(), tool_timeout_s=20),
        [EpisodeRequest(row, 0, generation) for generation in range(3)],
        ScriptedSampler(chat, script),
        chat,
    )
    assert row == {"prompt": PROMPT, "facts": ["a", "b"], "lock": lock}
    assert [episode.error for episode in episodes] == [None] * 3
    for episode in episodes:
        assert episode.steps[0].observation[0]["content"] == "a"
        assert episode.question == PROMPT


def test_an_observation_that_the_environment_changes_later_is_recorded_as_it_was(chat):
    class Grows:
        def reset(self, **row):
            self.said, self.keys = [], []

        def step(self, response):
            self.keys.append(response)
            self.said.append({"role": "user", "content": response})
            return self.said, 0.0, len(self.said) == 2

        def state_key(self):
            return self.keys

    (episode,) = play(chat, [Grows], ScriptedSampler(chat, lambda order: f"{order[2]}{END}"))
    assert [[message["content"] for message in step.observation] for step in episode.steps] == [["0"], ["0", "1"]]
    assert [step.info["state_key"] for step in episode.steps] == [[], ["0"]]


def test_state_keys_are_not_computed_where_no_estimator_reads_them():
    class Keyed:
        def reset(self, **row): ...

        def step(self, response):
            return "", 0.0, True

        def state_key(self):
            raise AssertionError

    playable = make_playable(Keyed(), reads_state_keys=False)
    assert asyncio.run(playable.step(Response("", {}))).state_key is None


def test_no_more_than_the_limit_play_at_a_time(chat):
    playing, most = set(), []

    class Counting(LookEnvironment):
        def reset(self, **row):
            playing.add(row["index"])
            most.append(len(playing))

        def get_reward(self):
            playing.clear()
            return 0.0

    play(chat, [Counting] * 6, max_concurrent_episodes=1)
    assert most == [1] * 6


@pytest.mark.parametrize("num_accidents", [1, 2, 3])
def test_an_accident_of_the_sampler_costs_no_episode_until_there_are_too_many(chat, num_accidents):
    accidents = Counter()

    def script(order):
        if order[0] != 1 and order[2] == 1 and accidents[order] < num_accidents:
            accidents[order] += 1
            raise RuntimeError("out of memory")
        return [LOOK, STOP][order[2]]

    sampler = ScriptedSampler(chat, script)
    if num_accidents < 3:
        assert play(chat, [LookEnvironment] * 3, sampler) == play(chat, [LookEnvironment] * 3)
    else:
        with pytest.raises(SamplerError, match="sampling step 1: RuntimeError: out of memory"):
            play(chat, [LookEnvironment] * 3, sampler)


def test_a_sampler_that_has_given_up_is_not_asked_again(chat):
    asked = []

    def script(order):
        asked.append(order)
        raise RolloutError("no server")

    with pytest.raises(SamplerError, match="no server"):
        play(chat, [LookEnvironment], ScriptedSampler(chat, script))
    assert asked == [(0, 0, 0)]


def test_concurrent_rollouts_share_one_limit_of_episodes(chat):
    slots, playing, most, lock = Slots(2), set(), [], threading.Lock()

    class Counting(LookEnvironment):
        def reset(self, **row):
            with lock:
                playing.add(id(self))
                most.append(len(playing))

        def get_reward(self):
            with lock:
                playing.remove(id(self))
            return 0.0

    threads = [threading.Thread(target=play, args=(chat, [Counting] * 6), kwargs={"slots": slots}) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(most) == 18
    assert max(most) == 2


# -- each failure ends with a complete rollout whose other episodes are intact ----------------------------------------


MISTAKES = {
    "malformed_tool_calls": f"<tool_call>{{</tool_call>{END}",
    "unknown_tools": call("lok"),
    "wrong_arguments": call("look", were="x"),
    "tool_errors": call("break_down"),
    "tool_timeouts": call("hang"),
}


class Fragile(LookEnvironment):
    def break_down(self):
        """Break down."""
        raise RuntimeError("broken on purpose")

    def hang(self):
        """Hang."""
        threading.Event().wait()


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_of_the_model_is_an_observation_and_the_others_are_intact(chat, mistake):
    def script(order):
        first = MISTAKES[mistake] if order[0] == 1 else LOOK
        return [first, STOP][order[2]]

    undisturbed = play(chat, [Fragile] * 3)
    episodes = play(chat, [Fragile] * 3, ScriptedSampler(chat, script), tool_timeout_s=0.1)
    assert all(episode.terminated for episode in episodes)
    assert episodes[1].metrics[mistake] == 1
    assert episodes[1].steps[0].observation[0]["content"].startswith("Error: ")
    assert "Error: " in chat.decode(episodes[1].steps[1].prompt_ids)
    assert [fingerprint(episodes[i]) for i in (0, 2)] == [fingerprint(undisturbed[i]) for i in (0, 2)]


def hang(*args, **row):
    threading.Event().wait()


@pytest.mark.parametrize(
    ("stage", "broken"),
    [
        ("making the environment", raises),
        ("reset", lambda: LookEnvironment(reset=raises)),
        ("reset", lambda: LookEnvironment(reset=hang)),
        ("reset", lambda: LookEnvironment(reset=lambda: 3)),
        ("environment step 0", lambda: with_(step_reward=raises)),
        ("environment step 0", lambda: with_(step_reward=lambda: float("nan"))),
        ("environment step 0", lambda: with_(state_key=hang)),
        ("get_reward", lambda: LookEnvironment(get_reward=raises)),
        ("get_reward", lambda: with_(get_reward=lambda: "much")),
    ],
)
def test_an_environment_that_breaks_or_hangs_costs_its_own_episode_only(chat, stage, broken):
    undisturbed = play(chat, [LookEnvironment] * 3)
    episodes = play(chat, [LookEnvironment, broken, LookEnvironment], environment_timeout_s=0.3)
    assert episodes[1].error.startswith(f"{stage}: ")
    assert not episodes[1].valid
    assert [fingerprint(episodes[i]) for i in (0, 2)] == [fingerprint(undisturbed[i]) for i in (0, 2)]


def test_an_environment_that_is_never_made_costs_its_own_episode(chat):
    makers = [LookEnvironment, hang, LookEnvironment]
    episodes = play(chat, makers, make_timeout_s=0.2)
    assert [episode.valid for episode in episodes] == [True, False, True]
    assert episodes[1].error.startswith("making the environment: CallTimeoutError")


def with_(**members):
    environment = LookEnvironment()
    for name, member in members.items():
        setattr(environment, name, member)
    return environment


def test_a_slow_tool_does_not_hold_the_other_episodes(chat):
    others_are_done = threading.Event()
    remaining = {0, 2}

    class Quick(LookEnvironment):
        def reset(self, **row):
            self.index = row["index"]

        def get_reward(self):
            remaining.discard(self.index)
            if not remaining:
                others_are_done.set()
            return 1.0

    waits = LookEnvironment(look=lambda: others_are_done.wait(20) or raises())
    episodes = play(chat, [Quick, lambda: waits, Quick])
    assert all(episode.terminated for episode in episodes)
    assert episodes[1].metrics["tool_errors"] == 0


def test_environments_are_made_one_after_the_other_in_the_order_of_the_requests(chat):
    made = []

    def make(index):
        made.append((index, threading.current_thread()))  # not its number, which a later thread may get again
        return LookEnvironment()

    play(chat, [lambda index=index: make(index) for index in range(6)])
    assert [index for index, _ in made] == list(range(6))
    assert len({thread for _, thread in made} - {threading.current_thread()}) == 6


def test_a_rollout_may_start_inside_a_running_event_loop(chat):
    async def outer():
        return play(chat, [LookEnvironment] * 2)

    assert asyncio.run(outer()) == play(chat, [LookEnvironment] * 2)


def test_run_coroutine_brings_back_what_was_raised_inside_a_running_event_loop():
    async def fails():
        raise ValueError("inside")

    async def outer():
        run_coroutine(fails())

    with pytest.raises(ValueError, match="inside"):
        asyncio.run(outer())


def test_run_coroutine_does_not_wait_for_what_hangs_in_an_executor():
    release = threading.Event()

    async def leaves_a_thread_behind():
        hanging = asyncio.ensure_future(asyncio.to_thread(release.wait, 60))
        await asyncio.sleep(0.01)
        assert not hanging.done()
        return "done"

    begun = time.monotonic()
    assert run_coroutine(leaves_a_thread_behind()) == "done"
    assert time.monotonic() - begun < 30
    release.set()


# -- pacing -----------------------------------------------------------------------------------------------------------


class BatchingSampler(ScriptedSampler):
    """Answers in batches of whatever has arrived when nobody is away any more."""

    def __init__(self, *args) -> None:
        super().__init__(*args)
        self.waiting, self.batches, self.settled, self.driver = [], [], None, None

    def pace(self, settled) -> None:
        self.settled = settled

    async def sample(self, prompt_ids, params, **kwargs):
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((kwargs["order"], future))
        if self.driver is None or self.driver.done():
            self.driver = asyncio.ensure_future(self._drive())
        await future
        return await super().sample(prompt_ids, params, **kwargs)

    async def _drive(self):
        while self.waiting:
            await self.settled()
            batch, self.waiting = self.waiting, []
            self.batches.append(sorted(order for order, _ in batch))
            for _, future in batch:
                future.set_result(None)


@pytest.mark.parametrize("limit", [None, 3])
def test_with_quick_tools_the_batches_are_the_same_in_every_run(chat, limit):
    def script(order):
        return [LOOK, LOOK, LOOK, STOP][order[2]] if order[0] % 2 else [LOOK, STOP][order[2]]

    runs = []
    for _ in range(5):
        sampler = BatchingSampler(chat, script)
        play(chat, [LookEnvironment] * 6, sampler, max_concurrent_episodes=limit, grace_s=30)
        runs.append(sampler.batches)
    assert all(run == runs[0] for run in runs)
    assert all(len(batch) == (limit or 6) for batch in runs[0][:2])
    if limit is None:
        assert [len(batch) for batch in runs[0]] == [6, 6, 3, 3]


def test_with_a_slow_tool_the_sampler_stops_waiting(chat):
    others_are_done = threading.Event()
    sampler = BatchingSampler(chat, [LOOK, LOOK, STOP])
    slow = LookEnvironment(look=lambda: others_are_done.wait(20) or raises())
    quick = LookEnvironment(get_reward=others_are_done.set)
    episodes = play(chat, [lambda: slow, lambda: quick], sampler, grace_s=0.01)
    assert all(episode.terminated for episode in episodes)
    assert episodes[0].metrics["tool_errors"] == 0
    assert len(sampler.batches) > 3


def test_a_rollout_that_ctrl_c_interrupts_cleans_up():
    """Several async tools are running: each of them, and what waits for it, gets to its `finally`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    cleaned, loops = [], []

    async def tool():
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.append("tool")

    async def episode():
        try:
            await call_others(tool, (), {}, thread=DaemonThread("x"), timeout_s=None, what="tool")
        finally:
            cleaned.append("episode")

    async def rollout():
        loops.append(asyncio.get_running_loop())
        episodes = asyncio.gather(episode(), episode())
        await asyncio.sleep(0)  # they begin
        loops[0].call_later(0.01, signal.raise_signal, signal.SIGINT)
        await episodes

    try:
        with pytest.raises(KeyboardInterrupt):
            run_coroutine(rollout())
    finally:
        signal.signal(signal.SIGINT, before)
    assert sorted(cleaned) == ["episode", "episode", "tool", "tool"]
    assert loops[0].is_closed()
