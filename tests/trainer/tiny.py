"""A tokenizer, models, environments and runs so small that a whole training run takes a fraction of a second."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

from trl_steppo import Episode, FixedEngine, PPOConfig, Step, StepPOConfig, StepPOTrainer, StopReason, testing
from trl_steppo.testing import END_OF_TURN as END
from trl_steppo.testing import byte_tokenizer, tiny_critic, tiny_policy, tool_call

# With a system message for `chat_template_kwargs`.
GREETING = "{%- if greeting is defined %}{{ '<|im_start|>system\n' + greeting + '<|im_end|>\n' }}{% endif %}\n"


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = GREETING + tokenizer.chat_template
    return tokenizer


TOKENIZER = make_tokenizer()
VOCABULARY = len(TOKENIZER)
make_model = tiny_policy
make_classifier = tiny_critic


# -- environments and rows --------------------------------------------------------------------------------------------


def hashed(text: str) -> float:
    """A number in [0, 1) that looks random and is the same everywhere."""
    return zlib.crc32(text.encode()) % 1000 / 1000


class Hash:
    """Pays every response its hash; half of the responses end the episode."""

    def reset(self, **row: Any) -> None:
        self.row = row

    def step(self, response: str) -> tuple[str, float, bool]:
        reward = hashed(response)
        return "go on", reward, reward < 0.3


class Endless(Hash):
    """Never ends by itself."""

    def step(self, response: str) -> tuple[str, float, bool]:
        return "go on", hashed(response), False


class Look:
    """A TRL-style environment: its public methods are tools."""

    def reset(self, **row: Any) -> None:
        self.found = 0

    def look(self, where: str) -> str:
        """
        Look somewhere.

        Args:
            where: The place.
        """
        self.found += 1
        return f"nothing {where}"

    def fall(self) -> str:
        """Break."""
        raise OSError("broken")

    def sleep(self) -> str:
        """Take too long."""
        time.sleep(3.0)
        return "awake"

    def get_reward(self) -> float:
        return 1.0 + self.found


def prompt_rows(count: int = 16) -> list[dict[str, Any]]:
    return [{"prompt": f"row {index}", "number": index} for index in range(count)]


def message_rows(count: int = 16) -> list[dict[str, Any]]:
    return [{"prompt": [{"role": "user", "content": f"row {i}"}], "number": i} for i in range(count)]


def id_rows(count: int = 16) -> list[dict[str, Any]]:
    return [{"input_ids": TOKENIZER.encode(f"row {index}")} for index in range(count)]


def call(name: str, **arguments: Any) -> str:
    return tool_call(name, **arguments) + END


class ScriptedSampler(testing.ScriptedSampler):
    """Says `script(stream_position, generation_index, step_index)`, with a log-probability of -1 a token."""

    def __init__(self, script: Callable[..., str]) -> None:
        super().__init__(
            lambda turn: script(turn.stream_position, turn.generation_index, turn.step_index),
            tokenizer=TOKENIZER,
            ends_turns=False,
        )


def scripted(script: Callable[..., str]) -> FixedEngine:
    """An engine whose sampler follows a script."""
    return FixedEngine(ScriptedSampler(script))


# -- runs -------------------------------------------------------------------------------------------------------------

TINY: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "total_episodes": 16,
    "response_length": 6,
    "max_interaction_steps": 3,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "num_sample_generations": 0,
    "log_episodes": 0,
}


def make_config(output_dir: Any, **settings: Any) -> StepPOConfig:
    if "max_steps" in settings:
        settings.setdefault("total_episodes", None)
    return StepPOConfig(output_dir=str(output_dir), **{**TINY, **settings})


def make_ppo_config(output_dir: Any, **settings: Any) -> PPOConfig:
    """The same as a plain `PPOConfig`, which has no steps."""
    own = {name: value for name, value in TINY.items() if name not in ("max_interaction_steps", "log_episodes")}
    return PPOConfig(output_dir=str(output_dir), **{**own, **settings})


def make_trainer(output_dir: Any, *, args: Any = None, model: Any = None, **arguments: Any) -> StepPOTrainer:
    """A trainer of the tiny model in the `Hash` environment; settings and arguments may be mixed."""
    of_trainer = ("ref_model", "reward_model", "train_dataset", "value_model", "eval_dataset", "callbacks")
    of_trainer += ("environment_factory", "tools", "reward_funcs", "data_collator", "optimizers", "peft_config")
    of_trainer += ("agent", "reward_processing_classes", "engine", "policy_loss_fn")
    if not isinstance(arguments.get("advantage_estimator", ""), str):  # a name is a setting
        of_trainer += ("advantage_estimator",)
    given = {name: arguments.pop(name) for name in of_trainer if name in arguments}
    if not {"environment_factory", "tools", "reward_funcs", "reward_model", "agent"} & set(given):
        given["environment_factory"] = Hash
    given.setdefault("train_dataset", prompt_rows())
    if "engine" in given:
        arguments.setdefault("response_length", 1000)  # a script says what it says
    return StepPOTrainer(
        args=make_config(output_dir, **arguments) if args is None else args,
        processing_class=TOKENIZER,
        model=make_model() if model is None else model,
        **given,
    )


def weights(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


# -- episodes drawn by hand -------------------------------------------------------------------------------------------


def make_episode(
    name: str,
    rewards: Sequence[float],
    *,
    lengths: Sequence[int] | None = None,
    row: int = 0,
    generation: int = 0,
    truncated: bool = False,
    rewritten: int | None = None,
    states: Sequence[Any] | None = None,
    error: str | None = None,
) -> Episode:
    """
    One step for each reward. Prompts only grow, but for step `rewritten`, whose prompt is new. Ids are random, decided
    by `name`; log-probabilities are those of a uniform policy, shaken a little.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def ids(count: int) -> list[int]:
        return torch.randint(0, 256, (count,), generator=generator).tolist()

    steps, prompt = [], ids(3)
    for index, reward in enumerate(rewards):
        if index == rewritten:
            prompt = ids(5)
        response = ids(lengths[index] if lengths is not None else 2 + index % 3)
        logprobs = (-5.5 + torch.randn(len(response), generator=generator)).tolist()
        info = {} if states is None else {"state_key": states[index]}
        steps.append(Step(prompt, response, logprobs, reward, index, 0, 1.0, StopReason.STOP, f"o{index}", info))
        prompt = prompt + response + ids(2)
    return Episode(
        name,
        row,
        generation,
        tuple(steps),
        terminated=not truncated and error is None,
        truncated=truncated,
        final_prompt_ids=prompt if truncated else None,
        error=error,
        stop_reason=StopReason.ENVIRONMENT if not truncated else StopReason.MAX_INTERACTION_STEPS,
    )


def mixed_episodes() -> list[Episode]:
    """Eight episodes of 1 to 4 steps, one of them rewritten in the middle, two of them truncated."""
    return [
        make_episode("a", [0.0, 0.0, 1.0], lengths=[4, 1, 3], row=0),
        make_episode("b", [0.2], lengths=[7], row=0, generation=1),
        make_episode("c", [0.5, -0.5], lengths=[2, 2], row=1, truncated=True),
        make_episode("d", [0.0, 0.3, 0.0, 0.9], lengths=[1, 5, 2, 2], row=1, generation=1, rewritten=2),
        make_episode("e", [1.0, 0.0], lengths=[3, 6], row=2),
        make_episode("f", [0.0], lengths=[1], row=2, generation=1),
        make_episode("g", [0.1, 0.2, 0.3], lengths=[2, 2, 2], row=3, truncated=True),
        make_episode("h", [-1.0, 2.0], lengths=[5, 3], row=3, generation=1),
    ]
