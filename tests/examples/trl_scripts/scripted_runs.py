"""
Runs of TRL's `GRPOTrainer` and of `StepPOTrainer` in which the policy says what it is told, recorded in one form.

What a reward function is given and what it returns is compared, and nothing is known of how either trainer plays.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trl
from trl.chat_template_utils import qwen3_chat_template

import trl_steppo
from tests.trainer import tiny
from trl_steppo import FixedEngine, StepPOConfig, StepPOTrainer
from trl_steppo.inference.base import Sample
from trl_steppo.testing import ScriptedSampler, Turn
from trl_steppo.types import StopReason

Script = Callable[[str, int, int], str]
"""What the policy says: of the episode's first prompt as text, its index among the row's episodes, and its step."""

_OF_THE_BATCH = ("trainer_state", "log_extra", "log_metric")
_UNTOLD = ("completion_ids", *_OF_THE_BATCH)  # ids depend on how a template is rendered


@dataclass
class Recording:
    """
    Everything that reward functions saw and returned.

    `episodes` has one entry for each of them, sorted: rows are shuffled differently.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)

    @property
    def episodes(self) -> list[dict[str, Any]]:
        by_batch: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for call in self.calls:
            by_batch[call["batch"]].append(call)
        episodes = []
        for calls in by_batch.values():
            for index in range(len(calls[0]["rewards"])):
                seen = {name: values[index] for name, values in calls[0]["given"].items()}
                rewards = {call["name"]: call["rewards"][index] for call in calls}
                episodes.append({**seen, "rewards": rewards})
        return sorted(episodes, key=lambda episode: json.dumps(episode, sort_keys=True))

    def metrics_of_rewards(self) -> dict[str, float]:
        """What is logged of reward functions, and by them."""
        names = {call["name"] for call in self.calls}
        means = {name.removesuffix("/mean"): value for name, value in self.metrics[0].items()}
        of_functions = {name: means[f"rewards/{name}"] for name in names}
        return of_functions | {name: value for name, value in means.items() if name.startswith("shop/")}

    def rewards(self) -> list[dict[str, float | None]]:
        """Of each episode, by function."""
        return [episode["rewards"] for episode in self.episodes]


def recorded(func: Callable[..., Any], recording: Recording) -> Callable[..., Any]:
    """A reward function that leaves in `recording` what it was given and what it returned."""

    def keep(given: Mapping[str, Any], rewards: Any) -> Any:
        rewards = list(rewards)
        told = {name: plain(value) for name, value in given.items() if name not in _UNTOLD}
        told["completions"] = [[_with_any_error(message) for message in messages] for messages in told["completions"]]
        batch = json.dumps(told, sort_keys=True)
        recording.calls.append({"name": func.__name__, "given": told, "rewards": rewards, "batch": batch})
        return rewards

    if inspect.iscoroutinefunction(func):

        @functools.wraps(func)
        async def awaited(**given: Any) -> Any:
            return keep(given, await func(**given))

        return awaited

    @functools.wraps(func)
    def called(**given: Any) -> Any:
        return keep(given, func(**given))

    return called


def plain(value: Any) -> Any:
    """As JSON; of an environment its class, whose state is compared by the rewards that are made of it."""
    return json.loads(json.dumps(value, default=lambda other: type(other).__name__))


def _with_any_error(message: dict[str, Any]) -> dict[str, Any]:
    """A tool's message, whose error either trainer says in words of its own."""
    is_error = message["role"] == "tool" and str(message["content"]).startswith(("{'error': ", "Error: "))
    return {**message, "content": "an error"} if is_error else message


# -- the policy -------------------------------------------------------------------------------------------------------


