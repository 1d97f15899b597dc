"""One forward pass over packed rows -> what the losses need, gathered by position into step-major tensors.

The vocabulary is projected only where an action token is predicted, a bounded number of tokens at a time, and in
float32 from there on: the logits of a whole batch never exist at once.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_LOGITS_ELEMENTS = 2**25  # float32 logits held at a time: 128 MiB


EntropyMode = Literal["skip", "track", "train"]


class Rows(Protocol):
    """The part of a `StepBatch` that a forward pass reads; its docstring gives the shapes."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor


class ActionRows(Rows, Protocol):
    """Rows, and where the actions stand in them."""

    action_ids: torch.Tensor
    action_mask: torch.Tensor
    logit_positions: torch.Tensor
    temperatures: torch.Tensor


class PolicyScorer(nn.Module):
    """
    The policy as the trainer sees it: log-probabilities of the actions, and the entropy where they were chosen.

    Wraps the model because distributed engines hook `forward`: everything with a gradient must pass through it.

    Args:
        model (`PreTrainedModel`):
            A causal language model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: ActionRows, *, entropy: EntropyMode = "skip") -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            rows (`StepBatch`):
                R rows of L tokens with N steps of up to A action tokens.
            entropy (`str`, *optional*, defaults to `"skip"`):
                Whether to compute the entropy of the distribution each action token was drawn from: `"skip"`,
                `"track"` (without a gradient) or `"train"`.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: Log-probabilities under softmax(logits / temperature) (N, A)
            and entropies in nats (N, A), float32, 0 where masked.
        """
        hidden = _hidden_states(self.model, rows)
        mask = rows.action_mask
        states = hidden.flatten(0, 1)[rows.logit_positions[mask]]  # (M, H) for the M action tokens
        targets = rows.action_ids[mask]
        # Greedy steps are scored as if sampled at temperature 1; they are never trained on.
        temperatures = torch.where(rows.temperatures > 0, rows.temperatures, 1.0)[:, None].expand_as(mask)[mask]
        logprobs, entropies = self._score(states, targets, temperatures, entropy)
        return _scatter(logprobs, mask), _scatter(entropies, mask) if entropies is not None else None

    def _score(
        self, states: torch.Tensor, targets: torch.Tensor, temperatures: torch.Tensor, entropy: EntropyMode
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        head = self.model.get_output_embeddings()  # type: ignore[operator]
        size = max(1, _LOGITS_ELEMENTS // self.model.config.vocab_size)  # type: ignore[union-attr,operator]
        if len(states) <= size:
            return _token_scores(head, states, targets, temperatures, entropy)
        parts = [
            checkpoint(_token_scores, head, *chunk, entropy, use_reentrant=False)
            for chunk in zip(states.split(size), targets.split(size), temperatures.split(size), strict=True)
        ]
        logprobs = torch.cat([part[0] for part in parts])
        return logprobs, torch.cat([part[1] for part in parts]) if entropy != "skip" else None


class Critic(nn.Module):
    """
    State values: a backbone and a linear head, as transformers' sequence classifiers with one label have them.

    Args:
        model (`PreTrainedModel`):
            A model with a backbone at `base_model_prefix` and a one-output head `score`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, rows: Rows, positions: torch.Tensor) -> torch.Tensor:
        """
        Args:
            rows (`StepBatch`):
                R rows of L tokens.
            positions (`torch.Tensor`):
                Where to read values: any shape, indices into the flattened rows (r·L + l).

        Returns:
            `torch.Tensor`: The values in float32, shaped as `positions`.
        """
        hidden = _hidden_states(self.model, rows)
        states = hidden.flatten(0, 1)[positions.flatten()]
        score: nn.Linear = self.model.score  # type: ignore[assignment]
        with torch.autocast(states.device.type, enabled=False):
            bias = score.bias.float() if score.bias is not None else None
            values = nn.functional.linear(states.float(), score.weight.float(), bias)
        return values.view(positions.shape)


def _hidden_states(model: nn.Module, rows: Rows) -> torch.Tensor:
    """The backbone's last hidden states (R, L, H)."""
    backbone: Any = getattr(model, str(model.base_model_prefix))
    output = backbone(
        input_ids=rows.input_ids,
        attention_mask=rows.attention_mask,
        position_ids=rows.position_ids,
        use_cache=False,
    )
    return output.last_hidden_state


def _token_scores(
    head: nn.Module, states: torch.Tensor, targets: torch.Tensor, temperatures: torch.Tensor, entropy: EntropyMode
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of each target (M,) and, if asked for, the entropy (M,)."""
    logits = head(states).float() / temperatures[:, None]  # (M, V)
    logprobs = logits.log_softmax(-1)
    entropies = None
    if entropy != "skip":
        weighed = logprobs if entropy == "train" else logprobs.detach()
        entropies = -(weighed.exp() * weighed).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropies


def _scatter(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Put the values of action tokens (M,) at their places (N, A); 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
