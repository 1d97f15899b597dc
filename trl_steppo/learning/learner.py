"""The two networks and their optimizers: scoring a batch before the update, and the update itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ..batching import LayoutName, Part, StepBatch, StepRolloutCollator, divide, micro_batches, mini_batches
from ..losses import (
    aggregate,
    aggregation_count,
    clipped_policy_loss,
    clipped_value_loss,
    correction_weights,
    importance_ratio,
    kl_estimate,
)
from ..masked import masked_sum
from ..models import rows_at_once
from ..modes import evaluating
from ..types import Episode
from .balancing import lesson_of_all_ranks, own_lesson
from .metrics import Clock, Means
from .network import Network, end_update, numerics_of
from .ranks import all_agree, largest, summed
from .settings import LearnerSettings
from .update import Credit, Lesson, Rollout, Scores, Steps


class Learner:
    """
    Learns from episodes. It knows nothing about environments, sampling or checkpoints.

    Args:
        args ([`LearnerSettings`]):
            The run's settings.
        accelerator ([`~accelerate.Accelerator`]):
            Places tensors, scales and reduces gradients.
        policy ([`Network`]):
            A prepared [`PolicyScorer`].
        critic ([`Network`], *optional*):
            A prepared [`Critic`]; `None` for estimators without one.
        reference (`torch.nn.Module`, *optional*):
            A [`PolicyScorer`] that never changes.
        layout (`str`):
            How steps share their prefixes; see [`StepRolloutCollator`].
        clock ([`Clock`]):
            Where the time of forward, backward and optimizer goes, as `model_s`.
        on_event (`Callable[[str], None]`, *optional*):
            Called with the name of a `TrainerCallback` event within an update: `on_substep_end` (a backward pass that
            does not end its mini-batch), `on_pre_optimizer_step`, `on_optimizer_step`.
    """

    def __init__(
        self,
        args: LearnerSettings,
        accelerator: Accelerator,
        policy: Network,
        critic: Network | None,
        reference: nn.Module | None,
        layout: LayoutName,
        clock: Clock,
        on_event: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.args = args
        self.accelerator = accelerator
        self.numerics = numerics_of(accelerator)
        self.policy = policy
        self.critic = critic
        self.reference = reference
        self.layout: LayoutName = layout
        self.collator = StepRolloutCollator(layout=layout)
        # The critic does not forward what no value is read from.
        collate_values = partial(
            StepRolloutCollator,
            layout=layout,
            reads="token_values" if args.advantage_estimator == "token_gae" else "step_values",
        )
        self.value_collator = collate_values()
        self.scoring_value_collator = collate_values(bootstrap_truncated=args.bootstrap_truncated)
        self.clock = clock
        self.on_event = on_event
        self.steps_taken = 0  # of optimizers, over the run
        self.steps_skipped = 0  # as a loss or a gradient was not a finite number
        self.tokens_forwarded = 0  # by the policy's training passes, padding included; over the run

    # -- before the update --------------------------------------------------------------------------------------------

    def prepare(self, episodes: Sequence[Episode]) -> Rollout:
        """Lay out the valid episodes of an update (there may be none on this rank)."""
        batch = self.collator(episodes) if episodes else StepBatch.empty()
        return Rollout(Steps.of(episodes), batch.to(self.accelerator.device))

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Scores:
        """Log-probabilities and values under the weights before the update."""
        args, batch = self.args, rollout.batch
        shape, device = batch.action_mask.shape, self.accelerator.device
        needs_old = (
            args.num_ppo_epochs > 1 or args.num_mini_batches > 1 or args.kl_coef != 0.0 or args.correction != "none"
        )
        old = torch.zeros(shape, device=device) if needs_old else None
        ref = torch.zeros(shape, device=device) if self.reference is not None else None
        values = self._zero_values(batch) if self.critic is not None else None
        bootstrap = torch.zeros(batch.num_episodes, device=device) if self.critic is not None else None
        with self._evaluating():
            for parts in self._scoring_batches(rollout, range(len(rollout.episodes))):
                if old is not None or ref is not None:
                    micro, steps = self._collate(rollout.steps, parts, self.collator)
                    width = micro.action_mask.shape[1]
                    if old is not None:
                        old[steps, :width] = self._forward(self.policy.module, micro)[0]
                    if ref is not None:
                        ref[steps, :width] = self._forward(self.reference, micro)[0]
                if values is not None and bootstrap is not None:
                    self._score_values(rollout, parts, values, bootstrap)
        return Scores(old, ref, values, bootstrap)

    @torch.no_grad()
    def logprobs(self, rollout: Rollout, chosen: Sequence[int]) -> torch.Tensor:
        """
        Log-probabilities under the policy as it is now. Every rank must call it.

        Args:
            rollout ([`Rollout`]):
                What was played.
            chosen (`Sequence[int]`):
                The episodes to forward; there may be none on this rank.

        Returns:
            `torch.Tensor`: (N, A), 0 in all other episodes.
        """
        found = torch.zeros(rollout.batch.action_mask.shape, device=self.accelerator.device)
        with self._evaluating():
            for parts in self._scoring_batches(rollout, chosen):
                micro, steps = self._collate(rollout.steps, parts, self.collator)
                found[steps, : micro.action_mask.shape[1]] = self._forward(self.policy.module, micro)[0]
        return found

    def _scoring_batches(self, rollout: Rollout, chosen: Sequence[int]) -> list[list[Part]]:
        """Micro-batches of a pass without gradients."""
        longest = max((len(ids) for sequences in rollout.steps.sequences for ids in sequences), default=1)
        most = rows_at_once(self.args.local_rollout_forward_batch_size, longest, self.accelerator.device)
        return self._micro_batches(rollout.steps, chosen, most)

    def _score_values(
        self, rollout: Rollout, parts: list[Part], values: torch.Tensor, bootstrap: torch.Tensor
    ) -> None:
        """Fill in the values of a micro-batch's states, and of those after its truncated episodes."""
        assert self.critic is not None
        micro, steps = self._collate(rollout.steps, parts, self.scoring_value_collator)
        positions = micro.value_positions if values.dim() == 1 else micro.logit_positions
        ended = micro.bootstrap_positions >= 0
        reads = torch.cat([positions.flatten(), micro.bootstrap_positions[ended]])
        of_states, after = self._forward(self.critic.module, micro, reads).tensor_split([positions.numel()])
        if values.dim() == 1:
            values[steps] = of_states
        else:
            values[steps, : positions.shape[1]] = of_states.view(positions.shape)
        episodes = torch.tensor([index for index, _ in parts], dtype=torch.long, device=ended.device)
        bootstrap[episodes[ended]] = after

    # -- the update ---------------------------------------------------------------------------------------------------

    def update(self, rollout: Rollout, scores: Scores, credit: Credit, *, seed: int, train_policy: bool) -> Means:
        """
        All epochs of one update; every mini-batch is exactly one optimizer step of each network that is trained. One
        without anything to learn from (its episodes failed, or are masked, on all ranks) is none: a gradient of zero
        would still move the weights, by their optimizer's momentum.

        Args:
            rollout ([`Rollout`]), scores ([`Scores`]), credit ([`Credit`]):
                What to learn from.
            seed (`int`):
                Of the permutations that split the episodes into mini-batches.
            train_policy (`bool`):
                `False` while the critic warms up: the policy and its optimizer stay bit-identical.
        """
        args, stats = self.args, Means()
        policy_epochs = args.num_ppo_epochs if train_policy else 0
        critic_epochs = args.critic_epochs if self.critic is not None else 0
        share = 1.0 / self.accelerator.num_processes  # of what all ranks do together, so that its count sums to 1
        stats.add("policy/skipped_steps", 0.0, share)
        if self.critic is not None:
            stats.add("critic/skipped_steps", 0.0, share)
        lesson = (own_lesson if args.max_tokens_per_micro_batch is None else lesson_of_all_ranks)(
            rollout, scores, credit
        )
        for epoch in range(max(policy_epochs, critic_epochs)):
            splits = [mini_batches(n, args.num_mini_batches, seed=seed * 1_009 + epoch) for n in lesson.num_episodes]
            for of_ranks in zip(*splits, strict=True):
                chosen, mine = of_ranks[lesson.rank], self._share(lesson, of_ranks)
                if epoch < policy_epochs:
                    loss_of = partial(self._policy_loss, lesson, stats)
                    denominator = self._policy_denominator(rollout, chosen)
                    self._train(self.policy, lesson, mine, denominator, "policy", loss_of, stats)
                if epoch < critic_epochs and self.critic is not None:
                    loss_of = partial(self._value_loss, lesson, stats)
                    denominator = self._value_denominator(rollout, chosen)
                    self._train(self.critic, lesson, mine, denominator, "critic", loss_of, stats)
        self.end_update()
        return stats

    def end_update(self) -> None:
        """On to the learning rates of the next update."""
        end_update([self.policy] + ([self.critic] if self.critic is not None else []))

    def _share(self, lesson: Lesson, chosen: Sequence[Sequence[int]]) -> list[int]:
        """What this rank forwards of the episodes that each rank of a lesson has chosen of its own."""
        if len(chosen) == 1:
            return list(chosen[0])
        starts = accumulate(lesson.num_episodes, initial=0)
        everything = [start + index for start, of_rank in zip(starts, chosen, strict=False) for index in of_rank]
        shares = divide(
            everything,
            lesson.steps.sequences,
            [episode.stream_position for episode in lesson.steps.episodes],
            layout=self.layout,
            num_ranks=len(chosen),
        )
        return shares[lesson.rank]

    def _train(
        self,
        network: Network,
        lesson: Lesson,
        chosen: Sequence[int],
        denominator: float,
        name: str,
        loss_of: Callable[[StepBatch, torch.Tensor, float], torch.Tensor],
        stats: Means,
    ) -> None:
        """One optimizer step of one network on one mini-batch."""
        if not denominator:
            return
        micros = self._micro_batches(lesson.steps, chosen, self.args.per_device_train_batch_size)
        collator = self.collator if network is self.policy else self.value_collator
        finite = True
        network.module.train()
        for number, parts in enumerate(micros):
            micro, steps = self._collate(lesson.steps, parts, collator)
            if network is self.policy:
                self.tokens_forwarded += micro.input_ids.numel()
            is_last = number == len(micros) - 1
            with network.accumulating(is_last=is_last):
                loss = loss_of(micro, steps, denominator)
                with self.clock.measure("model_s"):
                    finite = math.isfinite(loss.item()) and finite
                    network.backward(loss)
            if not is_last:
                self.on_event("on_substep_end")
        with self.clock.measure("model_s"):
            norm = network.step(
                self.args.max_grad_norm,
                agree=lambda seen: all_agree(finite and seen),
                before=lambda: self.on_event("on_pre_optimizer_step"),
            )
        self.on_event("on_optimizer_step")
        share = 1.0 / self.accelerator.num_processes
        if norm is not None:
            self.steps_taken += 1
            stats.add(f"{name}/grad_norm", norm)
        else:
            self.steps_skipped += 1
        stats.add(f"{name}/skipped_steps", share if norm is None else 0.0, 0.0)
        stats.add("loss/policy_avg" if name == "policy" else "loss/value_avg", 0.0, share)
        if name == "policy" and self.args.kl_loss_coef:
            stats.add("loss/kl_avg", 0.0, share)

    def _policy_loss(
        self, lesson: Lesson, stats: Means, micro: StepBatch, steps: torch.Tensor, denominator: float
    ) -> torch.Tensor:
        args, mask = self.args, self._policy_mask(micro)
        scores, credit = lesson.scores, lesson.credit
        width = mask.shape[1]
        logprobs, entropy = self._forward(self.policy.module, micro, entropy="train" if args.entropy_coef else "track")
        old = logprobs.detach() if scores.old_logprobs is None else scores.old_logprobs[steps, :width]
        weights = None
        if args.correction != "none":
            weights = correction_weights(
                old,
                micro.rollout_logprobs,
                micro.action_mask,
                mode=args.correction,
                level=args.rollout_correction_level,
                cap=args.rollout_correction_cap,
            )
            stats.add("rollout/correction_weight", masked_sum(weights, mask), mask.sum())
        averaging: dict[str, Any] = {"aggregation": args.aggregation, "denominator": denominator}
        shares = torch.ones_like(old)
        if args.aggregation == "episode":  # some of an episode's steps may be in another micro-batch
            averaging["aggregation"] = "step"
            shares = shares / micro.num_steps_of_episode[:, None]
            weights = shares if weights is None else shares * weights
        loss, sums = clipped_policy_loss(
            importance_ratio(logprobs, old, micro.action_mask, args.importance_sampling_level),
            credit.advantages[steps, :width],
            mask,
            cliprange=args.cliprange,
            cliprange_high=args.cliprange_high,
            weights=weights,
            **averaging,
        )
        stats.add("loss/policy_avg", loss.detach(), 0.0)
        if args.kl_loss_coef:
            assert scores.ref_logprobs is not None
            kl = kl_estimate(logprobs, scores.ref_logprobs[steps, :width], micro.action_mask, args.kl_loss_estimator)
            kl_loss = aggregate(kl * shares, mask, **averaging)
            stats.add("loss/kl_avg", kl_loss.detach(), 0.0)
            loss = loss + args.kl_loss_coef * kl_loss
        if args.entropy_coef:
            loss = loss - args.entropy_coef * aggregate(entropy * shares, mask, **averaging)
        self._track_policy(stats, sums, logprobs.detach(), old, entropy.detach(), micro, mask)
        return loss

    def _value_loss(
        self, lesson: Lesson, stats: Means, micro: StepBatch, steps: torch.Tensor, denominator: float
    ) -> torch.Tensor:
        scores, credit = lesson.scores, lesson.credit
        assert self.critic is not None
        assert scores.values is not None
        assert credit.returns is not None
        if scores.values.dim() == 1:  # one value a step
            positions, mask = micro.value_positions, torch.ones_like(micro.value_positions, dtype=torch.bool)
            old, returns = scores.values[steps], credit.returns[steps]
        else:  # one value an action token
            positions, mask = micro.logit_positions, micro.action_mask
            old, returns = (x[steps, : mask.shape[1]] for x in (scores.values, credit.returns))
        values = self._forward(self.critic.module, micro, positions)
        loss, sums = clipped_value_loss(
            values, old, returns, mask, cliprange_value=self.args.cliprange_value, denominator=denominator
        )
        stats.add("loss/value_avg", loss.detach(), 0.0)
        stats.add("val/clipfrac_avg", sums["clipfrac_sum"], sums["num_values"])
        return self.args.vf_coef * loss

    # -- what both share ----------------------------------------------------------------------------------------------

    def _micro_batches(self, steps: Steps, chosen: Sequence[int], max_episodes: int) -> list[list[Part]]:
        """
        Groups of steps that are forwarded together. As many on every rank (the last ones may be empty), because
        forward and backward passes are what the ranks do together.
        """
        groups = micro_batches(
            chosen,
            steps.sequences,
            layout=self.layout,
            max_episodes=max_episodes,
            max_tokens=self.args.max_tokens_per_micro_batch,
        )
        return groups + [[]] * (largest(len(groups)) - len(groups))

    def _collate(
        self, steps: Steps, parts: list[Part], collator: StepRolloutCollator
    ) -> tuple[StepBatch, torch.Tensor]:
        """A micro-batch with its rows, and the numbers of its steps."""
        device = self.accelerator.device
        numbers = [steps.first_step[index] + t for index, of_episode in parts for t in of_episode]
        episodes = [steps.episodes[index] for index, _ in parts]
        batch = collator(episodes, steps=[taken for _, taken in parts]) if parts else StepBatch.empty()
        return batch.to(device), torch.tensor(numbers, dtype=torch.long, device=device)

    def _forward(self, module: nn.Module | None, *args: Any, **kwargs: Any) -> Any:
        assert module is not None
        # The reference is not prepared by accelerate: it has to see the numerics of the networks that are.
        with self.clock.measure("model_s"), self.numerics.forward_pass():
            return module(*args, **kwargs)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Dropout off."""
        modules = [self.policy.module] + ([self.critic.module] if self.critic is not None else [])
        with evaluating(*modules):
            yield

    def _zero_values(self, batch: StepBatch) -> torch.Tensor:
        per_token = self.args.advantage_estimator == "token_gae"
        return torch.zeros(batch.action_mask.shape if per_token else batch.num_steps, device=self.accelerator.device)

    def _policy_mask(self, batch: StepBatch) -> torch.Tensor:
        """(N, A): the action tokens that the policy learns from."""
        if not self.args.mask_truncated_completions:
            return batch.action_mask
        return batch.action_mask & ~batch.truncated[batch.episode_index][:, None]

    def _policy_denominator(self, rollout: Rollout, chosen: Sequence[int]) -> float:
        """Tokens, steps or episodes of a mini-batch on all ranks."""
        batch = rollout.batch
        mask = self._policy_mask(batch) & self._is_chosen(batch, chosen)[:, None]
        return _total(aggregation_count(mask, self.args.aggregation, batch.episode_index))

    def _value_denominator(self, rollout: Rollout, chosen: Sequence[int]) -> float:
        """Values of a mini-batch on all ranks."""
        batch, is_chosen = rollout.batch, self._is_chosen(rollout.batch, chosen)
        per_token = self.args.advantage_estimator == "token_gae"
        return _total((batch.action_mask & is_chosen[:, None]).sum() if per_token else is_chosen.sum())

    def _is_chosen(self, batch: StepBatch, chosen: Sequence[int]) -> torch.Tensor:
        """(N,): the steps of the chosen episodes."""
        return torch.isin(batch.episode_index, torch.tensor(chosen, dtype=torch.long, device=batch.rewards.device))

    def _track_policy(
        self,
        stats: Means,
        sums: dict[str, torch.Tensor],
        logprobs: torch.Tensor,
        old: torch.Tensor,
        entropy: torch.Tensor,
        micro: StepBatch,
        mask: torch.Tensor,
    ) -> None:
        count = sums["num_tokens"]
        stats.add("policy/clipfrac_avg", sums["clipfrac_sum"], count)
        stats.add("val/ratio", sums["ratio_sum"], count)
        stats.add("val/ratio_sq", sums["ratio_sq_sum"], count)
        stats.add("policy/approxkl_avg", 0.5 * masked_sum((logprobs - old).square(), mask), count)
        stats.add("policy/entropy_avg", masked_sum(entropy, mask), count)
        # E[exp(r) − 1 − r] with r = log π_old − log π_rollout: how far the sampler's numerics or weights are off.
        mismatch = kl_estimate(micro.rollout_logprobs, old, micro.action_mask, "k3")
        stats.add("rollout/mismatch_kl", masked_sum(mismatch, mask), count)
        # Surprisal of whole episodes, as `objective/entropy` of `PPOTrainer`.
        stats.add("objective/entropy", masked_sum(-old, micro.action_mask), (micro.step_index == 0).sum())


def _total(count: torch.Tensor) -> float:
    """A count over all ranks."""
    return float(summed(count.double()[None]))