def save_policy(directory: Path) -> str:
    """A tiny model with Qwen3's chat template and a tokenizer of bytes; where it was saved."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    model = tiny.make_model(max_position_embeddings=1 << 16)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def say(text: str) -> str:
    return text + tiny.END


def call(*calls: tuple[str, dict[str, Any]], text: str = "") -> str:
    """A response that calls tools."""
    written = [
        f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>" for name, arguments in calls
    ]
    return text + "\n".join(written) + tiny.END


class _Said:
    """TRL asks for the next turn of those conversations that go on, by their tokens alone, in a fixed order."""

    def __init__(self, script: Script, tokenizer: Any, num_generations: int) -> None:
        self.script = script
        self.tokenizer = tokenizer
        self.num_generations = num_generations
        self.so_far: list[list[int]] = []
        self.first: list[str] = []
        self.steps: list[int] = []

    def next(self, prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
        if not self.so_far:
            self.so_far = [list(ids) for ids in prompt_ids]
            self.first = [self.tokenizer.decode(ids) for ids in prompt_ids]
            self.steps = [0] * len(prompt_ids)
        position, answers = 0, []
        for ids in prompt_ids:
            while list(ids[: len(self.so_far[position])]) != self.so_far[position]:
                position += 1
            text = self.script(self.first[position], position % self.num_generations, self.steps[position])
            answer = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self.so_far[position] = [*ids, *answer]
            self.steps[position] += 1
            answers.append(answer)
            position += 1
        return answers


class _ScriptedSampler(ScriptedSampler):
    """Of `StepPOTrainer`, which asks for each episode by its number."""

    def __init__(self, script: Script, tokenizer: Any) -> None:
        first: dict[str, str] = {}

        def says(turn: Turn) -> str:
            prompt = first.setdefault(turn.episode_id, turn.prompt)
            return script(prompt, turn.generation_index, turn.step_index)

        super().__init__(says, tokenizer=tokenizer, ends_turns=False)

    async def sample(self, *args: Any, **kwargs: Any) -> Sample:
        sample = await super().sample(*args, **kwargs)
        assert sample.stop_reason is StopReason.STOP
        return sample


# -- the trainers -----------------------------------------------------------------------------------------------------

HERE: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "num_generations": 4,
    "max_completion_length": 16_384,  # the tokens are bytes
    "max_steps": 1,
    "learning_rate": 1e-3,
    "save_strategy": "no",
    "report_to": "none",
    "use_vllm": False,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "logging_steps": 1,
}
"""This machine's settings, whatever else is asked for: one update of two rows and four generations."""


class GRPOConfig(trl.GRPOConfig):
    """The settings of a run on this machine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, **HERE})


def steppo_config(**settings: Any) -> StepPOConfig:
    """The same settings of a `StepPOConfig`."""
    return StepPOConfig.from_grpo_config(GRPOConfig(**settings))


def grpo_trainer(script: Script, recording: Recording, policy: str) -> type:
    """`GRPOTrainer` of the tiny policy, whatever the name of the model it is given."""

    class GRPOTrainer(trl.GRPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **_stood_in(kwargs, recording, policy))

        def _generate(self, prompts: Any) -> Any:
            self._said = _Said(script, self.processing_class, self.num_generations)
            return super()._generate(prompts)

        def _generate_single_turn(self, prompt_ids: Any, *_: Any, **__: Any) -> Any:
            return self._said.next(prompt_ids), None

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)
            recording.metrics.append(copy.copy(logs))

    return GRPOTrainer


def steppo_trainer(script: Script, recording: Recording, policy: str) -> type:
    """`StepPOTrainer` of the tiny policy, whatever the name of the model it is given."""

    class Scripted(StepPOTrainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **_stood_in(kwargs, recording, policy))
            self.engine = self.player.engine = FixedEngine(_ScriptedSampler(script, self.player.tokenizer))

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs, start_time)
            recording.metrics.append(copy.copy(logs))

    return Scripted


def _stood_in(arguments: dict[str, Any], recording: Recording, policy: str) -> dict[str, Any]:
    """What a script gives its trainer, with the tiny policy, as many rows as are played, and recorded rewards."""
    dataset, funcs = arguments.get("train_dataset"), arguments.get("reward_funcs")
    if dataset is not None:
        arguments = {**arguments, "train_dataset": dataset.select([0, len(dataset) - 1])}
    if funcs is not None:
        funcs = [recorded(func, recording) for func in (funcs if isinstance(funcs, list) else [funcs])]
        arguments = {**arguments, "reward_funcs": funcs}
    return {**arguments, "model": policy}


def install(monkeypatch: pytest.MonkeyPatch, script: Script, recording: Recording, policy: str) -> None:
    """What is imported from either package is scripted, recorded and small, for as long as a test lasts."""
    ours, theirs = steppo_trainer(script, recording, policy), grpo_trainer(script, recording, policy)
    monkeypatch.setattr(trl, "GRPOConfig", GRPOConfig)
    monkeypatch.setattr(trl, "GRPOTrainer", theirs)
    monkeypatch.setattr(trl_steppo, "StepPOTrainer", ours)
