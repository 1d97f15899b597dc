"""What a trainer asks of what samples for it: a sampler, and news of the policy's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable

from .base import Counts, Sampler


@runtime_checkable
class CountingSampler(Sampler, Protocol):
    """A sampler that counts what it does. The trainer logs its counts as `perf/*` and `rollout/*`."""

    @property
    def counts(self) -> Counts:
        """What it has done since it was made."""
        ...


class VersionedSampler(Sampler, Protocol):
    """A sampler that is told how many updates are in its weights. Its samples have that number."""

    policy_version: int


def counts_of(sampler: Sampler) -> Counts:
    """What a sampler has done until now; all 0 if it does not count."""
    return sampler.counts if isinstance(sampler, CountingSampler) else Counts()


@runtime_checkable
class Engine(Protocol):
    """
    What samples for a trainer: the argument `engine=` of `StepPOTrainer`.

    `version` is the number of updates that are in the policy's weights; samples tell it as `policy_version`. All ranks
    call each method, in the same order. Without this argument, the run's settings choose an engine of
    `trl_steppo.trainer.engines`: `InProcess`, `InWorker` or `InVLLM`. `docs/guides/engines.md` says how to write one.

    Example:
    ```python
    class Copying(SamplerEngine):
        "Samples from a copy of the policy."

        def __init__(self, policy):
            self.policy, self.copy = policy, deepcopy(policy)
            super().__init__(LocalSampler(self.copy))

        def take_weights(self, version):
            self.copy.load_state_dict(self.policy.state_dict())
            self.sampler.reset_cache()
            super().take_weights(version)


    trainer = StepPOTrainer(
        args, tokenizer, policy, train_dataset=rows, environment_factory=Game, engine=Copying(policy)
    )
    ```
    """

    @property
    def sampler(self) -> Sampler:
        """Continues prompts, within [`running`]; the counts of a [`CountingSampler`] are logged."""
        ...

    def running(self, version: int) -> AbstractContextManager[None]:
        """Context of a run, or of an evaluation outside of one; sampling starts with the policy's current weights."""
        ...

    def sampling(self) -> AbstractContextManager[None]:
        """Context of a rollout that the trainer waits for."""
        ...

    def take_weights(self, version: int) -> None:
        """Publish the policy's current weights to the sampler."""
        ...


class SamplerEngine:
    """
    An engine for a sampler that is there all the time, and base of others. It tells the sampler the version of the
    policy's weights. A subclass also brings the weights there, in `take_weights`, unless the sampler reads the
    policy's own.

    Args:
        sampler ([`VersionedSampler`]):
            Continues prompts. Its attribute `policy_version` is set.
    """

    sampler: VersionedSampler

    def __init__(self, sampler: VersionedSampler) -> None:
        self.sampler = sampler

    @contextmanager
    def running(self, version: int) -> Iterator[None]:
        """Context in which the sampler has the policy's weights; see [`Engine`]."""
        self.take_weights(version)
        yield

    def sampling(self) -> AbstractContextManager[None]:
        """Context of a rollout that the trainer waits for."""
        return nullcontext()

    def take_weights(self, version: int) -> None:
        """The sampler's weights have `version` updates from now on."""
        self.sampler.policy_version = version


class FixedEngine:
    """
    A sampler as an engine. It is there all the time, never takes weights and is told no version: for tests, and for
    policies that are updated elsewhere. [`SamplerEngine`] is for policies that this trainer updates.

    Args:
        sampler ([`Sampler`]):
            Continues prompts.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def running(self, version: int) -> AbstractContextManager[None]:
        """Context of a run: nothing starts."""
        return nullcontext()

    def sampling(self) -> AbstractContextManager[None]:
        """Context of a rollout that the trainer waits for."""
        return nullcontext()

    def take_weights(self, version: int) -> None:
        """Ignored."""
