"""Step-level PPO for LLM agents that act over many turns, on top of Hugging Face TRL (arXiv 2604.18401)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .trainer.engines import Engine, FixedEngine
    from .trainer.ppo_config import PPOConfig
    from .trainer.ppo_trainer import PPOTrainer
    from .trainer.steppo_config import StepPOConfig
    from .trainer.steppo_trainer import StepPOTrainer
    from .types import Episode, Step, StopReason

__version__ = "0.1.0"

# Resolved on first use, so that a process that only serves an environment or a gateway never loads torch.
_HOME = {
    "PPOConfig": ".trainer.ppo_config",
    "PPOTrainer": ".trainer.ppo_trainer",
    "StepPOConfig": ".trainer.steppo_config",
    "StepPOTrainer": ".trainer.steppo_trainer",
    "Engine": ".trainer.engines",
    "FixedEngine": ".trainer.engines",
    "Step": ".types",
    "Episode": ".types",
    "StopReason": ".types",
}

__all__ = [
    "Engine",
    "Episode",
    "FixedEngine",
    "PPOConfig",
    "PPOTrainer",
    "Step",
    "StepPOConfig",
    "StepPOTrainer",
    "StopReason",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
