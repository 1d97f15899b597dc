"""The in-process engine: one batch over all episodes that are waiting for a response.

`generate` starts and ends with its whole batch; episodes do not. Here a response joins the running batch when its
prompt arrives and leaves it with its last token, so the batch stays full while tools answer. Keys and values live in
storage of our own, where every row has its own length: there is no left padding, a row is continued from where the
episode's previous step ended, and a row that leaves takes its part along.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from transformers import Cache

from ..compat.transformers import (
    CacheLayerMixin,
    attention_of,
    cache_argument,
    special_attention,
    takes_positions,
)
from ..errors import ConfigurationError, RolloutError
from ..modes import evaluating
from ..numerics import CastWeights, Numerics, deviates
from ..types import StopReason, TokenIds, num_shared
from .base import Sample, SamplingParams, check_request, vocabulary_size

logger = logging.getLogger(__name__)

_PREFILL_TOKENS = 16_384  # new tokens of one prefill forward pass, padding included
_PREFILL_PADDING = 1_024  # padding of one prefill forward pass
_MASK_ELEMENTS = 2**26  # elements of one prefill attention mask
_MASKED = ("sdpa", "sdpa_tree", "flex_tree", "eager")  # attention implementations that take a dense mask


class LocalSampler:
    """
    Samples from a transformers causal language model in this process. Greedy output and log-probabilities equal those
    of one plain forward pass over prompt and response.

    Args:
        model (`PreTrainedModel`):
            A causal language model whose layers are all full attention through SDPA or eager. Others (sliding
            windows, state-space layers, ALiBi, flash attention) need `allow_uncached`.
        cache_tokens (`int`, *optional*, defaults to `262144`):
            Bound on the tokens whose keys and values are held: for running responses their number times the longest
            of them, for waiting episodes what they have. Responses that do not fit wait for others to end; waiting
            episodes are forgotten least-recently-used first and prefilled again. `None`: no bound.
        allow_uncached (`bool`, *optional*, defaults to `False`):
            Whether a model that cannot be continued from stored keys and values is sampled without: exact, but each
            token costs a forward pass over its whole row.
        numerics ([`~numerics.Numerics`], *optional*):
            The device and the precision of forward passes, in whichever thread they run. `None`: the device where the
            model is now, and the types of its weights.

    Raises:
        ConfigurationError: If `cache_tokens` is not positive; if the model cannot be sampled with a cache and
            `allow_uncached` is not set; from `sample`, if one response alone exceeds the bound, or a number of its
            [`SamplingParams`] is outside of its range.
        DataError: From `sample`, if the prompt is empty, or has a token id that the model cannot read.
        RolloutError: From `sample`, if the model's logits are not numbers.
    """

    def __init__(
        self,
        model: nn.Module,
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
        self._casts: CastWeights | None = None  # of the weights as they are, while responses are sampled
        self.sampled_tokens = 0
        self.prompt_tokens = 0
        self.prefilled_tokens = 0
        self.uncached_rows = 0  # forwarded whole for one more token each
        self.forward_s = 0.0  # seconds in the model's forward passes
        self._waiting: list[_Request] = []
        self._driver: asyncio.Task[None] | None = None
        self._settled: Callable[[], Awaitable[None]] | None = None
        # Any object with the same methods would do: which one is a question of the model's attention alone.
        with self.numerics.forward_pass():
            is_cached = samples_with_a_cache(model, allow_uncached=allow_uncached)
        self._rows = _CachedRows(model, cache_tokens) if is_cached else _UncachedRows(model)

    async def sample(
        self, prompt_ids: Sequence[int], params: SamplingParams, *, episode_id: str, order: tuple[int, ...] = ()
    ) -> Sample:
        """Continue `prompt_ids`; see [`Sampler`]."""
        check_request(prompt_ids, params, episode_id=episode_id, vocabulary_size=self.vocabulary_size)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Sample] = loop.create_future()
        request = _Request(list(prompt_ids), params, episode_id, order, future)
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

    def pace(self, settled: Callable[[], Awaitable[None]] | None) -> None:
        """Await `settled()` before each batch is formed; see [`Sampler`]."""
        self._settled = settled

    def reset_cache(self) -> None:
        """Forget all that was computed with the weights, which have changed: waiting episodes' keys and values too."""
        self._casts = None
        self._rows.forget_all()

    async def _drive(self) -> None:
        """One forward pass after another, for as long as anyone waits for a token."""
        running: list[_Request] = []
        if self._rows.requests:
            self._rows.clear()  # left behind by a driver that was cancelled
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

    async def _sample_all(self, running: list[_Request]) -> None:
        """Fill the batch and sample from it until nobody waits."""
        with evaluating(self.model):
            while running or self._waiting:
                await asyncio.sleep(0)  # lets episodes whose answer just came hand in their next prompt
                if self._settled is not None:
                    await self._settled()
                for request in [r for r in running if r.future.cancelled()]:
                    self._leave(running, request, keep=False)  # its episode was released already
                arrived = self._admit(running)
                self.prompt_tokens += sum(len(request.prompt_ids) for request in arrived)
                running += arrived
                if running:
                    start = time.perf_counter()
                    with self._forward_pass():
                        update = self._rows.join(arrived) if arrived else self._rows.step()
                    self.forward_s += time.perf_counter() - start
                    self._advance(running, update)

    @contextmanager
    def _forward_pass(self) -> Iterator[None]:
        """Around what calls the model; nothing of it stays in the thread, which others use meanwhile."""
        with self.numerics.forward_pass():
            if self.numerics.autocast is None:
                yield
                return
            if self._casts is None:
                self._casts = CastWeights(self.model, self.numerics.autocast)
            with self._casts.in_use():
                yield

    def _admit(self, running: list[_Request]) -> list[_Request]:
        """Move waiting requests into the batch, in an order that no coroutine's timing can change."""
        self._waiting = sorted((r for r in self._waiting if not r.future.cancelled()), key=lambda r: r.order)
        longest = max((request.max_tokens for request in running), default=0)
        held, admitted = len(running) * longest, list[_Request]()
        for request in self._waiting:
            longest = max(longest, request.max_tokens)
            rows = len(running) + len(admitted) + 1
            if self.cache_tokens is not None and rows * longest > self.cache_tokens:
                break
            held = rows * longest
            admitted.append(request)
        del self._waiting[: len(admitted)]
        if admitted and self.cache_tokens is not None:
            self._rows.shrink(self.cache_tokens - held, keep={request.episode_id for request in admitted})
        return admitted

    def _advance(self, running: list[_Request], update: tuple[list[_Request], torch.Tensor, int]) -> None:
        """Sample one token for each row that has logits, and let go of those that are complete."""
        requests, logits, prefilled = update
        self.prefilled_tokens += prefilled
        self.uncached_rows += len(requests) if isinstance(self._rows, _UncachedRows) else 0
        tokens, logprobs = sample_tokens(
            logits, [request.params for request in requests], [request.next_uniform() for request in requests]
        )
        self.sampled_tokens += len(requests)
        for request, token, logprob in zip(requests, tokens, logprobs, strict=True):
            request.append(token, logprob)
        for request in [r for r in requests if r.stop_reason is not None]:
            self._leave(running, request, keep=True)
            if not request.future.done():
                request.future.set_result(request.result(self.policy_version))

    def _leave(self, running: list[_Request], request: _Request, *, keep: bool) -> None:
        running.remove(request)
        self._rows.leave(request, keep=keep and not request.future.cancelled())


