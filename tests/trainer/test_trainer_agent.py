"""`StepPOTrainer(agent=...)`: an agent behind the gateway trains what our own loop trains."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest
from transformers import TrainerCallback

from tests.trainer.tiny import Hash, Look, ScriptedSampler, call, make_trainer, message_rows, same, scripted, weights
from trl_steppo import FixedEngine
from trl_steppo.environments import make_playable
from trl_steppo.environments.base import Response
from trl_steppo.errors import CheckpointError, ConfigurationError
from trl_steppo.rollout import episode_file, load_episodes

pytest.importorskip("starlette", reason="needs the extra `gateway`")
pytest.importorskip("uvicorn", reason="needs the extra `gateway`")
from trl_steppo.gateway import GatewayServer

openai = pytest.importorskip("openai", reason="needs the extra `openai`")


def as_response(message: Any) -> Response:
    calls = [
        {"type": "function", "function": {"name": c.function.name, "arguments": json.loads(c.function.arguments)}}
        for c in message.tool_calls or ()
    ]
    text = message.content or ""
    return Response(text, {"role": "assistant", "content": text, **({"tool_calls": calls} if calls else {})})


def answers(observation: Any, message: Any) -> list[dict[str, Any]]:
    """The environment's answer in the form of the API: tools' answers name their calls."""
    if isinstance(observation, str):
        return [{"role": "user", "content": observation}]
    return [
        {"role": "tool", "tool_call_id": c.id, "content": o["content"]}
        for c, o in zip(message.tool_calls or (), observation, strict=True)
    ]


def agent_of(environment: type, *, stream: bool = False):
    """The rollout's own loop as an agent: it plays an environment, and tells the gateway all that the loop records."""

    async def agent(row: dict[str, Any], *, base_url: str, api_key: str) -> float:
        playable = make_playable(environment())
        messages = list(row["prompt"])
        await playable.reset(row)
        counts: dict[str, float] = {}
        tools = {"tools": list(playable.tools)} if playable.tools else {}
        session = base_url.removesuffix("/v1") + "/sessions/current"
        async with (
            openai.AsyncOpenAI(base_url=base_url, api_key=api_key) as client,
            httpx.AsyncClient(headers={"authorization": f"Bearer {api_key}"}) as http,
        ):
            done = False
            while not done:
                try:
                    completion = await client.chat.completions.create(model="any", messages=messages, **tools)
                except openai.BadRequestError as error:
                    if error.code != "episode_over":
                        raise
                    break
                message = completion.choices[0].message
                outcome = await playable.step(as_response(message))
                for name, count in outcome.metrics.items():
                    counts[name] = counts.get(name, 0) + count
                paid = await http.post(f"{session}/reward", json={"reward": outcome.reward})
                assert paid.status_code == 200
                observation, done = outcome.observation, outcome.done
                messages += [message.model_dump(exclude_none=True), *answers(observation, message)]
            reward = await playable.get_reward()
            body: dict[str, Any] = {"metrics": {**counts, **playable.metrics()}}
            if done:
                body |= {"observation": observation, "terminated": not outcome.ended_by_response}
            await http.post(f"{session}/finish", json=body)
        return reward

    return agent


def plain(episode: Any) -> Any:
    return replace(episode, metrics={name: float(value) for name, value in episode.metrics.items()})


def look_script(row: int, generation: int, step: int) -> str:
    """Looks once or twice, at two places at a time now and then; some never end."""
    if row % 4 == 3 or step <= row % 3:
        both = call("look", where="there") if row % 2 else ""
        return "hm " + both.removesuffix("<|im_end|>") + call("look", where=f"at {row}")
    return "I give up<|im_end|>"


def hash_script(row: int, generation: int, step: int) -> str:
    return f"say {row * 7 + step}" + ("<|im_end|>" if row % 2 else "")


@pytest.mark.parametrize(
    ("environment", "script", "settings"),
    [
        (Look, look_script, {"response_length": 200}),
        (Hash, hash_script, {"response_length": 6, "max_episode_tokens": 120}),
    ],
    ids=["tools", "text, cut by a budget"],
)
def test_the_same_policy_through_our_loop_and_through_the_gateway(tmp_path, environment, script, settings):
    """Identical episodes, and identical weights after 3 updates."""
    results = []
    for name, given in (("loop", {"environment_factory": environment}), ("gateway", {"agent": agent_of(environment)})):
        directory = tmp_path / name
        trainer = make_trainer(
            directory,
            train_dataset=message_rows(),
            max_steps=3,
            dump_episodes_dir=str(directory / "episodes"),
            bootstrap_truncated=True,
            engine=scripted(script),
            **settings,
            **given,
        )
        trainer.train()
        files = sorted((directory / "episodes").iterdir())
        assert len(files) == 3
        results.append(([plain(e) for file in files for e in load_episodes(file)], weights(trainer.model)))
    (expected, trained), (found, trained_too) = results
    assert found == expected
    assert all(episode.valid for episode in found)
    assert {episode.truncated for episode in found} == {True, False}
    assert same(trained, trained_too)


