"""
`StepPOTrainer` against `PPOTrainer`: seconds and peak memory of an update of the same single-turn work, in one run.

Both get the same `PPOConfig`, which means token-level PPO to both, and the same models. They take turns, each update
in a process of its own, whose peak memory is then that update's.

    python benchmarks/vs_ppo_trainer.py [--quick] [--json FILE]
"""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch
import transformers
import trl
from common.processes import in_new_process, peak_bytes
from common.record import BenchmarkArguments, parse_arguments, print_table, write_record
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from trl_steppo import PPOConfig, StepPOTrainer
from trl_steppo.compat.trl import ppo_bases
from trl_steppo.types import JsonObject

TRAINERS: JsonObject = {"PPOTrainer": ppo_bases()[1], "StepPOTrainer": StepPOTrainer}
PROMPTS, MICRO_BATCH = 32, 8
PROMPT_TOKENS, RESPONSE_TOKENS = 64, 128


@dataclass
class VsPPOTrainerArguments(BenchmarkArguments):
    """
    Args:
        quick (`bool`, *optional*, defaults to `False`):
            One update of one epoch, in less than five minutes.
        vocabularies (`list[int]`, *optional*, defaults to `[151936, 4096]`):
            Sizes of the vocabulary.
        epochs (`int`, *optional*, defaults to `4`):
            PPO epochs of an update; `--quick` makes 1.
        updates (`int`, *optional*, defaults to `3`):
            Updates of each trainer; `--quick` makes 1.
        threads (`int`, *optional*, defaults to `2`):
            Threads of both trainers.
    """

    quick: bool = field(default=False, metadata={"help": "One update of one epoch, in less than five minutes."})
    vocabularies: list[int] = field(
        default_factory=lambda: [151_936, 4_096], metadata={"help": "Sizes of the vocabulary."}
    )
    epochs: int = field(default=4, metadata={"help": "PPO epochs of an update; --quick makes 1."})
    updates: int = field(default=3, metadata={"help": "Updates of each trainer; --quick makes 1."})
    threads: int = field(default=2, metadata={"help": "Threads of both trainers."})


@dataclass(frozen=True)
class Work:
    """One update."""

    vocabulary: int
    epochs: int
    threads: int
    seed: int


@dataclass(frozen=True)
class Cost:
    """What an update took; `import_bytes` of the peak were there before the first model was."""

    seconds: float
    peak_bytes: int
    import_bytes: int


def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer that only names the special tokens. The model has no padding token, so no response contains it."""
    vocab = {"<eos>": 0, "<pad>": vocabulary}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<eos>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def make_models(work: Work) -> JsonObject:
    torch.manual_seed(work.seed)
    config = Qwen2Config(
        vocab_size=work.vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    config.num_labels = 1
    policy, reference = Qwen2ForCausalLM(config), Qwen2ForCausalLM(config)
    reference.load_state_dict(policy.state_dict())
    reward_model, value_model = Qwen2ForSequenceClassification(config), Qwen2ForSequenceClassification(config)
    return {"model": policy, "ref_model": reference, "reward_model": reward_model, "value_model": value_model}


def make_rows(work: Work) -> Dataset:
    """Rows of two updates: in the last one of its dataset PPOTrainer makes more optimizer steps."""
    generator = torch.Generator().manual_seed(work.seed)
    ids = torch.randint(1, work.vocabulary, (2 * PROMPTS, PROMPT_TOKENS), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist()})


def make_config(output_dir: str, work: Work) -> PPOConfig:
    """What is not named here has the default of `PPOConfig`."""
    return PPOConfig(
        output_dir=output_dir,
        total_episodes=PROMPTS,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=PROMPTS // MICRO_BATCH,
        num_ppo_epochs=work.epochs,
        response_length=RESPONSE_TOKENS,
        kl_coef=0.05,
        gradient_checkpointing=False,  # PPOTrainer ignores it
        bf16=False,
        use_cpu=True,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=work.seed,
    )


def update_once(trainer_name: str, work: Work) -> Cost:
    """One update, from the start of `train` to its end; to be called in a new process."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(work.threads)
    import_bytes = peak_bytes()
    with tempfile.TemporaryDirectory() as output_dir, contextlib.redirect_stdout(io.StringIO()):
        trainer = TRAINERS[trainer_name](
            args=make_config(output_dir, work),
            processing_class=make_tokenizer(work.vocabulary),
            train_dataset=make_rows(work),
            **make_models(work),
        )
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    steps = {int(state["step"]) for state in trainer.optimizer.state.values()}
    assert steps == {work.epochs}, f"{trainer_name} made {steps} optimizer steps in {work.epochs} epochs"
    return Cost(seconds, peak_bytes(), import_bytes)


