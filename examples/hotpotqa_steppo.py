"""
Train an agent that searches a wiki step by step and answers questions.

    accelerate launch examples/hotpotqa_steppo.py

trains the built-in policy on the built-in wiki, on a CPU, in minutes (`examples/configs/mini_wiki.yaml`). The same
with token-level PPO:

    accelerate launch examples/hotpotqa_steppo.py --advantage_estimator token_gae --importance_sampling_level token

Any setting of `StepPOConfig` is a flag, and so is any field of `HotpotQARecipe`. For a model of your own, choose a
recipe with `--config`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from command_line import is_given, parse_arguments
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_steppo import StepPOConfig, StepPOTrainer
from trl_steppo.assets import locate_model
from trl_steppo.environments.hotpotqa import HotpotQARecipe

RECIPES = Path(__file__).parent / "configs"


def main(recipe: HotpotQARecipe, training_args: StepPOConfig) -> None:
    """Build everything, train, save."""
    data = recipe.data()
    if recipe.valid_call_reward:
        training_args.reward_weights = [recipe.valid_call_reward]
    name = locate_model(recipe.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(
        name,
        revision=recipe.model_revision,
        attn_implementation=recipe.attn_implementation,
        dtype="auto" if recipe.dtype == "auto" else getattr(torch, recipe.dtype),
    )
    trainer = StepPOTrainer(
        args=training_args,
        processing_class=AutoTokenizer.from_pretrained(name, revision=recipe.model_revision),
        model=model,
        train_dataset=data.train_dataset,
        eval_dataset=data.eval_dataset,
        peft_config=recipe.peft_config(),
        environment_factory=recipe.environment_factory(data.retriever),
        reward_funcs=recipe.reward_functions(),
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


def refuse_model_without_config(arguments: list[str]) -> None:
    """The built-in example's settings are for its own small model alone."""
    if is_given("--model_name_or_path", arguments) and not is_given("--config", arguments):
        built_in = ("mini_wiki", "rooms")
        recipes = ", ".join(sorted(path.name for path in RECIPES.glob("*.yaml") if not path.name.startswith(built_in)))
        raise SystemExit(
            "--model_name_or_path needs a --config: the learning rate of the built-in small model would destroy "
            f"another one. Recipes for real models in {RECIPES.name}/: {recipes}"
        )


if __name__ == "__main__":
    refuse_model_without_config(sys.argv[1:])
    main(*parse_arguments((HotpotQARecipe, StepPOConfig), RECIPES / "mini_wiki.yaml"))
