"""Metrics of an update that its episodes tell: their world, their sampling, their age."""

from __future__ import annotations

import functools
import logging
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from ..batching import StepBatch
from ..learning.metrics import Means
from ..learning.ranks import gather_objects
from ..losses import Level, importance_ratio
from ..types import Episode, StopReason

logger = logging.getLogger(__name__)

_REFUSED = ("epoch", "step", "total_flos")  # which `Trainer` adds to what is logged


def beside(logged: dict[str, float], own: dict[str, float]) -> dict[str, float]:
    """
    What reward functions logged with `log_metric`, by the same names, but for those that mean something else already:
    these are called `log_metric/{name}`.

    Args:
        logged (`dict[str, float]`):
            By reward functions.
        own (`dict[str, float]`):
            What the trainer logs.
    """
    taken = [name for name in logged if name in own or name in _REFUSED]
    for name in taken:
        _tell_of_taken_name(name)
    return {f"log_metric/{name}" if name in taken else name: value for name, value in logged.items()}


@functools.cache
def _tell_of_taken_name(name: str) -> None:
    logger.warning(
        "a reward function logs the metric %r, which is one of the trainer's own; it is logged as 'log_metric/%s' "
        "(told once)",
        *(name, name),
    )


def add_age_metrics(means: Means, batch: StepBatch, *, version: int, max_staleness: int) -> None:
    """
    How old what was sampled is. `rollout/staleness`: updates that the weights are ahead of those that sampled a step;
    `rollout/staleness_K`: share of the steps where it is K.

    Args:
        means ([`Means`]):
            Where to.
        batch ([`StepBatch`]):
            This rank's steps.
        version (`int`):
            Updates applied to the weights that train.
        max_staleness (`int`):
            Largest K.
    """
    staleness = version - batch.policy_versions
    means.add("rollout/staleness", staleness.sum(), staleness.numel())
    for age in range(max_staleness + 1):
        means.add(f"rollout/staleness_{age}", (staleness == age).sum(), staleness.numel())


def add_correction_metrics(
    means: Means, batch: StepBatch, old_logprobs: torch.Tensor, *, level: Level, cap: float
) -> None:
    """
    How far the sampler's probabilities are from the trainer's. `rollout/correction_ratio_pK`: percentiles over action
    tokens of the ratio that `rollout_correction` bounds, the mean over ranks; `rollout/correction_beyond_cap`: share
    of the tokens where it is above the cap.

    Args:
        means ([`Means`]):
            Where to.
        batch ([`StepBatch`]):
            This rank's steps.
        old_logprobs (`torch.Tensor` of shape `(N, A)`):
            By the trainer, before the update.
        level (`str`):
            `"step"` or `"token"`, as of the correction.
        cap (`float`):
            Of the correction.
    """
    mask = batch.action_mask
    ratios = importance_ratio(old_logprobs, batch.rollout_logprobs, mask, level)[mask]
    means.add("rollout/correction_beyond_cap", (ratios > cap).sum(), ratios.numel())
    percentiles = (5, 50, 95)
    # NumPy's: torch's takes no more than 2**24 numbers.
    found = np.percentile(ratios.double().cpu().numpy(), percentiles) if ratios.numel() else ()
    for percentile, ratio in zip(percentiles, found, strict=False):
        means.add(f"rollout/correction_ratio_p{percentile:02d}", float(ratio))


_OWN_NAMES = frozenset({"failed_episodes", "reward", "episode_steps", "truncated"})
"""What is logged as `env/*` of every episode, whatever its environment measures."""


@functools.cache  # once a name
def _warn_of_name(name: str) -> None:
    logger.warning("the score %r of metrics() is left out: `env/%s` is logged already; rename it", name, name)


def add_episode_metrics(means: Means, episodes: Sequence[Episode], *, eos_token_id: int | None = None) -> None:
    """
    `env/*`: what happened in the world, per episode. `rollout/*`: how it was sampled. `objective/scores`,
    `val/num_eos_tokens`: as in `PPOTrainer`. Failed episodes count in `env/failed_episodes` alone. Every rank must
    call it.
    """
    totals: defaultdict[str, float] = defaultdict(float)
    mentions: defaultdict[str, int] = defaultdict(int)
    valid = [episode for episode in episodes if episode.valid]
    means.add("env/failed_episodes", len(episodes) - len(valid), len(episodes))
    for episode in valid:
        responses = [step.response_ids for step in episode.steps]
        means.add("env/reward", episode.episode_return)
        means.add("objective/scores", episode.episode_return)
        means.add("env/episode_steps", len(episode.steps))
        means.add("env/truncated", float(episode.truncated))
        means.add("rollout/response_tokens", sum(map(len, responses)), len(responses))
        means.add("rollout/episode_response_tokens", sum(map(len, responses)))
        means.add("rollout/prompt_tokens", sum(len(step.prompt_ids) for step in episode.steps), len(responses))
        cut = sum(step.stop_reason is StopReason.LENGTH for step in episode.steps)
        means.add("rollout/length_stopped", cut, len(responses))
        if eos_token_id is not None:
            means.add("val/num_eos_tokens", sum(ids.tolist().count(eos_token_id) for ids in responses), 0.0)
        for name, value in episode.metrics.items():
            totals[name] += value
            mentions[name] += 1
    if eos_token_id is not None:
        means.add("val/num_eos_tokens", 0.0)  # counted per rank, as in `PPOTrainer`
    for name in sorted(set(gather_objects(list(totals)))):  # of all ranks, so that they divide alike
        if name in _OWN_NAMES:  # an environment's or an agent's score, which must not be mixed with ours
            _warn_of_name(name)
        elif name.startswith("rewards/"):  # a reward function that does not apply to an episode says nothing about it
            means.add(name, totals[name], mentions[name])
        else:  # a counter that an episode does not mention is 0 in it
            means.add(f"env/{name}", totals[name], len(valid))
