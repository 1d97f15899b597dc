"""
TRL's PPO example with `StepPOTrainer` instead of `PPOTrainer`: token-level PPO with a reward model.

    accelerate launch examples/ppo_dropin.py \
        --dataset_name trl-internal-testing/descriptiveness-sentiment-trl-style --dataset_train_split descriptiveness \
        --sft_model_path EleutherAI/pythia-160m --reward_model_path EleutherAI/pythia-160m \
        --output_dir runs/ppo --learning_rate 3e-6 --per_device_train_batch_size 16 --total_episodes 10000 \
        --missing_eos_penalty 1.0

Its settings are a plain `PPOConfig`. New are evaluation, resuming, and saving the critic. With LoRA:
`--use_peft --lora_target_modules all-linear`.
"""

from __future__ import annotations

from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config

from trl_steppo import PPOConfig, StepPOTrainer

EVAL_ROWS = 100


def load_rows(name: str, config: str | None, split: str) -> Dataset:
    """A dataset with a `prompt` column of text: a local .json, .jsonl or .parquet file, or one on the hub."""
    kind = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}.get(Path(name).suffix)
    if kind is not None:
        return load_dataset(kind, data_files=name, split="train")
    return load_dataset(name, name=config, split=split)


def main(script_args: ScriptArguments, training_args: PPOConfig, model_args: ModelConfig) -> None:
    """Build everything, train, save."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(training_args.sft_model_path)
    if tokenizer.pad_token is None:
        tokenizer.add_special_tokens({"pad_token": "[PAD]"})

    loading = {
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype or "auto",
    }
    # The critic starts from the reward model, as in TRL's example; without `value_model` it would from the policy.
    value_model, reward_model = (
        AutoModelForSequenceClassification.from_pretrained(training_args.reward_model_path, num_labels=1, **loading)
        for _ in range(2)
    )
    policy = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path, **loading)
    peft_config = get_peft_config(model_args)
    reference = None  # of LoRA, the policy without its adapter
    if peft_config is None and training_args.kl_coef:
        reference = AutoModelForCausalLM.from_pretrained(training_args.sft_model_path, **loading)

    def tokenize(row: dict[str, str]) -> dict[str, list[int]]:
        return {"input_ids": tokenizer(row["prompt"])["input_ids"]}

    assert script_args.dataset_name is not None, "--dataset_name is required"
    rows = load_rows(script_args.dataset_name, script_args.dataset_config, script_args.dataset_train_split)
    rows = rows.map(tokenize, remove_columns=rows.column_names, num_proc=training_args.dataset_num_proc)
    num_eval = min(EVAL_ROWS, len(rows) // 10)

    trainer = StepPOTrainer(
        args=training_args,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward_model,
        value_model=value_model,
        train_dataset=rows.select(range(len(rows) - num_eval)),
        eval_dataset=rows.select(range(len(rows) - num_eval, len(rows))),  # `--eval_strategy steps` evaluates on it
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)  # `PPOTrainer` cannot resume
    trainer.save_model()  # the policy, and the critic in `critic/`
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=script_args.dataset_name)
    trainer.generate_completions()


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, PPOConfig, ModelConfig)).parse_args_and_config())  # type: ignore[arg-type]
