"""
Train an agent that searches a wiki step by step and answers questions.

    accelerate launch examples/hotpotqa_steppo.py

trains the built-in policy on the built-in wiki, on a CPU, in minutes (`examples/configs/mini_wiki.yaml`). The same
with token-level PPO:

    accelerate launch examples/hotpotqa_steppo.py --advantage_estimator token_gae --importance_sampling_level token

Any setting of `StepPOConfig` is a flag. For a model of your own, choose a recipe with `--config`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import TrlParser

from trl_steppo import StepPOConfig, StepPOTrainer
from trl_steppo.assets import locate_model
from trl_steppo.environments.hotpotqa import HotpotQAEnvironment, hotpotqa_dataset, valid_calls
from trl_steppo.environments.hotpotqa.data import SYSTEM_PROMPT

RECIPES = Path(__file__).parent / "configs"


@dataclass
class HotpotQAArguments:
    """Which model, what to search, and what to pay for."""

    model_name_or_path: str = field(
        metadata={"help": "The policy: built in (`mini_wiki`, `mini_wiki_thinking`), a directory, or on the hub."}
    )
    model_revision: str = field(default="main", metadata={"help": "Its revision on the hub."})
    dtype: str = field(default="float32", metadata={"help": "Its weights' type: float32, bfloat16, or auto."})
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "Its attention: sdpa, flex_attention (for GPUs) or eager."}
    )
    dataset_name: str = field(
        default="mini_wiki",
        metadata={"help": "`mini_wiki`, a .json, .jsonl or .parquet file, a name on the hub, a prepared directory."},
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "File to evaluate on. None: a part of a local file, or the validation split."}
    )
    use_peft: bool = field(default=False, metadata={"help": "Train LoRA adapters instead of whole networks."})
    lora_r: int = field(default=32, metadata={"help": "Their rank."})
    lora_alpha: int = field(default=64, metadata={"help": "Their scale, over the rank."})
    lora_target_modules: str = field(default="all-linear", metadata={"help": "The layers they stand in."})
    num_passages: int = field(default=3, metadata={"help": "Most passages that a search returns."})
    reward: Literal["exact_match", "f1"] = field(default="exact_match", metadata={"help": "What an answer is paid."})
    valid_call_reward: float = field(
        default=0.0, metadata={"help": "What the share of responses that make a valid tool call is paid beside it."}
    )
    system_prompt: str = field(default=SYSTEM_PROMPT, metadata={"help": "First message of every prompt."})
    state: Literal["chat", "rewritten"] = field(
        default="chat", metadata={"help": "How the state is shown: a growing chat, or the paper's rewritten prompt."}
    )
    force_first_search: bool = field(
        default=False, metadata={"help": "Begin with what a search for the question finds, as the paper does."}
    )


def main(script_args: HotpotQAArguments, training_args: StepPOConfig) -> None:
    """Build everything, train, save."""
    data = hotpotqa_dataset(
        script_args.dataset_name,
        eval_dataset_name=script_args.eval_dataset_name,
        system_prompt=script_args.system_prompt,
    )
    if script_args.valid_call_reward:
        training_args.reward_weights = [script_args.valid_call_reward]
    name = locate_model(script_args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=script_args.model_revision,
        attn_implementation=script_args.attn_implementation,
        dtype="auto" if script_args.dtype == "auto" else getattr(torch, script_args.dtype),
    )
    trainer = StepPOTrainer(
        args=training_args,
        processing_class=AutoTokenizer.from_pretrained(name, revision=script_args.model_revision),
        model=model,
        train_dataset=data.train_dataset,
        eval_dataset=data.eval_dataset,
        peft_config=make_adapter(script_args) if script_args.use_peft else None,
        environment_factory=partial(
            HotpotQAEnvironment,
            data.retriever,
            top_k=script_args.num_passages,
            reward=script_args.reward,
            state=script_args.state,
            force_first_search=script_args.force_first_search,
        ),
        reward_funcs=[valid_calls] if script_args.valid_call_reward else None,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


def make_adapter(script_args: HotpotQAArguments) -> Any:
    """The adapter of the policy."""
    from peft import LoraConfig

    return LoraConfig(
        r=script_args.lora_r,
        lora_alpha=script_args.lora_alpha,
        target_modules=script_args.lora_target_modules,
        task_type="CAUSAL_LM",
    )


def with_default_config(arguments: list[str]) -> list[str]:
    """Without a model and a config, the built-in example; a model without a config is refused."""
    names = {argument.split("=")[0] for argument in arguments}
    if "--config" in names:
        return arguments
    if "--model_name_or_path" in names:
        built_in = ("mini_wiki", "rooms")
        recipes = ", ".join(sorted(path.name for path in RECIPES.glob("*.yaml") if not path.name.startswith(built_in)))
        raise SystemExit(
            "--model_name_or_path needs a --config: the learning rate of the built-in small model would destroy "
            f"another one. Recipes for real models in {RECIPES.name}/: {recipes}"
        )
    return ["--config", str(RECIPES / "mini_wiki.yaml"), *arguments]


if __name__ == "__main__":
    parser = TrlParser((HotpotQAArguments, StepPOConfig))  # type: ignore[arg-type]
    main(*parser.parse_args_and_config(with_default_config(sys.argv[1:])))
