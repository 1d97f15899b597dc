"""
The picture of the idea: the credit of tokens and the credit of steps, on one episode that was really played.

    python benchmarks/credit_picture.py --json benchmarks/results/credit_picture.json

Token-level PPO trains the built-in policy on the mini wiki for some updates, so that its critic knows something. Of
the last update's episodes the first one is taken that was paid, has three steps, and was not cut. One critic values
it: every token for the credit of tokens, and the last prompt token of each step for the credit of steps. Rewards,
values, γ and λ are the same in both; `token_gae` and `step_gae` are the only difference.

`--redraw FILE` draws the episode of a record again, without a model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common.record import BenchmarkArguments, parse_arguments, print_table, write_record
from study.credit_plot import Theme, plot_credit
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_steppo import StepPOConfig, StepPOTrainer
from trl_steppo.advantages import step_gae, token_gae
from trl_steppo.assets import MINI_WIKI_THINKING_POLICY
from trl_steppo.environments.hotpotqa import HotpotQAEnvironment, hotpotqa_dataset
from trl_steppo.rollout import load_episodes
from trl_steppo.types import Episode

GAMMA, LAM = 0.99, 0.95
NUM_STEPS = 3
_TOKENIZER = AutoTokenizer.from_pretrained(MINI_WIKI_THINKING_POLICY)


@dataclass
class CreditArguments(BenchmarkArguments):
    """
    Args:
        image_dir (`str`, *optional*, defaults to `"docs/images"`):
            Where the picture goes, once for light pages and once for dark ones.
        redraw (`str`, *optional*):
            A record whose episode is drawn again.
        num_updates (`int`, *optional*, defaults to `10`):
            Updates of 64 episodes before the episode is chosen.
    """

    image_dir: str = field(default="docs/images", metadata={"help": "Where the picture goes."})
    redraw: str | None = field(default=None, metadata={"help": "A record whose episode is drawn again."})
    num_updates: int = field(default=10, metadata={"help": "Updates before the episode is chosen."})


@dataclass(frozen=True)
class Credited:
    """
    An episode with its credit.

    Args:
        question (`str`):
            What the agent was asked.
        responses (`list[str]`):
            What it wrote in each step.
        tokens (`list[list[str]]`):
            The tokens of each response.
        rewards (`list[float]`):
            What each step was paid.
        values (`list[list[float]]`):
            The critic's value before each token of each response; the first one is the value of the step's state.
        by_tokens (`list[list[float]]`):
            Advantage of each token, by `token_gae`; not whitened.
        by_steps (`list[float]`):
            Advantage of each step, by `step_gae`; not whitened.
    """

    question: str
    responses: list[str]
    tokens: list[list[str]]
    rewards: list[float]
    values: list[list[float]]
    by_tokens: list[list[float]]
    by_steps: list[float]


def train(args: CreditArguments, output_dir: Path) -> tuple[StepPOTrainer, list[Episode]]:
    """Train at the level of tokens; the trainer, and the episodes of its last update."""
    rows, _, retriever = hotpotqa_dataset("mini_wiki")
    dump = output_dir / "dump"
    updates = 2 if args.quick else args.num_updates
    trainer = StepPOTrainer(
        args=StepPOConfig(
            output_dir=str(output_dir),
            use_cpu=True,
            advantage_estimator="token_gae",
            importance_sampling_level="token",
            gamma=GAMMA,
            lam=LAM,
            learning_rate=2e-4,
            critic_learning_rate=5e-4,
            num_ppo_epochs=1,
            num_critic_epochs=2,
            num_mini_batches=4,
            vf_coef=1.0,
            cliprange_value=10.0,
            max_steps=updates,
            per_device_train_batch_size=64,
            response_length=64,
            gradient_checkpointing=False,
            max_tokens_per_micro_batch=8192,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            dump_episodes_dir=str(dump),
            seed=args.seed + 1,
        ),
        processing_class=_TOKENIZER,
        model=AutoModelForCausalLM.from_pretrained(MINI_WIKI_THINKING_POLICY),
        train_dataset=rows,
        environment_factory=partial(HotpotQAEnvironment, retriever, top_k=1),
    )
    trainer.train()
    return trainer, load_episodes(sorted(dump.iterdir())[-1])


def credit_of(trainer: StepPOTrainer, episode: Episode) -> Credited:
    """Value an episode with the trainer's critic, and assign its reward to tokens and to steps."""
    rollout = trainer.learner.prepare([episode])
    values = trainer.learner.evaluate(rollout).values
    assert values is not None
    mask = rollout.batch.action_mask
    rewards = torch.tensor([[step.reward for step in episode.steps]])
    by_steps, _ = step_gae(
        rewards, values[:, 0][None], torch.ones_like(rewards, dtype=torch.bool), gamma=GAMMA, lam=LAM
    )
    of_tokens = torch.zeros_like(values)
    of_tokens[torch.arange(len(mask)), mask.sum(-1) - 1] = rewards[0]  # at the last token of each step
    by_tokens, _ = token_gae(
        of_tokens.flatten()[None], values.flatten()[None], mask.flatten()[None], gamma=GAMMA, lam=LAM
    )
    by_tokens = by_tokens.view_as(values)
    lengths = [len(step.response_ids) for step in episode.steps]

    def rows(grid: torch.Tensor) -> list[list[float]]:
        return [row[:length].tolist() for row, length in zip(grid, lengths, strict=True)]

    return Credited(
        question=_text(episode.question),
        responses=[_decoded(step.response_ids.tolist()) for step in episode.steps],
        tokens=[[_decoded([token]) for token in step.response_ids] for step in episode.steps],
        rewards=rewards[0].tolist(),
        values=rows(values),
        by_tokens=rows(by_tokens),
        by_steps=by_steps[0].tolist(),
    )


