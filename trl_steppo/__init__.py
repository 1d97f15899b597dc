"""Step-level PPO for LLM agents that act over many turns, on top of Hugging Face TRL (arXiv 2604.18401)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .names import lazy_names

if TYPE_CHECKING:
    from .inference import Engine, FixedEngine
    from .trainer.parser import StepPOParser
    from .trainer.ppo_config import PPOConfig
    from .trainer.ppo_trainer import PPOTrainer
    from .trainer.steppo_config import StepPOConfig
    from .trainer.steppo_trainer import StepPOTrainer
    from .types import Episode, Step, StopReason

__version__ = "0.1.0"

__all__ = [
    "Engine",
    "Episode",
    "FixedEngine",
    "PPOConfig",
    "PPOTrainer",
    "Step",
    "StepPOConfig",
    "StepPOParser",
    "StepPOTrainer",
    "StopReason",
]

# A process that only serves an environment or a gateway never loads torch.
__getattr__ = lazy_names(
    __name__,
    {
        "PPOConfig": ".trainer.ppo_config",
        "PPOTrainer": ".trainer.ppo_trainer",
        "StepPOConfig": ".trainer.steppo_config",
        "StepPOParser": ".trainer.parser",
        "StepPOTrainer": ".trainer.steppo_trainer",
        "Engine": ".inference",
        "FixedEngine": ".inference",
        "Step": ".types",
        "Episode": ".types",
        "StopReason": ".types",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
