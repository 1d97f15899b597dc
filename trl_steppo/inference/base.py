"""The policy as a sampler: token ids in, token ids and log-probabilities out."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from .. import tracing
from ..errors import ConfigurationError, DataError
from ..types import StopReason, TokenIds


@dataclass(frozen=True)
class SamplingParams:
    """
    How one response is sampled.

    Args:
        max_new_tokens (`int`):
            Budget of the response, at least 1.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits; 0 takes the most likely token.
        top_p (`float`, *optional*, defaults to `1.0`):
            Keeps the smallest set of most likely tokens whose probabilities reach this sum, in `(0, 1]`.
        top_k (`int`, *optional*, defaults to `0`):
            Keeps this many most likely tokens; 0 keeps all.
        stop_token_ids (`tuple[int, ...]`, *optional*):
            The response ends with the first of these it samples, which it includes. Empty: it never stops early.
        seed (`int`, *optional*, defaults to `0`):
            Seed of this response alone: what is sampled depends on the prompt, the weights and this number, and not on
            which other responses share its batch.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


MIN_TEMPERATURE = 1e-3  # below it logits leave what float32 can tell apart; 0 takes the most likely token


def vocabulary_size(model: Any) -> int | None:
    """How many token ids a model can read: the rows of its input embeddings. `None` if it does not say."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    # The attribute, not the weight's shape: engines that shard a model leave an empty weight.
    return getattr(embeddings, "num_embeddings", None)


def check_request(
    prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, vocabulary_size: int | None = None
) -> None:
    """
    Find out what cannot be sampled before it shares a batch with others.

    Args:
        prompt_ids (`Sequence[int]`), params ([`SamplingParams`]), episode_id (`str`):
            The request.
        vocabulary_size (`int`, *optional*):
            How many token ids the model can read. `None`: not known.

    Raises:
        DataError: The prompt is empty, or has a token id that the model cannot read.
        ConfigurationError: A number is outside of its range.
    """
    if not prompt_ids:
        raise DataError(f"the prompt of episode {episode_id!r} is empty; there is nothing to continue")
    highest = 2**31 if vocabulary_size is None else vocabulary_size
    if min(prompt_ids) < 0 or max(prompt_ids) >= highest:
        place, token_id = next((i, t) for i, t in enumerate(prompt_ids) if not 0 <= t < highest)
        raise DataError(
            f"the prompt of episode {episode_id!r} has the token id {token_id} at position {place}, and the model has "
            f"{highest} ids, from 0; if its tokenizer has more tokens, call "
            "`model.resize_token_embeddings(len(tokenizer))`"
        )
    temperature = params.temperature
    if params.max_new_tokens < 1:
        raise ConfigurationError(f"`max_new_tokens` is {params.max_new_tokens}; a response has at least one token")
    if temperature != 0 and not MIN_TEMPERATURE <= temperature < math.inf:
        raise ConfigurationError(f"`temperature` is {temperature}; give 0, or a number from {MIN_TEMPERATURE:g}")
    if not 0 < params.top_p <= 1:
        raise ConfigurationError(f"`top_p` is {params.top_p}; give a number in (0, 1]")
    if params.top_k < 0:
        raise ConfigurationError(f"`top_k` is {params.top_k}; give a number of tokens, or 0 for all")
    if not 0 <= params.seed < 2**64:
        raise ConfigurationError(f"`seed` is {params.seed}; give a number in [0, 2**64)")


@dataclass(frozen=True)
class Sample:
    """
    One sampled response.

    Args:
        token_ids ([`TokenIds`]):
            The sampled tokens, a stop token included.
        logprobs (`tuple[float, ...]`):
            Log-probability of each under softmax(logits / temperature), before `top_p` and `top_k`; for greedy
            responses under softmax(logits).
        stop_reason ([`StopReason`]):
            `STOP` or `LENGTH`.
        policy_version (`int`):
            Updates applied to the weights that sampled it.
    """

    token_ids: TokenIds
    logprobs: tuple[float, ...]
    stop_reason: StopReason
    policy_version: int


@dataclass(frozen=True)
class Counts:
    """
    What a sampler has done since it was made.

    Args:
        sampled_tokens (`int`):
            Tokens of all responses.
        prompt_tokens (`int`):
            Tokens of all prompts; of vLLM only those whose server says how many of them were cached.
        prefilled_tokens (`int`):
            Tokens of prompts that were forwarded; the others were in the cache.
        forward_s (`float`):
            Seconds in the model's forward passes; of vLLM those in which servers had something to do.
        uncached_rows (`int`):
            Rows that were forwarded whole for one more token.
    """

    sampled_tokens: int = 0
    prompt_tokens: int = 0
    prefilled_tokens: int = 0
    forward_s: float = 0.0
    uncached_rows: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.sampled_tokens + other.sampled_tokens,
            self.prompt_tokens + other.prompt_tokens,
            self.prefilled_tokens + other.prefilled_tokens,
            self.forward_s + other.forward_s,
            self.uncached_rows + other.uncached_rows,
        )

    def __sub__(self, other: Counts) -> Counts:
        return Counts(
            self.sampled_tokens - other.sampled_tokens,
            self.prompt_tokens - other.prompt_tokens,
            self.prefilled_tokens - other.prefilled_tokens,
            self.forward_s - other.forward_s,
            self.uncached_rows - other.uncached_rows,
        )


class Sampler(Protocol):
    """Anything that continues token ids: the in-process engine, a server, a script in a test."""

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        """
        Continue `prompt_ids`. Called concurrently by many episodes.

        `episode_id` lets an engine keep an episode's cache from step to step. `order` is `(stream_position,
        generation_index, step_index)`: an engine that forms batches sorts by it, so that a batch does not depend on
        which coroutine woke first.
        """
        ...

    def release(self, episode_id: str) -> None:
        """The episode is over: forget what was cached for it. Unknown ids are ignored."""
        ...

    def pace(self, quiet: Callable[[], Awaitable[None]] | None) -> None:
        """
        Pace the batches of a rollout ([`Pacer.quiet`]): an engine that forms batches awaits `quiet()` before each, so
        that an episode whose tool answers at once is in the next batch. `None`: the rollout is over.
        """
        ...


class Pacer(Protocol):
    """
    Knows which episodes are away from the sampler: being made, reset, answered by their environment or scored.

    A sampler that forms batches waits until it is quiet before each, so that batches do not depend on threads.
    """

    def at_sampler(self) -> AbstractContextManager[None]:
        """
        Context of an episode's call of the sampler, in which the episode is not away. There must be no other
        suspension inside: the request has to be in the sampler's hands before the event loop runs anything else.
        """
        ...

    async def quiet(self) -> None:
        """Return when no episode is away, or after a grace period."""
        ...


# -- traces -----------------------------------------------------------------------------------------------------------


def sampling_span(episode_id: str, prompt_tokens: int, params: SamplingParams) -> AbstractContextManager[tracing.Span]:
    """Context of the span of one response; see [`tracing`]."""
    return tracing.span(
        "chat policy",
        gen_ai__operation__name="chat",
        gen_ai__provider__name="trl_steppo",
        gen_ai__request__model="policy",
        gen_ai__conversation__id=episode_id,
        gen_ai__request__max_tokens=params.max_new_tokens,
        gen_ai__request__temperature=params.temperature,
        gen_ai__request__top_p=params.top_p,
        gen_ai__request__top_k=params.top_k or None,
        gen_ai__usage__input_tokens=prompt_tokens,
    )


def note_sample(span: tracing.Span, sample: Sample) -> None:
    """Add what was sampled to its span."""
    span.set(
        gen_ai__usage__output_tokens=len(sample.token_ids),
        gen_ai__response__finish_reasons=[sample.stop_reason.value],
        steppo__policy_version=sample.policy_version,
    )