def _decoded(ids: list[int]) -> str:
    """The text of token ids."""
    return str(_TOKENIZER.decode(ids))


def _text(question: object) -> str:
    """The last message of a prompt, or the prompt itself."""
    return str(question[-1]["content"]) if isinstance(question, list) else str(question)


def choose(episodes: Sequence[Episode]) -> Episode:
    """The first episode that was paid, has three steps, and was not cut."""
    for episode in episodes:
        if episode.valid and episode.terminated and len(episode.steps) == NUM_STEPS and episode.episode_return > 0:
            return episode
    raise SystemExit(f"no episode of {NUM_STEPS} steps was paid; train longer (--num_updates) or try another --seed")


def headlines(responses: Sequence[str]) -> list[str]:
    """The tool that each response calls, and what with."""
    calls = [re.search(r'"name": "(\w+)", "arguments": {"\w+": ("[^"]*")', response) for response in responses]
    return [f"{call[1]}\n{call[2]}" if call else "" for call in calls]


def main(args: CreditArguments) -> None:
    """Train, choose, print, draw, write."""
    if args.redraw is not None:
        credited = Credited(**json.loads(Path(args.redraw).read_text())["episode"])
    else:
        with TemporaryDirectory() as directory:
            trainer, episodes = train(args, Path(directory))
            credited = credit_of(trainer, choose(episodes))
    print_table(
        f"Credit in one episode: {credited.question}",
        ["step", "tokens", "reward", "value", "credit of the step", "credit of its first token", "of its last token"],
        [
            [
                str(number),
                str(len(tokens)),
                *(f"{x:.3f}" for x in (reward, values[0], of_step, of_tokens[0], of_tokens[-1])),
            ]
            for number, (tokens, reward, values, of_step, of_tokens) in enumerate(
                zip(
                    credited.tokens,
                    credited.rewards,
                    credited.values,
                    credited.by_steps,
                    credited.by_tokens,
                    strict=True,
                ),
                start=1,
            )
        ],
    )
    if not args.quick:
        for theme in Theme:
            plot_credit(
                Path(args.image_dir), headlines(credited.responses), credited.by_tokens, credited.by_steps, theme
            )
    if args.redraw is None:
        write_record(args.json, {"gamma": GAMMA, "lam": LAM, "episode": asdict(credited)})


if __name__ == "__main__":
    main(parse_arguments(CreditArguments))
