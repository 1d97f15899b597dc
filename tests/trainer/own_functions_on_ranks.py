"""Own functions that fail on the second rank only: `torchrun own_functions_on_ranks.py OUTPUT_DIR`."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.trainer.tiny import make_trainer, same, weights
from trl_steppo.advantages import discounted_returns, step_gae
from trl_steppo.errors import ConfigurationError, RolloutError, StepPOError
from trl_steppo.losses import clipped_policy_loss

RANK = int(os.environ["RANK"])


def gae(rewards: Tensor, values: Tensor, mask: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    advantages, returns = step_gae(rewards, values, mask, **settings)
    return advantages / (1 - RANK), returns


def returns_of(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    return discounted_returns(rewards, mask, gamma=gamma / (1 - RANK))


def infinite_loss(ratio: Tensor, advantages: Tensor, mask: Tensor, **settings: Any) -> Any:
    loss, _ = clipped_policy_loss(ratio, advantages, mask, **settings)
    return loss / (1 - RANK), {}


def main() -> None:
    torch.set_num_threads(1)
    # By the error of the second rank, and that of the first: the one of this package that is nearest to it.
    cases: list[tuple[dict[str, Any], type[Exception], type[StepPOError], str]] = [
        ({"advantage_estimator": gae}, ConfigurationError, ConfigurationError, "`advantage_estimator`=gae returned"),
        ({"advantage_estimator": returns_of}, ZeroDivisionError, RolloutError, "division by zero"),
        ({"policy_loss_fn": infinite_loss}, ConfigurationError, ConfigurationError, "returned the loss"),
    ]
    for number, (functions, here, elsewhere, words) in enumerate(cases):
        # Of the mini-batch's four micro-batches the first one fails.
        settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 1}
        trainer = make_trainer(Path(sys.argv[1], str(number)), **functions, **settings, ddp_backend="gloo")
        before = weights(trainer.model)
        with pytest.raises(here if RANK == 1 else elsewhere, match=words) as raised:
            trainer.train()
        assert str(raised.value).startswith("on another rank: ") == (RANK == 0)
        assert same(weights(trainer.model), before)


if __name__ == "__main__":
    main()