@dataclass(eq=False)
class _Request:
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
        """The number that decides the next token: the response's own stream, whoever shares its batch."""
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


def sample_tokens(
    logits: torch.Tensor, params: Sequence[SamplingParams], uniforms: Sequence[float]
) -> tuple[list[int], list[float]]:
    """
    Sample one token a row by inverting its cumulative distribution at that row's own number.

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
        # Below the total, whatever rounding did: so that the token found has a probability above zero.
        thresholds = torch.minimum(thresholds, torch.nextafter(total, torch.zeros_like(total)))
        tokens = torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)
        tokens = tokens.clamp(max=logits.shape[-1] - 1)  # among NaNs, any place is found
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
    # What rounds up to 1 must exclude nothing: a row is sampled the same beside rows that are restricted.
    top_p = torch.tensor([p.top_p if p.top_p < 1.0 else math.inf for p in params], device=logprobs.device)
    descending, order = logprobs.sort(dim=-1, descending=True, stable=True)
    before = descending.exp().cumsum(-1) - descending.exp()  # probability of all that is more likely
    rank = torch.arange(vocabulary, device=logprobs.device)
    excluded = (rank >= top_k[:, None]) | (before >= top_p[:, None])
    excluded[:, 0] = False
    return logprobs.masked_fill(torch.zeros_like(excluded).scatter(-1, order, excluded), -torch.inf)


def samples_with_a_cache(model: nn.Module, *, allow_uncached: bool) -> bool:
    """
    Whether responses of a model are sampled with stored keys and values, as is known from its configuration and tried
    out, once for each class of model and attention implementation.

    Args:
        model (`PreTrainedModel`):
            A causal language model, whole on this rank.
        allow_uncached (`bool`):
            Whether it may be sampled without, which costs a multiple of the time.

    Raises:
        ConfigurationError: If it has to be sampled without, and may not.
    """
    obstacles = list(_obstacles(model)) or list(_disagreements(model))
    if not obstacles:
        return True
    found = f"{type(model).__name__} cannot be continued from stored keys and values ({', '.join(obstacles)})"
    if not allow_uncached:
        raise ConfigurationError(
            f"{found}: each token would cost a forward pass over its whole row. Load the model with "
            "`attn_implementation='sdpa'` if that is what it lacks, sample on a server (`use_vllm`), or set "
            "`allow_uncached_sampling` to sample it all the same"
        )
    logger.warning("%s: sampling recomputes the whole row for every token (`allow_uncached_sampling`)", found)
    return False


def _obstacles(model: nn.Module) -> Iterator[str]:
    """What keeps a model's rows from being continued with a dense mask over one storage."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    yield from special_attention(config)
    if not takes_positions(model):
        yield "its forward pass takes no position ids"
    if cache_argument(model) is None:
        yield f"its forward pass takes no cache by a name that is known for transformers {transformers.__version__}"
    if attention_of(config) not in _MASKED:
        yield f"{attention_of(config)!r} attention takes no dense mask"


