"""
A recipe tried out before a GPU is: its settings, its rows, its environment, and one small update.

The model is of the recipe's architecture, with two narrow layers and random weights; what it would say is scripted, so
that searches and answers really happen, and some answers are right. What cannot be had without a network is replaced,
and said so.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError, DataError, StepPOError
from .inference.base import Counts, Sample, SamplingParams
from .launch_file import check_launch, read_mapping
from .memory import SHAPES, load_config
from .types import StopReason, TokenIds

if TYPE_CHECKING:
    from .trainer.data_stream import Rows
    from .trainer.steppo_config import StepPOConfig

SCRIPT_SETTINGS = {
    *("model_name_or_path", "model_revision", "dtype", "attn_implementation", "dataset_name", "eval_dataset_name"),
    *("num_passages", "reward", "valid_call_reward", "system_prompt", "state", "force_first_search"),
    *("use_peft", "lora_r", "lora_alpha", "lora_target_modules"),
}
"""What `examples/hotpotqa_steppo.py` takes beside the fields of `StepPOConfig`."""

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
    def pace(self, settled: Any) -> None: ...


def read_recipe(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    A YAML file's settings: those of `StepPOConfig`, and those of the script.

    Raises:
        ConfigurationError: If the file is no mapping, or names a setting that neither knows.
    """
    from .trainer.grpo_settings import explain_unknown
    from .trainer.steppo_config import StepPOConfig

    content = read_mapping(path, "a recipe is a mapping of settings")
    fields = {field.name for field in dataclasses.fields(StepPOConfig)}
    own = {name: value for name, value in content.items() if name in fields}
    script = {name: value for name, value in content.items() if name in SCRIPT_SETTINGS}
    unknown = [name for name in content if name not in fields | SCRIPT_SETTINGS]
    if unknown:
        raise ConfigurationError(
            f"{path}: these settings are not known:\n" + explain_unknown(unknown, fields | SCRIPT_SETTINGS)
        )
    return own, script


def dry_run(path: Path, *, dataset_name: str | None = None, config_file: str | None = None) -> Iterator[str]:
    """
    Try a recipe of `examples/hotpotqa_steppo.py` out; what is found is given line by line.

    Args:
        path (`Path`):
            The recipe.
        dataset_name (`str`, *optional*):
            Rows to play instead of the recipe's.
        config_file (`str`, *optional*):
            The accelerate file it will be launched with: a shipped one's name, or a path.

    Raises:
        ConfigurationError, DataError: If settings contradict each other, or those of the accelerate file, or rows are
            not what they should be.
    """
    from .environments.hotpotqa import SYSTEM_PROMPT
    from .trainer.steppo_config import StepPOConfig

    own, script = read_recipe(path)
    recipe = dict(own)
    with tempfile.TemporaryDirectory() as directory:
        own |= {"output_dir": directory, "use_cpu": True}
        args = StepPOConfig(**own)  # finds what contradicts, and what has no effect
        episodes = args.per_device_train_batch_size * args.gradient_accumulation_steps
        yield f"settings: {len(own) - 2} of StepPOConfig and {len(script)} of the script, without contradiction"
        yield (
            f"an update: {episodes} episodes a process, {args.num_ppo_epochs} epochs of {args.num_mini_batches} "
            f"optimizer steps; {args.advantage_estimator}, {args.importance_sampling_level} ratio, averaged over "
            f"{args.aggregation}s"
        )
        if config_file is not None:
            yield check_launch(recipe, args, config_file)
        config, found = _config(str(script.get("model_name_or_path", "mini_wiki")))
        yield found
        tokenizer, found = _tokenizer(str(script.get("model_name_or_path", "mini_wiki")))
        yield found
        system_prompt = str(script.get("system_prompt", SYSTEM_PROMPT))
        data, found = _data(dataset_name, str(script.get("dataset_name", "mini_wiki")), system_prompt)
        yield found
        yield from _play(args, script, config, tokenizer, data)


def _config(name: str) -> tuple[Any, str]:
    """The policy's configuration, made small."""
    from .models import locate_model

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


def _tokenizer(name: str) -> tuple[Any, str]:
    from transformers import AutoTokenizer

    from .models import MINI_WIKI_POLICY, locate_model

    try:
        return AutoTokenizer.from_pretrained(locate_model(name)), f"tokenizer: of {name}"
    except (OSError, ValueError):
        found = f"tokenizer: that of {name} is not on this machine; tried with the built-in one"
        return AutoTokenizer.from_pretrained(MINI_WIKI_POLICY), found


def _data(given: str | None, of_recipe: str, system_prompt: str) -> tuple[Any, str]:
    from .environments.hotpotqa import hotpotqa_dataset

    if given is not None:
        return hotpotqa_dataset(given, system_prompt=system_prompt), f"rows: of {given}"
    try:
        return hotpotqa_dataset(of_recipe, system_prompt=system_prompt), f"rows: of {of_recipe}"
    except (OSError, DataError, ConnectionError, ValueError) as error:
        if Path(of_recipe).suffix:
            raise
        found = f"rows: {of_recipe} cannot be had here ({type(error).__name__}); tried with the mini wiki"
        return hotpotqa_dataset("mini_wiki", system_prompt=system_prompt), found


def _adapter(script: dict[str, Any]) -> Any:
    from peft import LoraConfig

    targets = script.get("lora_target_modules", "all-linear")
    return LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")


def _play(args: StepPOConfig, script: dict[str, Any], config: Any, tokenizer: Any, data: Any) -> Iterator[str]:
    """One update of two rows, and one evaluation."""
    from transformers import AutoModelForCausalLM

    from .environments.hotpotqa import HotpotQAEnvironment, valid_calls
    from .trainer.steppo_trainer import StepPOTrainer

    config.vocab_size = max(len(tokenizer), config.vocab_size if config.vocab_size < 20_000 else 0)
    config.pad_token_id = config.bos_token_id = None
    config.eos_token_id = tokenizer.eos_token_id
    trainer = StepPOTrainer(
        args=args.for_trial(),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_config(config),
        train_dataset=data.train_dataset,
        peft_config=_adapter(script) if script.get("use_peft") else None,
        environment_factory=partial(
            HotpotQAEnvironment,
            data.retriever,
            top_k=int(script.get("num_passages", 3)),
            reward=script.get("reward", "exact_match"),
            state=script.get("state", "chat"),
            force_first_search=bool(script.get("force_first_search", False)),
        ),
        reward_funcs=[valid_calls] if script.get("valid_call_reward") else None,
    )
    trainer.sampler = trainer.player.sampler = ScriptedSampler(tokenizer, trainer.rows)
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
    yield "one update: " + ", ".join(f"{name} {logs[name]:.3g}" for name in shown if name in logs)
