"""The in-process engine: one batch over all episodes that are waiting for a response.

`generate` starts and ends with its whole batch; episodes do not. Here a response joins the running batch when its
prompt arrives and leaves it with its last token, so the batch stays full while tools answer.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..errors import ConfigurationError, RolloutError
from ..modes import evaluating
from ..numerics import CastWeights, Numerics
from .base import Counts, Sample, SamplingParams, check_request, vocabulary_size
from .cached_rows import CachedRows, samples_with_a_cache
from .rows import Request, Rows, UncachedRows, Update


class LocalSampler:
    """
    Samples from a transformers causal language model in this process. Greedy output and log-probabilities equal those
    of one plain forward pass over prompt and response.

    Args:
        model (`PreTrainedModel`):
            A causal language model whose layers are all full attention through SDPA or eager. Others (sliding
            windows, state-space layers, ALiBi, flash attention) need `allow_uncached`.
        cache_tokens (`int`, *optional*, defaults to `262144`):
            Maximum number of tokens whose keys and values are held. Running responses take their number times the
            longest of them; waiting episodes take what they have. Responses that do not fit wait for others to end.
            Waiting episodes are forgotten least-recently-used first, and prefilled again. `None`: no bound.
        allow_uncached (`bool`, *optional*, defaults to `False`):
            Whether a model that cannot be continued from stored keys and values may be sampled without them. This is
            exact, but each token costs a forward pass over its whole row.
        numerics ([`~numerics.Numerics`], *optional*):
            The device and the precision of forward passes, in any thread. `None`: the model's current device, and the
            types of its weights.

    Raises:
        ConfigurationError: If `cache_tokens` is not positive; if the model cannot be sampled with a cache and
            `allow_uncached` is not set; from `sample`, if one response alone exceeds the bound, or a number of its
            [`SamplingParams`] is outside of its range.
        DataError: From `sample`, if the prompt is empty, or has a token id that the model cannot read.
        RolloutError: From `sample`, if the model's logits are not numbers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        cache_tokens: int | None = 262_144,
        allow_uncached: bool = False,
        numerics: Numerics | None = None,
    ) -> None:
        if cache_tokens is not None and cache_tokens < 1:
            raise ConfigurationError(f"`rollout_cache_tokens` is {cache_tokens}; give a positive number, or None")
        self.model = model
        self.vocabulary_size = vocabulary_size(model)
        self.policy_version = 0
        self.cache_tokens = cache_tokens
        self.numerics = numerics or Numerics(next(model.parameters()).device)
        self._casts: CastWeights | None = None  # of the current weights, while responses are sampled
        self.counts = Counts()
        self._waiting: list[Request] = []
        self._driver: asyncio.Task[None] | None = None
        self._quiet: Callable[[], Awaitable[None]] | None = None
        with self.numerics.forward_pass():
            self._is_cached = samples_with_a_cache(model, allow_uncached=allow_uncached)
        self._rows: Rows = CachedRows(model, cache_tokens) if self._is_cached else UncachedRows(model)

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        """Continue `prompt_ids`; see [`Sampler`]."""
        check_request(prompt_ids, params, episode_id=episode_id, vocabulary_size=self.vocabulary_size)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sample] = loop.create_future()
        request = Request(list(prompt_ids), params, episode_id, order, future)
        if self.cache_tokens is not None and request.max_tokens > self.cache_tokens:
            raise ConfigurationError(
                f"a prompt of {len(prompt_ids)} tokens with up to {params.max_new_tokens} new ones exceeds "
                f"`rollout_cache_tokens`={self.cache_tokens}; raise it, or bound the prompt with `max_prompt_length`"
            )
        self._waiting.append(request)
        # A loop that was torn down may have left its driver unfinished.
        if self._driver is None or self._driver.done() or self._driver.get_loop() is not loop:
            self._driver = loop.create_task(self._drive())
        return await future

    def release(self, episode_id: str) -> None:
        """Forget the episode's cache."""
        self._rows.forget(episode_id)

    def pace(self, quiet: Callable[[], Awaitable[None]] | None) -> None:
        """Await `quiet()` before each batch is formed; see [`Sampler`]."""
        self._quiet = quiet

    def reset_cache(self) -> None:
        """Forget all that was computed with earlier weights, such as the keys and values of waiting episodes."""
        self._casts = None
        self._rows.forget_all()

    async def _drive(self) -> None:
        """Run forward passes while any request waits for a token."""
        running: list[Request] = []
        if self._rows.requests:
            self._rows.clear()  # rows of a driver that was cancelled
        self._casts = None
        try:
            await self._sample_all(running)
        except Exception as error:
            for request in running + self._waiting:
                if not request.future.done():
                    request.future.set_exception(error)
            self._waiting.clear()
            self._rows.clear()
        finally:
            self._casts = None

    async def _sample_all(self, running: list[Request]) -> None:
        """Fill the batch and sample from it until no request waits."""
        with evaluating(self.model):
            while running or self._waiting:
                await asyncio.sleep(0)  # lets episodes whose tool has just answered send their next prompt
                if self._quiet is not None:
                    await self._quiet()
                for request in [r for r in running if r.future.cancelled()]:
                    self._leave(running, request, keep=False)  # its episode was released already
                arrived = self._admit(running)
                running += arrived
                if running:
                    start = time.perf_counter()
                    with self._forward_pass():
                        update = self._rows.join(arrived) if arrived else self._rows.step()
                    seconds = time.perf_counter() - start
                    self.counts += Counts(prefilled_tokens=update.num_prefilled, forward_s=seconds)
                    self._advance(running, update)

    @contextmanager
    def _forward_pass(self) -> Iterator[None]:
        """Context of a call of the model. Restores the thread's state, since other code uses the thread in between."""
        with self.numerics.forward_pass():
            if self.numerics.autocast is None:
                yield
                return
            if self._casts is None:
                self._casts = CastWeights(self.model, self.numerics.autocast)
            with self._casts.in_use():
                yield

    def _admit(self, running: list[Request]) -> list[Request]:
        """Move waiting requests into the batch, in an order that does not depend on the timing of coroutines."""
        self._waiting = sorted((r for r in self._waiting if not r.future.cancelled()), key=lambda r: r.order)
        longest = max((request.max_tokens for request in running), default=0)
        held, admitted = len(running) * longest, list[Request]()
        for request in self._waiting:
            longest = max(longest, request.max_tokens)
            rows = len(running) + len(admitted) + 1
            if self.cache_tokens is not None and rows * longest > self.cache_tokens:
                break
            held = rows * longest
            admitted.append(request)
        del self._waiting[: len(admitted)]
        self.counts += Counts(prompt_tokens=sum(len(request.prompt_ids) for request in admitted))
        if admitted and self.cache_tokens is not None:
            self._rows.shrink(self.cache_tokens - held, keep={request.episode_id for request in admitted})
        return admitted

    def _advance(self, running: list[Request], update: Update) -> None:
        """Sample one token for each row that has logits, and answer the requests that are complete."""
        requests = update.requests
        tokens, logprobs = sample_tokens(
            update.logits, [request.params for request in requests], [request.next_uniform() for request in requests]
        )
        self.counts += Counts(sampled_tokens=len(requests), uncached_rows=0 if self._is_cached else len(requests))
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            request.append(token, logprob)
        for request in [r for r in requests if r.stop_reason is not None]:
            self._leave(running, request, keep=True)
            if not request.future.done():
                request.future.set_result(request.result(self.policy_version))

    def _leave(self, running: list[Request], request: Request, *, keep: bool) -> None:
        running.remove(request)
        self._rows.leave(request, keep=keep and not request.future.cancelled())


