"""The settings that learning reads."""

from __future__ import annotations

from typing import Literal, Protocol


class LearnerSettings(Protocol):
    """What a [`StepPOConfig`] has, and a test may have instead. The meanings stand there."""

    # Credit
    advantage_estimator: Literal["step_gae", "token_gae", "grpo", "rloo", "reinforce_plus_plus", "gigpo"]
    gamma: float
    lam: float
    whiten_rewards: bool
    bootstrap_truncated: bool
    max_interaction_steps: int | None

    # The policy's loss
    importance_sampling_level: Literal["step", "token"]
    cliprange: float
    cliprange_high: float | None
    kl_coef: float
    kl_estimator: Literal["k1", "k3"]
    kl_loss_coef: float
    kl_loss_estimator: Literal["k1", "k2", "k3"]
    entropy_coef: float
    mask_truncated_completions: bool
    rollout_correction_level: Literal["step", "token"]
    rollout_correction_cap: float

    # The critic's loss
    cliprange_value: float
    vf_coef: float

    # Steps of the optimizers
    num_ppo_epochs: int
    num_mini_batches: int
    max_grad_norm: float

    # Memory
    per_device_train_batch_size: int
    local_rollout_forward_batch_size: int
    max_tokens_per_micro_batch: int | None

    @property
    def aggregation(self) -> Literal["step", "episode", "token"]: ...
    @property
    def correction(self) -> Literal["none", "truncate", "mask"]: ...
    @property
    def critic_epochs(self) -> int: ...
