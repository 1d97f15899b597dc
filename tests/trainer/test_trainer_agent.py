"""`StepPOTrainer(agent=...)`: an agent behind the gateway trains what our own loop trains."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import pytest
from tiny import Hash, Look, ScriptedSampler, call, make_trainer, message_rows, same, weights

from trl_steppo.environments import make_playable
from trl_steppo.environments.base import Response
from trl_steppo.errors import ConfigurationError
from trl_steppo.rollout import load_episodes

pytest.importorskip("starlette", reason="needs the extra `gateway`")
pytest.importorskip("uvicorn", reason="needs the extra `gateway`")
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
            body = {"metrics": {**counts, **playable.metrics()}, **({"observation": observation} if done else {})}
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
            **settings,
            **given,
        )
        trainer.player.sampler = ScriptedSampler(script)
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
    trainer = make_trainer(tmp_path, agent=agent, **settings)
    trainer.player.sampler = Dying(look_script)
    with suppress(KeyboardInterrupt):
        trainer.train()
    assert (trainer.state.global_step, len(played)) == (1, 16)
    dies[0] = False
    trainer = make_trainer(tmp_path, agent=agent, **settings)
    trainer.player.sampler = Dying(look_script)
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


def test_evaluation_plays_the_agent_greedily(tmp_path):
    trainer = make_trainer(tmp_path, agent=agent_of(Look), eval_dataset=message_rows(3), response_length=200)
    trainer.player.sampler = ScriptedSampler(look_script)
    assert trainer.evaluate()["eval_failed_episodes"] == 0
    trainer.player.close()