def sample_tokens(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[list[int], list[float]]:
    """
    Sample one token per row, by inverting the row's cumulative distribution at the row's own random number.

    Args:
        logits (`torch.Tensor`):
            Shape (n, V).
        params (`Sequence[SamplingParams]`):
            How each row is sampled; `temperature` 0 takes the most likely token.
        uniforms (`Sequence[float]`):
            A number in [0, 1) for each row.

    Returns:
        The tokens, and their log-probabilities under softmax(logits / temperature) (temperature 1 for greedy rows),
        before `top_k` and `top_p`.

    Raises:
        RolloutError: If logits are not numbers.
    """
    temperatures = [p.temperature for p in params]
    logits = logits.float()
    if any(t not in (0.0, 1.0) for t in temperatures):
        divisors = torch.tensor([t or 1.0 for t in temperatures], device=logits.device)
        logits = logits / divisors[:, None]
    logprobs = logits.log_softmax(-1)  # (n, V)
    if any(temperatures):
        cumulative = _keep_most_likely(logprobs, params).exp().cumsum(-1, dtype=torch.double)
        total = cumulative[:, -1:]
        thresholds = torch.tensor(uniforms, dtype=torch.double, device=logits.device)[:, None] * total
        # Below the total in spite of rounding, so that the token has a probability above zero.
        thresholds = torch.minimum(thresholds, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # a row of NaNs gives any position
    if not all(temperatures):
        greedy = torch.tensor([t == 0.0 for t in temperatures], device=logits.device)
        most_likely = logprobs.argmax(-1)
        tokens = torch.where(greedy, most_likely, tokens) if any(temperatures) else most_likely
    chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1).tolist()
    if any(map(math.isnan, chosen)):
        raise RolloutError("the policy's logits are not finite numbers; its weights have diverged or are damaged")
    return tokens.tolist(), chosen


def _keep_most_likely(logprobs: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Set what `top_k` and `top_p` exclude to -inf."""
    if all(p.top_p >= 1.0 and p.top_k <= 0 for p in params):
        return logprobs
    vocabulary = logprobs.shape[-1]
    top_k = torch.tensor([p.top_k if p.top_k > 0 else vocabulary for p in params], device=logprobs.device)
    # A `top_p` of 1 must exclude nothing in spite of rounding: other rows' restrictions do not change a row.
    top_p = torch.tensor([p.top_p if p.top_p < 1.0 else math.inf for p in params], device=logprobs.device)
    descending, order = logprobs.sort(dim=-1, descending=True, stable=True)
    before = descending.exp().cumsum(-1) - descending.exp()  # probability of all that is more likely
    rank = torch.arange(vocabulary, device=logprobs.device)
    excluded = (rank >= top_k[:, None]) | (before >= top_p[:, None])
    excluded[:, 0] = False
    return logprobs.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), -torch.inf)
