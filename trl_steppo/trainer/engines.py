"""Where responses are sampled, and how new weights get there: in this process, or in one beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator

from ..inference.base import Sampler
from ..inference.local import LocalSampler
from ..inference.worker import WorkerSampler
from ..models import plain_model, whole_parameters
from .networks import Network
from .steppo_config import StepPOConfig


class CountingSampler(Sampler, Protocol):
    """A sampler that counts what it does."""

    @property
    def sampled_tokens(self) -> int:
        """Tokens of all responses."""
        ...

    @property
    def prefilled_tokens(self) -> int:
        """Tokens of prompts that were forwarded."""
        ...

    @property
    def forward_s(self) -> float:
        """Seconds in the model's forward passes."""
        ...


class Engine(Protocol):
    """What samples for a trainer. All ranks call each method, in the same order."""

    @property
    def sampler(self) -> CountingSampler:
        """Where requests go, within [`running`]."""
        ...

    def running(self, version: int) -> AbstractContextManager[None]:
        """Around all that samples; from the policy as it is at the beginning, after so many updates."""
        ...

    def sampling(self) -> AbstractContextManager[None]:
        """Around a rollout that the trainer waits for."""
        ...

    def take_weights(self, version: int) -> None:
        """From now on, sample from the policy as it is now, after so many updates."""
        ...


class InProcess:
    """
    The policy itself samples, between updates.

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the numerics of training.
        policy ([`Network`]):
            The prepared policy.
        model (`PreTrainedModel` or `PeftModel`):
            The policy's model.
    """

    def __init__(self, args: StepPOConfig, accelerator: Accelerator, policy: Network, model: Any) -> None:
        self.sampler = LocalSampler(plain_model(model), cache_tokens=args.rollout_cache_tokens)
        self._accelerator = accelerator
        self._policy = policy

    @contextmanager
    def running(self, version: int) -> Iterator[None]:
        self.sampler.policy_version = version
        yield

    @contextmanager
    def sampling(self) -> Iterator[None]:
        self.sampler.reset_cache()  # of other weights
        # The numerics of the policy's forward passes in training.
        with self._policy.whole(), self._accelerator.autocast():
            yield
        self.sampler.reset_cache()

    def take_weights(self, version: int) -> None:
        self.sampler.policy_version = version


class InWorker:
    """
    A copy of the policy samples, in a process of each rank's own; see [`WorkerSampler`].

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        accelerator ([`~accelerate.Accelerator`]):
            Knows the numerics of training.
        model (`PreTrainedModel` or `PeftModel`):
            The policy's model, which trains.
        twin (`PreTrainedModel`):
            A whole copy of it on the CPU, without the adapters' wrapper, made before it was prepared for training.
    """

    def __init__(self, args: StepPOConfig, accelerator: Accelerator, model: Any, twin: Any) -> None:
        self._model = plain_model(model)
        device = accelerator.device
        self.sampler = WorkerSampler(
            twin,
            trained=[name for name, _ in self._trained()],
            device=None if device.type == "cpu" else device,
            cache_tokens=args.rollout_cache_tokens,
            autocast={"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision),
            is_paced=args.max_staleness == 0,
        )
        self._is_running = False

    @contextmanager
    def running(self, version: int) -> Iterator[None]:
        if self._is_running:
            yield
            return
        self.sampler.start()
        self._is_running = True
        try:
            self.take_weights(version)
            yield
        finally:
            self._is_running = False
            self.sampler.close()

    def sampling(self) -> AbstractContextManager[None]:
        return nullcontext()

    def take_weights(self, version: int) -> None:
        self.sampler.update_weights(whole_parameters(self._trained()), version)

    def _trained(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return (named for named in self._model.named_parameters() if named[1].requires_grad)
