"""
Train with an algorithm of your own: two functions, in the place of StepPO's.

    accelerate launch examples/own_algorithm.py

trains the built-in policy on the built-in wiki as `examples/hotpotqa_steppo.py` does, but with a λ that grows with the
episode's length. `--alpha` changes how fast; `--soft_clip true` also replaces PPO's clipped loss. Any setting of
`StepPOConfig` is a flag. `docs/guides/your_algorithm.md` explains the functions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from trl_steppo import StepPOConfig, StepPOParser, StepPOTrainer
from trl_steppo.advantages import step_gae
from trl_steppo.assets import locate_model
from trl_steppo.environments.hotpotqa import HotpotQARecipe
from trl_steppo.losses import Aggregation, aggregate


def length_adaptive_gae(
    rewards: Tensor,
    values: Tensor,
    step_mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap_values: Tensor,
    alpha: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """
    GAE over steps, with λ = 1 − 1/(α·l) in an episode of l steps (length-adaptive GAE of VAPO, arXiv 2504.05118, where
    l counts tokens). A reward then reaches back over about α·l steps: over the same share of every episode.

    The critic's targets keep the fixed `lam`, as in that paper, where it is 1.
    """
    num_steps = step_mask.sum(1)  # (E,)
    lams = (1 - 1 / (alpha * num_steps)).clamp(min=0)
    advantages, advantage, next_value = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0]), bootstrap_values
    for t in reversed(range(rewards.shape[1])):
        is_step = step_mask[:, t]  # False after the end of shorter episodes
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = torch.where(is_step, delta + gamma * lams * advantage, advantage)
        next_value = torch.where(is_step, values[:, t], next_value)
        advantages[:, t] = torch.where(is_step, advantage, 0.0)
    _, returns = step_gae(rewards, values, step_mask, gamma=gamma, lam=lam, bootstrap_values=bootstrap_values)
    return advantages, returns


def soft_clipped_loss(
    ratio: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    *,
    aggregation: Aggregation,
    denominator: Tensor | float | None,
    weights: Tensor | None,
    temperatures: tuple[float, float] = (1.0, 1.05),
    **_: object,
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    A loss whose gradient fades where the ratio leaves 1, instead of ending at a clip range (Soft Adaptive Policy
    Optimization, arXiv 2511.20347): −A · σ(τ(ρ − 1)) · 4/τ, with another τ for advantages that are not positive.
    """
    of_good, of_bad = temperatures
    tau = torch.where(advantages > 0, of_good, of_bad)
    gate = torch.sigmoid(tau * (ratio - 1))
    terms = -advantages * gate * 4 / tau
    if weights is not None:  # correct for the sampler's numerics and age
        terms = terms * weights
    loss = aggregate(terms, action_mask, aggregation, denominator=denominator)
    faded = (1 - 4 * gate * (1 - gate)).detach()  # how much of the gradient is gone, 0 at a ratio of 1
    return loss, {"faded_sum": faded[action_mask].sum()}


@dataclass
class OwnAlgorithm:
    """The settings of the two functions."""

    alpha: float = field(default=1.0, metadata={"help": "Share of an episode that a reward reaches back over."})
    soft_clip: bool = field(default=False, metadata={"help": "Replace PPO's clipped loss by one that fades."})


def main(own: OwnAlgorithm, recipe: HotpotQARecipe, training_args: StepPOConfig) -> None:
    """Build everything, train, save."""
    data = recipe.data()
    trainer = StepPOTrainer(
        args=training_args,
        model=locate_model(recipe.model_name_or_path),
        train_dataset=data.train_dataset,
        eval_dataset=data.eval_dataset,
        environment_factory=recipe.environment_factory(data.retriever),
        advantage_estimator=partial(length_adaptive_gae, alpha=own.alpha),
        policy_loss_fn=soft_clipped_loss if own.soft_clip else None,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()


if __name__ == "__main__":
    parser = StepPOParser((OwnAlgorithm, HotpotQARecipe, StepPOConfig), default_config="mini_wiki")
    main(*parser.parse_args_and_config())