def test_a_killed_run_takes_up_the_episodes_that_were_played(tmp_path):
    """What agents had finished in the update that was cut is not played again; the keys are in no file."""
    played: list[str] = []
    keys: list[str] = []
    dies = [True]
    play = agent_of(Look)

    async def agent(row: dict[str, Any], *, base_url: str, api_key: str) -> float:
        played.append(row["prompt"][0]["content"])
        keys.append(api_key)
        return await play(row, base_url=base_url, api_key=api_key)

    class Dying(ScriptedSampler):
        def pace(self, settled: Any) -> None:
            if settled is None and len(played) == 16 and dies[0]:
                raise KeyboardInterrupt  # in the second update, when its episodes are over

    settings = {"train_dataset": message_rows(), "max_steps": 3, "response_length": 200}
    settings |= {"save_strategy": "steps", "save_steps": 1, "dump_episodes_dir": str(tmp_path / "episodes")}
    trainer = make_trainer(tmp_path, agent=agent, engine=FixedEngine(Dying(look_script)), **settings)
    with suppress(KeyboardInterrupt):
        trainer.train()
    assert (trainer.state.global_step, len(played)) == (1, 16)
    dies[0] = False
    trainer = make_trainer(tmp_path, agent=agent, engine=FixedEngine(Dying(look_script)), **settings)
    trainer.train(resume_from_checkpoint=True)
    assert (trainer.state.global_step, len(played)) == (3, 24)
    found = [e for file in sorted((tmp_path / "episodes").iterdir()) for e in load_episodes(file)]
    assert [episode.error for episode in found] == [None] * 24
    for file in (path for path in tmp_path.rglob("*") if path.is_file()):
        content = file.read_bytes()
        assert not any(key.encode() in content for key in keys), file


@pytest.mark.parametrize("other", ["environment_factory", "tools"])
def test_an_agent_brings_its_own_tools(tmp_path, other):
    given = {"environment_factory": Look} if other == "environment_factory" else {"tools": [agent_of]}
    with pytest.raises(ConfigurationError, match=f"`agent` and `{other}`"):
        make_trainer(tmp_path, agent=agent_of(Look), **given)


def test_what_is_no_agent_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be called as"):
        make_trainer(tmp_path, agent=lambda row: 0.0)
    with pytest.raises(ConfigurationError, match="`agent` is 5"):
        make_trainer(tmp_path, agent=5)
    with pytest.raises(ConfigurationError, match="there is no program 'no-such-agent'"):
        make_trainer(tmp_path, agent="no-such-agent --fast")


def test_evaluation_plays_the_agent_greedily(tmp_path):
    settings = {"eval_dataset": message_rows(3), "response_length": 200, "engine": scripted(look_script)}
    trainer = make_trainer(tmp_path, agent=agent_of(Look), **settings)
    assert trainer.evaluate()["eval_failed_episodes"] == 0


# -- how long a gateway is open ---------------------------------------------------------------------------------------


@pytest.fixture
def gateways(monkeypatch) -> Iterator[list[GatewayServer]]:
    """All that were started; in the end nothing of them may be left."""
    started: list[GatewayServer] = []
    start = GatewayServer.start
    monkeypatch.setattr(GatewayServer, "start", lambda server: started.append(server) or start(server))
    yield started
    assert started
    for server in started:
        with pytest.raises(ConnectionRefusedError), socket.create_connection((server.host, server.port), timeout=5):
            pass
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("gateway")]:
        thread.join(60)  # it ends by itself, when it is given time
        assert not thread.is_alive(), thread.name
    assert not [file for file in open_files() if ".sqlite" in file]


def open_files() -> list[str]:
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return found


class Raises(TrainerCallback):
    """At an event, the `count`-th time."""

    def __init__(self, event: str, count: int) -> None:
        self.count = count
        setattr(self, event, self.on_it)

    def on_it(self, *args: Any, **kwargs: Any) -> None:
        self.count -= 1
        if self.count == 0:
            raise ArithmeticError("of the callback")


