"""What pays finished episodes, beside their environments: reward functions and a reward model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn
from transformers import PreTrainedModel, TrainerState

from ..chat import ChatFormat
from ..environments.base import Playable
from ..models import score_sequences
from ..numerics import Numerics
from ..rollout import checked_weights, pay_episodes, takes_environments
from ..rollout.rewards import RewardFunc
from ..types import Episode, Row
from .reward_models import RewardModel
from .steppo_config import StepPOConfig


class Rewards:
    """
    Pays finished episodes.

    Args:
        args ([`StepPOConfig`]):
            The run's settings.
        funcs (`Sequence[Callable]`):
            Reward functions, as in `GRPOTrainer`.
        model (`PreTrainedModel`, *optional*):
            A sequence classifier with one label that scores the last prompt and response, at the last token.
        numerics ([`~numerics.Numerics`]):
            The precision of the model's forward passes.

    Raises:
        ConfigurationError: If `reward_weights` does not fit.
    """

    def __init__(
        self, args: StepPOConfig, funcs: Sequence[RewardFunc], model: PreTrainedModel | None, numerics: Numerics
    ) -> None:
        checked_weights(funcs, args.reward_weights)
        self.funcs = list(funcs)
        self.model = model
        self._args = args
        self._numerics = numerics

    def __bool__(self) -> bool:
        """Whether there is a reward function or a reward model."""
        return bool(self.funcs) or self.model is not None

    @property
    def models(self) -> list[nn.Module]:
        """All models that pay: those among the functions, too."""
        judges = [func.model for func in self.funcs if isinstance(func, RewardModel)]
        return [*([] if self.model is None else [self.model]), *judges]

    @property
    def take_environments(self) -> bool:
        """Whether a function sees environments: takes them by the name or as `**kwargs`."""
        return any(takes_environments(func) for func in self.funcs if not isinstance(func, RewardModel))

    def of_functions(
        self,
        episodes: list[Episode],
        rows: Sequence[Row],
        *,
        chat: Callable[[Row], ChatFormat | None],
        decode: Callable[[Sequence[int]], str] | None,
        environments: Sequence[Playable | None] | None,
        trainer_state: TrainerState | None,
        log_metric: Callable[[str, float], object],
    ) -> list[Episode]:
        """Add the rewards of the functions; see [`~rollout.pay_episodes`]."""
        if not self.funcs:
            return episodes
        return pay_episodes(
            self.funcs,
            self._args.reward_weights,
            episodes,
            rows,
            chat=chat,
            decode=decode,
            extra={"trainer_state": trainer_state},
            environments=environments,
            log_metric=log_metric,
        )

    def of_model(self, episodes: list[Episode]) -> list[Episode]:
        """Add the rewards of the model to the episodes that did not fail."""
        if self.model is None:
            return episodes
        valid = [index for index, episode in enumerate(episodes) if episode.valid]
        last = [episodes[index].steps[-1] for index in valid]
        scores = score_sequences(
            self.model,
            [[*step.prompt_ids, *step.response_ids] for step in last],
            batch_size=self._args.local_rollout_forward_batch_size,
            numerics=self._numerics,
        )
        episodes = list(episodes)
        for index, score in zip(valid, scores, strict=True):
            episodes[index] = replace(episodes[index].paid(score), needs_reward=False)
        return episodes
