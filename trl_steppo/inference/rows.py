"""The running batch as rows: what the sampler's loop asks of them, and the rows that are forwarded whole."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..types import StopReason, TokenIds
from .base import Sample, SamplingParams


@dataclass(eq=False)
class Request:
    """A response in the making."""

    prompt_ids: list[int]
    params: SamplingParams
    episode_id: str
    order: tuple[int, ...]
    future: asyncio.Future[Sample]
    response_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    stop_reason: StopReason | None = None
    _uniforms: list[float] | None = None

    @property
    def max_tokens(self) -> int:
        return len(self.prompt_ids) + self.params.max_new_tokens

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.response_ids

    def next_uniform(self) -> float:
        """The random number of the next token, from the response's own stream, whatever else is in its batch."""
        if self._uniforms is None:
            generator = np.random.Generator(np.random.Philox(key=self.params.seed))
            self._uniforms = generator.random(self.params.max_new_tokens).tolist()
        return self._uniforms[len(self.response_ids)]

    def append(self, token: int, logprob: float) -> None:
        self.response_ids.append(token)
        self.logprobs.append(logprob)
        if token in self.params.stop_token_ids:
            self.stop_reason = StopReason.STOP
        elif len(self.response_ids) >= self.params.max_new_tokens:
            self.stop_reason = StopReason.LENGTH

    def result(self, policy_version: int) -> Sample:
        assert self.stop_reason is not None
        return Sample(TokenIds(self.response_ids), tuple(self.logprobs), self.stop_reason, policy_version)


class Update(NamedTuple):
    """One forward pass of the running batch."""

    requests: list[Request]  # those that have logits for their next token
    logits: torch.Tensor  # (n, V)
    num_prefilled: int  # prompt tokens that were forwarded


class Rows(Protocol):
    """The rows of the running batch."""

    requests: list[Request]

    def join(self, arrived: list[Request]) -> Update:
        """Add rows, and forward their prompts."""
        ...

    def step(self) -> Update:
        """Forward the last sampled token of every row."""
        ...

    def leave(self, request: Request, *, keep: bool) -> None:
        """Remove a row; `keep` what was computed for it until its episode asks again."""
        ...

    def clear(self) -> None:
        """Remove all rows, and all that was kept."""
        ...

    def forget(self, episode_id: str) -> None:
        """Drop what was kept for an episode."""
        ...

    def forget_all(self) -> None:
        """Drop what was kept for all episodes."""
        ...

    def shrink(self, tokens: int, keep: set[str]) -> None:
        """Drop the least recently used episodes, except `keep`, until the rest holds at most `tokens`."""
        ...


class UncachedRows:
    """Forwards every row whole for every token: for models whose state is not keys and values alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.requests: list[Request] = []

    def join(self, arrived: list[Request]) -> Update:
        self.requests += arrived
        return self._forward(arrived)

    def step(self) -> Update:
        return self._forward(self.requests)

    def leave(self, request: Request, *, keep: bool) -> None:
        self.requests.remove(request)

    def clear(self) -> None:
        self.requests = []

    def forget(self, episode_id: str) -> None:
        pass

    def forget_all(self) -> None:
        pass

    def shrink(self, tokens: int, keep: set[str]) -> None:
        pass

    @torch.no_grad()
    def _forward(self, requests: list[Request]) -> Update:
        device = next(self.model.parameters()).device
        rows = [torch.tensor(request.ids) for request in requests]
        # No mask: padding comes last, where no token sees it.
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        ends = torch.tensor([len(row) - 1 for row in rows], device=device)
        logits = last_logits(self.model, ends, input_ids=input_ids, use_cache=False)
        return Update(list(requests), logits, sum(len(request.prompt_ids) for request in requests))


def last_logits(model: PreTrainedModel, ends: torch.Tensor, **inputs: object) -> torch.Tensor:
    """
    Forward; the logits after each row's last token (rows, V), which stands at `ends`.

    The model's own forward pass makes them, since some models scale or cap what their head gives; only the head is
    shown no more than the states that are asked for.
    """
    rows = torch.arange(len(ends), device=ends.device)
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda head, args: (args[0][rows, ends][:, None],))
    try:
        logits: torch.Tensor = model(**inputs).logits
    finally:
        hook.remove()
    return logits[:, 0] if logits.shape[1] == 1 else logits[rows, ends]
