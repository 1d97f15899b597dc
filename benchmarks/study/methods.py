"""The methods that are compared, and how each differs from StepPO's settings."""

from __future__ import annotations

from collections.abc import Mapping

Flags = Mapping[str, object]
"""Flags of a script, without the dashes."""

CRITIC_OVER_POLICY = 2.5
TOKEN_CLIPRANGE = 0.2

TOKEN_GAE = {"advantage_estimator": "token_gae"}
TOKEN_RATIO = {"importance_sampling_level": "token"}
WITH_CRITIC: dict[str, Flags] = {
    "steppo": {},
    "token_ppo": {**TOKEN_GAE, **TOKEN_RATIO},
    "token_ppo_gamma_lam_1": {**TOKEN_GAE, **TOKEN_RATIO, "gamma": 1.0, "lam": 1.0},
    # Averaged over steps as StepPO is: only the credit and the ratio differ.
    "without_step_gae": {**TOKEN_GAE, "loss_aggregation": "step"},
    "without_step_ratio": {**TOKEN_RATIO},
    "without_both": {**TOKEN_GAE, **TOKEN_RATIO, "loss_aggregation": "step"},
    # What lambda does, apart from gamma
    "steppo_lam_1": {"lam": 1.0},
    "token_ppo_lam_1": {**TOKEN_GAE, **TOKEN_RATIO, "lam": 1.0},
}
# Ratios as these methods were published with: per token, but for RLOO, to which a whole response is one action. The
# returns of REINFORCE++ are those of tokens, without a discount.
WITHOUT_CRITIC: dict[str, Flags] = {
    "grpo": {"advantage_estimator": "grpo", "num_generations": 8, **TOKEN_RATIO},
    "rloo": {"advantage_estimator": "rloo", "num_generations": 8},
    "gigpo": {"advantage_estimator": "gigpo", "num_generations": 8, **TOKEN_RATIO},
    "reinforce_plus_plus": {
        "advantage_estimator": "reinforce_plus_plus",
        "num_generations": 1,
        "gamma": 1.0,
        "loss_aggregation": "token",
        **TOKEN_RATIO,
    },
}
METHODS = {**WITH_CRITIC, **WITHOUT_CRITIC}
MAIN = ("steppo", "token_ppo", "token_ppo_gamma_lam_1")
OTHERS = tuple(name for name in METHODS if name not in MAIN)
ABLATION = {
    "full": "steppo",
    "without step GAE": "without_step_gae",
    "without step ratio": "without_step_ratio",
    "without both": "without_both",
}
GROUPS = {"main": MAIN, "others": OTHERS}
