"""The agent of the OpenAI Agents SDK: it plays as it is written, and trains as a user trains it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="needs the extra `gateway`")
pytest.importorskip("agents", reason="needs the extra `agents`")
from safetensors.torch import load_file
from transformers import AutoTokenizer

from tests.examples.scripts import load_script
from trl_steppo.assets import MINI_WIKI_POLICY
from trl_steppo.episodes import EpisodeSpec
from trl_steppo.gateway import GatewayServer
from trl_steppo.gateway.tokens import ChatFormats
from trl_steppo.inference.base import SamplingParams
from trl_steppo.rollout import AgentPlayer, EpisodeLimits, EpisodeRequest, load_episodes, play_episodes
from trl_steppo.testing import ScriptedSampler, tool_call
from trl_steppo.types import StopReason

ROOT = Path(__file__).parents[2]
TOKENIZER = AutoTokenizer.from_pretrained(MINI_WIKI_POLICY)


@pytest.fixture(scope="module")
def script():
    return load_script("train_openai_agent")


def knows_every_other_answer(rows):
    """A script: it searches, then answers, in every other episode rightly."""

    def respond(turn):
        if turn.step_index == 0:
            return tool_call("search", query="who")
        knows = (turn.stream_position + turn.generation_index) % 2 == 0
        return tool_call("answer", text=rows[turn.stream_position]["answer"] if knows else "unknown")

    return respond


def play(script, says, *, steps=5):
    """The first four questions, as the trainer plays them."""
    server = GatewayServer(ChatFormats(TOKENIZER)).start()
    requests = [EpisodeRequest(script.DATA.train_dataset[index], index) for index in range(4)]
    sampler = ScriptedSampler(says, tokenizer=TOKENIZER)
    try:
        spec = EpisodeSpec(EpisodeLimits(max_interaction_steps=steps), SamplingParams(max_new_tokens=60))
        return play_episodes(requests, AgentPlayer(script.play, server, sampler, spec, idle_s=200))
    finally:
        server.close()


def test_the_agent_searches_answers_and_is_scored(script):
    """The policy knows the answers of every other row."""
    episodes = play(script, knows_every_other_answer(script.DATA.train_dataset))
    assert [episode.error for episode in episodes] == [None] * 4
    assert [episode.episode_return for episode in episodes] == [1.0, 0.0, 1.0, 0.0]
    assert [episode.metrics["exact_match"] for episode in episodes] == [1.0, 0.0, 1.0, 0.0]
    assert all(len(episode.steps) == 2 and episode.terminated for episode in episodes)
    for episode in episodes:
        assert episode.steps[0].observation == [{"role": "tool", "name": "search", "content": "No results."}]
        question = script.DATA.train_dataset[episode.stream_position]["question"]
        assert question in TOKENIZER.decode(episode.steps[0].prompt_ids.tolist())


def test_an_agent_that_goes_wrong_has_not_failed(script):
    """It is cut by its budget, or calls what is not there: wrong answers, which are learned from."""
    cut = play(script, knows_every_other_answer(script.DATA.train_dataset), steps=1)
    lost = play(script, tool_call("who"))  # a tool that is not there
    for episodes, reason in ((cut, StopReason.MAX_INTERACTION_STEPS), (lost, StopReason.ENVIRONMENT)):
        assert [(e.error, e.episode_return, e.stop_reason) for e in episodes] == [(None, 0.0, reason)] * 4


def test_the_recipe_is_a_valid_configuration(script):
    parser = script.StepPOParser(script.StepPOConfig, default_config=script.RECIPE)
    (args,) = parser.parse_args_and_config(["--seed", "3"])
    assert (args.seed, args.max_interaction_steps, args.output_dir) == (3, 5, "runs/mini_wiki_agent")


def test_three_updates_train_it(tmp_path):
    flags = ["--total_episodes", "24", "--per_device_train_batch_size", "8", "--num_mini_batches", "2"]
    flags += ["--eval_on_start", "false", "--eval_strategy", "no", "--tool_timeout_s", "200", "--use_cpu", "true"]
    flags += ["--output_dir", str(tmp_path), "--dump_episodes_dir", str(tmp_path / "dumped")]
    script = ROOT / "examples" / "train_openai_agent.py"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), *flags]  # by an interpreter of its own, as a user does
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    updates = [logs for logs in history if "env/reward" in logs]
    assert [logs["episode"] for logs in updates] == [8, 16, 24]
    played = [e for file in sorted((tmp_path / "dumped").iterdir()) for e in load_episodes(file)]
    assert [episode.error for episode in played] == [None] * 24
    observed = [str(step.observation) for episode in played for step in episode.steps]
    assert any("'content': '[1] " in text for text in observed), "a passage was found"
    assert any(logs["env/reward"] > 0 for logs in updates[1:]), "the first update is the critic's"
    before, after = (load_file(Path(folder) / "model.safetensors") for folder in (MINI_WIKI_POLICY, tmp_path))
    assert any(not after[name].equal(tensor) for name, tensor in before.items()), "the policy has moved"
    assert (tmp_path / "critic" / "model.safetensors").is_file()