def total(costs: Sequence[Cost]) -> Cost:
    """The median time, and the largest peak."""
    return Cost(
        statistics.median(cost.seconds for cost in costs),
        max(cost.peak_bytes for cost in costs),
        max(cost.import_bytes for cost in costs),
    )


def main(args: VsPPOTrainerArguments) -> None:
    if TRAINERS["PPOTrainer"] is transformers.Trainer:
        print(f"TRL {trl.__version__} has no `PPOTrainer`: nothing to measure")
        return
    epochs, updates = (1, 1) if args.quick else (args.epochs, args.updates)
    measured: dict[int, dict[str, list[Cost]]] = {}
    for vocabulary in args.vocabularies:
        work = Work(vocabulary, epochs, args.threads, args.seed)
        measured[vocabulary] = {name: [] for name in TRAINERS}
        for _ in range(updates):
            for name in TRAINERS:
                measured[vocabulary][name].append(in_new_process(update_once, name, work))
    totals = {v: {name: total(costs) for name, costs in by_name.items()} for v, by_name in measured.items()}
    print_table(
        f"An update of {PROMPTS} x ({PROMPT_TOKENS} + {RESPONSE_TOKENS}) tokens, {epochs} epochs "
        f"(median seconds of {updates}, largest peak memory; {args.threads} threads)",
        ["trainer", "vocabulary", "seconds", "ratio", "peak MB", "ratio", "peak above imports MB"],
        [row for vocabulary, by_name in totals.items() for row in table_rows(vocabulary, by_name)],
    )
    figures = {
        "time_ratio": {v: round(ratio(by_name, "seconds"), 3) for v, by_name in totals.items()},
        "peak_memory_ratio": {v: round(ratio(by_name, "peak_bytes"), 3) for v, by_name in totals.items()},
        "median": {v: {name: asdict(cost) for name, cost in by_name.items()} for v, by_name in totals.items()},
        "updates": {
            v: {name: [asdict(cost) for cost in costs] for name, costs in by_name.items()}
            for v, by_name in measured.items()
        },
        "epochs": epochs,
        "threads": args.threads,
    }
    write_record(args.json, figures)


def ratio(by_name: dict[str, Cost], quantity: str) -> float:
    return float(getattr(by_name["StepPOTrainer"], quantity) / getattr(by_name["PPOTrainer"], quantity))


def table_rows(vocabulary: int, by_name: dict[str, Cost]) -> list[list[str]]:
    rows = []
    for name, cost in by_name.items():
        compared = name == "StepPOTrainer"
        rows.append(
            [
                name,
                f"{vocabulary:,}",
                f"{cost.seconds:.1f}",
                f"{ratio(by_name, 'seconds'):.2f}" if compared else "",
                f"{cost.peak_bytes / 1e6:,.0f}",
                f"{ratio(by_name, 'peak_bytes'):.2f}" if compared else "",
                f"{(cost.peak_bytes - cost.import_bytes) / 1e6:,.0f}",
            ]
        )
    return rows


if __name__ == "__main__":
    main(parse_arguments(VsPPOTrainerArguments))
