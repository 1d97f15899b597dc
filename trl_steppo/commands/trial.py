"""One small update of a recipe: a narrow model of its architecture, played by a script instead of sampled."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..assets import MINI_WIKI_POLICY, locate_model
from ..errors import ConfigurationError, StepPOError
from ..inference.base import Counts, Sample, SamplingParams
from ..types import StopReason, TokenIds
from .shapes import SHAPES, load_config

if TYPE_CHECKING:
    from ..environments.hotpotqa import HotpotQAData, HotpotQARecipe
    from ..trainer.data_stream import Rows
    from ..trainer.steppo_config import StepPOConfig

_TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


class ScriptedSampler:
    """
    Searches, then answers; in every other episode, of a batch as of a group, with the row's `answer`, so that rewards
    differ and there is something to learn from.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]):
            The policy's.
        rows ([`Rows`]):
            Where the answers stand.
    """

    def __init__(self, tokenizer: Any, rows: Rows) -> None:
        self.tokenizer = tokenizer
        self.rows = rows
        self.policy_version = 0
        self.counts = Counts()

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        position, generation_index, step_index = order
        call: dict[str, Any] = {"name": "search", "arguments": {"query": "who"}}
        if step_index > 0:
            knows = (position + generation_index) % 2 == 0
            call = {"name": "answer", "arguments": {"text": self.rows[position]["answer"] if knows else "unknown"}}
        text = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] + list(params.stop_token_ids)[:1]
        self.counts += Counts(sampled_tokens=len(ids))
        return Sample(TokenIds(ids), (-1.0,) * len(ids), StopReason.STOP, self.policy_version)

    def release(self, episode_id: str) -> None: ...
    def reset_cache(self) -> None: ...
    def pace(self, quiet: Any) -> None: ...


def small_config(name: str) -> tuple[Any, str]:
    """The policy's configuration, made small."""
    name = locate_model(name)
    shape = next((known for known in SHAPES if f"{name.split('/')[-1]}-".startswith(f"{known}-")), name)
    try:
        config = load_config(shape)
    except OSError as error:
        raise ConfigurationError(f"the configuration of {name!r} cannot be loaded: {error}") from error
    whole = f"{config.num_hidden_layers} layers of width {config.hidden_size}"
    for attribute, value in _TINY.items():
        setattr(config, attribute, value)
    config.num_key_value_heads = min(config.num_key_value_heads, 2)
    config.head_dim = 16
    config.layer_types = None if getattr(config, "layer_types", None) is None else ["full_attention"] * 2
    return config, f"model: {config.model_type}, {whole}; tried with 2 of width {config.hidden_size}"


def tokenizer_of(name: str) -> tuple[Any, str]:
    """The policy's tokenizer; where it cannot be had, the built-in policies'."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(locate_model(name)), f"tokenizer: of {name}"
    except (OSError, ValueError):
        line = f"tokenizer: that of {name} is not on this machine; tried with the built-in one"
        return AutoTokenizer.from_pretrained(MINI_WIKI_POLICY), line


def one_update(args: StepPOConfig, recipe: HotpotQARecipe, config: Any, tokenizer: Any, data: HotpotQAData) -> str:
    """Train a model of this configuration for one update, on two rows or two groups; what came of it, in a line."""
    from transformers import AutoModelForCausalLM

    from ..trainer.engines import FixedEngine
    from ..trainer.steppo_trainer import StepPOTrainer

    config.vocab_size = max(len(tokenizer), config.vocab_size if config.vocab_size < 20_000 else 0)
    config.pad_token_id = config.bos_token_id = None
    config.eos_token_id = tokenizer.eos_token_id
    trainer = StepPOTrainer(
        args=args.for_trial(),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_config(config),
        train_dataset=data.train_dataset,
        peft_config=replace(recipe, lora_r=4, lora_alpha=8).peft_config(),
        environment_factory=recipe.environment_factory(data.retriever),
        reward_funcs=recipe.reward_functions(),
    )
    # Not as `engine=`: that the policy's own sampler can be built is a part of the trial.
    trainer.engine = trainer.player.engine = FixedEngine(ScriptedSampler(tokenizer, trainer.rows))
    trainer.train()
    logs: dict[str, float] = {}
    for entry in trainer.state.log_history:
        logs |= {name: value for name, value in entry.items() if isinstance(value, float | int)}
    if logs.get("env/failed_episodes"):
        raise StepPOError(f"{logs['env/failed_episodes']:.0%} of the episodes of the trial failed; see the log above")
    shown = (
        "env/reward",
        "env/episode_steps",
        "env/tool_errors",
        "loss/policy_avg",
        "loss/value_avg",
        "policy/grad_norm",
        "critic/grad_norm",
    )
    return "one update: " + ", ".join(f"{name} {logs[name]:.3g}" for name in shown if name in logs)
