"""A tokenizer, models, environments and runs so small that a whole training run takes a fraction of a second."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from trl_steppo import Episode, FixedEngine, PPOConfig, Step, StepPOConfig, StepPOTrainer, StopReason
from trl_steppo.inference.base import Sample, SamplingParams
from trl_steppo.types import TokenIds

END = "<|im_end|>"

# ChatML with tool calls in the form of Hermes; `greeting` is there for `chat_template_kwargs`.
CHAT_TEMPLATE = """\
{%- if greeting is defined %}{{ '<|im_start|>system\n' + greeting + '<|im_end|>\n' }}{% endif %}
{%- if tools %}{{ '<|im_start|>system\n' }}
{%- for tool in tools %}{{ tool.function.name + ' ' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}{{ '<|im_start|>tool\n' + message.content + '<|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson + '}\n' }}
{{- '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={char: index for index, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": "<|pad|>"})
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>"]})
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


TOKENIZER = make_tokenizer()
VOCABULARY = len(TOKENIZER)


def make_model(seed: int = 0, **changes: Any) -> Qwen2ForCausalLM:
    """A policy; it ends its turn after some 4 tokens, so that responses have different lengths."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "pad_token_id": TOKENIZER.pad_token_id,
        "eos_token_id": TOKENIZER.eos_token_id,
        "bos_token_id": None,
        **changes,
    }
    return Qwen2ForCausalLM(Qwen2Config(**settings)).eval()


def make_classifier(seed: int = 1, **changes: Any) -> torch.nn.Module:
    """A reward model, or a critic whose values are not zero."""
    config = make_model(**changes).config
    torch.manual_seed(seed)
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config).eval()


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
    body = str(arguments).replace("'", '"')
    return f'<tool_call>\n{{"name": "{name}", "arguments": {body}}}\n</tool_call>{END}'


class ScriptedSampler:
    """Says `script(stream_position, generation_index, step_index)`, with a log-probability of -1 a token."""

    def __init__(self, script: Callable[..., str]) -> None:
        self.script = script

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        await asyncio.sleep(0)
        ids = TOKENIZER.encode(self.script(*order))
        reason = StopReason.STOP if ids[-1] in params.stop_token_ids else StopReason.LENGTH
        return Sample(TokenIds(ids), (-1.0,) * len(ids), reason, policy_version=0)

    def release(self, episode_id: str) -> None:
        pass

    def pace(self, settled: Any) -> None:
        pass


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
}


def make_config(output_dir: Any, **settings: Any) -> StepPOConfig:
    if "max_steps" in settings:
        settings.setdefault("total_episodes", None)
    return StepPOConfig(output_dir=str(output_dir), **{**TINY, **settings})


def make_ppo_config(output_dir: Any, **settings: Any) -> PPOConfig:
    """The same as a plain `PPOConfig`, which has no steps."""
    own = {name: value for name, value in TINY.items() if name != "max_interaction_steps"}
    return PPOConfig(output_dir=str(output_dir), **{**own, **settings})


def make_trainer(output_dir: Any, *, args: Any = None, model: Any = None, **arguments: Any) -> StepPOTrainer:
    """A trainer of the tiny model in the `Hash` environment; settings and arguments may be mixed."""
    of_trainer = ("ref_model", "reward_model", "train_dataset", "value_model", "eval_dataset", "callbacks")
    of_trainer += ("environment_factory", "tools", "reward_funcs", "data_collator", "optimizers", "peft_config")
    of_trainer += ("agent", "reward_processing_classes", "engine")
    given = {name: arguments.pop(name) for name in of_trainer if name in arguments}
    if not {"environment_factory", "tools", "reward_funcs", "reward_model", "agent"} & set(given):
        given["environment_factory"] = Hash
    given.setdefault("train_dataset", prompt_rows())
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
