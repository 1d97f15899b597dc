"""Scoring token ids with a reward model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from ..batching import PackedRows
from ..numerics import Numerics
from .forward import Critic, rows_at_once


@torch.no_grad()
def score_sequences(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], *, batch_size: int, numerics: Numerics | None = None
) -> list[float]:
    """
    The reward model's score of each sequence, read at its last token.

    Args:
        model (`PreTrainedModel`):
            A sequence classifier with one label: a backbone, and a head named `score`.
        sequences (`Sequence[Sequence[int]]`):
            Token ids, none empty.
        batch_size (`int`):
            Maximum number of sequences in one forward pass.
        numerics ([`~numerics.Numerics`], *optional*):
            The precision of forward passes; `None`: that of the weights.
    """
    scorer, device = Critic(model), next(model.parameters()).device
    numerics = numerics or Numerics(device)
    scores: list[float] = []
    batch_size = rows_at_once(batch_size, max(map(len, sequences), default=1), device)
    for start in range(0, len(sequences), batch_size):
        rows = [torch.tensor(ids) for ids in sequences[start : start + batch_size]]
        lengths = torch.tensor([len(row) for row in rows])
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (R, L), padded on the right
        num_rows, width = input_ids.shape
        positions = torch.arange(width)
        padded = PackedRows(input_ids, positions.repeat(num_rows, 1), positions < lengths[:, None], None).to(device)
        with numerics.forward_pass():
            values = scorer(padded, (torch.arange(num_rows) * width + lengths - 1).to(device))
        scores += values.tolist()
    return scores