def _disagreements(model: nn.Module) -> Iterator[str]:
    """What rows that are continued from their storage have other logits than the same rows whole."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr,operator]
    key = (type(model), attention_of(config), next(model.parameters()).dtype)
    if key not in _tried:
        with evaluating(model):
            _tried[key] = _first_disagreement(model, config.vocab_size)
    if _tried[key]:
        yield f"{_tried[key]} with transformers {transformers.__version__} gives other logits than a whole row"


_tried: dict[tuple[Any, ...], str] = {}  # of this process, whose versions are what they are; "": they agree


@torch.no_grad()
def _first_disagreement(model: nn.Module, vocab_size: int) -> str:
    """Two rows of different lengths are begun, each is given a token, and one goes on by several after a pause."""
    rows = _CachedRows(model, None)

    def row(episode_id: str, ids: Sequence[int]) -> _Request:
        nobody: Any = None
        return _Request([token % vocab_size for token in ids], SamplingParams(4), episode_id, (), nobody)

    def plain(ids: Sequence[int]) -> torch.Tensor:
        device = next(model.parameters()).device
        logits: torch.Tensor = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[:, -1]
        return logits

    def differs(update: _Update) -> bool:
        for request, found in zip(update[0], update[1], strict=True):
            expected = plain(request.ids)
            # As far off as the same last token behind others.
            mistake = plain([*((token + 1) % vocab_size for token in request.ids[:-1]), request.ids[-1]]) - expected
            if deviates(found[None], expected, mistake):
                return True
        return False

    long, short = row("long", range(1, 8)), row("short", range(11, 14))
    if differs(rows.join([long, short])):
        return "a prompt"
    long.response_ids.append(21 % vocab_size)
    short.response_ids.append(22 % vocab_size)
    if differs(rows.step()):
        return "a token that continues a row"
    rows.leave(long, keep=True)
    if differs(rows.join([row("long", [*long.ids, 31, 32, 33])])):
        return "a prompt that continues a row"
    return ""


# The rows of the running batch. `join` and `step` return the requests that have logits for their next token, these
# logits (n, V), and how many prompt tokens were forwarded.
_Update = tuple[list[_Request], torch.Tensor, int]


class _UncachedRows:
    """Forwards every row whole for every token: for models whose state is not keys and values alone."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.requests: list[_Request] = []

    def join(self, arrived: list[_Request]) -> _Update:
        self.requests += arrived
        return self._forward(arrived)

    def step(self) -> _Update:
        return self._forward(self.requests)

    def leave(self, request: _Request, *, keep: bool) -> None:
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
    def _forward(self, requests: list[_Request]) -> _Update:
        device = next(self.model.parameters()).device
        rows = [torch.tensor(request.ids) for request in requests]
        # No mask: padding comes last, where no token sees it.
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
        ends = torch.tensor([len(row) - 1 for row in rows], device=device)
        logits = _last_logits(self.model, ends, input_ids=input_ids, use_cache=False)
        return list(requests), logits, sum(len(request.prompt_ids) for request in requests)