def evaluating_trainer(directory: Any, **settings: Any) -> Any:
    settings = {"eval_dataset": message_rows(2), "max_steps": 2, "response_length": 200, **settings}
    settings["engine"] = scripted(look_script)
    return make_trainer(directory, agent=agent_of(Look), train_dataset=message_rows(), **settings)


def test_one_gateway_serves_a_run(tmp_path, gateways):
    trainer = evaluating_trainer(tmp_path, eval_strategy="steps", eval_steps=1, eval_on_start=True)
    trainer.train()
    assert sum("eval_score" in logs or "eval_reward" in logs for logs in trainer.state.log_history) == 3
    assert len(gateways) == 1


@pytest.mark.parametrize(
    ("event", "count"),
    [("on_train_begin", 1), ("on_evaluate", 1), ("on_step_end", 1), ("on_evaluate", 2), ("on_train_end", 1)],
    ids=["begin", "first evaluation", "update", "last evaluation", "end"],
)
def test_a_gateway_is_closed_whatever_ends_the_run(tmp_path, gateways, event, count):
    callback = Raises(event, count)
    settings = {"eval_strategy": "steps", "eval_steps": 100, "eval_on_start": True}
    trainer = evaluating_trainer(tmp_path, callbacks=[callback], **settings)
    with pytest.raises(ArithmeticError):
        trainer.train()
    assert len(gateways) == 1


def test_evaluation_alone_opens_and_closes_its_own(tmp_path, gateways, capsys):
    """And leaves no file behind."""
    trainer = evaluating_trainer(tmp_path)
    trainer.evaluate()
    assert len(gateways) == 1
    trainer.evaluate({"a": message_rows(1), "b": message_rows(2)})
    trainer.generate_completions()
    assert "row 1" in capsys.readouterr().out
    assert not (tmp_path / "gateway").exists()
    trainer.add_callback(Raises("on_prediction_step", 1))
    with pytest.raises(ArithmeticError):
        trainer.evaluate()


def test_a_run_whose_store_cannot_be_opened_leaves_nothing_open(tmp_path, gateways):
    evaluating_trainer(tmp_path / "a").train()
    store = tmp_path / "b" / "gateway" / "rank000.sqlite"
    store.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"rank000\.sqlite cannot be opened"):
        evaluating_trainer(tmp_path / "b").train()


# -- agents, and a policy that samples in a process of its own --------------------------------------------------------


def test_agents_train_the_same_weights_with_a_sampler_in_a_process_of_its_own(tmp_path):
    found = []
    for use_rollout_worker in (False, True):
        trainer = make_trainer(
            tmp_path / str(use_rollout_worker),
            agent=agent_of(Hash),
            train_dataset=message_rows(),
            use_rollout_worker=use_rollout_worker,
        )
        trainer.train()
        found.append(weights(trainer.model))
    assert same(*found)


def test_agents_play_ahead_of_their_updates(tmp_path):
    """While updates and evaluations go on; and what had been played when a run was cut is not played again."""
    settings = {"max_staleness": 1, "train_dataset": message_rows(), "total_episodes": 32, "save_strategy": "steps"}
    settings |= {"save_steps": 1, "dump_episodes_dir": str(tmp_path / "episodes")}
    settings |= {"eval_dataset": message_rows(3), "eval_strategy": "steps", "eval_steps": 1}
    callback = Raises("on_step_end", 3)
    trainer = make_trainer(tmp_path, agent=agent_of(Hash), callbacks=[callback], **settings)
    with pytest.raises(ArithmeticError):
        trainer.train()
    played: list[str] = []
    play = agent_of(Hash)

    async def agent(row: dict[str, Any], *, base_url: str, api_key: str) -> float:
        played.append(row["prompt"][0]["content"])
        return await play(row, base_url=base_url, api_key=api_key)

    again = make_trainer(tmp_path, agent=agent, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    for update in range(4):
        episodes = load_episodes(episode_file(tmp_path / "episodes", update, 0))
        assert [episode.stream_position for episode in episodes] == list(range(8 * update, 8 * update + 8))
        assert all(episode.valid for episode in episodes)
        assert {update - step.policy_version for episode in episodes for step in episode.steps} <= {0, 1}
    in_updates = [name for name in played if name not in {"row 0", "row 1", "row 2"}]  # those are evaluated, too
    assert len(in_updates) < 16  # the third update's were all in the store
    assert len(set(in_updates)) == len(in_updates)
