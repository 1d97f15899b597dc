"""Episodes -> StepBatch: prefix sharing, then padding to tensors."""

from .collator import StepBatch, StepRolloutCollator, num_row_tokens
from .micro_batches import micro_batches, mini_batches
from .rows import Row, row_per_step, share_prefixes

__all__ = [
    "Row",
    "StepBatch",
    "StepRolloutCollator",
    "micro_batches",
    "mini_batches",
    "num_row_tokens",
    "row_per_step",
    "share_prefixes",
]