class _Layer(CacheLayerMixin):
    """Keys and values of one layer: (rows, heads, tokens, head size). The last column takes what padding writes."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, cursor: _Cursor) -> None:
        super().__init__()
        self.cursor = cursor

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, tokens = self.cursor.capacity
        self.keys = key_states.new_zeros(rows, key_states.shape[1], tokens + 1, key_states.shape[3])
        self.values = value_states.new_zeros(rows, value_states.shape[1], tokens + 1, value_states.shape[3])
        self.is_initialized = True

    def resize(self) -> None:
        """Take the cursor's capacity, and along what is stored within it."""
        if not self.is_initialized:
            return
        rows, tokens = self.cursor.capacity
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_zeros(rows, old.shape[1], tokens + 1, old.shape[3])
            kept_rows, kept_tokens = min(rows, old.shape[0]), min(tokens, old.shape[2] - 1)
            new[:kept_rows, :, :kept_tokens] = old[:kept_rows, :, :kept_tokens]
            setattr(self, name, new)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first, last, columns, seen = self.cursor.first, self.cursor.last, self.cursor.columns, self.cursor.seen
        rows = torch.arange(first, last, device=key_states.device)[:, None]
        self.keys[rows, :, columns] = key_states.transpose(1, 2).to(self.keys.dtype)
        self.values[rows, :, columns] = value_states.transpose(1, 2).to(self.values.dtype)
        return self.keys[first:last, :, :seen], self.values[first:last, :, :seen]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cursor.seen, 0

    def get_seq_length(self) -> int:
        return 0  # positions are always given; a mask is given wherever one is needed

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in transformers before 5.13


@dataclass
class _Cursor:
    """Where a forward pass writes: rows `first` to `last`, at `columns` (rows, new tokens), of `seen` tokens."""

    capacity: tuple[int, int] = (0, 0)  # rows, tokens
    first: int = 0
    last: int = 0
    columns: torch.Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    seen: int = 0


@dataclass
class _Parked:
    """What an episode that waits for its environment keeps: its tokens, and their keys and values per layer."""

    ids: list[int]
    layers: list[tuple[torch.Tensor, torch.Tensor]]  # each (heads, tokens, head size)


