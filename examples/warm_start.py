"""
A short supervised warm start for a model that writes no valid tool calls and so gets no reward to learn from.

    python examples/warm_start.py --model_name_or_path models/SmolLM2-135M-Instruct \\
        --config smollm2-135m-cpu --output_dir models/SmolLM2-135M-warm

It imitates right demonstrations on the built-in wiki, with the recipe's system prompt. They teach the form of a call,
and nothing about the questions of the later training. A few steps suffice: a model that always writes valid calls
would have nothing left to learn from the reward for them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import yaml
from make_mini_wiki_policy import Call, play
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)

from trl_steppo.chat import ChatFormat
from trl_steppo.environments.hotpotqa import BM25Retriever, HotpotQAEnvironment, make_mini_wiki
from trl_steppo.environments.hotpotqa.data import SYSTEM_PROMPT
from trl_steppo.environments.tools import make_playable
from trl_steppo.recipes import find_recipe
from trl_steppo.types import Tokenizer

IGNORED = -100  # label of tokens that transformers leaves out of the loss


@dataclass
class Arguments:
    """The initial model, and how long to train it."""

    model_name_or_path: str = field(metadata={"help": "A directory, or a name on the hub."})
    output_dir: str = field(metadata={"help": "Where to save model and tokenizer."})
    config: str | None = field(default=None, metadata={"help": "The recipe whose system prompt is shown."})
    num_steps: int = field(default=3, metadata={"help": "Optimizer steps."})
    batch_size: int = field(default=4, metadata={"help": "Demonstrations of a step."})
    learning_rate: float = field(default=3e-5, metadata={"help": "Learning rate, constant."})
    seed: int = field(default=0, metadata={"help": "Seed of the world and of everything else."})


def demonstrations(tokenizer: Tokenizer, system_prompt: str, count: int, seed: int) -> list[dict[str, list[int]]]:
    """Token ids and labels of questions of a made-up world, each searched hop by hop and answered."""
    wiki = make_mini_wiki(seed=1000 + seed)  # not the world of the built-in example
    environment = HotpotQAEnvironment(BM25Retriever(wiki.passages), top_k=1)
    chat = ChatFormat(tokenizer, tools=make_playable(environment).tools)
    demonstrated = []
    for row in random.Random(seed).sample(wiki.train, count):
        calls = [*(Call("search", title) for title in row["path"]), Call("answer", row["answer"])]
        ids, is_response = play(chat, environment, row, calls, system_prompt)
        labels = [token if counts else IGNORED for token, counts in zip(ids, is_response, strict=True)]
        demonstrated.append({"input_ids": ids, "labels": labels})
    return demonstrated


def main(args: Arguments) -> None:
    """Imitate demonstrations, and save the model."""
    recipe = {} if args.config is None else yaml.safe_load(find_recipe(args.config).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=args.output_dir,
            max_steps=args.num_steps,
            per_device_train_batch_size=args.batch_size,
            learning_rate=args.learning_rate,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            seed=args.seed,
        ),
        train_dataset=demonstrations(
            tokenizer,
            recipe.get("system_prompt", SYSTEM_PROMPT),
            count=args.num_steps * args.batch_size,
            seed=args.seed,
        ),
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
    )
    trainer.train()
    model.save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)


if __name__ == "__main__":
    parser = HfArgumentParser(Arguments)  # type: ignore[arg-type]  # a recipe is one of its own flags here
    main(*parser.parse_args_into_dataclasses())
