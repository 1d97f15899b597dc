"""What this package uses of TRL beyond its documented interface."""

from __future__ import annotations

import warnings
from typing import Any


def ppo_bases() -> tuple[Any, Any]:
    """
    The classes that [`PPOConfig`] and [`PPOTrainer`] of this package extend: TRL's own where it has them (until 1.12),
    else those of transformers that TRL's were made of.
    """
    try:
        with warnings.catch_warnings():
            # That the module is experimental is our concern: it is imported here and nowhere else.
            warnings.filterwarnings("ignore", message="You are importing from 'trl.experimental'")
            from trl.experimental.ppo import PPOConfig, PPOTrainer
    except ImportError as error:
        if error.name is not None and not error.name.startswith("trl.experimental"):
            raise  # something that TRL itself needs
        from transformers import Trainer, TrainingArguments

        return TrainingArguments, Trainer
    return PPOConfig, PPOTrainer