class _CachedRows:
    """
    The running batch, in rows 0 to n-1 of the storage. A row that leaves is parked with its episode, and the last row
    takes its place, so that a forward pass always runs over one contiguous block.
    """

    def __init__(self, model: nn.Module, cache_tokens: int | None) -> None:
        self.model = model
        self.cache_argument = str(cache_argument(model))
        self.cache_tokens = cache_tokens
        self.requests: list[_Request] = []
        self.lengths: list[int] = []  # tokens of each row whose keys and values are stored
        self.parked: OrderedDict[str, _Parked] = OrderedDict()  # least recently used first
        self.cursor = _Cursor()
        self.clear()

    def clear(self) -> None:
        self.requests, self.lengths = [], []
        self.cursor = _Cursor(self.cursor.capacity)  # the next rollout mostly needs as much: it is made in one go
        config: Any = self.model.config.get_text_config()  # type: ignore[union-attr,operator]
        self.layers = [_Layer(self.cursor) for _ in range(config.num_hidden_layers)]
        self.cache = Cache(layers=list(self.layers))
        self.parked.clear()

    def forget(self, episode_id: str) -> None:
        self.parked.pop(episode_id, None)

    def forget_all(self) -> None:
        self.parked.clear()
        if not self.requests:
            self.clear()  # gives the storage back between rollouts

    def shrink(self, tokens: int, keep: set[str]) -> None:
        """Forget the least recently used episodes, except `keep`, until the others hold at most `tokens`."""
        others = [episode_id for episode_id in self.parked if episode_id not in keep]
        held = sum(len(self.parked[episode_id].ids) for episode_id in others)
        for episode_id in others:
            if held <= tokens:
                return
            held -= len(self.parked.pop(episode_id).ids)

    def join(self, arrived: list[_Request]) -> _Update:
        """Add rows and prefill what of their prompts is not stored yet; one that several have only once."""
        first = len(self.requests)
        self._reserve(self.requests + arrived)
        parked = [self.parked.pop(request.episode_id, None) for request in arrived]
        found, twins = [], []
        leaders: dict[tuple[int, ...], _Request] = {}  # of the members of a group, whose episodes begin alike
        for request, p in zip(arrived, parked, strict=True):
            leader = leaders.setdefault(tuple(request.prompt_ids), request) if p is None else request
            if leader is request:
                found.append((request, p, _num_shared(request, p)))
            else:
                twins.append((request, leader))
        # Rows of similar length side by side: a forward pass pads them to the longest.
        for request, p, shared in sorted(found, key=lambda f: len(f[0].prompt_ids) - f[2]):
            if p is not None:
                self._unpark(p, len(self.requests), shared)
            self.requests.append(request)
            self.lengths.append(shared)
        logits, prefilled = [], 0
        for start, stop in self._prefill_groups(first):
            new = [self.requests[row].prompt_ids[self.lengths[row] :] for row in range(start, stop)]
            logits.append(self._forward(start, stop, new))
            prefilled += sum(len(ids) for ids in new)
        num_prefilled = len(self.requests) - first
        rows = [self.requests.index(leader) for _, leader in twins]
        for (request, _), row in zip(twins, rows, strict=True):
            self._copy_row(row, len(self.requests))
            self.requests.append(request)
            self.lengths.append(self.lengths[row])
        order = torch.tensor([*range(num_prefilled), *(row - first for row in rows)])
        every = torch.cat(logits)
        return self.requests[first:], every[order.to(every.device)] if twins else every, prefilled

    def step(self) -> _Update:
        """Forward the last sampled token of every row."""
        new = [[request.response_ids[-1]] for request in self.requests]
        return list(self.requests), self._forward(0, len(self.requests), new), 0

    def leave(self, request: _Request, *, keep: bool) -> None:
        row, last = self.requests.index(request), len(self.requests) - 1
        if keep:
            length = self.lengths[row]
            layers = [(x.keys[row, :, :length].clone(), x.values[row, :, :length].clone()) for x in self.layers]
            self.parked[request.episode_id] = _Parked(request.ids[:length], layers)
            self.parked.move_to_end(request.episode_id)
        if row != last:
            self._copy_row(last, row)
            self.requests[row], self.lengths[row] = self.requests[last], self.lengths[last]
        self.requests.pop()
        self.lengths.pop()

    def _copy_row(self, source: int, target: int) -> None:
        length = self.lengths[source]
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def _unpark(self, parked: _Parked, row: int, shared: int) -> None:
        """Bring back what the episode's last step stored, as far as the new prompt continues it."""
        for layer, (keys, values) in zip(self.layers, parked.layers, strict=True):
            layer.keys[row, :, :shared] = keys[:, :shared]
            layer.values[row, :, :shared] = values[:, :shared]

    def _reserve(self, requests: Sequence[_Request]) -> None:
        """Storage for these rows; grown by half, so that growing stays rare, as far as the bound allows."""
        rows, tokens = len(requests), max(request.max_tokens for request in requests)
        have_rows, have_tokens = self.cursor.capacity
        if rows <= have_rows and tokens <= have_tokens:
            return
        more_rows = max(rows, have_rows * 3 // 2) if rows > have_rows else have_rows
        more_tokens = max(tokens, have_tokens * 3 // 2) if tokens > have_tokens else have_tokens
        fits = self.cache_tokens is None or more_rows * more_tokens <= self.cache_tokens
        self.cursor.capacity = (more_rows, more_tokens) if fits else (rows, tokens)
        for layer in self.layers:
            layer.resize()

    def _prefill_groups(self, first: int) -> list[tuple[int, int]]:
        """
        Split rows `first` onwards, sorted by new tokens, so that neither the tokens, the padding nor the mask of a
        forward pass grow without bound.
        """
        groups: list[tuple[int, int]] = []
        start, total, seen = first, 0, 0
        for row in range(first, len(self.requests)):
            length = len(self.requests[row].prompt_ids)
            new = length - self.lengths[row]
            total, seen = total + new, max(seen, length)
            tokens = new * (row + 1 - start)
            too_large = tokens > _PREFILL_TOKENS or tokens - total > _PREFILL_PADDING or tokens * seen > _MASK_ELEMENTS
            if row > start and too_large:
                groups.append((start, row))
                start, total, seen = row, new, length
        return [*groups, (start, len(self.requests))]

    @torch.no_grad()
    def _forward(self, first: int, last: int, new: list[list[int]]) -> torch.Tensor:
        """Forward `new` tokens of rows `first` to `last`; the logits after each row's last token (rows, V)."""
        device = next(self.model.parameters()).device
        width = max(map(len, new))
        old_lengths = torch.tensor(self.lengths[first:last])
        new_lengths = torch.tensor([len(ids) for ids in new])
        offsets = torch.arange(width)
        positions = old_lengths[:, None] + offsets  # (rows, width)
        is_new = offsets < new_lengths[:, None]
        seen = int((old_lengths + new_lengths).max())
        self.cursor.first, self.cursor.last, self.cursor.seen = first, last, seen
        self.cursor.columns = positions.masked_fill(~is_new, self.cursor.capacity[1]).to(device)
        if bool((old_lengths == 0).all()):
            mask = None  # every row starts here: plain causal attention, and padding comes last
        else:
            mask = (torch.arange(seen) <= positions[:, :, None])[:, None].to(device)  # (rows, 1, width, seen)
            if attention_of(self.model.config) == "eager":
                dtype = next(self.model.parameters()).dtype  # eager attention adds its mask to the scores
                mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)
        input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in new], device=device)
        logits = _last_logits(
            self.model,
            (new_lengths - 1).to(device),
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=positions.to(device),
            use_cache=True,
            **{self.cache_argument: self.cache},
        )
        for row, count in zip(range(first, last), new_lengths.tolist(), strict=True):
            self.lengths[row] += count
        return logits


def _last_logits(model: Any, ends: torch.Tensor, **inputs: Any) -> torch.Tensor:
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


def _num_shared(request: _Request, parked: _Parked | None) -> int:
    """Prompt tokens stored with the episode; the last is forwarded anyway, since its logits start the response."""
    return min(num_shared(parked.ids, request.prompt_ids), len(request.prompt_ids) - 1) if parked else 0
